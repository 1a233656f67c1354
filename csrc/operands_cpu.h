// What matrix products of the CPU kernels are made of: numbers of the type that is summed; or, where the processor
// multiplies them (AVX512-BF16, AMX), pairs of bfloat16 numbers, each of which is two steps of the sum at once.
#pragma once

#include "vectors_cpu.h"

namespace restoration::CPU_ISA {

// Steps of a sum in one element of an operand.
template <typename E>
constexpr int kSteps = 1;
// What operands of a call's dtype are made of.
template <typename T>
struct OperandOf {
  using Type = AccumulateType<T>;
};
template <typename T>
using Operand = typename OperandOf<T>::Type;

template <typename V>
HOST_DEVICE V multiply_add(V sum, V left, V right) {
  return sum + left * right;
}
template <typename A>
HOST_DEVICE Vector<A> add_scaled(Vector<A> sum, A factor, Vector<A> vector) {
  return sum + factor * vector;
}

#if defined(__AVX512BF16__)
struct BFloat16Pair {
  BFloat16 first;
  BFloat16 second;
};
template <>
constexpr int kSteps<BFloat16Pair> = 2;
template <>
struct OperandOf<BFloat16> {
  using Type = BFloat16Pair;
};
template <>
struct VectorOf<BFloat16Pair> {
  typedef int32_t Type __attribute__((vector_size(kVectorBytes)));
};

// Both products of each pair are added, to float32; denormal numbers count as zero.
HOST_DEVICE Vector<float> multiply_add(Vector<float> sum, Vector<BFloat16Pair> left, Vector<BFloat16Pair> right) {
  return (Vector<float>)_mm512_dpbf16_ps((__m512)sum, (__m512bh)left, (__m512bh)right);
}
HOST_DEVICE Vector<float> add_scaled(Vector<float> sum, BFloat16Pair factor, Vector<BFloat16Pair> vector) {
  int32_t bits;
  std::memcpy(&bits, &factor, sizeof(bits));
  return multiply_add(sum, (Vector<BFloat16Pair>)_mm512_set1_epi32(bits), vector);
}
#endif

// A vector of pairs from two vectors of numbers, lane by lane.
template <typename E>
HOST_DEVICE Vector<E> pack_pairs(Vector<float> first, Vector<float> second) {
#if defined(__AVX512BF16__)
  Vector<E> order;
  for (int lane = 0; lane < kLanes<E>; ++lane) order[lane] = lane | (lane + kLanes<E>) << 16;
  const __m512bh halves = _mm512_cvtne2ps_pbh((__m512)second, (__m512)first);
  return (Vector<E>)_mm512_permutexvar_epi16((__m512i)order, (__m512i)halves);
#else
  static_assert(kSteps<E> == 2, "made for pairs");
#endif
}

// Both numbers of each pair times the factor of its lane, rounded.
template <typename E>
HOST_DEVICE Vector<E> scale_pairs(Vector<E> pairs, Vector<float> factors) {
  const Vector<E> first = pairs << 16, second = pairs & int32_t(0xffff0000);
  return pack_pairs<E>((Vector<float>)first * factors, (Vector<float>)second * factors);
}

// One vector of an operand of a sum over pixels, from kSteps vectors of numbers of pixels in order.
template <typename E>
HOST_DEVICE Vector<E> pack_pixels(const Vector<AccumulateType<E>>* pixels) {
#if defined(__AVX512BF16__)
  if constexpr (kSteps<E> == 2) return (Vector<E>)_mm512_cvtne2ps_pbh((__m512)pixels[1], (__m512)pixels[0]);
#endif
  if constexpr (kSteps<E> == 1) return pixels[0];
}

// Number `vector` of the vectors of numbers in operand vectors that lie `stride` apart.
template <typename E>
HOST_DEVICE Vector<AccumulateType<E>> unpack_pixels(const E* packed, int64_t stride, int64_t vector) {
  if constexpr (kSteps<E> == 1) {
    return load(packed + vector * stride);
  } else {
    const E* pairs = packed + vector / 2 * stride + vector % 2 * (kLanes<E> / 2);
    return load_vector(reinterpret_cast<const BFloat16*>(pairs));
  }
}

// The sizes of products that stay in registers, by element of the operands, and where their numbers lie. A panel is
// some rows of one operand, a tile some pixels of another; and, for sums over pixels, a block is some rows of both.
template <typename E>
struct Blocks {
#if defined(__AVX512F__) || defined(__aarch64__)
  static constexpr int kPanelRows = 8;
  static constexpr int kColumns = 12;
#else
  static constexpr int kPanelRows = 4;
  static constexpr int kColumns = 6;
#endif
  // Elements that a panel is rounded up to.
  static constexpr int kPanelElements = 1;
  // kPanelRows x 3 vectors of sums, 3 of a tile and one number of the panel fill the 32 registers of AVX-512 and NEON
  // and the 16 of AVX2 and SSE2; as do, of two blocks, kColumns x 2 vectors of sums, 2 of rows and one number.
  static constexpr int kTile = 3 * kLanes<E>;
  static constexpr int kRows = kLanes<E>;

  // Of an element in its panel.
  HOST_DEVICE static int64_t panel_place(int64_t row, int64_t element) { return element * kPanelRows + row; }
  // Of a sum in its block.
  HOST_DEVICE static int64_t sum_place(int64_t row, int64_t column) { return column * kRows + row; }
};

template <typename E>
constexpr int kPanelRows = Blocks<E>::kPanelRows;
template <typename E>
constexpr int kTile = Blocks<E>::kTile;
template <typename E>
constexpr int kBlockRows = Blocks<E>::kRows;
template <typename E>
constexpr int kBlockColumns = Blocks<E>::kColumns;
template <typename E>
constexpr int kBlockSums = kBlockRows<E> * kBlockColumns<E>;

// Whether products are made by a matrix unit (matrix_unit_cpu.h) in place of vectors. A thread that makes them holds a
// MatrixUnit meanwhile.
#if defined(__AMX_BF16__)
template <typename E>
constexpr bool kHasMatrixUnit = kSteps<E> == 2;
#else
template <typename E>
constexpr bool kHasMatrixUnit = false;
#endif
template <typename E>
class MatrixUnit {};

}  // namespace restoration::CPU_ISA

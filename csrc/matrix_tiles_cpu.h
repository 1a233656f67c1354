// Small matrix products that stay in registers, for CPU kernels that make their operands as they go.
// Pixels lie along the vectors. A tile is kTile pixels of every row of one operand; a panel is [steps, kPanelRows] of
// the other, read from front to back.
// Operands hold numbers of the type that is summed; or, where the processor multiplies them (AVX512-BF16), pairs of
// bfloat16 numbers: each pair is two steps of the sum at once.
#pragma once

#include <utility>

#include "vectors_cpu.h"

namespace restoration::CPU_ISA {

#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kPanelRows = 8;
#else
constexpr int kPanelRows = 4;
#endif

// kPanelRows x kTileVectors sums, kTileVectors vectors of a tile and one number of the panel fill the 32 registers of
// AVX-512 and NEON (8 x 3) and the 16 of AVX2 and SSE2 (4 x 3).
constexpr int kTileVectors = 3;

// Two loops of so many sums in one function, and the compiler keeps them in memory.
#define SEPARATE __attribute__((noinline))

template <typename A>
constexpr int kTile = kTileVectors * kLanes<A>;

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
    typedef uint16_t Half __attribute__((vector_size(kVectorBytes / 2)));
    typedef uint32_t Words __attribute__((vector_size(kVectorBytes)));
    Half half;
    std::memcpy(&half, packed + vector / 2 * stride + vector % 2 * (kLanes<E> / 2), sizeof(half));
    return (Vector<float>)(__builtin_convertvector(half, Words) << 16);
  }
}

HOST_DEVICE constexpr int64_t round_up(int64_t count, int64_t multiple) {
  return ceil_divide(count, multiple) * multiple;
}

// Threads take longer to wake than one takes to pack fewer numbers.
constexpr int64_t kParallelNumbers = int64_t{1} << 15;

// panels [ceil(rows / kPanelRows), ceil(depth / kSteps), kPanelRows] of the matrix value(row, step), zero below its
// last row.
template <typename E, typename Value>
void pack_panels(E* panels, int64_t rows, int64_t depth, int threads, Value value) {
  const int64_t panel_size = ceil_divide(depth, kSteps<E>) * kPanelRows;
#pragma omp parallel for num_threads(threads) if (rows * depth >= kParallelNumbers)
  for (int64_t first = 0; first < rows; first += kPanelRows) {
    E* packed = panels + first / kPanelRows * panel_size;
    for (int64_t step = 0; step < depth; step += kSteps<E>) {
      for (int64_t row = first; row < first + kPanelRows; ++row) {
        auto number = [&](int64_t index) { return row < rows && index < depth ? value(row, index) : 0; };
        if constexpr (kSteps<E> == 2) {
          *packed++ = {BFloat16(number(step)), BFloat16(number(step + 1))};
        } else {
          *packed++ = number(step);
        }
      }
    }
  }
}

template <int kVectors, typename A>
using PanelSums = Vector<A>[kPanelRows][kVectors];

// sums += panel^T · tile. Vector v of element e of the tile lies at tile + e · element_stride + v · vector_stride; it
// is multiplied with factors[v] first, where factors are given.
template <int kVectors, typename E>
HOST_DEVICE void add_panel_products(const E* panel, const E* tile, int64_t elements, int64_t element_stride,
                                    int64_t vector_stride, const Vector<E>* factors,
                                    PanelSums<kVectors, AccumulateType<E>>& sums) {
  for (int64_t element = 0; element < elements; ++element, panel += kPanelRows, tile += element_stride) {
    Vector<E> column[kVectors];
#pragma GCC unroll 4
    for (int vector = 0; vector < kVectors; ++vector) {
      column[vector] = load(tile + vector * vector_stride);
      if (factors != nullptr) column[vector] *= factors[vector];
    }
#pragma GCC unroll 8
    for (int row = 0; row < kPanelRows; ++row) {
#pragma GCC unroll 4
      for (int vector = 0; vector < kVectors; ++vector) {
        sums[row][vector] = add_scaled(sums[row][vector], panel[row], column[vector]);
      }
    }
  }
}

// product [kPanelRows, kTile] = sums.
template <int kVectors, typename A>
HOST_DEVICE void store_sums(const PanelSums<kVectors, A>& sums, A* product) {
#pragma GCC unroll 8
  for (int row = 0; row < kPanelRows; ++row) {
#pragma GCC unroll 4
    for (int vector = 0; vector < kVectors; ++vector) {
      store(product + row * kTile<A> + vector * kLanes<A>, sums[row][vector]);
    }
  }
}

// product [kPanelRows, kTile] = panel^T · tile, for kVectors vectors of the tile.
template <int kVectors, typename E>
SEPARATE void panel_times_tile(const E* panel, const E* tile, int64_t elements, int64_t element_stride,
                               int64_t vector_stride, AccumulateType<E>* product) {
  PanelSums<kVectors, AccumulateType<E>> sums = {};
  add_panel_products<kVectors>(panel, tile, elements, element_stride, vector_stride, nullptr, sums);
  store_sums<kVectors>(sums, product);
}

// Calls call(number of vectors as a type) for a tile of which `pixels` are wanted.
template <typename A, typename Call>
HOST_DEVICE void for_tile_of(int64_t pixels, Call call) {
  if (pixels > 2 * kLanes<A>) {
    call(std::integral_constant<int, 3>());
  } else if (pixels > kLanes<A>) {
    call(std::integral_constant<int, 2>());
  } else {
    call(std::integral_constant<int, 1>());
  }
}

// Rows of the two operands in one block of sums over pixels; sums and operands fill two thirds of the registers.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kBlockRows = 4;
#else
constexpr int kBlockRows = 2;
#endif
constexpr int kBlockColumns = 4;
// A multiple of the lanes of every vector, as sum_lanes wants it.
constexpr int kBlockSums = kBlockRows * kBlockColumns;

// Lane i of the result: lanes i and i^kStep summed, of a where bit kStep of i is 0, of b where it is 1.
template <int kStep, typename A, int... kLane>
HOST_DEVICE Vector<A> fold(const Vector<A>& a, const Vector<A>& b, std::integer_sequence<int, kLane...>) {
#define KEPT ((kLane & kStep) != 0 ? kLanes<A> + kLane : kLane)
#define MOVED ((kLane & kStep) != 0 ? kLanes<A> + (kLane ^ kStep) : kLane ^ kStep)
#if defined(__clang__) || __GNUC__ >= 12
  return __builtin_shufflevector(a, b, KEPT...) + __builtin_shufflevector(a, b, MOVED...);
#else
  typedef Integer<A> Lane;
  typedef Lane Order __attribute__((vector_size(kVectorBytes)));
  return __builtin_shuffle(a, b, Order{KEPT...}) + __builtin_shuffle(a, b, Order{MOVED...});
#endif
#undef KEPT
#undef MOVED
}

// vectors[0] = the sums over the lanes of vectors[0], vectors[1] ... vectors[kLanes - 1].
template <typename A, int kStep = 1>
HOST_DEVICE void sum_lanes(Vector<A>* vectors) {
  if constexpr (kStep < kLanes<A>) {
#pragma GCC unroll 8
    for (int vector = 0; vector < kLanes<A>; vector += 2 * kStep) {
      vectors[vector] =
          fold<kStep, A>(vectors[vector], vectors[vector + kStep], std::make_integer_sequence<int, kLanes<A>>());
    }
    sum_lanes<A, 2 * kStep>(vectors);
  }
}

// sums [kBlockRows, kBlockColumns], row by row, += the products of kBlockRows rows of one operand and kBlockColumns of
// another over all pixels. The rows' vectors lie one after the other, and then those of the next pixels, left_stride or
// right_stride further on.
template <typename E>
SEPARATE void add_block_products(const E* left, int64_t left_stride, const E* right, int64_t right_stride,
                                 int64_t vectors, AccumulateType<E>* sums) {
  using A = AccumulateType<E>;
  Vector<A> block[kBlockSums] = {};
  for (int64_t vector = 0; vector < vectors; ++vector, left += left_stride, right += right_stride) {
    Vector<E> columns[kBlockColumns];
#pragma GCC unroll 4
    for (int column = 0; column < kBlockColumns; ++column) columns[column] = load(right + column * kLanes<E>);
#pragma GCC unroll 4
    for (int row = 0; row < kBlockRows; ++row) {
      const Vector<E> factor = load(left + row * kLanes<E>);
#pragma GCC unroll 4
      for (int column = 0; column < kBlockColumns; ++column) {
        Vector<A>& sum = block[row * kBlockColumns + column];
        sum = multiply_add(sum, factor, columns[column]);
      }
    }
  }
#pragma GCC unroll 8
  for (int first = 0; first < kBlockSums; first += kLanes<A>) {
    sum_lanes<A>(block + first);
    store(sums + first, load(sums + first) + block[first]);
  }
}

}  // namespace restoration::CPU_ISA

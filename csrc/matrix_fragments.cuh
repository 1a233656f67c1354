// Products of tensor cores: sums [16, 8] += left [16, depth] · right [depth, 8], each held by the 32 lanes of a warp
// (PTX ISA, "Matrix fragments for mma.m16n8k8 / m16n8k16"). Operands are words of 32 bits: one number of Tf32, or two
// neighbours in depth of __half or __nv_bfloat16. A product is 8 words deep whatever their type, and a lane owns the
// same words of either. Sums are float32.
// Needs compute capability 8.0.
#pragma once

#include <cstring>

#include "common.cuh"

namespace restoration {

// A float32 of which tensor cores see 8 bits of exponent and 10 of mantissa.
struct Tf32 {};

#if defined(__CUDACC__)
// Nearest, ties away from zero. Without it the hardware drops the other 13 bits, twice the error.
__device__ __forceinline__ uint32_t round_to_tf32(float value) {
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(value));
  return bits;
}

__device__ __forceinline__ uint32_t pack_pair(__half, float low, float high) {
  uint32_t bits;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
  return bits;
}

__device__ __forceinline__ uint32_t pack_pair(__nv_bfloat16, float low, float high) {
  uint32_t bits;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
  return bits;
}

#define RESTORATION_MATRIX_PRODUCT(tag, instruction)                                                                  \
  __device__ __forceinline__ void matrix_product(tag, float (&sums)[4], const uint32_t (&left)[4],                    \
                                                 const uint32_t (&right)[2]) {                                        \
    asm volatile("mma.sync.aligned." instruction                                                                      \
                 " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"                                   \
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])                                                  \
        : "r"(left[0]), "r"(left[1]), "r"(left[2]), "r"(left[3]), "r"(right[0]), "r"(right[1]));                      \
  }
RESTORATION_MATRIX_PRODUCT(Tf32, "m16n8k8.row.col.f32.tf32.tf32.f32")
RESTORATION_MATRIX_PRODUCT(__half, "m16n8k16.row.col.f32.f16.f16.f32")
RESTORATION_MATRIX_PRODUCT(__nv_bfloat16, "m16n8k16.row.col.f32.bf16.bf16.f32")
#undef RESTORATION_MATRIX_PRODUCT
#endif

constexpr int kFragmentRows = 16;
constexpr int kFragmentColumns = 8;
constexpr int kFragmentWords = 8;  // depth of a product

// One word of an operand.
template <typename T>
struct Word {
  static constexpr int kCount = 2;
  __device__ static uint32_t pack(const float (&values)[kCount]) { return pack_pair(T(), values[0], values[1]); }
  __device__ static void unpack(uint32_t word, float (&values)[kCount]) {
    T pair[kCount];
    std::memcpy(pair, &word, sizeof(word));
    values[0] = static_cast<float>(pair[0]);
    values[1] = static_cast<float>(pair[1]);
  }
};
template <>
struct Word<Tf32> {
  static constexpr int kCount = 1;
  __device__ static uint32_t pack(const float (&values)[kCount]) { return round_to_tf32(values[0]); }
  __device__ static void unpack(uint32_t word, float (&values)[kCount]) { std::memcpy(values, &word, sizeof(word)); }
};

// Numbers of depth in one product: 8 of Tf32, 16 of the others.
template <typename T>
constexpr int kFragmentDepth = kFragmentWords * Word<T>::kCount;

__device__ __forceinline__ int fragment_lane() { return threadIdx.x % kWarpThreads; }

// In all three, `place` counts what this lane owns. Blocks have threadIdx.x in whole warps.
template <typename T>
struct LeftFragment {
  static constexpr int kCount = 4;
  uint32_t words[kCount];

  __device__ static int row(int place) { return fragment_lane() / 4 + place % 2 * 8; }
  __device__ static int word(int place) { return fragment_lane() % 4 + place / 2 * 4; }
};

template <typename T>
struct RightFragment {
  static constexpr int kCount = 2;
  uint32_t words[kCount];

  __device__ static int column(int) { return fragment_lane() / 4; }
  __device__ static int word(int place) { return fragment_lane() % 4 + place * 4; }
};

struct SumFragment {
  static constexpr int kCount = 4;
  float values[kCount];

  __device__ static int row(int place) { return fragment_lane() / 4 + place / 2 * 8; }
  __device__ static int column(int place) { return fragment_lane() % 4 * 2 + place % 2; }
};

// All lanes of the warp call it together.
template <typename T>
__device__ __forceinline__ void multiply_accumulate(SumFragment& sums, const LeftFragment<T>& left,
                                                    const RightFragment<T>& right) {
  matrix_product(T(), sums.values, left.words, right.words);
}

}  // namespace restoration

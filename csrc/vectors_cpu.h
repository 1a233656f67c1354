// The widest vectors of the instruction set that a CPU kernel is compiled for: how they are read and written, how lanes
// move between them, and e^x.
#pragma once

#include <type_traits>
#include <utility>

#include "common_cpu.h"

namespace restoration::CPU_ISA {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

template <typename A>
using Integer = std::conditional_t<sizeof(A) == 4, int32_t, int64_t>;
template <typename A>
constexpr int kLanes = kVectorBytes / sizeof(A);

template <typename A>
struct VectorOf {
  typedef A Type __attribute__((vector_size(kVectorBytes)));
};
template <typename A>
using Vector = typename VectorOf<A>::Type;

// std::memcpy, as the address need not be that of a whole vector.
template <typename A>
HOST_DEVICE Vector<A> load(const A* source) {
  Vector<A> vector;
  std::memcpy(&vector, source, sizeof(vector));
  return vector;
}

template <typename A>
HOST_DEVICE void store(A* destination, Vector<A> vector) {
  std::memcpy(destination, &vector, sizeof(vector));
}

// A vector of numbers as they are kept: as many as one of what they are summed in has lanes.
template <typename T>
struct KeptVectorOf {
  using Type = Vector<T>;
};
template <>
struct KeptVectorOf<BFloat16> {
  typedef uint16_t Type __attribute__((vector_size(kVectorBytes / 2)));
};
template <typename T>
using KeptVector = typename KeptVectorOf<T>::Type;
typedef uint32_t Words __attribute__((vector_size(kVectorBytes)));

template <typename T>
HOST_DEVICE Vector<AccumulateType<T>> widened(KeptVector<T> kept) {
  if constexpr (std::is_same_v<T, BFloat16>) {
    return (Vector<float>)(__builtin_convertvector(kept, Words) << 16);
  } else {
    return kept;
  }
}

// Of numbers that T holds exactly.
template <typename T>
HOST_DEVICE KeptVector<T> narrowed(Vector<AccumulateType<T>> vector) {
  if constexpr (std::is_same_v<T, BFloat16>) {
    return __builtin_convertvector((Words)vector >> 16, KeptVector<T>);
  } else {
    return vector;
  }
}

// AVX512-BF16 rounds denormal numbers to zero.
template <typename T>
HOST_DEVICE KeptVector<T> rounded(Vector<AccumulateType<T>> vector) {
  if constexpr (std::is_same_v<T, BFloat16>) {
#if defined(__AVX512BF16__)
    return (KeptVector<T>)_mm512_cvtneps_pbh((__m512)vector);
#else
    T numbers[kLanes<float>];
#pragma omp simd
    for (int lane = 0; lane < kLanes<float>; ++lane) assign(numbers[lane], vector[lane]);
    KeptVector<T> kept;
    std::memcpy(&kept, numbers, sizeof(kept));
    return kept;
#endif
  } else {
    return vector;
  }
}

// A vector of numbers, widened to the type that is summed.
template <typename T>
HOST_DEVICE Vector<AccumulateType<T>> load_vector(const T* source) {
  KeptVector<T> kept;
  std::memcpy(&kept, source, sizeof(kept));
  return widened<T>(kept);
}

// The first `count` numbers, at most a vector, from source on; the other lanes are zero.
template <typename T, typename Count>
HOST_DEVICE Vector<AccumulateType<T>> load_numbers(const T* source, Count count) {
  if (count >= kLanes<AccumulateType<T>>) return load_vector(source);
  KeptVector<T> kept = {};
#if defined(__AVX512F__)
  const uint32_t lanes = (1u << count) - 1;
  if constexpr (sizeof(T) == 2) kept = (KeptVector<T>)_mm256_maskz_loadu_epi16(lanes, source);
  if constexpr (sizeof(T) == 4) kept = (KeptVector<T>)_mm512_maskz_loadu_epi32(lanes, source);
  if constexpr (sizeof(T) == 8) kept = (KeptVector<T>)_mm512_maskz_loadu_epi64(lanes, source);
#else
  std::memcpy(&kept, source, count * sizeof(T));
#endif
  return widened<T>(kept);
}

// The first `count` numbers of a vector, at most all.
template <typename T, typename Count>
HOST_DEVICE void store_numbers(T* destination, KeptVector<T> kept, Count count) {
  if (count >= kLanes<AccumulateType<T>>) {
    std::memcpy(destination, &kept, sizeof(kept));
    return;
  }
#if defined(__AVX512F__)
  const uint32_t lanes = (1u << count) - 1;
  if constexpr (sizeof(T) == 2) _mm256_mask_storeu_epi16(destination, lanes, (__m256i)kept);
  if constexpr (sizeof(T) == 4) _mm512_mask_storeu_epi32(destination, lanes, (__m512i)kept);
  if constexpr (sizeof(T) == 8) _mm512_mask_storeu_epi64(destination, lanes, (__m512i)kept);
#else
  std::memcpy(destination, &kept, count * sizeof(T));
#endif
}

// Lane i of the result is lane kSource[i] of a and b laid one after the other.
template <typename A, int... kSource>
HOST_DEVICE Vector<A> shuffle(const Vector<A>& a, const Vector<A>& b) {
#if defined(__clang__) || __GNUC__ >= 12
  return __builtin_shufflevector(a, b, kSource...);
#else
  typedef Integer<A> Lane;
  typedef Lane Order __attribute__((vector_size(kVectorBytes)));
  return __builtin_shuffle(a, b, Order{kSource...});
#endif
}

// Exchanges lanes of a whose number has bit kStep with lanes of b, kStep below, whose number has not.
template <int kStep, typename A, int... kLane>
HOST_DEVICE void exchange(Vector<A>& a, Vector<A>& b, std::integer_sequence<int, kLane...>) {
  const Vector<A> first = shuffle<A, ((kLane & kStep) != 0 ? kLanes<A> + (kLane ^ kStep) : kLane)...>(a, b);
  b = shuffle<A, ((kLane & kStep) != 0 ? kLanes<A> + kLane : kLane ^ kStep)...>(a, b);
  a = first;
}

// Turns a square of kLanes vectors over: lane i of vector j becomes lane j of vector i. Quarters of ever smaller squares
// trade places.
template <typename A, int kStep = kLanes<A> / 2>
HOST_DEVICE void transpose(Vector<A>* vectors) {
  if constexpr (kStep > 0) {
#pragma GCC unroll 16
    for (int vector = 0; vector < kLanes<A>; ++vector) {
      if ((vector & kStep) == 0) {
        exchange<kStep, A>(vectors[vector], vectors[vector + kStep], std::make_integer_sequence<int, kLanes<A>>());
      }
    }
    transpose<A, kStep / 2>(vectors);
  }
}

// Lane i of the result is lane i ^ kStep.
template <int kStep, typename A, int... kLane>
HOST_DEVICE Vector<A> swapped(const Vector<A>& vector, std::integer_sequence<int, kLane...>) {
  return shuffle<A, (kLane ^ kStep)...>(vector, vector);
}

// Halves are added, then quarters, and so on: lane after lane, every addition would wait for the one before.
template <typename A, int kStep = kLanes<A> / 2>
HOST_DEVICE A sum_of_lanes(const Vector<A>& vector) {
  if constexpr (kStep > 0) {
    const Vector<A> other = swapped<kStep, A>(vector, std::make_integer_sequence<int, kLanes<A>>());
    return sum_of_lanes<A, kStep / 2>(vector + other);
  } else {
    return vector[0];
  }
}

// e^x of lanes that are at most 0, but for rounding, or NaN; off by less than 2 units in the last place, and exactly 0
// where that is nearest.
template <typename A>
HOST_DEVICE Vector<A> exp_nonpositive(Vector<A> x) {
  constexpr bool kSingle = sizeof(A) == 4;
  constexpr int kMantissaBits = kSingle ? 23 : 52;
  // Below, e^x is less than half of the smallest denormal number.
  constexpr A kLowest = kSingle ? A(-104) : A(-746);
  const Vector<A> lowest = Vector<A>{} + kLowest;
  x = x < lowest ? lowest : x;
  // Adding 1.5 · 2^kMantissaBits leaves the nearest integer in the lowest bits.
  constexpr A kRounder = A(int64_t{3} << (kMantissaBits - 1));
  const Vector<A> shifted = x * A(1.4426950408889634) + kRounder;
  const Vector<A> power = shifted - kRounder;
  // ln 2 in two parts, of which the first has so few bits that its product with power, up to 11 bits long, is exact.
  constexpr A kLog2High = kSingle ? A(0.693359375) : A(0x1.62e42feep-1);
  constexpr A kLog2Low = kSingle ? A(-2.12194440054690583e-4) : A(0x1.a39ef35793c76p-33);
  const Vector<A> rest = (x - power * kLog2High) - power * kLog2Low;
  // Taylor's series on |rest| <= ln(2)/2: the first term left out is a tenth of a unit in the last place.
  constexpr int kDegree = kSingle ? 7 : 13;
  A coefficients[kDegree + 1];
  coefficients[0] = 1;
#pragma GCC unroll 16
  for (int degree = 1; degree <= kDegree; ++degree) coefficients[degree] = coefficients[degree - 1] / A(degree);
  Vector<A> series = Vector<A>{} + coefficients[kDegree];
#pragma GCC unroll 16
  for (int degree = kDegree; degree > 0; --degree) series = series * rest + coefficients[degree - 1];
  // Two factors, as 2^power may be a denormal number or less.
  typedef Integer<A> Lanes __attribute__((vector_size(kVectorBytes)));
  constexpr int kBias = kSingle ? 127 : 1023;
  Lanes bits;
  std::memcpy(&bits, &shifted, sizeof(bits));
  Integer<A> rounder_bits;
  std::memcpy(&rounder_bits, &kRounder, sizeof(rounder_bits));
  const Lanes exponent = bits - rounder_bits;
  const Lanes half = exponent >> 1;
  const Lanes first_bits = (half + kBias) << kMantissaBits;
  const Lanes second_bits = (exponent - half + kBias) << kMantissaBits;
  Vector<A> first, second;
  std::memcpy(&first, &first_bits, sizeof(first));
  std::memcpy(&second, &second_bits, sizeof(second));
  return series * first * second;
}

}  // namespace restoration::CPU_ISA

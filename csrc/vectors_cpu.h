// The widest vectors of the instruction set that a CPU kernel is compiled for, and e^x of them.
#pragma once

#include <type_traits>

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

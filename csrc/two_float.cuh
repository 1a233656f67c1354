// Numbers of about 46 bits as the sum of two of float32, for GPUs whose float64 takes 64 times as long as float32. A sum
// takes 11 instructions, a product 4, a product that is added 15.
// Source: Dekker, "A floating-point technique for extending the available precision", Numerische Mathematik 18 (1971);
// products by fused multiply-add.
#pragma once

#include <cmath>

#include "common.cuh"

namespace restoration {

// |low| is at most a few units in the last place of high. Infinities become NaN.
struct TwoFloat {
  float high;
  float low;

  TwoFloat() = default;
  HOST_DEVICE constexpr TwoFloat(float value) : high(value), low(0.0f) {}
  HOST_DEVICE constexpr TwoFloat(double value)
      : high(static_cast<float>(value)), low(static_cast<float>(value - static_cast<double>(high))) {}
  HOST_DEVICE constexpr TwoFloat(float high, float low) : high(high), low(low) {}

  HOST_DEVICE explicit operator float() const { return high + low; }
  HOST_DEVICE explicit operator double() const { return static_cast<double>(high) + static_cast<double>(low); }

  // left + right, for numbers of any size.
  HOST_DEVICE friend TwoFloat operator+(TwoFloat left, TwoFloat right) {
    const float sum = left.high + right.high;
    const float of_right = sum - left.high;
    const float error = (left.high - (sum - of_right)) + (right.high - of_right);
    return ordered_sum(sum, error + (left.low + right.low));
  }
  HOST_DEVICE friend TwoFloat operator-(TwoFloat value) { return {-value.high, -value.low}; }
  HOST_DEVICE friend TwoFloat operator-(TwoFloat left, TwoFloat right) { return left + -right; }
  HOST_DEVICE friend TwoFloat operator*(TwoFloat left, TwoFloat right) {
    const float product = rounded_product(left.high, right.high);
    const float error = std::fma(left.high, right.high, -product);
    return {product, std::fma(left.low, right.high, std::fma(left.high, right.low, error))};
  }
  HOST_DEVICE friend TwoFloat operator/(TwoFloat left, TwoFloat right) {
    const float quotient = left.high / right.high;
    const TwoFloat rest = left - right * TwoFloat(quotient);
    return ordered_sum(quotient, rest.high / right.high);
  }
  HOST_DEVICE TwoFloat& operator+=(TwoFloat other) { return *this = *this + other; }
  HOST_DEVICE TwoFloat& operator-=(TwoFloat other) { return *this = *this - other; }
  HOST_DEVICE TwoFloat& operator*=(TwoFloat other) { return *this = *this * other; }

 private:
  // large + small. Where cancellation has left small the larger of them, its last bits may be lost.
  HOST_DEVICE static TwoFloat ordered_sum(float large, float small) {
    const float sum = large + small;
    return {sum, small - (sum - large)};
  }
};

}  // namespace restoration

// __half and __nv_bfloat16: storage and conversions, rounding to nearest even as the hardware does.
#pragma once

#include <cstdint>
#include <cstring>

namespace simt {

inline uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}

inline float float_of(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

// Drops the lowest `count` bits, rounding to nearest even.
inline uint32_t rounded(uint32_t bits, int count) {
  return (bits + (1u << (count - 1)) - 1 + (bits >> count & 1)) >> count;
}

}  // namespace simt

// Sign, 5 bits of exponent (bias 15, where float32 has 127), 10 of fraction (float32 has 23).
struct __half {
  uint16_t bits;

  __half() = default;

  explicit __half(float value) {
    const uint32_t magnitude = simt::bits_of(value) & 0x7fffffff;
    uint32_t half;
    if (magnitude > 0x7f800000) {
      half = 0x7e00;  // NaN
    } else if (magnitude >= 0x477ff000) {
      half = 0x7c00;                      // from 65520 on: infinity
    } else if (magnitude < 0x38800000) {  // below 2^-14, a subnormal number
      // The last place of 0.5 is 2^-24, the step of the subnormal numbers: the addition rounds.
      half = simt::bits_of(simt::float_of(magnitude) + 0.5f) - simt::bits_of(0.5f);
    } else {
      half = simt::rounded(magnitude - ((127 - 15) << 23), 13);
    }
    bits = static_cast<uint16_t>(half | (simt::bits_of(value) >> 16 & 0x8000));
  }

  operator float() const {
    const uint32_t sign = static_cast<uint32_t>(bits & 0x8000) << 16;
    const uint32_t magnitude = bits & 0x7fff;
    if (magnitude < 0x0400) {
      const float step = 1.0f / (1 << 24);
      return simt::float_of(sign | simt::bits_of(static_cast<float>(magnitude) * step));
    }
    // Infinity and NaN have the largest exponent of either format.
    const uint32_t bias = magnitude < 0x7c00 ? 127 - 15 : 255 - 31;
    return simt::float_of(sign | ((magnitude << 13) + (bias << 23)));
  }
};

// The upper half of a float32.
struct __nv_bfloat16 {
  uint16_t bits;

  __nv_bfloat16() = default;

  explicit __nv_bfloat16(float value) {
    bits = static_cast<uint16_t>(value != value ? 0x7fff : simt::rounded(simt::bits_of(value), 16));
  }

  operator float() const { return simt::float_of(static_cast<uint32_t>(bits) << 16); }
};

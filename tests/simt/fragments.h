// What csrc/matrix_fragments.cuh and matrix_loads.cuh write in PTX: rounding to tf32, packing, the product of
// fragments, in which every lane takes the operands that it needs from the lanes that hold them, and the loads of
// matrices whose rows the lanes name to each other. The products are exact, their sum float32.
#pragma once

#include "sixteen_bit.h"
#include "warp.h"

namespace restoration {

struct Tf32;

inline uint32_t round_to_tf32(float value) {
  const uint32_t bits = simt::bits_of(value);
  if (value != value) return 0x7fffffff;
  return (bits + 0x1000) & ~uint32_t{0x1fff};  // 13 bits are dropped
}

template <typename T>
uint32_t pack_pair(T, float low, float high) {
  return T(low).bits | uint32_t{T(high).bits} << 16;
}

}  // namespace restoration

namespace simt {

// The numbers in a word of an operand.
template <typename T>
struct Operand {
  static constexpr int kCount = 2;
  static float number(uint32_t word, int place) {
    T value;
    value.bits = static_cast<uint16_t>(word >> 16 * place);
    return value;
  }
};
template <>
struct Operand<restoration::Tf32> {
  static constexpr int kCount = 1;
  // As the hardware does with a number that nobody rounded.
  static float number(uint32_t word, int) { return float_of(word & ~uint32_t{0x1fff}); }
};

// Two words of each lane, by lane.
struct Exchanged {
  uint64_t pairs[kWarpSize];

  Exchanged(uint32_t first, uint32_t second) {
    meet("multiply_accumulate", 0xffffffff, first | uint64_t{second} << 32);
    for (int lane = 0; lane < kWarpSize; ++lane) pairs[lane] = received(0xffffffff, lane);
  }
  uint32_t word(int lane, int place) const { return static_cast<uint32_t>(pairs[lane] >> 32 * place); }
};

}  // namespace simt

namespace restoration {

template <typename T>
void matrix_product(T, float (&sums)[4], const uint32_t (&left)[4], const uint32_t (&right)[2]) {
  // The first and the last four words of depth, of rows g and g + 8; both halves of the columns.
  const simt::Exchanged lefts[2] = {{left[0], left[1]}, {left[2], left[3]}};
  const simt::Exchanged rights(right[0], right[1]);
  const int group = simt::lane() / 4, first_column = simt::lane() % 4 * 2;
  for (int place = 0; place < 4; ++place) {
    const int row = place / 2, column = first_column + place % 2;
    for (int word = 0; word < 8; ++word) {
      const uint32_t left_word = lefts[word / 4].word(group * 4 + word % 4, row);
      const uint32_t right_word = rights.word(column * 4 + word % 4, word / 4);
      for (int number = 0; number < simt::Operand<T>::kCount; ++number) {
        sums[place] += simt::Operand<T>::number(left_word, number) * simt::Operand<T>::number(right_word, number);
      }
    }
  }
}

template <bool kTransposed>
void load_matrices(uint32_t (&words)[4], const void* row) {
  const uint64_t own = reinterpret_cast<uintptr_t>(row);
  if (own % 16 != 0) simt::fail("load_matrices of a misaligned address", *simt::block().current);
  simt::meet("load_matrices", 0xffffffff, own);
  const int group = simt::lane() / 4, pair = simt::lane() % 4 * 2;
  for (int matrix = 0; matrix < 4; ++matrix) {
    words[matrix] = 0;
    for (int place = 0; place < 2; ++place) {
      const int number_row = kTransposed ? pair + place : group;
      const int column = kTransposed ? group : pair + place;
      const auto* numbers = reinterpret_cast<const uint16_t*>(simt::received(0xffffffff, matrix * 8 + number_row));
      words[matrix] |= uint32_t{numbers[column]} << 16 * place;
    }
  }
}

}  // namespace restoration

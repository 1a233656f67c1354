// Maps that lie in planes [C,H,W] and maps that lie in pixels [H,W,C], how one is made of the other on the CPU. A tile
// is as many pixels of a row, and as many channels, as a vector has lanes: it is read along one of the two, turned over
// in registers, and written along the other.
#pragma once

#include "vectors_cpu.h"

namespace restoration::CPU_ISA {

// A count that the compiler knows, so that loops over it keep their vectors in registers.
template <typename A>
using WholeVector = std::integral_constant<int64_t, kLanes<A>>;

// tile[i] = vector(i) for i below count; the other vectors are zero.
template <typename A, typename Count, typename Value>
HOST_DEVICE void fill_tile(Vector<A>* tile, Count count, Value vector) {
#pragma GCC unroll 16
  for (int64_t index = 0; index < count; ++index) tile[index] = vector(index);
  for (int64_t index = count; index < kLanes<A>; ++index) tile[index] = Vector<A>{};
}

// Calls call(channel, channels, row, column, columns) for the tiles of a band, and next(channel, channels) after the
// last tile of each few channels; the two counts are WholeVector or int64_t. Channels take turns band by band, not row
// by row: rows of one plane lie next to each other, the same row of all planes in as many pages, and often in one set
// of the caches. A band that lies in pixels is to stay in the second-level cache meanwhile.
template <typename A, typename Call, typename Next>
HOST_DEVICE void for_each_tile(const Bands& bands, int64_t band, Call call, Next next) {
  constexpr WholeVector<A> kSide{};
  for (int64_t channel = 0; channel < bands.channels; channel += kSide) {
    const int64_t channels = std::min<int64_t>(kSide, bands.channels - channel);
    for (int64_t row = bands.first_row(band); row < bands.last_row(band); ++row) {
      int64_t column = 0;
      if (channels == kSide) {
        for (; column + kSide <= bands.width; column += kSide) call(channel, kSide, row, column, kSide);
      } else {
        for (; column + kSide <= bands.width; column += kSide) call(channel, channels, row, column, kSide);
      }
      if (column < bands.width) call(channel, channels, row, column, bands.width - column);
    }
    next(channel, channels);
  }
}

template <typename A, typename Call>
HOST_DEVICE void for_each_tile(const Bands& bands, int64_t band, Call call) {
  for_each_tile<A>(bands, band, call, [](int64_t, int64_t) {});
}

}  // namespace restoration::CPU_ISA

// Maps that lie in planes [C,H,W] and maps that lie in pixels [H,W,C], how one is made of the other on the CPU. A tile
// is as many pixels of a row, and as many channels, as a vector has lanes: it is read along one of the two, turned over
// in registers, and written along the other.
#pragma once

#include "vectors_cpu.h"

namespace restoration::CPU_ISA {

// Whole rows of all channels of an image, about so many numbers: the work of one thread at a time. Those that lie in
// pixels are to stay in the second-level cache while a few channels after another are read or written.
struct Bands {
  int64_t batch;
  int64_t channels;
  int64_t height;
  int64_t width;
  int64_t rows_per_band;
  int64_t bands_per_image;

  Bands(int64_t elements, int64_t batch, int64_t channels, int64_t height, int64_t width)
      : batch(batch),
        channels(channels),
        height(height),
        width(width),
        rows_per_band(std::max<int64_t>(1, elements / std::max<int64_t>(1, channels * width))),
        bands_per_image(ceil_divide(height, rows_per_band)) {}

  int64_t count() const { return batch * bands_per_image; }
  int64_t pixels() const { return height * width; }
  int64_t image(int64_t band) const { return band / bands_per_image; }
  int64_t first_row(int64_t band) const { return band % bands_per_image * rows_per_band; }
  int64_t last_row(int64_t band) const { return std::min(height, first_row(band) + rows_per_band); }
  bool worth_threads(int threads) const { return threads > 1 && batch * channels * pixels() >= kParallelElements; }
};

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
// by row: rows of one plane lie next to each other, the same row of all planes in as many pages, and often in one set of
// the caches.
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

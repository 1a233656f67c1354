// What forward and backward of the pixel-adaptive convolution on the CPU share: strips of output pixels whose operands
// fit into a core's own cache, what lies under a tap, and the kernel k_t(p) of a strip.
#pragma once

#include <type_traits>

#include "matrix_tiles_cpu.h"
#include "pac_conv2d.h"

namespace restoration::CPU_ISA {

// Longer strips save nothing more, and images of few pixels would give too few strips to share among threads.
constexpr int64_t kMostPlaces = 2048;

// Some rows of one image of the output, and in each of them the same span of columns.
struct Strip {
  int64_t image;
  int64_t first_row;
  int64_t rows;
  int64_t first_column;
  int64_t columns;
};

// A strip in tiles of kTile pixels: each row of the image begins a tile. E is the element of the strip's operands.
template <typename E>
struct StripTiles {
  // Pixels of which an operand that is summed over pixels holds one vector.
  static constexpr int64_t kBlock = kLanes<E> * kSteps<E>;

  Strip strip;

  // Places in memory, all of which are computed: those of the pixels, row by row, and after each row some more.
  int64_t places_per_row() const { return round_up(strip.columns, kBlock); }
  int64_t places() const { return strip.rows * places_per_row(); }
  int64_t blocks_per_row() const { return places_per_row() / kBlock; }
  int64_t blocks() const { return strip.rows * blocks_per_row(); }
  // Calls call(place, pixels) for the tiles of a row, no two of which differ by more than a vector: in one of a single
  // vector, too few sums are under way at a time.
  template <typename Call>
  HOST_DEVICE void for_each_tile(Call call) const {
    constexpr int64_t kLanes = CPU_ISA::kLanes<AccumulateType<E>>;
    const int64_t vectors = ceil_divide(strip.columns, kLanes), tiles = ceil_divide(strip.columns, kTile<E>);
    int64_t place = 0;
    for (int64_t tile = 1; tile <= tiles; ++tile) {
      const int64_t next = std::min(vectors * tile / tiles * kLanes, strip.columns);
      call(place, next - place);
      place = next;
    }
  }
  // Where row `row` of the strip begins in an output [B,O,H',W'].
  int64_t output_offset(const PacConv2dSizes& sizes, int64_t channel, int64_t row) const {
    const int64_t plane = strip.image * sizes.out_channels + channel;
    return (plane * sizes.out_height() + strip.first_row + row) * sizes.out_width() + strip.first_column;
  }
};

// How an image of the output is cut into strips: about `places` pixels, and no more than `most_columns` in a row.
template <typename E>
struct StripShape {
  int64_t rows;
  int64_t columns;

  StripShape(const PacConv2dSizes& sizes, int64_t places, int64_t most_columns) {
    const int64_t tiles = std::max<int64_t>(std::min(most_columns, kMostPlaces) / kTile<E>, 1);
    columns = std::min(sizes.out_width(), tiles * kTile<E>);
    rows = std::min(sizes.out_height(), std::max<int64_t>(1, places / round_up(columns, kTile<E>)));
  }

  StripTiles<E> largest() const { return {{0, 0, rows, 0, columns}}; }
};

// Calls call(strip) for the strips of some rows of an image.
template <typename E, typename Call>
HOST_DEVICE void for_each_strip(const StripShape<E>& shape, const PacConv2dSizes& sizes, int64_t image,
                                int64_t first_row, int64_t last_row, Call call) {
  for (int64_t row = first_row; row < last_row; row += shape.rows) {
    for (int64_t column = 0; column < sizes.out_width(); column += shape.columns) {
      call(Strip{image, row, std::min(shape.rows, last_row - row), column,
                 std::min(shape.columns, sizes.out_width() - column)});
    }
  }
}

// Channels of the guide whose distances are summed in registers: those of the model.
constexpr int kGuideBlock = 8;

// What is packed for a strip, by forward and by backward.
template <typename E>
struct StripScratch {
  using A = AccumulateType<E>;

  A* kernel;  // [K², places]: k_t(p), or with normalize its share of the sum
  A* source;  // [kGuideBlock, source_size]: one row of the input under one row of taps
  A* centre;  // [kGuideBlock, places of a row]: one row of the guide under the centre tap

  StripScratch(Carver& carver, const PacConv2dSizes& sizes, const StripTiles<E>& largest)
      : kernel(carver.take<A>(sizes.taps() * largest.places())),
        source(carver.take<A>(kGuideBlock * source_size(sizes, largest))),
        centre(carver.take<A>(kGuideBlock * largest.places_per_row())) {}

  static int64_t source_size(const PacConv2dSizes& sizes, const StripTiles<E>& tiles) {
    return round_up(tiles.places_per_row() + shared_reach(sizes), kCacheLineBytes / sizeof(A));
  }

  // Pixels beyond the places of a row that its taps reach, if they read one copy of the row.
  static int64_t shared_reach(const PacConv2dSizes& sizes) {
    return shares_source(sizes) ? (sizes.kernel_size - 1) * sizes.horizontal.dilation : 0;
  }
  // Far taps of a large dilation would make that copy long.
  static bool shares_source(const PacConv2dSizes& sizes) {
    return sizes.horizontal.stride == 1 && (sizes.kernel_size - 1) * sizes.horizontal.dilation <= 2 * kTile<E>;
  }
};

// Rows that are needed next: those of the next channel lie so far on that no processor fetches them unasked.
template <typename T>
HOST_DEVICE void prefetch(const T* values, int64_t count) {
  for (int64_t place = 0; place < count; place += kCacheLineBytes / sizeof(T)) __builtin_prefetch(values + place);
}

// What the taps of one row of the kernel read of a plane for a row of the strip.
template <typename E, typename T>
HOST_DEVICE void prefetch_under(const StripTiles<E>& tiles, const PacConv2dSizes& sizes, const T* plane, int64_t row,
                                int64_t tap_row) {
  const int64_t input = sizes.vertical.position(tiles.strip.first_row + row, tap_row);
  if (input < 0 || input >= sizes.vertical.size) return;
  const int64_t width = sizes.horizontal.size;
  const int64_t first = std::clamp<int64_t>(sizes.horizontal.position(tiles.strip.first_column, 0), 0, width);
  const int64_t count = std::min(tiles.strip.columns * sizes.horizontal.stride, width - first);
  prefetch(plane + input * width + first, count);
}

// destination[i] = value(first + i · step) for i below count, 0 where that is outside a row of `width` numbers.
template <typename E, typename Value>
HOST_DEVICE void copy_row(E* destination, int64_t width, int64_t first, int64_t step, int64_t count, Value value) {
  const int64_t begin = std::min(count, first < 0 ? ceil_divide(-first, step) : 0);
  const int64_t end = std::clamp(ceil_divide(width - first, step), begin, count);
  std::memset(static_cast<void*>(destination), 0, begin * sizeof(E));
  if (step == 1) {
#pragma omp simd
    for (int64_t place = begin; place < end; ++place) destination[place] = value(first + place);
  } else {
    for (int64_t place = begin; place < end; ++place) destination[place] = value(first + place * step);
  }
  std::memset(static_cast<void*>(destination + end), 0, (count - end) * sizeof(E));
}

// `count` numbers of row `row` of a plane from column `first` on, `step` apart, 0 outside the image: in place, where
// they lie so, or else copied to `scratch`.
template <typename A, typename T>
HOST_DEVICE const A* input_row(const T* plane, const PacConv2dSizes& sizes, int64_t row, int64_t first, int64_t step,
                               int64_t count, A* scratch) {
  const int64_t width = sizes.horizontal.size;
  if (row < 0 || row >= sizes.vertical.size) {
    std::memset(scratch, 0, count * sizeof(A));
    return scratch;
  }
  const T* values = plane + row * width;
  if constexpr (std::is_same_v<A, T>) {
    if (step == 1 && first >= 0 && first + count <= width) return values + first;
  }
  copy_row(scratch, width, first, step, count, [=](int64_t place) { return static_cast<A>(values[place]); });
  return scratch;
}

// Calls call(tap, values) for the taps of one row of the kernel: values[p] is the plane's under that tap of place p of
// a row of the strip, for all computed places.
template <typename E, typename T, typename Call>
HOST_DEVICE void for_each_tap(const StripTiles<E>& tiles, const PacConv2dSizes& sizes, const T* plane, int64_t row,
                              int64_t tap_row, AccumulateType<E>* scratch, Call call) {
  using A = AccumulateType<E>;
  const int64_t input = sizes.vertical.position(tiles.strip.first_row + row, tap_row);
  const int64_t first = sizes.horizontal.position(tiles.strip.first_column, 0);
  const int64_t count = tiles.places_per_row();
  const int64_t step = sizes.horizontal.stride, gap = sizes.horizontal.dilation;
  const int64_t first_tap = tap_row * sizes.kernel_size;
  if (StripScratch<E>::shares_source(sizes)) {
    const A* values = input_row(plane, sizes, input, first, 1, count + StripScratch<E>::shared_reach(sizes), scratch);
    for (int64_t tap = 0; tap < sizes.kernel_size; ++tap) call(first_tap + tap, values + tap * gap);
  } else {
    for (int64_t tap = 0; tap < sizes.kernel_size; ++tap) {
      call(first_tap + tap, input_row(plane, sizes, input, first + tap * gap, step, count, scratch));
    }
  }
}

// Places of a row of the strip whose tap `tap` lies inside the image.
struct InsideRange {
  int64_t input_row;     // the row that the tap reads
  int64_t first_column;  // the column that it reads for place 0, inside or not
  int64_t begin;
  int64_t end;
};

template <typename E>
HOST_DEVICE InsideRange inside(const StripTiles<E>& tiles, const PacConv2dSizes& sizes, int64_t row, int64_t tap) {
  const int64_t input = sizes.vertical.position(tiles.strip.first_row + row, tap / sizes.kernel_size);
  const int64_t first = sizes.horizontal.position(tiles.strip.first_column, tap % sizes.kernel_size);
  const int64_t step = sizes.horizontal.stride;
  if (input < 0 || input >= sizes.vertical.size) return {input, first, 0, 0};
  const int64_t begin = std::min(tiles.strip.columns, first < 0 ? ceil_divide(-first, step) : 0);
  const int64_t behind = sizes.horizontal.size - first;
  const int64_t end = behind <= 0 ? begin : std::clamp(ceil_divide(behind, step), begin, tiles.strip.columns);
  return {input, first, begin, end};
}

// Values of a plane under the centre tap.
template <typename E, typename T>
HOST_DEVICE auto centre_row(const StripTiles<E>& tiles, const PacConv2dSizes& sizes, const T* plane, int64_t row,
                            AccumulateType<E>* scratch) {
  const int64_t middle = sizes.kernel_size / 2;
  return input_row(plane, sizes, sizes.vertical.position(tiles.strip.first_row + row, middle),
                   sizes.horizontal.position(tiles.strip.first_column, middle), sizes.horizontal.stride,
                   tiles.places_per_row(), scratch);
}

// kernel_t(p) divided by its sum over the taps inside the image; 0 for the others.
template <typename E, typename A>
void normalize_kernel(const StripTiles<E>& tiles, const PacConv2dSizes& sizes, int64_t row, A* kernel, A* total) {
  const int64_t count = tiles.places_per_row(), stride = tiles.places();
  std::memset(total, 0, count * sizeof(A));
  for (int64_t tap = 0; tap < sizes.taps(); ++tap) {
    A* values = kernel + tap * stride;
    const InsideRange range = inside(tiles, sizes, row, tap);
    for (int64_t place = 0; place < range.begin; ++place) values[place] = 0;
    for (int64_t place = range.end; place < count; ++place) values[place] = 0;
    for (int64_t place = 0; place < count; ++place) total[place] += values[place];
  }
  for (int64_t tap = 0; tap < sizes.taps(); ++tap) {
    A* values = kernel + tap * stride;
    for (int64_t place = 0; place < count; ++place) values[place] /= total[place] == 0 ? A(1) : total[place];
  }
}

// distance[p] += the squared differences of kChannels rows, summed in registers.
template <int kChannels, typename A>
HOST_DEVICE void add_squares(A* distance, const A* const* centres, const A* const* values, int64_t offset,
                             int64_t count) {
  for (int64_t place = 0; place < count; place += kLanes<A>) {
    Vector<A> sum = load(distance + place);
#pragma GCC unroll 8
    for (int channel = 0; channel < kChannels; ++channel) {
      const Vector<A> difference = load(centres[channel] + place) - load(values[channel] + offset + place);
      sum += difference * difference;
    }
    store(distance + place, sum);
  }
}

// Whether place p of a row is pixel p of that row of the image, for all pixels of a row.
template <typename E>
bool same_places(const StripTiles<E>& tiles, const PacConv2dSizes& sizes) {
  const int64_t middle = sizes.kernel_size / 2;
  return sizes.vertical.stride == 1 && sizes.vertical.position(0, middle) == 0 && sizes.horizontal.stride == 1 &&
         sizes.horizontal.position(0, middle) == 0 && tiles.strip.columns == sizes.horizontal.size;
}

// Whether k_t(p) of a row of the strip is copied: it is k_-t(p+t), where places and pixels are the same and p + t lies in
// this row or in one further down, which are done before.
template <typename E>
bool is_mirrored(const StripTiles<E>& tiles, const PacConv2dSizes& sizes, int64_t row, int64_t tap) {
  return same_places(tiles, sizes) && !sizes.normalize && tap > sizes.taps() / 2 &&
         row + (tap / sizes.kernel_size - sizes.kernel_size / 2) * sizes.vertical.dilation < tiles.strip.rows;
}

// Copies it. Beyond the image's edge x is 0, and k need not be known.
template <typename E, typename A>
void mirror_kernel(const StripTiles<E>& tiles, const PacConv2dSizes& sizes, int64_t row, int64_t tap, A* kernel) {
  const int64_t middle = sizes.kernel_size / 2, pitch = tiles.places_per_row();
  const int64_t down = (tap / sizes.kernel_size - middle) * sizes.vertical.dilation;
  const int64_t right = (tap % sizes.kernel_size - middle) * sizes.horizontal.dilation;
  const A* opposite = kernel + (sizes.taps() - 1 - tap) * tiles.places() + (row + down) * pitch;
  copy_row(kernel + tap * tiles.places() + row * pitch, tiles.strip.columns, right, 1, pitch,
           [=](int64_t place) { return opposite[place]; });
}

// rows [kChannels] of the guide under the centre tap, for a row of the strip; its first channel is in `planes`.
template <int kChannels, typename E, typename T>
void centre_rows(const StripTiles<E>& tiles, const PacConv2dSizes& sizes, const T* planes, int64_t row,
                 const StripScratch<E>& scratch, const AccumulateType<E>** rows) {
  for (int channel = 0; channel < kChannels; ++channel) {
    rows[channel] = centre_row(tiles, sizes, planes + channel * sizes.pixels(), row,
                               scratch.centre + channel * tiles.places_per_row());
  }
}

// The same under a tap and, where all taps of a row read one copy of it, as far on as those behind it.
template <int kChannels, typename E, typename T>
void rows_under(const StripTiles<E>& tiles, const PacConv2dSizes& sizes, const T* planes, int64_t row, int64_t tap,
                const StripScratch<E>& scratch, const AccumulateType<E>** rows) {
  const int64_t input = sizes.vertical.position(tiles.strip.first_row + row, tap / sizes.kernel_size);
  const int64_t first = sizes.horizontal.position(tiles.strip.first_column, tap % sizes.kernel_size);
  const int64_t count = tiles.places_per_row() + StripScratch<E>::shared_reach(sizes);
  const int64_t source_size = StripScratch<E>::source_size(sizes, tiles);
  for (int channel = 0; channel < kChannels; ++channel) {
    rows[channel] = input_row(planes + channel * sizes.pixels(), sizes, input, first, sizes.horizontal.stride, count,
                              scratch.source + channel * source_size);
  }
}

// Adds what kChannels channels of the guide, the first of them in `planes`, contribute to all distances of a row.
template <int kChannels, typename E, typename T>
void add_distances(const StripTiles<E>& tiles, const PacConv2dSizes& sizes, const T* planes, int64_t row,
                   const StripScratch<E>& scratch, AccumulateType<E>* distances) {
  using A = AccumulateType<E>;
  const bool shared = StripScratch<E>::shares_source(sizes);
  const A* centres[kChannels];
  const A* values[kChannels] = {};
  centre_rows<kChannels>(tiles, sizes, planes, row, scratch, centres);
  for (int64_t tap = 0; tap < sizes.taps(); ++tap) {
    if (is_mirrored(tiles, sizes, row, tap)) continue;
    const int64_t tap_column = tap % sizes.kernel_size;
    if (!shared || tap_column == 0) rows_under<kChannels>(tiles, sizes, planes, row, tap, scratch, values);
    // The distance of the centre stays 0: its k is 1 by definition, also for Inf.
    if (tap == sizes.taps() / 2) continue;
    add_squares<kChannels>(distances + tap * tiles.places(), centres, values,
                           shared ? tap_column * sizes.horizontal.dilation : 0, tiles.places_per_row());
  }
}

// Fills scratch.kernel, half of it by symmetry where there is one.
template <typename E, typename T>
void pack_kernel(const StripTiles<E>& tiles, const PacConv2dSizes& sizes, const T* guide,
                 const StripScratch<E>& scratch) {
  using A = AccumulateType<E>;
  const int64_t count = tiles.places_per_row(), stride = tiles.places();
  const T* image = guide + tiles.strip.image * sizes.guide_channels * sizes.pixels();
  for (int64_t row = tiles.strip.rows - 1; row >= 0; --row) {
    A* kernel = scratch.kernel + row * tiles.places_per_row();
    for (int64_t tap = 0; tap < sizes.taps(); ++tap) std::memset(kernel + tap * stride, 0, count * sizeof(A));
    int64_t channel = 0;
    for (; channel + kGuideBlock <= sizes.guide_channels; channel += kGuideBlock) {
      add_distances<kGuideBlock>(tiles, sizes, image + channel * sizes.pixels(), row, scratch, kernel);
    }
    for (; channel < sizes.guide_channels; ++channel) {
      add_distances<1>(tiles, sizes, image + channel * sizes.pixels(), row, scratch, kernel);
    }
    for (int64_t tap = 0; tap < sizes.taps(); ++tap) {
      if (is_mirrored(tiles, sizes, row, tap)) {
        mirror_kernel(tiles, sizes, row, tap, scratch.kernel);
        continue;
      }
      A* values = kernel + tap * stride;
      for (int64_t place = 0; place < count; place += kLanes<A>) {
        store(values + place, exp_nonpositive<A>(load(values + place) * A(-0.5)));
      }
    }
    if (sizes.normalize) normalize_kernel(tiles, sizes, row, kernel, scratch.centre);
  }
}

// Calls call(type of x, type of y) for the dtypes of a call.
template <typename Call>
void dispatch_pac_conv2d(DType dtype, DType output_dtype, Call call) {
  dispatch_cpu_dtype("pac_conv2d", dtype, [&](auto tag) {
    using T = typename decltype(tag)::Type;
    if (output_dtype == dtype) return call(tag, tag);
    if constexpr (std::is_same_v<T, BFloat16>) {
      if (output_dtype == DType::float32) return call(tag, TypeTag<float>());
    }
    refuse_dtype("pac_conv2d", output_dtype);
  });
}

}  // namespace restoration::CPU_ISA

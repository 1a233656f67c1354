// What forward and backward of the pixel-adaptive convolution on the CPU share: strips of output pixels whose scaled
// columns k_t(p) · x[c](p+t) fit into a core's own cache, and the packing of kernel and columns.
// Row t·C + c of the columns is tap t of channel c, so that neighbouring rows are of different channels.
#pragma once

#include <type_traits>

#include "matrix_tiles_cpu.h"
#include "pac_conv2d.h"

#if defined(_OPENMP)
#include <omp.h>
#endif

namespace restoration::CPU_ISA {

// Longer strips save nothing more, and images of few pixels would give too few strips to share among threads.
constexpr int64_t kMostPlaces = 1024;

// A call of fewer products takes less time than waking the threads.
constexpr int64_t kParallelProducts = int64_t{1} << 18;

HOST_DEVICE int64_t thread_number() {
#if defined(_OPENMP)
  return omp_get_thread_num();
#else
  return 0;
#endif
}

// Some rows of one image of the output, and in each of them the same span of columns.
struct Strip {
  int64_t image;
  int64_t first_row;
  int64_t rows;
  int64_t first_column;
  int64_t columns;
};

// A strip in tiles of kTile pixels: each row of the image begins a tile.
template <typename A>
struct StripTiles {
  Strip strip;
  int64_t tiles_per_row;

  explicit StripTiles(const Strip& strip) : strip(strip), tiles_per_row(ceil_divide(strip.columns, kTile<A>)) {}

  int64_t tiles() const { return strip.rows * tiles_per_row; }
  // Places in memory: those of the pixels, row by row, and after each row those that fill its last tile.
  int64_t places_per_row() const { return tiles_per_row * kTile<A>; }
  int64_t places() const { return tiles() * kTile<A>; }
  // Of a row, rounded up to vectors: as far as numbers are computed.
  int64_t computed_per_row() const { return round_up(strip.columns, kLanes<A>); }
  int64_t pixels(int64_t tile) const { return std::min<int64_t>(kTile<A>, strip.columns - column(tile)); }
  int64_t row(int64_t tile) const { return tile / tiles_per_row; }
  int64_t column(int64_t tile) const { return tile % tiles_per_row * kTile<A>; }
  // Where the pixels of a tile begin in an output [B,O,H',W'].
  int64_t output_offset(const PacConv2dSizes& sizes, int64_t channel, int64_t tile) const {
    const int64_t plane = strip.image * sizes.out_channels + channel;
    return (plane * sizes.out_height() + strip.first_row + row(tile)) * sizes.out_width() + strip.first_column +
           column(tile);
  }
  TileRows tile_rows() const { return {strip.rows, tiles_per_row, ceil_divide(pixels(tiles_per_row - 1), kLanes<A>)}; }
};

// How an image of the output is cut into strips of about `places` pixels.
template <typename A>
struct StripShape {
  int64_t rows;
  int64_t columns;

  StripShape(const PacConv2dSizes& sizes, int64_t places) {
    places = std::max<int64_t>(places / kTile<A>, 1) * kTile<A>;
    columns = std::min(sizes.out_width(), places);
    rows = std::min(sizes.out_height(), std::max<int64_t>(1, places / round_up(columns, kTile<A>)));
  }

  StripTiles<A> largest() const { return StripTiles<A>({0, 0, rows, 0, columns}); }
};

// Calls call(strip) for the strips of some rows of an image.
template <typename A, typename Call>
HOST_DEVICE void for_each_strip(const StripShape<A>& shape, const PacConv2dSizes& sizes, int64_t image,
                                int64_t first_row, int64_t last_row, Call call) {
  for (int64_t row = first_row; row < last_row; row += shape.rows) {
    for (int64_t column = 0; column < sizes.out_width(); column += shape.columns) {
      call(Strip{image, row, std::min(shape.rows, last_row - row), column,
                 std::min(shape.columns, sizes.out_width() - column)});
    }
  }
}

// One thread's piece of memory, cut into arrays that begin with a cache line. With no memory it only counts.
template <typename A>
class Carver {
 public:
  explicit Carver(A* memory) : memory_(memory) {}

  A* take(int64_t count) {
    A* array = memory_ == nullptr ? nullptr : memory_ + used_;
    used_ += round_up(count, kCacheLineBytes / sizeof(A));
    return array;
  }
  int64_t used() const { return used_; }

 private:
  A* memory_;
  int64_t used_ = 0;
};

// Channels of the guide whose distances are summed in registers: those of the model.
constexpr int kGuideBlock = 8;

// What is packed for a strip. Rows of the columns are filled up to whole blocks (add_block_products).
template <typename A>
struct StripScratch {
  A* kernel;   // [K², places]: k_t(p), or with normalize its share of the sum
  A* columns;  // [tiles, column_rows, kTile]
  A* source;   // [kGuideBlock, source_size]: one row of the input under one row of taps
  A* centre;   // [kGuideBlock, places of a row]: one row of the guide under the centre tap

  static int64_t column_rows(const PacConv2dSizes& sizes) { return round_up(sizes.depth(), kBlockColumns); }

  StripScratch(Carver<A>& carver, const PacConv2dSizes& sizes, const StripTiles<A>& largest)
      : kernel(carver.take(sizes.taps() * largest.places())),
        columns(carver.take(column_rows(sizes) * largest.places())),
        source(carver.take(kGuideBlock * source_size(sizes, largest))),
        centre(carver.take(kGuideBlock * largest.places_per_row())) {}

  static int64_t source_size(const PacConv2dSizes& sizes, const StripTiles<A>& tiles) {
    return round_up(tiles.places_per_row() + shared_reach(sizes), kCacheLineBytes / sizeof(A));
  }

  // Pixels beyond the places of a row that its taps reach, if they read one copy of the row.
  static int64_t shared_reach(const PacConv2dSizes& sizes) {
    return shares_source(sizes) ? (sizes.kernel_size - 1) * sizes.horizontal.dilation : 0;
  }
  // Far taps of a large dilation would make that copy long.
  static bool shares_source(const PacConv2dSizes& sizes) {
    return sizes.horizontal.stride == 1 && (sizes.kernel_size - 1) * sizes.horizontal.dilation <= 2 * kTile<A>;
  }
};

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
  const int64_t begin = std::min(count, first < 0 ? ceil_divide(-first, step) : 0);
  const int64_t end = std::clamp(ceil_divide(width - first, step), begin, count);
  std::memset(scratch, 0, begin * sizeof(A));
  if (step == 1) {
#pragma omp simd
    for (int64_t place = begin; place < end; ++place) scratch[place] = static_cast<A>(values[first + place]);
  } else {
    for (int64_t place = begin; place < end; ++place) scratch[place] = static_cast<A>(values[first + place * step]);
  }
  std::memset(scratch + end, 0, (count - end) * sizeof(A));
  return scratch;
}

// Calls call(tap, values) for the taps of one row of the kernel: values[p] is the plane's under that tap of place p of
// a row of the strip, for all computed places.
template <typename A, typename T, typename Call>
HOST_DEVICE void for_each_tap(const StripTiles<A>& tiles, const PacConv2dSizes& sizes, const T* plane, int64_t row,
                              int64_t tap_row, A* scratch, Call call) {
  const int64_t input = sizes.vertical.position(tiles.strip.first_row + row, tap_row);
  const int64_t first = sizes.horizontal.position(tiles.strip.first_column, 0);
  const int64_t count = tiles.computed_per_row();
  const int64_t step = sizes.horizontal.stride, gap = sizes.horizontal.dilation;
  const int64_t first_tap = tap_row * sizes.kernel_size;
  if (StripScratch<A>::shares_source(sizes)) {
    const A* values = input_row(plane, sizes, input, first, 1, count + StripScratch<A>::shared_reach(sizes), scratch);
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

template <typename A>
HOST_DEVICE InsideRange inside(const StripTiles<A>& tiles, const PacConv2dSizes& sizes, int64_t row, int64_t tap) {
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
template <typename A, typename T>
HOST_DEVICE const A* centre_row(const StripTiles<A>& tiles, const PacConv2dSizes& sizes, const T* plane, int64_t row,
                                A* scratch) {
  const int64_t middle = sizes.kernel_size / 2;
  return input_row(plane, sizes, sizes.vertical.position(tiles.strip.first_row + row, middle),
                   sizes.horizontal.position(tiles.strip.first_column, middle), sizes.horizontal.stride,
                   tiles.computed_per_row(), scratch);
}

// kernel_t(p) divided by its sum over the taps inside the image; 0 for the others.
template <typename A>
void normalize_kernel(const StripTiles<A>& tiles, const PacConv2dSizes& sizes, int64_t row, A* kernel, A* total) {
  const int64_t count = tiles.computed_per_row(), stride = tiles.places();
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

// Adds what kChannels channels of the guide, the first of them in `planes`, contribute to all distances of a row.
template <int kChannels, typename A, typename T>
void add_distances(const StripTiles<A>& tiles, const PacConv2dSizes& sizes, const T* planes, int64_t row,
                   const StripScratch<A>& scratch, A* distances) {
  const int64_t count = tiles.computed_per_row();
  const int64_t source_size = StripScratch<A>::source_size(sizes, tiles);
  const int64_t first = sizes.horizontal.position(tiles.strip.first_column, 0);
  const int64_t gap = sizes.horizontal.dilation;
  const bool shared = StripScratch<A>::shares_source(sizes);
  const A* centres[kChannels];
  const A* values[kChannels] = {};
  for (int channel = 0; channel < kChannels; ++channel) {
    centres[channel] = centre_row(tiles, sizes, planes + channel * sizes.pixels(), row,
                                  scratch.centre + channel * tiles.places_per_row());
  }
  for (int64_t tap = 0; tap < sizes.taps(); ++tap) {
    const int64_t tap_column = tap % sizes.kernel_size;
    if (!shared || tap_column == 0) {
      const int64_t input = sizes.vertical.position(tiles.strip.first_row + row, tap / sizes.kernel_size);
      for (int channel = 0; channel < kChannels; ++channel) {
        values[channel] =
            input_row(planes + channel * sizes.pixels(), sizes, input, first + (shared ? 0 : tap_column * gap),
                      sizes.horizontal.stride, count + StripScratch<A>::shared_reach(sizes),
                      scratch.source + channel * source_size);
      }
    }
    // The distance of the centre stays 0: its k is 1 by definition, also for Inf.
    if (tap == sizes.taps() / 2) continue;
    add_squares<kChannels>(distances + tap * tiles.places(), centres, values, shared ? tap_column * gap : 0, count);
  }
}

// Fills scratch.kernel.
template <typename A, typename T>
void pack_kernel(const StripTiles<A>& tiles, const PacConv2dSizes& sizes, const T* guide,
                 const StripScratch<A>& scratch) {
  const int64_t count = tiles.computed_per_row(), stride = tiles.places();
  const T* image = guide + tiles.strip.image * sizes.guide_channels * sizes.pixels();
  for (int64_t row = 0; row < tiles.strip.rows; ++row) {
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
      A* values = kernel + tap * stride;
      for (int64_t place = 0; place < count; place += kLanes<A>) {
        store(values + place, exp_nonpositive<A>(load(values + place) * A(-0.5)));
      }
    }
    if (sizes.normalize) normalize_kernel(tiles, sizes, row, kernel, scratch.centre);
  }
}

// Fills scratch.columns from x and scratch.kernel, zero where a row of the image has no pixel.
template <typename A, typename T>
void pack_columns(const StripTiles<A>& tiles, const PacConv2dSizes& sizes, const T* x, const StripScratch<A>& scratch) {
  const int64_t column_rows = StripScratch<A>::column_rows(sizes);
  const int64_t tile_stride = column_rows * kTile<A>;
  const int64_t columns = tiles.strip.columns;
  const T* image = x + tiles.strip.image * sizes.channels * sizes.pixels();
  for (int64_t tile = 0; tile < tiles.tiles(); ++tile) {
    std::memset(scratch.columns + tile * tile_stride + sizes.depth() * kTile<A>, 0,
                (column_rows - sizes.depth()) * kTile<A> * sizeof(A));
  }
  for (int64_t row = 0; row < tiles.strip.rows; ++row) {
    A* row_columns = scratch.columns + row * tiles.tiles_per_row * tile_stride;
    const A* row_kernel = scratch.kernel + row * tiles.places_per_row();
    for (int64_t channel = 0; channel < sizes.channels; ++channel) {
      const T* plane = image + channel * sizes.pixels();
      for (int64_t tap_row = 0; tap_row < sizes.kernel_size; ++tap_row) {
        for_each_tap(tiles, sizes, plane, row, tap_row, scratch.source, [&](int64_t tap, const A* values) {
          A* scaled = row_columns + (tap * sizes.channels + channel) * kTile<A>;
          const A* kernel = row_kernel + tap * tiles.places();
          for (int64_t first = 0; first < columns; first += kTile<A>, scaled += tile_stride) {
            const int64_t rest = std::min<int64_t>(kTile<A>, columns - first);
            for (int64_t place = 0; place < rest; place += kLanes<A>) {
              store(scaled + place, load(kernel + first + place) * load(values + first + place));
            }
            // Products over pixels sum whole vectors: nothing, not even NaN, may come from beyond the last pixel.
            for (int64_t place = rest; place % kLanes<A> != 0; ++place) scaled[place] = 0;
          }
        });
      }
    }
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

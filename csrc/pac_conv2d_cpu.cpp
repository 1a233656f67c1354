// Pixel-adaptive convolution on the CPU, forward: formula in pac_conv2d.h.
// A thread takes a strip of output pixels. It copies the rows of x that the taps of one row of the strip reach into its
// own cache, and multiplies what lies under each tap with that tap's weights [O, C], kPanelRows x kTile sums at a time
// in registers; those are scaled by k_t(p) and added to the sums of the other taps. So no scaled column is ever written.
// Bias, rounding, alpha and residual follow while a tile of sums is at hand. Read: x, guide, residual once (and
// neighbouring rows again from the cache). Written: y once. Scratch memory: a strip for each thread, and one copy of the
// weights.

#include "pac_conv2d_strips_cpu.h"

namespace restoration::CPU_ISA {
namespace {

// Rows of x under one row of a strip: with the weights in passing, they stay in a second-level cache of 1 MB.
constexpr int64_t kRowsBytes = int64_t{320} << 10;

// With fewer, threads that are done wait long for the last one.
constexpr int64_t kStripsPerThread = 4;

// Elements of an operand that the channels of one tap fill.
template <typename E>
int64_t elements_per_tap(const PacConv2dSizes& sizes) {
  return ceil_divide(sizes.channels, kSteps<E>);
}

// The rows of x under the taps of one row of a strip: [K, copies, elements of a tap, pitch]. Where all taps of a row can
// read one copy of the image's row there is one, else one for each.
template <typename E>
class TapRows {
 public:
  static int64_t copies(const PacConv2dSizes& sizes) {
    return StripScratch<E>::shares_source(sizes) ? 1 : sizes.kernel_size;
  }
  // Numbers between the rows of two channels: an odd count of cache lines, so that they share no set of the caches.
  static int64_t pitch(const PacConv2dSizes& sizes, int64_t places) {
    constexpr int64_t kLine = kCacheLineBytes / sizeof(E);
    return (ceil_divide(places + StripScratch<E>::shared_reach(sizes), kLine) | 1) * kLine;
  }

  TapRows(Carver& carver, const PacConv2dSizes& sizes, const StripTiles<E>& largest)
      : sizes_(sizes),
        pitch_(pitch(sizes, largest.places_per_row())),
        tap_stride_(elements_per_tap<E>(sizes) * pitch_),
        slot_stride_(copies(sizes) * tap_stride_),
        rows_(carver.take<E>(sizes.kernel_size * slot_stride_)) {}

  int64_t pitch() const { return pitch_; }

  // Fills them for row `row` of the strip; rows are taken in order.
  template <typename T>
  void fill(const StripTiles<E>& tiles, int64_t row, const T* x) {
    for (int64_t tap_row = advances() && row > 0 ? sizes_.kernel_size - 1 : 0; tap_row < sizes_.kernel_size; ++tap_row) {
      const int64_t input = sizes_.vertical.position(tiles.strip.first_row + row, tap_row);
      for (int64_t copy = 0; copy < copies(sizes_); ++copy) {
        const int64_t first = sizes_.horizontal.position(tiles.strip.first_column, copy);
        fill_channels(slot(row, tap_row) + copy * tap_stride_, input, first,
                      tiles.places_per_row() + StripScratch<E>::shared_reach(sizes_),
                      x + tiles.strip.image * sizes_.channels * sizes_.pixels());
      }
    }
  }

  // What tap (tap_row, tap_column) of place 0 reads.
  HOST_DEVICE const E* under(int64_t row, int64_t tap_row, int64_t tap_column) const {
    const int64_t offset = copies(sizes_) == 1 ? tap_column * sizes_.horizontal.dilation : tap_column * tap_stride_;
    return slot(row, tap_row) + offset;
  }

 private:
  // Whether each row of the strip needs only one more row of x than the one before: they then take turns in the slots.
  bool advances() const { return sizes_.vertical.stride == sizes_.vertical.dilation; }

  E* slot(int64_t row, int64_t tap_row) const {
    return rows_ + (advances() ? (row + tap_row) % sizes_.kernel_size : tap_row) * slot_stride_;
  }

  template <typename T>
  void fill_channels(E* destination, int64_t input, int64_t first, int64_t count, const T* x) const {
    const int64_t width = sizes_.horizontal.size;
    if (input < 0 || input >= sizes_.vertical.size) {
      std::memset(static_cast<void*>(destination), 0, tap_stride_ * sizeof(E));
      return;
    }
    const T* values = x + input * width;
    for (int64_t channel = 0; channel < sizes_.channels; channel += kSteps<E>, destination += pitch_) {
      const T* plane = values + channel * sizes_.pixels();
      if constexpr (kSteps<E> == 1) {
        copy_row(destination, width, first, sizes_.horizontal.stride, count,
                 [=](int64_t place) { return static_cast<E>(plane[place]); });
      } else {
        copy_pair(destination, width, first, count, plane,
                  channel + 1 < sizes_.channels ? plane + sizes_.pixels() : nullptr);
      }
    }
  }

  // Lanes of two channels; the second is zero where there is none.
  template <typename T>
  void copy_pair(E* destination, int64_t width, int64_t first, int64_t count, const T* left, const T* right) const {
    const int64_t step = sizes_.horizontal.stride;
    if (right == nullptr) {
      copy_row(destination, width, first, step, count, [=](int64_t place) { return E{left[place], T(0.0f)}; });
    } else {
      copy_row(destination, width, first, step, count, [=](int64_t place) { return E{left[place], right[place]}; });
    }
  }

  const PacConv2dSizes& sizes_;
  int64_t pitch_;
  int64_t tap_stride_;
  int64_t slot_stride_;
  E* rows_;
};

template <typename E>
StripShape<E> strip_shape(const PacConv2dSizes& sizes, int threads) {
  // Strips of a small image are short, for each thread to get some.
  const int64_t share = sizes.batch * sizes.out_pixels() / (kStripsPerThread * threads);
  const int64_t depth = sizes.kernel_size * TapRows<E>::copies(sizes) * elements_per_tap<E>(sizes);
  return StripShape<E>(sizes, std::min(kMostPlaces, share), kRowsBytes / (depth * int64_t{sizeof(E)}));
}

// The end of a row of sums: y = residual + alpha · round(sum + bias).
template <typename T, typename R>
class Epilogue {
 public:
  using A = AccumulateType<T>;

  explicit Epilogue(const PacConv2dForward& arguments)
      : bias_(static_cast<const T*>(arguments.bias)),
        residual_(static_cast<const R*>(arguments.residual)),
        y_(static_cast<R*>(arguments.y)),
        alpha_(A(arguments.alpha)),
        quantum_(A(arguments.quantum)),
        inverse_(arguments.quantum == 0 ? A(0) : A(1 / arguments.quantum)) {}

  // Writes `count` numbers of output channel `channel` from `offset` on.
  HOST_DEVICE void operator()(const A* sums, int64_t channel, int64_t offset, int64_t count) const {
    const A bias = bias_ == nullptr ? A(0) : static_cast<A>(bias_[channel]);
    const A alpha = alpha_, quantum = quantum_, inverse = inverse_;
    const R* residual = residual_ + offset;
    R* y = y_ + offset;
    if (quantum != 0) {
      finish(sums, residual, y, count, [=](A sum) { return alpha * round_to_multiple(sum + bias, quantum, inverse); });
    } else {
      finish(sums, residual, y, count, [=](A sum) { return alpha * (sum + bias); });
    }
  }

 private:
  template <typename Value>
  HOST_DEVICE void finish(const A* sums, const R* residual, R* y, int64_t count, Value value) const {
    if (residual_ != nullptr) {
#pragma omp simd
      for (int64_t place = 0; place < count; ++place) {
        assign(y[place], static_cast<A>(residual[place]) + value(sums[place]));
      }
    } else {
#pragma omp simd
      for (int64_t place = 0; place < count; ++place) assign(y[place], value(sums[place]));
    }
  }

  const T* bias_;
  const R* residual_;
  R* y_;
  A alpha_;
  A quantum_;
  A inverse_;
};

// product [kPanelRows, kTile] = sum over taps of k_t · (panel_t^T · x under t), for kVectors vectors of pixels from place
// `first` of a row on.
template <int kVectors, typename E, typename A>
HOST_DEVICE void multiply_taps(const E* panel, const TapRows<E>& rows, const PacConv2dSizes& sizes, int64_t row,
                               int64_t first, const A* kernel, int64_t kernel_stride, A* product) {
  const int64_t elements = elements_per_tap<E>(sizes);
  std::memset(product, 0, kPanelRows * kTile<A> * sizeof(A));
  for (int64_t tap_row = 0; tap_row < sizes.kernel_size; ++tap_row) {
    for (int64_t tap_column = 0; tap_column < sizes.kernel_size; ++tap_column, kernel += kernel_stride) {
      PanelSums<kVectors, A> sums;
      multiply_panel<kVectors>(panel, rows.under(row, tap_row, tap_column) + first, elements, rows.pitch(), kLanes<A>,
                               sums);
      panel += elements * kPanelRows;
#pragma GCC unroll 4
      for (int vector = 0; vector < kVectors; ++vector) {
        const Vector<A> factor = load(kernel + vector * kLanes<A>);
#pragma GCC unroll 8
        for (int sum = 0; sum < kPanelRows; ++sum) {
          A* total = product + sum * kTile<A> + vector * kLanes<A>;
          store(total, load(total) + factor * sums[sum][vector]);
        }
      }
    }
  }
}

// Every output channel of row `row` of the strip.
template <typename E, typename A, typename Finish>
void multiply_row(const StripTiles<E>& tiles, const PacConv2dSizes& sizes, int64_t row, const E* panels,
                  const TapRows<E>& rows, const A* kernel, const Finish& finish) {
  const int64_t panel_size = sizes.taps() * elements_per_tap<E>(sizes) * kPanelRows;
  kernel += row * tiles.places_per_row();
  alignas(kCacheLineBytes) A product[kPanelRows * kTile<A>];
  for (int64_t first = 0; first < sizes.out_channels; first += kPanelRows, panels += panel_size) {
    const int64_t last = std::min<int64_t>(first + kPanelRows, sizes.out_channels);
    for (int64_t place = 0; place < tiles.strip.columns; place += kTile<A>) {
      const int64_t pixels = std::min<int64_t>(kTile<A>, tiles.strip.columns - place);
      for_tile_of<A>(pixels, [&](auto vectors) {
        multiply_taps<decltype(vectors)::value>(panels, rows, sizes, row, place, kernel + place, tiles.places(), product);
      });
      for (int64_t channel = first; channel < last; ++channel) {
        finish(product + (channel - first) * kTile<A>, channel, tiles.output_offset(sizes, channel, row) + place, pixels);
      }
    }
  }
}

// Every channel by itself, with the one filter that all share.
template <typename T, typename E, typename A, typename Finish>
void filter_strip(const StripTiles<E>& tiles, const PacConv2dSizes& sizes, const T* x, const T* filter,
                  const StripScratch<E>& scratch, A* sums, const Finish& finish) {
  const int64_t count = tiles.places_per_row();
  for (int64_t row = 0; row < tiles.strip.rows; ++row) {
    const A* row_kernel = scratch.kernel + row * tiles.places_per_row();
    for (int64_t channel = 0; channel < sizes.channels; ++channel) {
      const T* plane = x + (tiles.strip.image * sizes.channels + channel) * sizes.pixels();
      std::memset(sums, 0, count * sizeof(A));
      for (int64_t tap_row = 0; tap_row < sizes.kernel_size; ++tap_row) {
        for_each_tap(tiles, sizes, plane, row, tap_row, scratch.source, [&](int64_t tap, const A* values) {
          const A* kernel = row_kernel + tap * tiles.places();
          const A factor = static_cast<A>(filter[tap]);
          for (int64_t place = 0; place < count; place += kLanes<A>) {
            store(sums + place, load(sums + place) + load(kernel + place) * load(values + place) * factor);
          }
        });
      }
      finish(sums, channel, tiles.output_offset(sizes, channel, row), tiles.strip.columns);
    }
  }
}

template <typename T, typename R>
void forward(const PacConv2dForward& arguments, const PacConv2dSizes& sizes, int threads) {
  using A = AccumulateType<T>;
  using E = Operand<T>;
  const T* x = static_cast<const T*>(arguments.x);
  const T* guide = static_cast<const T*>(arguments.guide);
  const T* weight = static_cast<const T*>(arguments.weight);
  const Epilogue<T, R> finish(arguments);

  const int64_t tap_depth = elements_per_tap<E>(sizes) * kSteps<E>;
  Buffer<E> panels(sizes.shared ? 0 : round_up(sizes.out_channels, kPanelRows) * sizes.taps() * tap_depth / kSteps<E>);
  if (!sizes.shared) {
    pack_panels<E>(panels.data(), sizes.out_channels, sizes.taps() * tap_depth, [&](int64_t row, int64_t step) {
      const int64_t tap = step / tap_depth, channel = step % tap_depth;
      return channel < sizes.channels ? A(weight[(row * sizes.channels + channel) * sizes.taps() + tap]) : A(0);
    });
  }

  const StripShape<E> shape = strip_shape<E>(sizes, threads);
  Carver counter(nullptr);
  StripScratch<E>(counter, sizes, shape.largest());
  TapRows<E>(counter, sizes, shape.largest());
  const int64_t scratch_size = counter.used();
  Buffer<char> memory(threads * scratch_size);

  if (arguments.y != arguments.residual) {
    advise_huge_pages(arguments.y, sizes.batch * sizes.out_channels * sizes.out_pixels() * int64_t{sizeof(R)});
  }
  const int64_t strips_down = ceil_divide(sizes.out_height(), shape.rows);
  const int64_t strips_across = ceil_divide(sizes.out_width(), shape.columns);
  const int64_t strips = sizes.batch * strips_down * strips_across;
  const bool parallel = sizes.batch * sizes.out_pixels() * sizes.out_channels * sizes.depth() >= kParallelProducts;
  // Handed out one by one: a core that is busy with something else holds nobody up.
#pragma omp parallel for schedule(dynamic) num_threads(threads) if (parallel)
  for (int64_t index = 0; index < strips; ++index) {
    const int64_t row = index / strips_across % strips_down * shape.rows;
    const int64_t column = index % strips_across * shape.columns;
    const StripTiles<E> tiles{{index / (strips_across * strips_down), row,
                               std::min(shape.rows, sizes.out_height() - row), column,
                               std::min(shape.columns, sizes.out_width() - column)}};
    Carver carver(memory.data() + thread_number() * scratch_size);
    const StripScratch<E> scratch(carver, sizes, shape.largest());
    TapRows<E> rows(carver, sizes, shape.largest());
    pack_kernel(tiles, sizes, guide, scratch);
    if (sizes.shared) {
      filter_strip(tiles, sizes, x, weight, scratch, scratch.centre, finish);
      continue;
    }
    for (int64_t row = 0; row < tiles.strip.rows; ++row) {
      rows.fill(tiles, row, x);
      multiply_row(tiles, sizes, row, panels.data(), rows, scratch.kernel, finish);
    }
  }
}

}  // namespace

void pac_conv2d_forward(const PacConv2dForward& arguments, const PacConv2dSizes& sizes, DType dtype, DType output_dtype,
                        int threads) {
  dispatch_pac_conv2d(dtype, output_dtype, [&](auto tag, auto output_tag) {
    forward<typename decltype(tag)::Type, typename decltype(output_tag)::Type>(arguments, sizes, threads);
  });
}

}  // namespace restoration::CPU_ISA

// Pixel-adaptive convolution on the CPU, forward: formula in pac_conv2d.h.
// A thread takes a strip of output pixels. It copies the rows of x that the taps of one row of the strip reach into its
// own cache, and multiplies what lies under each tap with that tap's weights [O, C], kPanelRows x kTile sums at a time
// in registers. k_t(p) scales a tap's sums, or x on its way into the registers: no scaled column is ever written.
// Bias, rounding, alpha and residual follow while a tile of sums is at hand. Read: x, guide, residual once (and
// neighbouring rows again from the cache). Written: y once. Scratch memory: a strip for each thread, and one copy of
// the weights.

#include "pac_conv2d_strips_cpu.h"

namespace restoration::CPU_ISA {
namespace {

// Rows of x under one row of a strip: with the weights in passing, they stay in a second-level cache of 1 MB.
constexpr int64_t kRowsBytes = int64_t{320} << 10;

// With fewer, threads that are done wait long for the last one: 4 take 6 to 12 % longer at 64 -> 256 on two threads.
constexpr int64_t kStripsPerThread = 16;

// Up to here kTileVectors products a channel are faster than kPanelRows · kTileVectors sums a tap: measured with 4, 16
// and 64 channels.
constexpr int64_t kFewChannels = 16;

// Elements of an operand that the channels of one tap fill.
template <typename E>
int64_t elements_per_tap(const PacConv2dSizes& sizes) {
  return ceil_divide(sizes.channels, kSteps<E>);
}

// What a row of a strip is multiplied from: tap t of element e of place p reads under[t][e · pitch + p].
template <typename E>
struct Taps {
  const E** under;
  int64_t count;
  int64_t elements;
  int64_t pitch;
};

// The rows of x under the taps of one row of a strip: [K, copies, elements of a tap, pitch]. Where all taps of a row
// can read one copy of the image's row there is one, else one for each.
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
        taps_{carver.take<const E*>(sizes.taps()), sizes.taps(), elements_per_tap<E>(sizes),
              pitch(sizes, largest.places_per_row())},
        tap_stride_(taps_.elements * taps_.pitch),
        slot_stride_(copies(sizes) * tap_stride_),
        rows_(carver.take<E>(sizes.kernel_size * slot_stride_)) {}

  // Those of row `row` of the strip; rows are taken in order.
  template <typename T>
  Taps<E> fill(const StripTiles<E>& tiles, int64_t row, const T* x) {
    // Where each row of the strip needs only one more row of x than the one before, rows of x take turns in the slots.
    const bool advances = sizes_.vertical.stride == sizes_.vertical.dilation;
    for (int64_t tap_row = 0; tap_row < sizes_.kernel_size; ++tap_row) {
      E* slot = rows_ + (advances ? (row + tap_row) % sizes_.kernel_size : tap_row) * slot_stride_;
      for (int64_t tap = 0; tap < sizes_.kernel_size; ++tap) {
        taps_.under[tap_row * sizes_.kernel_size + tap] =
            slot + tap * (copies(sizes_) == 1 ? sizes_.horizontal.dilation : tap_stride_);
      }
      if (!advances || row == 0 || tap_row + 1 == sizes_.kernel_size) fill_slot(slot, tiles, row, tap_row, x);
    }
    return taps_;
  }

 private:
  template <typename T>
  void fill_slot(E* slot, const StripTiles<E>& tiles, int64_t row, int64_t tap_row, const T* x) const {
    const int64_t input = sizes_.vertical.position(tiles.strip.first_row + row, tap_row);
    if (input < 0 || input >= sizes_.vertical.size) {
      std::memset(static_cast<void*>(slot), 0, slot_stride_ * sizeof(E));
      return;
    }
    const T* image = x + tiles.strip.image * sizes_.channels * sizes_.pixels();
    for (int64_t channel = 0; channel < sizes_.channels; channel += kSteps<E>, slot += taps_.pitch) {
      for (int64_t next = channel + kSteps<E>; next < std::min(channel + 2 * kSteps<E>, sizes_.channels); ++next) {
        prefetch_under(tiles, sizes_, image + next * sizes_.pixels(), row, tap_row);
      }
      const T* values = image + channel * sizes_.pixels() + input * sizes_.horizontal.size;
      const T* second = channel + 1 < sizes_.channels ? values + sizes_.pixels() : nullptr;
      for (int64_t copy = 0; copy < copies(sizes_); ++copy) {
        copy_channels(slot + copy * tap_stride_, sizes_.horizontal.position(tiles.strip.first_column, copy),
                      tiles.places_per_row() + StripScratch<E>::shared_reach(sizes_), values, second);
      }
    }
  }

  // A row of one channel, or of a pair, whose second is zero where there is none.
  template <typename T>
  void copy_channels(E* destination, int64_t first, int64_t count, const T* values, const T* second) const {
    const int64_t width = sizes_.horizontal.size, step = sizes_.horizontal.stride;
    if constexpr (kSteps<E> == 1) {
      copy_row(destination, width, first, step, count, [=](int64_t place) { return static_cast<E>(values[place]); });
    } else if (second == nullptr) {
      copy_row(destination, width, first, step, count, [=](int64_t place) { return E{values[place], T(0.0f)}; });
    } else {
      copy_row(destination, width, first, step, count, [=](int64_t place) { return E{values[place], second[place]}; });
    }
  }

  const PacConv2dSizes& sizes_;
  Taps<E> taps_;
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

// product [kPanelRows, kTile] = sum over taps of k_t · (panel_t^T · x under t), for kVectors vectors of pixels from
// place `first` of a row on.
template <int kVectors, typename E, typename A>
SEPARATE void multiply_taps(const E* panel, Taps<E> taps, int64_t first, const A* kernel, int64_t kernel_stride,
                            A* product) {
  std::memset(product, 0, kPanelRows * kTile<A> * sizeof(A));
  for (int64_t tap = 0; tap < taps.count; ++tap, kernel += kernel_stride, panel += taps.elements * kPanelRows) {
    PanelSums<kVectors, A> sums = {};
    add_panel_products<kVectors>(panel, taps.under[tap] + first, taps.elements, taps.pitch, kLanes<E>, nullptr, sums);
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

// The same for few channels, where adding up the taps' sums would take longer than scaling x on its way.
template <int kVectors, typename A>
SEPARATE void multiply_scaled_taps(const A* panel, Taps<A> taps, int64_t first, const A* kernel, int64_t kernel_stride,
                                   A* product) {
  PanelSums<kVectors, A> sums = {};
  for (int64_t tap = 0; tap < taps.count; ++tap, kernel += kernel_stride, panel += taps.elements * kPanelRows) {
    Vector<A> factors[kVectors];
#pragma GCC unroll 4
    for (int vector = 0; vector < kVectors; ++vector) factors[vector] = load(kernel + vector * kLanes<A>);
    add_panel_products<kVectors>(panel, taps.under[tap] + first, taps.elements, taps.pitch, kLanes<A>, factors, sums);
  }
  store_sums<kVectors>(sums, product);
}

// Every output channel of row `row` of the strip.
template <typename E, typename A, typename Finish>
void multiply_row(const StripTiles<E>& tiles, const PacConv2dSizes& sizes, int64_t row, const E* panels,
                  const Taps<E>& taps, const A* kernel, const Finish& finish) {
  kernel += row * tiles.places_per_row();
  alignas(kCacheLineBytes) A product[kPanelRows * kTile<A>];
  for (int64_t first = 0; first < sizes.out_channels; first += kPanelRows) {
    const int64_t last = std::min<int64_t>(first + kPanelRows, sizes.out_channels);
    for (int64_t place = 0; place < tiles.strip.columns; place += kTile<A>) {
      const int64_t pixels = std::min<int64_t>(kTile<A>, tiles.strip.columns - place);
      for_tile_of<A>(pixels, [&](auto vectors) {
        constexpr int kVectors = decltype(vectors)::value;
        if constexpr (kSteps<E> == 1) {
          if (sizes.channels <= kFewChannels) {
            return multiply_scaled_taps<kVectors>(panels, taps, place, kernel + place, tiles.places(), product);
          }
        }
        multiply_taps<kVectors>(panels, taps, place, kernel + place, tiles.places(), product);
      });
      for (int64_t channel = first; channel < last; ++channel) {
        finish(product + (channel - first) * kTile<A>, channel, tiles.output_offset(sizes, channel, row) + place,
               pixels);
      }
    }
    panels += taps.count * taps.elements * kPanelRows;
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
    const auto number = [&](int64_t row, int64_t step) {
      const int64_t tap = step / tap_depth, channel = step % tap_depth;
      return channel < sizes.channels ? A(weight[(row * sizes.channels + channel) * sizes.taps() + tap]) : A(0);
    };
    pack_panels<E>(panels.data(), sizes.out_channels, sizes.taps() * tap_depth, threads, number);
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
      multiply_row(tiles, sizes, row, panels.data(), rows.fill(tiles, row, x), scratch.kernel, finish);
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

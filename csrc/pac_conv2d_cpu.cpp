// Pixel-adaptive convolution on the CPU, forward: formula in pac_conv2d.h.
// A thread takes a strip of output pixels, packs its scaled columns [C·K², pixels] into its own cache and multiplies
// them with the weights [O, C·K²], kPanelRows x kTile sums at a time in registers; bias, rounding, alpha and residual
// follow while a tile of sums is at hand. Read: x, guide, residual once (and neighbouring rows again from the cache).
// Written: y once. Scratch memory: a strip for each thread, and one copy of the weights.

#include <cmath>

#include "pac_conv2d_strips_cpu.h"

namespace restoration::CPU_ISA {
namespace {

// Columns of a strip: with the weights in passing, they stay in a second-level cache of 1 MB.
constexpr int64_t kColumnBytes = int64_t{320} << 10;

template <typename A>
StripShape<A> strip_shape(const PacConv2dSizes& sizes) {
  const int64_t places = kColumnBytes / (StripScratch<A>::column_rows(sizes) * int64_t{sizeof(A)});
  return StripShape<A>(sizes, std::min(places, kMostPlaces));
}

// Nearest multiple of 2^n where quantum = 2^n and inverse = 2^-n, ties to even.
template <typename A>
HOST_DEVICE A round_to_multiple(A value, A quantum, A inverse) {
  // Adding 2^23 (2^52), with the sign of the value, leaves no room for a fraction; larger numbers have none.
  constexpr A kNoFraction = sizeof(A) == 4 ? A(int64_t{1} << 23) : A(int64_t{1} << 52);
  const A scaled = value * inverse;
  const A rounder = scaled < 0 ? -kNoFraction : kNoFraction;
  const A rounded = (scaled + rounder) - rounder;
  return (std::abs(scaled) < kNoFraction ? rounded : scaled) * quantum;
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
      for (int64_t place = 0; place < count; ++place)
        y[place] = R(static_cast<A>(residual[place]) + value(sums[place]));
    } else {
#pragma omp simd
      for (int64_t place = 0; place < count; ++place) y[place] = R(value(sums[place]));
    }
  }

  const T* bias_;
  const R* residual_;
  R* y_;
  A alpha_;
  A quantum_;
  A inverse_;
};

// Every output channel from all rows of the columns.
template <typename A, typename Finish>
void multiply_strip(const StripTiles<A>& tiles, const PacConv2dSizes& sizes, const A* panels,
                    const StripScratch<A>& scratch, const Finish& finish) {
  const int64_t tile_stride = StripScratch<A>::column_rows(sizes) * kTile<A>;
  alignas(kCacheLineBytes) A sums[kPanelRows * kTile<A>];
  for (int64_t first = 0; first < sizes.out_channels; first += kPanelRows) {
    for (int64_t tile = 0; tile < tiles.tiles(); ++tile) {
      const int64_t pixels = tiles.pixels(tile);
      panel_times_tile(panels + first * sizes.depth(), scratch.columns + tile * tile_stride, sizes.depth(), pixels,
                       sums);
      const int64_t last = std::min<int64_t>(first + kPanelRows, sizes.out_channels);
      for (int64_t channel = first; channel < last; ++channel) {
        finish(sums + (channel - first) * kTile<A>, channel, tiles.output_offset(sizes, channel, tile), pixels);
      }
    }
  }
}

// Every channel by itself, with the one filter that all share.
template <typename T, typename A, typename Finish>
void filter_strip(const StripTiles<A>& tiles, const PacConv2dSizes& sizes, const T* x, const T* filter,
                  const StripScratch<A>& scratch, A* sums, const Finish& finish) {
  const int64_t count = tiles.computed_per_row();
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
      finish(sums, channel, tiles.output_offset(sizes, channel, row * tiles.tiles_per_row), tiles.strip.columns);
    }
  }
}

template <typename T, typename R>
void forward(const PacConv2dForward& arguments, const PacConv2dSizes& sizes, int threads) {
  using A = AccumulateType<T>;
  const T* x = static_cast<const T*>(arguments.x);
  const T* guide = static_cast<const T*>(arguments.guide);
  const T* weight = static_cast<const T*>(arguments.weight);
  const Epilogue<T, R> finish(arguments);

  Buffer<A> panels(sizes.shared ? 0 : round_up(sizes.out_channels, kPanelRows) * sizes.depth());
  if (!sizes.shared) {
    pack_panels<A>(panels.data(), sizes.out_channels, sizes.depth(), [&](int64_t row, int64_t step) {
      return static_cast<A>(weight[row * sizes.depth() + step % sizes.channels * sizes.taps() + step / sizes.channels]);
    });
  }

  const StripShape<A> shape = strip_shape<A>(sizes);
  Carver<A> counter(nullptr);
  StripScratch<A>(counter, sizes, shape.largest());
  const int64_t scratch_size = counter.used();
  Buffer<A> memory(threads * scratch_size);

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
    const StripTiles<A> tiles({index / (strips_across * strips_down), row,
                               std::min(shape.rows, sizes.out_height() - row), column,
                               std::min(shape.columns, sizes.out_width() - column)});
    Carver<A> carver(memory.data() + thread_number() * scratch_size);
    const StripScratch<A> scratch(carver, sizes, shape.largest());
    pack_kernel(tiles, sizes, guide, scratch);
    if (sizes.shared) {
      filter_strip(tiles, sizes, x, weight, scratch, scratch.columns, finish);
    } else {
      pack_columns(tiles, sizes, x, scratch);
      multiply_strip(tiles, sizes, panels.data(), scratch, finish);
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

// Pixel-adaptive convolution on the CPU, forward: formula in pac_conv2d.h.
// A thread takes a strip of output pixels. It copies the rows of x that the taps of one row of the strip reach into its
// own cache, and multiplies what lies under each tap with that tap's weights [O, C], kPanelRows x kTile sums at a time
// in registers. k_t(p) scales a tap's sums, or x on its way into the registers; where the processor multiplies pairs of
// bfloat16 numbers, scaled columns of one row of the strip are written to the cache. Bias, rounding, alpha and residual
// follow while a tile of sums is at hand. Read: x, guide, residual once (and neighbouring rows again from the cache).
// Written: y once. Scratch memory: a strip for each thread, and one copy of the weights.

#include "pac_conv2d_forward_cpu.h"

namespace restoration::CPU_ISA {
namespace {

// With fewer, threads that are done wait long for the last one: 4 take 6 to 12 % longer at 64 -> 256 on two threads.
constexpr int64_t kStripsPerThread = 16;

template <typename E>
StripShape<E> strip_shape(const PacConv2dSizes& sizes, int threads) {
  // Strips of a small image are short, for each thread to get some.
  const int64_t share = sizes.batch * sizes.out_pixels() / (kStripsPerThread * threads);
  return StripShape<E>(sizes, std::min(kMostPlaces, share), kRowBytes<E> / RowOperand<E>::bytes_per_place(sizes));
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

  // Asks for what the end of `count` numbers from `offset` on needs: their sums are made until it comes.
  HOST_DEVICE void fetch(int64_t offset, int64_t count) const {
    if (residual_ != nullptr && residual_ != y_) prefetch(residual_ + offset, count);
    prefetch(y_ + offset, count);
  }

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

// Every output channel of row `row` of the strip.
template <typename E, typename Finish>
void multiply_row(const StripTiles<E>& tiles, const PacConv2dSizes& sizes, int64_t row, const E* panels,
                  const RowOperand<E>& operand, const Finish& finish) {
  alignas(kCacheLineBytes) AccumulateType<E> product[kPanelRows<E> * kTile<E>];
  for (int64_t first = 0; first < sizes.out_channels; first += kPanelRows<E>) {
    const E* panel = panels + first * panel_elements<E>(sizes.taps(), sizes.channels);
    const int64_t last = std::min<int64_t>(first + kPanelRows<E>, sizes.out_channels);
    tiles.for_each_tile([&](int64_t place, int64_t pixels) {
      for (int64_t channel = first; channel < last; ++channel) {
        finish.fetch(tiles.output_offset(sizes, channel, row) + place, pixels);
      }
      for_tile_of<E>(pixels,
                     [&](auto vectors) { operand.template multiply<decltype(vectors)::value>(panel, place, product); });
      for (int64_t channel = first; channel < last; ++channel) {
        finish(product + (channel - first) * kTile<E>, channel, tiles.output_offset(sizes, channel, row) + place,
               pixels);
      }
    });
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
  using E = Operand<T>;
  const T* x = static_cast<const T*>(arguments.x);
  const T* guide = static_cast<const T*>(arguments.guide);
  const T* weight = static_cast<const T*>(arguments.weight);
  const Epilogue<T, R> finish(arguments);

  Buffer<E> panels(
      sizes.shared ? 0 : round_up(sizes.out_channels, kPanelRows<E>) * panel_elements<E>(sizes.taps(), sizes.channels));
  if (!sizes.shared) {
    pack_panels<E>(panels.data(), sizes.out_channels, sizes.taps(), sizes.channels, 1, sizes.taps(), threads,
                   [&](int64_t output) { return weight + output * sizes.depth(); });
  }

  const StripShape<E> shape = strip_shape<E>(sizes, threads);
  Carver counter(nullptr);
  StripScratch<E>(counter, sizes, shape.largest());
  RowOperand<E>(counter, sizes, shape.largest());
  ThreadBuffers<char> memory(threads, counter.used());

  if (arguments.y != arguments.residual) {
    advise_huge_pages(arguments.y, sizes.batch * sizes.out_channels * sizes.out_pixels() * int64_t{sizeof(R)});
  }
  const int64_t strips_down = ceil_divide(sizes.out_height(), shape.rows);
  const int64_t strips_across = ceil_divide(sizes.out_width(), shape.columns);
  const bool parallel = sizes.batch * sizes.out_pixels() * sizes.out_channels * sizes.depth() >= kParallelProducts;
#pragma omp parallel num_threads(threads) if (parallel)
  {
    [[maybe_unused]] const MatrixUnit<E> matrix_unit;
    Carver carver(memory.own());
    const StripScratch<E> scratch(carver, sizes, shape.largest());
    RowOperand<E> operand(carver, sizes, shape.largest());
    // Handed out one by one: a core that is busy with something else holds nobody up.
#pragma omp for schedule(dynamic)
    for (int64_t index = 0; index < sizes.batch * strips_down * strips_across; ++index) {
      const int64_t first_row = index / strips_across % strips_down * shape.rows;
      const int64_t column = index % strips_across * shape.columns;
      const StripTiles<E> tiles{{index / (strips_across * strips_down), first_row,
                                 std::min(shape.rows, sizes.out_height() - first_row), column,
                                 std::min(shape.columns, sizes.out_width() - column)}};
      pack_kernel(tiles, sizes, guide, scratch);
      if (sizes.shared) {
        filter_strip(tiles, sizes, x, weight, scratch, scratch.centre, finish);
        continue;
      }
      for (int64_t row = 0; row < tiles.strip.rows; ++row) {
        operand.fill(tiles, row, x, scratch.kernel + row * tiles.places_per_row());
        multiply_row(tiles, sizes, row, panels.data(), operand, finish);
      }
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

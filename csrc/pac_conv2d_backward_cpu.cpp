// Pixel-adaptive convolution on the CPU, backward. With v = alpha · grad_y and
// u_t(p)[c] = sum over o of W[o,c,t] v[o](p):
//   grad_W[o,c,t] = sum over p of v[o](p) k_t(p) x[c](p+t),   grad_b[o] = sum over p of v[o](p),
//   grad_x[c](p+t) += k_t(p) u_t(p)[c],   m_t(p) = sum over c of k_t(p) x[c](p+t) u_t(p)[c],
//   grad_g(p) -= m_t(p) (g(p) - g(p+t)),   grad_g(p+t) += the same.
// m_t is k_t times its gradient; with normalize, k_t is a share of the sum and m_t loses k_t · (sum over r of m_r).
// A thread packs the scaled columns k_t(p) · x[c](p+t) of a strip, row t·C + c, and grad_y; u is made tile by tile by
// one product, and used at once for grad_x and m.
// Scratch memory: a strip and a copy of grad_weight for each thread; in bfloat16 grad_x and grad_guide in float32 too.
//
// Strips add to pixels of their neighbours: bands of rows, so high that only neighbouring bands meet, run in two turns,
// even ones and odd ones. So grad_x and grad_guide do not depend on the thread count; grad_weight and grad_bias are
// summed in each thread and then in order, to the same bits for the same number of threads.

#include "pac_conv2d_backward_guide_cpu.h"
#include "pac_conv2d_backward_operands_cpu.h"

namespace restoration::CPU_ISA {
namespace {

// Columns and grad_y of a strip: with the weights in passing, they stay in a second-level cache of 1 MB.
constexpr int64_t kOperandBytes = int64_t{512} << 10;

// Half as long as forward's: a strip has both k and its slope.
constexpr int64_t kMostBackwardPlaces = kMostPlaces / 2;

// Low bands share small images among threads; each is about this high at least, as turns between bands cost time. In
// each of the two turns an even number of them is to be done.
constexpr int64_t kLeastBandRows = 8;
constexpr int64_t kBandsInStep = 4;

// The work of one thread.
template <typename T, typename R>
class Worker {
 public:
  using A = AccumulateType<T>;
  using E = Operand<T>;

  Worker(const PacConv2dBackward& arguments, const PacConv2dSizes& sizes, const StripShape<E>& shape, const E* panels,
         A* grad_x, A* grad_guide, char* memory)
      : sizes_(sizes),
        guide_(static_cast<const T*>(arguments.guide)),
        weight_(static_cast<const T*>(arguments.weight)),
        panels_(panels),
        grad_x_(grad_x),
        grad_guide_(grad_guide),
        wants_weight_(arguments.grad_weight != nullptr),
        carver_(memory),
        strip_(carver_, sizes, shape.largest()),
        own_(carver_, arguments, sizes, shape.largest()) {}

  int64_t memory_used() const { return carver_.used(); }
  A* grad_weight() const { return own_.grad_weight; }
  double* grad_filter() const { return own_.grad_filter; }
  double* grad_bias() const { return own_.grad_bias; }

  void clear(const StripTiles<E>& largest) {
    own_.clear_grad_y(largest);
    std::memset(own_.grad_weight, 0, BackwardScratch<E>::weight_sums(sizes_) * sizeof(A));
    std::memset(own_.grad_filter, 0, BackwardScratch<E>::filter_sums(sizes_) * sizeof(double));
    std::memset(own_.grad_bias, 0, sizes_.out_channels * sizeof(double));
  }

  void run(const Strip& strip) {
    const StripTiles<E> tiles{strip};
    own_.pack_grad_y(tiles);
    const bool wants_columns = wants_weight_ || grad_guide_ != nullptr;
    const bool wants_products = grad_x_ != nullptr || grad_guide_ != nullptr;
    if (wants_columns || wants_products) pack_kernel(tiles, sizes_, guide_, strip_);
    if (wants_columns) own_.pack_columns(tiles, strip_);
    if (wants_weight_) sizes_.shared ? add_filter_gradient(tiles) : add_weight_gradient(tiles);
    if (grad_guide_ != nullptr) {
      std::memset(own_.guide_slope, 0, sizes_.taps() * own_.slope_stride(tiles) * sizeof(A));
    }
    if (wants_products) sizes_.shared ? filter_grad_y(tiles) : multiply_grad_y(tiles);
    if (grad_guide_ != nullptr) GuideGradient<T>(tiles, sizes_, strip_, own_).add(guide_, grad_guide_);
  }

 private:
  void add_weight_gradient(const StripTiles<E>& tiles) {
    const int64_t rows = BackwardScratch<E>::output_rows(sizes_), columns = BackwardScratch<E>::column_rows(sizes_);
    A* sums = own_.grad_weight;
    for (int64_t column = 0; column < columns; column += kBlockColumns<E>, sums += rows * kBlockColumns<E>) {
      add_column_products(own_.grad_y_turned, own_.grad_y_stride(), rows, own_.columns + column * kLanes<E>,
                          own_.column_stride(), tiles.blocks(), sums);
    }
  }

  void add_filter_gradient(const StripTiles<E>& tiles) {
    for (int64_t row = 0; row < sizes_.depth(); ++row) {
      Vector<A> sum = {};
      for (int64_t block = 0; block < tiles.blocks(); ++block) {
        sum = multiply_add(sum, load(own_.columns + block * own_.column_stride() + row * kLanes<E>),
                           load(own_.grad_y + block * own_.grad_y_stride() + row % sizes_.channels * kLanes<E>));
      }
      for (int lane = 0; lane < kLanes<A>; ++lane) own_.grad_filter[row / sizes_.channels] += sum[lane];
    }
  }

  void multiply_grad_y(const StripTiles<E>& tiles) {
    const int64_t elements = panel_elements<E>(1, sizes_.out_channels), stride = own_.grad_y_steps_stride();
    alignas(kCacheLineBytes) A product[kPanelRows<E> * kTile<E>];
    for (int64_t first = 0; first < sizes_.depth(); first += kPanelRows<E>) {
      const E* panel = panels_ + first * elements;
      const int64_t last = std::min<int64_t>(first + kPanelRows<E>, sizes_.depth());
      for_each_tile(tiles, [&](int64_t row, int64_t place, int64_t pixels) {
        const E* tile = own_.grad_y_steps + (row * tiles.places_per_row() + place) / kLanes<A> * stride;
        for_tile_of<E>(pixels, [&](auto vectors) {
          panel_times_tile<decltype(vectors)::value>(panel, tile, elements, kLanes<E>, stride, product);
        });
        for (int64_t column = first, next; column < last; column = next) {
          next = std::min(last, (column / sizes_.channels + 1) * sizes_.channels);
          use_products(tiles, row, place, pixels, column, next - column, product + (column - first) * kTile<E>);
        }
      });
    }
  }

  void filter_grad_y(const StripTiles<E>& tiles) {
    alignas(kCacheLineBytes) A product[kTile<E>];
    for (int64_t column = 0; column < sizes_.depth(); ++column) {
      const Vector<A> factor = Vector<A>{} + static_cast<A>(weight_[column / sizes_.channels]);
      const E* grad_y = own_.grad_y + column % sizes_.channels * kLanes<E>;
      for_each_tile(tiles, [&](int64_t row, int64_t place, int64_t pixels) {
        const int64_t first = row * tiles.places_per_row() + place;
        for (int64_t offset = 0; offset < pixels; offset += kLanes<A>) {
          store(product + offset, factor * unpack_pixels(grad_y, own_.grad_y_stride(), (first + offset) / kLanes<A>));
        }
        use_products(tiles, row, place, pixels, column, 1, product);
      });
    }
  }

  // Calls call(row, place, pixels) for the tiles of each row of the strip.
  template <typename Call>
  HOST_DEVICE void for_each_tile(const StripTiles<E>& tiles, Call call) {
    for (int64_t row = 0; row < tiles.strip.rows; ++row) {
      tiles.for_each_tile([&](int64_t place, int64_t pixels) { call(row, place, pixels); });
    }
  }

  // What `count` rows of u from `column` on, all of one tap, add to grad_x and to the slope of the guide for the pixels
  // of one tile.
  HOST_DEVICE void use_products(const StripTiles<E>& tiles, int64_t row, int64_t place, int64_t pixels, int64_t column,
                                int64_t count, const A* products) {
    const int64_t tap = column / sizes_.channels, channel = column % sizes_.channels;
    const int64_t first = row * tiles.places_per_row() + place;
    const E* columns = own_.columns + column * kLanes<E>;
    const A* kernel = strip_.kernel + tap * tiles.places() + first;
    A* slope = nullptr;
    if (grad_guide_ != nullptr && (sizes_.normalize || tap != sizes_.taps() / 2)) {
      slope = own_.guide_slope + tap * own_.slope_stride(tiles) + first;
    }
    InsideRange range{};
    A* plane = nullptr;
    if (grad_x_ != nullptr) {
      range = inside(tiles, sizes_, row, tap);
      plane = grad_x_ + (tiles.strip.image * sizes_.channels + channel) * sizes_.pixels() +
              range.input_row * sizes_.horizontal.size + range.first_column;
    }
    for (int64_t offset = 0; offset < pixels; offset += kLanes<A>) {
      if (slope != nullptr) {
        Vector<A> sum = load(slope + offset);
        for (int64_t index = 0; index < count; ++index) {
          sum += unpack_pixels(columns + index * kLanes<E>, own_.column_stride(), (first + offset) / kLanes<A>) *
                 load(products + index * kTile<E> + offset);
        }
        store(slope + offset, sum);
      }
      const int64_t begin = std::max(range.begin, place + offset);
      const int64_t end = std::min({range.end, place + offset + kLanes<A>, place + pixels});
      if (begin >= end) continue;
      const A* values = products + begin - place;
      const A* factors = kernel + begin - place;
      if (sizes_.horizontal.stride > 1) {
        const int64_t step = sizes_.horizontal.stride;
        add_rows(plane + begin * step, step, factors, values, count, end - begin);
      } else if (end - begin < kLanes<A>) {
        add_rows(plane + begin, 1, factors, values, count, end - begin);
      } else {
        const Vector<A> factor = load(factors);
        for (int64_t index = 0; index < count; ++index) {
          A* sums = plane + index * sizes_.pixels() + begin;
          store(sums, load(sums) + factor * load(values + index * kTile<E>));
        }
      }
    }
  }

  // sums [count, places] += factors [places] · values [count, places], where sums lie `step` apart.
  HOST_DEVICE void add_rows(A* sums, int64_t step, const A* factors, const A* values, int64_t count,
                            int64_t places) const {
    for (int64_t index = 0; index < count; ++index, sums += sizes_.pixels(), values += kTile<E>) {
      for (int64_t place = 0; place < places; ++place) sums[place * step] += factors[place] * values[place];
    }
  }

  const PacConv2dSizes& sizes_;
  const T* guide_;
  const T* weight_;
  const E* panels_;
  A* grad_x_;
  A* grad_guide_;
  bool wants_weight_;
  Carver carver_;
  StripScratch<E> strip_;
  BackwardOperands<T, R> own_;
};

// [C·K², O]: the transpose of what forward multiplies with.
template <typename E, typename T>
void pack_transposed_weight(E* panels, const PacConv2dSizes& sizes, const T* weight, int threads) {
  pack_panels<E>(panels, sizes.depth(), 1, sizes.out_channels, 0, sizes.depth(), threads, [&](int64_t row) {
    return weight + row % sizes.channels * sizes.taps() + row / sizes.channels;
  });
}

// Channels whose sums are read one after the other while the places that they go to, of all taps and of a vector of
// outputs, stay in a first-level cache.
constexpr int64_t kStoredChannels = 16;

// grad_weight from the sums that BackwardScratch::grad_weight holds: of a vector of outputs at once, as those of one lie
// a cache line apart.
template <typename T>
void store_weight(T* grad_weight, const AccumulateType<T>* sums, const PacConv2dSizes& sizes, int threads) {
  using A = AccumulateType<T>;
  using E = Operand<T>;
  const int64_t depth = sizes.depth(), taps = sizes.taps();
  const int64_t next_columns = BackwardScratch<E>::output_rows(sizes) * kBlockColumns<E>;
  auto store_column = [=](int64_t output, int64_t channel, int64_t tap) {
    const int64_t column = tap * sizes.channels + channel;
    const A* values = sums + column / kBlockColumns<E> * next_columns + output / kBlockRows<E> * kBlockSums<E> +
                      Blocks<E>::sum_place(output % kBlockRows<E>, column % kBlockColumns<E>);
    T rounded[kLanes<A>];
#pragma omp simd
    for (int lane = 0; lane < kLanes<A>; ++lane) assign(rounded[lane], values[lane]);
    T* places = grad_weight + output * depth + channel * taps + tap;
    const int64_t lanes = std::min<int64_t>(kLanes<A>, sizes.out_channels - output);
    for (int64_t lane = 0; lane < lanes; ++lane) places[lane * depth] = rounded[lane];
  };
#pragma omp parallel for num_threads(threads) if (sizes.out_channels * depth >= kParallelElements)
  for (int64_t output = 0; output < sizes.out_channels; output += kLanes<A>) {
    for (int64_t first = 0; first < sizes.channels; first += kStoredChannels) {
      const int64_t last = std::min(sizes.channels, first + kStoredChannels);
      for (int64_t tap = 0; tap < taps; ++tap) {
        for (int64_t channel = first; channel < last; ++channel) store_column(output, channel, tap);
      }
    }
  }
}

template <typename T, typename R>
void backward(const PacConv2dBackward& arguments, const PacConv2dSizes& sizes, int threads) {
  using A = AccumulateType<T>;
  using E = Operand<T>;
  const T* weight = static_cast<const T*>(arguments.weight);
  const int64_t work = sizes.batch * sizes.out_pixels() * sizes.out_channels * sizes.depth();
  const int workers = work < kParallelProducts ? 1 : threads;

  Buffer<E> panels(sizes.shared ? 0
                                : round_up(sizes.depth(), kPanelRows<E>) * panel_elements<E>(1, sizes.out_channels));
  if (!sizes.shared) pack_transposed_weight(panels.data(), sizes, weight, workers);
  SummedGradient<T> grad_x(arguments.grad_x, sizes.batch * sizes.channels * sizes.pixels(), workers);
  SummedGradient<T> grad_guide(arguments.grad_guide, sizes.batch * sizes.guide_channels * sizes.pixels(), workers);

  const int64_t places = std::min(kOperandBytes / BackwardScratch<E>::bytes_per_place(sizes), kMostBackwardPlaces);
  const StripShape<E> shape(sizes, places, places);
  auto worker = [&](char* memory) {
    return Worker<T, R>(arguments, sizes, shape, panels.data(), grad_x.wanted() ? grad_x.sums() : nullptr,
                        grad_guide.wanted() ? grad_guide.sums() : nullptr, memory);
  };
  ThreadBuffers<char> memory(workers, worker(nullptr).memory_used());
  for (int number = 0; number < workers; ++number) worker(memory.of(number)).clear(shape.largest());

  // Rows that the taps of one output row reach over, in output rows: bands two apart then have no input row in common.
  const int64_t reach = ceil_divide((sizes.kernel_size - 1) * sizes.vertical.dilation, sizes.vertical.stride);
  const int64_t wished = sizes.out_height() / std::max({reach, shape.rows, kLeastBandRows});
  const int64_t even = wished > 2 ? round_up(wished, kBandsInStep) : std::max<int64_t>(wished, 1);
  const int64_t band_rows = std::max(reach, ceil_divide(sizes.out_height(), even));
  const int64_t bands = ceil_divide(sizes.out_height(), band_rows);
#pragma omp parallel num_threads(workers) if (workers > 1)
  {
    [[maybe_unused]] const MatrixUnit<E> matrix_unit;
    Worker<T, R> own = worker(memory.own());
    for (int64_t turn = 0; turn < 2; ++turn) {
      const int64_t turn_bands = (bands + 1 - turn) / 2;
      // Fixed shares, so that the sums of each thread are the same in every call.
#pragma omp for schedule(static)
      for (int64_t index = 0; index < sizes.batch * turn_bands; ++index) {
        const int64_t first_row = (index % turn_bands * 2 + turn) * band_rows;
        for_each_strip(shape, sizes, index / turn_bands, first_row, std::min(sizes.out_height(), first_row + band_rows),
                       [&](const Strip& strip) { own.run(strip); });
      }
    }
  }

  grad_x.finish();
  grad_guide.finish();
  // Sums of all threads in the first one's memory, in their order.
  auto sum_of_workers = [&](auto sums_of, int64_t count) {
    auto* totals = sums_of(worker(memory.of(0)));
    for (int number = 1; number < workers; ++number) {
      const auto* sums = sums_of(worker(memory.of(number)));
#pragma omp simd
      for (int64_t index = 0; index < count; ++index) totals[index] += sums[index];
    }
    return totals;
  };
  auto store = [&](void* gradient, auto sums_of, int64_t count) {
    const double* sums = sum_of_workers(sums_of, count);
    for (int64_t index = 0; index < count; ++index) static_cast<T*>(gradient)[index] = T(static_cast<A>(sums[index]));
  };
  if (arguments.grad_weight != nullptr && sizes.shared) {
    store(arguments.grad_weight, [](const auto& worker) { return worker.grad_filter(); }, sizes.taps());
  } else if (arguments.grad_weight != nullptr) {
    const A* sums =
        sum_of_workers([](const auto& worker) { return worker.grad_weight(); }, BackwardScratch<E>::weight_sums(sizes));
    store_weight(static_cast<T*>(arguments.grad_weight), sums, sizes, workers);
  }
  if (arguments.grad_bias != nullptr) {
    store(arguments.grad_bias, [](const auto& worker) { return worker.grad_bias(); }, sizes.out_channels);
  }
}

}  // namespace

void pac_conv2d_backward(const PacConv2dBackward& arguments, const PacConv2dSizes& sizes, DType dtype,
                         DType output_dtype, int threads) {
  dispatch_pac_conv2d(dtype, output_dtype, [&](auto tag, auto output_tag) {
    backward<typename decltype(tag)::Type, typename decltype(output_tag)::Type>(arguments, sizes, threads);
  });
}

}  // namespace restoration::CPU_ISA

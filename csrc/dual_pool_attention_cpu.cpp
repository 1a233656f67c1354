// Dual pooling attention on the CPU: formula in dual_pool_attention.h. The template for new <op>_cpu.cpp files.
// A plane is one channel of one image; a strip is some rows of a plane, the work of one thread at a time.
// Forward reads x twice: strips give partial sums, then mean and scale of each plane, then y is written.
// Backward reads grad_y and x, then grad_y again and writes grad_x. Scratch memory: two tables and a number a strip.
// Sums run in vectors over kBlock columns and in float64 above that, so the result does not depend on the thread count.

#include "common_cpu.h"
#include "dual_pool_attention.h"

namespace restoration::CPU_ISA {
namespace {

// Columns summed in the accumulate type before float64 takes over: 128 additions in each lane of a 512-bit vector,
// whose float32 rounding errors stay below the rounding of the result.
constexpr int64_t kBlock = 2048;

// About this many elements make a strip: 256 KB of float32, long beside the cost of handing it to a thread (1 us),
// short beside a single large plane that all threads share.
constexpr int64_t kStripElements = int64_t{1} << 16;

// Tensors below this size take less time than waking the threads.
constexpr int64_t kParallelElements = int64_t{1} << 15;

struct Strips {
  DualPoolAttentionSizes sizes;
  int64_t rows_per_strip;
  int64_t strips_per_plane;

  explicit Strips(const DualPoolAttentionSizes& sizes)
      : sizes(sizes),
        rows_per_strip(std::max<int64_t>(1, kStripElements / std::max<int64_t>(1, sizes.width))),
        strips_per_plane(ceil_divide(sizes.height, rows_per_strip)) {}

  int64_t count() const { return sizes.planes() * strips_per_plane; }
  int64_t plane(int64_t strip) const { return strip / strips_per_plane; }
  int64_t first_row(int64_t strip) const { return strip % strips_per_plane * rows_per_strip; }
  int64_t last_row(int64_t strip) const { return std::min(sizes.height, first_row(strip) + rows_per_strip); }
  int64_t offset(int64_t strip) const { return (plane(strip) * sizes.height + first_row(strip)) * sizes.width; }
  int64_t elements(int64_t strip) const { return (last_row(strip) - first_row(strip)) * sizes.width; }
};

// Calls task(strip) for every strip. In the second pass over the same data, `backwards` starts with the planes that the
// first pass read last: they are still in the cache.
template <typename Task>
void for_each_strip(const Strips& strips, int threads, bool backwards, Task task) {
  const int64_t count = strips.count();
  const bool parallel = threads > 1 && strips.sizes.planes() * strips.sizes.pixels() >= kParallelElements;
#pragma omp parallel for schedule(static) num_threads(threads) if (parallel)
  for (int64_t index = 0; index < count; ++index) {
    task(backwards ? count - 1 - index : index);
  }
}

// Sum over i of term(i).
template <typename A, typename Term>
HOST_DEVICE double blocked_sum(int64_t count, Term term) {
  double total = 0;
  for (int64_t block = 0; block < count; block += kBlock) {
    const int64_t end = std::min(count, block + kBlock);
    A sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t index = block; index < end; ++index) sum += term(index);
    total += sum;
  }
  return total;
}

// total[plane] = sum of the partial sums of its strips, in order.
void sum_strips(const Strips& strips, const double* partial, double* total) {
  for (int64_t plane = 0; plane < strips.sizes.planes(); ++plane) {
    total[plane] = 0;
    for (int64_t strip = 0; strip < strips.strips_per_plane; ++strip) {
      total[plane] += partial[plane * strips.strips_per_plane + strip];
    }
  }
}

template <typename A>
void fill_pooling_weights(A* weights, int64_t size, int64_t bins) {
  for (int64_t index = 0; index < size; ++index) weights[index] = A(pooling_weight<double>(index, size, bins));
}

// Whether the output, as large as x, is to be written past the caches.
template <typename T>
bool prepare_output(T* output, const DualPoolAttentionSizes& sizes) {
  const int64_t bytes = sizes.planes() * sizes.pixels() * int64_t{sizeof(T)};
  if (bytes > kStreamingBytes) advise_huge_pages(output, bytes);
  return bytes > kStreamingBytes;
}

template <typename T>
void forward(const DualPoolAttentionForward& arguments, const DualPoolAttentionSizes& sizes, int threads) {
  using A = AccumulateType<T>;
  const T* x = static_cast<const T*>(arguments.x);
  const T* weight = static_cast<const T*>(arguments.weight);
  T* y = static_cast<T*>(arguments.y);
  A* mean = static_cast<A*>(arguments.mean);
  A* scale = static_cast<A*>(arguments.scale);

  Buffer<A> rows(sizes.height), columns(sizes.width);
  fill_pooling_weights(rows.data(), sizes.height, sizes.pool_size);
  fill_pooling_weights(columns.data(), sizes.width, sizes.pool_size);

  const Strips strips(sizes);
  Buffer<double> partial(strips.count()), total(sizes.planes());
  for_each_strip(strips, threads, false, [&](int64_t strip) {
    const T* row_values = x + strips.offset(strip);
    double sum = 0;
    for (int64_t row = strips.first_row(strip); row < strips.last_row(strip); ++row, row_values += sizes.width) {
      const A* column_weights = columns.data();
      sum += double(rows[row]) * blocked_sum<A>(sizes.width, [=](int64_t column) {
               return column_weights[column] * static_cast<A>(row_values[column]);
             });
    }
    partial[strip] = sum;
  });

  sum_strips(strips, partial.data(), total.data());
  for (int64_t plane = 0; plane < sizes.planes(); ++plane) {
    const int64_t channel = plane % sizes.channels;
    mean[plane] = A(total[plane]);
    scale[plane] = A(channel_scale(total.data() + plane - channel, weight, sizes.taps, channel, sizes.channels));
  }

  const bool streaming = prepare_output(y, sizes);
  for_each_strip(strips, threads, true, [&](int64_t strip) {
    const T* values = x + strips.offset(strip);
    const A factor = scale[strips.plane(strip)];
    write_values(y + strips.offset(strip), strips.elements(strip), streaming,
                 [=](int64_t index) { return T(static_cast<A>(values[index]) * factor); });
    finish_streaming();
  });
}

template <typename T>
void backward_input(const DualPoolAttentionBackward& arguments, const Strips& strips, const double* grad_logit,
                    int threads) {
  using A = AccumulateType<T>;
  const DualPoolAttentionSizes& sizes = strips.sizes;
  const T* grad_y = static_cast<const T*>(arguments.grad_y);
  const T* weight = static_cast<const T*>(arguments.weight);
  const A* scale = static_cast<const A*>(arguments.scale);
  T* grad_x = static_cast<T*>(arguments.grad_x);

  Buffer<A> rows(sizes.height), columns(sizes.width);
  fill_pooling_weights(rows.data(), sizes.height, sizes.pool_size);
  fill_pooling_weights(columns.data(), sizes.width, sizes.pool_size);

  const bool streaming = prepare_output(grad_x, sizes);
  for_each_strip(strips, threads, true, [&](int64_t strip) {
    const int64_t plane = strips.plane(strip);
    const int64_t channel = plane % sizes.channels;
    const double grad_mean =
        channel_grad_mean(grad_logit + plane - channel, weight, sizes.taps, channel, sizes.channels);
    const A factor = scale[plane];
    int64_t offset = strips.offset(strip);
    for (int64_t row = strips.first_row(strip); row < strips.last_row(strip); ++row, offset += sizes.width) {
      const A row_grad = A(grad_mean * rows[row]);
      const A* column_weights = columns.data();
      const T* row_values = grad_y + offset;
      write_values(grad_x + offset, sizes.width, streaming, [=](int64_t column) {
        return T(static_cast<A>(row_values[column]) * factor + row_grad * column_weights[column]);
      });
    }
    finish_streaming();
  });
}

template <typename T>
void backward_weight(const DualPoolAttentionBackward& arguments, const DualPoolAttentionSizes& sizes,
                     const double* grad_logit) {
  using A = AccumulateType<T>;
  const A* mean = static_cast<const A*>(arguments.mean);
  T* grad_weight = static_cast<T*>(arguments.grad_weight);
  for (int64_t tap = 0; tap < sizes.taps; ++tap) {
    double sum = 0;
    for (int64_t plane = 0; plane < sizes.planes(); ++plane) {
      const int64_t channel = plane % sizes.channels;
      const int64_t first = plane - channel;
      sum += channel_grad_tap(grad_logit + first, mean + first, tap - sizes.taps / 2, channel, sizes.channels);
    }
    grad_weight[tap] = T(A(sum));
  }
}

template <typename T>
void backward(const DualPoolAttentionBackward& arguments, const DualPoolAttentionSizes& sizes, int threads) {
  using A = AccumulateType<T>;
  const T* grad_y = static_cast<const T*>(arguments.grad_y);
  const T* x = static_cast<const T*>(arguments.x);
  const A* scale = static_cast<const A*>(arguments.scale);

  const Strips strips(sizes);
  Buffer<double> partial(strips.count()), grad_logit(sizes.planes());
  for_each_strip(strips, threads, false, [&](int64_t strip) {
    const T* grad_values = grad_y + strips.offset(strip);
    const T* values = x + strips.offset(strip);
    partial[strip] = blocked_sum<A>(strips.elements(strip), [=](int64_t index) {
      return static_cast<A>(grad_values[index]) * static_cast<A>(values[index]);
    });
  });

  sum_strips(strips, partial.data(), grad_logit.data());
  for (int64_t plane = 0; plane < sizes.planes(); ++plane) {
    grad_logit[plane] *= double(scale[plane]) * (1 - double(scale[plane]));
  }
  if (arguments.grad_weight != nullptr) backward_weight<T>(arguments, sizes, grad_logit.data());
  if (arguments.grad_x != nullptr) backward_input<T>(arguments, strips, grad_logit.data(), threads);
}

}  // namespace

void dual_pool_attention_forward(const DualPoolAttentionForward& arguments, const DualPoolAttentionSizes& sizes,
                                 DType dtype, int threads) {
  dispatch_cpu_dtype("dual_pool_attention", dtype,
                     [&](auto tag) { forward<typename decltype(tag)::Type>(arguments, sizes, threads); });
}

void dual_pool_attention_backward(const DualPoolAttentionBackward& arguments, const DualPoolAttentionSizes& sizes,
                                  DType dtype, int threads) {
  dispatch_cpu_dtype("dual_pool_attention", dtype,
                     [&](auto tag) { backward<typename decltype(tag)::Type>(arguments, sizes, threads); });
}

}  // namespace restoration::CPU_ISA

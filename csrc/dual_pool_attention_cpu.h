// What the CPU kernels of dual pooling attention share: the pieces of maps that threads work on, sums over planes, and
// the numbers a channel that come of them.
#pragma once

#include "common_cpu.h"
#include "dual_pool_attention.h"

namespace restoration::CPU_ISA {

// Columns summed in the accumulate type before float64 takes over: 128 additions in each lane of a 512-bit vector,
// whose float32 rounding errors stay below the rounding of the result.
constexpr int64_t kBlock = 2048;

// About this many elements make a strip: 256 KB of float32, long beside the cost of handing it to a thread (1 us),
// short beside a single large plane that all threads share.
constexpr int64_t kStripElements = int64_t{1} << 16;

// Bands of planes, each an image of one channel.
struct Strips : Bands {
  DualPoolAttentionSizes sizes;

  explicit Strips(const DualPoolAttentionSizes& sizes)
      : Bands(kStripElements, sizes.planes(), 1, sizes.height, sizes.width), sizes(sizes) {}

  int64_t plane(int64_t strip) const { return image(strip); }
  int64_t offset(int64_t strip) const { return (plane(strip) * height + first_row(strip)) * width; }
  int64_t elements(int64_t strip) const { return (last_row(strip) - first_row(strip)) * width; }
};

// Calls task(strip) for every strip. In the second pass over the same data, `backwards` starts with the planes that the
// first pass read last: they are still in the cache.
template <typename Task>
void for_each_strip(const Strips& strips, int threads, bool backwards, Task task) {
  const int64_t count = strips.count();
#pragma omp parallel for schedule(static) num_threads(threads) if (strips.worth_threads(threads))
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
inline void sum_strips(const Strips& strips, const double* partial, double* total) {
  for (int64_t plane = 0; plane < strips.batch; ++plane) {
    total[plane] = 0;
    for (int64_t strip = 0; strip < strips.bands_per_image; ++strip) {
      total[plane] += partial[plane * strips.bands_per_image + strip];
    }
  }
}

template <typename A>
void fill_pooling_weights(A* weights, int64_t size, int64_t bins) {
  for (int64_t index = 0; index < size; ++index) weights[index] = A(pooling_weight<double>(index, size, bins));
}

// mean and scale [B,C] of x [B,C,H,W].
template <typename T, typename A>
void compute_scales(const T* x, const T* weight, A* mean, A* scale, const DualPoolAttentionSizes& sizes, int threads) {
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
}

// grad_logit [B,C] of the sums of grad_y · x over each plane, in place: the slope of the sigmoid is scale · (1 - scale).
template <typename A>
void scale_grad_logits(double* grad_logit, const A* scale, int64_t planes) {
  for (int64_t plane = 0; plane < planes; ++plane) {
    grad_logit[plane] *= double(scale[plane]) * (1 - double(scale[plane]));
  }
}

// grad_weight [k] from grad_logit and mean [B,C].
template <typename T, typename A>
void compute_grad_weight(T* grad_weight, const double* grad_logit, const A* mean, const DualPoolAttentionSizes& sizes) {
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

}  // namespace restoration::CPU_ISA

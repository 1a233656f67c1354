// Dual pooling attention on the CPU: formula in dual_pool_attention.h. The template for new <op>_cpu.cpp files.
// A plane is one channel of one image; a strip is some rows of a plane, the work of one thread at a time.
// Forward reads x twice: strips give partial sums, then mean and scale of each plane, then y is written.
// Backward reads grad_y and x, then grad_y again and writes grad_x. Scratch memory: two tables and a number a strip.
// Sums run in vectors over kBlock columns and in float64 above that, so the result does not depend on the thread count.

#include "dual_pool_attention_cpu.h"

namespace restoration::CPU_ISA {
namespace {

template <typename T>
void forward(const DualPoolAttentionForward& arguments, const DualPoolAttentionSizes& sizes, int threads) {
  using A = AccumulateType<T>;
  const T* x = static_cast<const T*>(arguments.x);
  const T* weight = static_cast<const T*>(arguments.weight);
  T* y = static_cast<T*>(arguments.y);
  A* mean = static_cast<A*>(arguments.mean);
  A* scale = static_cast<A*>(arguments.scale);

  compute_scales(x, weight, mean, scale, sizes, threads);

  const Strips strips(sizes);
  const bool streaming = prepare_output(y, sizes.planes() * sizes.pixels());
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

  const bool streaming = prepare_output(grad_x, sizes.planes() * sizes.pixels());
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
  scale_grad_logits(grad_logit.data(), scale, sizes.planes());
  if (arguments.grad_weight != nullptr) {
    compute_grad_weight(static_cast<T*>(arguments.grad_weight), grad_logit.data(),
                        static_cast<const A*>(arguments.mean), sizes);
  }
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

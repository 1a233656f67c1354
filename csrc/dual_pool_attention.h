// Dual pooling attention (Sun 2025, Fig. 3): y[b,c] = x[b,c] · scale[b,c], scale = sigmoid(conv1d over c of mean),
// mean[b,c] = sum over pixels of rows[h] · columns[w] · x[b,c,h,w]: adaptive average pooling to pool_size², then its
// mean. Here: the mathematics that the CPU and the CUDA kernels share, the arguments, and the entry points. This
// operator is the template that new ones copy: <op>.h, <op>_cpu.cpp, <op>_cuda.cu, <op>_bindings.h.
#pragma once

#include <cmath>

#include "common.h"

namespace restoration {

struct DualPoolAttentionSizes {
  int64_t batch;
  int64_t channels;
  int64_t height;
  int64_t width;
  int64_t taps;       // length k of the filter over channels, odd
  int64_t pool_size;  // bins along each side of the image

  int64_t planes() const { return batch * channels; }
  int64_t pixels() const { return height * width; }
};

// x, y [B,C,H,W] and weight [k] are of the call's dtype; mean and scale [B,C], kept for backward, of its
// AccumulateType.
struct DualPoolAttentionForward {
  const void* x;
  const void* weight;
  void* y;
  void* mean;
  void* scale;
};

// grad_x [B,C,H,W] and grad_weight [k] are of the call's dtype; a null one is not wanted and not computed.
struct DualPoolAttentionBackward {
  const void* grad_y;
  const void* x;
  const void* weight;
  const void* mean;
  const void* scale;
  void* grad_x;
  void* grad_weight;
};

// Share of row (or column) `index` of `size` in the mean of `bins` bins. Bin i averages the places from
// floor(i·size/bins) to ceil((i+1)·size/bins) - 1: bins overlap, and a place lies in many where size < bins.
template <typename A>
HOST_DEVICE A pooling_weight(int64_t index, int64_t size, int64_t bins) {
  const int64_t first_bin = index * bins / size;
  const int64_t last_bin = ceil_divide((index + 1) * bins, size) - 1;
  A weight = 0;
  for (int64_t bin = first_bin; bin <= last_bin; ++bin) {
    weight += A(1) / A(ceil_divide((bin + 1) * size, bins) - bin * size / bins);
  }
  return weight / A(bins);
}

// scale of one channel from the means of its image, zero outside.
template <typename A, typename T>
HOST_DEVICE A channel_scale(const A* mean, const T* weight, int64_t taps, int64_t channel, int64_t channels) {
  A logit = 0;
  for (int64_t tap = 0; tap < taps; ++tap) {
    const int64_t neighbor = channel + tap - taps / 2;
    if (neighbor >= 0 && neighbor < channels) logit += static_cast<A>(weight[tap]) * mean[neighbor];
  }
  return A(1) / (A(1) + std::exp(-logit));
}

// Gradient to the mean of one channel: the transpose of the convolution in channel_scale.
template <typename A, typename T>
HOST_DEVICE A channel_grad_mean(const A* grad_logit, const T* weight, int64_t taps, int64_t channel, int64_t channels) {
  A grad_mean = 0;
  for (int64_t tap = 0; tap < taps; ++tap) {
    const int64_t neighbor = channel - tap + taps / 2;
    if (neighbor >= 0 && neighbor < channels) grad_mean += static_cast<A>(weight[tap]) * grad_logit[neighbor];
  }
  return grad_mean;
}

// What one channel adds to the gradient of one tap.
template <typename A, typename M>
HOST_DEVICE A channel_grad_tap(const A* grad_logit, const M* mean, int64_t offset, int64_t channel, int64_t channels) {
  const int64_t neighbor = channel + offset;
  return neighbor >= 0 && neighbor < channels ? grad_logit[channel] * mean[neighbor] : A(0);
}

#define DECLARE_DUAL_POOL_ATTENTION_CPU(isa)                                                                \
  namespace isa {                                                                                           \
  void dual_pool_attention_forward(const DualPoolAttentionForward&, const DualPoolAttentionSizes&, DType,   \
                                   int threads);                                                            \
  void dual_pool_attention_backward(const DualPoolAttentionBackward&, const DualPoolAttentionSizes&, DType, \
                                    int threads);                                                           \
  }
FOR_EACH_CPU_ISA(DECLARE_DUAL_POOL_ATTENTION_CPU)

// Bytes of scratch memory on the device that either launcher needs.
int64_t dual_pool_attention_workspace(const DualPoolAttentionSizes&, DType);
void launch_dual_pool_attention_forward(const DualPoolAttentionForward&, const DualPoolAttentionSizes&, DType,
                                        void* workspace, void* stream);
void launch_dual_pool_attention_backward(const DualPoolAttentionBackward&, const DualPoolAttentionSizes&, DType,
                                         void* workspace, void* stream);

}  // namespace restoration

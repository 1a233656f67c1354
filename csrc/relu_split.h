// What one convolution leaves in pixels x [B,H,W,C], as the two maps in planes that a pixel-adaptive convolution reads:
// rectified = max(x[..., :split], 0) and rest = x[..., split:]. PyTorch takes three passes for it, and three for its
// gradient.
#pragma once

#include "common.h"

namespace restoration {

struct ReluSplitSizes {
  int64_t batch;
  int64_t channels;  // of x
  int64_t split;     // of rectified, 1 to channels - 1
  int64_t height;
  int64_t width;

  int64_t pixels() const { return height * width; }
};

struct ReluSplitForward {
  const void* x;
  void* rectified;
  void* rest;
};

struct ReluSplitBackward {
  const void* grad_rectified;
  const void* grad_rest;
  const void* rectified;
  void* grad_x;
};

// value where decider is above zero, or NaN; else zero. Of numbers, or of each lane of vectors.
template <typename V>
HOST_DEVICE V where_positive(V decider, V value) {
  return decider <= V{} ? V{} : value;
}

// Where the planes of the two maps lie: one of each channel of x, of one image.
template <typename T>
struct SplitPlanes {
  T* rectified;
  T* rest;
  int64_t split;
  int64_t pixels;

  HOST_DEVICE SplitPlanes(T* rectified, T* rest, int64_t image, int64_t channels, int64_t split, int64_t pixels)
      : rectified(rectified + image * split * pixels),
        rest(rest + image * (channels - split) * pixels),
        split(split),
        pixels(pixels) {}

  HOST_DEVICE T* plane(int64_t channel) const {
    return channel < split ? rectified + channel * pixels : rest + (channel - split) * pixels;
  }
};

#define DECLARE_RELU_SPLIT_CPU(isa)                                                             \
  namespace isa {                                                                               \
  void relu_split_forward(const ReluSplitForward&, const ReluSplitSizes&, DType, int threads);   \
  void relu_split_backward(const ReluSplitBackward&, const ReluSplitSizes&, DType, int threads); \
  }
FOR_EACH_CPU_ISA(DECLARE_RELU_SPLIT_CPU)

void launch_relu_split_forward(const ReluSplitForward&, const ReluSplitSizes&, DType, void* stream);
void launch_relu_split_backward(const ReluSplitBackward&, const ReluSplitSizes&, DType, void* stream);

}  // namespace restoration

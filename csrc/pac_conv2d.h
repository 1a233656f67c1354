// Pixel-adaptive convolution (Su 2019, eq. 3): k_t(p) = exp(-1/2 |g(p) - g(p+t)|²), 1 for the centre tap;
//   y[o](p) = residual + alpha · (bias[o] + sum over t and c of k_t(p) · W[o,c,t] · x[c](p+t)),
// x and g zero outside the image. Here: arguments, where a tap lies, the rounding to multiples, the entry points.
#pragma once

#include <cmath>

#include "common.h"

namespace restoration {

// Along one axis of the image.
struct PacConv2dAxis {
  int64_t size;
  int64_t stride;
  int64_t padding;
  int64_t dilation;

  int64_t output(int64_t kernel_size) const {
    return (size + 2 * padding - dilation * (kernel_size - 1) - 1) / stride + 1;
  }
  // Where tap `tap` of output `place` reads; outside the image if below 0 or not below size.
  HOST_DEVICE int64_t position(int64_t place, int64_t tap) const { return place * stride - padding + tap * dilation; }
};

// Nearest multiple of 2^n where quantum = 2^n and inverse = 2^-n, ties to even.
template <typename A>
HOST_DEVICE A round_to_multiple(A value, A quantum, A inverse) {
  // Adding 2^23 (2^52), with the sign of the value, leaves no room for a fraction; larger numbers have none, and may be
  // too large to be scaled.
  constexpr A kNoFraction = sizeof(A) == 4 ? A(int64_t{1} << 23) : A(int64_t{1} << 52);
  const A scaled = value * inverse;
  const A rounder = scaled < 0 ? -kNoFraction : kNoFraction;
  const A rounded = (scaled + rounder) - rounder;
  return std::abs(scaled) < kNoFraction ? rounded * quantum : value;
}

struct PacConv2dSizes {
  int64_t batch;
  int64_t channels;
  int64_t guide_channels;
  int64_t out_channels;
  int64_t kernel_size;
  PacConv2dAxis vertical;
  PacConv2dAxis horizontal;
  bool normalize;  // divide k by its sum over the taps inside the image
  bool shared;     // one filter [1,1,K,K] for every channel; out_channels is then channels

  int64_t taps() const { return kernel_size * kernel_size; }
  int64_t depth() const { return channels * taps(); }
  int64_t pixels() const { return vertical.size * horizontal.size; }
  int64_t out_height() const { return vertical.output(kernel_size); }
  int64_t out_width() const { return horizontal.output(kernel_size); }
  int64_t out_pixels() const { return out_height() * out_width(); }
};

// x [B,C,H,W], guide [B,G,H,W], weight [O,C,K,K] and bias [O] (or null) are of the call's dtype; residual (or null; may
// be y) and y [B,O,H',W'] of that dtype or of float32.
struct PacConv2dForward {
  const void* x;
  const void* guide;
  const void* weight;
  const void* bias;
  const void* residual;
  void* y;
  double alpha;
  double quantum;  // convolution + bias is rounded to multiples of this power of two; 0 rounds nothing
};

// grad_y is of the dtype of y, the gradients of the call's dtype; a null one is not wanted and not computed.
struct PacConv2dBackward {
  const void* grad_y;
  const void* x;
  const void* guide;
  const void* weight;
  void* grad_x;
  void* grad_guide;
  void* grad_weight;
  void* grad_bias;
  double alpha;
};

// Which gradients backward is to make.
struct PacConv2dWanted {
  bool x;
  bool guide;
  bool weight;
  bool bias;
};

// output_dtype is that of y.
#define DECLARE_PAC_CONV2D_CPU(isa)                                                                                  \
  namespace isa {                                                                                                    \
  void pac_conv2d_forward(const PacConv2dForward&, const PacConv2dSizes&, DType, DType output_dtype, int threads);   \
  void pac_conv2d_backward(const PacConv2dBackward&, const PacConv2dSizes&, DType, DType output_dtype, int threads); \
  }
FOR_EACH_CPU_ISA(DECLARE_PAC_CONV2D_CPU)

// With allow_tf32 float32 factors may be rounded to tf32. workspace: as many bytes as the function says.
int64_t pac_conv2d_forward_workspace(const PacConv2dSizes& sizes, bool allow_tf32, DType dtype);
void launch_pac_conv2d_forward(const PacConv2dForward& arguments, const PacConv2dSizes& sizes, bool allow_tf32,
                               DType dtype, DType output_dtype, void* workspace, void* stream);

int64_t pac_conv2d_backward_workspace(const PacConv2dSizes& sizes, const PacConv2dWanted& wanted, DType dtype);
void launch_pac_conv2d_backward(const PacConv2dBackward& arguments, const PacConv2dSizes& sizes, bool allow_tf32,
                                DType dtype, DType output_dtype, void* workspace, void* stream);

}  // namespace restoration

// Dual pooling attention (dual_pool_attention.h) into the map that a convolution reads: y[b,c] = x[b,c] · scale[b,c],
// continued by reflection for `padding` pixels on every side, channels last, in the dtype of the convolution. In PyTorch
// this takes a cast, the attention, a change of layout and a padding, each a pass over the map forward and backward.
// On the CPU alone: on GPUs the operator is composed of the attention's kernel and PyTorch's.
#pragma once

#include "dual_pool_attention.h"

namespace restoration {

struct DualPoolAttentionPad2dSizes {
  DualPoolAttentionSizes map;  // of x
  int64_t padding;             // less than height and width

  int64_t padded_height() const { return map.height + 2 * padding; }
  int64_t padded_width() const { return map.width + 2 * padding; }
};

// x [B,C,H,W] and weight [k] are of the call's dtype, y [B,H+2p,W+2p,C] of its output dtype: the same, or bfloat16 of
// float32. mean and scale as in DualPoolAttentionForward.
struct DualPoolAttentionPad2dForward {
  const void* x;
  const void* weight;
  void* y;
  void* mean;
  void* scale;
};

// grad_y is of the output dtype; a null gradient is not wanted and not computed.
struct DualPoolAttentionPad2dBackward {
  const void* grad_y;
  const void* x;
  const void* weight;
  const void* mean;
  const void* scale;
  void* grad_x;
  void* grad_weight;
};

// The place of a map of `size` that padded place `index` - padding mirrors, without repeating the edge.
HOST_DEVICE int64_t reflected(int64_t index, int64_t size) {
  if (index < 0) return -index;
  return index < size ? index : 2 * (size - 1) - index;
}

#define DECLARE_DUAL_POOL_ATTENTION_PAD2D_CPU(isa)                                                              \
  namespace isa {                                                                                               \
  void dual_pool_attention_pad2d_forward(const DualPoolAttentionPad2dForward&,                                  \
                                         const DualPoolAttentionPad2dSizes&, DType dtype, DType output_dtype,   \
                                         int threads);                                                          \
  void dual_pool_attention_pad2d_backward(const DualPoolAttentionPad2dBackward&,                                \
                                          const DualPoolAttentionPad2dSizes&, DType dtype, DType output_dtype,  \
                                          int threads);                                                         \
  }
FOR_EACH_CPU_ISA(DECLARE_DUAL_POOL_ATTENTION_PAD2D_CPU)

}  // namespace restoration

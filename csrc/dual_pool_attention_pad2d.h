// Dual pooling attention (dual_pool_attention.h) into the map that a convolution reads: y[b,c] = x[b,c] · scale[b,c],
// continued by reflection for `padding` pixels on every side, channels last, in the dtype of the convolution. PyTorch
// takes a cast, the attention, a change of layout and a padding for it, each a pass over the map forward and backward.
// On the CPU alone: on GPUs the operator is composed of the attention's kernel and PyTorch's.
#pragma once

#include "dual_pool_attention.h"

namespace restoration {

struct DualPoolAttentionPad2dSizes {
  DualPoolAttentionSizes map;  // of x
  int64_t padding;             // less than height and width

  int64_t padded_height() const { return map.height + 2 * padding; }
  int64_t padded_width() const { return map.width + 2 * padding; }
  int64_t padded_place(int64_t row, int64_t column) const {
    return (row + padding) * padded_width() + column + padding;
  }
};

// The place of a map of `size` that padded place `index` - padding mirrors, without repeating the edge.
HOST_DEVICE int64_t reflected(int64_t index, int64_t size) {
  if (index < 0) return -index;
  return index < size ? index : 2 * (size - 1) - index;
}

// The attention's own arguments, but y and grad_y are [B,H+2p,W+2p,C] and of the output dtype: the call's, or bfloat16
// where that is float32.
#define DECLARE_DUAL_POOL_ATTENTION_PAD2D_CPU(isa)                                                                   \
  namespace isa {                                                                                                    \
  void dual_pool_attention_pad2d_forward(const DualPoolAttentionForward&, const DualPoolAttentionPad2dSizes&,        \
                                         DType dtype, DType output_dtype, int threads);                              \
  void dual_pool_attention_pad2d_backward(const DualPoolAttentionBackward&, const DualPoolAttentionPad2dSizes&,      \
                                          DType dtype, DType output_dtype, int threads);                             \
  }
FOR_EACH_CPU_ISA(DECLARE_DUAL_POOL_ATTENTION_PAD2D_CPU)

}  // namespace restoration

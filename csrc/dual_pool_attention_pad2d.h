// Dual pooling attention (dual_pool_attention.h) into the map that a convolution reads: y[b,c] = x[b,c] · scale[b,c],
// continued by reflection for `padding` pixels on every side, channels last, in the dtype of the convolution. PyTorch
// takes a cast, the attention, a change of layout and a padding for it, each a pass over the map forward and backward.
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

// Where along one axis a place of a map lies in the padded one: at its own, and at most once in the padding before and
// once in that behind; -1 where it does not. Reflection does not repeat the edge.
template <typename Index>
struct PaddedPlaces {
  Index own;
  Index before;
  Index behind;

  HOST_DEVICE PaddedPlaces(Index place, Index size, Index padding)
      : own(place + padding),
        before(place >= 1 && place <= padding ? padding - place : -1),
        behind(place <= size - 2 && place >= size - 1 - padding ? padding + 2 * (size - 1) - place : -1) {}

  HOST_DEVICE bool has_mirrors() const { return before >= 0 || behind >= 0; }

  // By number, from 0 to 2: own, before, behind.
  HOST_DEVICE Index place(int number) const { return number == 0 ? own : number == 1 ? before : behind; }

  template <typename Call>
  HOST_DEVICE void for_each_mirror(Call call) const {
    if (before >= 0) call(before);
    if (behind >= 0) call(behind);
  }

  template <typename Call>
  HOST_DEVICE void for_each(Call call) const {
    call(own);
    for_each_mirror(call);
  }
};

// The attention's own arguments, but y and grad_y are [B,H+2p,W+2p,C] and of the output dtype: the call's, or half
// precision where that is float32, which on the CPU is bfloat16 alone. What lies at grad_addend [B,C,H,W], unless it is
// null, is added to grad_x.
struct DualPoolAttentionPad2dBackward : DualPoolAttentionBackward {
  const void* grad_addend;
};

#define DECLARE_DUAL_POOL_ATTENTION_PAD2D_CPU(isa)                                                                   \
  namespace isa {                                                                                                    \
  void dual_pool_attention_pad2d_forward(const DualPoolAttentionForward&, const DualPoolAttentionPad2dSizes&,        \
                                         DType dtype, DType output_dtype, int threads);                              \
  void dual_pool_attention_pad2d_backward(const DualPoolAttentionPad2dBackward&, const DualPoolAttentionPad2dSizes&, \
                                          DType dtype, DType output_dtype, int threads);                             \
  }
FOR_EACH_CPU_ISA(DECLARE_DUAL_POOL_ATTENTION_PAD2D_CPU)

// Bytes of scratch memory on the device that either launcher needs.
int64_t dual_pool_attention_pad2d_workspace(const DualPoolAttentionPad2dSizes&, DType);
void launch_dual_pool_attention_pad2d_forward(const DualPoolAttentionForward&, const DualPoolAttentionPad2dSizes&,
                                              DType dtype, DType output_dtype, void* workspace, void* stream);
void launch_dual_pool_attention_pad2d_backward(const DualPoolAttentionPad2dBackward&,
                                               const DualPoolAttentionPad2dSizes&, DType dtype, DType output_dtype,
                                               void* workspace, void* stream);

}  // namespace restoration

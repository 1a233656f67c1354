// What Python calls of dual_pool_attention_pad2d.
#pragma once

#include "bindings.h"
#include "cpu_isa.h"
#include "dual_pool_attention_pad2d.h"

namespace restoration {
namespace {

void bind_dual_pool_attention_pad2d(py::module_& module) {
  module.def(
      "dual_pool_attention_pad2d_forward_cpu",
      [](Address x, Address weight, Address y, Address mean, Address scale, int64_t batch, int64_t channels,
         int64_t height, int64_t width, int64_t taps, int64_t pool_size, int64_t padding, int64_t output_dtype,
         int64_t dtype, int64_t threads) {
        CPU_KERNEL(dual_pool_attention_pad2d_forward)
        ({pointer(x), pointer(weight), pointer(y), pointer(mean), pointer(scale)},
         {{batch, channels, height, width, taps, pool_size}, padding}, static_cast<DType>(dtype),
         static_cast<DType>(output_dtype), usable_threads(threads));
      },
      py::kw_only(), "x"_a, "weight"_a, "y"_a, "mean"_a, "scale"_a, "batch"_a, "channels"_a, "height"_a, "width"_a,
      "taps"_a, "pool_size"_a, "padding"_a, "output_dtype"_a, "dtype"_a, "threads"_a, Unlocked());
  module.def(
      "dual_pool_attention_pad2d_backward_cpu",
      [](Address grad_y, Address x, Address weight, Address mean, Address scale, Address grad_addend, Address grad_x,
         Address grad_weight, int64_t batch, int64_t channels, int64_t height, int64_t width, int64_t taps,
         int64_t pool_size, int64_t padding, int64_t output_dtype, int64_t dtype, int64_t threads) {
        CPU_KERNEL(dual_pool_attention_pad2d_backward)
        ({{pointer(grad_y), pointer(x), pointer(weight), pointer(mean), pointer(scale), pointer(grad_x),
           pointer(grad_weight)},
          pointer(grad_addend)},
         {{batch, channels, height, width, taps, pool_size}, padding}, static_cast<DType>(dtype),
         static_cast<DType>(output_dtype), usable_threads(threads));
      },
      py::kw_only(), "grad_y"_a, "x"_a, "weight"_a, "mean"_a, "scale"_a, "grad_addend"_a, "grad_x"_a, "grad_weight"_a,
      "batch"_a, "channels"_a, "height"_a, "width"_a, "taps"_a, "pool_size"_a, "padding"_a, "output_dtype"_a, "dtype"_a,
      "threads"_a, Unlocked());
#if defined(RESTORATION_CUDA)
  module.def(
      "dual_pool_attention_pad2d_workspace_cuda",
      [](int64_t batch, int64_t channels, int64_t height, int64_t width, int64_t dtype) {
        return dual_pool_attention_pad2d_workspace({{batch, channels, height, width, 1, 1}, 0},
                                                   static_cast<DType>(dtype));
      },
      "Bytes of scratch memory on the device that forward and backward need.", py::kw_only(), "batch"_a, "channels"_a,
      "height"_a, "width"_a, "dtype"_a);
  module.def(
      "dual_pool_attention_pad2d_forward_cuda",
      [](Address x, Address weight, Address y, Address mean, Address scale, Address workspace, int64_t batch,
         int64_t channels, int64_t height, int64_t width, int64_t taps, int64_t pool_size, int64_t padding,
         int64_t output_dtype, int64_t dtype, Address stream) {
        launch_dual_pool_attention_pad2d_forward(
            {pointer(x), pointer(weight), pointer(y), pointer(mean), pointer(scale)},
            {{batch, channels, height, width, taps, pool_size}, padding}, static_cast<DType>(dtype),
            static_cast<DType>(output_dtype), pointer(workspace), pointer(stream));
      },
      py::kw_only(), "x"_a, "weight"_a, "y"_a, "mean"_a, "scale"_a, "workspace"_a, "batch"_a, "channels"_a, "height"_a,
      "width"_a, "taps"_a, "pool_size"_a, "padding"_a, "output_dtype"_a, "dtype"_a, "stream"_a, Unlocked());
  module.def(
      "dual_pool_attention_pad2d_backward_cuda",
      [](Address grad_y, Address x, Address weight, Address mean, Address scale, Address grad_addend, Address grad_x,
         Address grad_weight, Address workspace, int64_t batch, int64_t channels, int64_t height, int64_t width,
         int64_t taps, int64_t pool_size, int64_t padding, int64_t output_dtype, int64_t dtype, Address stream) {
        launch_dual_pool_attention_pad2d_backward({{pointer(grad_y), pointer(x), pointer(weight), pointer(mean),
                                                    pointer(scale), pointer(grad_x), pointer(grad_weight)},
                                                   pointer(grad_addend)},
                                                  {{batch, channels, height, width, taps, pool_size}, padding},
                                                  static_cast<DType>(dtype), static_cast<DType>(output_dtype),
                                                  pointer(workspace), pointer(stream));
      },
      py::kw_only(), "grad_y"_a, "x"_a, "weight"_a, "mean"_a, "scale"_a, "grad_addend"_a, "grad_x"_a, "grad_weight"_a,
      "workspace"_a, "batch"_a, "channels"_a, "height"_a, "width"_a, "taps"_a, "pool_size"_a, "padding"_a,
      "output_dtype"_a, "dtype"_a, "stream"_a, Unlocked());
#endif
}

}  // namespace
}  // namespace restoration

// What Python calls of pac_conv2d.
#pragma once

#include <array>

#include "bindings.h"
#include "cpu_isa.h"
#include "pac_conv2d.h"

namespace restoration {
namespace {

using Pair = std::array<int64_t, 2>;

PacConv2dSizes pac_conv2d_sizes(int64_t batch, int64_t channels, int64_t guide_channels, int64_t out_channels,
                                int64_t height, int64_t width, int64_t kernel_size, Pair stride, Pair padding,
                                Pair dilation, bool normalize, bool shared) {
  return {batch,
          channels,
          guide_channels,
          out_channels,
          kernel_size,
          {height, stride[0], padding[0], dilation[0]},
          {width, stride[1], padding[1], dilation[1]},
          normalize,
          shared};
}

void bind_pac_conv2d(py::module_& module) {
  module.def(
      "pac_conv2d_forward_cpu",
      [](Address x, Address guide, Address weight, Address bias, Address residual, Address y, int64_t batch,
         int64_t channels, int64_t guide_channels, int64_t out_channels, int64_t height, int64_t width,
         int64_t kernel_size, Pair stride, Pair padding, Pair dilation, bool normalize, bool shared, double alpha,
         double quantum, int64_t dtype, int64_t output_dtype, int64_t threads) {
        CPU_KERNEL(pac_conv2d_forward)
        ({pointer(x), pointer(guide), pointer(weight), pointer(bias), pointer(residual), pointer(y), alpha, quantum},
         pac_conv2d_sizes(batch, channels, guide_channels, out_channels, height, width, kernel_size, stride, padding,
                          dilation, normalize, shared),
         static_cast<DType>(dtype), static_cast<DType>(output_dtype), usable_threads(threads));
      },
      py::kw_only(), "x"_a, "guide"_a, "weight"_a, "bias"_a, "residual"_a, "y"_a, "batch"_a, "channels"_a,
      "guide_channels"_a, "out_channels"_a, "height"_a, "width"_a, "kernel_size"_a, "stride"_a, "padding"_a,
      "dilation"_a, "normalize"_a, "shared"_a, "alpha"_a, "quantum"_a, "dtype"_a, "output_dtype"_a, "threads"_a,
      Unlocked());
#if defined(RESTORATION_CUDA)
  module.def(
      "pac_conv2d_forward_workspace_cuda",
      [](int64_t batch, int64_t channels, int64_t guide_channels, int64_t out_channels, int64_t height, int64_t width,
         int64_t kernel_size, Pair stride, Pair padding, Pair dilation, bool normalize, bool shared, bool allow_tf32,
         int64_t dtype) {
        return pac_conv2d_forward_workspace(
            pac_conv2d_sizes(batch, channels, guide_channels, out_channels, height, width, kernel_size, stride, padding,
                             dilation, normalize, shared),
            allow_tf32, static_cast<DType>(dtype));
      },
      "Bytes of scratch memory on the device that the kernel needs.", py::kw_only(), "batch"_a, "channels"_a,
      "guide_channels"_a, "out_channels"_a, "height"_a, "width"_a, "kernel_size"_a, "stride"_a, "padding"_a,
      "dilation"_a, "normalize"_a, "shared"_a, "allow_tf32"_a, "dtype"_a);
  module.def(
      "pac_conv2d_forward_cuda",
      [](Address x, Address guide, Address weight, Address bias, Address residual, Address y, Address workspace,
         int64_t batch, int64_t channels, int64_t guide_channels, int64_t out_channels, int64_t height, int64_t width,
         int64_t kernel_size, Pair stride, Pair padding, Pair dilation, bool normalize, bool shared, bool allow_tf32,
         double alpha, double quantum, int64_t dtype, int64_t output_dtype, Address stream) {
        launch_pac_conv2d_forward(
            {pointer(x), pointer(guide), pointer(weight), pointer(bias), pointer(residual), pointer(y), alpha, quantum},
            pac_conv2d_sizes(batch, channels, guide_channels, out_channels, height, width, kernel_size, stride, padding,
                             dilation, normalize, shared),
            allow_tf32, static_cast<DType>(dtype), static_cast<DType>(output_dtype), pointer(workspace),
            pointer(stream));
      },
      py::kw_only(), "x"_a, "guide"_a, "weight"_a, "bias"_a, "residual"_a, "y"_a, "workspace"_a, "batch"_a,
      "channels"_a, "guide_channels"_a, "out_channels"_a, "height"_a, "width"_a, "kernel_size"_a, "stride"_a,
      "padding"_a, "dilation"_a, "normalize"_a, "shared"_a, "allow_tf32"_a, "alpha"_a, "quantum"_a, "dtype"_a,
      "output_dtype"_a, "stream"_a, Unlocked());
#endif
  module.def(
      "pac_conv2d_backward_cpu",
      [](Address grad_y, Address x, Address guide, Address weight, Address grad_x, Address grad_guide,
         Address grad_weight, Address grad_bias, int64_t batch, int64_t channels, int64_t guide_channels,
         int64_t out_channels, int64_t height, int64_t width, int64_t kernel_size, Pair stride, Pair padding,
         Pair dilation, bool normalize, bool shared, double alpha, int64_t dtype, int64_t output_dtype,
         int64_t threads) {
        CPU_KERNEL(pac_conv2d_backward)
        ({pointer(grad_y), pointer(x), pointer(guide), pointer(weight), pointer(grad_x), pointer(grad_guide),
          pointer(grad_weight), pointer(grad_bias), alpha},
         pac_conv2d_sizes(batch, channels, guide_channels, out_channels, height, width, kernel_size, stride, padding,
                          dilation, normalize, shared),
         static_cast<DType>(dtype), static_cast<DType>(output_dtype), usable_threads(threads));
      },
      py::kw_only(), "grad_y"_a, "x"_a, "guide"_a, "weight"_a, "grad_x"_a, "grad_guide"_a, "grad_weight"_a,
      "grad_bias"_a, "batch"_a, "channels"_a, "guide_channels"_a, "out_channels"_a, "height"_a, "width"_a,
      "kernel_size"_a, "stride"_a, "padding"_a, "dilation"_a, "normalize"_a, "shared"_a, "alpha"_a, "dtype"_a,
      "output_dtype"_a, "threads"_a, Unlocked());
#if defined(RESTORATION_CUDA)
  module.def(
      "pac_conv2d_backward_workspace_cuda",
      [](int64_t batch, int64_t channels, int64_t guide_channels, int64_t out_channels, int64_t height, int64_t width,
         int64_t kernel_size, Pair stride, Pair padding, Pair dilation, bool normalize, bool shared,
         std::array<bool, 4> wanted, int64_t dtype) {
        return pac_conv2d_backward_workspace(
            pac_conv2d_sizes(batch, channels, guide_channels, out_channels, height, width, kernel_size, stride, padding,
                             dilation, normalize, shared),
            {wanted[0], wanted[1], wanted[2], wanted[3]}, static_cast<DType>(dtype));
      },
      "Bytes of scratch memory on the device that the gradients to x, guide, weight and bias that are wanted need.",
      py::kw_only(), "batch"_a, "channels"_a, "guide_channels"_a, "out_channels"_a, "height"_a, "width"_a,
      "kernel_size"_a, "stride"_a, "padding"_a, "dilation"_a, "normalize"_a, "shared"_a, "wanted"_a, "dtype"_a);
  module.def(
      "pac_conv2d_backward_cuda",
      [](Address grad_y, Address x, Address guide, Address weight, Address grad_x, Address grad_guide,
         Address grad_weight, Address grad_bias, Address workspace, int64_t batch, int64_t channels,
         int64_t guide_channels, int64_t out_channels, int64_t height, int64_t width, int64_t kernel_size, Pair stride,
         Pair padding, Pair dilation, bool normalize, bool shared, bool allow_tf32, double alpha, int64_t dtype,
         int64_t output_dtype, Address stream) {
        launch_pac_conv2d_backward({pointer(grad_y), pointer(x), pointer(guide), pointer(weight), pointer(grad_x),
                                    pointer(grad_guide), pointer(grad_weight), pointer(grad_bias), alpha},
                                   pac_conv2d_sizes(batch, channels, guide_channels, out_channels, height, width,
                                                    kernel_size, stride, padding, dilation, normalize, shared),
                                   allow_tf32, static_cast<DType>(dtype), static_cast<DType>(output_dtype),
                                   pointer(workspace), pointer(stream));
      },
      py::kw_only(), "grad_y"_a, "x"_a, "guide"_a, "weight"_a, "grad_x"_a, "grad_guide"_a, "grad_weight"_a,
      "grad_bias"_a, "workspace"_a, "batch"_a, "channels"_a, "guide_channels"_a, "out_channels"_a, "height"_a,
      "width"_a, "kernel_size"_a, "stride"_a, "padding"_a, "dilation"_a, "normalize"_a, "shared"_a,
      "allow_tf32"_a, "alpha"_a, "dtype"_a, "output_dtype"_a, "stream"_a, Unlocked());
#endif
}

}  // namespace
}  // namespace restoration

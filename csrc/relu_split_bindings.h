// What Python calls of relu_split.
#pragma once

#include "bindings.h"
#include "cpu_isa.h"
#include "relu_split.h"

namespace restoration {
namespace {

void bind_relu_split(py::module_& module) {
  module.def(
      "relu_split_forward_cpu",
      [](Address x, Address rectified, Address rest, int64_t batch, int64_t channels, int64_t split, int64_t height,
         int64_t width, int64_t dtype, int64_t threads) {
        CPU_KERNEL(relu_split_forward)
        ({pointer(x), pointer(rectified), pointer(rest)}, {batch, channels, split, height, width},
         static_cast<DType>(dtype), usable_threads(threads));
      },
      py::kw_only(), "x"_a, "rectified"_a, "rest"_a, "batch"_a, "channels"_a, "split"_a, "height"_a, "width"_a,
      "dtype"_a, "threads"_a, Unlocked());
  module.def(
      "relu_split_backward_cpu",
      [](Address grad_rectified, Address grad_rest, Address rectified, Address grad_x, int64_t batch, int64_t channels,
         int64_t split, int64_t height, int64_t width, int64_t dtype, int64_t threads) {
        CPU_KERNEL(relu_split_backward)
        ({pointer(grad_rectified), pointer(grad_rest), pointer(rectified), pointer(grad_x)},
         {batch, channels, split, height, width}, static_cast<DType>(dtype), usable_threads(threads));
      },
      py::kw_only(), "grad_rectified"_a, "grad_rest"_a, "rectified"_a, "grad_x"_a, "batch"_a, "channels"_a, "split"_a,
      "height"_a, "width"_a, "dtype"_a, "threads"_a, Unlocked());
#if defined(RESTORATION_CUDA)
  module.def(
      "relu_split_forward_cuda",
      [](Address x, Address rectified, Address rest, int64_t batch, int64_t channels, int64_t split, int64_t height,
         int64_t width, int64_t dtype, Address stream) {
        launch_relu_split_forward({pointer(x), pointer(rectified), pointer(rest)},
                                  {batch, channels, split, height, width}, static_cast<DType>(dtype), pointer(stream));
      },
      py::kw_only(), "x"_a, "rectified"_a, "rest"_a, "batch"_a, "channels"_a, "split"_a, "height"_a, "width"_a,
      "dtype"_a, "stream"_a, Unlocked());
  module.def(
      "relu_split_backward_cuda",
      [](Address grad_rectified, Address grad_rest, Address rectified, Address grad_x, int64_t batch, int64_t channels,
         int64_t split, int64_t height, int64_t width, int64_t dtype, Address stream) {
        launch_relu_split_backward({pointer(grad_rectified), pointer(grad_rest), pointer(rectified), pointer(grad_x)},
                                   {batch, channels, split, height, width}, static_cast<DType>(dtype),
                                   pointer(stream));
      },
      py::kw_only(), "grad_rectified"_a, "grad_rest"_a, "rectified"_a, "grad_x"_a, "batch"_a, "channels"_a, "split"_a,
      "height"_a, "width"_a, "dtype"_a, "stream"_a, Unlocked());
#endif
}

}  // namespace
}  // namespace restoration

// What Python calls of the Matting Laplacian.
#pragma once

#include "bindings.h"
#include "cpu_isa.h"
#include "matting_laplacian.h"

namespace restoration {
namespace {

void bind_matting_laplacian(py::module_& module) {
  module.def(
      "matting_laplacian_cpu",
      [](Address image, Address guide, Address product, Address energy, double factor, double eps, int64_t batch,
         int64_t channels, int64_t height, int64_t width, int64_t radius, int64_t dtype, int64_t threads) {
        CPU_KERNEL(matting_laplacian)
        ({pointer(image), pointer(guide), pointer(product), pointer(energy), factor, eps},
         {batch, channels, height, width, radius}, static_cast<DType>(dtype), usable_threads(threads));
      },
      py::kw_only(), "image"_a, "guide"_a, "product"_a, "energy"_a, "factor"_a, "eps"_a, "batch"_a, "channels"_a,
      "height"_a, "width"_a, "radius"_a, "dtype"_a, "threads"_a, Unlocked());
#if defined(RESTORATION_CUDA)
  module.def(
      "matting_laplacian_workspace_cuda",
      [](int64_t batch, int64_t channels, int64_t height, int64_t width, int64_t radius, int64_t dtype) {
        return matting_laplacian_workspace({batch, channels, height, width, radius}, static_cast<DType>(dtype));
      },
      "Bytes of scratch memory on the device that the kernel needs.", py::kw_only(), "batch"_a, "channels"_a,
      "height"_a, "width"_a, "radius"_a, "dtype"_a);
  module.def(
      "matting_laplacian_cuda",
      [](Address image, Address guide, Address product, Address energy, Address workspace, double factor, double eps,
         int64_t batch, int64_t channels, int64_t height, int64_t width, int64_t radius, int64_t dtype,
         Address stream) {
        launch_matting_laplacian({pointer(image), pointer(guide), pointer(product), pointer(energy), factor, eps},
                                 {batch, channels, height, width, radius}, static_cast<DType>(dtype),
                                 pointer(workspace), pointer(stream));
      },
      py::kw_only(), "image"_a, "guide"_a, "product"_a, "energy"_a, "workspace"_a, "factor"_a, "eps"_a, "batch"_a,
      "channels"_a, "height"_a, "width"_a, "radius"_a, "dtype"_a, "stream"_a, Unlocked());
#endif
}

}  // namespace
}  // namespace restoration

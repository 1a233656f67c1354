// The border between Python and the kernels: addresses, int64 sizes, a dtype code, and a thread count or a stream.
// Everything is keyword-only, so that no two pointers can be swapped. Python has checked the tensors; an address of 0
// stands for an output that is not wanted. The interpreter lock is released while a kernel runs.

#include <pthread.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <stdexcept>
#include <string>

#include "ccpl.h"
#include "cpu_isa.h"
#include "dual_pool_attention.h"
#include "dual_pool_attention_pad2d.h"
#include "matting_laplacian.h"
#include "pac_conv2d.h"
#include "relu_split.h"

namespace py = pybind11;
using namespace py::literals;

namespace restoration {

void refuse_dtype(const char* operator_name, DType dtype) {
  throw std::invalid_argument(std::string(operator_name) +
                              ": dtype must be one that this kernel was compiled for, got code " +
                              std::to_string(static_cast<int64_t>(dtype)));
}

void refuse_place(int64_t place, const NeighborDifferenceSizes& sizes) {
  throw std::invalid_argument("neighbor_difference: places must lie in 0 to " + std::to_string(sizes.places - 1) +
                              ", got " + std::to_string(place));
}

#if defined(RESTORATION_CUDA)
const char* cuda_unavailable_reason(int64_t device);
#endif

namespace {

using Address = std::uintptr_t;
using Unlocked = py::call_guard<py::gil_scoped_release>;

void* pointer(Address address) { return reinterpret_cast<void*>(address); }
const int64_t* integers(Address address) { return reinterpret_cast<const int64_t*>(address); }

// A fork copies only the calling thread: OpenMP's pool in the child is a list of threads that do not exist, and a
// parallel region would wait for them for ever (torch's own operators do). So a forked child computes in one thread.
bool forked = false;

int usable_threads(int64_t threads) { return forked ? 1 : static_cast<int>(threads); }

void bind_dual_pool_attention(py::module_& module) {
  module.def(
      "dual_pool_attention_forward_cpu",
      [](Address x, Address weight, Address y, Address mean, Address scale, int64_t batch, int64_t channels,
         int64_t height, int64_t width, int64_t taps, int64_t pool_size, int64_t dtype, int64_t threads) {
        CPU_KERNEL(dual_pool_attention_forward)
        ({pointer(x), pointer(weight), pointer(y), pointer(mean), pointer(scale)},
         {batch, channels, height, width, taps, pool_size}, static_cast<DType>(dtype), usable_threads(threads));
      },
      py::kw_only(), "x"_a, "weight"_a, "y"_a, "mean"_a, "scale"_a, "batch"_a, "channels"_a, "height"_a, "width"_a,
      "taps"_a, "pool_size"_a, "dtype"_a, "threads"_a, Unlocked());
  module.def(
      "dual_pool_attention_backward_cpu",
      [](Address grad_y, Address x, Address weight, Address mean, Address scale, Address grad_x, Address grad_weight,
         int64_t batch, int64_t channels, int64_t height, int64_t width, int64_t taps, int64_t pool_size, int64_t dtype,
         int64_t threads) {
        CPU_KERNEL(dual_pool_attention_backward)
        ({pointer(grad_y), pointer(x), pointer(weight), pointer(mean), pointer(scale), pointer(grad_x),
          pointer(grad_weight)},
         {batch, channels, height, width, taps, pool_size}, static_cast<DType>(dtype), usable_threads(threads));
      },
      py::kw_only(), "grad_y"_a, "x"_a, "weight"_a, "mean"_a, "scale"_a, "grad_x"_a, "grad_weight"_a, "batch"_a,
      "channels"_a, "height"_a, "width"_a, "taps"_a, "pool_size"_a, "dtype"_a, "threads"_a, Unlocked());
#if defined(RESTORATION_CUDA)
  module.def(
      "dual_pool_attention_workspace_cuda",
      [](int64_t batch, int64_t channels, int64_t height, int64_t width, int64_t dtype) {
        return dual_pool_attention_workspace({batch, channels, height, width, 1, 1}, static_cast<DType>(dtype));
      },
      "Bytes of scratch memory on the device that forward and backward need.", py::kw_only(), "batch"_a, "channels"_a,
      "height"_a, "width"_a, "dtype"_a);
  module.def(
      "dual_pool_attention_forward_cuda",
      [](Address x, Address weight, Address y, Address mean, Address scale, Address workspace, int64_t batch,
         int64_t channels, int64_t height, int64_t width, int64_t taps, int64_t pool_size, int64_t dtype,
         Address stream) {
        launch_dual_pool_attention_forward({pointer(x), pointer(weight), pointer(y), pointer(mean), pointer(scale)},
                                           {batch, channels, height, width, taps, pool_size}, static_cast<DType>(dtype),
                                           pointer(workspace), pointer(stream));
      },
      py::kw_only(), "x"_a, "weight"_a, "y"_a, "mean"_a, "scale"_a, "workspace"_a, "batch"_a, "channels"_a, "height"_a,
      "width"_a, "taps"_a, "pool_size"_a, "dtype"_a, "stream"_a, Unlocked());
  module.def(
      "dual_pool_attention_backward_cuda",
      [](Address grad_y, Address x, Address weight, Address mean, Address scale, Address grad_x, Address grad_weight,
         Address workspace, int64_t batch, int64_t channels, int64_t height, int64_t width, int64_t taps,
         int64_t pool_size, int64_t dtype, Address stream) {
        launch_dual_pool_attention_backward({pointer(grad_y), pointer(x), pointer(weight), pointer(mean),
                                             pointer(scale), pointer(grad_x), pointer(grad_weight)},
                                            {batch, channels, height, width, taps, pool_size},
                                            static_cast<DType>(dtype), pointer(workspace), pointer(stream));
      },
      py::kw_only(), "grad_y"_a, "x"_a, "weight"_a, "mean"_a, "scale"_a, "grad_x"_a, "grad_weight"_a, "workspace"_a,
      "batch"_a, "channels"_a, "height"_a, "width"_a, "taps"_a, "pool_size"_a, "dtype"_a, "stream"_a, Unlocked());
#endif
}

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

void bind_neighbor_difference(py::module_& module) {
  module.def(
      "neighbor_difference_forward_cpu",
      [](Address x, Address places, Address y, int64_t batch, int64_t channels, int64_t map_places, int64_t anchors,
         int64_t channel_stride, int64_t place_stride, int64_t dtype, int64_t threads) {
        CPU_KERNEL(neighbor_difference_forward)
        ({pointer(x), integers(places), pointer(y)},
         {batch, channels, map_places, anchors, channel_stride, place_stride}, static_cast<DType>(dtype),
         usable_threads(threads));
      },
      py::kw_only(), "x"_a, "places"_a, "y"_a, "batch"_a, "channels"_a, "map_places"_a, "anchors"_a,
      "channel_stride"_a, "place_stride"_a, "dtype"_a, "threads"_a, Unlocked());
  module.def(
      "neighbor_difference_backward_cpu",
      [](Address grad_y, Address places, Address order, Address grad_x, int64_t batch, int64_t channels,
         int64_t map_places, int64_t anchors, int64_t channel_stride, int64_t place_stride, int64_t dtype,
         int64_t threads) {
        CPU_KERNEL(neighbor_difference_backward)
        ({pointer(grad_y), integers(places), integers(order), pointer(grad_x)},
         {batch, channels, map_places, anchors, channel_stride, place_stride}, static_cast<DType>(dtype),
         usable_threads(threads));
      },
      py::kw_only(), "grad_y"_a, "places"_a, "order"_a, "grad_x"_a, "batch"_a, "channels"_a, "map_places"_a,
      "anchors"_a, "channel_stride"_a, "place_stride"_a, "dtype"_a, "threads"_a, Unlocked());
#if defined(RESTORATION_CUDA)
  module.def(
      "neighbor_difference_forward_cuda",
      [](Address x, Address places, Address y, int64_t batch, int64_t channels, int64_t map_places, int64_t anchors,
         int64_t channel_stride, int64_t place_stride, int64_t dtype, Address stream) {
        launch_neighbor_difference_forward({pointer(x), integers(places), pointer(y)},
                                           {batch, channels, map_places, anchors, channel_stride, place_stride},
                                           static_cast<DType>(dtype), pointer(stream));
      },
      py::kw_only(), "x"_a, "places"_a, "y"_a, "batch"_a, "channels"_a, "map_places"_a, "anchors"_a,
      "channel_stride"_a, "place_stride"_a, "dtype"_a, "stream"_a, Unlocked());
  module.def(
      "neighbor_difference_backward_cuda",
      [](Address grad_y, Address places, Address order, Address grad_x, int64_t batch, int64_t channels,
         int64_t map_places, int64_t anchors, int64_t channel_stride, int64_t place_stride, int64_t dtype,
         Address stream) {
        launch_neighbor_difference_backward({pointer(grad_y), integers(places), integers(order), pointer(grad_x)},
                                            {batch, channels, map_places, anchors, channel_stride, place_stride},
                                            static_cast<DType>(dtype), pointer(stream));
      },
      "Adds to grad_x, which is zero; atomically where order is 0.", py::kw_only(), "grad_y"_a, "places"_a, "order"_a,
      "grad_x"_a, "batch"_a, "channels"_a, "map_places"_a, "anchors"_a, "channel_stride"_a, "place_stride"_a,
      "dtype"_a, "stream"_a, Unlocked());
#endif
}

void bind_info_nce(py::module_& module) {
  module.def(
      "info_nce_forward_cpu",
      [](Address query, Address key, Address loss, Address log_sum, int64_t batch, int64_t rows, int64_t width,
         double temperature, int64_t dtype, int64_t threads) {
        CPU_KERNEL(info_nce_forward)
        ({pointer(query), pointer(key), pointer(loss), pointer(log_sum)}, {batch, rows, width}, temperature,
         static_cast<DType>(dtype), usable_threads(threads));
      },
      py::kw_only(), "query"_a, "key"_a, "loss"_a, "log_sum"_a, "batch"_a, "rows"_a, "width"_a, "temperature"_a,
      "dtype"_a, "threads"_a, Unlocked());
  module.def(
      "info_nce_backward_cpu",
      [](Address grad_loss, Address query, Address key, Address log_sum, Address grad_query, int64_t batch,
         int64_t rows, int64_t width, double temperature, int64_t dtype, int64_t threads) {
        CPU_KERNEL(info_nce_backward)
        ({pointer(grad_loss), pointer(query), pointer(key), pointer(log_sum), pointer(grad_query)},
         {batch, rows, width}, temperature, static_cast<DType>(dtype), usable_threads(threads));
      },
      py::kw_only(), "grad_loss"_a, "query"_a, "key"_a, "log_sum"_a, "grad_query"_a, "batch"_a, "rows"_a, "width"_a,
      "temperature"_a, "dtype"_a, "threads"_a, Unlocked());
#if defined(RESTORATION_CUDA)
  module.def(
      "info_nce_forward_cuda",
      [](Address query, Address key, Address loss, Address log_sum, int64_t batch, int64_t rows, int64_t width,
         double temperature, int64_t dtype, Address stream) {
        launch_info_nce_forward({pointer(query), pointer(key), pointer(loss), pointer(log_sum)}, {batch, rows, width},
                                temperature, static_cast<DType>(dtype), pointer(stream));
      },
      py::kw_only(), "query"_a, "key"_a, "loss"_a, "log_sum"_a, "batch"_a, "rows"_a, "width"_a, "temperature"_a,
      "dtype"_a, "stream"_a, Unlocked());
  module.def(
      "info_nce_backward_cuda",
      [](Address grad_loss, Address query, Address key, Address log_sum, Address grad_query, int64_t batch,
         int64_t rows, int64_t width, double temperature, int64_t dtype, Address stream) {
        launch_info_nce_backward(
            {pointer(grad_loss), pointer(query), pointer(key), pointer(log_sum), pointer(grad_query)},
            {batch, rows, width}, temperature, static_cast<DType>(dtype), pointer(stream));
      },
      py::kw_only(), "grad_loss"_a, "query"_a, "key"_a, "log_sum"_a, "grad_query"_a, "batch"_a, "rows"_a, "width"_a,
      "temperature"_a, "dtype"_a, "stream"_a, Unlocked());
#endif
}

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

py::dict build_info() {
  py::dict info;
  info["version"] = RESTORATION_VERSION;
#if defined(__clang__)
  info["compiler"] = "clang " __clang_version__;
#else
  info["compiler"] = "gcc " __VERSION__;
#endif
#if defined(RESTORATION_CUDA)
  info["cuda"] = RESTORATION_CUDA_VERSION;
  info["cuda_architectures"] = py::str(RESTORATION_CUDA_ARCHITECTURES).attr("split")(",");
#else
  info["cuda"] = py::none();
  info["cuda_architectures"] = py::list();
#endif
#if defined(_OPENMP)
  info["openmp"] = _OPENMP;  // year and month of the standard
#else
  info["openmp"] = py::none();
#endif
  info["cpu_isa"] = kCpuIsaNames[cpu_isa];
  return info;
}

}  // namespace

PYBIND11_MODULE(RESTORATION_MODULE, module) {
  try {
    cpu_isa = choose_cpu_isa();
  } catch (const std::invalid_argument& error) {
    throw py::import_error(error.what());
  }
  pthread_atfork(nullptr, nullptr, [] { forked = true; });
  module.doc() = "Compiled kernels of restoration_kernels. Call the functions of the package instead.";
  module.attr("DTYPES") = py::dict(
      "float32"_a = static_cast<int64_t>(DType::float32), "float64"_a = static_cast<int64_t>(DType::float64),
      "float16"_a = static_cast<int64_t>(DType::float16), "bfloat16"_a = static_cast<int64_t>(DType::bfloat16));
  module.def("build_info", &build_info, "What the module was built with, and the CPU instruction set in use.");
#if defined(RESTORATION_CUDA)
  module.def("cuda_unavailable_reason", &cuda_unavailable_reason, py::kw_only(), "device"_a,
             "None if the kernels run on this CUDA device, else why they do not.");
#endif
  bind_dual_pool_attention(module);
  bind_dual_pool_attention_pad2d(module);
  bind_neighbor_difference(module);
  bind_info_nce(module);
  bind_matting_laplacian(module);
  bind_pac_conv2d(module);
  bind_relu_split(module);
}

}  // namespace restoration

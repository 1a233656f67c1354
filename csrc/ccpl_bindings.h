// What Python calls of neighbor_difference and info_nce.
#pragma once

#include <stdexcept>
#include <string>

#include "bindings.h"
#include "ccpl.h"
#include "cpu_isa.h"

namespace restoration {

void refuse_place(int64_t place, const NeighborDifferenceSizes& sizes) {
  throw std::invalid_argument("neighbor_difference: places must lie in 0 to " + std::to_string(sizes.places - 1) +
                              ", got " + std::to_string(place));
}

namespace {

const int64_t* integers(Address address) { return reinterpret_cast<const int64_t*>(address); }

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

}  // namespace
}  // namespace restoration

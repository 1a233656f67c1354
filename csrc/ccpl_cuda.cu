// Neighbour differences in CUDA: formula in ccpl.h. The other half of the loss is in ccpl_info_nce_cuda.cu.
// Forward: a thread owns one channel of one anchor, reads nine places and writes eight rows. Backward: a thread owns
// one channel of one entry, an anchor or a neighbour, and adds its gradient to a map of zeros: atomically, or, where
// the entries come sorted by place, as the one thread that owns the place and adds up all of its entries in order.
// Read: nine places an anchor; the gradient of the differences twice. Written: eight rows; nine places. Saved: nothing.

#include <stdexcept>
#include <type_traits>

#include "ccpl.h"
#include "common.cuh"

namespace restoration {
namespace {

// A thread does little but wait for scattered memory: many small blocks spread over all multiprocessors.
constexpr int kThreads = 128;

template <typename T, typename A = AccumulateType<T>>
__global__ void __launch_bounds__(kThreads)
    neighbor_difference_forward_kernel(const T* __restrict__ x, const int64_t* __restrict__ places, T* __restrict__ y,
                                       NeighborDifferenceSizes sizes) {
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (index >= sizes.batch * sizes.anchors * sizes.channels) return;
  const int64_t channel = index % sizes.channels;
  const int64_t anchor = index / sizes.channels % sizes.anchors;
  const int64_t image = index / sizes.channels / sizes.anchors;
  const T* plane = x + image * sizes.channels * sizes.places + channel * sizes.channel_stride;
  int64_t own_places[kSlots];
  bool held = true;
#pragma unroll
  for (int slot = 0; slot < kSlots; ++slot) {
    own_places[slot] = places[anchor * kSlots + slot];
    held &= sizes.holds(own_places[slot]);
  }
  if (!held) __trap();  // nobody has looked at the places of a compiled graph
  A values[kSlots];
#pragma unroll
  for (int slot = 0; slot < kSlots; ++slot) values[slot] = static_cast<A>(plane[own_places[slot] * sizes.place_stride]);
  T* rows = y + (image * sizes.anchors + anchor) * kNeighbors * sizes.channels + channel;
#pragma unroll
  for (int neighbor = 0; neighbor < kNeighbors; ++neighbor) {
    rows[neighbor * sizes.channels] = T(values[0] - values[neighbor + 1]);
  }
}

template <typename T, bool kSorted, typename A = AccumulateType<T>>
__global__ void __launch_bounds__(kThreads)
    neighbor_difference_backward_kernel(const T* __restrict__ grad_y, const int64_t* __restrict__ places,
                                        const int64_t* __restrict__ order, T* __restrict__ grad_x,
                                        NeighborDifferenceSizes sizes) {
  const int64_t entries = sizes.entries();
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (index >= sizes.batch * entries * sizes.channels) return;
  const int64_t channel = index % sizes.channels;
  const int64_t first = index / sizes.channels % entries;
  const int64_t image = index / sizes.channels / entries;
  const int64_t place = places[first];
  if (!sizes.holds(place)) __trap();
  const T* image_grad_y = grad_y + image * sizes.anchors * kNeighbors * sizes.channels;
  T* target = grad_x + image * sizes.channels * sizes.places + channel * sizes.channel_stride +
              place * sizes.place_stride;
  if constexpr (kSorted) {
    if (first > 0 && places[first - 1] == place) return;
    A sum = 0;
    for (int64_t entry = first; entry < entries && places[entry] == place; ++entry) {
      sum += entry_gradient<A>(image_grad_y, order[entry], channel, sizes.channels);
    }
    *target = T(sum);
  } else {
    atomicAdd(target, entry_gradient<A>(image_grad_y, first, channel, sizes.channels));
  }
}

dim3 grid_of(int64_t threads) { return dim3(grid_x(ceil_divide(threads, kThreads))); }

template <typename T>
void launch_forward(const NeighborDifferenceForward& arguments, const NeighborDifferenceSizes& sizes,
                    cudaStream_t stream) {
  const int64_t threads = sizes.batch * sizes.anchors * sizes.channels;
  if (threads == 0) return;
  LAUNCH(neighbor_difference_forward_kernel<T>, grid_of(threads), dim3(kThreads), 0, stream,
         static_cast<const T*>(arguments.x), arguments.places, static_cast<T*>(arguments.y), sizes);
}

template <typename T, bool kSorted>
void launch_backward(const NeighborDifferenceBackward& arguments, const NeighborDifferenceSizes& sizes,
                     cudaStream_t stream) {
  const int64_t threads = sizes.batch * sizes.entries() * sizes.channels;
  if (threads == 0) return;
  LAUNCH((neighbor_difference_backward_kernel<T, kSorted>), grid_of(threads), dim3(kThreads), 0, stream,
         static_cast<const T*>(arguments.grad_y), arguments.places, arguments.order, static_cast<T*>(arguments.grad_x),
         sizes);
}

}  // namespace

void launch_neighbor_difference_forward(const NeighborDifferenceForward& arguments,
                                        const NeighborDifferenceSizes& sizes, DType dtype, void* stream) {
  dispatch_cuda_dtype("neighbor_difference", dtype, [&](auto tag) {
    launch_forward<typename decltype(tag)::Type>(arguments, sizes, static_cast<cudaStream_t>(stream));
  });
}

void launch_neighbor_difference_backward(const NeighborDifferenceBackward& arguments,
                                         const NeighborDifferenceSizes& sizes, DType dtype, void* stream) {
  dispatch_cuda_dtype("neighbor_difference", dtype, [&](auto tag) {
    using T = typename decltype(tag)::Type;
    if (arguments.order != nullptr) {
      launch_backward<T, true>(arguments, sizes, static_cast<cudaStream_t>(stream));
    } else if constexpr (std::is_same_v<T, AccumulateType<T>>) {
      launch_backward<T, false>(arguments, sizes, static_cast<cudaStream_t>(stream));
    } else {
      throw std::invalid_argument("neighbor_difference: order must be given for half precision, got none");
    }
  });
}

}  // namespace restoration

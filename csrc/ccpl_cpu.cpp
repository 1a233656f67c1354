// Neighbour differences on the CPU: formula in ccpl.h. The other half of the loss is in ccpl_info_nce_cpu.cpp.
// Forward gathers and subtracts; backward writes each touched place of a map of zeros once. The owner of a place adds
// up all that it gets: repeated places accumulate, in float32 at least, and the result does not depend on the thread
// count. Scratch memory of a thread: 64 / sizeof(T) sums an entry; in channels-last one a channel.

#include "ccpl.h"
#include "common_cpu.h"

namespace restoration::CPU_ISA {
namespace {

// Nobody has looked at the places of a compiled graph.
void check_places(const int64_t* places, const NeighborDifferenceSizes& sizes) {
  for (int64_t entry = 0; entry < sizes.entries(); ++entry) {
    if (!sizes.holds(places[entry])) refuse_place(places[entry], sizes);
  }
}

template <typename T>
void forward(const NeighborDifferenceForward& arguments, const NeighborDifferenceSizes& sizes, int threads) {
  using A = AccumulateType<T>;
  const T* x = static_cast<const T*>(arguments.x);
  T* y = static_cast<T*>(arguments.y);
  const int64_t count = sizes.batch * sizes.anchors;
  const bool parallel = threads > 1 && count * kSlots * sizes.channels >= kParallelElements;
#pragma omp parallel for schedule(static) num_threads(threads) if (parallel)
  for (int64_t index = 0; index < count; ++index) {
    const int64_t image = index / sizes.anchors;
    const int64_t* places = arguments.places + index % sizes.anchors * kSlots;
    const T* values = x + image * sizes.channels * sizes.places;
    T* rows = y + index * kNeighbors * sizes.channels;
    // Channel by channel: the misses of its nine places, three rows of the image, are then under way together.
    for (int64_t channel = 0; channel < sizes.channels; ++channel) {
      const T* plane = values + channel * sizes.channel_stride;
      const A anchor = static_cast<A>(plane[places[0] * sizes.place_stride]);
      for (int64_t neighbor = 0; neighbor < kNeighbors; ++neighbor) {
        const A value = static_cast<A>(plane[places[neighbor + 1] * sizes.place_stride]);
        rows[neighbor * sizes.channels + channel] = T(anchor - value);
      }
    }
  }
}

// sums[0..channels) = what the entries of one place add up to, from `first` on; channels from `begin` on.
template <typename A, typename T>
void sum_place(const NeighborDifferenceBackward& arguments, const NeighborDifferenceSizes& sizes, const T* grad_y,
               int64_t first, int64_t begin, int64_t channels, A* sums) {
  std::fill_n(sums, channels, A(0));
  const int64_t place = arguments.places[first];
  for (int64_t index = first; index < sizes.entries() && arguments.places[index] == place; ++index) {
    const int64_t entry = arguments.order[index];
#pragma omp simd
    for (int64_t channel = 0; channel < channels; ++channel) {
      sums[channel] += entry_gradient<A>(grad_y, entry, begin + channel, sizes.channels);
    }
  }
}

// Whether the entry is the first of its place.
bool owns_place(const NeighborDifferenceBackward& arguments, int64_t index) {
  return index == 0 || arguments.places[index - 1] != arguments.places[index];
}

// NCHW: a thread owns some channels. Their sums are made together, which reads whole cache lines of grad_y, but written
// plane by plane: from plane to plane the same place falls into the same few sets of the caches.
template <typename T>
void backward_planes(const NeighborDifferenceBackward& arguments, const NeighborDifferenceSizes& sizes, int threads) {
  using A = AccumulateType<T>;
  constexpr int64_t kChannels = kCacheLineBytes / sizeof(T);
  const int64_t blocks = ceil_divide(sizes.channels, kChannels);
  const bool parallel = threads > 1 && sizes.batch * sizes.entries() * sizes.channels >= kParallelElements;
  ThreadBuffers<A> memory(parallel ? threads : 1, sizes.entries() * kChannels);
#pragma omp parallel num_threads(threads) if (parallel)
  {
    A* const sums = memory.own();
#pragma omp for schedule(static)
    for (int64_t task = 0; task < sizes.batch * blocks; ++task) {
      const int64_t image = task / blocks;
      const int64_t begin = task % blocks * kChannels;
      const int64_t channels = std::min(kChannels, sizes.channels - begin);
      const T* grad_y = static_cast<const T*>(arguments.grad_y) + image * sizes.anchors * kNeighbors * sizes.channels;
      T* grad_x = static_cast<T*>(arguments.grad_x) + (image * sizes.channels + begin) * sizes.places;
      for (int64_t index = 0; index < sizes.entries(); ++index) {
        if (!owns_place(arguments, index)) continue;
        sum_place(arguments, sizes, grad_y, index, begin, channels, sums + index * kChannels);
      }
      for (int64_t channel = 0; channel < channels; ++channel) {
        T* plane = grad_x + channel * sizes.places;
        for (int64_t index = 0; index < sizes.entries(); ++index) {
          if (owns_place(arguments, index)) plane[arguments.places[index]] = T(sums[index * kChannels + channel]);
        }
      }
    }
  }
}

// Channels-last: a place is one row of memory.
template <typename T>
void backward_rows(const NeighborDifferenceBackward& arguments, const NeighborDifferenceSizes& sizes, int threads) {
  using A = AccumulateType<T>;
  T* const grad_x = static_cast<T*>(arguments.grad_x);
  const int64_t stride = sizes.channels * sizes.places;
  const bool parallel = threads > 1 && sizes.batch * sizes.entries() * sizes.channels >= kParallelElements;
  ThreadBuffers<A> memory(parallel ? threads : 1, sizes.channels);
#pragma omp parallel num_threads(threads) if (parallel)
  {
    A* const sums = memory.own();
#pragma omp for schedule(static)
    for (int64_t task = 0; task < sizes.batch * sizes.entries(); ++task) {
      const int64_t image = task / sizes.entries();
      const int64_t index = task % sizes.entries();
      if (!owns_place(arguments, index)) continue;
      const T* grad_y = static_cast<const T*>(arguments.grad_y) + image * sizes.anchors * kNeighbors * sizes.channels;
      sum_place(arguments, sizes, grad_y, index, 0, sizes.channels, sums);
      T* row = grad_x + image * stride + arguments.places[index] * sizes.channels;
      for (int64_t channel = 0; channel < sizes.channels; ++channel) row[channel] = T(sums[channel]);
    }
  }
}

template <typename T>
void backward(const NeighborDifferenceBackward& arguments, const NeighborDifferenceSizes& sizes, int threads) {
  const auto run = sizes.place_stride == 1 ? backward_planes<T> : backward_rows<T>;
  run(arguments, sizes, threads);
}

}  // namespace

void neighbor_difference_forward(const NeighborDifferenceForward& arguments, const NeighborDifferenceSizes& sizes,
                                 DType dtype, int threads) {
  check_places(arguments.places, sizes);
  dispatch_cpu_dtype("neighbor_difference", dtype,
                     [&](auto tag) { forward<typename decltype(tag)::Type>(arguments, sizes, threads); });
}

void neighbor_difference_backward(const NeighborDifferenceBackward& arguments, const NeighborDifferenceSizes& sizes,
                                  DType dtype, int threads) {
  check_places(arguments.places, sizes);
  dispatch_cpu_dtype("neighbor_difference", dtype,
                     [&](auto tag) { backward<typename decltype(tag)::Type>(arguments, sizes, threads); });
}

}  // namespace restoration::CPU_ISA

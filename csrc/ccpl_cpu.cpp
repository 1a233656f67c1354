// Neighbour differences on the CPU: formula in ccpl.h. The other half of the loss is in ccpl_info_nce_cpu.cpp.
// Forward gathers and subtracts; backward fills grad_x with zeros, at the speed of memory, and writes each touched place
// once. The owner of a place adds up all that it gets: repeated places accumulate, in float32 at least, and the result
// does not depend on the thread count. Scratch memory: none.

#include "ccpl.h"
#include "common_cpu.h"

namespace restoration::CPU_ISA {
namespace {

// Calls that touch fewer numbers take less time than waking the threads.
constexpr int64_t kParallelElements = int64_t{1} << 15;

// Bytes that a thread zeroes at a time: a huge page, which the kernel has just cleared, and so brought into the cache,
// when its first byte is written.
constexpr int64_t kZeroBytes = int64_t{2} << 20;

// Channels whose sums one place keeps at a time, in a few vectors.
constexpr int64_t kChannelBlock = 64;

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

void fill_with_zeros(void* output, int64_t bytes, int threads) {
  advise_huge_pages(output, bytes);
  char* const begin = static_cast<char*>(output);
  const bool parallel = threads > 1 && bytes > kZeroBytes;
#pragma omp parallel for schedule(static) num_threads(threads) if (parallel)
  for (int64_t offset = 0; offset < bytes; offset += kZeroBytes) {
    std::memset(begin + offset, 0, std::min(kZeroBytes, bytes - offset));
  }
}

// Adds up the entries of one place, from `first` to the last of equal places, and writes their sum.
template <typename T>
void write_place(const NeighborDifferenceBackward& arguments, const NeighborDifferenceSizes& sizes, int64_t image,
                 int64_t first) {
  using A = AccumulateType<T>;
  const T* grad_y = static_cast<const T*>(arguments.grad_y) + image * sizes.anchors * kNeighbors * sizes.channels;
  const int64_t place = arguments.places[first];
  T* grad_x = static_cast<T*>(arguments.grad_x) + image * sizes.channels * sizes.places + place * sizes.place_stride;
  for (int64_t begin = 0; begin < sizes.channels; begin += kChannelBlock) {
    const int64_t channels = std::min(kChannelBlock, sizes.channels - begin);
    A sums[kChannelBlock] = {};
    for (int64_t index = first; index < sizes.entries() && arguments.places[index] == place; ++index) {
      const int64_t entry = arguments.order[index];
#pragma omp simd
      for (int64_t channel = 0; channel < channels; ++channel) {
        sums[channel] += entry_gradient<A>(grad_y, entry, begin + channel, sizes.channels);
      }
    }
    for (int64_t channel = 0; channel < channels; ++channel) {
      grad_x[(begin + channel) * sizes.channel_stride] = T(sums[channel]);
    }
  }
}

template <typename T>
void backward(const NeighborDifferenceBackward& arguments, const NeighborDifferenceSizes& sizes, int threads) {
  fill_with_zeros(arguments.grad_x, sizes.elements() * int64_t{sizeof(T)}, threads);
  const int64_t count = sizes.batch * sizes.entries();
  const bool parallel = threads > 1 && count * sizes.channels >= kParallelElements;
#pragma omp parallel for schedule(static) num_threads(threads) if (parallel)
  for (int64_t index = 0; index < count; ++index) {
    const int64_t first = index % sizes.entries();
    const bool owner = first == 0 || arguments.places[first - 1] != arguments.places[first];
    if (owner) write_place<T>(arguments, sizes, index / sizes.entries(), first);
  }
}

}  // namespace

void neighbor_difference_forward(const NeighborDifferenceForward& arguments, const NeighborDifferenceSizes& sizes,
                                 DType dtype, int threads) {
  dispatch_cpu_dtype("neighbor_difference", dtype,
                     [&](auto tag) { forward<typename decltype(tag)::Type>(arguments, sizes, threads); });
}

void neighbor_difference_backward(const NeighborDifferenceBackward& arguments, const NeighborDifferenceSizes& sizes,
                                  DType dtype, int threads) {
  dispatch_cpu_dtype("neighbor_difference", dtype,
                     [&](auto tag) { backward<typename decltype(tag)::Type>(arguments, sizes, threads); });
}

}  // namespace restoration::CPU_ISA

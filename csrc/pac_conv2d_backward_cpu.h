// Memory of backward of the pixel-adaptive convolution on the CPU: gradients that strips add to, and what a thread packs
// for one strip.
#pragma once

#include "pac_conv2d_strips_cpu.h"

namespace restoration::CPU_ISA {

// Gradients are cleared and rounded in pieces of 256 KB of float32, long beside the cost of handing one to a thread.
constexpr int64_t kPieceElements = int64_t{1} << 16;

// Gradient that strips add to: the output itself, or float32 memory that is rounded to it in the end.
template <typename T>
class SummedGradient {
 public:
  using A = AccumulateType<T>;

  SummedGradient(void* output, int64_t count, int threads)
      : output_(static_cast<T*>(output)),
        count_(output == nullptr ? 0 : count),
        threads_(threads),
        memory_(std::is_same_v<A, T> ? 0 : count_) {
    A* sums = this->sums();
    advise_huge_pages(sums, count_ * int64_t{sizeof(A)});
    for_each_block([=](int64_t first, int64_t last) { std::memset(sums + first, 0, (last - first) * sizeof(A)); });
  }

  bool wanted() const { return output_ != nullptr; }

  A* sums() {
    if constexpr (std::is_same_v<A, T>) {
      return output_;
    } else {
      return memory_.data();
    }
  }

  void finish() {
    if constexpr (!std::is_same_v<A, T>) {
      const A* sums = this->sums();
      T* output = output_;
      for_each_block([=](int64_t first, int64_t last) {
#pragma omp simd
        for (int64_t index = first; index < last; ++index) assign(output[index], sums[index]);
      });
    }
  }

 private:
  template <typename Call>
  void for_each_block(Call call) {
    const int64_t count = count_;
#pragma omp parallel for schedule(static) num_threads(threads_) if (count > kPieceElements)
    for (int64_t first = 0; first < count; first += kPieceElements) {
      call(first, std::min(count, first + kPieceElements));
    }
  }

  T* output_;
  int64_t count_;
  int threads_;
  Buffer<A> memory_;
};

// Lanes of which the first `count` are kept, and the others 0, even where they were NaN.
template <typename A>
HOST_DEVICE Vector<A> keep_first(Vector<A> vector, int64_t count) {
  for (int64_t lane = std::max<int64_t>(count, 0); lane < kLanes<A>; ++lane) vector[lane] = 0;
  return vector;
}

// One thread's arrays beside those of StripScratch.
template <typename E>
struct BackwardScratch {
  using A = AccumulateType<E>;

  E* columns;       // [blocks, column_rows, kLanes], for sums over pixels, zero where there is no pixel
  E* grad_y;        // [blocks, output_rows, kLanes]: alpha · grad_y, likewise
  E* grad_y_turned; // the same as turn_tiles leaves it; in its place where it serves nothing else
  E* grad_y_steps;  // [vectors, output_rows / kSteps, kLanes]: the same for sums over outputs; if it serves, grad_y
  A* guide_slope;   // [K², slope_stride]: m_t(p) of all places, then zeros
  A* guide_rows;    // [kGuideBlock, places of a row]: gradient of one row of the guide under the centre tap
  A* grad_weight;   // in blocks as add_block_products makes them
  // One number each of a whole image: in float32 the last of its places would be added to a sum a million times theirs.
  double* grad_filter;  // [K²], with shared filters in place of grad_weight
  double* grad_bias;    // [O]

  static int64_t column_rows(const PacConv2dSizes& sizes) { return round_up(sizes.depth(), kBlockColumns<E>); }
  static int64_t output_rows(const PacConv2dSizes& sizes) { return round_up(sizes.out_channels, kBlockRows<E>); }
  // Between vectors of the same row: an odd count of cache lines, so that they share no set of the caches.
  static int64_t column_stride(const PacConv2dSizes& sizes) { return (column_rows(sizes) | 1) * kLanes<E>; }
  static int64_t grad_y_stride(const PacConv2dSizes& sizes) { return (output_rows(sizes) | 1) * kLanes<E>; }
  static int64_t grad_y_steps_stride(const PacConv2dSizes& sizes) {
    return (output_rows(sizes) / kSteps<E> | 1) * kLanes<E>;
  }
  // Between taps: the zeros are as many as a tap reaches to one side, where all taps of a row read one copy of it.
  static int64_t slope_stride(const StripTiles<E>& tiles) { return tiles.places() + kTile<E>; }
  static int64_t bytes_per_place(const PacConv2dSizes& sizes) {
    return (column_rows(sizes) + 2 * output_rows(sizes)) / kSteps<E> * int64_t{sizeof(E)};
  }
  static int64_t weight_sums(const PacConv2dSizes& sizes) {
    return sizes.shared ? 0 : output_rows(sizes) * column_rows(sizes);
  }
  static int64_t filter_sums(const PacConv2dSizes& sizes) { return sizes.shared ? sizes.taps() : 0; }

  BackwardScratch(Carver& carver, const PacConv2dSizes& sizes, const StripTiles<E>& largest)
      : columns(carver.take<E>(largest.blocks() * column_stride(sizes))),
        grad_y(carver.take<E>(largest.blocks() * grad_y_stride(sizes))),
        grad_y_turned(kSteps<E> == 1 ? carver.take<E>(largest.blocks() * grad_y_stride(sizes)) : grad_y),
        grad_y_steps(kSteps<E> == 1 ? grad_y
                                    : carver.take<E>(largest.blocks() * kSteps<E> * grad_y_steps_stride(sizes))),
        guide_slope(carver.take<A>(sizes.taps() * slope_stride(largest))),
        guide_rows(carver.take<A>(kGuideBlock * largest.places_per_row())),
        grad_weight(carver.take<A>(weight_sums(sizes))),
        grad_filter(carver.take<double>(filter_sums(sizes))),
        grad_bias(carver.take<double>(sizes.out_channels)) {}
};

}  // namespace restoration::CPU_ISA

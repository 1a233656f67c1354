// What the kernels of the pixel-adaptive convolution in CUDA share: tiles of output pixels, the k_t(p) of a tile, and
// the part of x under a few taps, both in shared memory.
// A tile is a rectangle of pixels, its width a power of two. x is staged for up to three taps of one row of the kernel
// at a time: as rows of the image, from which neighbouring taps and pixels read the same numbers, or, where stride or
// dilation is so large that they share too few, as one segment for each tap.
#pragma once

#include <algorithm>
#include <cmath>

#include "async_copy.cuh"
#include "common.cuh"
#include "pac_conv2d.h"

namespace restoration {

// Taps whose x is staged together, and whose k are computed so: a row of the usual kernel.
constexpr int kTapsTogether = 3;

struct TapGroup {
  int row;
  int first;
  int count;
};

// Rows, columns and the pixels of a plane are counted in 32 bits, planes and images in 64.
struct PacConv2dTiling {
  struct Axis {
    int size;
    int output;
    int stride;
    int padding;
    int dilation;

    explicit Axis(const PacConv2dAxis& axis, int64_t kernel_size)
        : size(static_cast<int>(axis.size)),
          output(static_cast<int>(axis.output(kernel_size))),
          stride(static_cast<int>(axis.stride)),
          padding(static_cast<int>(axis.padding)),
          dilation(static_cast<int>(axis.dilation)) {}
    __device__ int position(int place, int tap) const { return place * stride - padding + tap * dilation; }
  };

  Axis vertical;
  Axis horizontal;
  int kernel_size;
  int channels;
  int guide_channels;
  int out_channels;
  bool normalize;
  bool segmented;
  int columns_log2;  // of a tile
  int rows_log2;
  int tiles_across;
  int tiles_down;
  int span;        // staged numbers for one row of a tile
  int pixel_step;  // staged numbers between neighbouring pixels, and between neighbouring taps
  int tap_step;

  static constexpr int kMinimumColumns = 16;  // so that fragments lie in whole rows
  static constexpr int kMaximumColumns = 128;

  PacConv2dTiling(const PacConv2dSizes& sizes, int pixels)
      : vertical(sizes.vertical, sizes.kernel_size),
        horizontal(sizes.horizontal, sizes.kernel_size),
        kernel_size(static_cast<int>(sizes.kernel_size)),
        channels(static_cast<int>(sizes.channels)),
        guide_channels(static_cast<int>(sizes.guide_channels)),
        out_channels(static_cast<int>(sizes.out_channels)),
        normalize(sizes.normalize) {
    // Long rows are staged with fewer instructions; shorter ones are worth it where an eighth less lies beyond the image.
    columns_log2 = log2_of(kMaximumColumns);
    for (int shorter = columns_log2; (1 << shorter) >= kMinimumColumns; --shorter) {
      const int64_t area = covered(shorter, log2_of(pixels));
      if (area < covered(columns_log2, log2_of(pixels)) * 7 / 8) columns_log2 = shorter;
    }
    rows_log2 = log2_of(pixels) - columns_log2;
    tiles_across = static_cast<int>(ceil_divide(horizontal.output, columns()));
    tiles_down = static_cast<int>(ceil_divide(vertical.output, rows()));
    const int taps = std::min(kernel_size, kTapsTogether);
    const int64_t row = (columns() - 1) * sizes.horizontal.stride + (taps - 1) * sizes.horizontal.dilation + 1;
    segmented = row > int64_t{taps} * columns();
    span = segmented ? taps * columns() : static_cast<int>(row);
    pixel_step = segmented ? 1 : horizontal.stride;
    tap_step = segmented ? columns() : horizontal.dilation;
  }

  HOST_DEVICE int taps() const { return kernel_size * kernel_size; }
  __device__ TapGroup group(int row, int first) const { return {row, first, min(kTapsTogether, kernel_size - first)}; }
  // The next one; behind the last, in row kernel_size.
  __device__ TapGroup after(const TapGroup& last) const {
    const int first = last.first + last.count;
    return first < kernel_size ? group(last.row, first) : group(last.row + 1, 0);
  }
  int64_t tiles(int64_t batch) const { return batch * tiles_across * tiles_down; }
  HOST_DEVICE int64_t pixels() const { return static_cast<int64_t>(vertical.size) * horizontal.size; }
  HOST_DEVICE int64_t out_pixels() const { return static_cast<int64_t>(vertical.output) * horizontal.output; }
  HOST_DEVICE int columns() const { return 1 << columns_log2; }
  HOST_DEVICE int rows() const { return 1 << rows_log2; }
  __device__ int row_of(int pixel) const { return pixel >> columns_log2; }
  __device__ int column_of(int pixel) const { return pixel & (columns() - 1); }
  // Where the staged numbers of a pixel begin.
  __device__ int slot(int pixel) const { return row_of(pixel) * span + column_of(pixel) * pixel_step; }

 private:
  // Pixels of all tiles of an image, also of what they have beyond it.
  int64_t covered(int columns, int pixels) const {
    return (ceil_divide(horizontal.output, int64_t{1} << columns) *
            ceil_divide(vertical.output, int64_t{1} << (pixels - columns)))
           << pixels;
  }

  // Of the least power of two that is not below value.
  static int log2_of(int value) {
    int power = 0;
    while ((1 << power) < value) ++power;
    return power;
  }
};

// The first pixel of a tile.
struct TilePlace {
  int64_t image;
  int row;
  int column;

  __device__ explicit TilePlace(const PacConv2dTiling& tiling) {
    const unsigned across = blockIdx.x / tiling.tiles_across;
    image = across / tiling.tiles_down;
    row = across % tiling.tiles_down * tiling.rows();
    column = blockIdx.x % tiling.tiles_across * tiling.columns();
  }
};

// What a tap reads for an output pixel: its place in a plane, or that of the nearest pixel where it lies outside.
struct InputPixel {
  int offset;
  bool inside;

  InputPixel() = default;
  __device__ InputPixel(const PacConv2dTiling& tiling, int row, int column, int tap_row, int tap_column) {
    const int input_row = tiling.vertical.position(row, tap_row);
    const int input_column = tiling.horizontal.position(column, tap_column);
    const int nearest_row = max(0, min(input_row, tiling.vertical.size - 1));
    const int nearest_column = max(0, min(input_column, tiling.horizontal.size - 1));
    offset = nearest_row * tiling.horizontal.size + nearest_column;
    inside = nearest_row == input_row && nearest_column == input_column;
  }
};

// exp(-distance / 2). The power of two is that of half the instructions; what the rounding of its exponent adds to the
// error is less than the last place of 1.
__device__ __forceinline__ float likeness(float distance) { return std::exp2(distance * -0.72134752044f); }
__device__ __forceinline__ double likeness(double distance) { return std::exp(-0.5 * distance); }

// kernel[tap, pixel] of a group of taps in kRows rows, the first of them group.row: k_t(p), or with totals its share of
// them; then, and with kInsideOnly, 0 for taps outside the image. Each thread fills in pixels of its own.
template <typename Products, int kRows, bool kInsideOnly, typename T, typename A>
__device__ __forceinline__ void fill_kernel(const T* __restrict__ guide, const PacConv2dTiling& tiling,
                                            const TilePlace& place, const TapGroup& group, const A* totals, A* kernel) {
  // A constant where the rows are the whole kernel: the centre tap is then not even read.
  const int middle = kRows == 1 ? tiling.kernel_size / 2 : kRows / 2;
  const int64_t pixels = tiling.pixels();
  const T* const image = guide + place.image * tiling.guide_channels * pixels;
#pragma unroll 1
  for (int pixel = threadIdx.x; pixel < Products::kPixels; pixel += Products::kThreads) {
    const int row = place.row + tiling.row_of(pixel), column = place.column + tiling.column_of(pixel);
    const InputPixel centre(tiling, row, column, middle, middle);
    InputPixel inputs[kRows][kTapsTogether];
    A distances[kRows][kTapsTogether] = {}, square = 0;
#pragma unroll
    for (int tap_row = 0; tap_row < kRows; ++tap_row) {
#pragma unroll
      for (int tap = 0; tap < kTapsTogether; ++tap) {
        inputs[tap_row][tap] = InputPixel(tiling, row, column, group.row + tap_row, group.first + tap);
      }
    }
    const T* plane = image;
#pragma unroll(kRows == 1 ? 4 : 2)  // 16 or 20 numbers are then on their way
    for (int channel = 0; channel < tiling.guide_channels; ++channel, plane += pixels) {
      const A own = centre.inside ? static_cast<A>(plane[centre.offset]) : A(0);
      square += own * own;
#pragma unroll
      for (int tap_row = 0; tap_row < kRows; ++tap_row) {
#pragma unroll
        for (int tap = 0; tap < kTapsTogether; ++tap) {
          const A difference = own - static_cast<A>(plane[inputs[tap_row][tap].offset]);
          distances[tap_row][tap] += difference * difference;
        }
      }
    }
#pragma unroll
    for (int tap_row = 0; tap_row < kRows; ++tap_row) {
#pragma unroll
      for (int tap = 0; tap < kTapsTogether; ++tap) {
        if (tap >= group.count) continue;
        const bool inside = inputs[tap_row][tap].inside;
        // The guide is 0 outside the image; the centre's k is 1 by definition, also for Inf.
        const A distance = inside ? distances[tap_row][tap] : square;
        const bool is_centre = group.row + tap_row == middle && group.first + tap == middle;
        A value = is_centre ? A(1) : likeness(distance);
        if (kInsideOnly || totals != nullptr) value = inside ? value : A(0);
        if (totals != nullptr) value /= totals[pixel];
        kernel[(tap_row * kTapsTogether + tap) * Products::kKernelStride + pixel] = value;
      }
    }
  }
}

// totals[pixel] = sum of k over the taps inside the image, 1 where there are none. Overwrites a group of kernel.
template <typename Products, typename T, typename A>
__device__ __forceinline__ void fill_totals(const T* __restrict__ guide, const PacConv2dTiling& tiling,
                                            const TilePlace& place, A* totals, A* kernel) {
  constexpr int kPixels = Products::kPixels, kThreads = Products::kThreads;
  // A thread reads what it has written itself: there is nothing to wait for.
  for (int pixel = threadIdx.x; pixel < kPixels; pixel += kThreads) totals[pixel] = 0;
  for (TapGroup group = tiling.group(0, 0); group.row < tiling.kernel_size; group = tiling.after(group)) {
    fill_kernel<Products, 1, true>(guide, tiling, place, group, static_cast<const A*>(nullptr), kernel);
    for (int pixel = threadIdx.x; pixel < kPixels; pixel += kThreads) {
      for (int tap = 0; tap < group.count; ++tap) totals[pixel] += kernel[tap * Products::kKernelStride + pixel];
    }
  }
  for (int pixel = threadIdx.x; pixel < kPixels; pixel += kThreads) {
    if (totals[pixel] == 0) totals[pixel] = 1;
  }
}

// What is staged of x: a number of one channel, or two 16-bit numbers of neighbouring channels in a word.
template <typename T>
struct Staged {
  using Element = T;
  static constexpr int kChannels = 1;
};
template <>
struct Staged<__half> {
  using Element = uint32_t;
  static constexpr int kChannels = 2;
};
template <>
struct Staged<__nv_bfloat16> : Staged<__half> {};

// staged[plane, slot] of `planes` planes under a group of taps, from channel first_channel on; 0 outside the image and
// beyond the last channel. Numbers of 4 and more bytes are on their way until the copies are waited for.
template <int kThreads, typename T, typename Element = typename Staged<T>::Element>
__device__ __forceinline__ void stage_rows(const T* __restrict__ x, const PacConv2dTiling& tiling,
                                           const TilePlace& place, const TapGroup& group, int first_channel,
                                           int planes, int plane_stride, Element* staged) {
  const int first_column = tiling.horizontal.position(place.column, group.first);
  const int64_t pixels = tiling.pixels();
  const T* const image = x + place.image * tiling.channels * pixels;
  for (int line = threadIdx.x / kWarpThreads; line < planes << tiling.rows_log2; line += kThreads / kWarpThreads) {
    const int plane = line >> tiling.rows_log2, row = line & (tiling.rows() - 1);
    const int channel = first_channel + plane * Staged<T>::kChannels;
    const int input_row = tiling.vertical.position(place.row + row, group.row);
    const bool row_inside = input_row >= 0 && input_row < tiling.vertical.size && channel < tiling.channels;
    const T* const source = image + (row_inside ? channel * pixels + input_row * tiling.horizontal.size : 0);
    Element* const destination = staged + plane * plane_stride + row * tiling.span;
    const auto stage = [&](int slot, int column) {
      const bool inside = row_inside && column >= 0 && column < tiling.horizontal.size;
      if constexpr (Staged<T>::kChannels == 1) {
        copy_async<sizeof(T)>(destination + slot, source + column, inside);
      } else {
        const auto* const bits = reinterpret_cast<const uint16_t*>(source);
        const uint32_t low = inside ? bits[column] : 0;
        const uint32_t high = inside && channel + 1 < tiling.channels ? bits[pixels + column] : 0;
        destination[slot] = low | high << 16;
      }
    };
    const int lane = threadIdx.x % kWarpThreads;
    if (!tiling.segmented) {
#pragma unroll 4
      for (int slot = lane; slot < tiling.span; slot += kWarpThreads) stage(slot, first_column + slot);
    } else {
#pragma unroll 1
      for (int slot = lane; slot < tiling.span; slot += kWarpThreads) {
        stage(slot, first_column + tiling.row_of(slot) * tiling.horizontal.dilation +
                        tiling.column_of(slot) * tiling.horizontal.stride);
      }
    }
  }
}

// The end of a sum: y = residual + alpha · round(sum + bias). y and residual, which may be the same, are of type T, or
// of float32 where `wide`.
template <typename T>
struct PacConv2dEpilogue {
  using A = AccumulateType<T>;

  const T* bias;
  const void* residual;
  void* y;
  A alpha;
  A quantum;
  A inverse;
  bool wide;

  PacConv2dEpilogue(const PacConv2dForward& arguments, bool wide)
      : bias(static_cast<const T*>(arguments.bias)),
        residual(arguments.residual),
        y(arguments.y),
        alpha(A(arguments.alpha)),
        quantum(A(arguments.quantum)),
        inverse(arguments.quantum == 0 ? A(0) : A(1 / arguments.quantum)),
        wide(wide) {}

  __device__ A bias_of(int channel) const { return bias == nullptr ? A(0) : static_cast<A>(bias[channel]); }

  __device__ A residual_of(int64_t offset) const {
    if (residual == nullptr) return A(0);
    if constexpr (sizeof(T) < sizeof(A)) {
      if (!wide) return static_cast<A>(static_cast<const T*>(residual)[offset]);
    }
    return static_cast<const A*>(residual)[offset];
  }

  __device__ void store(A sum_and_bias, A residual_value, int64_t offset) const {
    A value = alpha * (quantum == 0 ? sum_and_bias : round_to_multiple(sum_and_bias, quantum, inverse));
    if (residual != nullptr) value = residual_value + value;
    if constexpr (sizeof(T) < sizeof(A)) {
      if (!wide) {
        static_cast<T*>(y)[offset] = T(value);
        return;
      }
    }
    static_cast<A*>(y)[offset] = value;
  }
};

}  // namespace restoration

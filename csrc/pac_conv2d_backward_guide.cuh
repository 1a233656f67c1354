// Backward of the pixel-adaptive convolution in CUDA: the kernel k_t(p) from the guide, and the guide's gradient from
// the slopes m_t(p), one thread a pixel. Formulas: pac_conv2d_backward_cuda.cu.
#pragma once

#include <cmath>

#include "pac_conv2d_backward.cuh"

namespace restoration {
namespace {

// Of all kernels here, which wait for memory. 64 registers hold what they keep, or 128 in float64.
constexpr int kPlaceThreads = 256;

// Channels whose gradients a thread sums in registers. Slopes are read once for each.
constexpr int kGuideChannels = 8;

dim3 place_grid(int64_t places, int64_t batch) {
  return dim3(static_cast<unsigned>(ceil_divide(places, kPlaceThreads)), grid_y(batch));
}

__device__ __forceinline__ int64_t first_place() { return int64_t{blockIdx.x} * kPlaceThreads; }

// A pixel of the guide, which is zero outside the image.
template <typename T>
struct GuidePixel {
  using A = AccumulateType<T>;

  const T* channels;
  bool inside;

  __device__ GuidePixel(const T* image, const PacMap& map, int row, int column)
      : channels(image + int64_t{row} * map.horizontal.size + column),
        inside(map.vertical.contains(row) && map.horizontal.contains(column)) {}
  __device__ A value(const PacMap& map, int channel) const {
    return inside ? static_cast<A>(channels[channel * map.pixels]) : A(0);
  }
};

// kernel[t](p) = k_t(p); with normalize its share of the sum, 0 for taps outside the image.
template <typename T>
__global__ void __launch_bounds__(kPlaceThreads)
    pac_conv2d_backward_affinity_kernel(const T* __restrict__ guide, AccumulateType<T>* __restrict__ kernel,
                                        PacMap map) {
  using A = AccumulateType<T>;
  const int64_t place = first_place() + threadIdx.x;
  if (place >= map.out_pixels) return;
  const PacPlace at = place_after(first_place(), threadIdx.x, map.horizontal.output);
  const int middle = map.kernel_size / 2;
  for (int64_t index = blockIdx.y; index < map.batch; index += gridDim.y) {
    const T* image = guide + index * map.guide_channels * map.pixels;
    const GuidePixel<T> centre(image, map, map.vertical.position(at.row, middle),
                               map.horizontal.position(at.column, middle));
    A total = 0;
    for (int tap = 0; tap < map.taps; ++tap) {
      const GuidePixel<T> other(image, map, map.vertical.position(at.row, tap / map.kernel_size),
                                map.horizontal.position(at.column, tap % map.kernel_size));
      A distance = 0;
      // That of the centre stays 0: its k is 1 by definition, also for Inf.
      if (tap != map.taps / 2) {
#pragma unroll 8
        for (int channel = 0; channel < map.guide_channels; ++channel) {
          const A difference = centre.value(map, channel) - other.value(map, channel);
          distance += difference * difference;
        }
      }
      A value = std::exp(A(-0.5) * distance);
      if (map.normalize && !other.inside) value = 0;
      total += value;
      kernel[map.tap_plane(index, tap) + place] = value;
    }
    // A place with no tap inside the image has only zeros.
    if (!map.normalize || total == 0) continue;
    for (int tap = 0; tap < map.taps; ++tap) kernel[map.tap_plane(index, tap) + place] /= total;
  }
}

// With normalize, k_t(p) is a share of the sum, and a change of one changes all: m_t -= k_t · (sum over r of m_r).
template <typename A>
__global__ void __launch_bounds__(kPlaceThreads)
    pac_conv2d_backward_centre_kernel(const A* __restrict__ kernel, A* __restrict__ slope, PacMap map) {
  const int64_t place = first_place() + threadIdx.x;
  if (place >= map.out_pixels) return;
  const PacPlace at = place_after(first_place(), threadIdx.x, map.horizontal.output);
  const auto inside = [&](int tap) {
    return map.vertical.contains(map.vertical.position(at.row, tap / map.kernel_size)) &&
           map.horizontal.contains(map.horizontal.position(at.column, tap % map.kernel_size));
  };
  for (int64_t index = blockIdx.y; index < map.batch; index += gridDim.y) {
    A total = 0;
    for (int tap = 0; tap < map.taps; ++tap) {
      if (inside(tap)) total += slope[map.tap_plane(index, tap) + place];
    }
    for (int tap = 0; tap < map.taps; ++tap) {
      const int64_t entry = map.tap_plane(index, tap) + place;
      if (inside(tap)) slope[entry] -= kernel[entry] * total;
    }
  }
}

// grad_guide(q) = sum over n of w_n (g(n) - g(q)), where n goes over the taps of the output p that has its centre at q,
// with m_t(p), and over the centres of the outputs that read q: the opposite tap of such an output leads back from n.
template <typename T>
__global__ void __launch_bounds__(kPlaceThreads, 16 / sizeof(AccumulateType<T>))
    pac_conv2d_backward_guide_kernel(const T* __restrict__ guide, const AccumulateType<T>* __restrict__ slope,
                                     T* __restrict__ grad_guide, PacMap map) {
  using A = AccumulateType<T>;
  const int64_t pixel = first_place() + threadIdx.x;
  if (pixel >= map.pixels) return;
  const PacPlace at = place_after(first_place(), threadIdx.x, map.horizontal.size);
  const int middle = map.kernel_size / 2;
  const int64_t own = map.reader(at.row, at.column, map.taps / 2);
  for (int64_t index = blockIdx.y; index < map.batch; index += gridDim.y) {
    const T* image = guide + index * map.guide_channels * map.pixels;
    const GuidePixel<T> centre(image, map, at.row, at.column);
    for (int first = 0; first < map.guide_channels; first += kGuideChannels) {
      const int count = min(kGuideChannels, map.guide_channels - first);
      A centres[kGuideChannels], sums[kGuideChannels];
      UNROLL
      for (int channel = 0; channel < kGuideChannels; ++channel) {
        centres[channel] = channel < count ? centre.value(map, first + channel) : A(0);
        sums[channel] = 0;
      }
      for (int tap = 0; tap < map.taps; ++tap) {
        if (tap == map.taps / 2) continue;
        const int opposite = map.taps - 1 - tap;
        const GuidePixel<T> other(image, map, at.row + (tap / map.kernel_size - middle) * map.vertical.dilation,
                                  at.column + (tap % map.kernel_size - middle) * map.horizontal.dilation);
        const int64_t back = map.reader(at.row, at.column, opposite);
        const bool reads = own >= 0 && other.inside;
        // Nobody has written the slope of a tap outside the image, and 0 times Inf would be NaN.
        if (!reads && back < 0) continue;
        const A weight = (reads ? slope[map.tap_plane(index, tap) + own] : A(0)) +
                         (back >= 0 ? slope[map.tap_plane(index, opposite) + back] : A(0));
        // Beyond the last channel that one again: behind a branch, no load could be under way with the next.
        UNROLL
        for (int channel = 0; channel < kGuideChannels; ++channel) {
          sums[channel] += weight * (other.value(map, first + min(channel, count - 1)) - centres[channel]);
        }
      }
      T* gradient = grad_guide + (index * map.guide_channels + first) * map.pixels + pixel;
      UNROLL
      for (int channel = 0; channel < kGuideChannels; ++channel) {
        if (channel < count) gradient[channel * map.pixels] = T(sums[channel]);
      }
    }
  }
}

}  // namespace
}  // namespace restoration

// Backward of the pixel-adaptive convolution in CUDA: the kernel k_t(p) from the guide, and the guide's gradient from
// the slopes m_t(p), one thread a pixel. Formulas: pac_conv2d_backward_cuda.cu.
#pragma once

#include <cmath>

#include "pac_conv2d_backward.cuh"

namespace restoration {
namespace {

// Of all kernels here, which wait for memory. 64 registers hold what they keep, or 128 in float64.
constexpr int kPlaceThreads = 256;

// Channels of which a thread keeps the centre's numbers, and sums gradients, in registers. Slopes are read once for
// each so many.
constexpr int kGuideChannels = 8;

dim3 place_grid(int64_t places, int64_t batch) {
  return dim3(grid_x(ceil_divide(places, kPlaceThreads)), grid_y(batch));
}

__device__ __forceinline__ int64_t first_place() { return int64_t{blockIdx.x} * kPlaceThreads; }

// The channels of a pixel of the guide, which is zero outside the image, from planes[first] on.
template <typename T>
struct GuidePixel {
  using A = AccumulateType<T>;

  PlaneWalk<const T> number;
  bool inside;

  __device__ GuidePixel(const T* planes, int64_t first, const PacMap& map, int row, int column)
      : number(planes, first * map.pixels + row * map.horizontal.size + column, map.pixels),
        inside(map.vertical.contains(row) && map.horizontal.contains(column)) {}
  // The next channel, or 0 where there is none.
  __device__ A next(bool exists = true) {
    const A value = inside && exists ? static_cast<A>(*number) : A(0);
    number += 1;
    return value;
  }
};

// kernel[t](p) = k_t(p); with normalize its share of the sum, 0 for taps outside the image.
template <typename T>
__global__ void __launch_bounds__(kPlaceThreads, 16 / sizeof(AccumulateType<T>))
    pac_conv2d_backward_affinity_kernel(const T* __restrict__ guide, AccumulateType<T>* __restrict__ kernel,
                                        PacMap map) {
  using A = AccumulateType<T>;
  const int64_t place = first_place() + threadIdx.x;
  if (place >= map.out_pixels) return;
  const PacPlace at = place_after(first_place(), threadIdx.x, map.horizontal.output);
  const int middle = map.kernel_size / 2;
  for (int64_t index = blockIdx.y; index < map.batch; index += gridDim.y) {
    const auto pixel_under = [&](int tap_row, int tap_column) {
      return GuidePixel<T>(guide, index * map.guide_channels, map, map.vertical.position(at.row, tap_row),
                           map.horizontal.position(at.column, tap_column));
    };
    GuidePixel<T> centre = pixel_under(middle, middle);
    A centres[kGuideChannels], total = 0;
    UNROLL
    for (int channel = 0; channel < kGuideChannels; ++channel) {
      centres[channel] = centre.next(channel < map.guide_channels);
    }
    const PlaneWalk<A> first(kernel, map.tap_plane(index, 0) + place, map.out_pixels);
    PlaneWalk<A> entry = first;
    map.visit_taps([&](int tap, int tap_row, int tap_column) {
      GuidePixel<T> own = centre, other = pixel_under(tap_row, tap_column);
      A distance = 0;
      // That of the centre stays 0: its k is 1 by definition, also for Inf.
      if (tap != map.taps / 2) {
        const auto add_square = [&](A difference) { distance += difference * difference; };
        UNROLL
        for (int channel = 0; channel < kGuideChannels; ++channel) {
          add_square(centres[channel] - other.next(channel < map.guide_channels));
        }
#pragma unroll 4
        for (int channel = kGuideChannels; channel < map.guide_channels; ++channel) {
          add_square(own.next() - other.next());
        }
      }
      A value = std::exp(A(-0.5) * distance);
      if (map.normalize && !other.inside) value = 0;
      total += value;
      *entry = value;
      entry += 1;
    });
    // A place with no tap inside the image has only zeros.
    if (!map.normalize || total == 0) continue;
    entry = first;
    for (int tap = 0; tap < map.taps; ++tap, entry += 1) *entry /= total;
  }
}

// With normalize, k_t(p) is a share of the sum, and a change of one changes all: m_t -= k_t · (sum over r of m_r).
template <typename A>
__global__ void __launch_bounds__(kPlaceThreads)
    pac_conv2d_backward_centre_kernel(const A* __restrict__ kernel, A* __restrict__ slope, PacMap map) {
  const int64_t place = first_place() + threadIdx.x;
  if (place >= map.out_pixels) return;
  const PacPlace at = place_after(first_place(), threadIdx.x, map.horizontal.output);
  const auto inside = [&](int tap_row, int tap_column) {
    return map.vertical.contains(map.vertical.position(at.row, tap_row)) &&
           map.horizontal.contains(map.horizontal.position(at.column, tap_column));
  };
  for (int64_t index = blockIdx.y; index < map.batch; index += gridDim.y) {
    A total = 0;
    map.visit_taps([&](int tap, int tap_row, int tap_column) {
      if (inside(tap_row, tap_column)) total += slope[map.tap_plane(index, tap) + place];
    });
    map.visit_taps([&](int tap, int tap_row, int tap_column) {
      const int64_t entry = map.tap_plane(index, tap) + place;
      if (inside(tap_row, tap_column)) slope[entry] -= kernel[entry] * total;
    });
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
  const int last = map.kernel_size - 1, middle = map.kernel_size / 2;
  const int own = map.reader(at.row, at.column, middle, middle);
  for (int64_t index = blockIdx.y; index < map.batch; index += gridDim.y) {
    for (int first = 0; first < map.guide_channels; first += kGuideChannels) {
      const int count = min(kGuideChannels, map.guide_channels - first);
      const int64_t first_plane = index * map.guide_channels + first;
      GuidePixel<T> centre(guide, first_plane, map, at.row, at.column);
      A centres[kGuideChannels], sums[kGuideChannels];
      UNROLL
      for (int channel = 0; channel < kGuideChannels; ++channel) {
        centres[channel] = centre.next(channel < count);
        sums[channel] = 0;
      }
      map.visit_taps([&](int tap, int tap_row, int tap_column) {
        if (tap == map.taps / 2) return;
        GuidePixel<T> other(guide, first_plane, map, at.row + (tap_row - middle) * map.vertical.dilation,
                            at.column + (tap_column - middle) * map.horizontal.dilation);
        const int back = map.reader(at.row, at.column, last - tap_row, last - tap_column);
        const bool reads = own >= 0 && other.inside;
        // Nobody has written the slope of a tap outside the image, and 0 times Inf would be NaN.
        if (!reads && back < 0) return;
        const A weight = (reads ? slope[map.tap_plane(index, tap) + own] : A(0)) +
                         (back >= 0 ? slope[map.tap_plane(index, map.taps - 1 - tap) + back] : A(0));
        UNROLL
        for (int channel = 0; channel < kGuideChannels; ++channel) {
          sums[channel] += weight * (other.next(channel < count) - centres[channel]);
        }
      });
      PlaneWalk<T> gradient(grad_guide, first_plane * map.pixels + pixel, map.pixels);
      UNROLL
      for (int channel = 0; channel < kGuideChannels; ++channel) {
        if (channel < count) *gradient = T(sums[channel]);
        gradient += 1;
      }
    }
  }
}

}  // namespace
}  // namespace restoration

// Backward of the pixel-adaptive convolution in CUDA where all channels share one filter [K²]: grad_x, the slopes
// m_t(p) and the filter's gradient. Formulas: pac_conv2d_backward_cuda.cu. There is nothing to multiply as matrices: a
// thread owns one pixel of x and goes over the outputs that read it.
#pragma once

#include "pac_conv2d_backward.cuh"

namespace restoration {
namespace {

constexpr int kSharedThreads = 256;

// Channels in one pass, whose values and gradients a thread keeps in registers; the kernel is read once for each pass.
constexpr int kSharedChannels = 8;

// With v = grad_y and d = sum over c of x[c](q) v[c](p), where p reads q with t: grad_x[c](q) = alpha · sum over t of
// w_t k_t(p) v[c](p), slope[t](p) = alpha · w_t k_t(p) d, filter_sums[block][t] = sum over q of k_t(p) d. Each may be
// null. No other thread reads the k_t(p) of a slope, which may therefore take its place if there is one pass.
template <typename T, typename R>
__global__ void __launch_bounds__(kSharedThreads)
    pac_conv2d_backward_shared_kernel(const R* __restrict__ grad_y, const T* __restrict__ x,
                                      const T* __restrict__ filter, const AccumulateType<T>* kernel,
                                      T* __restrict__ grad_x, AccumulateType<T>* slope,
                                      AccumulateType<T>* __restrict__ filter_sums, PacMap map,
                                      AccumulateType<T> alpha) {
  using A = AccumulateType<T>;
  const int64_t first_pixel = int64_t{blockIdx.x} * kSharedThreads;
  const int64_t pixel = first_pixel + threadIdx.x;
  const PacPlace at = place_after(first_pixel, threadIdx.x, map.horizontal.size);
  A* const sums = filter_sums + (int64_t{blockIdx.y} * gridDim.x + blockIdx.x) * map.taps;
  for (int64_t image = blockIdx.y; image < map.batch; image += gridDim.y) {
    for (int first = 0; first < map.channels; first += kSharedChannels) {
      const int count = min(kSharedChannels, map.channels - first);
      const int64_t plane = image * map.channels + first;
      A values[kSharedChannels], gradients[kSharedChannels];
      UNROLL
      for (int channel = 0; channel < kSharedChannels; ++channel) {
        const bool exists = pixel < map.pixels && channel < count;
        values[channel] = exists ? static_cast<A>(x[(plane + channel) * map.pixels + pixel]) : A(0);
        gradients[channel] = 0;
      }
      map.visit_taps([&](int tap, int tap_row, int tap_column) {
        const int place = pixel < map.pixels ? map.reader(at.row, at.column, tap_row, tap_column) : -1;
        A share = 0;
        if (place >= 0) {
          const int64_t entry = map.tap_plane(image, tap) + place;
          const A scale = kernel[entry], weight = static_cast<A>(filter[tap]);
          A dot = 0;
          PlaneWalk<const R> grads(grad_y, plane * map.out_pixels + place, map.out_pixels);
          UNROLL
          for (int channel = 0; channel < kSharedChannels; ++channel) {
            if (channel >= count) break;
            const A grad = static_cast<A>(*grads);
            grads += 1;
            gradients[channel] += scale * weight * grad;
            dot += values[channel] * grad;
          }
          share = scale * dot;
          if (slope != nullptr) slope[entry] = alpha * weight * share + (first == 0 ? A(0) : slope[entry]);
        }
        if (filter_sums == nullptr) return;
        share = block_sum(share);
        if (threadIdx.x != 0) return;
        const bool is_first = image == blockIdx.y && first == 0;
        sums[tap] = is_first ? share : sums[tap] + share;
      });
      if (grad_x == nullptr || pixel >= map.pixels) continue;
      UNROLL
      for (int channel = 0; channel < kSharedChannels; ++channel) {
        if (channel < count) grad_x[(plane + channel) * map.pixels + pixel] = T(alpha * gradients[channel]);
      }
    }
  }
}

inline dim3 shared_grid(const PacConv2dSizes& sizes) {
  return dim3(grid_x(ceil_divide(sizes.pixels(), kSharedThreads)), grid_y(sizes.batch));
}

template <typename T, typename R>
void launch_shared(const PacConv2dBackward& arguments, const PacConv2dSizes& sizes, const AccumulateType<T>* kernel,
                   AccumulateType<T>* slope, AccumulateType<T>* filter_sums, const PacMap& map, cudaStream_t stream) {
  LAUNCH((pac_conv2d_backward_shared_kernel<T, R>), shared_grid(sizes), dim3(kSharedThreads), 0, stream,
         static_cast<const R*>(arguments.grad_y), static_cast<const T*>(arguments.x),
         static_cast<const T*>(arguments.weight), kernel, static_cast<T*>(arguments.grad_x), slope, filter_sums, map,
         static_cast<AccumulateType<T>>(arguments.alpha));
}

}  // namespace
}  // namespace restoration

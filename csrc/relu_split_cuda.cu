// ReLU and split of a map of pixels into two of planes, in CUDA: formula in relu_split.h. A block turns a tile of some
// rows, columns and channels over (turned_tiles.cuh); the channels of a tile may belong to both maps.
// Everything is read once and written once. No atomics: the same bits on every run.

#include "relu_split.h"
#include "turned_tiles.cuh"

namespace restoration {
namespace {

TiledMap tiled(const ReluSplitSizes& sizes) { return {sizes.channels, sizes.height, sizes.width, 0}; }

template <typename T>
__device__ __forceinline__ SplitPlanes<T> planes_of(const Tile& tile, int split, T* rectified, T* rest) {
  return {rectified, rest, tile.image, tile.map.channels, split, int64_t{tile.map.height} * tile.map.width};
}

template <typename T, typename A = AccumulateType<T>>
__global__ void __launch_bounds__(kTileThreads, kTileBlocks)
    relu_split_forward_kernel(const T* __restrict__ x, T* __restrict__ rectified, T* __restrict__ rest, TiledMap map,
                              int split) {
  SHARED_ARRAY(A, tile_values, kTurnedNumbers);
  const Tile tile(map, blockIdx.x);
  tile.turn_pixels(x + tile.image * map.image_elements(), tile_values);
  __syncthreads();
  const SplitPlanes<T> planes = planes_of(tile, split, rectified, rest);
#pragma unroll
  for (int number = 0; number < kNumbers; ++number) {
    if (!tile.inside<InPlanes>(number)) continue;
    const A value = turned<InPlanes>(tile_values, number);
    const int channel = tile.plane(number);
    planes.plane(channel)[tile.plane_place(number)] = T(channel < split ? where_positive(value, value) : value);
  }
}

template <typename T, typename A = AccumulateType<T>>
__global__ void __launch_bounds__(kTileThreads, kTileBlocks)
    relu_split_backward_kernel(const T* __restrict__ grad_rectified, const T* __restrict__ grad_rest,
                               const T* __restrict__ rectified, T* __restrict__ grad_x, TiledMap map, int split) {
  SHARED_ARRAY(A, tile_grads, kTurnedNumbers);
  const Tile tile(map, blockIdx.x);
  const SplitPlanes<const T> gradients = planes_of(tile, split, grad_rectified, grad_rest);
  const T* __restrict__ deciders = rectified + tile.image * split * gradients.pixels;
  // The loads of half the numbers (float64: a quarter) are under way together: all do not fit in registers. What is
  // beyond the edges is read at a plane's beginning: behind a branch, no load could be under way with the next.
  constexpr int kTogether = kNumbers / (sizeof(A) > 4 ? 4 : 2);
#pragma unroll 1
  for (int first = 0; first < kNumbers; first += kTogether) {
    T values[kTogether], signs[kTogether];
#pragma unroll
    for (int part = 0; part < kTogether; ++part) {
      const bool inside = tile.inside<InPlanes>(first + part);
      const int channel = inside ? tile.plane(first + part) : 0;
      const int64_t place = inside ? tile.plane_place(first + part) : 0;
      values[part] = gradients.plane(channel)[place];
      signs[part] = deciders[channel < split ? channel * gradients.pixels + place : 0];
    }
#pragma unroll
    for (int part = 0; part < kTogether; ++part) {
      A gradient = tile.inside<InPlanes>(first + part) ? static_cast<A>(values[part]) : A(0);
      if (tile.plane(first + part) < split) gradient = where_positive(static_cast<A>(signs[part]), gradient);
      turned<InPlanes>(tile_grads, first + part) = gradient;
    }
  }
  __syncthreads();
  T* image_grad_x = grad_x + tile.image * map.image_elements();
#pragma unroll
  for (int number = 0; number < kNumbers; ++number) {
    if (!tile.inside<InPixels>(number)) continue;
    image_grad_x[tile.own_offset(number)] = T(turned<InPixels>(tile_grads, number));
  }
}

}  // namespace

void launch_relu_split_forward(const ReluSplitForward& arguments, const ReluSplitSizes& sizes, DType dtype,
                               void* stream) {
  if (sizes.batch == 0) return;
  dispatch_cuda_dtype("relu_split", dtype, [&](auto tag) {
    using T = typename decltype(tag)::Type;
    const TiledMap map = tiled(sizes);
    LAUNCH(relu_split_forward_kernel<T>, map.grid(sizes.batch), dim3(kTileThreads), 0,
           static_cast<cudaStream_t>(stream), static_cast<const T*>(arguments.x), static_cast<T*>(arguments.rectified),
           static_cast<T*>(arguments.rest), map, static_cast<int>(sizes.split));
  });
}

void launch_relu_split_backward(const ReluSplitBackward& arguments, const ReluSplitSizes& sizes, DType dtype,
                                void* stream) {
  if (sizes.batch == 0) return;
  dispatch_cuda_dtype("relu_split", dtype, [&](auto tag) {
    using T = typename decltype(tag)::Type;
    const TiledMap map = tiled(sizes);
    LAUNCH(relu_split_backward_kernel<T>, map.grid(sizes.batch), dim3(kTileThreads), 0,
           static_cast<cudaStream_t>(stream), static_cast<const T*>(arguments.grad_rectified),
           static_cast<const T*>(arguments.grad_rest), static_cast<const T*>(arguments.rectified),
           static_cast<T*>(arguments.grad_x), map, static_cast<int>(sizes.split));
  });
}

}  // namespace restoration

// What the CUDA kernels of dual pooling attention share: the mean of every plane, and what comes of sums over planes.
#pragma once

#include "dual_pool_attention.h"
#include "plane_tiles.cuh"

namespace restoration {
namespace {

// rows[h] and columns[w], one thread for each.
template <typename A>
__global__ void __launch_bounds__(kTileThreads, kTileBlocks)
    dual_pool_attention_weights_kernel(A* __restrict__ rows, A* __restrict__ columns, int64_t height, int64_t width,
                                       int64_t pool_size) {
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kTileThreads + threadIdx.x;
  if (index < height) {
    rows[index] = pooling_weight<A>(index, height, pool_size);
  } else if (index < height + width) {
    columns[index - height] = pooling_weight<A>(index - height, width, pool_size);
  }
}

// partial[plane, tile] = sum over the tile of rows · columns · x.
template <typename T, bool kAligned, typename A = AccumulateType<T>>
__global__ void __launch_bounds__(kTileThreads, kTileBlocks)
    dual_pool_attention_forward_reduce_kernel(const T* __restrict__ x, const A* __restrict__ rows,
                                              const A* __restrict__ columns, A* __restrict__ partial, Tiling tiling,
                                              int64_t planes) {
  using Tile = ThreadTile<T, kAligned>;
  constexpr int kCount = Tile::kCount, kRowsInFlight = Tile::kRowsInFlight;
  const Tile tile(tiling);
  A column_weights[kCount];
  tile.load(columns, column_weights);
  for (int64_t plane = blockIdx.y; plane < planes; plane += gridDim.y) {
    const T* values_of_plane = x + plane * tiling.height * tiling.width;
    A sums[kCount] = {};
#pragma unroll 1
    for (int first = tile.first_row; first < tile.last_row; first = tile.row(first, kRowsInFlight)) {
      A values[kRowsInFlight][kCount];
      tile.load_rows(values_of_plane, first, values);
#pragma unroll
      for (int part = 0; part < kRowsInFlight; ++part) {
        const A row_weight = rows[tile.row_inside(first, part)];
#pragma unroll
        for (int place = 0; place < kCount; ++place) sums[place] += row_weight * values[part][place];
      }
    }
    A sum = 0;
#pragma unroll
    for (int place = 0; place < kCount; ++place) sum += column_weights[place] * sums[place];
    sum = block_sum(sum);
    if (threadIdx.x == 0 && threadIdx.y == 0) partial[plane * gridDim.x + blockIdx.x] = sum;
  }
}

// total[plane] = sum over tiles of partial, one warp for each plane; times the sigmoid's derivative where scale is
// given.
template <typename A>
__global__ void __launch_bounds__(kTileThreads, kTileBlocks)
    dual_pool_attention_sum_kernel(const A* __restrict__ partial, const A* __restrict__ scale, A* __restrict__ total,
                                   int64_t planes, int64_t tiles) {
  const int64_t plane = static_cast<int64_t>(blockIdx.x) * (kTileThreads / kWarpThreads) + threadIdx.x / kWarpThreads;
  if (plane >= planes) return;  // whole warps leave together
  const int lane = threadIdx.x % kWarpThreads;
  A sum = 0;
  for (int64_t tile = lane; tile < tiles; tile += kWarpThreads) sum += partial[plane * tiles + tile];
  sum = warp_sum(sum);
  if (lane == 0) total[plane] = scale == nullptr ? sum : sum * scale[plane] * (A(1) - scale[plane]);
}

// grad_weight[tap] = sum over planes of grad_logit · the mean `tap` channels on, one block for each tap.
template <typename T, typename A = AccumulateType<T>>
__global__ void __launch_bounds__(kTileThreads, kTileBlocks)
    dual_pool_attention_backward_weight_kernel(const A* __restrict__ grad_logit, const A* __restrict__ mean,
                                               T* __restrict__ grad_weight, int64_t planes, int64_t channels,
                                               int64_t taps) {
  const int64_t tap = blockIdx.x;
  A sum = 0;
  for (int64_t plane = threadIdx.x; plane < planes; plane += kTileThreads) {
    const int64_t channel = channel_of(plane, channels);
    const int64_t first = plane - channel;
    sum += channel_grad_tap(grad_logit + first, mean + first, tap - taps / 2, channel, channels);
  }
  sum = block_sum(sum);
  if (threadIdx.x == 0) grad_weight[tap] = T(sum);
}

// The caller's scratch memory: columns, which are read as vectors and need its alignment, rows, a sum for each tile,
// and backward's grad_logit.
template <typename T>
struct Workspace {
  using A = AccumulateType<T>;
  Carver carver;  // before the arrays that it cuts
  A* columns;
  A* rows;
  A* partial;
  A* grad_logit;

  Workspace(void* memory, const DualPoolAttentionSizes& sizes, int64_t tiles)
      : carver(memory),
        columns(carver.take<A>(sizes.width)),
        rows(carver.take<A>(sizes.height)),
        partial(carver.take<A>(sizes.planes() * tiles)),
        grad_logit(carver.take<A>(sizes.planes())) {}

  int64_t bytes() const { return carver.used(); }
};

template <typename A>
void launch_weights(A* rows, A* columns, const DualPoolAttentionSizes& sizes, cudaStream_t stream) {
  LAUNCH(dual_pool_attention_weights_kernel<A>, dim3(grid_x(ceil_divide(sizes.height + sizes.width, kTileThreads))),
         dim3(kTileThreads), 0, stream, rows, columns, sizes.height, sizes.width, sizes.pool_size);
}

template <typename A>
void launch_sum(const A* partial, const A* scale, A* total, int64_t planes, int64_t tiles, cudaStream_t stream) {
  LAUNCH(dual_pool_attention_sum_kernel<A>, dim3(grid_x(ceil_divide(planes, kTileThreads / kWarpThreads))),
         dim3(kTileThreads), 0, stream, partial, scale, total, planes, tiles);
}

// mean [B,C] of x, with the pooling weights that it leaves in the workspace.
template <typename T, bool kAligned>
void launch_means(const T* x, const Workspace<T>& workspace, AccumulateType<T>* mean,
                  const DualPoolAttentionSizes& sizes, cudaStream_t stream) {
  const Tiling tiling = Tiling::of<T>(sizes.height, sizes.width);
  const int64_t planes = sizes.planes();
  launch_weights(workspace.rows, workspace.columns, sizes, stream);
  LAUNCH((dual_pool_attention_forward_reduce_kernel<T, kAligned>), tiling.grid(planes), tiling.block(), 0, stream, x,
         workspace.rows, workspace.columns, workspace.partial, tiling, planes);
  launch_sum<AccumulateType<T>>(workspace.partial, nullptr, mean, planes, tiling.tiles, stream);
}

// grad_weight [k] from the workspace's grad_logit.
template <typename T>
void launch_grad_weight(const Workspace<T>& workspace, const AccumulateType<T>* mean, T* grad_weight,
                        const DualPoolAttentionSizes& sizes, cudaStream_t stream) {
  LAUNCH(dual_pool_attention_backward_weight_kernel<T>, dim3(grid_x(sizes.taps)), dim3(kTileThreads), 0, stream,
         workspace.grad_logit, mean, grad_weight, sizes.planes(), sizes.channels, sizes.taps);
}

}  // namespace
}  // namespace restoration

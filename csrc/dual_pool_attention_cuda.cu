// Dual pooling attention in CUDA: formula in dual_pool_attention.h. The template for new <op>_cuda.cu files.
// A thread visits its columns and rows of one tile in plane after plane (plane_tiles.cuh); a plane is one channel.
// Forward: pooling weights (rows, columns) -> weighted sum of each tile -> mean -> y; mean and scale saved.
// Backward: sum of grad_y · x of each tile -> grad_logit -> grad_x; grad_weight with a block for each tap.
// Read and written: x twice and y once; grad_y twice, x and grad_x once. No atomics: the same bits on every run.

#include "dual_pool_attention.cuh"

namespace restoration {
namespace {

// partial[plane, tile] = sum over the tile of grad_y · x.
template <typename T, bool kAligned, typename A = AccumulateType<T>>
__global__ void __launch_bounds__(kTileThreads, kTileBlocks)
    dual_pool_attention_backward_reduce_kernel(const T* __restrict__ grad_y, const T* __restrict__ x,
                                               A* __restrict__ partial, Tiling tiling, int64_t planes) {
  using Tile = ThreadTile<T, kAligned>;
  constexpr int kCount = Tile::kCount, kRowsInFlight = Tile::kRowsInFlight;
  const Tile tile(tiling);
  for (int64_t plane = blockIdx.y; plane < planes; plane += gridDim.y) {
    const int64_t offset = plane * tiling.height * tiling.width;
    A sum = 0;
#pragma unroll 1
    for (int first = tile.first_row; first < tile.last_row; first = tile.row(first, kRowsInFlight)) {
      A grads[kRowsInFlight][kCount], values[kRowsInFlight][kCount];
      tile.load_rows(grad_y + offset, first, grads);
      tile.load_rows(x + offset, first, values);
#pragma unroll
      for (int part = 0; part < kRowsInFlight; ++part) {
#pragma unroll
        for (int place = 0; place < kCount; ++place) sum += grads[part][place] * values[part][place];
      }
    }
    sum = block_sum(sum);
    if (threadIdx.x == 0 && threadIdx.y == 0) partial[plane * gridDim.x + blockIdx.x] = sum;
  }
}

// y = x · scale, and scale itself. The planes come last to first: the last ones read are still in the L2 cache.
template <typename T, bool kAligned, typename A = AccumulateType<T>>
__global__ void __launch_bounds__(kTileThreads, kTileBlocks)
    dual_pool_attention_forward_scale_kernel(const T* __restrict__ x, const T* __restrict__ weight,
                                             const A* __restrict__ mean, T* __restrict__ y, A* __restrict__ scale,
                                             Tiling tiling, int64_t planes, int64_t channels, int64_t taps) {
  using Tile = ThreadTile<T, kAligned>;
  constexpr int kCount = Tile::kCount, kRowsInFlight = Tile::kRowsInFlight;
  const Tile tile(tiling);
  for (int64_t plane = planes - 1 - blockIdx.y; plane >= 0; plane -= gridDim.y) {
    const int64_t channel = channel_of(plane, channels);
    const A factor = channel_scale(mean + plane - channel, weight, taps, channel, channels);
    if (blockIdx.x == 0 && threadIdx.x == 0 && threadIdx.y == 0) scale[plane] = factor;
#pragma unroll kRowsInFlight
    for (int row = tile.first_row; row < tile.last_row; row += blockDim.y) {
      const int64_t offset = (plane * tiling.height + row) * tiling.width;
      A values[kCount];
      tile.load(x + offset, values);
#pragma unroll
      for (int place = 0; place < kCount; ++place) values[place] *= factor;
      tile.store(y + offset, values);
    }
  }
}

// grad_x = grad_y · scale + grad_mean · rows · columns, planes last to first.
template <typename T, bool kAligned, typename A = AccumulateType<T>>
__global__ void __launch_bounds__(kTileThreads, kTileBlocks)
    dual_pool_attention_backward_input_kernel(const T* __restrict__ grad_y, const T* __restrict__ weight,
                                              const A* __restrict__ scale, const A* __restrict__ grad_logit,
                                              const A* __restrict__ rows, const A* __restrict__ columns,
                                              T* __restrict__ grad_x, Tiling tiling, int64_t planes, int64_t channels,
                                              int64_t taps) {
  using Tile = ThreadTile<T, kAligned>;
  constexpr int kCount = Tile::kCount, kRowsInFlight = Tile::kRowsInFlight;
  const Tile tile(tiling);
  A column_weights[kCount];
  tile.load(columns, column_weights);
  for (int64_t plane = planes - 1 - blockIdx.y; plane >= 0; plane -= gridDim.y) {
    const int64_t channel = channel_of(plane, channels);
    const A grad_mean = channel_grad_mean(grad_logit + plane - channel, weight, taps, channel, channels);
    const A factor = scale[plane];
#pragma unroll kRowsInFlight
    for (int row = tile.first_row; row < tile.last_row; row += blockDim.y) {
      const int64_t offset = (plane * tiling.height + row) * tiling.width;
      const A row_grad = grad_mean * rows[row];
      A values[kCount];
      tile.load(grad_y + offset, values);
#pragma unroll
      for (int place = 0; place < kCount; ++place) {
        values[place] = values[place] * factor + row_grad * column_weights[place];
      }
      tile.store(grad_x + offset, values);
    }
  }
}

template <typename T, bool kAligned>
void launch_forward(const DualPoolAttentionForward& arguments, const DualPoolAttentionSizes& sizes, void* memory,
                    cudaStream_t stream) {
  using A = AccumulateType<T>;
  const Tiling tiling = Tiling::of<T>(sizes.height, sizes.width);
  const Workspace<T> workspace(memory, sizes, tiling.tiles);
  const T* x = static_cast<const T*>(arguments.x);
  const T* weight = static_cast<const T*>(arguments.weight);
  A* mean = static_cast<A*>(arguments.mean);
  const int64_t planes = sizes.planes();
  if (planes == 0) return;
  launch_means<T, kAligned>(x, workspace, mean, sizes, stream);
  LAUNCH((dual_pool_attention_forward_scale_kernel<T, kAligned>), tiling.grid(planes), tiling.block(), 0, stream, x,
         weight, mean, static_cast<T*>(arguments.y), static_cast<A*>(arguments.scale), tiling, planes, sizes.channels,
         sizes.taps);
}

template <typename T, bool kAligned>
void launch_backward(const DualPoolAttentionBackward& arguments, const DualPoolAttentionSizes& sizes, void* memory,
                     cudaStream_t stream) {
  using A = AccumulateType<T>;
  const Tiling tiling = Tiling::of<T>(sizes.height, sizes.width);
  const Workspace<T> workspace(memory, sizes, tiling.tiles);
  const T* grad_y = static_cast<const T*>(arguments.grad_y);
  const A* scale = static_cast<const A*>(arguments.scale);
  const int64_t planes = sizes.planes();
  if (planes > 0) {
    LAUNCH((dual_pool_attention_backward_reduce_kernel<T, kAligned>), tiling.grid(planes), tiling.block(), 0, stream,
           grad_y, static_cast<const T*>(arguments.x), workspace.partial, tiling, planes);
    launch_sum<A>(workspace.partial, scale, workspace.grad_logit, planes, tiling.tiles, stream);
  }
  if (arguments.grad_weight != nullptr) {
    launch_grad_weight(workspace, static_cast<const A*>(arguments.mean), static_cast<T*>(arguments.grad_weight), sizes,
                       stream);
  }
  if (arguments.grad_x != nullptr && planes > 0) {
    launch_weights(workspace.rows, workspace.columns, sizes, stream);
    LAUNCH((dual_pool_attention_backward_input_kernel<T, kAligned>), tiling.grid(planes), tiling.block(), 0, stream,
           grad_y, static_cast<const T*>(arguments.weight), scale, workspace.grad_logit, workspace.rows,
           workspace.columns, static_cast<T*>(arguments.grad_x), tiling, planes, sizes.channels, sizes.taps);
  }
}

}  // namespace

int64_t dual_pool_attention_workspace(const DualPoolAttentionSizes& sizes, DType dtype) {
  int64_t bytes = 0;
  dispatch_cuda_dtype("dual_pool_attention", dtype, [&](auto tag) {
    using T = typename decltype(tag)::Type;
    bytes = Workspace<T>(nullptr, sizes, Tiling::of<T>(sizes.height, sizes.width).tiles).bytes();
  });
  return bytes;
}

void launch_dual_pool_attention_forward(const DualPoolAttentionForward& arguments, const DualPoolAttentionSizes& sizes,
                                        DType dtype, void* workspace, void* stream) {
  dispatch_cuda_dtype("dual_pool_attention", dtype, [&](auto tag) {
    using T = typename decltype(tag)::Type;
    const auto launch =
        rows_are_aligned<T>(sizes.width, arguments.x, arguments.y) ? launch_forward<T, true> : launch_forward<T, false>;
    launch(arguments, sizes, workspace, static_cast<cudaStream_t>(stream));
  });
}

void launch_dual_pool_attention_backward(const DualPoolAttentionBackward& arguments,
                                         const DualPoolAttentionSizes& sizes, DType dtype, void* workspace,
                                         void* stream) {
  dispatch_cuda_dtype("dual_pool_attention", dtype, [&](auto tag) {
    using T = typename decltype(tag)::Type;
    const bool aligned = rows_are_aligned<T>(sizes.width, arguments.grad_y, arguments.x, arguments.grad_x);
    const auto launch = aligned ? launch_backward<T, true> : launch_backward<T, false>;
    launch(arguments, sizes, workspace, static_cast<cudaStream_t>(stream));
  });
}

}  // namespace restoration

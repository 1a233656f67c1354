// Dual pooling attention into a padded map with channels last, in CUDA: formula in dual_pool_attention_pad2d.h.
// x lies in planes, y in pixels: a block turns a tile of some rows, columns and channels over (turned_tiles.cuh).
// Forward: means as in dual_pool_attention.cuh -> y and its mirrored pixels; mean and scale saved.
// Backward: sum of grad_y · x of each tile -> grad_logit -> grad_x; grad_weight with a block for each tap.
// Read and written: x twice and y once; grad_y twice, x, grad_addend and grad_x once. No atomics: the same bits always.

#include "dual_pool_attention.cuh"
#include "dual_pool_attention_pad2d.h"
#include "turned_tiles.cuh"

namespace restoration {
namespace {

TiledMap tiled(const DualPoolAttentionPad2dSizes& sizes) {
  return {sizes.map.channels, sizes.map.height, sizes.map.width, sizes.padding};
}

// A tile and what mirrors it in the padding.
struct PaddedTile : Tile {
  using Tile::Tile;

  // Calls call(number, offset) for the mirrors in pixels of the thread's numbers. Few numbers have any: no loop is
  // unrolled, so that these take no registers from the others.
  template <typename Call>
  __device__ __forceinline__ void for_each_mirror(Call call) const {
    const bool mirrored_rows = first_row <= map.padding || first_row + kTileRows >= map.height - map.padding;
#pragma unroll 1
    for (int part = 0; part < kParts; ++part) {
      const PaddedPlaces<int> columns(first_column + InPixels::column(part), map.width, map.padding);
      if (!inside<InPixels>(part) || !(mirrored_rows || columns.has_mirrors())) continue;
#pragma unroll 1
      for (int number = part; number < kNumbers && row(number) < map.height; number += kParts) {
        const PaddedPlaces<int> rows(row(number), map.height, map.padding);
#pragma unroll 1
        for (int place = 1; place < 9; ++place) {
          const int padded_row = rows.place(place / 3), padded_column = columns.place(place % 3);
          if (padded_row >= 0 && padded_column >= 0) call(number, pixel_offset(padded_row, padded_column));
        }
      }
    }
  }

  // Turns over the gradient before padding, zero beyond its edges.
  template <typename Y, typename A>
  __device__ __forceinline__ void turn_folded(const Y* __restrict__ grad_y, A* tile) const {
    turn_pixels(grad_y, tile);
    for_each_mirror(
        [&](int number, int64_t offset) { turned<InPixels>(tile, number) += static_cast<A>(grad_y[offset]); });
    __syncthreads();
  }
};

// y = x · scale with its mirrored pixels, and scale itself. The tiles come last to first: what the pass before read last
// is still in the L2 cache.
template <typename T, typename Y, typename A = AccumulateType<T>>
__global__ void __launch_bounds__(kTileThreads, kTileBlocks)
    dual_pool_attention_pad2d_forward_kernel(const T* __restrict__ x, const T* __restrict__ weight,
                                             const A* __restrict__ mean, Y* __restrict__ y, A* __restrict__ scale,
                                             TiledMap map, int64_t taps) {
  SHARED_ARRAY(A, tile_values, kTurnedNumbers);
  SHARED_ARRAY(A, factors, kTileChannels);
  const PaddedTile tile(map, gridDim.x - 1 - blockIdx.x);
  A values[kNumbers];
  tile.load_planes(x + tile.image * map.image_elements(), values);
#pragma unroll
  for (int number = 0; number < kNumbers; ++number) turned<InPlanes>(tile_values, number) = values[number];
  const int channel = tile.first_channel + threadIdx.x;
  if (threadIdx.x < kTileChannels && channel < map.channels) {
    const int64_t first_plane = tile.image * map.channels;
    const A factor = channel_scale(mean + first_plane, weight, taps, channel, map.channels);
    factors[threadIdx.x] = factor;
    if (tile.index == 0) scale[first_plane + channel] = factor;
  }
  __syncthreads();
  Y* image_y = y + tile.image * map.padded_elements();
  const A factor = factors[InPixels::channel(0)];
#pragma unroll
  for (int number = 0; number < kNumbers; ++number) {
    if (!tile.inside<InPixels>(number)) continue;
    image_y[tile.own_offset(number)] = Y(turned<InPixels>(tile_values, number) * factor);
  }
  tile.for_each_mirror(
      [&](int number, int64_t offset) { image_y[offset] = Y(turned<InPixels>(tile_values, number) * factor); });
}

// partial[plane, tile] = sum over the tile of x · the gradient before padding.
template <typename T, typename Y, typename A = AccumulateType<T>>
__global__ void __launch_bounds__(kTileThreads, kTileBlocks)
    dual_pool_attention_pad2d_backward_reduce_kernel(const Y* __restrict__ grad_y, const T* __restrict__ x,
                                                     A* __restrict__ partial, TiledMap map) {
  constexpr int kWarps = kTileThreads / kWarpThreads, kWarpsInRow = kTileColumns / kWarpThreads;
  SHARED_ARRAY(A, tile_grads, kTurnedNumbers);
  SHARED_ARRAY(A, warp_sums, kWarps * kParts);
  const PaddedTile tile(map, blockIdx.x);
  tile.turn_folded(grad_y + tile.image * map.padded_elements(), tile_grads);
  A values[kNumbers];
  tile.load_planes(x + tile.image * map.image_elements(), values);
  // A whole warp has the same channel in each part.
#pragma unroll
  for (int part = 0; part < kParts; ++part) {
    A sum = 0;
#pragma unroll
    for (int number = part; number < kNumbers; number += kParts) {
      sum += values[number] * turned<InPlanes>(tile_grads, number);
    }
    sum = warp_sum(sum);
    if (threadIdx.x % kWarpThreads == 0) warp_sums[part * kWarps + threadIdx.x / kWarpThreads] = sum;
  }
  __syncthreads();
  const int channel = tile.first_channel + threadIdx.x;
  if (threadIdx.x < kTileChannels && channel < map.channels) {
    // The warps of a channel are neighbours, and channels come in the order of InPlanes.
    A sum = 0;
    for (int warp = 0; warp < kWarpsInRow; ++warp) sum += warp_sums[threadIdx.x * kWarpsInRow + warp];
    partial[(tile.image * map.channels + channel) * map.tiles + tile.index] = sum;
  }
}

// grad_x = scale · the gradient before padding + grad_mean · rows · columns + grad_addend, tiles last to first.
template <typename T, typename Y, typename A = AccumulateType<T>>
__global__ void __launch_bounds__(kTileThreads, kTileBlocks)
    dual_pool_attention_pad2d_backward_input_kernel(const Y* __restrict__ grad_y, const T* __restrict__ weight,
                                                    const A* __restrict__ scale, const A* __restrict__ grad_logit,
                                                    const A* __restrict__ rows, const A* __restrict__ columns,
                                                    const T* __restrict__ grad_addend, T* __restrict__ grad_x,
                                                    TiledMap map, int64_t taps) {
  SHARED_ARRAY(A, tile_grads, kTurnedNumbers);
  SHARED_ARRAY(A, factors, kTileChannels);
  SHARED_ARRAY(A, grad_means, kTileChannels);
  const PaddedTile tile(map, gridDim.x - 1 - blockIdx.x);
  const int column = tile.first_column + InPlanes::column(0);
  const A column_weight = column < map.width ? columns[column] : A(0);
  const int channel = tile.first_channel + threadIdx.x;
  if (threadIdx.x < kTileChannels && channel < map.channels) {
    const int64_t first_plane = tile.image * map.channels;
    factors[threadIdx.x] = scale[first_plane + channel];
    grad_means[threadIdx.x] = channel_grad_mean(grad_logit + first_plane, weight, taps, channel, map.channels);
  }
  tile.turn_folded(grad_y + tile.image * map.padded_elements(), tile_grads);
  const int64_t first = tile.image * map.image_elements();
  // A row's loads are in flight together; those of all rows would take more registers than there are.
#pragma unroll 1
  for (int row = 0; row < kNumbers; row += kParts) {
    A addends[kParts] = {};
    if (grad_addend != nullptr) {
#pragma unroll
      for (int part = 0; part < kParts; ++part) {
        if (!tile.inside<InPlanes>(row + part)) continue;
        addends[part] = static_cast<A>(grad_addend[first + tile.plane_offset(row + part)]);
      }
    }
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      const int number = row + part, channel = InPlanes::channel(number);
      if (!tile.inside<InPlanes>(number)) continue;
      const A mean_share = grad_means[channel] * rows[tile.row(number)] * column_weight;
      const A gradient = turned<InPlanes>(tile_grads, number) * factors[channel] + mean_share;
      grad_x[first + tile.plane_offset(number)] = T(gradient + addends[part]);
    }
  }
}

template <typename T>
Workspace<T> workspace_of(void* memory, const DualPoolAttentionPad2dSizes& sizes) {
  const int64_t tiles = std::max(Tiling::of<T>(sizes.map.height, sizes.map.width).tiles, tiled(sizes).tiles);
  return Workspace<T>(memory, sizes.map, tiles);
}

template <typename T, typename Y>
void launch_forward(const DualPoolAttentionForward& arguments, const DualPoolAttentionPad2dSizes& sizes, void* memory,
                    cudaStream_t stream) {
  using A = AccumulateType<T>;
  if (sizes.map.planes() == 0) return;
  const TiledMap map = tiled(sizes);
  const T* x = static_cast<const T*>(arguments.x);
  A* mean = static_cast<A*>(arguments.mean);
  const auto means = rows_are_aligned<T>(sizes.map.width, x) ? launch_means<T, true> : launch_means<T, false>;
  means(x, workspace_of<T>(memory, sizes), mean, sizes.map, stream);
  LAUNCH((dual_pool_attention_pad2d_forward_kernel<T, Y>), map.grid(sizes.map.batch), dim3(kTileThreads), 0, stream, x,
         static_cast<const T*>(arguments.weight), mean, static_cast<Y*>(arguments.y), static_cast<A*>(arguments.scale),
         map, sizes.map.taps);
}

template <typename T, typename Y>
void launch_backward(const DualPoolAttentionPad2dBackward& arguments, const DualPoolAttentionPad2dSizes& sizes,
                     void* memory, cudaStream_t stream) {
  using A = AccumulateType<T>;
  const TiledMap map = tiled(sizes);
  const Workspace<T> workspace = workspace_of<T>(memory, sizes);
  const Y* grad_y = static_cast<const Y*>(arguments.grad_y);
  const A* scale = static_cast<const A*>(arguments.scale);
  const int64_t batch = sizes.map.batch, planes = sizes.map.planes();
  if (planes > 0) {
    LAUNCH((dual_pool_attention_pad2d_backward_reduce_kernel<T, Y>), map.grid(batch), dim3(kTileThreads), 0, stream,
           grad_y, static_cast<const T*>(arguments.x), workspace.partial, map);
    launch_sum<A>(workspace.partial, scale, workspace.grad_logit, planes, map.tiles, stream);
  }
  if (arguments.grad_weight != nullptr) {
    launch_grad_weight(workspace, static_cast<const A*>(arguments.mean), static_cast<T*>(arguments.grad_weight),
                       sizes.map, stream);
  }
  if (arguments.grad_x != nullptr && planes > 0) {
    launch_weights(workspace.rows, workspace.columns, sizes.map, stream);
    LAUNCH((dual_pool_attention_pad2d_backward_input_kernel<T, Y>), map.grid(batch), dim3(kTileThreads), 0, stream,
           grad_y, static_cast<const T*>(arguments.weight), scale, workspace.grad_logit, workspace.rows,
           workspace.columns, static_cast<const T*>(arguments.grad_addend), static_cast<T*>(arguments.grad_x), map,
           sizes.map.taps);
  }
}

// Calls call(tag of the dtype, tag of the output's).
template <typename Call>
void dispatch_dtypes(DType dtype, DType output_dtype, Call call) {
  constexpr const char* kName = "dual_pool_attention_pad2d";
  dispatch_cuda_dtype(kName, dtype, [&](auto tag) {
    if (output_dtype == dtype) return call(tag, tag);
    if constexpr (std::is_same_v<typename decltype(tag)::Type, float>) {
      if (output_dtype == DType::bfloat16) return call(tag, TypeTag<__nv_bfloat16>());
      if (output_dtype == DType::float16) return call(tag, TypeTag<__half>());
    }
    refuse_dtype(kName, output_dtype);
  });
}

}  // namespace

int64_t dual_pool_attention_pad2d_workspace(const DualPoolAttentionPad2dSizes& sizes, DType dtype) {
  int64_t bytes = 0;
  dispatch_cuda_dtype("dual_pool_attention_pad2d", dtype, [&](auto tag) {
    bytes = workspace_of<typename decltype(tag)::Type>(nullptr, sizes).bytes();
  });
  return bytes;
}

void launch_dual_pool_attention_pad2d_forward(const DualPoolAttentionForward& arguments,
                                              const DualPoolAttentionPad2dSizes& sizes, DType dtype, DType output_dtype,
                                              void* workspace, void* stream) {
  dispatch_dtypes(dtype, output_dtype, [&](auto tag, auto output_tag) {
    launch_forward<typename decltype(tag)::Type, typename decltype(output_tag)::Type>(
        arguments, sizes, workspace, static_cast<cudaStream_t>(stream));
  });
}

void launch_dual_pool_attention_pad2d_backward(const DualPoolAttentionPad2dBackward& arguments,
                                               const DualPoolAttentionPad2dSizes& sizes, DType dtype,
                                               DType output_dtype, void* workspace, void* stream) {
  dispatch_dtypes(dtype, output_dtype, [&](auto tag, auto output_tag) {
    launch_backward<typename decltype(tag)::Type, typename decltype(output_tag)::Type>(
        arguments, sizes, workspace, static_cast<cudaStream_t>(stream));
  });
}

}  // namespace restoration

// Dual pooling attention into a padded map with channels last, in CUDA: formula in dual_pool_attention_pad2d.h.
// x lies in planes, y in pixels. A block owns a tile of some rows, columns and channels: it loads the tile in the order
// of the one, turns it over in shared memory, and stores it in the order of the other, so that neighbouring threads
// always touch neighbouring numbers.
// Forward: means as in dual_pool_attention.cuh -> y and its mirrored pixels; mean and scale saved.
// Backward: sum of grad_y · x of each tile -> grad_logit -> grad_x; grad_weight with a block for each tap.
// Read and written: x twice and y once; grad_y twice, x and grad_x once. No atomics: the same bits on every run.

#include "dual_pool_attention.cuh"
#include "dual_pool_attention_pad2d.h"

namespace restoration {
namespace {

// 16 channels are whole sectors of 32 bytes in every dtype, and all that the network has at full size. A thread has four
// numbers in each of four rows: 16 loads in flight, and 2,000 blocks for two maps of 16 channels of 512².
constexpr int kTileChannels = 16;
constexpr int kTileColumns = 64;
constexpr int kTileRows = 4;
constexpr int kParts = kTileChannels * kTileColumns / kTileThreads;
constexpr int kNumbers = kTileRows * kParts;
// Between the channels of a turned row: neighbouring channels of two columns then lie in different banks.
constexpr int kPitch = kTileColumns + 2;
constexpr int kTurnedNumbers = kTileRows * kTileChannels * kPitch;

// Which numbers of its block's tile a thread has: its row is number / kParts, its column and channel are these.
struct InPlanes {
  __device__ static int column(int) { return threadIdx.x % kTileColumns; }
  __device__ static int channel(int number) {
    return threadIdx.x / kTileColumns + number % kParts * (kTileThreads / kTileColumns);
  }
};
struct InPixels {
  __device__ static int column(int number) {
    return threadIdx.x / kTileChannels + number % kParts * (kTileThreads / kTileChannels);
  }
  __device__ static int channel(int) { return threadIdx.x % kTileChannels; }
};

template <typename Order, typename A>
__device__ __forceinline__ A& turned(A* tile, int number) {
  return tile[(number / kParts * kTileChannels + Order::channel(number)) * kPitch + Order::column(number)];
}

// The map and how it is cut into tiles, a block each. In 32 bits, as in plane_tiles.cuh.
struct TiledMap {
  int channels;
  int height;
  int width;
  int padding;
  int column_tiles;
  int channel_tiles;
  int tiles;  // of one plane

  explicit TiledMap(const DualPoolAttentionPad2dSizes& sizes)
      : channels(static_cast<int>(sizes.map.channels)),
        height(static_cast<int>(sizes.map.height)),
        width(static_cast<int>(sizes.map.width)),
        padding(static_cast<int>(sizes.padding)),
        column_tiles(static_cast<int>(ceil_divide(sizes.map.width, kTileColumns))),
        channel_tiles(static_cast<int>(ceil_divide(sizes.map.channels, kTileChannels))),
        tiles(static_cast<int>(column_tiles * ceil_divide(sizes.map.height, kTileRows))) {}

  dim3 grid(int64_t batch) const { return dim3(static_cast<unsigned>(batch * tiles * channel_tiles)); }
  __device__ int64_t image_elements() const { return int64_t{channels} * height * width; }
  __device__ int64_t padded_elements() const {
    return int64_t{channels} * (height + 2 * padding) * (width + 2 * padding);
  }
};

// One tile of the map. Channel tiles of the same pixels are neighbours: together they fill the lines of y.
struct Tile {
  const TiledMap& map;
  int index;  // in its plane
  int64_t image;
  int first_channel;
  int first_row;
  int first_column;

  __device__ Tile(const TiledMap& map, unsigned number)
      : map(map),
        index(number / map.channel_tiles % map.tiles),
        image(number / map.channel_tiles / map.tiles),
        first_channel(number % map.channel_tiles * kTileChannels),
        first_row(index / map.column_tiles * kTileRows),
        first_column(index % map.column_tiles * kTileColumns) {}

  __device__ int row(int number) const { return first_row + number / kParts; }

  template <typename Order>
  __device__ bool inside(int number) const {
    return row(number) < map.height && first_column + Order::column(number) < map.width &&
           first_channel + Order::channel(number) < map.channels;
  }

  // Of a number in planes [C,H,W].
  __device__ int64_t plane_offset(int number) const {
    const int64_t channel = first_channel + InPlanes::channel(number);
    return (channel * map.height + row(number)) * map.width + first_column + InPlanes::column(number);
  }

  // Of a number of the thread's channel in pixels [H+2p,W+2p,C], by its place in the padded map.
  __device__ int64_t pixel_offset(int padded_row, int padded_column) const {
    const int64_t pixel = int64_t{padded_row} * (map.width + 2 * map.padding) + padded_column;
    return pixel * map.channels + first_channel + InPixels::channel(0);
  }
  __device__ int64_t own_offset(int number) const {
    return pixel_offset(row(number) + map.padding, first_column + InPixels::column(number) + map.padding);
  }

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

  // The thread's numbers of planes, zero beyond their edges.
  template <typename T, typename A>
  __device__ __forceinline__ void load_planes(const T* __restrict__ x, A (&values)[kNumbers]) const {
#pragma unroll
    for (int number = 0; number < kNumbers; ++number) {
      values[number] = inside<InPlanes>(number) ? static_cast<A>(x[plane_offset(number)]) : A(0);
    }
  }

  // Turns over the gradient before padding, zero beyond its edges.
  template <typename Y, typename A>
  __device__ __forceinline__ void turn_folded(const Y* __restrict__ grad_y, A* tile) const {
#pragma unroll
    for (int number = 0; number < kNumbers; ++number) {
      turned<InPixels>(tile, number) = inside<InPixels>(number) ? static_cast<A>(grad_y[own_offset(number)]) : A(0);
    }
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
  const Tile tile(map, gridDim.x - 1 - blockIdx.x);
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
  const Tile tile(map, blockIdx.x);
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

// grad_x = scale · the gradient before padding + grad_mean · rows · columns, tiles last to first.
template <typename T, typename Y, typename A = AccumulateType<T>>
__global__ void __launch_bounds__(kTileThreads, kTileBlocks)
    dual_pool_attention_pad2d_backward_input_kernel(const Y* __restrict__ grad_y, const T* __restrict__ weight,
                                                    const A* __restrict__ scale, const A* __restrict__ grad_logit,
                                                    const A* __restrict__ rows, const A* __restrict__ columns,
                                                    T* __restrict__ grad_x, TiledMap map, int64_t taps) {
  SHARED_ARRAY(A, tile_grads, kTurnedNumbers);
  SHARED_ARRAY(A, factors, kTileChannels);
  SHARED_ARRAY(A, grad_means, kTileChannels);
  const Tile tile(map, gridDim.x - 1 - blockIdx.x);
  const int column = tile.first_column + InPlanes::column(0);
  const A column_weight = column < map.width ? columns[column] : A(0);
  const int channel = tile.first_channel + threadIdx.x;
  if (threadIdx.x < kTileChannels && channel < map.channels) {
    const int64_t first_plane = tile.image * map.channels;
    factors[threadIdx.x] = scale[first_plane + channel];
    grad_means[threadIdx.x] = channel_grad_mean(grad_logit + first_plane, weight, taps, channel, map.channels);
  }
  tile.turn_folded(grad_y + tile.image * map.padded_elements(), tile_grads);
  T* image_grad_x = grad_x + tile.image * map.image_elements();
#pragma unroll
  for (int number = 0; number < kNumbers; ++number) {
    if (!tile.inside<InPlanes>(number)) continue;
    const int channel = InPlanes::channel(number);
    const A mean_share = grad_means[channel] * rows[tile.row(number)] * column_weight;
    image_grad_x[tile.plane_offset(number)] = T(turned<InPlanes>(tile_grads, number) * factors[channel] + mean_share);
  }
}

template <typename T>
Workspace<T> workspace_of(void* memory, const DualPoolAttentionPad2dSizes& sizes) {
  const int64_t tiles = std::max(Tiling::of<T>(sizes.map.height, sizes.map.width).tiles, TiledMap(sizes).tiles);
  return Workspace<T>(memory, sizes.map, tiles);
}

template <typename T, typename Y>
void launch_forward(const DualPoolAttentionForward& arguments, const DualPoolAttentionPad2dSizes& sizes, void* memory,
                    cudaStream_t stream) {
  using A = AccumulateType<T>;
  if (sizes.map.planes() == 0) return;
  const TiledMap map(sizes);
  const T* x = static_cast<const T*>(arguments.x);
  A* mean = static_cast<A*>(arguments.mean);
  const auto means = rows_are_aligned<T>(sizes.map.width, x) ? launch_means<T, true> : launch_means<T, false>;
  means(x, workspace_of<T>(memory, sizes), mean, sizes.map, stream);
  LAUNCH((dual_pool_attention_pad2d_forward_kernel<T, Y>), map.grid(sizes.map.batch), dim3(kTileThreads), 0, stream, x,
         static_cast<const T*>(arguments.weight), mean, static_cast<Y*>(arguments.y), static_cast<A*>(arguments.scale),
         map, sizes.map.taps);
}

template <typename T, typename Y>
void launch_backward(const DualPoolAttentionBackward& arguments, const DualPoolAttentionPad2dSizes& sizes, void* memory,
                     cudaStream_t stream) {
  using A = AccumulateType<T>;
  const TiledMap map(sizes);
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
           workspace.columns, static_cast<T*>(arguments.grad_x), map, sizes.map.taps);
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

void launch_dual_pool_attention_pad2d_backward(const DualPoolAttentionBackward& arguments,
                                               const DualPoolAttentionPad2dSizes& sizes, DType dtype,
                                               DType output_dtype, void* workspace, void* stream) {
  dispatch_dtypes(dtype, output_dtype, [&](auto tag, auto output_tag) {
    launch_backward<typename decltype(tag)::Type, typename decltype(output_tag)::Type>(
        arguments, sizes, workspace, static_cast<cudaStream_t>(stream));
  });
}

}  // namespace restoration

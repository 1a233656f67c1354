// Maps that lie in planes [C,H,W] and maps that lie in pixels [H,W,C], how one is made of the other in CUDA. A block
// owns a tile of some rows, columns and channels: it loads the tile in the order of the one, turns it over in shared
// memory, and stores it in the order of the other, so that neighbouring threads always touch neighbouring numbers.
#pragma once

#include "plane_tiles.cuh"

namespace restoration {

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

  TiledMap(int64_t channels, int64_t height, int64_t width, int64_t padding)
      : channels(static_cast<int>(channels)),
        height(static_cast<int>(height)),
        width(static_cast<int>(width)),
        padding(static_cast<int>(padding)),
        column_tiles(static_cast<int>(ceil_divide(width, kTileColumns))),
        channel_tiles(static_cast<int>(ceil_divide(channels, kTileChannels))),
        tiles(static_cast<int>(column_tiles * ceil_divide(height, kTileRows))) {}

  dim3 grid(int64_t batch) const { return dim3(grid_x(batch * tiles * channel_tiles)); }
  __device__ int64_t image_elements() const { return int64_t{channels} * height * width; }
  __device__ int64_t padded_elements() const {
    return int64_t{channels} * (height + 2 * padding) * (width + 2 * padding);
  }
};

// One tile of the map. Channel tiles of the same pixels are neighbours: together they fill the lines of pixels.
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

  // Of a number in planes [C,H,W]: its channel, and its place in the plane.
  __device__ int plane(int number) const { return first_channel + InPlanes::channel(number); }
  __device__ int64_t plane_place(int number) const {
    return int64_t{row(number)} * map.width + first_column + InPlanes::column(number);
  }
  __device__ int64_t plane_offset(int number) const {
    return int64_t{plane(number)} * map.height * map.width + plane_place(number);
  }

  // Of a number of the thread's channel in pixels [H+2p,W+2p,C], by its place in the padded map.
  __device__ int64_t pixel_offset(int padded_row, int padded_column) const {
    const int64_t pixel = int64_t{padded_row} * (map.width + 2 * map.padding) + padded_column;
    return pixel * map.channels + first_channel + InPixels::channel(0);
  }
  __device__ int64_t own_offset(int number) const {
    return pixel_offset(row(number) + map.padding, first_column + InPixels::column(number) + map.padding);
  }

  // The thread's numbers of pixels, turned over, zero beyond their edges. A barrier must follow. What is beyond is read
  // at the image's beginning: behind a branch, no load could be under way with the next.
  template <typename T, typename A>
  __device__ __forceinline__ void turn_pixels(const T* __restrict__ pixels, A* tile) const {
    T values[kNumbers];
#pragma unroll
    for (int number = 0; number < kNumbers; ++number) {
      values[number] = pixels[inside<InPixels>(number) ? own_offset(number) : 0];
    }
#pragma unroll
    for (int number = 0; number < kNumbers; ++number) {
      turned<InPixels>(tile, number) = inside<InPixels>(number) ? static_cast<A>(values[number]) : A(0);
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
};

}  // namespace restoration

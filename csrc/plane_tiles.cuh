// How operators that visit every pixel of [B,C,H,W] once share the work. A plane is one channel of one image. A block
// owns a tile of the plane and visits that tile in plane after plane; a thread owns a vector of columns of the tile and
// every blockDim.y-th row. The cut depends on the sizes alone, so that sums over tiles have the same bits on every
// device of one architecture.
#pragma once

#include <algorithm>
#include <stdexcept>
#include <string>

#include "common.cuh"

namespace restoration {

// 8 warps a block and 4 blocks a multiprocessor: 1024 threads, each with a few vectors in flight, keep its share of the
// memory bandwidth busy and leave 64 registers to each.
constexpr int kTileThreads = 256;
constexpr int kTileBlocks = 4;

// Rows that a thread visits in its tile. 16 vectors (64 float32) amortise the block's start and its reduction, and
// leave 256 blocks for the smallest map of the network (16 planes of 512²).
constexpr int kRowsPerThread = 16;

// Keeps the rows and columns of a tile, also beyond the edge of the image, in 32 bits: in 64 they cost too many
// registers.
constexpr int64_t kMaximumSide = int64_t{1} << 30;

// How a plane is cut into tiles; a block is (threads_x, threads_y).
struct Tiling {
  int height;
  int width;
  int threads_x;
  int threads_y;
  int tile_columns;
  int tile_rows;
  int column_tiles;
  int tiles;

  template <typename T>
  static Tiling of(int64_t height, int64_t width) {
    constexpr int kCount = Vector<T>::kCount;
    if (std::max(height, width) > kMaximumSide) {
      throw std::invalid_argument("height and width must be at most 2^30 in the cuda backend, got " +
                                  std::to_string(height) + " and " + std::to_string(width));
    }
    Tiling tiling;
    tiling.height = static_cast<int>(height);
    tiling.width = static_cast<int>(width);
    tiling.threads_x = power_of_two(ceil_divide(width, kCount), kTileThreads);
    tiling.threads_y = std::max(power_of_two(height, kTileThreads / tiling.threads_x), kWarpThreads / tiling.threads_x);
    tiling.tile_columns = tiling.threads_x * kCount;
    tiling.tile_rows = tiling.threads_y * kRowsPerThread;
    tiling.column_tiles = static_cast<int>(ceil_divide(width, tiling.tile_columns));
    tiling.tiles = static_cast<int>(tiling.column_tiles * ceil_divide(height, tiling.tile_rows));
    return tiling;
  }

  // The least power of two that is not below count, at most limit (a power of two).
  static int power_of_two(int64_t count, int limit) {
    int power = 1;
    while (power < count && power < limit) power *= 2;
    return power;
  }

  dim3 grid(int64_t planes) const {
    if (planes > UINT32_MAX) throw std::runtime_error(std::to_string(planes) + " planes are too many for CUDA");
    return dim3(tiles, grid_y(planes));
  }
  dim3 block() const { return dim3(threads_x, threads_y); }
};

// The rows and columns of one thread in the tile of its block. Where rows are aligned the columns are neighbours, moved
// as one vector; else they lie threads_x apart, so that the threads of a warp read neighbouring numbers.
template <typename T, bool kAligned>
struct ThreadTile {
  using A = AccumulateType<T>;
  static constexpr int kCount = Vector<T>::kCount;
  // 4 vectors of as many rows, 2 of the longer ones in 16 bits, whose numbers take as many registers, or the numbers of
  // one row, which are as many loads.
  static constexpr int kRowsInFlight = !kAligned ? 1 : sizeof(T) < sizeof(A) ? 2 : 4;

  int width;
  int first_row;
  int last_row;
  int first_column;
  int column_step;

  __device__ explicit ThreadTile(const Tiling& tiling) : width(tiling.width) {
    const int row = blockIdx.x / tiling.column_tiles * tiling.tile_rows;
    const int column = blockIdx.x % tiling.column_tiles * tiling.tile_columns;
    first_row = row + threadIdx.y;
    last_row = min(row + tiling.tile_rows, tiling.height);
    first_column = column + threadIdx.x * (kAligned ? kCount : 1);
    column_step = kAligned ? 1 : tiling.threads_x;
  }

  __device__ int column(int place) const { return first_column + place * column_step; }

  // values[place] = row[column(place)], zero outside the image.
  template <typename S>
  __device__ void load(const S* __restrict__ row, A (&values)[kCount]) const {
    if constexpr (kAligned && sizeof(S) == sizeof(T)) {
      Vector<S> vector = {};
      if (first_column < width) vector = *reinterpret_cast<const Vector<S>*>(row + first_column);
#pragma unroll
      for (int place = 0; place < kCount; ++place) values[place] = static_cast<A>(vector.values[place]);
    } else {
#pragma unroll
      for (int place = 0; place < kCount; ++place) {
        values[place] = column(place) < width ? static_cast<A>(row[column(place)]) : A(0);
      }
    }
  }

  // The row that is `part` of the thread's own rows after `first`; and the same, or the tile's last one where that is
  // beyond it. A load is moved there in place of a branch, behind which it could not be under way with the one before.
  __device__ int row(int first, int part) const { return first + part * static_cast<int>(blockDim.y); }
  __device__ int row_inside(int first, int part) const { return min(row(first, part), last_row - 1); }

  // values[part] = the numbers of row(first, part) of a plane, zero outside the tile.
  __device__ void load_rows(const T* __restrict__ plane, int first, A (&values)[kRowsInFlight][kCount]) const {
#pragma unroll
    for (int part = 0; part < kRowsInFlight; ++part) {
      load(plane + int64_t{row_inside(first, part)} * width, values[part]);
    }
#pragma unroll
    for (int part = 1; part < kRowsInFlight; ++part) {
#pragma unroll
      for (int place = 0; place < kCount; ++place) {
        if (row(first, part) >= last_row) values[part][place] = 0;
      }
    }
  }

  __device__ void store(T* __restrict__ row, const A (&values)[kCount]) const {
    if constexpr (kAligned) {
      Vector<T> vector;
#pragma unroll
      for (int place = 0; place < kCount; ++place) vector.values[place] = T(values[place]);
      if (first_column < width) *reinterpret_cast<Vector<T>*>(row + first_column) = vector;
    } else {
#pragma unroll
      for (int place = 0; place < kCount; ++place) {
        if (column(place) < width) row[column(place)] = T(values[place]);
      }
    }
  }
};

// In 32 bits, which hold every plane that Tiling::grid lets through: a division in 64 bits costs as much as the
// arithmetic of a whole tile.
__device__ __forceinline__ int64_t channel_of(int64_t plane, int64_t channels) {
  return static_cast<unsigned>(plane) % static_cast<unsigned>(channels);
}

// Whether every row of these tensors starts on a vector.
template <typename T, typename... Addresses>
bool rows_are_aligned(int64_t width, Addresses... addresses) {
  return width % Vector<T>::kCount == 0 && (is_aligned(addresses) && ...);
}

}  // namespace restoration

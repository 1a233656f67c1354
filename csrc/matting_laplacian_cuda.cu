// Matting Laplacian in CUDA: formula in matting_laplacian.h. Energy and product in one kernel: image and guide are read
// once from memory (nine times through the L1 cache), the product is written once.
// A block owns a tile of windows, a thread one window and the pixel in that window's upper left corner. The thread fits
// its window by the guide's colours, keeps the basis in registers, and takes one channel after the other: residuals,
// their sums along a row of pixels by shuffles within a warp, then along a column through shared memory. Tiles overlap
// by 2·radius windows, so that every pixel finds all of its windows in one block: no atomics, the same bits always.
// All of it in float64 or, of float32 tensors on GPUs where that is slow, in TwoFloat; docs/matting_laplacian.md compares
// their accuracy with that of float32.

#include <cmath>
#include <cstdlib>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "common.cuh"
#include "matting_laplacian.h"
#include "two_float.cuh"

namespace restoration {
namespace {

// One warp a row of windows. 16 rows: with less, neighbouring tiles share more windows than they must (a fifth is
// computed twice at radius 1); with more, a thread has not the 128 registers that basis and residuals take.
constexpr int kTileColumns = kWarpThreads;
constexpr int kTileRows = 16;
constexpr int kFitThreads = kTileColumns * kTileRows;

// Threads of the block that adds up the energy of one image.
constexpr int kSumThreads = 256;

// How images are cut into tiles of pixels, each 2·radius smaller than its tile of windows.
struct WindowTiles {
  int height;
  int width;
  int window_rows;
  int window_columns;
  int rows;
  int columns;
  int column_tiles;
  int64_t tiles;

  explicit WindowTiles(const MattingLaplacianSizes& sizes)
      : height(static_cast<int>(sizes.height)),
        width(static_cast<int>(sizes.width)),
        window_rows(static_cast<int>(sizes.window_rows())),
        window_columns(static_cast<int>(sizes.window_columns())),
        rows(static_cast<int>(kTileRows - 2 * sizes.radius)),
        columns(static_cast<int>(kTileColumns - 2 * sizes.radius)),
        column_tiles(static_cast<int>(ceil_divide(sizes.width, columns))),
        tiles(column_tiles * ceil_divide(sizes.height, rows)) {}
};

// The centred values of one plane in the window whose upper left corner is `corner`; zeros where there is no window.
template <int kSide, typename T, typename Real>
__device__ __forceinline__ void load_window(const T* __restrict__ corner, int width, bool exists,
                                            Real (&values)[kSide * kSide]) {
  UNROLL
  for (int i = 0; i < kSide; ++i) {
    UNROLL
    for (int j = 0; j < kSide; ++j) {
      values[i * kSide + j] = Real(exists ? corner[int64_t{i} * width + j] : T(0));
    }
  }
  centre_window(values);
}

__device__ __forceinline__ double lane_before(double value, int distance) {
  return __shfl_up_sync(kFullWarp, value, distance);
}
__device__ __forceinline__ TwoFloat lane_before(TwoFloat value, int distance) {
  return {__shfl_up_sync(kFullWarp, value.high, distance), __shfl_up_sync(kFullWarp, value.low, distance)};
}

// Sum of the residuals of all windows that contain this thread's pixel. `sums` holds kSide numbers for each thread.
template <int kSide, typename Real>
__device__ __forceinline__ Real gather(const Real (&residuals)[kSide * kSide], Real* sums) {
  const int thread = threadIdx.y * kTileColumns + threadIdx.x;
  UNROLL
  for (int i = 0; i < kSide; ++i) {
    Real sum = residuals[i * kSide];
    UNROLL
    for (int j = 1; j < kSide; ++j) sum += lane_before(residuals[i * kSide + j], j);
    sums[i * kFitThreads + thread] = sum;
  }
  __syncthreads();
  Real total = {};
  if (threadIdx.y >= kSide - 1) {
    UNROLL
    for (int i = 0; i < kSide; ++i) total += sums[i * kFitThreads + thread - i * kTileColumns];
  }
  __syncthreads();  // before the next channel overwrites `sums`
  return total;
}

// product = factor · M image, and partial[image, tile] = energy of the windows whose corner lies in the tile.
template <typename T, typename Real, int kRadius>
__global__ void __launch_bounds__(kFitThreads, 1)
    matting_laplacian_kernel(const T* __restrict__ image, const T* __restrict__ guide, T* __restrict__ product,
                             double* __restrict__ partial, Real factor, Real root_eps, WindowTiles tiles,
                             int64_t batch, int64_t channels) {
  constexpr int kSide = 2 * kRadius + 1, kHalo = 2 * kRadius;
  SHARED_ARRAY(Real, sums, kSide * kFitThreads);
  const int tile_row = static_cast<int>(blockIdx.x / tiles.column_tiles);
  const int tile_column = static_cast<int>(blockIdx.x % tiles.column_tiles);
  const int row = tile_row * tiles.rows + static_cast<int>(threadIdx.y) - kHalo;
  const int column = tile_column * tiles.columns + static_cast<int>(threadIdx.x) - kHalo;
  const bool exists = row >= 0 && row < tiles.window_rows && column >= 0 && column < tiles.window_columns;
  const bool owned = threadIdx.y >= kHalo && threadIdx.x >= kHalo && row < tiles.height && column < tiles.width;
  const int64_t pixel = int64_t{row} * tiles.width + column;
  const int64_t pixels = int64_t{tiles.height} * tiles.width;
  for (int64_t index = blockIdx.y; index < batch; index += gridDim.y) {
    WindowBasis<Real, kSide * kSide> basis;
    UNROLL
    for (int channel = 0; channel < 3; ++channel) {
      load_window<kSide>(guide + (index * 3 + channel) * pixels + pixel, tiles.width, exists, basis.colours[channel]);
    }
    basis.orthogonalise(root_eps);
    Real energy = {};
#pragma unroll 1
    for (int64_t channel = 0; channel < channels; ++channel) {
      const int64_t plane = (index * channels + channel) * pixels;
      Real residuals[kSide * kSide];
      load_window<kSide>(image + plane + pixel, tiles.width, exists, residuals);
      energy += basis.residuals(residuals);
      if (product != nullptr) {
        const Real sum = gather<kSide>(residuals, sums);
        if (owned) product[plane + pixel] = static_cast<T>(factor * sum);
      }
    }
    if (partial != nullptr) {
      const double sum = block_sum(owned ? static_cast<double>(energy) : 0.0);
      if (threadIdx.x == 0 && threadIdx.y == 0) partial[index * tiles.tiles + blockIdx.x] = sum;
    }
  }
}

// energy[image] = sum over tiles of partial / pixels, one block for each image.
template <typename T>
__global__ void __launch_bounds__(kSumThreads)
    matting_laplacian_energy_kernel(const double* __restrict__ partial, T* __restrict__ energy, int64_t tiles,
                                    int64_t pixels) {
  double sum = 0;
  for (int64_t tile = threadIdx.x; tile < tiles; tile += kSumThreads) sum += partial[blockIdx.x * tiles + tile];
  sum = block_sum(sum);
  if (threadIdx.x == 0) energy[blockIdx.x] = static_cast<T>(sum / static_cast<double>(pixels));
}

template <typename T, typename Real, int kRadius>
void launch(const MattingLaplacian& arguments, const MattingLaplacianSizes& sizes, void* workspace,
            cudaStream_t stream) {
  if (sizes.batch == 0) return;
  const WindowTiles tiles(sizes);
  double* partial = arguments.energy == nullptr ? nullptr : static_cast<double*>(workspace);
  const dim3 grid(grid_x(tiles.tiles), grid_y(sizes.batch));
  LAUNCH((matting_laplacian_kernel<T, Real, kRadius>), grid, dim3(kTileColumns, kTileRows), 0, stream,
         static_cast<const T*>(arguments.image), static_cast<const T*>(arguments.guide),
         static_cast<T*>(arguments.product), partial, Real(arguments.factor), Real(std::sqrt(arguments.eps)), tiles,
         sizes.batch, sizes.channels);
  if (partial == nullptr) return;
  LAUNCH(matting_laplacian_energy_kernel<T>, dim3(grid_x(sizes.batch)), dim3(kSumThreads), 0, stream,
         partial, static_cast<T*>(arguments.energy), tiles.tiles, sizes.pixels());
}

// Instructions of a TwoFloat for one of float64, about.
constexpr int kTwoFloatInstructions = 13;
// TwoFloat's 46 bits are enough for a fit as nearly singular as the least eps allows it to be. It overflows as float32
// does, which the squares of a larger eps would.
constexpr double kLeastTwoFloatEps = 1e-15, kMostTwoFloatEps = 1e30;

// Whether this device computes quicker in TwoFloat: it then takes 32 or 64 times as long for float64 as for float32. Or as
// the environment variable RESTORATION_CUDA_FLOAT64 says, with which tests run both on one machine.
bool prefers_two_float() {
  const char* wish = std::getenv("RESTORATION_CUDA_FLOAT64");
  if (wish && *wish) {
    const std::string speed = wish;
    if (speed == "fast" || speed == "slow") return speed == "slow";
    throw std::invalid_argument("RESTORATION_CUDA_FLOAT64 must be fast or slow, got " + speed);
  }
  int device = 0, ratio = 1;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&ratio, cudaDevAttrSingleToDoublePrecisionPerfRatio, device);
  return ratio > kTwoFloatInstructions;
}

}  // namespace

int64_t matting_laplacian_workspace(const MattingLaplacianSizes& sizes, DType) {
  return sizes.batch * WindowTiles(sizes).tiles * int64_t{sizeof(double)};
}

void launch_matting_laplacian(const MattingLaplacian& arguments, const MattingLaplacianSizes& sizes, DType dtype,
                              void* workspace, void* stream) {
  dispatch_matting_laplacian(dtype, sizes.radius, [&](auto tag, auto radius) {
    using T = typename decltype(tag)::Type;
    constexpr int kRadius = decltype(radius)::value;
    auto* const own_stream = static_cast<cudaStream_t>(stream);
    if constexpr (std::is_same_v<T, float>) {
      if (arguments.eps >= kLeastTwoFloatEps && arguments.eps <= kMostTwoFloatEps && prefers_two_float()) {
        return launch<T, TwoFloat, kRadius>(arguments, sizes, workspace, own_stream);
      }
    }
    launch<T, double, kRadius>(arguments, sizes, workspace, own_stream);
  });
}

}  // namespace restoration

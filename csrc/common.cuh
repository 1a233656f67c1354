// What the CUDA kernels share. The sources compile with nvcc, and with g++ against tests/simt/simt.h, which runs them
// on the CPU; so a launch, and memory shared by a block, are written with the macros below.
//   LAUNCH(kernel, grid, block, shared_bytes, stream, arguments...)    throws where the launch fails
//   SHARED_ARRAY(type, name, count)                                    fixed size
//   DYNAMIC_SHARED(type, name)                                         the shared_bytes of the launch
#pragma once

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "common.h"

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#define LAUNCH(kernel, grid, block, shared_bytes, stream, ...)            \
  do {                                                                    \
    (kernel)<<<(grid), (block), (shared_bytes), (stream)>>>(__VA_ARGS__); \
    restoration::check_launch(#kernel, (grid), (block), (shared_bytes));  \
  } while (false)
#define SHARED_ARRAY(type, name, count) __shared__ type name[count]
#define DYNAMIC_SHARED(type, name)                              \
  extern __shared__ __align__(16) unsigned char name##_bytes[]; \
  type* const name = reinterpret_cast<type*>(name##_bytes)

namespace restoration {

inline void check_launch(const char* kernel, dim3 grid, dim3 block, size_t shared_bytes) {
  const cudaError_t error = cudaGetLastError();
  if (error == cudaSuccess) return;
  const auto text = [](dim3 size) {
    return "(" + std::to_string(size.x) + ", " + std::to_string(size.y) + ", " + std::to_string(size.z) + ")";
  };
  throw std::runtime_error(std::string("launch of ") + kernel + " with grid " + text(grid) + ", block " + text(block) +
                           " and " + std::to_string(shared_bytes) +
                           " bytes of shared memory failed: " + cudaGetErrorString(error));
}

}  // namespace restoration
#else
#include "simt.h"
#endif

namespace restoration {

constexpr int kWarpThreads = 32;
constexpr unsigned kFullWarp = 0xffffffff;

// The widest access of one thread: one instruction moves 16 bytes.
constexpr int kVectorBytes = 16;

// The largest grid.y and grid.z; grid.x reaches 2^31 - 1. Kernels loop over what does not fit. The tests define a small
// one, so that small tensors do not fit.
#if !defined(RESTORATION_MAXIMUM_GRID_Y)
#define RESTORATION_MAXIMUM_GRID_Y 65535
#endif
constexpr int64_t kMaximumGridY = RESTORATION_MAXIMUM_GRID_Y;
inline unsigned grid_y(int64_t count) { return static_cast<unsigned>(std::min(count, kMaximumGridY)); }
// Blocks of a grid's first axis. Cut to 32 bits, too many could be a grid that runs and leaves results unwritten.
inline unsigned grid_x(int64_t count) {
  if (count > INT32_MAX) throw std::runtime_error("a grid of " + std::to_string(count) + " blocks is too large for CUDA");
  return static_cast<unsigned>(count);
}

template <typename T>
struct alignas(kVectorBytes) Vector {
  static constexpr int kCount = kVectorBytes / sizeof(T);
  T values[kCount];
};

// left · right, rounded: never part of a fused multiply-add, so that what is subtracted from a copy of it leaves exactly 0.
template <typename A>
HOST_DEVICE A rounded_product(A left, A right) {
#if defined(__CUDA_ARCH__)
  if constexpr (std::is_same_v<A, double>) return __dmul_rn(left, right);
  if constexpr (std::is_same_v<A, float>) return __fmul_rn(left, right);
#endif
  return left * right;
}

template <typename Call>
void dispatch_cuda_dtype(const char* operator_name, DType dtype, Call call) {
  switch (dtype) {
    case DType::float32:
      return call(TypeTag<float>());
    case DType::float64:
      return call(TypeTag<double>());
    case DType::float16:
      return call(TypeTag<__half>());
    case DType::bfloat16:
      return call(TypeTag<__nv_bfloat16>());
  }
  refuse_dtype(operator_name, dtype);
}

// More dynamic shared memory must be asked for, on each device. Compute capability 8.6 gives up to 99 KB. All calls ask
// for as much, which no launch has passed: the limit is the kernel's, and another thread's call may lower it.
constexpr size_t kFreeSharedBytes = size_t{48} << 10;
constexpr size_t kAskedSharedBytes = size_t{64} << 10;

template <typename Kernel>
void allow_shared(Kernel kernel, size_t bytes) {
  if (bytes <= kFreeSharedBytes) return;
  const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                                 static_cast<int>(std::max(bytes, kAskedSharedBytes)));
  if (error == cudaSuccess) return;
  cudaGetLastError();  // forgets it, or the next launch would report it as its own
  throw std::runtime_error(std::to_string(bytes) +
                           " bytes of shared memory were refused to a kernel: " + cudaGetErrorString(error));
}

inline bool is_aligned(const void* address) { return reinterpret_cast<uintptr_t>(address) % kVectorBytes == 0; }

template <typename A>
__device__ __forceinline__ A warp_sum(A value) {
#pragma unroll
  for (int distance = kWarpThreads / 2; distance > 0; distance /= 2) {
    value += __shfl_down_sync(kFullWarp, value, distance);
  }
  return value;  // in lane 0
}

// Sum over the block, in thread 0. Every thread of the block calls it, in blocks of whole warps; may be called again.
template <typename A>
__device__ __forceinline__ A block_sum(A value) {
  SHARED_ARRAY(A, warp_sums, kWarpThreads);
  const int thread = threadIdx.y * blockDim.x + threadIdx.x;
  const int warp = thread / kWarpThreads;
  const int lane = thread % kWarpThreads;
  const int warps = blockDim.x * blockDim.y / kWarpThreads;
  value = warp_sum(value);
  if (lane == 0) warp_sums[warp] = value;
  __syncthreads();
  if (warp == 0) value = warp_sum(lane < warps ? warp_sums[lane] : A(0));
  __syncthreads();  // before a second call overwrites warp_sums
  return value;
}

}  // namespace restoration

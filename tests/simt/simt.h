// Stands in for the CUDA toolkit where g++ compiles the project's .cu files: kernels run on the CPU, one block after
// the other, each thread of a block in a fiber of its own (fibers.h). The order of blocks, warps and lanes is
// ascending, or descending where the environment variable SIMT_REVERSE is set: a result that depends on it has a race.
// Shared memory holds NaN until it is written, so a missing barrier shows in one order or the other; compiled so that
// accesses can be watched, every race is an error (races.h). A barrier or a warp operation that not all of its threads
// reach is an error, as is a launch that CUDA would refuse.
#pragma once

#include "async_copy.h"
#include "fibers.h"
#include "fragments.h"
#include "sixteen_bit.h"
#include "warp.h"

using std::max;
using std::min;

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)

#define LAUNCH(kernel, grid, block, shared_bytes, stream, ...)                                       \
  (static_cast<void>(stream), simt::launch(#kernel, reinterpret_cast<const void*>(kernel), grid, block, shared_bytes, \
                                           [&] { (kernel)(__VA_ARGS__); }))
// The type of the lambda is different for each array of each instantiation: it is the array's identity in its block.
#define SHARED_ARRAY(type, name, count) type* const name = simt::shared_array<type>(count, [] {})
#define DYNAMIC_SHARED(type, name) type* const name = static_cast<type*>(simt::block().dynamic_shared.get())

#define threadIdx (simt::block().current->thread)
#define blockIdx (simt::block().index)
#define blockDim (simt::block().block_size)
#define gridDim (simt::block().grid_size)

[[noreturn]] inline void __trap() { simt::fail("__trap", *simt::block().current); }

// Blocks run one after the other on one thread, so nothing can come between the read and the write.
template <typename T>
T atomicAdd(T* address, T value) {
  const simt::Runner runner;
  SIMT_RACES(write_atomically(address, sizeof(T)));
  const T old = *address;
  *address = old + value;
  return old;
}

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess, cudaErrorInvalidValue };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
struct cudaFuncAttributes {};
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }
enum cudaDeviceAttr { cudaDevAttrSingleToDoublePrecisionPerfRatio };
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) { return *value = 2, cudaSuccess; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
template <typename Kernel>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, Kernel) {
  return cudaSuccess;
}
template <typename Kernel>
cudaError_t cudaFuncSetAttribute(Kernel kernel, cudaFuncAttribute, size_t bytes) {
  if (bytes > simt::kMaximumSharedBytes) return cudaErrorInvalidValue;
  simt::allowed_shared()[reinterpret_cast<const void*>(kernel)] = bytes;
  return cudaSuccess;
}
inline const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaSuccess ? "no error" : "invalid argument";
}

// Kernels without a race, and the same with one, that test races.cpp.
#include <string>

#include "async_copy.cuh"
#include "common.cuh"

namespace {

constexpr int kThreads = 96;  // three warps
thread_local std::string message;

enum class Order { none, shuffle, warp, block };

// What orders the threads between a write and a read of another's number, `distance` places on.
template <Order kOrder>
__global__ void exchange_kernel(float* y, int distance) {
  SHARED_ARRAY(float, places, kThreads);
  places[threadIdx.x] = y[threadIdx.x];
  if (kOrder == Order::shuffle) __shfl_xor_sync(0xffffffff, 0.0f, 1);
  if (kOrder == Order::warp) __syncwarp();
  if (kOrder == Order::block) __syncthreads();
  const int place = threadIdx.x ^ distance;
  y[threadIdx.x] = place < kThreads ? places[place] : 0;
}

// Half of the lanes meet, then the other half, which no one has shown anything.
__global__ void half_warp_kernel(float* y) {
  SHARED_ARRAY(float, places, kThreads);
  places[threadIdx.x] = y[threadIdx.x];
  __syncwarp(threadIdx.x % 32 < 16 ? 0x0000ffff : 0xffff0000);
  y[threadIdx.x] = places[threadIdx.x ^ 16];
}

// Thread 0 reads what all others then overwrite with what is there already.
template <bool kBarrier>
__global__ void overwrite_kernel(float* y) {
  SHARED_ARRAY(float, places, 1);
  if (threadIdx.x == 0) places[0] = y[0];
  __syncthreads();
  const float first = places[0];
  if (kBarrier) __syncthreads();
  if (threadIdx.x == kThreads - 1) places[0] = first;
}

template <bool kAtomic>
__global__ void sum_kernel(float* y) {
  if (threadIdx.x != 0) return;
  if (kAtomic) {
    atomicAdd(y, 1.0f);
  } else {
    y[0] += 1;
  }
}

__global__ void sum_and_read_kernel(float* y) {
  if (threadIdx.x == blockIdx.x) atomicAdd(y, 1.0f);
  if (threadIdx.x == 5) y[5] = y[0];
}

__global__ void halves_kernel(__half* y) { y[blockIdx.x * kThreads + threadIdx.x] = __half(1.0f); }

__global__ void neighbor_block_kernel(float* y, int distance) {
  const int places = gridDim.x * kThreads, place = blockIdx.x * kThreads + threadIdx.x;
  y[place] = y[(place + distance) % places];
}

enum class Wait { none, before_barrier, after_barrier };

template <Wait kWait>
__global__ void copy_kernel(float* y) {
  SHARED_ARRAY(float, places, kThreads);
  restoration::copy_async<4>(places + threadIdx.x, y + threadIdx.x, true);
  restoration::commit_copies();
  if (kWait == Wait::before_barrier) restoration::wait_for_copies<0>();
  __syncthreads();
  if (kWait == Wait::after_barrier) restoration::wait_for_copies<0>();
  y[threadIdx.x] = places[(threadIdx.x + 1) % kThreads];
}

// A second copy into the place that others still read.
template <bool kBarrier>
__global__ void copy_over_kernel(float* y) {
  SHARED_ARRAY(float, places, kThreads);
  places[threadIdx.x] = y[threadIdx.x];
  __syncthreads();
  const float next = places[(threadIdx.x + 1) % kThreads];
  if (kBarrier) __syncthreads();
  restoration::copy_async<4>(places + threadIdx.x, y + threadIdx.x, true);
  restoration::commit_copies();
  restoration::wait_for_copies<0>();
  __syncthreads();
  y[threadIdx.x] = next;
}

}  // namespace

// Runs a kernel on two blocks' numbers; the error, or null.
extern "C" const char* run(const char* name, float* y) {
  const std::string kernel = name;
  const auto launch = [&](const char* its_name, auto planted, int blocks, auto... arguments) {
    if (kernel == its_name) LAUNCH(planted, dim3(blocks), dim3(kThreads), 0, nullptr, arguments...);
  };
  try {
    launch("own", exchange_kernel<Order::none>, 1, y, 0);
    launch("lane", exchange_kernel<Order::warp>, 1, y, 1);
    launch("lane without order", exchange_kernel<Order::none>, 1, y, 1);
    launch("lane by shuffle", exchange_kernel<Order::shuffle>, 1, y, 1);
    launch("half warp", half_warp_kernel, 1, y);
    launch("warp", exchange_kernel<Order::block>, 1, y, 32);
    launch("warp by warp barrier", exchange_kernel<Order::warp>, 1, y, 32);
    launch("overwrite", overwrite_kernel<true>, 1, y);
    launch("overwrite too early", overwrite_kernel<false>, 1, y);
    launch("sum", sum_kernel<true>, 2, y);
    launch("sum without atomics", sum_kernel<false>, 2, y);
    launch("sum read too early", sum_and_read_kernel, 2, y);
    launch("halves", halves_kernel, 2, reinterpret_cast<__half*>(y));
    launch("own block", neighbor_block_kernel, 2, y, 0);
    launch("other block", neighbor_block_kernel, 2, y, kThreads);
    launch("copy", copy_kernel<Wait::before_barrier>, 1, y);
    launch("copy without waiting", copy_kernel<Wait::none>, 1, y);
    launch("copy waited for by its thread alone", copy_kernel<Wait::after_barrier>, 1, y);
    launch("copy over", copy_over_kernel<true>, 1, y);
    launch("copy over too early", copy_over_kernel<false>, 1, y);
  } catch (const std::exception& error) {
    return (message = error.what()).c_str();
  }
  return nullptr;
}

// Small kernels, right ones and ones with a planted mistake, that test the runner itself.
#include <memory>
#include <string>

#include "common.cuh"

namespace {

constexpr int kThreads = 96;  // three warps
thread_local std::string message;

// y[t] = x[t + 1], around the end, through shared memory.
template <bool kBarrier>
__global__ void rotate_kernel(const float* x, float* y) {
  SHARED_ARRAY(float, places, kThreads);
  places[threadIdx.x] = x[threadIdx.x];
  if (kBarrier) __syncthreads();
  y[threadIdx.x] = places[(threadIdx.x + 1) % kThreads];
}

// The same twice in the same memory: without the barrier between them, a fast thread overwrites what a slow one reads.
template <bool kBarrier>
__global__ void rotate_twice_kernel(const float* x, float* y) {
  DYNAMIC_SHARED(float, places);
  places[threadIdx.x] = x[threadIdx.x];
  __syncthreads();
  const float next = places[(threadIdx.x + 1) % kThreads];
  if (kBarrier) __syncthreads();
  places[threadIdx.x] = next;
  __syncthreads();
  y[threadIdx.x] = places[(threadIdx.x + 1) % kThreads];
}

__global__ void divergent_barrier_kernel() {
  if (threadIdx.x < 40) __syncthreads();
}

__global__ void missing_lane_kernel() {
  if (threadIdx.x != 37) __syncwarp();
}

__global__ void foreign_lane_kernel() { __syncwarp(0x0000ffff); }

__global__ void too_much_shared_kernel() { SHARED_ARRAY(double, places, 8192); }

// One row of y for each operation; some are done by the two halves of a warp apart.
__global__ void shuffle_kernel(const int* source, float* y) {
  const float lane = static_cast<float>(threadIdx.x % 32);
  const unsigned half = threadIdx.x % 32 < 16 ? 0x0000ffff : 0xffff0000;
  float* row = y + threadIdx.x;
  row[0 * kThreads] = __shfl_sync(0xffffffff, lane, source[threadIdx.x]);
  row[1 * kThreads] = __shfl_up_sync(0xffffffff, lane, 3);
  row[2 * kThreads] = __shfl_down_sync(half, lane, 5, 16);
  row[3 * kThreads] = __shfl_xor_sync(0xffffffff, lane, 9);
  row[4 * kThreads] = static_cast<float>(__ballot_sync(half, threadIdx.x % 3 == 0) & 0xffff);
  row[5 * kThreads] = __shfl_sync(half, lane, threadIdx.x % 32 < 16 ? 20 : 4);  // a lane that the mask does not name
}

__global__ void count_kernel(int* order) {
  const int threads = gridDim.x * blockDim.x;
  order[atomicAdd(order + threads, 1)] = blockIdx.x * blockDim.x + threadIdx.x;
}

__global__ void grid_kernel(int* y) {
  const int block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
  const int thread = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
  y[block * 24 + thread] += block * 24 + thread;
}

__global__ void copy_kernel(const float* x, float* y, int offset) { y[threadIdx.x] = x[threadIdx.x + offset]; }

__global__ void copy_shared_kernel(float* y, int offset) {
  SHARED_ARRAY(float, places, kThreads);
  places[threadIdx.x + offset] = 1;
  y[threadIdx.x] = places[threadIdx.x];
}

__global__ void copy_vector_kernel(const float* x, float* y) {
  y[0] = reinterpret_cast<const restoration::Vector<float>*>(x)->values[3];
}

}  // namespace

extern "C" {

// Runs a kernel on x and y; the error, or null.
const char* run(const char* name, const float* x, float* y) {
  const std::string kernel = name;
  const dim3 block(kThreads);
  try {
    if (kernel == "rotate") LAUNCH(rotate_kernel<true>, dim3(1), block, 0, nullptr, x, y);
    if (kernel == "rotate_without_barrier") LAUNCH(rotate_kernel<false>, dim3(1), block, 0, nullptr, x, y);
    const size_t bytes = kThreads * sizeof(float);
    if (kernel == "rotate_twice") LAUNCH(rotate_twice_kernel<true>, dim3(1), block, bytes, nullptr, x, y);
    if (kernel == "rotate_twice_without_barrier")
      LAUNCH(rotate_twice_kernel<false>, dim3(1), block, bytes, nullptr, x, y);
    if (kernel == "divergent_barrier") LAUNCH(divergent_barrier_kernel, dim3(2), block, 0, nullptr);
    if (kernel == "missing_lane") LAUNCH(missing_lane_kernel, dim3(1), block, 0, nullptr);
    if (kernel == "foreign_lane") LAUNCH(foreign_lane_kernel, dim3(1), block, 0, nullptr);
    if (kernel == "too_much_shared") LAUNCH(too_much_shared_kernel, dim3(1), block, 0, nullptr);
    if (kernel == "too_many_threads") LAUNCH(missing_lane_kernel, dim3(1), dim3(1025), 0, nullptr);
    if (kernel == "empty_grid") LAUNCH(missing_lane_kernel, dim3(0), block, 0, nullptr);
    if (kernel == "high_grid") LAUNCH(missing_lane_kernel, dim3(1, 65536), block, 0, nullptr);
  } catch (const std::exception& error) {
    message = error.what();
    return message.c_str();
  }
  return nullptr;
}

void shuffle(const int* source, float* y) { LAUNCH(shuffle_kernel, dim3(1), dim3(kThreads), 0, nullptr, source, y); }

void count(int* order) { LAUNCH(count_kernel, dim3(2), dim3(40), 0, nullptr, order); }

void grid(int* y) { LAUNCH(grid_kernel, dim3(2, 3, 4), dim3(4, 3, 2), 0, nullptr, y); }

void round_to_half(const float* x, float* y, int count) {
  for (int place = 0; place < count; ++place) y[place] = __half(x[place]);
}

void round_to_bfloat16(const float* x, float* y, int count) {
  for (int place = 0; place < count; ++place) y[place] = __nv_bfloat16(x[place]);
}

}  // extern "C"

// For the address sanitizer: the mistake that the argument names.
int main(int, char** arguments) {
  const std::string mistake = arguments[1];
  const std::unique_ptr<float[]> x(new float[kThreads]()), y(new float[kThreads]());
  if (mistake == "global") LAUNCH(copy_kernel, dim3(1), dim3(kThreads), 0, nullptr, x.get(), y.get(), 1);
  if (mistake == "shared") LAUNCH(copy_shared_kernel, dim3(1), dim3(kThreads), 0, nullptr, y.get(), 1);
  if (mistake == "misaligned") LAUNCH(copy_vector_kernel, dim3(1), dim3(1), 0, nullptr, x.get() + 1, y.get());
  if (mistake == "none") {
    LAUNCH(copy_kernel, dim3(1), dim3(kThreads), 0, nullptr, x.get(), y.get(), 0);
    LAUNCH(copy_shared_kernel, dim3(1), dim3(kThreads), 0, nullptr, y.get(), 0);
    LAUNCH(copy_vector_kernel, dim3(1), dim3(1), 0, nullptr, x.get(), y.get());
    run("rotate", x.get(), y.get());
    run("divergent_barrier", x.get(), y.get());
    run("rotate", x.get(), y.get());
  }
}

// Whether the kernels can run on a device: the compiled architectures and the driver decide, not the device's presence.

#include "common.cuh"

namespace restoration {
namespace {

__global__ void probe_kernel() {}

}  // namespace

// The reason of the CUDA runtime, or null where the kernels run.
const char* cuda_unavailable_reason(int64_t device) {
  int previous = 0;
  cudaGetDevice(&previous);
  cudaError_t error = cudaSetDevice(static_cast<int>(device));
  if (error == cudaSuccess) {
    cudaFuncAttributes attributes;
    error = cudaFuncGetAttributes(&attributes, probe_kernel);
    cudaSetDevice(previous);
  }
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace restoration

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
    // Not for nothing: it would set up a context on a GPU that is perhaps not used.
    if (previous != device) cudaSetDevice(previous);
  }
  if (error == cudaSuccess) return nullptr;
  cudaGetLastError();  // forgets it, or the next launch would report it as its own
  return cudaGetErrorString(error);
}

}  // namespace restoration

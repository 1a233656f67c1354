// Copies from global into shared memory that run while the thread goes on. Each thread waits for its own copies, then
// __syncthreads() shows them to the others:
//   copy_async<16>(shared, global, inside); ...; commit_copies();   a group
//   wait_for_copies<1>(); __syncthreads();                          all groups but the newest 1 have arrived
// Needs compute capability 8.0; in the runner of the tests the bytes arrive only in the wait.
#pragma once

#include "common.cuh"

namespace restoration {

#if defined(__CUDACC__)
// kBytes (4, 8 or 16) bytes, both addresses multiples of it; zeros where not `inside`, when global may point anywhere.
template <int kBytes>
__device__ __forceinline__ void copy_async(void* shared, const void* global, bool inside) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16, "the sizes that cp.async takes");
  const unsigned destination = static_cast<unsigned>(__cvta_generic_to_shared(shared));
  const int source_bytes = inside ? kBytes : 0;
  if constexpr (kBytes == 16) {
    // Past the first-level cache: nobody in this block reads a vector twice.
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(destination), "l"(global), "r"(source_bytes)
                 : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(destination), "l"(global), "n"(kBytes),
                 "r"(source_bytes)
                 : "memory");
  }
}

__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

template <int kNewestGroups>
__device__ __forceinline__ void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kNewestGroups) : "memory");
}
#endif

}  // namespace restoration

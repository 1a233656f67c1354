// Loads from shared memory that make fragments: four matrices of 8 x 8 numbers of 16 bits in one instruction (PTX ISA,
// "ldmatrix"). Lane l says where row l % 8 of matrix l / 8 begins, at a multiple of 16 bytes. As words[i] it gets, of
// row l / 4 of matrix i, number l % 4 · 2 and the next; transposed, of column l / 4. All lanes of a warp call it
// together. Needs compute capability 7.5.
#pragma once

#include "common.cuh"

namespace restoration {

#if defined(__CUDACC__)
template <bool kTransposed>
__device__ __forceinline__ void load_matrices(uint32_t (&words)[4], const void* row) {
  const unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(row));
  if constexpr (kTransposed) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
                 : "r"(address)
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
                 : "r"(address)
                 : "memory");
  }
}
#endif

}  // namespace restoration

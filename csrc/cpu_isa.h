// Which copy of the CPU kernels runs (FOR_EACH_CPU_ISA in common.h): chosen once, when the module is loaded.
#pragma once

#include <algorithm>
#include <cstdlib>
#include <initializer_list>
#include <stdexcept>
#include <string>

#if defined(RESTORATION_AMX)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "common.h"

namespace restoration {
namespace {

const char* const kCpuIsaNames[] = {
#define NAME(isa) #isa,
    FOR_EACH_CPU_ISA(NAME)
#undef NAME
};

#if defined(RESTORATION_AMX)
// Whether there is one for bfloat16 (AMX), and Linux lets this process use it, which has to be asked for once. Once it
// does, sigaltstack refuses the process stacks without room for the tiles, such as those of 8192 bytes.
bool may_use_matrix_unit() {
  constexpr unsigned kBFloat16 = 1u << 22, kTiles = 1u << 24;  // in edx of leaf 7
  constexpr int kRequestPermission = 0x1023;                   // ARCH_REQ_XCOMP_PERM
  constexpr int kTileData = 18;                                // XFEATURE_XTILEDATA
  unsigned eax, ebx, ecx, edx;
  if (__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) == 0) return false;
  if ((edx & kBFloat16) == 0 || (edx & kTiles) == 0) return false;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}
#endif

// Index into the instruction sets that the CPU kernels are compiled for: the best of this processor, or the one that
// the environment variable RESTORATION_CPU_ISA asks for, with which tests run every copy on one machine.
int choose_cpu_isa() {
  const char* const variable = std::getenv("RESTORATION_CPU_ISA");
  const std::string wish = variable == nullptr ? "" : variable;
  int best = 0;
#if defined(RESTORATION_X86)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    best = 1;
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl")) {
      best = 2;
#if defined(RESTORATION_AVX512BF16)
      if (__builtin_cpu_supports("avx512bf16")) best = 3;
#endif
#if defined(RESTORATION_AMX)
      const bool wants_less = std::find(kCpuIsaNames, kCpuIsaNames + 4, wish) != kCpuIsaNames + 4;
      if (best == 3 && !wants_less && may_use_matrix_unit()) best = 4;
#endif
    }
  }
#endif
  if (wish.empty()) return best;
  std::string known;
  for (int isa = 0; isa <= best; ++isa) {
    if (wish == kCpuIsaNames[isa]) return isa;
    known += std::string(isa == 0 ? "" : ", ") + kCpuIsaNames[isa];
  }
  throw std::invalid_argument("RESTORATION_CPU_ISA must be one that this processor runs (" + known + "), got " + wish);
}

int cpu_isa = 0;

// The copy of a CPU kernel for this processor.
template <typename Function>
Function best_copy(std::initializer_list<Function> copies) {
  return copies.begin()[cpu_isa];
}
#define ADDRESS_OF(isa, function) &isa::function,
#define CPU_KERNEL(function) best_copy({FOR_EACH_CPU_ISA(ADDRESS_OF, function)})

}  // namespace
}  // namespace restoration

// What every source file of the extension shares: the dtype code of the border, host and device qualifiers, division
// and rounding of counts, the cutting of scratch memory. No torch header is included anywhere in csrc: the border to
// Python is addresses, sizes and a stream.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define HOST_DEVICE __host__ __device__ __forceinline__
// Before a loop over an array that nvcc is to keep in registers.
#define UNROLL _Pragma("unroll")
#else
#define UNROLL
// Always inlined, so that no copy compiled for one instruction set can be linked into code for another.
#define HOST_DEVICE inline __attribute__((always_inline))
#endif

// declare(isa, arguments...) for each namespace that the CPU kernels are compiled into, slowest first; CMakeLists.txt
// says with which flags.
#if defined(RESTORATION_AMX)
#define FOR_EACH_CPU_ISA(declare, ...)                                                         \
  declare(baseline, ##__VA_ARGS__) declare(avx2, ##__VA_ARGS__) declare(avx512, ##__VA_ARGS__) \
      declare(avx512bf16, ##__VA_ARGS__) declare(amx, ##__VA_ARGS__)
#elif defined(RESTORATION_AVX512BF16)
#define FOR_EACH_CPU_ISA(declare, ...)                                                         \
  declare(baseline, ##__VA_ARGS__) declare(avx2, ##__VA_ARGS__) declare(avx512, ##__VA_ARGS__) \
      declare(avx512bf16, ##__VA_ARGS__)
#elif defined(RESTORATION_X86)
#define FOR_EACH_CPU_ISA(declare, ...) \
  declare(baseline, ##__VA_ARGS__) declare(avx2, ##__VA_ARGS__) declare(avx512, ##__VA_ARGS__)
#else
#define FOR_EACH_CPU_ISA(declare, ...) declare(baseline, ##__VA_ARGS__)
#endif

namespace restoration {

// The codes that Python passes as `dtype`; the bindings publish them as DTYPES.
enum class DType : int64_t { float32 = 0, float64 = 1, float16 = 2, bfloat16 = 3 };

// Sums of 16-bit numbers are kept in float32; float32 and float64 keep their own width.
template <typename T>
struct Accumulate {
  using Type = float;
};
template <>
struct Accumulate<double> {
  using Type = double;
};
template <typename T>
using AccumulateType = typename Accumulate<T>::Type;

template <typename T>
struct TypeTag {
  using Type = T;
};

// Throws std::invalid_argument; defined once, in bindings.cpp.
[[noreturn]] void refuse_dtype(const char* operator_name, DType dtype);

HOST_DEVICE constexpr int64_t ceil_divide(int64_t numerator, int64_t denominator) {
  return (numerator + denominator - 1) / denominator;
}

HOST_DEVICE constexpr int64_t round_up(int64_t count, int64_t multiple) {
  return ceil_divide(count, multiple) * multiple;
}

constexpr int64_t kCacheLineBytes = 64;

// A piece of memory, cut into arrays that begin with a cache line. With no memory it only counts.
class Carver {
 public:
  HOST_DEVICE explicit Carver(void* memory) : memory_(static_cast<char*>(memory)) {}

  template <typename Number>
  HOST_DEVICE Number* take(int64_t count) {
    char* const array = memory_ == nullptr ? nullptr : memory_ + used_;
    used_ += round_up(count * int64_t{sizeof(Number)}, kCacheLineBytes);
    return reinterpret_cast<Number*>(array);
  }

  HOST_DEVICE int64_t used() const { return used_; }

 private:
  char* memory_;
  int64_t used_ = 0;
};

}  // namespace restoration

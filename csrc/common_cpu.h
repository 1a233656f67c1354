// What the CPU kernels share. Each *_cpu.cpp is compiled once for every instruction set into its own namespace CPU_ISA
// (CMakeLists.txt), and bindings.cpp calls the best that this processor has: fast on new machines without
// -march=native. Standard templates over plain types would be merged across those copies by the linker, so that AVX-512
// code could run where there is none: use Buffer here, not std::vector.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>

#if defined(__x86_64__)
#include <immintrin.h>
#endif
#if defined(__linux__)
#include <sys/mman.h>
#endif
#if defined(_OPENMP)
#include <omp.h>
#endif

#include "common.h"

namespace restoration::CPU_ISA {

struct BFloat16 {
  uint16_t bits;

  BFloat16() = default;

  HOST_DEVICE explicit BFloat16(float value) : bits(nearest(value)) {}

  HOST_DEVICE operator float() const {
    const uint32_t word = static_cast<uint32_t>(bits) << 16;
    float value;
    std::memcpy(&value, &word, sizeof(value));
    return value;
  }

  HOST_DEVICE static uint16_t nearest(float value) {
    uint32_t word;
    std::memcpy(&word, &value, sizeof(word));
    // Adding just under half of the last kept place, plus the last kept bit, rounds to nearest even; the largest NaN
    // would overflow into zero, so NaN keeps its upper half and gets a bit that makes it quiet. In integers: compilers
    // make no vectors of a comparison that may signal.
    const uint32_t rounded = (word + 0x7fff + ((word >> 16) & 1)) >> 16;
    const bool is_nan = (word & 0x7fffffff) > 0x7f800000;
    return static_cast<uint16_t>(is_nan ? (word >> 16) | 0x40 : rounded);
  }
};

// destination = value, rounded. In a loop of vectors an object that is made first and then copied would go through
// memory, one by one.
template <typename T, typename A>
HOST_DEVICE void assign(T& destination, A value) {
  destination = T(value);
}
HOST_DEVICE void assign(BFloat16& destination, float value) { destination.bits = BFloat16::nearest(value); }

// Uninitialised scratch memory that begins with a cache line and frees itself.
template <typename T>
class Buffer {
 public:
  explicit Buffer(int64_t count)
      : data_(static_cast<T*>(std::aligned_alloc(
            kCacheLineBytes, round_up(std::max<int64_t>(count, 1) * sizeof(T), kCacheLineBytes)))) {
    if (data_ == nullptr) throw std::bad_alloc();
  }
  ~Buffer() { std::free(data_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  T* data() { return data_; }
  T& operator[](int64_t index) { return data_[index]; }

 private:
  T* data_;
};

HOST_DEVICE int64_t thread_number() {
#if defined(_OPENMP)
  return omp_get_thread_num();
#else
  return 0;
#endif
}

// A buffer for each thread of a parallel region. Made before it: an exception that leaves one ends the program.
template <typename T>
class ThreadBuffers {
 public:
  ThreadBuffers(int threads, int64_t count)
      : stride_(round_up(count, kCacheLineBytes / sizeof(T))), memory_(threads * stride_) {}

  T* of(int64_t thread) { return memory_.data() + thread * stride_; }
  T* own() { return of(thread_number()); }

 private:
  int64_t stride_;
  Buffer<T> memory_;
};

template <typename Call>
void dispatch_cpu_dtype(const char* operator_name, DType dtype, Call call) {
  switch (dtype) {
    case DType::float32:
      return call(TypeTag<float>());
    case DType::float64:
      return call(TypeTag<double>());
    case DType::bfloat16:
      return call(TypeTag<BFloat16>());
    default:
      refuse_dtype(operator_name, dtype);
  }
}

// What touches fewer numbers, or adds fewer products, takes less time than waking the threads.
constexpr int64_t kParallelElements = int64_t{1} << 15;
constexpr int64_t kParallelProducts = int64_t{1} << 18;

// Whole rows of all channels of an image, about so many numbers: the work of one thread at a time.
struct Bands {
  int64_t batch;
  int64_t channels;
  int64_t height;
  int64_t width;
  int64_t rows_per_band;
  int64_t bands_per_image;

  Bands(int64_t elements, int64_t batch, int64_t channels, int64_t height, int64_t width)
      : batch(batch),
        channels(channels),
        height(height),
        width(width),
        rows_per_band(std::max<int64_t>(1, elements / std::max<int64_t>(1, channels * width))),
        bands_per_image(ceil_divide(height, rows_per_band)) {}

  int64_t count() const { return batch * bands_per_image; }
  int64_t pixels() const { return height * width; }
  int64_t image(int64_t band) const { return band / bands_per_image; }
  int64_t first_row(int64_t band) const { return band % bands_per_image * rows_per_band; }
  int64_t last_row(int64_t band) const { return std::min(height, first_row(band) + rows_per_band); }
  bool worth_threads(int threads) const { return threads > 1 && batch * channels * pixels() >= kParallelElements; }
};

// Outputs larger than this leave a last-level cache (4 MB a core and more is rare) before anyone reads them. Writing
// them past the caches saves the read that an ordinary store makes of every line before it changes it.
constexpr int64_t kStreamingBytes = int64_t{8} << 20;

// Call before writing a large output for the first time. Fresh memory costs a page fault every 4 KB, which takes longer
// than the whole operator; in pages of 2 MB it does not. Only advice: where the system does not follow it, nothing
// changes.
HOST_DEVICE void advise_huge_pages(void* output, int64_t bytes) {
#if defined(__linux__)
  constexpr uintptr_t kHugePage = uintptr_t{2} << 20;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(output) + kHugePage - 1) / kHugePage * kHugePage;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(output) + bytes) / kHugePage * kHugePage;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

// Whether an output of `count` numbers is to be written past the caches; call it before the first is written.
template <typename T>
bool prepare_output(T* output, int64_t count) {
  const int64_t bytes = count * int64_t{sizeof(T)};
  if (bytes > kStreamingBytes) advise_huge_pages(output, bytes);
  return bytes > kStreamingBytes;
}

// Writes one aligned cache line past the caches.
HOST_DEVICE void stream_line(void* destination, const void* source) {
#if defined(__AVX512F__)
  _mm512_stream_si512(static_cast<__m512i*>(destination), _mm512_load_si512(source));
#elif defined(__AVX__)
  for (int part = 0; part < 2; ++part) {
    _mm256_stream_si256(static_cast<__m256i*>(destination) + part,
                        _mm256_load_si256(static_cast<const __m256i*>(source) + part));
  }
#elif defined(__SSE2__)
  for (int part = 0; part < 4; ++part) {
    _mm_stream_si128(static_cast<__m128i*>(destination) + part,
                     _mm_load_si128(static_cast<const __m128i*>(source) + part));
  }
#else
  std::memcpy(destination, source, kCacheLineBytes);
#endif
}

// destination[i] = value(i) for i below count, past the caches where `streaming` says so; finish_streaming() must
// follow.
template <typename T, typename Value>
HOST_DEVICE void write_values(T* destination, int64_t count, bool streaming, Value value) {
  int64_t index = 0;
  if (streaming) {
    constexpr int64_t kLine = kCacheLineBytes / sizeof(T);
    const int64_t misaligned = reinterpret_cast<uintptr_t>(destination) % kCacheLineBytes / sizeof(T);
    const int64_t head = std::min(count, (kLine - misaligned) % kLine);
    for (; index < head; ++index) destination[index] = value(index);
    for (; index + kLine <= count; index += kLine) {
      alignas(kCacheLineBytes) T line[kLine];
#pragma omp simd
      for (int64_t place = 0; place < kLine; ++place) line[place] = value(index + place);
      stream_line(destination + index, line);
    }
  }
#pragma omp simd
  for (int64_t rest = index; rest < count; ++rest) destination[rest] = value(rest);
}

// Streamed lines are not ordered with other stores. A thread calls this when it has written its share, before another
// may look; more often would stall the writes.
HOST_DEVICE void finish_streaming() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

}  // namespace restoration::CPU_ISA

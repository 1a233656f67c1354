// Kernels, right ones and ones with a planted mistake, that test fragments, asynchronous copies, large shared memory.
#include <string>

#include "async_copy.cuh"
#include "matrix_fragments.cuh"

namespace {

using restoration::Tf32;

constexpr int kThreads = 64;
constexpr int kSteps = 3;  // of depth
thread_local std::string message;

// From tile[row][word], rows `stride` words apart. An odd multiple of 4 has no bank conflicts.
template <typename T>
__device__ void load(restoration::LeftFragment<T>& left, const uint32_t* tile, int stride) {
  for (int place = 0; place < left.kCount; ++place) {
    left.words[place] = tile[left.row(place) * stride + left.word(place)];
  }
}

// From tile[column][word], columns `stride` words apart.
template <typename T>
__device__ void load(restoration::RightFragment<T>& right, const uint32_t* tile, int stride) {
  for (int place = 0; place < right.kCount; ++place) {
    right.words[place] = tile[right.column(place) * stride + right.word(place)];
  }
}

// sums [16, 8] = left [16, depth] · right [depth, 8], packed into shared memory; warp 1 makes the product of -left.
template <typename T, bool kRounded>
__global__ void product_kernel(const float* left, const float* right, float* sums) {
  using restoration::kFragmentWords;
  constexpr int kCount = restoration::Word<T>::kCount;
  constexpr int kWords = kSteps * kFragmentWords, kStride = kWords + 4, kDepth = kWords * kCount;
  SHARED_ARRAY(uint32_t, left_tile, 2 * 16 * kStride);
  SHARED_ARRAY(uint32_t, right_tile, 8 * kStride);
  const auto pack = [](float sign, const float* numbers, int stride) {
    float values[kCount];
    for (int place = 0; place < kCount; ++place) values[place] = sign * numbers[place * stride];
    if constexpr (kRounded) return restoration::Word<T>::pack(values);
    return simt::bits_of(values[0]);
  };
  for (int index = threadIdx.x; index < 2 * 16 * kWords; index += kThreads) {
    const int row = index / kWords, word = index % kWords;
    left_tile[row * kStride + word] =
        pack(row < 16 ? 1.0f : -1.0f, left + row % 16 * kDepth + word * kCount, 1);
  }
  for (int index = threadIdx.x; index < 8 * kWords; index += kThreads) {
    const int column = index / kWords, word = index % kWords;
    right_tile[column * kStride + word] = pack(1.0f, right + word * kCount * 8 + column, 8);
  }
  __syncthreads();
  const int warp = threadIdx.x / 32;
  restoration::SumFragment fragment = {};
  for (int step = 0; step < kSteps; ++step) {
    restoration::LeftFragment<T> left_fragment;
    restoration::RightFragment<T> right_fragment;
    load(left_fragment, left_tile + warp * 16 * kStride + step * kFragmentWords, kStride);
    load(right_fragment, right_tile + step * kFragmentWords, kStride);
    multiply_accumulate(fragment, left_fragment, right_fragment);
  }
  for (int place = 0; place < fragment.kCount; ++place) {
    sums[(warp * 16 + fragment.row(place)) * 8 + fragment.column(place)] = fragment.values[place];
  }
}

// y = x in pieces of kThreads numbers, one of them on its way while another is written; the last one is cut off.
template <int kBytes, int kNewestGroups>
__global__ void copy_kernel(const float* x, float* y, int count) {
  constexpr int kNumbers = kBytes / sizeof(float), kPiece = kThreads * kNumbers;
  SHARED_ARRAY(restoration::Vector<float>, memory, 2 * kPiece / 4);
  float* const places = memory->values;
  const auto start = [&](int first) {
    const int place = first + threadIdx.x * kNumbers;
    restoration::copy_async<kBytes>(places + first / kPiece % 2 * kPiece + threadIdx.x * kNumbers,
                                    x + (place < count ? place : 0), place < count);
    restoration::commit_copies();
  };
  const int pieces = (count + kPiece - 1) / kPiece;
  start(0);
  for (int piece = 0; piece < pieces; ++piece) {
    start((piece + 1) * kPiece);
    restoration::wait_for_copies<kNewestGroups>();
    __syncthreads();
    for (int part = 0; part < kNumbers; ++part) {
      const int place = part * kThreads + threadIdx.x;
      y[piece * kPiece + place] = places[piece % 2 * kPiece + place];
    }
    __syncthreads();
  }
}

__global__ void large_shared_kernel(float* y, int count) {
  DYNAMIC_SHARED(float, places);
  places[count - 1 - threadIdx.x] = y[threadIdx.x];
  __syncthreads();
  y[threadIdx.x] = places[count - 1 - threadIdx.x];
}

template <typename T, bool kRounded>
void multiply(const float* left, const float* right, float* sums) {
  LAUNCH((product_kernel<T, kRounded>), dim3(1), dim3(kThreads), 0, nullptr, left, right, sums);
}

}  // namespace

extern "C" {

void product(const char* type, const float* left, const float* right, float* sums) {
  const std::string name = type;
  if (name == "tf32") multiply<Tf32, true>(left, right, sums);
  if (name == "tf32_not_rounded") multiply<Tf32, false>(left, right, sums);
  if (name == "float16") multiply<__half, true>(left, right, sums);
  if (name == "bfloat16") multiply<__nv_bfloat16, true>(left, right, sums);
}

void round_to_tf32(const float* x, float* y, int count) {
  for (int place = 0; place < count; ++place) y[place] = simt::float_of(restoration::round_to_tf32(x[place]));
}

// Copies by 4 or 16 bytes, or by 4 without waiting for the last group; the error, or null.
const char* copy(int bytes, bool waits, const float* x, float* y, int count) {
  try {
    const auto kernel = bytes == 16 ? copy_kernel<16, 1> : waits ? copy_kernel<4, 1> : copy_kernel<4, 2>;
    LAUNCH(kernel, dim3(2), dim3(kThreads), 0, nullptr, x, y, count);
  } catch (const std::exception& error) {
    return (message = error.what()).c_str();
  }
  return nullptr;
}

// With `allowed` bytes asked for, if any; the error, or null.
const char* use_shared(int64_t bytes, int64_t allowed, float* y) {
  try {
    if (allowed > 0) restoration::allow_shared(large_shared_kernel, allowed);
    LAUNCH(large_shared_kernel, dim3(1), dim3(kThreads), bytes, nullptr, y, static_cast<int>(bytes / sizeof(float)));
  } catch (const std::exception& error) {
    return (message = error.what()).c_str();
  }
  return nullptr;
}

}  // extern "C"

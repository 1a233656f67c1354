// The three ways in which a block of threads multiplies a staged tile of x, scaled by k, with weights:
//   FragmentProducts   tensor cores, float32 sums; float32 operands are rounded to tf32
//   ExactProducts      numbers of full width; a thread owns a rectangle of pixels and outputs in registers
//   SharedProducts     one filter for all channels
// kPixels x kOutputs is the tile of a block, its outputs in kRounds equal parts; a thread owns, of each part, the sums
// of its pixels pixel(i) and outputs output(j). Packed weights are [plane, output] in the order that source() says. The
// left operand is scaled on its way into registers.
#pragma once

#include <cstring>
#include <type_traits>

#include "matrix_fragments.cuh"
#include "pac_conv2d_tiles.cuh"

namespace restoration {

// Planes of x that are staged together: the depth of one fragment.
constexpr int kStagedPlanes = kFragmentWords;

// With few channels, a fragment is as deep as kTapPlanes planes under each of several taps.
template <typename T, int kOutputCount, int kTapPlanes = kStagedPlanes>
struct FragmentProducts {
  using Operand = std::conditional_t<std::is_same_v<T, float>, Tf32, T>;
  using Element = typename Staged<T>::Element;
  using A = float;
  static constexpr bool kShared = false;
  static constexpr int kPlanes = kTapPlanes;  // staged together
  static constexpr int kTapsPerStep = kStagedPlanes / kTapPlanes;
  static constexpr int kThreads = 128;
  // On a multiprocessor: 64 sums want 128 registers; with 16 the work is to read and write, which more warps do better.
  static constexpr int kBlocks = kOutputCount > 16 ? 4 : 5;
  // A warp owns 32 pixels and all outputs, so that no number of x is scaled twice.
  static constexpr int kPixels = kThreads;
  static constexpr int kKernelStride = kPixels + 8;  // between taps: lanes that read different taps read different banks
  static constexpr int kOutputs = kOutputCount;
  static constexpr int kChannels = Staged<T>::kChannels;
  static constexpr int kFragments = kOutputs / kFragmentColumns;
  static constexpr int kOwnPixels = 4;
  static constexpr int kRounds = kFragments / 2;
  static constexpr int kOwnOutputs = 4;

  SumFragment sums[2][kFragments] = {};

  __device__ static int pixel(int i) {
    return threadIdx.x / kWarpThreads * kWarpThreads + i / 2 * kFragmentRows + LeftFragment<Operand>::row(i % 2);
  }
  __device__ static int output(int j) { return j / 2 * kFragmentColumns + SumFragment::column(j % 2); }
  __device__ A sum(int round, int i, int j) const {
    return sums[i / 2][round * 2 + j / 2].values[i % 2 * 2 + j % 2];
  }

  // Word w of a fragment's depth is plane 2w, and word 4 + w plane 2w + 1: what a lane needs of weights then lies
  // together, for two fragments in one vector, and the planes of x lie in different banks.
  __device__ static int plane_of(int word) { return word % 4 * 2 + word / 4; }

  __device__ static void source(int index, int& plane, int& output) {
    const int part = index % 4, lane = index / 4 % kWarpThreads, pair = index / (4 * kWarpThreads);
    output = (pair * 2 + part / 2) * kFragmentColumns + lane / 4;
    plane = plane_of(lane % 4 + part % 2 * 4);
  }

  __device__ static Element pack(const A (&values)[kChannels]) {
    const uint32_t word = Word<Operand>::pack(values);
    Element element;
    std::memcpy(&element, &word, sizeof(word));
    return element;
  }

  __device__ static uint32_t scale(Element element, A factor) {
    uint32_t word;
    std::memcpy(&word, &element, sizeof(word));
    A values[kChannels];
    Word<Operand>::unpack(word, values);
#pragma unroll
    for (int part = 0; part < kChannels; ++part) values[part] *= factor;
    return Word<Operand>::pack(values);
  }

  __device__ __forceinline__ void multiply(int taps, int tap_step, const Element* staged, int, int plane_stride,
                                           const Element* weights, const A* kernel, const int (&slots)[kOwnPixels]) {
    const int lane = fragment_lane();
    // Both planes of a lane lie under the same tap.
    const int own_tap = plane_of(LeftFragment<Operand>::word(0)) / kTapPlanes;
#pragma unroll 1
    for (int first = 0; first < taps; first += kTapsPerStep, weights += kStagedPlanes * kOutputs) {
      const int tap = kTapsPerStep == 1 ? first : min(first + own_tap, taps - 1);
      const bool exists = kTapsPerStep == 1 || first + own_tap < taps;
      A factors[kOwnPixels];
#pragma unroll
      for (int i = 0; i < kOwnPixels; ++i) factors[i] = kernel[tap * kKernelStride + pixel(i)];
      LeftFragment<Operand> left[2];
#pragma unroll
      for (int block = 0; block < 2; ++block) {
#pragma unroll
        for (int place = 0; place < left[block].kCount; ++place) {
          const int i = block * 2 + place % 2, plane = plane_of(LeftFragment<Operand>::word(place)) % kTapPlanes;
          const uint32_t word = scale(staged[plane * plane_stride + slots[i] + tap * tap_step], factors[i]);
          left[block].words[place] = exists ? word : 0;
        }
      }
#pragma unroll
      for (int pair = 0; pair < kFragments / 2; ++pair) {
        const Element* const words = weights + (pair * kWarpThreads + lane) * 4;
        const auto vector = *reinterpret_cast<const Vector<Element>*>(words);
        RightFragment<Operand> right[2];
        std::memcpy(right, vector.values, sizeof(right));
#pragma unroll
        for (int block = 0; block < 2; ++block) {
#pragma unroll
          for (int part = 0; part < 2; ++part) {
            multiply_accumulate(sums[block][pair * 2 + part], left[block], right[part]);
          }
        }
      }
    }
  }
};

// kPixelsEach x kOutputsEach sums a thread; a warp's lanes own neighbouring pixels, so that they read x side by side.
template <typename T, int kPixelThreads, int kOutputThreads, int kPixelsEach, int kOutputsEach>
struct ExactProducts {
  using Element = T;
  using A = T;
  static constexpr bool kShared = false;
  static constexpr int kPlanes = 0;  // as many as fit, up to kStagedPlanes
  static constexpr int kTapsPerStep = 1;
  static constexpr int kThreads = kPixelThreads * kOutputThreads;
  static constexpr int kBlocks = 4;
  static constexpr int kPixels = kPixelThreads * kPixelsEach;
  static constexpr int kKernelStride = kPixels;
  static constexpr int kOutputs = kOutputThreads * kOutputsEach;
  static constexpr int kChannels = 1;
  static constexpr int kOwnPixels = kPixelsEach;
  static constexpr int kOwnOutputs = Vector<T>::kCount;
  static constexpr int kRounds = kOutputsEach / kOwnOutputs;

  A sums[kPixelsEach][kOutputsEach] = {};

  __device__ static int pixel(int i) { return i * kPixelThreads + threadIdx.x % kPixelThreads; }
  __device__ static int output(int j) { return threadIdx.x / kPixelThreads * kOwnOutputs + j; }
  __device__ A sum(int round, int i, int j) const { return sums[i][round * kOwnOutputs + j]; }

  __device__ static void source(int index, int& plane, int& output) {
    plane = index / kOutputs;
    output = index % kOutputs;
  }
  __device__ static Element pack(const A (&values)[kChannels]) { return values[0]; }

  __device__ __forceinline__ void multiply(int taps, int tap_step, const Element* staged, int planes,
                                           int plane_stride, const Element* weights, const A* kernel,
                                           const int (&slots)[kOwnPixels]) {
    const Element* column = weights + output(0);
#pragma unroll 1
    for (int tap = 0; tap < taps; ++tap) {
      A factors[kOwnPixels];
#pragma unroll
      for (int i = 0; i < kOwnPixels; ++i) factors[i] = kernel[tap * kKernelStride + pixel(i)];
      const Element* row = staged + tap * tap_step;
#pragma unroll 2
      for (int plane = 0; plane < planes; ++plane, row += plane_stride, column += kOutputs) {
        A right[kOutputsEach];
#pragma unroll
        for (int round = 0; round < kRounds; ++round) {
          const auto vector = *reinterpret_cast<const Vector<A>*>(column + round * kOutputThreads * kOwnOutputs);
#pragma unroll
          for (int j = 0; j < kOwnOutputs; ++j) right[round * kOwnOutputs + j] = vector.values[j];
        }
#pragma unroll
        for (int i = 0; i < kOwnPixels; ++i) {
          const A left = row[slots[i]] * factors[i];
#pragma unroll
          for (int j = 0; j < kOutputsEach; ++j) sums[i][j] += left * right[j];
        }
      }
    }
  }
};

// Outputs are channels here. A thread owns a pixel of all staged channels.
template <typename T>
struct SharedProducts {
  using Element = typename Staged<T>::Element;
  using A = AccumulateType<T>;
  static constexpr bool kShared = true;
  static constexpr int kPlanes = 0;  // as many as fit, up to kStagedPlanes
  static constexpr int kTapsPerStep = 1;
  static constexpr int kThreads = 128;
  static constexpr int kBlocks = 5;
  static constexpr int kPixels = kThreads;
  static constexpr int kKernelStride = kPixels;
  static constexpr int kChannels = Staged<T>::kChannels;
  static constexpr int kOutputs = kStagedPlanes * kChannels;
  static constexpr int kOwnPixels = 1;
  static constexpr int kRounds = 1;
  static constexpr int kOwnOutputs = kOutputs;

  A sums[kOutputs] = {};

  __device__ static int pixel(int) { return threadIdx.x; }
  __device__ static int output(int j) { return j; }
  __device__ A sum(int, int, int j) const { return sums[j]; }

  __device__ __forceinline__ void multiply(int taps, int tap_step, const Element* staged, int planes,
                                           int plane_stride, const T* filter, const A* kernel,
                                           const int (&slots)[kOwnPixels]) {
#pragma unroll 1
    for (int tap = 0; tap < taps; ++tap) {
      const A factor = kernel[tap * kKernelStride + threadIdx.x] * static_cast<A>(filter[tap]);
      const Element* const row = staged + slots[0] + tap * tap_step;
#pragma unroll
      for (int plane = 0; plane < kStagedPlanes; ++plane) {
        if (plane >= planes) continue;
        A values[kChannels];
        if constexpr (kChannels == 1) {
          values[0] = row[plane * plane_stride];
        } else {
          Word<T>::unpack(row[plane * plane_stride], values);
        }
#pragma unroll
        for (int part = 0; part < kChannels; ++part) sums[plane * kChannels + part] += factor * values[part];
      }
    }
  }
};

}  // namespace restoration

// Backward of the pixel-adaptive convolution in CUDA: grad_x and the slopes m_t(p), of one product. Formulas:
// pac_conv2d_backward_cuda.cu.
// A block owns kInputPixels pixels of x and all channels, kChannels at a time. For each tap t it multiplies grad_y of
// the outputs that read the pixels with t, [pixels, O], with the weights of t, [O, channels]. Before the sums move on,
// they are u_t(p): times k_t(p) they are added to grad_x, and their product with x is the slope, so u never reaches
// memory. While one piece of the operands is multiplied, the next is on its way into registers.
// Pixels lie `stride` apart (a phase), so that each tap is read by all of a block or by none.
#pragma once

#include "pac_conv2d_backward.cuh"

namespace restoration {
namespace {

constexpr int kInputPixels = 128;
constexpr int kInputThreads = 256;
constexpr int kInputWarps = kInputThreads / kWarpThreads;

// Depth of the operands in shared memory, in words: two pieces of each take 27 KB, of which three fit a multiprocessor,
// one more than registers leave room for.
constexpr int kInputWords = 2 * kFragmentWords;

// Channels of x in one pass; fewer where there are fewer, as each pass reads grad_y anew and computes all of them. The
// sums of 64 in float64 do not fit in registers.
inline int64_t input_channels(int64_t channels, bool wide) {
  if (channels <= 8) return 8;
  return channels <= 16 || wide ? 16 : 64;
}

template <typename Factor, int kChannels>
struct InputTile {
  using Element = typename Operand<Factor>::Element;
  // A multiprocessor's: leaves 128 registers to a thread, or 255 where a sum takes two.
  static constexpr int kBlocks = sizeof(typename Operand<Factor>::Sum) == 8 ? 1 : 2;
  static constexpr int kWarpsAcross = kChannels == 64 ? 2 : 1;
  static constexpr int kWarpsDown = kInputWarps / kWarpsAcross;
  static constexpr int kWarpPixels = kInputPixels / kWarpsDown;
  static constexpr int kWarpChannels = kChannels / kWarpsAcross;
  // Odd multiples of 8 words: the four words of depth that a warp reads together lie in other banks.
  static constexpr int kPixelStride = kInputPixels + 8;
  static constexpr int kChannelStride = kChannels / 8 % 2 == 1 ? kChannels : kChannels + 8;
  static constexpr int kVectors = kInputWords * kChannels / Vector<Element>::kCount;
  static_assert(kVectors <= kInputThreads, "each thread copies one vector of weights at most");
  using Sums = WarpTile<Factor, kWarpPixels / kFragmentRows, kWarpChannels / kFragmentColumns>;
};

// Elements of the weights that pac_conv2d_backward_pack_kernel writes: [passes, taps, pieces, kInputWords, kChannels].
struct PackedWeight {
  int channels;  // of one pass
  int passes;
  int pieces;

  PackedWeight(const PacConv2dSizes& sizes, int word_numbers, bool wide)
      : channels(static_cast<int>(input_channels(sizes.channels, wide))),
        passes(static_cast<int>(ceil_divide(sizes.channels, channels))),
        pieces(static_cast<int>(ceil_divide(sizes.out_channels, kInputWords * word_numbers))) {}

  HOST_DEVICE int64_t count(int64_t taps) const { return int64_t{passes} * taps * pieces * kInputWords * channels; }
  HOST_DEVICE int64_t piece(int pass, int taps, int tap, int piece) const {
    return ((int64_t{pass} * taps + tap) * pieces + piece) * kInputWords * channels;
  }
};

// Weights in the order in which they are multiplied, so that every copy of a piece is one run of vectors.
template <typename T, typename Factor>
__global__ void __launch_bounds__(kInputThreads)
    pac_conv2d_backward_pack_kernel(const T* __restrict__ weight,
                                    typename Operand<Factor>::Element* __restrict__ packed, PackedWeight shape,
                                    PacMap map) {
  using A = AccumulateType<T>;
  const int64_t index = int64_t{blockIdx.x} * kInputThreads + threadIdx.x;
  if (index >= shape.count(map.taps)) return;
  int64_t rest = index;
  const auto digit = [&](int64_t base) {
    const int64_t value = rest % base;
    rest /= base;
    return value;
  };
  const int64_t pass_channel = digit(shape.channels);
  const int64_t word = digit(int64_t{shape.pieces} * kInputWords);
  const int64_t tap = digit(map.taps);
  const int64_t channel = rest * shape.channels + pass_channel;
  A values[Operand<Factor>::kCount];
  UNROLL
  for (int number = 0; number < Operand<Factor>::kCount; ++number) {
    const int64_t output = word * Operand<Factor>::kCount + number;
    const bool exists = output < map.out_channels && channel < map.channels;
    values[number] = exists ? static_cast<A>(weight[(output * map.channels + channel) * map.taps + tap]) : A(0);
  }
  packed[index] = Operand<Factor>::pack(values);
}

// Pixels of the image that lie `stride` apart: one of phases(vertical) · phases(horizontal) such sets.
struct InputPhase {
  int row;  // of the first
  int column;
  int rows;
  int columns;

  __device__ InputPhase(const PacMap& map, int phase)
      : row(phase / phases(map.horizontal)),
        column(phase % phases(map.horizontal)),
        rows((map.vertical.size - row + map.vertical.stride - 1) / map.vertical.stride),
        columns((map.horizontal.size - column + map.horizontal.stride - 1) / map.horizontal.stride) {}

  HOST_DEVICE static int phases(const PacAxis& axis) { return axis.stride < axis.size ? axis.stride : axis.size; }

  // The next tap with which outputs read these pixels, or map.taps.
  __device__ int tap_after(const PacMap& map, int tap) const {
    const auto meets = [](const PacAxis& axis, int first, int place) {
      return (first + axis.padding - place * axis.dilation) % axis.stride == 0;
    };
    do {
      ++tap;
    } while (tap < map.taps && !(meets(map.vertical, row, tap / map.kernel_size) &&
                                 meets(map.horizontal, column, tap % map.kernel_size)));
    return tap;
  }
};

// What one thread carries of a piece of the operands.
template <typename R, typename Factor, int kChannels>
struct InputPiece {
  using Tile = InputTile<Factor, kChannels>;
  using Element = typename Tile::Element;
  using A = typename Operand<Factor>::Sum;
  static constexpr int kCount = Operand<Factor>::kCount;
  static constexpr int kStep = kInputThreads / kInputPixels;  // from one word of a thread to its next
  static constexpr int kWords = kInputWords / kStep;

  R grads[kWords][kCount];
  Vector<Element> weights;
  A kernel_value;

  // place: the output that reads this thread's pixel, or -1. kernel: k of the tap.
  __device__ void load(const R* grad_y, const Element* weight, const A* kernel, const PacMap& map, int64_t place,
                       int piece) {
    if (threadIdx.x < kInputPixels) kernel_value = place >= 0 ? kernel[place] : A(0);
    const int first = (piece * kInputWords + threadIdx.x / kInputPixels) * kCount;
    UNROLL
    for (int word = 0; word < kWords; ++word) {
      UNROLL
      for (int number = 0; number < kCount; ++number) {
        const int output = first + word * kStep * kCount + number;
        const bool exists = place >= 0 && output < map.out_channels;
        grads[word][number] = exists ? grad_y[output * map.out_pixels + place] : R(0.0f);
      }
    }
    if (threadIdx.x < Tile::kVectors) weights = reinterpret_cast<const Vector<Element>*>(weight)[threadIdx.x];
  }

  __device__ void store(Element* grad_words, Element* weight_words, A* kernel_values) const {
    if (threadIdx.x < kInputPixels) kernel_values[threadIdx.x] = kernel_value;
    UNROLL
    for (int word = 0; word < kWords; ++word) {
      A values[kCount];
      UNROLL
      for (int number = 0; number < kCount; ++number) values[number] = static_cast<A>(grads[word][number]);
      const int row = threadIdx.x / kInputPixels + word * kStep;
      grad_words[row * Tile::kPixelStride + threadIdx.x % kInputPixels] = Operand<Factor>::pack(values);
    }
    if (threadIdx.x < Tile::kVectors) {
      const int first = threadIdx.x * Vector<Element>::kCount;
      *reinterpret_cast<Vector<Element>*>(weight_words + first / kChannels * Tile::kChannelStride +
                                           first % kChannels) = weights;
    }
  }
};

// What becomes of u_t(p) when the product of a tap is done: gradient += k_t(p) · u, and dots[pixel] = the sum of x · u
// over this warp's channels, of which there are `channels` from plane `x` on. offsets: of each pixel in its plane, or
// -1; null where no dots are wanted.
template <typename Sums, typename T, typename A>
__device__ __forceinline__ void use_products(Sums& sums, Sums& gradient, const T* __restrict__ x, int channels,
                                             int64_t pixels, const int64_t* offsets, const A* kernel_values, A* dots) {
  UNROLL
  for (int row = 0; row < Sums::kRows; ++row) {
    const int pixel = Sums::row(row);
    const A value = kernel_values[pixel];
    const int64_t offset = offsets == nullptr ? -1 : offsets[pixel];
    A dot = 0;
    UNROLL
    for (int column = 0; column < Sums::kColumns; ++column) {
      A& sum = sums.sum(row, column);
      gradient.sum(row, column) += value * sum;
      const int channel = Sums::column(column);
      if (offset >= 0 && channel < channels) dot += sum * static_cast<A>(x[channel * pixels + offset]);
      sum = 0;
    }
    // The four lanes that share these pixels.
    dot += __shfl_xor_sync(kFullWarp, dot, 1);
    dot += __shfl_xor_sync(kFullWarp, dot, 2);
    if (fragment_lane() % 4 == 0) dots[pixel] = dot;
  }
}

template <typename Sums, typename T, typename A>
__device__ __forceinline__ void store_gradient(Sums& gradient, T* __restrict__ grad_x, int channels, int64_t pixels,
                                               const int64_t* offsets, A alpha) {
  UNROLL
  for (int row = 0; row < Sums::kRows; ++row) {
    const int64_t offset = offsets[Sums::row(row)];
    UNROLL
    for (int column = 0; column < Sums::kColumns; ++column) {
      const int channel = Sums::column(column);
      if (offset >= 0 && channel < channels) {
        grad_x[channel * pixels + offset] = T(alpha * gradient.sum(row, column));
      }
    }
  }
}

// grad_x[c](q) = alpha · sum over t of k_t(p) u_t(p)[c] and slope[t](p) = alpha · k_t(p) · (sum over c of x[c](q)
// u_t(p)[c]), where p reads q with t. Either may be null. No other thread reads the k_t(p) of a slope, which may
// therefore take its place if there is one pass.
template <typename T, typename R, typename Factor, int kChannels>
__global__ void __launch_bounds__(kInputThreads, InputTile<Factor, kChannels>::kBlocks)
    pac_conv2d_backward_input_kernel(const R* __restrict__ grad_y, const T* __restrict__ x,
                                     const typename Operand<Factor>::Element* __restrict__ weight,
                                     const AccumulateType<T>* kernel, T* __restrict__ grad_x, AccumulateType<T>* slope,
                                     PackedWeight packed, PacMap map, int tiles, AccumulateType<T> alpha) {
  using Tile = InputTile<Factor, kChannels>;
  using Element = typename Tile::Element;
  using A = AccumulateType<T>;
  using Sums = typename Tile::Sums;
  constexpr int kGradWords = kInputWords * Tile::kPixelStride, kWeightWords = kInputWords * Tile::kChannelStride;
  SHARED_ARRAY(Element, grad_words, 2 * kGradWords);
  SHARED_ARRAY(Vector<Element>, weight_vectors, 2 * kWeightWords / Vector<Element>::kCount);
  SHARED_ARRAY(int64_t, offsets, kInputPixels);  // of each pixel in its plane, or -1
  SHARED_ARRAY(A, kernel_values, 2 * kInputPixels);
  SHARED_ARRAY(A, dots, 2 * Tile::kWarpsAcross * kInputPixels);
  Element* const weight_words = weight_vectors->values;

  const InputPhase phase(map, blockIdx.x / tiles);
  const int own = threadIdx.x % kInputPixels;
  const PacPlace at = place_after(int64_t{blockIdx.x % tiles} * kInputPixels, own, phase.columns);
  const bool exists = at.row < phase.rows;
  const int pixel_row = phase.row + at.row * map.vertical.stride;
  const int pixel_column = phase.column + at.column * map.horizontal.stride;
  const auto reader = [&](int tap) { return exists ? map.reader(pixel_row, pixel_column, tap) : -1; };
  const bool owns = threadIdx.x < kInputPixels;
  if (owns) offsets[own] = exists ? int64_t{pixel_row} * map.horizontal.size + pixel_column : -1;
  const int warp = threadIdx.x / kWarpThreads;
  const int warp_across = warp % Tile::kWarpsAcross;
  const int warp_pixel = warp / Tile::kWarpsAcross * Tile::kWarpPixels;
  const int warp_channel = warp_across * Tile::kWarpChannels;
  const int first_tap = phase.tap_after(map, -1);

  for (int64_t image = blockIdx.y; image < map.batch; image += gridDim.y) {
    for (int pass = 0; pass < packed.passes; ++pass) {
      const int first_channel = pass * kChannels + warp_channel;
      const int64_t first_plane = (image * map.channels + first_channel) * map.pixels;
      Sums sums, gradient;
      sums.clear();
      gradient.clear();
      InputPiece<R, Factor, kChannels> coming;
      const auto load = [&](int tap, int piece) {
        coming.load(grad_y + image * map.out_channels * map.out_pixels,
                    weight + packed.piece(pass, map.taps, tap, piece), kernel + map.tap_plane(image, tap), map,
                    reader(tap), piece);
      };
      const auto store = [&](int buffer) {
        coming.store(grad_words + buffer * kGradWords, weight_words + buffer * kWeightWords,
                     kernel_values + buffer * kInputPixels);
      };
      int tap = first_tap, piece = 0, buffer = 0;
      if (tap < map.taps) {
        load(tap, piece);
        store(buffer);
      }
      __syncthreads();
      while (tap < map.taps) {
        const bool last_piece = piece + 1 == packed.pieces;
        const int next_tap = last_piece ? phase.tap_after(map, tap) : tap;
        const int next_piece = last_piece ? 0 : piece + 1;
        if (next_tap < map.taps) load(next_tap, next_piece);
        const Element* left = grad_words + buffer * kGradWords + warp_pixel;
        const Element* right = weight_words + buffer * kWeightWords + warp_channel;
        UNROLL
        for (int word = 0; word < kInputWords; word += kFragmentWords) {
          sums.template multiply<1, Tile::kPixelStride, 1, Tile::kChannelStride>(left + word * Tile::kPixelStride,
                                                                                 right + word * Tile::kChannelStride);
        }
        A* const tap_dots = dots + buffer * Tile::kWarpsAcross * kInputPixels;
        const A* const tap_values = kernel_values + buffer * kInputPixels;
        if (last_piece) {
          use_products(sums, gradient, x + first_plane, map.channels - first_channel, map.pixels,
                       slope == nullptr ? nullptr : offsets + warp_pixel, tap_values + warp_pixel,
                       tap_dots + warp_across * kInputPixels + warp_pixel);
        }
        buffer = 1 - buffer;
        if (next_tap < map.taps) store(buffer);
        __syncthreads();
        const int64_t place = last_piece && owns && slope != nullptr ? reader(tap) : -1;
        if (place >= 0) {
          A dot = tap_dots[own];
          if constexpr (Tile::kWarpsAcross == 2) dot += tap_dots[kInputPixels + own];
          A& entry = slope[map.tap_plane(image, tap) + place];
          const A share = alpha * tap_values[own] * dot;
          entry = pass == 0 ? share : entry + share;
        }
        tap = next_tap;
        piece = next_piece;
      }
      if (grad_x == nullptr) continue;
      store_gradient(gradient, grad_x + first_plane, map.channels - first_channel, map.pixels, offsets + warp_pixel,
                     alpha);
    }
  }
}

template <typename T, typename Factor>
void launch_pack(const void* weight, typename Operand<Factor>::Element* packed, const PackedWeight& shape,
                 const PacMap& map, cudaStream_t stream) {
  const int64_t blocks = ceil_divide(shape.count(map.taps), kInputThreads);
  LAUNCH((pac_conv2d_backward_pack_kernel<T, Factor>), dim3(static_cast<unsigned>(blocks)), dim3(kInputThreads), 0,
         stream, static_cast<const T*>(weight), packed, shape, map);
}

template <typename T, typename R, typename Factor>
void launch_input(const PacConv2dBackward& arguments, const typename Operand<Factor>::Element* weight,
                  const AccumulateType<T>* kernel, AccumulateType<T>* slope, const PackedWeight& packed,
                  const PacMap& map, cudaStream_t stream) {
  // Of the first phase, which has the most pixels.
  const int64_t pixels =
      ceil_divide(map.vertical.size, map.vertical.stride) * ceil_divide(map.horizontal.size, map.horizontal.stride);
  const int64_t tiles = ceil_divide(pixels, kInputPixels);
  const int64_t phases = int64_t{InputPhase::phases(map.vertical)} * InputPhase::phases(map.horizontal);
  const dim3 grid(static_cast<unsigned>(tiles * phases), grid_y(map.batch));
  const auto launch = [&](auto channels) {
    LAUNCH((pac_conv2d_backward_input_kernel<T, R, Factor, decltype(channels)::value>), grid, dim3(kInputThreads), 0,
           stream, static_cast<const R*>(arguments.grad_y), static_cast<const T*>(arguments.x), weight, kernel,
           static_cast<T*>(arguments.grad_x), slope, packed, map, static_cast<int>(tiles),
           static_cast<AccumulateType<T>>(arguments.alpha));
  };
  if (packed.channels == 8) return launch(std::integral_constant<int, 8>());
  if (packed.channels == 16) return launch(std::integral_constant<int, 16>());
  if constexpr (!std::is_same_v<T, double>) launch(std::integral_constant<int, 64>());
}

}  // namespace
}  // namespace restoration

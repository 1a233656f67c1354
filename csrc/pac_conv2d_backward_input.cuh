// Backward of the pixel-adaptive convolution in CUDA: grad_x and the slopes m_t(p), of one product. Formulas:
// pac_conv2d_backward_cuda.cu.
// A block owns kInputPixels pixels of x and all channels, kChannels at a time. For each tap t it multiplies grad_y of
// the outputs that read the pixels with t, [pixels, O], with the weights of t, [O, channels]. Before the sums move on,
// they are u_t(p): times k_t(p) they are added to grad_x, and their product with x is the slope, so u never reaches
// memory. While one piece of the operands is multiplied, the next is on its way into registers.
// Pixels lie `stride` apart (a phase), so that each tap is read by all of a block or by none.
// Where a tap is read is counted on from tap to tap, without divisions, planes are found by stepping from one to the
// next, and x stays in registers where it fits: with few channels instructions are the limit.
#pragma once

#include "pac_conv2d_backward.cuh"

namespace restoration {
namespace {

constexpr int kInputPixels = 128;
constexpr int kInputThreads = 256;
constexpr int kInputWarps = kInputThreads / kWarpThreads;

// Depth of a piece of the operands in shared memory, in words. Where channels are few, 16 outputs are usual: more numbers
// than that would be empty. Where they are many, deeper pieces wait less often; two pieces take 27 KB, of which three fit
// a multiprocessor, one more than registers leave room for.
constexpr int input_words(int channels, int word_numbers) {
  return word_numbers == 2 && channels <= 16 ? kFragmentWords : 2 * kFragmentWords;
}

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
  static constexpr int kWords = input_words(kChannels, Operand<Factor>::kCount);
  // Whether there are registers for what is the same for all taps: x, and the numbers of the phase.
  static constexpr bool kRoomy = kChannels <= 16;
  // Odd multiples of 8 words: the four words of depth that a warp reads together lie in other banks.
  static constexpr int kPixelStride = kInputPixels + 8;
  static constexpr int kChannelStride = kChannels / 8 % 2 == 1 ? kChannels : kChannels + 8;
  static constexpr int kVectors = kWords * kChannels / Vector<Element>::kCount;
  static_assert(kVectors <= kInputThreads, "each thread copies one vector of weights at most");
  using Sums = WarpTile<Factor, kWarpPixels / kFragmentRows, kWarpChannels / kFragmentColumns>;
};

// Elements of the weights that pac_conv2d_backward_pack_kernel writes: [passes, taps, pieces, words, channels].
struct PackedWeight {
  int channels;  // of one pass
  int words;     // of one piece
  int passes;
  int pieces;

  PackedWeight(const PacConv2dSizes& sizes, int word_numbers, bool wide)
      : channels(static_cast<int>(input_channels(sizes.channels, wide))),
        words(input_words(channels, word_numbers)),
        passes(static_cast<int>(ceil_divide(sizes.channels, channels))),
        pieces(static_cast<int>(ceil_divide(sizes.out_channels, words * word_numbers))) {}

  HOST_DEVICE int64_t count(int64_t taps) const { return int64_t{passes} * taps * pieces * words * channels; }
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
  const int64_t word = digit(int64_t{shape.pieces} * shape.words);
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

// The pixels of one axis that lie `stride` apart from `pixel` on, which the same taps read, and those taps.
struct PhaseAxis {
  int pixel;
  int pixels;
  int tap;  // the first of them
  int tap_step;
  int taps;
  int place;  // of the output whose first tap lies at the first pixel, if there is one
  int place_step;  // how much farther back that of the next tap is

  PhaseAxis() = default;
  __device__ PhaseAxis(const PacAxis& axis, int kernel_size, int first)
      : pixel(first),
        pixels(quotient(axis.size - first + axis.stride - 1, axis.stride)),
        tap(0),
        tap_step(step_of_taps(axis, kernel_size)) {
    const int position = pixel + axis.padding;
    while (tap < kernel_size && !divides(axis.stride, position - tap * axis.dilation)) ++tap;
    taps = tap < kernel_size ? quotient(kernel_size - 1 - tap, tap_step) + 1 : 0;
    place = quotient(position - tap * axis.dilation, axis.stride);
    place_step = quotient(tap_step * axis.dilation, axis.stride);
  }

  // Between those taps, whichever the phase.
  HOST_DEVICE static int step_of_taps(const PacAxis& axis, int kernel_size) {
    int step = 1;
    while (step < kernel_size && !divides(axis.stride, step * axis.dilation)) ++step;
    return step;
  }

 private:
  HOST_DEVICE static bool divides(int divisor, int value) { return quotient(value, divisor) * divisor == value; }
};

// A tap, counted on both axes among those that read a phase.
struct PhaseTap {
  int row;
  int column;
};

// Pixels of the image that lie `stride` apart: one of count(vertical) · count(horizontal) such sets.
struct InputPhase {
  PhaseAxis rows;
  PhaseAxis columns;

  InputPhase() = default;
  __device__ InputPhase(const PacMap& map, int phase)
      : rows(map.vertical, map.kernel_size, quotient(phase, count(map.horizontal))),
        columns(map.horizontal, map.kernel_size, phase - rows.pixel * count(map.horizontal)) {}

  HOST_DEVICE static int count(const PacAxis& axis) { return axis.stride < axis.size ? axis.stride : axis.size; }

  // Where a pixel of the phase lies in its plane.
  __device__ int64_t offset(const PacMap& map, PacPlace pixel) const {
    const int row = rows.pixel + pixel.row * map.vertical.stride;
    return int64_t{row} * map.horizontal.size + columns.pixel + pixel.column * map.horizontal.stride;
  }

  __device__ PhaseTap first() const { return {columns.taps > 0 ? 0 : rows.taps, 0}; }
  __device__ bool exists(PhaseTap tap) const { return tap.row < rows.taps; }
  __device__ PhaseTap after(PhaseTap tap) const {
    return tap.column + 1 < columns.taps ? PhaseTap{tap.row, tap.column + 1} : PhaseTap{tap.row + 1, 0};
  }
  // Among all taps.
  __device__ int index(const PacMap& map, PhaseTap tap) const {
    return (rows.tap + tap.row * rows.tap_step) * map.kernel_size + columns.tap + tap.column * columns.tap_step;
  }
  // Where the output that reads a pixel of the phase with this tap would be.
  __device__ PacPlace reader_at(PacPlace pixel, PhaseTap tap) const {
    return {pixel.row + rows.place - tap.row * rows.place_step,
            pixel.column + columns.place - tap.column * columns.place_step};
  }
  // That output, or -1.
  __device__ int reader(const PacMap& map, PacPlace pixel, PhaseTap tap) const {
    const PacPlace at = reader_at(pixel, tap);
    return map.has_output(at) ? at.row * map.horizontal.output + at.column : -1;
  }
};

// What one thread carries of a piece of the operands.
template <typename R, typename Factor, int kChannels>
struct InputPiece {
  using Tile = InputTile<Factor, kChannels>;
  using Element = typename Tile::Element;
  using A = typename Operand<Factor>::Sum;
  static constexpr int kCount = Operand<Factor>::kCount;
  static constexpr int kWords = Tile::kWords * kInputPixels / kInputThreads;  // of this thread, neighbours in depth

  R grads[kWords][kCount];
  Vector<Element> weights;
  A kernel_value;

  // place: the output that reads this thread's pixel, or -1. kernel: k of the tap.
  __device__ void load(const R* grad_y, const Element* weight, const A* kernel, const PacMap& map, int place,
                       int piece) {
    if (threadIdx.x < kInputPixels) kernel_value = place >= 0 ? kernel[place] : A(0);
    const int first = (piece * Tile::kWords + first_word()) * kCount;
    const int outputs = place >= 0 ? map.out_channels - first : 0;
    PlaneWalk<const R> source(grad_y, first * map.out_pixels + place, map.out_pixels);
    UNROLL
    for (int word = 0; word < kWords; ++word) {
      UNROLL
      for (int number = 0; number < kCount; ++number) {
        grads[word][number] = word * kCount + number < outputs ? *source : R(0.0f);
        source += 1;
      }
    }
    if (threadIdx.x < Tile::kVectors) weights = reinterpret_cast<const Vector<Element>*>(weight)[threadIdx.x];
  }

  __device__ void store(Element* grad_words, Element* weight_words, A* kernel_values) const {
    if (threadIdx.x < kInputPixels) kernel_values[threadIdx.x] = kernel_value;
    UNROLL
    for (int word = 0; word < kWords; ++word) {
      grad_words[(first_word() + word) * Tile::kPixelStride + threadIdx.x % kInputPixels] =
          pack_operand<Factor>(grads[word]);
    }
    if (threadIdx.x < Tile::kVectors) {
      const int first = threadIdx.x * Vector<Element>::kCount;
      *reinterpret_cast<Vector<Element>*>(weight_words + first / kChannels * Tile::kChannelStride +
                                           first % kChannels) = weights;
    }
  }

 private:
  __device__ static int first_word() { return threadIdx.x / kInputPixels * kWords; }
};

// Calls visit(column, number) for what a lane owns of one pixel, at `offset` in its plane: the numbers of those of its
// channels that exist, of `channels` planes from the warp's first on.
template <typename Sums, typename T, typename Visit>
__device__ __forceinline__ void visit_channels(T* planes, int channels, int64_t pixels, int64_t offset, Visit visit) {
  PlaneWalk<T> number(planes, Sums::column(0) * pixels + offset, pixels);
  UNROLL
  for (int column = 0; column < Sums::kColumns; ++column) {
    if (Sums::column(column) < channels) visit(column, *number);
    number += column % 2 == 0 ? 1 : kFragmentColumns - 1;
  }
}

// x of the pixels and channels that a lane owns; kept, or loaded whenever a row of it is wanted.
template <typename Sums, typename T, bool kKept>
struct LaneX {
  using A = AccumulateType<T>;

  const T* x;
  int channels;
  int64_t pixels;
  const int64_t* offsets;  // of each pixel in its plane, or -1
  A values[kKept ? Sums::kRows : 1][Sums::kColumns];

  __device__ LaneX(const T* x, int channels, int64_t pixels, const int64_t* offsets, bool wanted)
      : x(x), channels(channels), pixels(pixels), offsets(offsets) {
    if constexpr (kKept) {
      if (!wanted) return;
      UNROLL
      for (int row = 0; row < Sums::kRows; ++row) load(row, values[row]);
    }
  }

  __device__ const A (&row(int row))[Sums::kColumns] {
    if constexpr (kKept) return values[row];
    load(row, values[0]);
    return values[0];
  }

 private:
  __device__ void load(int row, A (&row_values)[Sums::kColumns]) const {
    const int64_t offset = offsets[Sums::row(row)];
    if (offset < 0) return;
    visit_channels<Sums>(x, channels, pixels, offset,
                         [&](int column, const T& number) { row_values[column] = static_cast<A>(number); });
  }
};

// What becomes of u_t(p) in one of a lane's rows: gradient += k_t(p) · u.
template <typename Sums, typename A>
__device__ __forceinline__ void add_products(Sums& gradient, Sums& sums, int row, A kernel_value) {
  UNROLL
  for (int column = 0; column < Sums::kColumns; ++column) {
    gradient.sum(row, column) += kernel_value * sums.sum(row, column);
  }
}

// The sum of x · u over a lane's channels; three more lanes share the row.
template <typename Sums, typename X>
__device__ __forceinline__ typename Sums::A lane_dot(Sums& sums, X& x, int row) {
  const auto& numbers = x.row(row);
  typename Sums::A dot = 0;
  UNROLL
  for (int column = 0; column < Sums::kColumns; ++column) {
    if (Sums::column(column) < x.channels) dot += sums.sum(row, column) * numbers[column];
  }
  return dot;
}

// All rows when the product of a tap is done, and if wanted dots[pixel] = the sum of x · u over this warp's channels.
template <typename Sums, typename X, typename A>
__device__ __forceinline__ void use_products(Sums& sums, Sums& gradient, X& x, const A* kernel_values, bool wants_dots,
                                             A* dots) {
  UNROLL
  for (int row = 0; row < Sums::kRows; ++row) {
    const int pixel = Sums::row(row);
    add_products(gradient, sums, row, kernel_values[pixel]);
    if (!wants_dots) continue;
    A dot = lane_dot(sums, x, row);
    dot += __shfl_xor_sync(kFullWarp, dot, 1);
    dot += __shfl_xor_sync(kFullWarp, dot, 2);
    if (fragment_lane() % 4 == 0) dots[pixel] = dot;
  }
  sums.clear();
}

template <typename Sums, typename T, typename A>
__device__ __forceinline__ void store_gradient(Sums& gradient, T* __restrict__ grad_x, int channels, int64_t pixels,
                                               const int64_t* offsets, A alpha) {
  UNROLL
  for (int row = 0; row < Sums::kRows; ++row) {
    const int64_t offset = offsets[Sums::row(row)];
    if (offset < 0) continue;
    visit_channels<Sums>(grad_x, channels, pixels, offset, [&](int column, T& number) {
      number = T(alpha * gradient.sum(row, column));
    });
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
  constexpr int kGradWords = Tile::kWords * Tile::kPixelStride, kWeightWords = Tile::kWords * Tile::kChannelStride;
  SHARED_ARRAY(Element, grad_words, 2 * kGradWords);
  SHARED_ARRAY(Vector<Element>, weight_vectors, 2 * kWeightWords / Vector<Element>::kCount);
  SHARED_ARRAY(int64_t, offsets, kInputPixels);  // of each pixel in its plane, or -1
  SHARED_ARRAY(A, kernel_values, 2 * kInputPixels);
  SHARED_ARRAY(A, dots, 2 * Tile::kWarpsAcross * kInputPixels);
  Element* const weight_words = weight_vectors->values;
  constexpr int kPieceNumbers = Tile::kWords * kChannels;

  SHARED_ARRAY(InputPhase, phase_of_block, 1);
  if (threadIdx.x == 0) *phase_of_block = InputPhase(map, blockIdx.x / tiles);
  __syncthreads();
  const std::conditional_t<Tile::kRoomy, InputPhase, const InputPhase&> phase = *phase_of_block;
  const int own = threadIdx.x % kInputPixels;
  const PacPlace at = place_after(int64_t{blockIdx.x % tiles} * kInputPixels, own, phase.columns.pixels);
  const bool exists = at.row < phase.rows.pixels;
  const auto reader = [&](PhaseTap tap) { return exists ? phase.reader(map, at, tap) : -1; };
  const bool owns = threadIdx.x < kInputPixels;
  if (owns) offsets[own] = exists ? phase.offset(map, at) : -1;
  const int warp = threadIdx.x / kWarpThreads;
  const int warp_across = warp % Tile::kWarpsAcross;
  const int warp_pixel = warp / Tile::kWarpsAcross * Tile::kWarpPixels;
  const int warp_channel = warp_across * Tile::kWarpChannels;
  const bool wants_slope = slope != nullptr;
  __syncthreads();  // The offsets are there.

  for (int64_t image = blockIdx.y; image < map.batch; image += gridDim.y) {
    for (int pass = 0; pass < packed.passes; ++pass) {
      const int first_channel = pass * kChannels + warp_channel;
      const int64_t first_plane = (image * map.channels + first_channel) * map.pixels;
      Sums sums, gradient;
      sums.clear();
      gradient.clear();
      LaneX<Sums, T, Tile::kRoomy> lane_x(x + first_plane, map.channels - first_channel, map.pixels,
                                           offsets + warp_pixel, wants_slope);
      const R* const image_grads = grad_y + image * map.out_channels * map.out_pixels;
      const Element* const pass_weight = weight + int64_t{pass} * map.taps * packed.pieces * kPieceNumbers;
      InputPiece<R, Factor, kChannels> coming;
      const auto load = [&](PhaseTap tap, int piece) {
        const int index = phase.index(map, tap);
        coming.load(image_grads, pass_weight + int64_t{index * packed.pieces + piece} * kPieceNumbers,
                    kernel + map.tap_plane(image, index), map, reader(tap), piece);
      };
      const auto store = [&](int buffer) {
        coming.store(grad_words + buffer * kGradWords, weight_words + buffer * kWeightWords,
                     kernel_values + buffer * kInputPixels);
      };
      PhaseTap tap = phase.first();
      int piece = 0, buffer = 0;
      if (phase.exists(tap)) {
        load(tap, piece);
        store(buffer);
      }
      __syncthreads();
      while (phase.exists(tap)) {
        const bool last_piece = piece + 1 == packed.pieces;
        const PhaseTap next_tap = last_piece ? phase.after(tap) : tap;
        const int next_piece = last_piece ? 0 : piece + 1;
        if (phase.exists(next_tap)) load(next_tap, next_piece);
        const Element* left = grad_words + buffer * kGradWords + warp_pixel;
        const Element* right = weight_words + buffer * kWeightWords + warp_channel;
        UNROLL
        for (int word = 0; word < Tile::kWords; word += kFragmentWords) {
          sums.template multiply<1, Tile::kPixelStride, 1, Tile::kChannelStride>(left + word * Tile::kPixelStride,
                                                                                 right + word * Tile::kChannelStride);
        }
        A* const tap_dots = dots + buffer * Tile::kWarpsAcross * kInputPixels;
        const A* const tap_values = kernel_values + buffer * kInputPixels;
        if (last_piece) {
          use_products(sums, gradient, lane_x, tap_values + warp_pixel, wants_slope,
                       tap_dots + warp_across * kInputPixels + warp_pixel);
        }
        buffer = 1 - buffer;
        if (phase.exists(next_tap)) store(buffer);
        __syncthreads();
        const int place = last_piece && owns && wants_slope ? reader(tap) : -1;
        if (place >= 0) {
          A dot = tap_dots[own];
          if constexpr (Tile::kWarpsAcross == 2) dot += tap_dots[kInputPixels + own];
          A& entry = slope[map.tap_plane(image, phase.index(map, tap)) + place];
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
  LAUNCH((pac_conv2d_backward_pack_kernel<T, Factor>), dim3(grid_x(blocks)), dim3(kInputThreads), 0,
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
  const int64_t phases = int64_t{InputPhase::count(map.vertical)} * InputPhase::count(map.horizontal);
  const dim3 grid(grid_x(tiles * phases), grid_y(map.batch));
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

// Backward of the pixel-adaptive convolution in CUDA: what its kernels share. Formulas: pac_conv2d_backward_cuda.cu.
#pragma once

#include <type_traits>

#include "common.cuh"
#include "matrix_fragments.cuh"
#include "pac_conv2d_tiles.cuh"

namespace restoration {

// Divisions take 25 instructions, and strides are rarely other than 1.
HOST_DEVICE int quotient(int value, int divisor) { return divisor == 1 ? value : value / divisor; }

struct PacAxis : PacConv2dTiling::Axis {
  using Axis::Axis;

  __device__ bool contains(int position) const { return position >= 0 && position < size; }
  // The output place whose tap `tap` lies at this position, or -1.
  __device__ int reader(int position, int tap) const {
    const int distance = position + padding - tap * dilation;
    const int place = quotient(distance, stride);
    return distance >= 0 && place * stride == distance && place < output ? place : -1;
  }
};

struct PacPlace {
  int row;
  int column;
};

// The pixels of a padded plane are counted in 32 bits, planes and images in 64.
struct PacMap {
  int64_t batch;
  int64_t pixels;
  int64_t out_pixels;
  int channels;
  int guide_channels;
  int out_channels;
  int kernel_size;
  int taps;
  bool normalize;
  PacAxis vertical;
  PacAxis horizontal;

  explicit PacMap(const PacConv2dSizes& sizes)
      : batch(sizes.batch),
        pixels(sizes.pixels()),
        out_pixels(sizes.out_pixels()),
        channels(static_cast<int>(sizes.channels)),
        guide_channels(static_cast<int>(sizes.guide_channels)),
        out_channels(static_cast<int>(sizes.out_channels)),
        kernel_size(static_cast<int>(sizes.kernel_size)),
        taps(static_cast<int>(sizes.taps())),
        normalize(sizes.normalize),
        vertical(sizes.vertical, sizes.kernel_size),
        horizontal(sizes.horizontal, sizes.kernel_size) {}

  // Where plane `tap` of kernel or slope, both [B,K²,H',W'], starts.
  __device__ int64_t tap_plane(int64_t image, int tap) const { return (image * taps + tap) * out_pixels; }

  // Calls visit(tap, row, column) for every tap, in order.
  template <typename Visit>
  __device__ void visit_taps(Visit visit) const {
    int tap = 0;
    for (int row = 0; row < kernel_size; ++row) {
      for (int column = 0; column < kernel_size; ++column) visit(tap++, row, column);
    }
  }

  __device__ bool has_output(PacPlace at) const {
    return at.row >= 0 && at.row < vertical.output && at.column >= 0 && at.column < horizontal.output;
  }

  // The output place whose tap lies at this pixel, or -1.
  __device__ int reader(int row, int column, int tap_row, int tap_column) const {
    const int out_row = vertical.reader(row, tap_row);
    const int out_column = horizontal.reader(column, tap_column);
    return out_row < 0 || out_column < 0 ? -1 : out_row * horizontal.output + out_column;
  }
};

// The place `offset` after another, in rows of `width` places.
__device__ __forceinline__ PacPlace place_after(PacPlace first, int offset, int width) {
  const unsigned beyond = static_cast<unsigned>(first.column) + offset, row = width;
  // Divisions take 25 instructions, and few are needed where rows are long.
  if (beyond < row) return {first.row, static_cast<int>(beyond)};
  if (beyond < 2 * row) return {first.row + 1, static_cast<int>(beyond - row)};
  return {static_cast<int>(first.row + beyond / row), static_cast<int>(beyond % row)};
}

// The same where the first is counted from the start of the plane: a division in 64 bits, once a block or so.
__device__ __forceinline__ PacPlace place_after(int64_t first, int offset, int width) {
  const int64_t row = first / width;
  return place_after(PacPlace{static_cast<int>(row), static_cast<int>(first - row * width)}, offset, width);
}

// The numbers at one place of planes `pixels` apart, from planes[first] on; they need not exist where they are not read.
// Steps in bytes: from an index each address would be made anew.
template <typename T>
class PlaneWalk {
 public:
  PlaneWalk() = default;
  __device__ PlaneWalk(T* planes, int64_t first, int64_t pixels)
      : address_(reinterpret_cast<Byte*>(planes) + first * kBytes), step_(pixels * kBytes) {}
  __device__ T& operator*() const { return (*this)[0]; }
  // One farther on in its plane.
  __device__ T& operator[](int places) const { return reinterpret_cast<T*>(address_)[places]; }
  __device__ void operator+=(int planes) { address_ += planes * step_; }

 private:
  using Byte = std::conditional_t<std::is_const_v<T>, const char, char>;
  static constexpr int64_t kBytes = sizeof(T);
  Byte* address_;
  int64_t step_;
};

// How an operand of a product lies in shared memory: float and double as they are, for products of the threads
// themselves; Tf32 and 16-bit numbers in words for tensor cores.
template <typename Factor>
struct Operand : Word<Factor> {
  using Element = uint32_t;
  using Sum = float;
  static constexpr bool kExact = false;
};
template <typename Factor>
struct ExactOperand {
  using Element = Factor;
  using Sum = Factor;
  static constexpr bool kExact = true;
  static constexpr int kCount = 1;
  __device__ static Factor pack(const Factor (&values)[kCount]) { return values[0]; }
};
template <>
struct Operand<float> : ExactOperand<float> {};
template <>
struct Operand<double> : ExactOperand<double> {};

// One word of an operand, of numbers that are rounded where it holds others.
template <typename Factor, typename R>
__device__ __forceinline__ typename Operand<Factor>::Element pack_operand(const R (&numbers)[Operand<Factor>::kCount]) {
  if constexpr (sizeof(R) == 2 && std::is_same_v<R, Factor>) {
    uint32_t word;
    std::memcpy(&word, numbers, sizeof(word));
    return word;
  } else {
    typename Operand<Factor>::Sum values[Operand<Factor>::kCount];
    UNROLL
    for (int number = 0; number < Operand<Factor>::kCount; ++number) {
      values[number] = static_cast<typename Operand<Factor>::Sum>(numbers[number]);
    }
    return Operand<Factor>::pack(values);
  }
}

// One warp's share of a product: kRowTiles · 16 rows, kColumnTiles · 8 columns. A lane owns the same sums whether it
// makes them or tensor cores do.
template <typename Factor, int kRowTiles, int kColumnTiles>
struct WarpTile {
  using A = typename Operand<Factor>::Sum;
  using Element = typename Operand<Factor>::Element;
  static constexpr int kRows = 2 * kRowTiles;  // of this lane
  static constexpr int kColumns = 2 * kColumnTiles;

  A sums[kRowTiles][kColumnTiles][SumFragment::kCount];

  __device__ static int row(int place) { return place / 2 * kFragmentRows + SumFragment::row(place % 2 * 2); }
  __device__ static int column(int place) { return place / 2 * kFragmentColumns + SumFragment::column(place % 2); }
  __device__ A& sum(int row, int column) { return sums[row / 2][column / 2][row % 2 * 2 + column % 2]; }

  __device__ void clear() {
    UNROLL
    for (int row = 0; row < kRows; ++row) {
      UNROLL
      for (int column = 0; column < kColumns; ++column) sum(row, column) = 0;
    }
  }

  // Adds a product kFragmentWords deep. The strides are those between neighbours in an operand.
  template <int kRowStride, int kLeftWordStride, int kColumnStride, int kRightWordStride>
  __device__ void multiply(const Element* left, const Element* right) {
    if constexpr (Operand<Factor>::kExact) {
      UNROLL
      for (int word = 0; word < kFragmentWords; ++word) {
        A rows[kRows], columns[kColumns];
        UNROLL
        for (int place = 0; place < kRows; ++place) {
          rows[place] = left[row(place) * kRowStride + word * kLeftWordStride];
        }
        UNROLL
        for (int place = 0; place < kColumns; ++place) {
          columns[place] = right[column(place) * kColumnStride + word * kRightWordStride];
        }
        UNROLL
        for (int row = 0; row < kRows; ++row) {
          UNROLL
          for (int column = 0; column < kColumns; ++column) sum(row, column) += rows[row] * columns[column];
        }
      }
    } else {
      using Left = LeftFragment<Factor>;
      using Right = RightFragment<Factor>;
      Left lefts[kRowTiles];
      UNROLL
      for (int tile = 0; tile < kRowTiles; ++tile) {
        UNROLL
        for (int place = 0; place < Left::kCount; ++place) {
          lefts[tile].words[place] = left[(tile * kFragmentRows + Left::row(place)) * kRowStride +
                                          Left::word(place) * kLeftWordStride];
        }
      }
      UNROLL
      for (int tile = 0; tile < kColumnTiles; ++tile) {
        Right columns;
        UNROLL
        for (int place = 0; place < Right::kCount; ++place) {
          columns.words[place] = right[(tile * kFragmentColumns + Right::column(place)) * kColumnStride +
                                       Right::word(place) * kRightWordStride];
        }
        UNROLL
        for (int row = 0; row < kRowTiles; ++row) {
          matrix_product(Factor(), sums[row][tile], lefts[row].words, columns.words);
        }
      }
    }
  }
};

}  // namespace restoration

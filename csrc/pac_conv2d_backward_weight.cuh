// Backward of the pixel-adaptive convolution in CUDA: grad_weight and grad_bias. Formulas: pac_conv2d_backward_cuda.cu.
// grad_weight is the product of grad_y [O, pixels] with the scaled columns k_t(p) x[c](p+t) [pixels, K²·C], made on
// their way into shared memory. A block owns a tile of the sums and one share of the pixels; a second kernel adds the
// sums of all shares in order. How pixels are shared out depends on sizes alone: the same bits in every run and on
// every device of one architecture, so there is no other, faster mode to switch to.
#pragma once

#include "pac_conv2d_backward.cuh"

namespace restoration {
namespace {

constexpr int kWeightColumns = 64;
// Depth of the operands in shared memory, in words: one a lane, so that a warp reads neighbouring pixels.
constexpr int kWeightWords = kWarpThreads;
// Words from one row of an operand to the next: an odd multiple of 4 has no bank conflicts.
constexpr int kWeightStride = kWeightWords + 4;

// Loads of one block are hidden by the products of the others: 16 warps fit a multiprocessor with 128 registers each.
constexpr int kWeightWarpsResident = 16;

// Shares of the pixels: enough blocks for 128 multiprocessors, but no share below eight steps of the product, beside
// which writing its sums is cheap, and no more than 8 MB of sums.
constexpr int64_t kWantedWarps = int64_t{128} * kWeightWarpsResident;
constexpr int64_t kLeastSteps = 8;
constexpr int64_t kMostSumBytes = int64_t{8} << 20;

// The outputs of a block, and who owns which sums.
template <int kOutputs_>
struct WeightTile {
  static constexpr int kOutputs = kOutputs_;
  static constexpr int kWarps = kOutputs <= 64 ? 4 : 8;
  static constexpr int kThreads = kWarps * kWarpThreads;
  static constexpr int kWarpsAcross = kOutputs == 16 ? 4 : 2;
  static constexpr int kWarpOutputs = kOutputs * kWarpsAcross / kWarps;
  static constexpr int kWarpColumns = kWeightColumns / kWarpsAcross;
  template <typename Factor>
  using Sums = WarpTile<Factor, kWarpOutputs / kFragmentRows, kWarpColumns / kFragmentColumns>;
};

// 16 outputs cost little beside what must be read for them. Above 64, larger tiles read less.
// Larger tiles of float64 (kWide) do not fit in registers.
template <bool kWide, typename Call>
void choose_weight_tile(int64_t out_channels, Call call) {
  if constexpr (!kWide) {
    if (out_channels > 64) return call(WeightTile<128>());
    if (out_channels > 16) return call(WeightTile<64>());
  }
  call(WeightTile<16>());
}

// How the product is cut. columns is 0 where only grad_bias is wanted.
struct WeightCut {
  int columns;
  int column_tiles;
  int output_tiles;
  int64_t steps_per_image;
  int64_t steps;  // of kWeightWords words of pixels, image after image
  int64_t shares;

  WeightCut(const PacConv2dSizes& sizes, bool wants_weight, int word_numbers, bool wide)
      : columns(wants_weight ? static_cast<int>(sizes.depth()) : 0),
        column_tiles(static_cast<int>(std::max<int64_t>(1, ceil_divide(columns, kWeightColumns)))),
        steps_per_image(ceil_divide(sizes.out_pixels(), kWeightWords * word_numbers)),
        steps(sizes.batch * steps_per_image) {
    const auto cut = [&](auto tile) {
      output_tiles = static_cast<int>(ceil_divide(sizes.out_channels, tile.kOutputs));
      const int64_t tiles_warps = int64_t{column_tiles} * output_tiles * tile.kWarps;
      const int64_t share_bytes = sizes.out_channels * (columns + 1) * int64_t{sizeof(float)};
      shares = std::min({kWantedWarps / tiles_warps, steps / kLeastSteps, kMostSumBytes / share_bytes, kMaximumGridY});
      shares = std::max<int64_t>(shares, 1);
    };
    wide ? choose_weight_tile<true>(sizes.out_channels, cut) : choose_weight_tile<false>(sizes.out_channels, cut);
  }
};

// The pixels of one lane in one step: neighbours in a word.
template <int kCount>
struct LanePixels {
  int64_t place;       // of the first, in a plane of outputs
  bool exists[kCount];
  int rows[kCount];    // where the first tap reads x
  int columns[kCount];

  __device__ LanePixels(const PacMap& map, int64_t place, PacPlace first) : place(place) {
    UNROLL
    for (int number = 0; number < kCount; ++number) {
      const PacPlace at = place_after(first, number, map.horizontal.output);
      exists[number] = place + number < map.out_pixels;
      rows[number] = map.vertical.position(at.row, 0);
      columns[number] = map.horizontal.position(at.column, 0);
    }
  }
};

// A column of the product: a channel of x under a tap.
struct WeightColumn {
  int tap_row;
  int tap_column;
  int channel;

  __device__ WeightColumn(const PacMap& map, int column) {
    const int tap = column / map.channels;
    tap_row = tap / map.kernel_size;
    tap_column = tap % map.kernel_size;
    channel = column % map.channels;
  }
  // On to the first channel under the next tap.
  __device__ void next_tap(const PacMap& map) {
    channel = 0;
    if (++tap_column < map.kernel_size) return;
    tap_column = 0;
    ++tap_row;
  }
};

// What a tap does to the pixels of a lane.
template <typename A, int kCount>
struct TapOfPixels {
  bool inside[kCount];
  A scales[kCount];        // k_t(p)
  int64_t offsets[kCount];  // of p+t in a plane of x

  // image_kernel: the kernel of one image.
  __device__ TapOfPixels(const PacMap& map, const LanePixels<kCount>& pixels, const A* image_kernel,
                         const WeightColumn& column) {
    const int tap = column.tap_row * map.kernel_size + column.tap_column;
    const A* const values = image_kernel + tap * map.out_pixels + pixels.place;
    UNROLL
    for (int number = 0; number < kCount; ++number) {
      const int row = pixels.rows[number] + column.tap_row * map.vertical.dilation;
      const int place = pixels.columns[number] + column.tap_column * map.horizontal.dilation;
      inside[number] = pixels.exists[number] && map.vertical.contains(row) && map.horizontal.contains(place);
      offsets[number] = int64_t{row} * map.horizontal.size + place;
      scales[number] = inside[number] ? values[number] : A(0);
    }
  }
};

// grad_words[output] = grad_y of a lane's pixels, for this warp's outputs; from `grad_y` on there are `outputs`. Adds
// what it reads to bias, if wanted.
template <typename Factor, typename Tile, typename R, typename A, int kCount, int kEach>
__device__ __forceinline__ void stage_grads(const R* grad_y, const PacMap& map, const LanePixels<kCount>& pixels,
                                            int outputs, bool sums_bias, A (&bias)[kEach],
                                            typename Operand<Factor>::Element* grad_words) {
  PlaneWalk<const R> source(grad_y, pixels.place, map.out_pixels);
  UNROLL
  for (int part = 0; part < kEach; ++part) {
    const int row = part * Tile::kWarps;
    A values[kCount];
    UNROLL
    for (int number = 0; number < kCount; ++number) {
      values[number] = row < outputs && pixels.exists[number] ? static_cast<A>(source[number]) : A(0);
      if (sums_bias) bias[part] += values[number];
    }
    source += Tile::kWarps;
    grad_words[row * kWeightStride] = Operand<Factor>::pack(values);
  }
}

// column_words[column] = k_t(p) x[c](p+t) of a lane's pixels, for this warp's columns: `columns` from `first` on.
template <typename Factor, typename T, typename A, int kCount>
__device__ __forceinline__ void stage_columns(const T* image_x, const A* image_kernel, const PacMap& map,
                                              const LanePixels<kCount>& pixels, WeightColumn first, int columns,
                                              typename Operand<Factor>::Element* column_words) {
  // The loads of eight numbers are under way together: those of more do not fit in registers. Written out, as no load
  // moves up above a store to shared memory by itself.
  constexpr int kTogether = 8 / kCount;
#pragma unroll 1
  for (int run; columns > 0; columns -= run, first.next_tap(map)) {
    const TapOfPixels<A, kCount> tap(map, pixels, image_kernel, first);
    run = min(columns, map.channels - first.channel);
    PlaneWalk<const T> sources[kCount];
    UNROLL
    for (int number = 0; number < kCount; ++number) {
      sources[number] = {image_x, first.channel * map.pixels + tap.offsets[number], map.pixels};
    }
#pragma unroll 1
    for (int left = run; left > 0; left -= kTogether) {
      A values[kTogether][kCount];
      UNROLL
      for (int part = 0; part < kTogether; ++part) {
        UNROLL
        for (int number = 0; number < kCount; ++number) {
          values[part][number] = part < left && tap.inside[number] ? static_cast<A>(*sources[number]) : A(0);
          sources[number] += 1;
        }
      }
      UNROLL
      for (int part = 0; part < kTogether; ++part) {
        A products[kCount];
        UNROLL
        for (int number = 0; number < kCount; ++number) products[number] = values[part][number] * tap.scales[number];
        if (part < left) column_words[part * kWeightStride] = Operand<Factor>::pack(products);
      }
      column_words += min(left, kTogether) * kWeightStride;
    }
  }
}

// weight_sums[share] [O, K²·C] and bias_sums[share] [O], which may be null.
template <typename T, typename R, typename Factor, typename Tile>
__global__ void __launch_bounds__(Tile::kThreads, kWeightWarpsResident / Tile::kWarps)
    pac_conv2d_backward_weight_kernel(const R* __restrict__ grad_y, const T* __restrict__ x,
                                      const AccumulateType<T>* __restrict__ kernel,
                                      AccumulateType<T>* __restrict__ weight_sums,
                                      AccumulateType<T>* __restrict__ bias_sums, WeightCut cut, PacMap map) {
  using A = AccumulateType<T>;
  using Element = typename Operand<Factor>::Element;
  using Sums = typename Tile::template Sums<Factor>;
  constexpr int kCount = Operand<Factor>::kCount;
  constexpr int kStepPixels = kWeightWords * kCount;
  constexpr int kOutputsEach = Tile::kOutputs / Tile::kWarps;
  constexpr int kColumnsEach = kWeightColumns / Tile::kWarps;
  SHARED_ARRAY(Element, grad_words, Tile::kOutputs * kWeightStride);
  SHARED_ARRAY(Element, column_words, kWeightColumns * kWeightStride);
  const int warp = threadIdx.x / kWarpThreads, lane = threadIdx.x % kWarpThreads;
  const int first_column = blockIdx.x % cut.column_tiles * kWeightColumns;
  const int first_output = blockIdx.x / cut.column_tiles * Tile::kOutputs;
  const bool sums_bias = bias_sums != nullptr && first_column == 0;
  // Neighbouring columns, which have few taps: what belongs to a tap is found once for all of its channels.
  const int own_column = first_column + warp * kColumnsEach;
  const int own_columns = min(kColumnsEach, cut.columns - own_column);
  Element* const own_words = column_words + warp * kColumnsEach * kWeightStride + lane;
  const WeightColumn own_first(map, own_column);
  for (int column = max(own_columns, 0); column < kColumnsEach; ++column) own_words[column * kWeightStride] = {};

  const int64_t share_steps = ceil_divide(cut.steps, gridDim.y);
  const int64_t first_step = blockIdx.y * share_steps, last_step = min(first_step + share_steps, cut.steps);
  int64_t image = first_step / cut.steps_per_image;
  int64_t place = first_step % cut.steps_per_image * kStepPixels;  // of the first lane
  PacPlace first = place_after(place, lane * kCount, map.horizontal.output);  // of this one
  Sums sums;
  sums.clear();
  A bias[kOutputsEach] = {};
  for (int64_t step = first_step; step < last_step; ++step) {
    const LanePixels<kCount> pixels(map, place + lane * kCount, first);
    stage_grads<Factor, Tile>(grad_y + (image * map.out_channels + first_output + warp) * map.out_pixels, map, pixels,
                         map.out_channels - first_output - warp, sums_bias, bias,
                         grad_words + warp * kWeightStride + lane);
    stage_columns<Factor>(x + image * map.channels * map.pixels, kernel + image * map.taps * map.out_pixels, map,
                          pixels, own_first, own_columns, own_words);
    __syncthreads();
    const Element* left = grad_words + warp / Tile::kWarpsAcross * Tile::kWarpOutputs * kWeightStride;
    const Element* right = column_words + warp % Tile::kWarpsAcross * Tile::kWarpColumns * kWeightStride;
    UNROLL
    for (int word = 0; word < kWeightWords; word += kFragmentWords) {
      sums.template multiply<kWeightStride, 1, kWeightStride, 1>(left + word, right + word);
    }
    __syncthreads();
    place += kStepPixels;
    first = place_after(first, kStepPixels, map.horizontal.output);
    if (place >= map.out_pixels) {
      ++image;
      place = 0;
      first = place_after(PacPlace{0, 0}, lane * kCount, map.horizontal.output);
    }
  }

  const int64_t share = blockIdx.y;
  if (sums_bias) {
    UNROLL
    for (int part = 0; part < kOutputsEach; ++part) {
      const A sum = warp_sum(bias[part]);
      const int output = first_output + warp + part * Tile::kWarps;
      if (lane == 0 && output < map.out_channels) bias_sums[share * map.out_channels + output] = sum;
    }
  }
  UNROLL
  for (int row = 0; row < Sums::kRows; ++row) {
    const int output = first_output + warp / Tile::kWarpsAcross * Tile::kWarpOutputs + Sums::row(row);
    A* const row_sums = weight_sums + (share * map.out_channels + output) * cut.columns;
    UNROLL
    for (int part = 0; part < Sums::kColumns; ++part) {
      const int column = first_column + warp % Tile::kWarpsAcross * Tile::kWarpColumns + Sums::column(part);
      if (output < map.out_channels && column < cut.columns) row_sums[column] = sums.sum(row, part);
    }
  }
}

// Threads of the block that adds up shares: kReduceRows of them for each of a warp's neighbouring sums.
constexpr int kReduceRows = 8;

// gradient [O, C, taps] = alpha · the sum of `shares` sums [O, taps, C].
template <typename T>
__global__ void __launch_bounds__(kWarpThreads* kReduceRows)
    pac_conv2d_backward_reduce_kernel(const AccumulateType<T>* __restrict__ sums, T* __restrict__ gradient,
                                      int64_t shares, int64_t count, int channels, int taps, AccumulateType<T> alpha) {
  using A = AccumulateType<T>;
  SHARED_ARRAY(A, parts, kWarpThreads * kReduceRows);
  const int64_t place = int64_t{blockIdx.x} * kWarpThreads + threadIdx.x;
  A part = 0;
  if (place < count) {
#pragma unroll 8
    for (int64_t share = threadIdx.y; share < shares; share += kReduceRows) part += sums[share * count + place];
  }
  parts[threadIdx.y * kWarpThreads + threadIdx.x] = part;
  __syncthreads();
  if (threadIdx.y != 0 || place >= count) return;
  A sum = 0;
  UNROLL
  for (int row = 0; row < kReduceRows; ++row) sum += parts[row * kWarpThreads + threadIdx.x];
  const int64_t channel = place % channels, tap = place / channels % taps, output = place / channels / taps;
  gradient[(output * channels + channel) * taps + tap] = T(alpha * sum);
}

template <typename T, typename R, typename Factor>
void launch_weight(const PacConv2dBackward& arguments, const AccumulateType<T>* kernel, AccumulateType<T>* weight_sums,
                   AccumulateType<T>* bias_sums, const WeightCut& cut, const PacMap& map, cudaStream_t stream) {
  const dim3 grid(grid_x(int64_t{cut.column_tiles} * cut.output_tiles),
                  static_cast<unsigned>(cut.shares));
  choose_weight_tile<std::is_same_v<T, double>>(map.out_channels, [&](auto tile) {
    using Tile = decltype(tile);
    LAUNCH((pac_conv2d_backward_weight_kernel<T, R, Factor, Tile>), grid, dim3(Tile::kThreads), 0, stream,
           static_cast<const R*>(arguments.grad_y), static_cast<const T*>(arguments.x), kernel, weight_sums, bias_sums,
           cut, map);
  });
}

template <typename T>
void launch_reduce(const AccumulateType<T>* sums, void* gradient, int64_t shares, int64_t outputs, int channels,
                   int taps, double alpha, cudaStream_t stream) {
  const int64_t count = outputs * channels * taps;
  LAUNCH(pac_conv2d_backward_reduce_kernel<T>, dim3(grid_x(ceil_divide(count, kWarpThreads))),
         dim3(kWarpThreads, kReduceRows), 0, stream, sums, static_cast<T*>(gradient), shares, count, channels, taps,
         static_cast<AccumulateType<T>>(alpha));
}

}  // namespace
}  // namespace restoration

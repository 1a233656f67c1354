// Backward of the pixel-adaptive convolution in CUDA where channels are few and products run on tensor cores: grad_x
// and the slopes m_t(p), of one product. Formulas: pac_conv2d_backward_cuda.cu.
// In pac_conv2d_backward_input.cuh every tap brings its grad_y into shared memory anew, which takes many more
// instructions than the products of few channels. Here a block owns a rectangle of pixels, and what all taps read of
// grad_y lies in shared memory before the first of them, pixel by pixel, so that a fragment is one load wherever the
// tap begins; and so do the k_t(p). From then on every warp goes its own way.
#pragma once

#include "async_copy.cuh"
#include "matrix_loads.cuh"
#include "pac_conv2d_backward_input.cuh"

namespace restoration {
namespace {

constexpr int kStagedThreads = 128;
constexpr int kStagedRows = 8;
constexpr int kStagedColumns = kFragmentRows;  // a fragment's pixels lie in one row
constexpr int kStagedPixels = kStagedRows * kStagedColumns;
constexpr int kStagedFragments = kStagedRows / (kStagedThreads / kWarpThreads);  // of a warp
static_assert(kStagedPixels == kStagedThreads, "a thread brings in the k_t(p) of one pixel");
static_assert(2 * kStagedFragments == 4, "of the four lanes that share rows, each makes the slopes of one");

// Where a block's pixels are.
struct StagedPlaces {
  InputPhase phase;
  int64_t offsets[kStagedPixels];  // of each in its plane, or -1
};

// How the rectangles lie in every phase, and what a block keeps in shared memory: words[row][column][word] of grad_y,
// kernel[tap][pixel], and its places.
struct StagedTiles {
  int across;
  int count;  // of a phase
  int rows;
  int columns;
  int words;   // of a pixel
  int stride;  // between neighbouring pixels: rows of fragments lie in different banks

  StagedTiles(const PacMap& map, const PackedWeight& packed)
      : across(tiles(map.horizontal, kStagedColumns)),
        count(across * tiles(map.vertical, kStagedRows)),
        rows(kStagedRows + reach(map.vertical, map.kernel_size)),
        columns(kStagedColumns + reach(map.horizontal, map.kernel_size)),
        words(packed.pieces * packed.words),
        stride(words + Vector<uint32_t>::kCount) {}

  HOST_DEVICE int64_t grad_words() const { return int64_t{rows} * columns * stride; }
  int64_t bytes(int taps) const {
    const int64_t numbers = grad_words() + int64_t{taps} * kStagedPixels;
    return numbers * int64_t{sizeof(float)} + int64_t{sizeof(StagedPlaces)};
  }

 private:
  // Of the first phase, which has the most pixels.
  static int tiles(const PacAxis& axis, int pixels) {
    return static_cast<int>(ceil_divide(ceil_divide(axis.size, axis.stride), pixels));
  }

  // Places from the first to the last output that reads a pixel, at most.
  static int reach(const PacAxis& axis, int kernel_size) {
    const int step = PhaseAxis::step_of_taps(axis, kernel_size);
    return (kernel_size - 1) / step * (step * axis.dilation / axis.stride);
  }
};

// words[row][column][word] of the outputs from `first` on; 0 for outputs that do not exist. Rows and columns of places.
template <typename Factor, typename R>
__device__ __forceinline__ void stage_grads(const R* __restrict__ grad_y, const PacMap& map, const StagedTiles& tiles,
                                            PacPlace first, uint32_t* words) {
  constexpr int kWords = Vector<uint32_t>::kCount, kCount = Word<Factor>::kCount;
  const int columns = tiles.columns, row_step = kStagedThreads / columns;
  const PacPlace begin = place_after(PacPlace{0, 0}, threadIdx.x, columns);
  for (int word = 0; word < tiles.words; word += kWords) {
    PacPlace at = begin;
    for (int pixel = threadIdx.x; pixel < tiles.rows * columns; pixel += kStagedThreads) {
      const PacPlace output = {first.row + at.row, first.column + at.column};
      const int outputs = map.has_output(output) ? map.out_channels - word * kCount : 0;
      PlaneWalk<const R> source(
          grad_y, word * kCount * map.out_pixels + output.row * map.horizontal.output + output.column, map.out_pixels);
      R numbers[kWords][kCount];
      UNROLL
      for (int number = 0; number < kWords * kCount; ++number) {
        numbers[number / kCount][number % kCount] = number < outputs ? *source : R(0.0f);
        source += 1;
      }
      Vector<uint32_t> vector;
      UNROLL
      for (int number = 0; number < kWords; ++number) vector.values[number] = pack_operand<Factor>(numbers[number]);
      *reinterpret_cast<Vector<uint32_t>*>(words + pixel * tiles.stride + word) = vector;
      at.row += row_step;
      at.column += kStagedThreads - row_step * columns;
      if (at.column >= columns) at = {at.row + 1, at.column - columns};
    }
  }
}

// Calls visit(tap, entry, reads) for the taps that read a phase, in order: where the entry of k or m, in `planes` of
// K², of the output lies that reads a pixel of the phase with the tap, and whether there is that output.
template <typename A, typename Visit>
__device__ __forceinline__ void visit_taps(const InputPhase& phase, const PacMap& map, A* planes, PacPlace pixel,
                                           Visit visit) {
  for (PhaseTap tap = {0, 0}; tap.row < phase.rows.taps; ++tap.row) {
    PacPlace reader = phase.reader_at(pixel, {tap.row, 0});
    A* entry = planes + phase.index(map, {tap.row, 0}) * map.out_pixels + reader.row * map.horizontal.output +
               reader.column;
    for (tap.column = 0; tap.column < phase.columns.taps; ++tap.column) {
      visit(tap, entry, map.has_output(reader));
      reader.column -= phase.columns.place_step;
      entry += phase.columns.tap_step * map.out_pixels - phase.columns.place_step;
    }
  }
}

// Adds the product of a tap, `words` deep. left: where this lane begins a row of matrices, rows of pixels `row_words`
// apart; right: this lane's first word of the weights.
template <typename Factor, int kRowTiles, int kColumnTiles>
__device__ __forceinline__ void multiply_staged(WarpTile<Factor, kRowTiles, kColumnTiles>& sums, const uint32_t* left,
                                                int row_words, const uint32_t* right, int words) {
  constexpr int kChannels = kColumnTiles * kFragmentColumns;
  for (int word = 0; word < words; word += kFragmentWords) {
    LeftFragment<Factor> lefts[kRowTiles];
    UNROLL
    for (int row = 0; row < kRowTiles; ++row) load_matrices<false>(lefts[row].words, left + row * row_words + word);
    UNROLL
    for (int tile = 0; tile < kColumnTiles; ++tile) {
      RightFragment<Factor> columns;
      UNROLL
      for (int place = 0; place < columns.kCount; ++place) {
        columns.words[place] = right[place * (kFragmentWords / 2) * kChannels + tile * kFragmentColumns];
      }
      UNROLL
      for (int row = 0; row < kRowTiles; ++row) {
        matrix_product(Factor(), sums.sums[row][tile], lefts[row].words, columns.words);
      }
    }
    right += kFragmentWords * kChannels;
  }
}

// Of a sum for each of a lane's four rows: in each of the four lanes that share them, the total of one, the row of the
// lane's number.
template <typename A>
__device__ __forceinline__ A share_rows(const A (&sums)[4]) {
  const bool upper = fragment_lane() % 4 >= 2, odd = fragment_lane() % 2 == 1;
  A low = upper ? sums[2] : sums[0], high = upper ? sums[3] : sums[1];
  low += __shfl_xor_sync(kFullWarp, upper ? sums[0] : sums[2], 2);
  high += __shfl_xor_sync(kFullWarp, upper ? sums[1] : sums[3], 2);
  return (odd ? high : low) + __shfl_xor_sync(kFullWarp, odd ? low : high, 1);
}

// As pac_conv2d_backward_input_kernel, of one pass over the channels.
template <typename T, typename R, typename Factor, int kChannels>
__global__ void __launch_bounds__(kStagedThreads)
    pac_conv2d_backward_staged_kernel(const R* __restrict__ grad_y, const T* __restrict__ x,
                                      const uint32_t* __restrict__ weight, const float* kernel, T* __restrict__ grad_x,
                                      float* slope, StagedTiles tiles, PacMap map, float alpha) {
  using Sums = WarpTile<Factor, kStagedFragments, kChannels / kFragmentColumns>;
  DYNAMIC_SHARED(Vector<uint32_t>, memory);
  uint32_t* const words = memory->values;
  float* const kernel_values = reinterpret_cast<float*>(words + tiles.grad_words());
  StagedPlaces& places = *reinterpret_cast<StagedPlaces*>(kernel_values + map.taps * kStagedPixels);

  const int tile = blockIdx.x % tiles.count;
  if (threadIdx.x == 0) places.phase = InputPhase(map, blockIdx.x / tiles.count);
  __syncthreads();
  const InputPhase phase = places.phase;
  const PacPlace first = {tile / tiles.across * kStagedRows, tile % tiles.across * kStagedColumns};
  const auto pixel_at = [&](int pixel) {
    return PacPlace{first.row + pixel / kStagedColumns, first.column + pixel % kStagedColumns};
  };
  const auto exists = [&](PacPlace pixel) {
    return pixel.row < phase.rows.pixels && pixel.column < phase.columns.pixels;
  };
  const PacPlace own = pixel_at(threadIdx.x);
  const bool own_exists = exists(own);
  places.offsets[threadIdx.x] = own_exists ? phase.offset(map, own) : -1;
  // Of the last tap, which is read by the outputs farthest back.
  const PhaseTap last = {phase.rows.taps - 1, phase.columns.taps - 1};
  const PacPlace first_reader = phase.reader_at(first, last);

  const int lane = fragment_lane(), warp_pixel = threadIdx.x / kWarpThreads * kStagedFragments * kFragmentRows;
  const int slope_pixel = warp_pixel + Sums::row(lane % 4);
  const PacPlace slope_at = pixel_at(slope_pixel);
  const bool slope_exists = exists(slope_at);
  // Where this lane begins rows of matrices: those of the left fragment, in the order of its words.
  const int lane_words = (warp_pixel / kStagedColumns * tiles.columns + lane % kFragmentRows) * tiles.stride +
                         lane / kFragmentRows * (kFragmentWords / 2);
  using Right = RightFragment<Factor>;
  const uint32_t* const lane_weight = weight + Right::word(0) * kChannels + Right::column(0);
  __syncthreads();  // The offsets are there.

  for (int64_t image = blockIdx.y; image < map.batch; image += gridDim.y) {
    const int64_t first_entry = map.tap_plane(image, 0);
    float* tap_values = kernel_values;
    visit_taps(phase, map, kernel + first_entry, own, [&](PhaseTap, const float* entry, bool reads) {
      copy_async<sizeof(float)>(tap_values + threadIdx.x, entry, reads && own_exists);
      tap_values += kStagedPixels;
    });
    commit_copies();
    stage_grads<Factor>(grad_y + image * map.out_channels * map.out_pixels, map, tiles, first_reader, words);
    LaneX<Sums, T, true> lane_x(x + image * map.channels * map.pixels, map.channels, map.pixels,
                                places.offsets + warp_pixel, slope != nullptr);
    Sums gradient;
    gradient.clear();
    wait_for_copies<0>();
    __syncthreads();
    tap_values = kernel_values;
    visit_taps(phase, map, slope + first_entry, slope_at, [&](PhaseTap tap, float* entry, bool reads) {
      const int pixels = (last.row - tap.row) * phase.rows.place_step * tiles.columns +
                         (last.column - tap.column) * phase.columns.place_step;
      Sums sums;
      sums.clear();
      multiply_staged<Factor>(sums, words + lane_words + pixels * tiles.stride, tiles.columns * tiles.stride,
                              lane_weight + int64_t{phase.index(map, tap)} * tiles.words * kChannels, tiles.words);
      float dots[Sums::kRows];
      UNROLL
      for (int row = 0; row < Sums::kRows; ++row) {
        dots[row] = lane_dot(sums, lane_x, row);
        add_products(gradient, sums, row, tap_values[warp_pixel + Sums::row(row)]);
      }
      if (slope != nullptr) {
        const float dot = share_rows(dots);
        if (reads && slope_exists) *entry = alpha * tap_values[slope_pixel] * dot;
      }
      tap_values += kStagedPixels;
    });
    if (grad_x != nullptr) {
      store_gradient(gradient, grad_x + image * map.channels * map.pixels, map.channels, map.pixels,
                     places.offsets + warp_pixel, alpha);
    }
    __syncthreads();  // before the next image takes the place of this one
  }
}

// Whether it was launched: where what all taps read of a tile fits into shared memory.
template <typename T, typename R, typename Factor>
bool launch_staged(const PacConv2dBackward& arguments, const uint32_t* weight, const float* kernel, float* slope,
                   const PackedWeight& packed, const PacMap& map, cudaStream_t stream) {
  const StagedTiles tiles(map, packed);
  const int64_t bytes = tiles.bytes(map.taps);
  if (packed.channels > 16 || bytes > int64_t{kAskedSharedBytes}) return false;
  const int64_t phases = int64_t{InputPhase::count(map.vertical)} * InputPhase::count(map.horizontal);
  const dim3 grid(grid_x(int64_t{tiles.count} * phases), grid_y(map.batch));
  const auto launch = [&](auto kernel_of_channels) {
    allow_shared(kernel_of_channels, static_cast<size_t>(bytes));
    LAUNCH(kernel_of_channels, grid, dim3(kStagedThreads), static_cast<size_t>(bytes), stream,
           static_cast<const R*>(arguments.grad_y), static_cast<const T*>(arguments.x), weight, kernel,
           static_cast<T*>(arguments.grad_x), slope, tiles, map, static_cast<float>(arguments.alpha));
  };
  if (packed.channels == 8) {
    launch(pac_conv2d_backward_staged_kernel<T, R, Factor, 8>);
  } else {
    launch(pac_conv2d_backward_staged_kernel<T, R, Factor, 16>);
  }
  return true;
}

}  // namespace
}  // namespace restoration

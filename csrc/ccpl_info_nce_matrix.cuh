// info_nce on tensor cores, for float16 and bfloat16 rows of up to 128 numbers: formula in ccpl.h.
// A warp owns a few times 16 rows of query, held as fragments. The keys come through shared memory, a tile on its way
// while the block works on another. Logits stay in the registers of their product. Forward: each lane keeps a maximum
// and a sum of powers for the columns that it sees of each row, put together at the end. Backward: the probabilities,
// rounded to the dtype of the keys, are the left operand of the product with the same tile's keys.
// Read: query once, keys once a block (from the L2 cache). Saved: log_sum. No atomics: the same bits every run.
#pragma once

#include <cfloat>

#include "async_copy.cuh"
#include "ccpl.h"
#include "matrix_fragments.cuh"
#include "matrix_loads.cuh"

namespace restoration {

constexpr int kMatrixWarps = 4;  // one for each scheduler of a multiprocessor; its registers hold two such blocks
constexpr int kMatrixThreads = kMatrixWarps * kWarpThreads;
constexpr int kMatrixBlocks = 2;
// Two tiles of 64 keys of 128 numbers take 34 KB.
constexpr int kTileKeys = 64;

// Powers of two cost one instruction: exp(s) = 2^(s · log2(e)).
constexpr float kLog2E = 1.44269504f;
constexpr float kLn2 = 0.693147181f;

// Probabilities are kept times 2^14, as float16 knows nothing between 0 and 6e-8. The largest is then a quarter of what
// it can hold.
constexpr int kProbabilityBits = 14;

// Sizes for rows padded to kDepth numbers.
template <int kDepth>
struct MatrixShape {
  static constexpr int kSteps = kDepth / 16;       // products of 16 numbers that make a logit
  static constexpr int kVectors = kDepth / 8;      // of 16 bytes, in a row
  static constexpr int kStride = kVectors + 1;     // of a row in shared memory; odd: eight rows are in different banks
  static constexpr int kTile = kTileKeys * kStride;
  // Rows of a warp, times 16: each key that is loaded serves as many products. With more, backward's sums, rows times
  // kDepth, would fill the registers.
  static constexpr int kForwardRows = 2;
  static constexpr int kBackwardRows = kDepth <= 64 ? 2 : 1;
};

#if defined(__CUDACC__)
// 2^x within 2 units in the last place; numbers below 1e-38 are 0.
__device__ __forceinline__ float power_of_two(float x) {
  float power;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(x));
  return power;
}
#else
inline float power_of_two(float x) { return std::exp2(x); }
#endif

template <typename T, int kRowTiles, int kDepth>
using QueryFragments = LeftFragment<T>[kRowTiles][MatrixShape<kDepth>::kSteps];
template <int kRowTiles, int kKeys>
using Products = SumFragment[kRowTiles][kKeys / kFragmentColumns];

// Calls update(row, column, number) for all numbers of this lane. For the few tiles that are not like the others: to
// ask of every number whether it is one of those would take longer than its power of two.
template <int kRowTiles, int kKeys, typename Update>
__device__ __forceinline__ void change(Products<kRowTiles, kKeys>& products, Update update) {
#pragma unroll
  for (int tile = 0; tile < kRowTiles; ++tile) {
#pragma unroll
    for (int index = 0; index < kKeys / kFragmentColumns; ++index) {
#pragma unroll
      for (int place = 0; place < SumFragment::kCount; ++place) {
        update(tile * kFragmentRows + SumFragment::row(place), index * kFragmentColumns + SumFragment::column(place),
               products[tile][index].values[place]);
      }
    }
  }
}

// Whether some of the warp's rows have their own key among these.
template <int kRowTiles, int kKeys>
__device__ __forceinline__ bool has_own_keys(int64_t first_row, int64_t first_key) {
  return first_row < first_key + kKeys && first_key < first_row + kRowTiles * kFragmentRows;
}

// The first row of this warp.
template <int kRowTiles>
__device__ __forceinline__ int64_t first_warp_row() {
  return (int64_t{blockIdx.x} * kMatrixWarps + threadIdx.x / kWarpThreads) * kRowTiles * kFragmentRows;
}

// The row of half `half` of a lane's sums.
__device__ __forceinline__ int lane_row(int tile, int half) {
  return tile * kFragmentRows + SumFragment::row(half * 2);
}

template <typename T, int kRowTiles, int kDepth>
__device__ __forceinline__ void load_query(const T* __restrict__ query, const InfoNceSizes& sizes,
                                           QueryFragments<T, kRowTiles, kDepth>& fragments) {
#pragma unroll
  for (int tile = 0; tile < kRowTiles; ++tile) {
#pragma unroll
    for (int step = 0; step < MatrixShape<kDepth>::kSteps; ++step) {
#pragma unroll
      for (int place = 0; place < LeftFragment<T>::kCount; ++place) {
        const int64_t row = first_warp_row<kRowTiles>() + tile * kFragmentRows + LeftFragment<T>::row(place);
        const int column = (step * kFragmentWords + LeftFragment<T>::word(place)) * 2;
        const bool inside = row < sizes.rows && column < sizes.width;
        fragments[tile][step].words[place] =
            inside ? *reinterpret_cast<const uint32_t*>(query + row * sizes.width + column) : 0;
      }
    }
  }
}

// Calls work(tile, first key) for every kTileKeys keys, with zeros after the last one. All threads of a block call it.
template <int kDepth, typename T, typename Work>
__device__ __forceinline__ void for_each_key_tile(const T* __restrict__ key, const InfoNceSizes& sizes, Work work) {
  using Shape = MatrixShape<kDepth>;
  SHARED_ARRAY(Vector<uint32_t>, tiles, 2 * Shape::kTile);
  const auto start_copy = [&](int64_t first) {
    Vector<uint32_t>* tile = tiles + first / kTileKeys % 2 * Shape::kTile;
    for (int index = threadIdx.x; index < kTileKeys * Shape::kVectors; index += kMatrixThreads) {
      const int64_t row = first + index / Shape::kVectors;
      const int column = index % Shape::kVectors * 8;
      const bool inside = row < sizes.rows && column < sizes.width;
      copy_async<kVectorBytes>(tile + index / Shape::kVectors * Shape::kStride + index % Shape::kVectors,
                               key + (inside ? row * sizes.width + column : 0), inside);
    }
  };
  start_copy(0);
  commit_copies();
  for (int64_t first = 0; first < sizes.rows; first += kTileKeys) {
    if (first + kTileKeys < sizes.rows) start_copy(first + kTileKeys);
    commit_copies();  // an empty group at the end, for the same count
    wait_for_copies<1>();
    __syncthreads();
    work(tiles + first / kTileKeys % 2 * Shape::kTile, first);
    __syncthreads();  // before the next copy overwrites what others may still read
  }
}

// products = query · (keys of the tile from `begin` on), of which `valid` are there; -inf beyond.
template <int kDepth, int kKeys, int kRowTiles, typename T>
__device__ __forceinline__ void multiply_keys(const QueryFragments<T, kRowTiles, kDepth>& query,
                                              const Vector<uint32_t>* tile, int begin, int64_t valid,
                                              Products<kRowTiles, kKeys>& products) {
  using Shape = MatrixShape<kDepth>;
  const int lane = fragment_lane();
#pragma unroll
  for (int column = 0; column < kKeys / kFragmentColumns; ++column) {
#pragma unroll
    for (int row = 0; row < kRowTiles; ++row) products[row][column] = {};
    const Vector<uint32_t>* keys = tile + (begin + column * kFragmentColumns + lane % 8) * Shape::kStride + lane / 8;
#pragma unroll
    for (int step = 0; step < Shape::kSteps; step += 2) {
      uint32_t words[4];
      load_matrices<false>(words, keys + step * 2);
#pragma unroll
      for (int part = 0; part < 2; ++part) {
        const RightFragment<T> right = {{words[part * 2], words[part * 2 + 1]}};
#pragma unroll
        for (int row = 0; row < kRowTiles; ++row) {
          multiply_accumulate(products[row][column], query[row][step + part], right);
        }
      }
    }
  }
  if (begin + kKeys > valid) {
    change<kRowTiles, kKeys>(products, [&](int, int column, float& product) {
      if (begin + column >= valid) product = -INFINITY;
    });
  }
}

template <typename T, int kDepth>
__global__ void __launch_bounds__(kMatrixThreads, kMatrixBlocks)
    info_nce_forward_matrix_kernel(const T* __restrict__ query, const T* __restrict__ key, float* __restrict__ loss,
                                   float* __restrict__ log_sum, InfoNceSizes sizes, float inverse_temperature) {
  constexpr int kRowTiles = MatrixShape<kDepth>::kForwardRows, kColumns = kTileKeys / kFragmentColumns;
  const float scale = inverse_temperature * kLog2E;
  const int64_t first_row = first_warp_row<kRowTiles>();
  for (int64_t image = blockIdx.y; image < sizes.batch; image += gridDim.y) {
    const int64_t offset = image * sizes.rows * sizes.width;
    QueryFragments<T, kRowTiles, kDepth> rows;
    load_query<T, kRowTiles, kDepth>(query + offset, sizes, rows);
    // Of the two rows of a lane in each tile; maximum and positive are logarithms to base 2.
    float maximum[kRowTiles][2], sum[kRowTiles][2] = {}, positive[kRowTiles][2] = {};
#pragma unroll
    for (int tile = 0; tile < kRowTiles; ++tile) maximum[tile][0] = maximum[tile][1] = -FLT_MAX;
    for_each_key_tile<kDepth>(key + offset, sizes, [&](const Vector<uint32_t>* keys, int64_t first_key) {
      Products<kRowTiles, kTileKeys> logits;
      multiply_keys<kDepth, kTileKeys, kRowTiles, T>(rows, keys, 0, sizes.rows - first_key, logits);
      change<kRowTiles, kTileKeys>(logits, [&](int, int, float& logit) { logit = rounded_product(logit, scale); });
      if (has_own_keys<kRowTiles, kTileKeys>(first_row, first_key)) {
        const int own = static_cast<int>(first_row - first_key);
        change<kRowTiles, kTileKeys>(logits, [&](int row, int column, float& logit) {
          if (column == own + row) positive[row / kFragmentRows][row % kFragmentRows / 8] = logit;
        });
      }
#pragma unroll
      for (int tile = 0; tile < kRowTiles; ++tile) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          float shift = maximum[tile][half];
#pragma unroll
          for (int index = 0; index < kColumns * 2; ++index) {
            shift = max(shift, logits[tile][index / 2].values[half * 2 + index % 2]);
          }
          sum[tile][half] *= power_of_two(maximum[tile][half] - shift);
          maximum[tile][half] = shift;
#pragma unroll
          for (int index = 0; index < kColumns * 2; ++index) {
            sum[tile][half] += power_of_two(logits[tile][index / 2].values[half * 2 + index % 2] - shift);
          }
        }
      }
    });
#pragma unroll
    for (int tile = 0; tile < kRowTiles; ++tile) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float most = maximum[tile][half], total = sum[tile][half], own = positive[tile][half];
        // The four lanes of a row.
#pragma unroll
        for (int distance = 2; distance > 0; distance /= 2) {
          const float other = __shfl_xor_sync(kFullWarp, most, distance);
          const float other_total = __shfl_xor_sync(kFullWarp, total, distance);
          const float shift = max(most, other);
          total = total * power_of_two(most - shift) + other_total * power_of_two(other - shift);
          most = shift;
          own += __shfl_xor_sync(kFullWarp, own, distance);
        }
        const int64_t row = first_row + lane_row(tile, half);
        if (fragment_lane() % 4 == 0 && row < sizes.rows) {
          const float logarithm = std::log(total);
          // A row that is told apart from all others loses no digits: its maximum and positive are equal.
          loss[image * sizes.rows + row] = (most - own) * kLn2 + logarithm;
          log_sum[image * sizes.rows + row] = most * kLn2 + logarithm;
        }
      }
    }
  }
}

// grad_query = grad_loss / temperature · (sum over j of p_j · key_j - key_i), p_j = exp(s_j - log_sum). The positive's
// key is subtracted as p_i - 1.
template <typename T, int kDepth>
__global__ void __launch_bounds__(kMatrixThreads, kMatrixBlocks)
    info_nce_backward_matrix_kernel(const float* __restrict__ grad_loss, const T* __restrict__ query,
                                    const T* __restrict__ key, const float* __restrict__ log_sum,
                                    T* __restrict__ grad_query, InfoNceSizes sizes, float inverse_temperature) {
  using Shape = MatrixShape<kDepth>;
  constexpr int kRowTiles = Shape::kBackwardRows;
  constexpr int kKeys = kTileKeys / 2;  // whose logits are in registers at a time, beside the sums
  const float scale = inverse_temperature * kLog2E;
  const int64_t first_row = first_warp_row<kRowTiles>();
  const int lane = fragment_lane();
  for (int64_t image = blockIdx.y; image < sizes.batch; image += gridDim.y) {
    const int64_t offset = image * sizes.rows * sizes.width;
    QueryFragments<T, kRowTiles, kDepth> rows;
    load_query<T, kRowTiles, kDepth>(query + offset, sizes, rows);
    float shift[kRowTiles][2];
    SumFragment sums[kRowTiles][kDepth / kFragmentColumns] = {};
#pragma unroll
    for (int tile = 0; tile < kRowTiles; ++tile) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int64_t row = min(first_row + lane_row(tile, half), sizes.rows - 1);
        shift[tile][half] = log_sum[image * sizes.rows + row] * kLog2E - kProbabilityBits;
      }
    }
    for_each_key_tile<kDepth>(key + offset, sizes, [&](const Vector<uint32_t>* keys, int64_t first_key) {
#pragma unroll 1
      for (int begin = 0; begin < kTileKeys; begin += kKeys) {
        Products<kRowTiles, kKeys> weights;
        multiply_keys<kDepth, kKeys, kRowTiles, T>(rows, keys, begin, sizes.rows - first_key, weights);
        change<kRowTiles, kKeys>(weights, [&](int row, int, float& weight) {
          weight = power_of_two(weight * scale - shift[row / kFragmentRows][row % kFragmentRows / 8]);
        });
        if (has_own_keys<kRowTiles, kKeys>(first_row, first_key + begin)) {
          const int own = static_cast<int>(first_row - first_key - begin);
          change<kRowTiles, kKeys>(weights, [&](int row, int column, float& weight) {
            if (column == own + row) weight -= float{1 << kProbabilityBits};
          });
        }
#pragma unroll
        for (int step = 0; step < kKeys; step += kFragmentDepth<T>) {
          LeftFragment<T> left[kRowTiles];
#pragma unroll
          for (int tile = 0; tile < kRowTiles; ++tile) {
            // The sums of the first product are where the second wants its left operand: word `place` is a pair of the
            // first or the last 8 keys, in half place % 2 of the rows.
#pragma unroll
            for (int place = 0; place < LeftFragment<T>::kCount; ++place) {
              const float* pair = weights[tile][step / kFragmentColumns + place / 2].values + place % 2 * 2;
              left[tile].words[place] = Word<T>::pack({pair[0], pair[1]});
            }
          }
          const Vector<uint32_t>* columns = keys + (begin + step + lane % 16) * Shape::kStride + lane / 16;
#pragma unroll
          for (int column = 0; column < kDepth / kFragmentColumns; column += 2) {
            uint32_t words[4];
            load_matrices<true>(words, columns + column);
#pragma unroll
            for (int part = 0; part < 2; ++part) {
              const RightFragment<T> right = {{words[part * 2], words[part * 2 + 1]}};
#pragma unroll
              for (int tile = 0; tile < kRowTiles; ++tile) {
                multiply_accumulate(sums[tile][column + part], left[tile], right);
              }
            }
          }
        }
      }
    });
#pragma unroll
    for (int tile = 0; tile < kRowTiles; ++tile) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int64_t row = first_row + lane_row(tile, half);
        if (row >= sizes.rows) continue;
        const float factor =
            grad_loss[image * sizes.rows + row] * inverse_temperature * (1.0f / (1 << kProbabilityBits));
#pragma unroll
        for (int index = 0; index < kDepth / kFragmentColumns; ++index) {
          const int column = index * kFragmentColumns + SumFragment::column(0);
          if (column >= sizes.width) continue;
          const float* values = sums[tile][index].values + half * 2;
          *reinterpret_cast<uint32_t*>(grad_query + offset + row * sizes.width + column) =
              Word<T>::pack({factor * values[0], factor * values[1]});
        }
      }
    }
  }
}

// Whether the kernels above take rows of 16-bit numbers: they read vectors of 16 bytes, from aligned addresses. Fewer
// rows than a fragment holds are left to the other kernels, where the gradient of a single row is exactly 0.
inline bool fits_matrix_kernels(const void* query, const void* key, const InfoNceSizes& sizes) {
  return sizes.rows >= kFragmentRows && sizes.width <= 128 && sizes.width % 8 == 0 && is_aligned(query) && is_aligned(key);
}

inline dim3 matrix_grid(const InfoNceSizes& sizes, int row_tiles) {
  return dim3(grid_x(ceil_divide(sizes.rows, kMatrixWarps * row_tiles * kFragmentRows)),
              grid_y(sizes.batch));
}

template <typename T, int kDepth>
void launch_matrix_forward(const InfoNceForward& arguments, const InfoNceSizes& sizes, double temperature,
                           cudaStream_t stream) {
  LAUNCH((info_nce_forward_matrix_kernel<T, kDepth>), matrix_grid(sizes, MatrixShape<kDepth>::kForwardRows),
         dim3(kMatrixThreads), 0, stream, static_cast<const T*>(arguments.query), static_cast<const T*>(arguments.key),
         static_cast<float*>(arguments.loss), static_cast<float*>(arguments.log_sum), sizes,
         static_cast<float>(1 / temperature));
}

template <typename T, int kDepth>
void launch_matrix_backward(const InfoNceBackward& arguments, const InfoNceSizes& sizes, double temperature,
                            cudaStream_t stream) {
  LAUNCH((info_nce_backward_matrix_kernel<T, kDepth>), matrix_grid(sizes, MatrixShape<kDepth>::kBackwardRows),
         dim3(kMatrixThreads), 0, stream, static_cast<const float*>(arguments.grad_loss),
         static_cast<const T*>(arguments.query), static_cast<const T*>(arguments.key),
         static_cast<const float*>(arguments.log_sum), static_cast<T*>(arguments.grad_query), sizes,
         static_cast<float>(1 / temperature));
}

}  // namespace restoration

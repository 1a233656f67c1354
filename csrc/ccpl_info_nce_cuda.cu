// info_nce in CUDA: formula in ccpl.h. A softmax over S columns of a product that never exists as a whole.
// A block owns kRows rows of query and walks over the keys, kKeys at a time; its 16 x 16 threads hold the tile of
// logits in registers, kRowsEach rows by a few keys each. Forward keeps a maximum and a sum of exponentials for each
// row and thread, put together at the end. Backward makes the probabilities of a tile again, hands them round in shared
// memory, and multiplies them with the keys; a block owns up to 128 columns of grad_query.
// Read: keys once a block (from the L2 cache), rows once a tile. Saved: log_sum. No atomics: the same bits every run.

#include <cfloat>

#include "ccpl.h"
#include "ccpl_info_nce_matrix.cuh"
#include "common.cuh"

namespace restoration {
namespace {

constexpr int kSide = 16;  // threads along either side of a tile; 16 lanes of one warp share their rows
constexpr int kThreads = kSide * kSide;
constexpr int kRowsEach = 4;
constexpr int kRows = kSide * kRowsEach;
// Steps of a product whose operands lie in shared memory at a time: 64 bytes of a row, two sectors.
constexpr int kDepth = 16;
constexpr int kPadding = 4;  // spreads columns that are written together over the banks, and keeps vectors aligned

template <typename A>
struct Shape;
template <>
struct Shape<float> {
  static constexpr int kKeysEach = 4;
  static constexpr int kBlocks = 2;  // a multiprocessor: leaves 128 registers to a thread
  static constexpr float kLowest = -FLT_MAX;
};
template <>
struct Shape<double> {
  static constexpr int kKeysEach = 2;  // as many bytes: shared memory stays below 48 KB
  static constexpr int kBlocks = 1;    // numbers take two registers each
  static constexpr double kLowest = -DBL_MAX;
};

template <int kWidth>
constexpr int kStride = kWidth + kPadding;

// The columns of a tile that a thread owns: vectors, kSide vectors apart, so that the threads of a row read without
// bank conflicts.
template <typename A>
__device__ __forceinline__ int column_of(int place) {
  constexpr int kCount = Vector<A>::kCount;
  return (place / kCount * kSide + threadIdx.x % kSide) * kCount + place % kCount;
}

__device__ __forceinline__ int row_of(int place) { return threadIdx.x / kSide * kRowsEach + place; }

// sums[row, column] += sum over kDepth steps of left[step, row] · right[step, column].
template <int kLeftWidth, int kColumnsEach, typename A>
__device__ __forceinline__ void multiply(const A* left, const A* right, A (&sums)[kRowsEach][kColumnsEach]) {
  constexpr int kCount = Vector<A>::kCount;
#pragma unroll
  for (int step = 0; step < kDepth; ++step) {
    A rows[kRowsEach], columns[kColumnsEach];
#pragma unroll
    for (int place = 0; place < kRowsEach; place += kCount) {
      const auto vector = *reinterpret_cast<const Vector<A>*>(left + step * kStride<kLeftWidth> + row_of(place));
#pragma unroll
      for (int part = 0; part < kCount; ++part) rows[place + part] = vector.values[part];
    }
#pragma unroll
    for (int place = 0; place < kColumnsEach; place += kCount) {
      const auto vector =
          *reinterpret_cast<const Vector<A>*>(right + step * kStride<kSide * kColumnsEach> + column_of<A>(place));
#pragma unroll
      for (int part = 0; part < kCount; ++part) columns[place + part] = vector.values[part];
    }
#pragma unroll
    for (int row = 0; row < kRowsEach; ++row) {
#pragma unroll
      for (int column = 0; column < kColumnsEach; ++column) sums[row][column] += rows[row] * columns[column];
    }
  }
}

// tile[step, row] = matrix[first + row, depth + step], zero outside.
template <int kWidth, typename T, typename A>
__device__ __forceinline__ void load_columns(const T* __restrict__ matrix, const InfoNceSizes& sizes, int64_t first,
                                             int64_t depth, A* tile) {
  for (int index = threadIdx.x; index < kWidth * kDepth; index += kThreads) {
    const int row = index / kDepth;
    const int step = index % kDepth;
    const bool inside = first + row < sizes.rows && depth + step < sizes.width;
    tile[step * kStride<kWidth> + row] =
        inside ? static_cast<A>(matrix[(first + row) * sizes.width + depth + step]) : A(0);
  }
}

// tile[step, column] = matrix[first + step, begin + column], zero outside.
template <int kWidth, typename T, typename A>
__device__ __forceinline__ void load_rows(const T* __restrict__ matrix, const InfoNceSizes& sizes, int64_t first,
                                          int64_t begin, A* tile) {
  for (int index = threadIdx.x; index < kWidth * kDepth; index += kThreads) {
    const int step = index / kWidth;
    const int column = index % kWidth;
    const bool inside = first + step < sizes.rows && begin + column < sizes.width;
    tile[step * kStride<kWidth> + column] =
        inside ? static_cast<A>(matrix[(first + step) * sizes.width + begin + column]) : A(0);
  }
}

// logits[row, key] of a tile; -inf beyond the last key. All threads of the block call it.
template <typename T, typename A, int kKeysEach = Shape<A>::kKeysEach>
__device__ __forceinline__ void tile_logits(const T* __restrict__ query, const T* __restrict__ key,
                                            const InfoNceSizes& sizes, int64_t first_row, int64_t first_key,
                                            A inverse_temperature, A* query_tile, A* key_tile,
                                            A (&logits)[kRowsEach][kKeysEach]) {
  constexpr int kKeys = kSide * kKeysEach;
#pragma unroll
  for (int row = 0; row < kRowsEach; ++row) {
#pragma unroll
    for (int place = 0; place < kKeysEach; ++place) logits[row][place] = 0;
  }
  for (int64_t depth = 0; depth < sizes.width; depth += kDepth) {
    __syncthreads();  // before tiles that others may still read are overwritten
    load_columns<kRows>(query, sizes, first_row, depth, query_tile);
    load_columns<kKeys>(key, sizes, first_key, depth, key_tile);
    __syncthreads();
    multiply<kRows>(query_tile, key_tile, logits);
  }
#pragma unroll
  for (int place = 0; place < kKeysEach; ++place) {
    const bool inside = first_key + column_of<A>(place) < sizes.rows;
#pragma unroll
    for (int row = 0; row < kRowsEach; ++row) {
      logits[row][place] = inside ? rounded_product(logits[row][place], inverse_temperature) : -A(INFINITY);
    }
  }
}

template <typename T, typename A = AccumulateType<T>>
__global__ void __launch_bounds__(kThreads, Shape<A>::kBlocks)
    info_nce_forward_kernel(const T* __restrict__ query, const T* __restrict__ key, A* __restrict__ loss,
                            A* __restrict__ log_sum, InfoNceSizes sizes, A inverse_temperature) {
  constexpr int kKeysEach = Shape<A>::kKeysEach, kKeys = kSide * kKeysEach, kCount = Vector<A>::kCount;
  SHARED_ARRAY(Vector<A>, query_vectors, kDepth* kStride<kRows> / kCount);
  SHARED_ARRAY(Vector<A>, key_vectors, kDepth* kStride<kKeys> / kCount);
  const int64_t first_row = static_cast<int64_t>(blockIdx.x) * kRows;
  for (int64_t image = blockIdx.y; image < sizes.batch; image += gridDim.y) {
    const int64_t offset = image * sizes.rows * sizes.width;
    A maximum[kRowsEach], sum[kRowsEach] = {}, positive[kRowsEach] = {};
#pragma unroll
    for (int row = 0; row < kRowsEach; ++row) maximum[row] = Shape<A>::kLowest;
    for (int64_t first_key = 0; first_key < sizes.rows; first_key += kKeys) {
      A logits[kRowsEach][kKeysEach];
      tile_logits(query + offset, key + offset, sizes, first_row, first_key, inverse_temperature,
                  query_vectors->values, key_vectors->values, logits);
#pragma unroll
      for (int row = 0; row < kRowsEach; ++row) {
        A shift = maximum[row];
#pragma unroll
        for (int place = 0; place < kKeysEach; ++place) shift = max(shift, logits[row][place]);
        sum[row] *= std::exp(maximum[row] - shift);
        maximum[row] = shift;
#pragma unroll
        for (int place = 0; place < kKeysEach; ++place) {
          sum[row] += std::exp(logits[row][place] - shift);
          const bool own = first_key + column_of<A>(place) == first_row + row_of(row);
          if (own) positive[row] = logits[row][place];
        }
      }
    }
#pragma unroll
    for (int row = 0; row < kRowsEach; ++row) {
#pragma unroll
      for (int distance = kSide / 2; distance > 0; distance /= 2) {
        const A other = __shfl_xor_sync(kFullWarp, maximum[row], distance, kSide);
        const A other_sum = __shfl_xor_sync(kFullWarp, sum[row], distance, kSide);
        const A shift = max(maximum[row], other);
        sum[row] = sum[row] * std::exp(maximum[row] - shift) + other_sum * std::exp(other - shift);
        maximum[row] = shift;
        positive[row] += __shfl_xor_sync(kFullWarp, positive[row], distance, kSide);
      }
      const int64_t place = first_row + row_of(row);
      if (threadIdx.x % kSide == 0 && place < sizes.rows) {
        const A logarithm = std::log(sum[row]);
        // In this order a row that is told apart from all others loses no digits: maximum and positive are then equal.
        loss[image * sizes.rows + place] = maximum[row] - positive[row] + logarithm;
        log_sum[image * sizes.rows + place] = maximum[row] + logarithm;
      }
    }
  }
}

// grad_query = grad_loss / temperature · (sum over j of p_j · key_j - key_i), p_j = exp(s_j - log_sum), for the columns
// of blockIdx.z. The positive's key is subtracted as p_i - 1, which is exact for p_i near 1.
template <typename T, int kColumnsEach, typename A = AccumulateType<T>>
__global__ void __launch_bounds__(kThreads, Shape<A>::kBlocks)
    info_nce_backward_kernel(const A* __restrict__ grad_loss, const T* __restrict__ query, const T* __restrict__ key,
                             const A* __restrict__ log_sum, T* __restrict__ grad_query, InfoNceSizes sizes,
                             A inverse_temperature) {
  constexpr int kKeysEach = Shape<A>::kKeysEach, kKeys = kSide * kKeysEach, kCount = Vector<A>::kCount;
  constexpr int kColumns = kSide * kColumnsEach;
  SHARED_ARRAY(Vector<A>, query_vectors, kDepth* kStride<kRows> / kCount);
  SHARED_ARRAY(Vector<A>, key_vectors, kDepth* kStride<kKeys> / kCount);
  SHARED_ARRAY(Vector<A>, probability_vectors, kKeys* kStride<kRows> / kCount);
  SHARED_ARRAY(Vector<A>, column_vectors, kDepth* kStride<kColumns> / kCount);
  A* const probabilities = probability_vectors->values;  // [key, row]
  const int64_t first_row = static_cast<int64_t>(blockIdx.x) * kRows;
  const int64_t first_column = static_cast<int64_t>(blockIdx.z) * kColumns;
  for (int64_t image = blockIdx.y; image < sizes.batch; image += gridDim.y) {
    const int64_t offset = image * sizes.rows * sizes.width;
    A shift[kRowsEach], sums[kRowsEach][kColumnsEach] = {};
#pragma unroll
    for (int row = 0; row < kRowsEach; ++row) {
      shift[row] = log_sum[image * sizes.rows + min(first_row + row_of(row), sizes.rows - 1)];
    }
    for (int64_t first_key = 0; first_key < sizes.rows; first_key += kKeys) {
      A logits[kRowsEach][kKeysEach];
      tile_logits(query + offset, key + offset, sizes, first_row, first_key, inverse_temperature,
                  query_vectors->values, key_vectors->values, logits);
      // The barriers in tile_logits lie between the last reading of these and this writing.
#pragma unroll
      for (int row = 0; row < kRowsEach; ++row) {
#pragma unroll
        for (int place = 0; place < kKeysEach; ++place) {
          const int column = column_of<A>(place);
          const bool own = first_key + column == first_row + row_of(row);
          probabilities[column * kStride<kRows> + row_of(row)] =
              std::exp(logits[row][place] - shift[row]) - (own ? A(1) : A(0));
        }
      }
#pragma unroll 1
      for (int step = 0; step < kKeys; step += kDepth) {
        __syncthreads();
        load_rows<kColumns>(key + offset, sizes, first_key + step, first_column, column_vectors->values);
        __syncthreads();
        multiply<kRows>(probabilities + step * kStride<kRows>, column_vectors->values, sums);
      }
    }
#pragma unroll
    for (int row = 0; row < kRowsEach; ++row) {
      const int64_t place = first_row + row_of(row);
      if (place >= sizes.rows) continue;
      const A factor = grad_loss[image * sizes.rows + place] * inverse_temperature;
#pragma unroll
      for (int index = 0; index < kColumnsEach; ++index) {
        const int64_t column = first_column + column_of<A>(index);
        if (column < sizes.width) grad_query[offset + place * sizes.width + column] = T(factor * sums[row][index]);
      }
    }
  }
}

dim3 grid_of(const InfoNceSizes& sizes, int64_t depth) {
  return dim3(grid_x(ceil_divide(sizes.rows, kRows)), grid_y(sizes.batch), static_cast<unsigned>(depth));
}

template <typename T, int kColumnsEach>
void launch_backward(const InfoNceBackward& arguments, const InfoNceSizes& sizes, double temperature,
                     cudaStream_t stream) {
  using A = AccumulateType<T>;
  LAUNCH((info_nce_backward_kernel<T, kColumnsEach>), grid_of(sizes, ceil_divide(sizes.width, kSide * kColumnsEach)),
         dim3(kThreads), 0, stream, static_cast<const A*>(arguments.grad_loss), static_cast<const T*>(arguments.query),
         static_cast<const T*>(arguments.key), static_cast<const A*>(arguments.log_sum),
         static_cast<T*>(arguments.grad_query), sizes, A(1 / temperature));
}

}  // namespace

void launch_info_nce_forward(const InfoNceForward& arguments, const InfoNceSizes& sizes, double temperature,
                             DType dtype, void* stream) {
  if (sizes.batch == 0) return;
  dispatch_cuda_dtype("info_nce", dtype, [&](auto tag) {
    using T = typename decltype(tag)::Type;
    using A = AccumulateType<T>;
    if constexpr (sizeof(T) == 2) {
      if (fits_matrix_kernels(arguments.query, arguments.key, sizes)) {
        const auto launch = sizes.width <= 64 ? launch_matrix_forward<T, 64> : launch_matrix_forward<T, 128>;
        return launch(arguments, sizes, temperature, static_cast<cudaStream_t>(stream));
      }
    }
    LAUNCH(info_nce_forward_kernel<T>, grid_of(sizes, 1), dim3(kThreads), 0, static_cast<cudaStream_t>(stream),
           static_cast<const T*>(arguments.query), static_cast<const T*>(arguments.key),
           static_cast<A*>(arguments.loss), static_cast<A*>(arguments.log_sum), sizes, A(1 / temperature));
  });
}

void launch_info_nce_backward(const InfoNceBackward& arguments, const InfoNceSizes& sizes, double temperature,
                              DType dtype, void* stream) {
  if (sizes.batch == 0) return;
  dispatch_cuda_dtype("info_nce", dtype, [&](auto tag) {
    using T = typename decltype(tag)::Type;
    if constexpr (sizeof(T) == 2) {
      if (fits_matrix_kernels(arguments.query, arguments.key, sizes)) {
        const auto launch = sizes.width <= 64 ? launch_matrix_backward<T, 64> : launch_matrix_backward<T, 128>;
        return launch(arguments, sizes, temperature, static_cast<cudaStream_t>(stream));
      }
    }
    // Wide rows are cut into columns of 128, and the logits made again for each.
    const auto launch = sizes.width <= 4 * kSide ? launch_backward<T, 4> : launch_backward<T, 8>;
    launch(arguments, sizes, temperature, static_cast<cudaStream_t>(stream));
  });
}

}  // namespace restoration

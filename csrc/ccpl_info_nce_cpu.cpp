// info_nce on the CPU: formula in ccpl.h. A softmax over S columns of a product that never exists as a whole.
// A thread owns a block of rows and walks over the keys chunk by chunk. Forward keeps the maximum and the sum of the
// exponentials of each row; backward makes the chunk's probabilities again and multiplies them with its keys. Both
// products run in one register-blocked kernel: kTileRows rows by kPanel columns, vectorised across the columns.
// Read: query and key, packed once into panels. Saved: log_sum. Scratch memory: the keys, B·S·D numbers with S padded to
// whole panels, and a block of rows a thread; in backward also the keys with D padded, and a block of sums a thread.

#include <limits>

#include "ccpl.h"
#include "vectors_cpu.h"

namespace restoration::CPU_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int kPanelVectors = 4;  // with kTileRows 24 sums, 4 columns and a factor: 29 of the 32 registers
#else
constexpr int kPanelVectors = 2;  // 12 sums, 2 columns and a factor: 15 of 16 registers
#endif
constexpr int kTileRows = 6;
template <typename A>
constexpr int64_t kPanel = kPanelVectors * kLanes<A>;

// Rows of a thread's block, whole tiles: enough to use a chunk of keys many times while it is in the L2 cache, few
// enough that 512 rows, those of 64 anchors, occupy six threads.
constexpr int64_t kBlockRows = 96;

// A chunk of keys takes at most a quarter of the smallest L2 cache in use (512 KB on recent server and desktop
// processors). Gradients are added up chunk by chunk, each chunk's by itself: with 128 keys in a chunk, thousands of
// them round as little as in a blocked matrix product; with 512 the error is twice as large, and the time the same.
constexpr int64_t kChunkBytes = int64_t{128} << 10;
constexpr int64_t kChunkColumns = 128;

// out[row, 0..kPanel) (+)= sum over d of left[row, d] · panel[d, 0..kPanel), for kTileRows rows. What was there is
// added last, for the sake of rounding.
template <typename A, bool kAdd>
HOST_DEVICE void multiply_tile(const A* left, int64_t left_stride, const A* panel, int64_t depth, A* out,
                               int64_t out_stride) {
  Vector<A> sums[kTileRows][kPanelVectors] = {};
  for (int64_t step = 0; step < depth; ++step) {
    Vector<A> columns[kPanelVectors];
    for (int part = 0; part < kPanelVectors; ++part) {
      columns[part] = load(panel + step * kPanel<A> + part * kLanes<A>);
    }
    for (int row = 0; row < kTileRows; ++row) {
      const A factor = left[row * left_stride + step];
      for (int part = 0; part < kPanelVectors; ++part) sums[row][part] += factor * columns[part];
    }
  }
  for (int row = 0; row < kTileRows; ++row) {
    for (int part = 0; part < kPanelVectors; ++part) {
      A* target = out + row * out_stride + part * kLanes<A>;
      store(target, kAdd ? load(target) + sums[row][part] : sums[row][part]);
    }
  }
}

// A matrix [depth, columns] as panels of kPanel columns, each [depth, kPanel] without gaps, zero after the last column.
template <typename A>
class Panels {
 public:
  Panels(int64_t depth, int64_t columns, int64_t images)
      : depth_(depth), panels_(ceil_divide(columns, kPanel<A>)), columns_(columns), data_(images * panels_ * size()) {}

  // From matrix[step · step_stride + column · column_stride].
  template <typename T>
  void pack(int64_t image, const T* matrix, int64_t step_stride, int64_t column_stride) {
    for (int64_t number = 0; number < panels_; ++number) {
      A* target = panel(image, number);
      for (int64_t step = 0; step < depth_; ++step) {
        for (int64_t place = 0; place < kPanel<A>; ++place) {
          const int64_t column = number * kPanel<A> + place;
          *target++ = column < columns_ ? static_cast<A>(matrix[step * step_stride + column * column_stride]) : A(0);
        }
      }
    }
  }

  A* panel(int64_t image, int64_t number) { return data_.data() + (image * panels_ + number) * size(); }
  int64_t count() const { return panels_; }

 private:
  int64_t size() const { return depth_ * kPanel<A>; }

  int64_t depth_;
  int64_t panels_;
  int64_t columns_;
  Buffer<A> data_;
};

// The rows of one block as the accumulate type, whole tiles of them: the last row fills the last tile.
template <typename A, typename T>
void widen_rows(const T* query, const InfoNceSizes& sizes, int64_t first, A* rows) {
  for (int64_t row = 0; row < kBlockRows; ++row) {
    const T* source = query + std::min(first + row, sizes.rows - 1) * sizes.width;
#pragma omp simd
    for (int64_t place = 0; place < sizes.width; ++place) {
      rows[row * sizes.width + place] = static_cast<A>(source[place]);
    }
  }
}

template <typename A>
struct Chunks {
  int64_t columns;  // of a chunk: whole panels
  int64_t count;

  explicit Chunks(const InfoNceSizes& sizes) {
    const int64_t wanted = std::min(kChunkColumns, kChunkBytes / (sizes.width * int64_t{sizeof(A)}));
    columns = std::max<int64_t>(1, wanted / kPanel<A>) * kPanel<A>;
    count = ceil_divide(sizes.rows, columns);
  }
};

// logits[row, 0..columns) of kTileRows rows with the keys from `begin` on; -inf beyond the last key.
template <typename A>
HOST_DEVICE void tile_logits(const A* rows, Panels<A>& keys, int64_t image, const InfoNceSizes& sizes, int64_t begin,
                             int64_t columns, A inverse_temperature, A* logits) {
  for (int64_t column = 0; column < columns; column += kPanel<A>) {
    multiply_tile<A, false>(rows, sizes.width, keys.panel(image, (begin + column) / kPanel<A>), sizes.width,
                            logits + column, kChunkColumns);
  }
  const int64_t valid = std::min(columns, sizes.rows - begin);
  for (int row = 0; row < kTileRows; ++row) {
    A* values = logits + row * kChunkColumns;
    for (int64_t column = 0; column < columns; column += kLanes<A>) {
      store(values + column, load(values + column) * inverse_temperature);
    }
    for (int64_t column = valid; column < columns; ++column) values[column] = -std::numeric_limits<A>::infinity();
  }
}

template <typename A>
HOST_DEVICE A largest(const A* values, int64_t columns) {
  Vector<A> most = load(values);
  for (int64_t column = kLanes<A>; column < columns; column += kLanes<A>) {
    const Vector<A> next = load(values + column);
    most = next > most ? next : most;
  }
  A result = most[0];
  for (int lane = 1; lane < kLanes<A>; ++lane) result = std::max(result, A(most[lane]));
  return result;
}

// values = exp(values - shift); their sum.
template <typename A>
HOST_DEVICE A exponentiate(A* values, int64_t columns, A shift) {
  Vector<A> sums = {};
  for (int64_t column = 0; column < columns; column += kLanes<A>) {
    const Vector<A> term = exp_nonpositive<A>(load(values + column) - shift);
    store(values + column, term);
    sums += term;
  }
  return sum_of_lanes<A>(sums);
}

// Calls task(image, first row, scratch) for every block of rows; scratch holds `numbers` for each row of a block.
template <typename A, typename Task>
void for_each_block(const InfoNceSizes& sizes, int64_t numbers, int threads, Task task) {
  const int64_t blocks = ceil_divide(sizes.rows, kBlockRows);
  const bool parallel = threads > 1 && sizes.batch * sizes.rows * sizes.rows * sizes.width >= kParallelProducts;
  ThreadBuffers<A> scratch(parallel ? threads : 1, kBlockRows * numbers);
  // Dynamic: one slow core would else hold up all others for its equal share.
#pragma omp parallel for schedule(dynamic) num_threads(threads) if (parallel)
  for (int64_t index = 0; index < sizes.batch * blocks; ++index) {
    task(index / blocks, index % blocks * kBlockRows, scratch.own());
  }
}

template <typename T>
void forward(const InfoNceForward& arguments, const InfoNceSizes& sizes, double temperature, int threads) {
  using A = AccumulateType<T>;
  const T* query = static_cast<const T*>(arguments.query);
  const T* key = static_cast<const T*>(arguments.key);
  A* loss = static_cast<A*>(arguments.loss);
  A* log_sum = static_cast<A*>(arguments.log_sum);
  const A inverse_temperature = A(1 / temperature);
  const Chunks<A> chunks(sizes);

  Panels<A> keys(sizes.width, sizes.rows, sizes.batch);
  for (int64_t image = 0; image < sizes.batch; ++image) {
    keys.pack(image, key + image * sizes.rows * sizes.width, 1, sizes.width);
  }
  for_each_block<A>(sizes, sizes.width, threads, [&](int64_t image, int64_t first, A* rows) {
    widen_rows(query + image * sizes.rows * sizes.width, sizes, first, rows);
    A maximum[kBlockRows], sum[kBlockRows], positive[kBlockRows];
    std::fill_n(maximum, kBlockRows, -std::numeric_limits<A>::infinity());
    std::fill_n(sum, kBlockRows, A(0));
    alignas(kVectorBytes) A logits[kTileRows * kChunkColumns];
    const int64_t end = std::min(kBlockRows, sizes.rows - first);
    for (int64_t begin = 0; begin < sizes.rows; begin += chunks.columns) {
      const int64_t columns = std::min(chunks.columns, round_up(sizes.rows - begin, kPanel<A>));
      for (int64_t tile = 0; tile < end; tile += kTileRows) {
        tile_logits(rows + tile * sizes.width, keys, image, sizes, begin, columns, inverse_temperature, logits);
        for (int64_t row = tile; row < tile + kTileRows; ++row) {
          A* values = logits + (row - tile) * kChunkColumns;
          const int64_t own = first + row - begin;  // the column of the row's own key
          if (own >= 0 && own < columns) positive[row] = values[own];
          const A shift = std::max(maximum[row], largest(values, columns));
          sum[row] = sum[row] * std::exp(maximum[row] - shift) + exponentiate(values, columns, shift);
          maximum[row] = shift;
        }
      }
    }
    for (int64_t row = 0; row < end; ++row) {
      const int64_t place = image * sizes.rows + first + row;
      const A logarithm = std::log(sum[row]);
      // In this order a row that is told apart from all others loses no digits: maximum and positive are then equal.
      loss[place] = maximum[row] - positive[row] + logarithm;
      log_sum[place] = maximum[row] + logarithm;
    }
  });
}

// grad_query = grad_loss / temperature · (sum over j of p_j · key_j - key_i), p_j = exp(s_j - log_sum).
template <typename T>
void backward(const InfoNceBackward& arguments, const InfoNceSizes& sizes, double temperature, int threads) {
  using A = AccumulateType<T>;
  const A* grad_loss = static_cast<const A*>(arguments.grad_loss);
  const T* query = static_cast<const T*>(arguments.query);
  const T* key = static_cast<const T*>(arguments.key);
  const A* log_sum = static_cast<const A*>(arguments.log_sum);
  T* grad_query = static_cast<T*>(arguments.grad_query);
  const A inverse_temperature = A(1 / temperature);
  const Chunks<A> chunks(sizes);

  Panels<A> keys(sizes.width, sizes.rows, sizes.batch), key_columns(sizes.rows, sizes.width, sizes.batch);
  for (int64_t image = 0; image < sizes.batch; ++image) {
    keys.pack(image, key + image * sizes.rows * sizes.width, 1, sizes.width);
    key_columns.pack(image, key + image * sizes.rows * sizes.width, sizes.width, 1);
  }
  const int64_t sum_stride = key_columns.count() * kPanel<A>;
  for_each_block<A>(sizes, sum_stride + sizes.width, threads, [&](int64_t image, int64_t first, A* sums) {
    A* const rows = sums + kBlockRows * sum_stride;
    widen_rows(query + image * sizes.rows * sizes.width, sizes, first, rows);
    std::fill_n(sums, kBlockRows * sum_stride, A(0));
    alignas(kVectorBytes) A probabilities[kTileRows * kChunkColumns];
    const int64_t end = std::min(kBlockRows, sizes.rows - first);
    for (int64_t begin = 0; begin < sizes.rows; begin += chunks.columns) {
      const int64_t columns = std::min(chunks.columns, round_up(sizes.rows - begin, kPanel<A>));
      for (int64_t tile = 0; tile < end; tile += kTileRows) {
        tile_logits(rows + tile * sizes.width, keys, image, sizes, begin, columns, inverse_temperature, probabilities);
        for (int64_t row = tile; row < tile + kTileRows; ++row) {
          A* values = probabilities + (row - tile) * kChunkColumns;
          const int64_t place = std::min(first + row, sizes.rows - 1);
          exponentiate(values, columns, log_sum[image * sizes.rows + place]);
          // The positive's key is subtracted here, where 1 - p is exact for p near 1, not from the finished sum.
          if (place >= begin && place < begin + columns) values[place - begin] -= 1;
        }
        for (int64_t number = 0; number < key_columns.count(); ++number) {
          multiply_tile<A, true>(probabilities, kChunkColumns, key_columns.panel(image, number) + begin * kPanel<A>,
                                 std::min(columns, sizes.rows - begin),
                                 sums + tile * sum_stride + number * kPanel<A>, sum_stride);
        }
      }
    }
    for (int64_t row = 0; row < end; ++row) {
      const int64_t place = image * sizes.rows + first + row;
      const A factor = grad_loss[place] * inverse_temperature;
      for (int64_t column = 0; column < sizes.width; ++column) {
        grad_query[place * sizes.width + column] = T(factor * sums[row * sum_stride + column]);
      }
    }
  });
}

}  // namespace

void info_nce_forward(const InfoNceForward& arguments, const InfoNceSizes& sizes, double temperature, DType dtype,
                      int threads) {
  dispatch_cpu_dtype("info_nce", dtype,
                     [&](auto tag) { forward<typename decltype(tag)::Type>(arguments, sizes, temperature, threads); });
}

void info_nce_backward(const InfoNceBackward& arguments, const InfoNceSizes& sizes, double temperature, DType dtype,
                       int threads) {
  dispatch_cpu_dtype("info_nce", dtype,
                     [&](auto tag) { backward<typename decltype(tag)::Type>(arguments, sizes, temperature, threads); });
}

}  // namespace restoration::CPU_ISA

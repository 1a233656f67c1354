// Matting Laplacian on the CPU: formula in matting_laplacian.h. Energy and product in one pass over image and guide.
// A strip of rows is the work of one thread at a time; windows that reach over its border are computed in both strips,
// so that no two threads write the same pixel and the result does not depend on the thread count. A strip goes down one
// row of windows after the other, neighbouring windows in the lanes of float64 vectors: rounding to float32 anywhere
// before the end would be seen where the guide is grey. Scratch memory of a thread, with side = 2·radius+1:
// side·(3 + 2·C)·W numbers, rows of guide, image and product in float64, and the residuals of a block of windows.

#include <cmath>

#include "matting_laplacian.h"
#include "vectors_cpu.h"

namespace restoration::CPU_ISA {
namespace {

// Neighbouring windows are in the lanes of one vector.
using Lanes = Vector<double>;
constexpr int kVectorWindows = kLanes<double>;

// Windows of a row whose residuals wait for being summed by pixel: few enough for the first-level cache (9 residuals of
// 3 channels take 14 KB), and many enough that no vector is read back while it is still being written.
constexpr int64_t kBlock = 64;

// Short enough to occupy 16 threads with one picture of 512², long beside the 2·radius rows of windows that two
// neighbouring strips both compute.
constexpr int64_t kStripRows = 32;

// Images below this size take less time than waking the threads.
constexpr int64_t kParallelPixels = int64_t{1} << 11;

// As many rows of several planes as a window has, in float64; a row gives its place to the one `side` below.
class RowRing {
 public:
  RowRing(Carver& carver, int64_t planes, int64_t side, int64_t stride)
      : side_(side), stride_(stride), values_(carver.take<double>(planes * side * stride)) {
    if (values_ != nullptr) std::fill_n(values_, planes * side * stride, 0.0);
  }

  double* row(int64_t plane, int64_t row) { return values_ + (plane * side_ + row % side_) * stride_; }

 private:
  int64_t side_;
  int64_t stride_;
  double* values_;
};

template <typename T, int kRadius>
class Strip {
 public:
  static constexpr int kSide = 2 * kRadius + 1;
  static constexpr int kPixels = kSide * kSide;

  Strip(Carver carver, const MattingLaplacian& arguments, const MattingLaplacianSizes& sizes)
      : arguments_(arguments),
        sizes_(sizes),
        // Windows come in whole vectors; the columns that the last ones reach beyond the image stay zero.
        stride_(round_up(sizes.width, kVectorWindows) + kSide - 1),
        guide_(carver, 3, kSide, stride_),
        image_(carver, sizes.channels, kSide, stride_),
        product_(carver, sizes.channels, kSide, stride_),
        residuals_(carver.take<double>(sizes.channels * kPixels * kBlock)),
        memory_used_(carver.used()) {}

  int64_t memory_used() const { return memory_used_; }

  // Writes the product's rows from first to last - 1; returns the energy of the windows whose upper row is one of them.
  double run(int64_t image, int64_t first, int64_t last) {
    const int64_t first_window = std::max<int64_t>(0, first - 2 * kRadius);
    const int64_t last_window = std::min(sizes_.window_rows(), last);
    for (int64_t row = first_window; row < first_window + kSide; ++row) clear_product(row);
    if (first_window < last_window) {
      for (int64_t row = first_window; row < first_window + kSide - 1; ++row) read_row(image, row);
    }
    double energy = 0;
    for (int64_t window = first_window; window < last_window; ++window) {
      read_row(image, window + kSide - 1);
      const double energy_of_row = add_window_row(window);
      if (window >= first) {
        energy += energy_of_row;
        write_row(image, window);
      }
      clear_product(window);
    }
    for (int64_t row = std::max(first, last_window); row < last; ++row) write_row(image, row);
    return energy;
  }

 private:
  void read_row(int64_t image, int64_t row) {
    for (int64_t channel = 0; channel < 3; ++channel) {
      convert_row(static_cast<const T*>(arguments_.guide) + offset(image, channel, 3, row), guide_.row(channel, row));
    }
    for (int64_t channel = 0; channel < sizes_.channels; ++channel) {
      convert_row(static_cast<const T*>(arguments_.image) + offset(image, channel, sizes_.channels, row),
                  image_.row(channel, row));
    }
  }

  int64_t offset(int64_t image, int64_t channel, int64_t channels, int64_t row) const {
    return ((image * channels + channel) * sizes_.height + row) * sizes_.width;
  }

  void convert_row(const T* values, double* row) const {
#pragma omp simd
    for (int64_t column = 0; column < sizes_.width; ++column) row[column] = static_cast<double>(values[column]);
  }

  void clear_product(int64_t row) {
    for (int64_t channel = 0; channel < sizes_.channels; ++channel) {
      std::memset(product_.row(channel, row), 0, stride_ * sizeof(double));
    }
  }

  void write_row(int64_t image, int64_t row) {
    if (arguments_.product == nullptr) return;
    const double factor = arguments_.factor;
    for (int64_t channel = 0; channel < sizes_.channels; ++channel) {
      const double* sums = product_.row(channel, row);
      T* values = static_cast<T*>(arguments_.product) + offset(image, channel, sizes_.channels, row);
#pragma omp simd
      for (int64_t column = 0; column < sizes_.width; ++column) values[column] = static_cast<T>(factor * sums[column]);
    }
  }

  // All windows with this upper row: adds their residuals to the product, returns their energy.
  double add_window_row(int64_t row) {
    const int64_t windows = sizes_.window_columns();
    Lanes energy = {};
    for (int64_t block = 0; block < windows; block += kBlock) {
      const int64_t count = std::min(kBlock, windows - block);
      for (int64_t start = 0; start < count; start += kVectorWindows) {
        const int64_t inside = std::min<int64_t>(kVectorWindows, count - start);
        energy += fit_windows(row, block + start, inside, residuals_ + start);
      }
      if (arguments_.product != nullptr) add_residuals(row, block, round_up(count, kVectorWindows));
    }
    double sum = 0;
    for (int lane = 0; lane < kVectorWindows; ++lane) sum += energy[lane];
    return sum;
  }

  // The windows from `column` on, one in each lane. Lanes from `count` on reach beyond the image and give zeros, chosen
  // and not multiplied: what they compute of guide beside zeros may be infinite.
  Lanes fit_windows(int64_t row, int64_t column, int64_t count, double* residuals) {
    WindowBasis<Lanes, kPixels> basis;
    for (int channel = 0; channel < 3; ++channel) load_windows(guide_, channel, row, column, basis.colours[channel]);
    basis.orthogonalise(root_eps_);
    Vector<Integer<double>> inside;
    for (int lane = 0; lane < kVectorWindows; ++lane) inside[lane] = lane < count ? -1 : 0;
    Lanes energy = {};
    for (int64_t channel = 0; channel < sizes_.channels; ++channel) {
      Lanes values[kPixels];
      load_windows(image_, channel, row, column, values);
      const Lanes energies = basis.residuals(values);
      energy += inside ? energies : Lanes{};
      for (int pixel = 0; pixel < kPixels; ++pixel, residuals += kBlock) {
        store(residuals, inside ? values[pixel] : Lanes{});
      }
    }
    return energy;
  }

  HOST_DEVICE static void load_windows(RowRing& rows, int64_t channel, int64_t row, int64_t column,
                                       Lanes (&values)[kPixels]) {
    for (int i = 0; i < kSide; ++i) {
      const double* start = rows.row(channel, row + i) + column;
      for (int j = 0; j < kSide; ++j) values[i * kSide + j] = load(start + j);
    }
    centre_window(values);
  }

  void add_residuals(int64_t row, int64_t column, int64_t count) {
    const double* residuals = residuals_;
    for (int64_t channel = 0; channel < sizes_.channels; ++channel) {
      for (int i = 0; i < kSide; ++i) {
        double* sums = product_.row(channel, row + i) + column;
        for (int j = 0; j < kSide; ++j, residuals += kBlock) {
          for (int64_t start = 0; start < count; start += kVectorWindows) {
            store(sums + start + j, load(sums + start + j) + load(residuals + start));
          }
        }
      }
    }
  }

  const MattingLaplacian& arguments_;
  const MattingLaplacianSizes& sizes_;
  const double root_eps_ = std::sqrt(arguments_.eps);
  int64_t stride_;
  RowRing guide_;
  RowRing image_;
  RowRing product_;
  double* residuals_;  // [C, n, kBlock]
  int64_t memory_used_;
};

template <typename T, int kRadius>
void run(const MattingLaplacian& arguments, const MattingLaplacianSizes& sizes, int threads) {
  const int64_t strips_per_image = ceil_divide(sizes.height, kStripRows);
  const int64_t strips = sizes.batch * strips_per_image;
  if (arguments.product != nullptr) {
    const int64_t bytes = sizes.batch * sizes.channels * sizes.pixels() * int64_t{sizeof(T)};
    advise_huge_pages(arguments.product, bytes);
  }
  Buffer<double> energy(strips);
  const bool parallel = threads > 1 && sizes.batch * sizes.pixels() >= kParallelPixels;
  auto strip_in = [&](char* memory) { return Strip<T, kRadius>(Carver(memory), arguments, sizes); };
  ThreadBuffers<char> memory(parallel ? threads : 1, strip_in(nullptr).memory_used());
#pragma omp parallel num_threads(threads) if (parallel)
  {
    Strip<T, kRadius> strip = strip_in(memory.own());
#pragma omp for schedule(dynamic)
    for (int64_t index = 0; index < strips; ++index) {
      const int64_t first = index % strips_per_image * kStripRows;
      energy[index] = strip.run(index / strips_per_image, first, std::min(sizes.height, first + kStripRows));
    }
  }
  if (arguments.energy == nullptr) return;
  for (int64_t image = 0; image < sizes.batch; ++image) {
    double sum = 0;
    for (int64_t strip = 0; strip < strips_per_image; ++strip) sum += energy[image * strips_per_image + strip];
    static_cast<T*>(arguments.energy)[image] = static_cast<T>(sum / static_cast<double>(sizes.pixels()));
  }
}

}  // namespace

void matting_laplacian(const MattingLaplacian& arguments, const MattingLaplacianSizes& sizes, DType dtype,
                       int threads) {
  dispatch_matting_laplacian(dtype, sizes.radius, [&](auto tag, auto radius) {
    run<typename decltype(tag)::Type, decltype(radius)::value>(arguments, sizes, threads);
  });
}

}  // namespace restoration::CPU_ISA

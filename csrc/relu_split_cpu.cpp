// ReLU and split of a map of pixels into two of planes, on the CPU: formula in relu_split.h. Everything is read once
// and written once; nothing is rounded.

#include "relu_split.h"
#include "turned_tiles_cpu.h"

namespace restoration::CPU_ISA {
namespace {

// Small enough for an even share of the network's smallest maps: 72 channels of 64² are ten bands.
constexpr int64_t kBandElements = int64_t{1} << 15;

Bands bands_of(const ReluSplitSizes& sizes) {
  return {kBandElements, sizes.batch, sizes.channels, sizes.height, sizes.width};
}

template <typename T>
void forward(const ReluSplitForward& arguments, const ReluSplitSizes& sizes, int threads) {
  using A = AccumulateType<T>;
  T* rectified = static_cast<T*>(arguments.rectified);
  T* rest = static_cast<T*>(arguments.rest);
  prepare_output(rectified, sizes.batch * sizes.split * sizes.pixels());
  prepare_output(rest, sizes.batch * (sizes.channels - sizes.split) * sizes.pixels());
  const Bands bands = bands_of(sizes);
#pragma omp parallel for schedule(static) num_threads(threads) if (bands.worth_threads(threads))
  for (int64_t band = 0; band < bands.count(); ++band) {
    const int64_t image = bands.image(band);
    const T* x = static_cast<const T*>(arguments.x) + image * sizes.channels * sizes.pixels();
    const SplitPlanes<T> planes(rectified, rest, image, sizes.channels, sizes.split, sizes.pixels());
    for_each_tile<A>(
        bands, band,
        [&](int64_t channel, auto channels, int64_t row, int64_t column, auto columns) {
          const int64_t pixel = row * sizes.width + column;
          const T* values = x + pixel * sizes.channels + channel;
          Vector<A> tile[kLanes<A>];
          fill_tile<A>(tile, columns,
                       [&](int64_t index) { return load_numbers(values + index * sizes.channels, channels); });
          transpose<A>(tile);
#pragma GCC unroll 16
          for (int64_t lane = 0; lane < channels; ++lane) {
            Vector<A> vector = tile[lane];
            if (channel + lane < sizes.split) vector = where_positive(vector, vector);
            store_numbers(planes.plane(channel + lane) + pixel, narrowed<T>(vector), columns);
          }
        });
  }
}

template <typename T>
void backward(const ReluSplitBackward& arguments, const ReluSplitSizes& sizes, int threads) {
  using A = AccumulateType<T>;
  const T* rectified = static_cast<const T*>(arguments.rectified);
  const T* grad_rectified = static_cast<const T*>(arguments.grad_rectified);
  const T* grad_rest = static_cast<const T*>(arguments.grad_rest);
  prepare_output(static_cast<T*>(arguments.grad_x), sizes.batch * sizes.channels * sizes.pixels());
  const Bands bands = bands_of(sizes);
#pragma omp parallel for schedule(static) num_threads(threads) if (bands.worth_threads(threads))
  for (int64_t band = 0; band < bands.count(); ++band) {
    const int64_t image = bands.image(band);
    const SplitPlanes<const T> gradients(grad_rectified, grad_rest, image, sizes.channels, sizes.split, sizes.pixels());
    const T* deciders = rectified + image * sizes.split * sizes.pixels();
    T* grad_x = static_cast<T*>(arguments.grad_x) + image * sizes.channels * sizes.pixels();
    for_each_tile<A>(
        bands, band,
        [&](int64_t channel, auto channels, int64_t row, int64_t column, auto columns) {
          const int64_t pixel = row * sizes.width + column;
          Vector<A> tile[kLanes<A>];
          fill_tile<A>(tile, channels, [&](int64_t lane) {
            const Vector<A> gradient = load_numbers(gradients.plane(channel + lane) + pixel, columns);
            if (channel + lane >= sizes.split) return gradient;
            const T* decider = deciders + (channel + lane) * sizes.pixels() + pixel;
            return where_positive(load_numbers(decider, columns), gradient);
          });
          transpose<A>(tile);
          T* values = grad_x + pixel * sizes.channels + channel;
#pragma GCC unroll 16
          for (int64_t index = 0; index < columns; ++index) {
            store_numbers(values + index * sizes.channels, narrowed<T>(tile[index]), channels);
          }
        });
  }
}

}  // namespace

void relu_split_forward(const ReluSplitForward& arguments, const ReluSplitSizes& sizes, DType dtype, int threads) {
  dispatch_cpu_dtype("relu_split", dtype,
                     [&](auto tag) { forward<typename decltype(tag)::Type>(arguments, sizes, threads); });
}

void relu_split_backward(const ReluSplitBackward& arguments, const ReluSplitSizes& sizes, DType dtype, int threads) {
  dispatch_cpu_dtype("relu_split", dtype,
                     [&](auto tag) { backward<typename decltype(tag)::Type>(arguments, sizes, threads); });
}

}  // namespace restoration::CPU_ISA

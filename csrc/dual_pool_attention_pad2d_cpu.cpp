// Dual pooling attention into a padded map with channels last, on the CPU: formula in dual_pool_attention_pad2d.h.
// Forward reads x twice: for the scales, then tile by tile to write y. Backward reads grad_y and x for the gradient to
// the scales, then grad_y again and grad_addend, and writes grad_x. Scratch memory: a number a channel and band.

#include "dual_pool_attention_cpu.h"
#include "dual_pool_attention_pad2d.h"
#include "turned_tiles_cpu.h"

namespace restoration::CPU_ISA {
namespace {

// Vectors that a lane sums in the accumulate type before float64 takes over, as in blocked_sum.
constexpr int64_t kSummedVectors = 128;

// 512 KB of float32, half of a second-level cache of 1 MB.
constexpr int64_t kBandElements = int64_t{1} << 17;

struct PaddedBands : Bands {
  DualPoolAttentionPad2dSizes sizes;

  explicit PaddedBands(const DualPoolAttentionPad2dSizes& sizes)
      : Bands(kBandElements, sizes.map.batch, sizes.map.channels, sizes.map.height, sizes.map.width), sizes(sizes) {}
};

// The pixels of y [H+2p, W+2p, C], one image, that lie inside the rows of a band.
template <typename T, typename Y>
void write_inside(Y* y, const T* x, const AccumulateType<T>* scale, const PaddedBands& bands, int64_t band) {
  using A = AccumulateType<T>;
  const DualPoolAttentionPad2dSizes& sizes = bands.sizes;
  const DualPoolAttentionSizes& map = sizes.map;
  for_each_tile<A>(
      bands, band,
      [&](int64_t channel, auto channels, int64_t row, int64_t column, auto columns) {
        const T* values = x + channel * map.pixels() + row * map.width + column;
        Vector<A> tile[kLanes<A>];
        fill_tile<A>(tile, channels, [&](int64_t lane) {
          return load_numbers(values + lane * map.pixels(), columns) * scale[channel + lane];
        });
        transpose<A>(tile);
        Y* pixels = y + sizes.padded_place(row, column) * map.channels + channel;
#pragma GCC unroll 16
        for (int64_t pixel = 0; pixel < columns; ++pixel) {
          store_numbers(pixels + pixel * map.channels, rounded<Y>(tile[pixel]), channels);
        }
      });
}

// The padding of y beside the rows of a band, and the rows above or below that mirror them.
template <typename Y>
void write_mirrored(Y* y, const PaddedBands& bands, int64_t band) {
  const DualPoolAttentionPad2dSizes& sizes = bands.sizes;
  const DualPoolAttentionSizes& map = sizes.map;
  const int64_t pixel = map.channels, row_pixels = sizes.padded_width() * pixel;
  for (int64_t row = bands.first_row(band); row < bands.last_row(band); ++row) {
    const PaddedPlaces<int64_t> rows(row, map.height, sizes.padding);
    Y* own_row = y + rows.own * row_pixels;
    for (int64_t column = 0; column < map.width; ++column) {
      const PaddedPlaces<int64_t> columns(column, map.width, sizes.padding);
      columns.for_each_mirror([&](int64_t place) {
        std::memcpy(own_row + place * pixel, own_row + columns.own * pixel, pixel * sizeof(Y));
      });
    }
    rows.for_each_mirror(
        [&](int64_t place) { std::memcpy(y + place * row_pixels, own_row, row_pixels * sizeof(Y)); });
  }
}

template <typename T, typename Y>
void forward(const DualPoolAttentionForward& arguments, const DualPoolAttentionPad2dSizes& sizes, int threads) {
  using A = AccumulateType<T>;
  const DualPoolAttentionSizes& map = sizes.map;
  const T* x = static_cast<const T*>(arguments.x);
  Y* y = static_cast<Y*>(arguments.y);
  const A* scale = static_cast<const A*>(arguments.scale);
  compute_scales(x, static_cast<const T*>(arguments.weight), static_cast<A*>(arguments.mean),
                 static_cast<A*>(arguments.scale), map, threads);
  const int64_t image_elements = sizes.padded_height() * sizes.padded_width() * map.channels;
  prepare_output(y, map.batch * image_elements);
  const PaddedBands bands(sizes);
#pragma omp parallel for schedule(static) num_threads(threads) if (bands.worth_threads(threads))
  for (int64_t band = 0; band < bands.count(); ++band) {
    const int64_t image = bands.image(band), first_plane = image * map.channels;
    write_inside(y + image * image_elements, x + first_plane * map.pixels(), scale + first_plane, bands, band);
    write_mirrored(y + image * image_elements, bands, band);
  }
}

// grad_y [H+2p, W+2p, C] of one image, read as the gradient to the map before padding.
template <typename Y>
class Folded {
 public:
  using A = AccumulateType<Y>;

  Folded(const Y* grad_y, const DualPoolAttentionPad2dSizes& sizes) : grad_y_(grad_y), sizes_(sizes) {}

  // Of `count` channels of one pixel.
  HOST_DEVICE Vector<A> at(const PaddedPlaces<int64_t>& rows, int64_t column, int64_t channel, int64_t count) const {
    const PaddedPlaces<int64_t> columns(column, sizes_.map.width, sizes_.padding);
    Vector<A> sum = {};
    rows.for_each([&](int64_t row) {
      columns.for_each([&](int64_t place) { sum += padded(row, place, channel, count); });
    });
    return sum;
  }

 private:
  HOST_DEVICE Vector<A> padded(int64_t row, int64_t column, int64_t channel, int64_t count) const {
    return load_numbers(grad_y_ + (row * sizes_.padded_width() + column) * sizes_.map.channels + channel, count);
  }

  const Y* grad_y_;
  const DualPoolAttentionPad2dSizes& sizes_;
};

// Calls use(tile, channel, channels, row, column, columns) for the tiles of a band: vectors of the gradient to some
// columns of a row before padding, one for each channel; and next as above.
template <typename Y, typename Use, typename Next>
HOST_DEVICE void for_each_folded_tile(const void* grad_y, const PaddedBands& bands, int64_t band, Use use, Next next) {
  using A = AccumulateType<Y>;
  const DualPoolAttentionPad2dSizes& sizes = bands.sizes;
  const int64_t padded = sizes.padded_height() * sizes.padded_width() * sizes.map.channels;
  const Folded<Y> folded(static_cast<const Y*>(grad_y) + bands.image(band) * padded, sizes);
  for_each_tile<A>(
      bands, band,
      [&](int64_t channel, auto channels, int64_t row, int64_t column, auto columns) {
        const PaddedPlaces<int64_t> rows(row, sizes.map.height, sizes.padding);
        Vector<A> tile[kLanes<A>];
        fill_tile<A>(tile, columns,
                     [&](int64_t pixel) { return folded.at(rows, column + pixel, channel, channels); });
        transpose<A>(tile);
        use(tile, channel, channels, row, column, columns);
      },
      next);
}

// sums [C] of grad_y · x in the rows of a band.
template <typename T, typename Y>
void sum_band(const DualPoolAttentionBackward& arguments, const PaddedBands& bands, int64_t band, double* sums) {
  using A = AccumulateType<T>;
  const DualPoolAttentionSizes& map = bands.sizes.map;
  const T* x = static_cast<const T*>(arguments.x) + bands.image(band) * map.channels * map.pixels();
  std::fill(sums, sums + map.channels, 0.0);
  Vector<A> vectors[kLanes<A>] = {};
  int64_t summed = 0;
  const auto empty_vectors = [&](int64_t channel, int64_t channels) {
    for (int64_t lane = 0; lane < channels; ++lane) {
      double sum = 0;
      for (int index = 0; index < kLanes<A>; ++index) sum += vectors[lane][index];
      sums[channel + lane] += sum;
      vectors[lane] = Vector<A>{};
    }
    summed = 0;
  };
  for_each_folded_tile<Y>(
      arguments.grad_y, bands, band,
      [&](const Vector<A>* tile, int64_t channel, auto channels, int64_t row, int64_t column, auto columns) {
        const T* values = x + channel * map.pixels() + row * map.width + column;
#pragma GCC unroll 16
        for (int64_t lane = 0; lane < channels; ++lane) {
          vectors[lane] += tile[lane] * load_numbers(values + lane * map.pixels(), columns);
        }
        if (++summed == kSummedVectors) empty_vectors(channel, channels);
      },
      empty_vectors);
}

// grad_x = scale · grad_y + grad_mean · the pixel's share in the mean + grad_addend, in the rows of a band.
template <typename T, typename Y>
void write_band(const DualPoolAttentionPad2dBackward& arguments, const PaddedBands& bands, int64_t band,
                const double* grad_mean, const AccumulateType<T>* rows, const AccumulateType<T>* columns) {
  using A = AccumulateType<T>;
  const DualPoolAttentionSizes& map = bands.sizes.map;
  const int64_t first_plane = bands.image(band) * map.channels;
  T* grad_x = static_cast<T*>(arguments.grad_x) + first_plane * map.pixels();
  const T* grad_addend = static_cast<const T*>(arguments.grad_addend);
  if (grad_addend != nullptr) grad_addend += first_plane * map.pixels();
  const A* scale = static_cast<const A*>(arguments.scale) + first_plane;
  for_each_folded_tile<Y>(
      arguments.grad_y, bands, band,
      [&](const Vector<A>* tile, int64_t channel, auto channels, int64_t row, int64_t column, auto count) {
        const int64_t place = channel * map.pixels() + row * map.width + column;
        const Vector<A> shares = load_numbers(columns + column, count);
#pragma GCC unroll 16
        for (int64_t lane = 0; lane < channels; ++lane) {
          const A row_grad = A(grad_mean[first_plane + channel + lane] * rows[row]);
          const int64_t lane_place = place + lane * map.pixels();
          Vector<A> gradient = tile[lane] * scale[channel + lane] + row_grad * shares;
          if (grad_addend != nullptr) gradient += load_numbers(grad_addend + lane_place, count);
          store_numbers(grad_x + lane_place, rounded<T>(gradient), count);
        }
      },
      [](int64_t, int64_t) {});
}

template <typename T, typename Y>
void backward(const DualPoolAttentionPad2dBackward& arguments, const DualPoolAttentionPad2dSizes& sizes, int threads) {
  using A = AccumulateType<T>;
  const DualPoolAttentionSizes& map = sizes.map;
  const PaddedBands bands(sizes);
  const int64_t count = bands.count();
  Buffer<double> partial(count * map.channels), grad_logit(map.planes());
#pragma omp parallel for schedule(static) num_threads(threads) if (bands.worth_threads(threads))
  for (int64_t band = 0; band < count; ++band) {
    sum_band<T, Y>(arguments, bands, band, partial.data() + band * map.channels);
  }
  for (int64_t plane = 0; plane < map.planes(); ++plane) {
    const int64_t image = plane / map.channels, channel = plane % map.channels;
    grad_logit[plane] = 0;
    for (int64_t band = image * bands.bands_per_image; band < (image + 1) * bands.bands_per_image; ++band) {
      grad_logit[plane] += partial[band * map.channels + channel];
    }
  }
  scale_grad_logits(grad_logit.data(), static_cast<const A*>(arguments.scale), map.planes());
  if (arguments.grad_weight != nullptr) {
    compute_grad_weight(static_cast<T*>(arguments.grad_weight), grad_logit.data(),
                        static_cast<const A*>(arguments.mean), map);
  }
  if (arguments.grad_x == nullptr) return;
  const T* weight = static_cast<const T*>(arguments.weight);
  Buffer<double> grad_mean(map.planes());
  for (int64_t plane = 0; plane < map.planes(); ++plane) {
    const int64_t channel = plane % map.channels;
    grad_mean[plane] =
        channel_grad_mean(grad_logit.data() + plane - channel, weight, map.taps, channel, map.channels);
  }
  Buffer<A> rows(map.height), columns(map.width);
  fill_pooling_weights(rows.data(), map.height, map.pool_size);
  fill_pooling_weights(columns.data(), map.width, map.pool_size);
  prepare_output(static_cast<T*>(arguments.grad_x), map.planes() * map.pixels());
#pragma omp parallel for schedule(static) num_threads(threads) if (bands.worth_threads(threads))
  for (int64_t index = 0; index < count; ++index) {
    write_band<T, Y>(arguments, bands, index, grad_mean.data(), rows.data(), columns.data());
  }
}

// Calls call(tag of the dtype, tag of the output's).
template <typename Call>
void dispatch_dtypes(DType dtype, DType output_dtype, Call call) {
  constexpr const char* kName = "dual_pool_attention_pad2d";
  dispatch_cpu_dtype(kName, dtype, [&](auto tag) {
    if (output_dtype == dtype) return call(tag, tag);
    if constexpr (std::is_same_v<typename decltype(tag)::Type, float>) {
      if (output_dtype == DType::bfloat16) return call(tag, TypeTag<BFloat16>());
    }
    refuse_dtype(kName, output_dtype);
  });
}

}  // namespace

void dual_pool_attention_pad2d_forward(const DualPoolAttentionForward& arguments,
                                       const DualPoolAttentionPad2dSizes& sizes, DType dtype, DType output_dtype,
                                       int threads) {
  dispatch_dtypes(dtype, output_dtype, [&](auto tag, auto output_tag) {
    forward<typename decltype(tag)::Type, typename decltype(output_tag)::Type>(arguments, sizes, threads);
  });
}

void dual_pool_attention_pad2d_backward(const DualPoolAttentionPad2dBackward& arguments,
                                        const DualPoolAttentionPad2dSizes& sizes, DType dtype, DType output_dtype,
                                        int threads) {
  dispatch_dtypes(dtype, output_dtype, [&](auto tag, auto output_tag) {
    backward<typename decltype(tag)::Type, typename decltype(output_tag)::Type>(arguments, sizes, threads);
  });
}

}  // namespace restoration::CPU_ISA

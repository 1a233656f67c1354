// What a thread of forward of the pixel-adaptive convolution on the CPU multiplies for one row of a strip of output
// pixels: the rows of x under its taps, and their products with a panel of the weights.
#pragma once

#include "pac_conv2d_strips_cpu.h"

namespace restoration::CPU_ISA {

// Elements of an operand that the channels of one tap fill.
template <typename E>
int64_t elements_per_tap(const PacConv2dSizes& sizes) {
  return ceil_divide(sizes.channels, kSteps<E>);
}

// What lies under the taps of a row of a strip: tap t of element e of place p reads under[t][e · pitch + p].
template <typename E>
struct Taps {
  const E** under;
  int64_t count;
  int64_t elements;
  int64_t pitch;
};

// The rows of x under the taps of one row of a strip: [K, copies, elements of a tap, pitch]. Where all taps of a row
// can read one copy of the image's row there is one, else one for each.
template <typename E>
class TapRows {
 public:
  static int64_t copies(const PacConv2dSizes& sizes) {
    return StripScratch<E>::shares_source(sizes) ? 1 : sizes.kernel_size;
  }
  // Numbers between the rows of two channels: an odd count of cache lines, so that they share no set of the caches.
  static int64_t pitch(const PacConv2dSizes& sizes, int64_t places) {
    constexpr int64_t kLine = kCacheLineBytes / sizeof(E);
    return (ceil_divide(places + StripScratch<E>::shared_reach(sizes), kLine) | 1) * kLine;
  }

  static int64_t bytes_per_place(const PacConv2dSizes& sizes) {
    return sizes.kernel_size * copies(sizes) * elements_per_tap<E>(sizes) * int64_t{sizeof(E)};
  }

  TapRows(Carver& carver, const PacConv2dSizes& sizes, const StripTiles<E>& largest)
      : sizes_(sizes),
        taps_{carver.take<const E*>(sizes.taps()), sizes.taps(), elements_per_tap<E>(sizes),
              pitch(sizes, largest.places_per_row())},
        tap_stride_(taps_.elements * taps_.pitch),
        slot_stride_(copies(sizes) * tap_stride_),
        rows_(carver.take<E>(sizes.kernel_size * slot_stride_)) {}

  // Those of row `row` of the strip; rows are taken in order.
  template <typename T>
  Taps<E> fill(const StripTiles<E>& tiles, int64_t row, const T* x) {
    // Where each row of the strip needs only one more row of x than the one before, rows of x take turns in the slots.
    const bool advances = sizes_.vertical.stride == sizes_.vertical.dilation;
    for (int64_t tap_row = 0; tap_row < sizes_.kernel_size; ++tap_row) {
      E* slot = rows_ + (advances ? (row + tap_row) % sizes_.kernel_size : tap_row) * slot_stride_;
      for (int64_t tap = 0; tap < sizes_.kernel_size; ++tap) {
        taps_.under[tap_row * sizes_.kernel_size + tap] =
            slot + tap * (copies(sizes_) == 1 ? sizes_.horizontal.dilation : tap_stride_);
      }
      if (!advances || row == 0 || tap_row + 1 == sizes_.kernel_size) fill_slot(slot, tiles, row, tap_row, x);
    }
    return taps_;
  }

 private:
  template <typename T>
  void fill_slot(E* slot, const StripTiles<E>& tiles, int64_t row, int64_t tap_row, const T* x) const {
    const int64_t input = sizes_.vertical.position(tiles.strip.first_row + row, tap_row);
    if (input < 0 || input >= sizes_.vertical.size) {
      std::memset(static_cast<void*>(slot), 0, slot_stride_ * sizeof(E));
      return;
    }
    const T* image = x + tiles.strip.image * sizes_.channels * sizes_.pixels();
    for (int64_t channel = 0; channel < sizes_.channels; channel += kSteps<E>, slot += taps_.pitch) {
      for (int64_t next = channel + kSteps<E>; next < std::min(channel + 2 * kSteps<E>, sizes_.channels); ++next) {
        prefetch_under(tiles, sizes_, image + next * sizes_.pixels(), row, tap_row);
      }
      const T* values = image + channel * sizes_.pixels() + input * sizes_.horizontal.size;
      const T* second = channel + 1 < sizes_.channels ? values + sizes_.pixels() : nullptr;
      for (int64_t copy = 0; copy < copies(sizes_); ++copy) {
        copy_channels(slot + copy * tap_stride_, sizes_.horizontal.position(tiles.strip.first_column, copy),
                      tiles.places_per_row() + StripScratch<E>::shared_reach(sizes_), values, second);
      }
    }
  }

  // A row of one channel, or of a pair, whose second is zero where there is none.
  template <typename T>
  void copy_channels(E* destination, int64_t first, int64_t count, const T* values, const T* second) const {
    const int64_t width = sizes_.horizontal.size, step = sizes_.horizontal.stride;
    if constexpr (kSteps<E> == 1) {
      copy_row(destination, width, first, step, count, [=](int64_t place) { return static_cast<E>(values[place]); });
    } else if (second == nullptr) {
      copy_row(destination, width, first, step, count, [=](int64_t place) { return E{values[place], T(0.0f)}; });
    } else {
      copy_row(destination, width, first, step, count, [=](int64_t place) { return E{values[place], second[place]}; });
    }
  }

  const PacConv2dSizes& sizes_;
  Taps<E> taps_;
  int64_t tap_stride_;
  int64_t slot_stride_;
  E* rows_;
};

// product [kPanelRows, kTile] = sum over taps of k_t · (panel_t^T · x under t), for kVectors vectors of pixels from
// place `first` of a row on.
template <int kVectors, typename A>
SEPARATE void multiply_taps(const A* panel, Taps<A> taps, int64_t first, const A* kernel, int64_t kernel_stride,
                            A* product) {
  std::memset(product, 0, kPanelRows<A> * kTile<A> * sizeof(A));
  for (int64_t tap = 0; tap < taps.count; ++tap, kernel += kernel_stride, panel += taps.elements * kPanelRows<A>) {
    PanelSums<kVectors, A> sums = {};
    add_panel_products<kVectors>(panel, taps.under[tap] + first, taps.elements, taps.pitch, kLanes<A>, nullptr, sums);
#pragma GCC unroll 4
    for (int vector = 0; vector < kVectors; ++vector) {
      const Vector<A> factor = load(kernel + vector * kLanes<A>);
#pragma GCC unroll 8
      for (int sum = 0; sum < kPanelRows<A>; ++sum) {
        A* total = product + sum * kTile<A> + vector * kLanes<A>;
        store(total, load(total) + factor * sums[sum][vector]);
      }
    }
  }
}

// The same for few channels, where adding up the taps' sums would take longer than scaling x on its way.
template <int kVectors, typename A>
SEPARATE void multiply_scaled_taps(const A* panel, Taps<A> taps, int64_t first, const A* kernel, int64_t kernel_stride,
                                   A* product) {
  PanelSums<kVectors, A> sums = {};
  for (int64_t tap = 0; tap < taps.count; ++tap, kernel += kernel_stride, panel += taps.elements * kPanelRows<A>) {
    Vector<A> factors[kVectors];
#pragma GCC unroll 4
    for (int vector = 0; vector < kVectors; ++vector) factors[vector] = load(kernel + vector * kLanes<A>);
    add_panel_products<kVectors>(panel, taps.under[tap] + first, taps.elements, taps.pitch, kLanes<A>, factors, sums);
  }
  store_sums<kVectors, A>(sums, product);
}

// Up to here one product a channel and vector is faster than kPanelRows sums a tap and vector: measured with 4, 16
// and 64 channels. Shorter panels share such a product among fewer sums.
template <typename A>
constexpr int64_t kFewChannels = 2 * kPanelRows<A>;

// A row of a strip for products of single numbers: x as it is, and k.
template <typename A>
class TapProducts {
 public:
  static int64_t bytes_per_place(const PacConv2dSizes& sizes) { return TapRows<A>::bytes_per_place(sizes); }

  TapProducts(Carver& carver, const PacConv2dSizes& sizes, const StripTiles<A>& largest)
      : few_channels_(sizes.channels <= kFewChannels<A>), rows_(carver, sizes, largest) {}

  // kernel: k_t of the row's places, one tap after the other, kernel_stride apart.
  template <typename T>
  void fill(const StripTiles<A>& tiles, int64_t row, const T* x, const A* kernel) {
    taps_ = rows_.fill(tiles, row, x);
    kernel_ = kernel;
    kernel_stride_ = tiles.places();
  }

  // product [kPanelRows, kTile] of a panel and kVectors vectors of pixels from `place` on.
  template <int kVectors>
  HOST_DEVICE void multiply(const A* panel, int64_t place, A* product) const {
    if (few_channels_) {
      multiply_scaled_taps<kVectors>(panel, taps_, place, kernel_ + place, kernel_stride_, product);
    } else {
      multiply_taps<kVectors>(panel, taps_, place, kernel_ + place, kernel_stride_, product);
    }
  }

 private:
  bool few_channels_;
  TapRows<A> rows_;
  Taps<A> taps_;
  const A* kernel_;
  int64_t kernel_stride_;
};

// The same for products of pairs: x under every tap, scaled with k. A matrix unit takes its operands from memory only,
// and with vectors a sum over all taps takes less time than sums of each, which are twice as short as of numbers.
template <typename E>
class ScaledColumns {
 public:
  static int64_t bytes_per_place(const PacConv2dSizes& sizes) {
    return TapRows<E>::bytes_per_place(sizes) + elements(sizes) * int64_t{sizeof(E)};
  }

  ScaledColumns(Carver& carver, const PacConv2dSizes& sizes, const StripTiles<E>& largest)
      : rows_(carver, sizes, largest),
        elements_(elements(sizes)),
        // Between vectors of places: an odd count of cache lines, so that they share no set of the caches.
        stride_((elements_ | 1) * kLanes<E>),
        columns_(carver.take<E>(largest.places_per_row() / kLanes<E> * stride_)) {}

  template <typename T>
  void fill(const StripTiles<E>& tiles, int64_t row, const T* x, const float* kernel) {
    const Taps<E> taps = rows_.fill(tiles, row, x);
    E* column = columns_;
    for (int64_t place = 0; place < tiles.places_per_row(); place += kLanes<E>, column += stride_) {
      E* scaled = column;
      for (int64_t tap = 0; tap < taps.count; ++tap) {
        const Vector<float> factors = load(kernel + tap * tiles.places() + place);
        const E* values = taps.under[tap] + place;
        for (int64_t element = 0; element < taps.elements; ++element, scaled += kLanes<E>) {
          store(scaled, scale_pairs<E>(load(values + element * taps.pitch), factors));
        }
      }
      std::memset(static_cast<void*>(scaled), 0, (column + elements_ * kLanes<E> - scaled) * sizeof(E));
    }
  }

  template <int kVectors>
  HOST_DEVICE void multiply(const E* panel, int64_t place, float* product) const {
    panel_times_tile<kVectors>(panel, columns_ + place / kLanes<E> * stride_, elements_, kLanes<E>, stride_, product);
  }

 private:
  static int64_t elements(const PacConv2dSizes& sizes) { return panel_elements<E>(sizes.taps(), sizes.channels); }

  TapRows<E> rows_;
  int64_t elements_;
  int64_t stride_;
  E* columns_;
};

// What one row of a strip is multiplied from.
template <typename E>
using RowOperand = std::conditional_t<kSteps<E> == 1, TapProducts<E>, ScaledColumns<E>>;

// All of it, with the weights in passing, stays in a second-level cache: of 1 MB, or of 2 MB, which every processor
// with a matrix unit has.
template <typename E>
constexpr int64_t kRowBytes = int64_t{kHasMatrixUnit<E> ? 640 : 320} << 10;

}  // namespace restoration::CPU_ISA

// What a thread of backward of the pixel-adaptive convolution on the CPU multiplies for one strip: how grad_y and the
// scaled columns of x come into BackwardScratch.
#pragma once

#include "pac_conv2d_backward_cpu.h"

namespace restoration::CPU_ISA {

template <typename T, typename R>
class BackwardOperands : public BackwardScratch<Operand<T>> {
 public:
  using A = AccumulateType<T>;
  using E = Operand<T>;
  using Scratch = BackwardScratch<E>;

  BackwardOperands(Carver& carver, const PacConv2dBackward& arguments, const PacConv2dSizes& sizes,
                   const StripTiles<E>& largest)
      : Scratch(carver, sizes, largest),
        sizes_(sizes),
        x_(static_cast<const T*>(arguments.x)),
        values_(static_cast<const R*>(arguments.grad_y)),
        alpha_(A(arguments.alpha)),
        plane_(sizes.out_pixels()),
        wants_weight_(arguments.grad_weight != nullptr),
        wants_bias_(arguments.grad_bias != nullptr) {}

  // Between vectors of the same row of an operand.
  int64_t column_stride() const { return Scratch::column_stride(sizes_); }
  int64_t grad_y_stride() const { return Scratch::grad_y_stride(sizes_); }
  int64_t grad_y_steps_stride() const { return Scratch::grad_y_steps_stride(sizes_); }

  void pack_grad_y(const StripTiles<E>& tiles) {
    for (int64_t row = 0; row < tiles.strip.rows; ++row) {
      const R* values = values_ + tiles.output_offset(sizes_, 0, row);
      for (int64_t channel = 0; channel < packed_rows(); channel += kSteps<E>, values += kSteps<E> * plane_) {
        for (int64_t step = 0; step < grad_y_channels(channel + kFetchedAhead); ++step) {
          prefetch(values + (kFetchedAhead + step) * plane_, tiles.strip.columns);
        }
        pack_channels(tiles, row, channel, values);
      }
    }
    // With one filter for all, no matrix is multiplied.
    if (sizes_.shared || !wants_weight_) return;
    for (int64_t block = 0; block < tiles.blocks(); ++block) {
      const int64_t offset = block * grad_y_stride();
      turn_tiles(this->grad_y + offset, packed_rows(), this->grad_y_turned + offset);
    }
  }

  // Zeros in rows of grad_y that are never packed.
  void clear_grad_y(const StripTiles<E>& largest) {
    if (packed_rows() == Scratch::output_rows(sizes_)) return;
    std::memset(static_cast<void*>(this->grad_y), 0, largest.blocks() * grad_y_stride() * sizeof(E));
    std::memset(static_cast<void*>(this->grad_y_steps), 0,
                largest.blocks() * kSteps<E> * grad_y_steps_stride() * sizeof(E));
  }

  // Scales what lies under the taps, row t·C + c: neighbouring rows are of different channels.
  void pack_columns(const StripTiles<E>& tiles, const StripScratch<E>& strip) {
    const int64_t filling = Scratch::column_rows(sizes_) - sizes_.depth();
    for (int64_t block = 0; block < tiles.blocks(); ++block) {
      E* last = this->columns + block * column_stride() + sizes_.depth() * kLanes<E>;
      std::memset(static_cast<void*>(last), 0, filling * kVectorBytes);
    }
    const T* image = x_ + tiles.strip.image * sizes_.channels * sizes_.pixels();
    for (int64_t row = 0; row < tiles.strip.rows; ++row) {
      const A* row_kernel = strip.kernel + row * tiles.places_per_row();
      for (int64_t channel = 0; channel < sizes_.channels; ++channel) {
        const T* plane = image + channel * sizes_.pixels();
        for (int64_t tap_row = 0; tap_row < sizes_.kernel_size; ++tap_row) {
          if (channel + 1 < sizes_.channels) prefetch_under(tiles, sizes_, plane + sizes_.pixels(), row, tap_row);
          for_each_tap(tiles, sizes_, plane, row, tap_row, strip.source, [&](int64_t tap, const A* values) {
            scale_row(tiles, row_kernel + tap * tiles.places(), values,
                      this->columns + row * tiles.blocks_per_row() * column_stride() +
                          (tap * sizes_.channels + channel) * kLanes<E>);
          });
        }
      }
    }
  }

 private:
  // Channels asked for before they are packed.
  static constexpr int64_t kFetchedAhead = 4;

  // Rows of grad_y that are packed: whole tiles of turn_tiles.
  int64_t packed_rows() const { return round_up(sizes_.out_channels, kLanes<E>); }

  // Of the kSteps channels from `channel` on, those that there are.
  int64_t grad_y_channels(int64_t channel) const {
    return std::clamp<int64_t>(sizes_.out_channels - channel, 0, kSteps<E>);
  }

  // A row of kSteps channels of alpha · grad_y, zero beyond its pixels and channels.
  HOST_DEVICE void pack_channels(const StripTiles<E>& tiles, int64_t row, int64_t channel, const R* values) {
    const int64_t channels = grad_y_channels(channel), plane = plane_;
    const int64_t first = row * tiles.blocks_per_row();
    const A alpha = alpha_;
    Vector<A> sums[kSteps<E>] = {};
    for (int64_t block = 0; block < tiles.blocks_per_row(); ++block) {
      Vector<A> numbers[kSteps<E>][kSteps<E>];
#pragma GCC unroll 2
      for (int step = 0; step < kSteps<E>; ++step) {
#pragma GCC unroll 2
        for (int part = 0; part < kSteps<E>; ++part) {
          const int64_t place = (block * kSteps<E> + part) * kLanes<A>;
          const int64_t count = step < channels ? std::max<int64_t>(tiles.strip.columns - place, 0) : 0;
          numbers[step][part] = alpha * load_numbers(values + step * plane + place, count);
          sums[step] += numbers[step][part];
        }
      }
      E* packed = this->grad_y + (first + block) * grad_y_stride() + channel * kLanes<E>;
#pragma GCC unroll 2
      for (int step = 0; step < kSteps<E>; ++step) store(packed + step * kLanes<E>, pack_pixels<E>(numbers[step]));
      if constexpr (kSteps<E> == 2) {
        E* steps = this->grad_y_steps + (first + block) * 2 * grad_y_steps_stride() + channel / 2 * kLanes<E>;
#pragma GCC unroll 2
        for (int part = 0; part < 2; ++part) {
          store(steps + part * grad_y_steps_stride(), pack_pairs<E>(numbers[0][part], numbers[1][part]));
        }
      }
    }
    if (!wants_bias_) return;
    for (int64_t step = 0; step < channels; ++step) this->grad_bias[channel + step] += sum_of_lanes<A>(sums[step]);
  }

  HOST_DEVICE void scale_row(const StripTiles<E>& tiles, const A* kernel, const A* values, E* column) const {
    for (int64_t place = 0; place < tiles.places_per_row(); column += column_stride()) {
      Vector<A> pixels[kSteps<E>];
      for (int part = 0; part < kSteps<E>; ++part, place += kLanes<A>) {
        pixels[part] = load(kernel + place) * load(values + place);
        // Sums over pixels are of whole vectors: nothing, not even NaN, may come from beyond the last pixel.
        if (place + kLanes<A> > tiles.strip.columns) {
          pixels[part] = keep_first<A>(pixels[part], tiles.strip.columns - place);
        }
      }
      store(column, pack_pixels<E>(pixels));
    }
  }

  const PacConv2dSizes& sizes_;
  const T* x_;
  const R* values_;
  A alpha_;
  int64_t plane_;  // of grad_y: to count its pixels takes divisions
  bool wants_weight_;
  bool wants_bias_;
};

}  // namespace restoration::CPU_ISA

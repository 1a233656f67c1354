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
        wants_weight_(arguments.grad_weight != nullptr),
        wants_bias_(arguments.grad_bias != nullptr) {}

  // Between vectors of the same row of an operand.
  int64_t column_stride() const { return Scratch::column_stride(sizes_); }
  int64_t grad_y_stride() const { return Scratch::grad_y_stride(sizes_); }
  int64_t grad_y_steps_stride() const { return Scratch::grad_y_steps_stride(sizes_); }

  void pack_grad_y(const StripTiles<E>& tiles) {
    const int64_t places = tiles.places_per_row();
    for (int64_t row = 0; row < tiles.strip.rows; ++row) {
      for (int64_t channel = 0; channel < Scratch::output_rows(sizes_); ++channel) {
        A* values = this->grad_y_row + channel % kSteps<E> * places;
        copy_grad_y(tiles, row, channel, values);
        for (int64_t block = 0; block < tiles.blocks_per_row(); ++block) {
          Vector<A> pixels[kSteps<E>];
          for (int part = 0; part < kSteps<E>; ++part) {
            pixels[part] = load(values + (block * kSteps<E> + part) * kLanes<A>);
          }
          store(this->grad_y + (row * tiles.blocks_per_row() + block) * grad_y_stride() + channel * kLanes<E>,
                pack_pixels<E>(pixels));
        }
        if constexpr (kSteps<E> == 2) {
          if (channel % 2 == 1) pack_grad_y_steps(tiles, row, channel / 2);
        }
      }
    }
    // With one filter for all, no matrix is multiplied.
    if (sizes_.shared || !wants_weight_) return;
    for (int64_t block = 0; block < tiles.blocks(); ++block) {
      const int64_t offset = block * grad_y_stride();
      turn_tiles(this->grad_y + offset, Scratch::output_rows(sizes_), this->grad_y_turned + offset);
    }
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
  // One row of one channel of alpha · grad_y, zero beyond its pixels and channels.
  void copy_grad_y(const StripTiles<E>& tiles, int64_t row, int64_t channel, A* copy) {
    const int64_t pixels = channel < sizes_.out_channels ? tiles.strip.columns : 0;
    const R* values = values_ + tiles.output_offset(sizes_, channel, row);
    const A alpha = alpha_;
    if (channel + 1 < sizes_.out_channels) prefetch(values + sizes_.out_pixels(), pixels);
    A sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t place = 0; place < pixels; ++place) {
      copy[place] = alpha * static_cast<A>(values[place]);
      sum += copy[place];
    }
    for (int64_t place = pixels; place < tiles.places_per_row(); ++place) copy[place] = 0;
    if (wants_bias_ && pixels > 0) this->grad_bias[channel] += sum;
  }

  // Two channels of a row, lane by lane.
  void pack_grad_y_steps(const StripTiles<E>& tiles, int64_t row, int64_t element) {
    const int64_t places = tiles.places_per_row(), vectors = places / kLanes<A>;
    const A* values = this->grad_y_row;
    E* packed = this->grad_y_steps + row * vectors * grad_y_steps_stride() + element * kLanes<E>;
    for (int64_t vector = 0; vector < vectors; ++vector, values += kLanes<A>, packed += grad_y_steps_stride()) {
      store(packed, pack_pairs<E>(load(values), load(values + places)));
    }
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
  bool wants_weight_;
  bool wants_bias_;
};

}  // namespace restoration::CPU_ISA

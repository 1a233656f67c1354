// What one strip adds to the gradient of the guide in backward of the pixel-adaptive convolution on the CPU, from the
// slopes m_t(p) that BackwardScratch holds: formula in pac_conv2d_backward_cpu.cpp.
#pragma once

#include <cstdlib>

#include "pac_conv2d_backward_cpu.h"

namespace restoration::CPU_ISA {

// sums [kChannels, pitch] -= f_t · (centre - value under t), summed over neighbouring taps of one row of the kernel:
// f of each begins `step` after that of the tap before, its values `gap` after.
template <int kChannels, typename A>
void subtract_differences(A* sums, int64_t pitch, const A* const* centres, const A* const* values, int64_t gap,
                          const A* factors, int64_t step, int64_t taps) {
  for (int64_t place = 0; place < pitch; place += kLanes<A>) {
    Vector<A> sum[kChannels];
#pragma GCC unroll 8
    for (int channel = 0; channel < kChannels; ++channel) sum[channel] = load(sums + channel * pitch + place);
    for (int64_t tap = 0; tap < taps; ++tap) {
      const Vector<A> factor = load(factors + tap * step + place);
#pragma GCC unroll 8
      for (int channel = 0; channel < kChannels; ++channel) {
        sum[channel] -= factor * (load(centres[channel] + place) - load(values[channel] + tap * gap + place));
      }
    }
#pragma GCC unroll 8
    for (int channel = 0; channel < kChannels; ++channel) store(sums + channel * pitch + place, sum[channel]);
  }
}

template <typename T>
class GuideGradient {
 public:
  using A = AccumulateType<T>;
  using E = Operand<T>;

  GuideGradient(const StripTiles<E>& tiles, const PacConv2dSizes& sizes, const StripScratch<E>& strip,
                const BackwardScratch<E>& own)
      : tiles_(tiles), sizes_(sizes), strip_(strip), own_(own), middle_(sizes.kernel_size / 2) {}

  void add(const T* guide, A* grad_guide) {
    const int64_t image = tiles_.strip.image * sizes_.guide_channels * sizes_.pixels();
    if (sizes_.normalize) centre_slopes();
    if (same_places(tiles_, sizes_) && StripScratch<E>::shares_source(sizes_)) {
      gather(guide + image, grad_guide + image);
    } else {
      scatter(guide + image, grad_guide + image);
    }
  }

 private:
  bool has_row(int64_t row) const { return row >= 0 && row < tiles_.strip.rows; }
  // From a row of pixels to the one under a row of taps, and from a column to the one under a tap.
  int64_t down(int64_t tap_row) const { return (tap_row - middle_) * sizes_.vertical.dilation; }
  int64_t right(int64_t tap) const { return (tap % sizes_.kernel_size - middle_) * sizes_.horizontal.dilation; }
  A* slopes(int64_t tap, int64_t row) const {
    return own_.guide_slope + tap * BackwardScratch<E>::slope_stride(tiles_) + row * tiles_.places_per_row();
  }
  // m_-t(p+t), where the strip has it. Where p+t is beyond the left or right edge of the image it is 0: what stands at
  // the other edge of a neighbouring row, as `clear_slopes_outside` leaves it, or between two taps.
  A* opposite_slopes(int64_t tap, int64_t row) const {
    return slopes(sizes_.taps() - 1 - tap, row + down(tap / sizes_.kernel_size)) + right(tap);
  }

  // k_t(p) is a share of the sum: a change of k_t changes the shares of all taps.
  void centre_slopes() {
    const int64_t count = tiles_.places_per_row();
    A* total = own_.guide_rows;
    for (int64_t row = 0; row < tiles_.strip.rows; ++row) {
      std::memset(total, 0, count * sizeof(A));
      for (int64_t tap = 0; tap < sizes_.taps(); ++tap) {
        const A* slope = slopes(tap, row);
        for (int64_t place = 0; place < count; ++place) total[place] += slope[place];
      }
      for (int64_t tap = 0; tap < sizes_.taps(); ++tap) {
        A* slope = slopes(tap, row);
        const A* kernel = strip_.kernel + tap * tiles_.places() + row * count;
        for (int64_t place = 0; place < count; ++place) slope[place] -= kernel[place] * total[place];
      }
    }
  }

  // Where places and pixels are the same: grad_g(q) -= sum over t of (m_t(q) + m_-t(q+t)) (g(q) - g(q+t)).
  void gather(const T* guide, A* grad_guide) {
    clear_slopes_outside();
    join_slopes();
    const int64_t beside = middle_ * sizes_.vertical.dilation;
    for (int64_t row = -beside; row < tiles_.strip.rows + beside; ++row) {
      const int64_t input = tiles_.strip.first_row + row;
      if (input < 0 || input >= sizes_.vertical.size) continue;
      int64_t channel = 0;
      for (; channel + kGuideBlock <= sizes_.guide_channels; channel += kGuideBlock) {
        gather_row<kGuideBlock>(guide + channel * sizes_.pixels(), row, grad_guide + channel * sizes_.pixels());
      }
      for (; channel < sizes_.guide_channels; ++channel) {
        gather_row<1>(guide + channel * sizes_.pixels(), row, grad_guide + channel * sizes_.pixels());
      }
    }
  }

  // Those of taps beyond the left and right edges, which are 0 but where k or u is NaN.
  void clear_slopes_outside() {
    for (int64_t tap = 0; tap < sizes_.taps(); ++tap) {
      const int64_t outside = std::min(std::abs(right(tap)), tiles_.strip.columns);
      const int64_t first = right(tap) < 0 ? 0 : tiles_.strip.columns - outside;
      for (int64_t row = 0; row < tiles_.strip.rows; ++row) {
        std::memset(slopes(tap, row) + first, 0, outside * sizeof(A));
      }
    }
  }

  // Of taps t and -t, the later one's m_t(p) becomes m_t(p) + m_-t(p+t), where the strip has p and p + t.
  void join_slopes() {
    for (int64_t tap = sizes_.taps() / 2 + 1; tap < sizes_.taps(); ++tap) {
      for (int64_t row = 0; row + down(tap / sizes_.kernel_size) < tiles_.strip.rows; ++row) {
        A* joined = slopes(tap, row);
        const A* opposite = opposite_slopes(tap, row);
        for (int64_t place = 0; place < tiles_.places_per_row(); place += kLanes<A>) {
          store(joined + place, load(joined + place) + load(opposite + place));
        }
      }
    }
  }

  template <int kChannels>
  void gather_row(const T* planes, int64_t row, A* grad_planes) {
    const int64_t count = tiles_.places_per_row();
    const A* centres[kChannels];
    const A* values[kChannels];
    centre_rows<kChannels>(tiles_, sizes_, planes, row, strip_, centres);
    std::memset(own_.guide_rows, 0, kChannels * count * sizeof(A));
    for (int64_t tap_row = 0; tap_row < sizes_.kernel_size; ++tap_row) {
      const bool has_own = has_row(row), has_opposite = has_row(row + down(tap_row));
      if (!has_own && !has_opposite) continue;
      rows_under<kChannels>(tiles_, sizes_, planes, row, tap_row * sizes_.kernel_size, strip_, values);
      const auto subtract = [&](int64_t first, int64_t last, bool from_own) {
        const int64_t tap = tap_row * sizes_.kernel_size + first, gap = sizes_.horizontal.dilation;
        const int64_t stride = BackwardScratch<E>::slope_stride(tiles_);
        const A* shifted[kChannels];
        for (int channel = 0; channel < kChannels; ++channel) shifted[channel] = values[channel] + first * gap;
        subtract_differences<kChannels>(own_.guide_rows, count, centres, shifted, gap,
                                        from_own ? slopes(tap, row) : opposite_slopes(tap, row),
                                        from_own ? stride : gap - stride, last - first);
      };
      // Joined slopes are those of later taps.
      if (tap_row == middle_) {
        subtract(0, middle_, false);
        subtract(middle_ + 1, sizes_.kernel_size, true);
      } else {
        subtract(0, sizes_.kernel_size, tap_row > middle_ ? has_own : !has_opposite);
      }
    }
    const InsideRange range = inside(tiles_, sizes_, row, sizes_.taps() / 2);
    for (int channel = 0; channel < kChannels; ++channel) {
      const A* sums = own_.guide_rows + channel * count;
      add_inside(range, grad_planes + channel * sizes_.pixels(), [=](int64_t place) { return sums[place]; });
    }
  }

  void scatter(const T* guide, A* grad_guide) {
    const int64_t count = tiles_.places_per_row(), middle_tap = sizes_.taps() / 2;
    for (int64_t row = 0; row < tiles_.strip.rows; ++row) {
      for (int64_t channel = 0; channel < sizes_.guide_channels; ++channel) {
        const T* plane = guide + channel * sizes_.pixels();
        A* grad_plane = grad_guide + channel * sizes_.pixels();
        const A* centre = centre_row(tiles_, sizes_, plane, row, strip_.centre);
        A* own_row = own_.guide_rows;
        std::memset(own_row, 0, count * sizeof(A));
        for (int64_t tap_row = 0; tap_row < sizes_.kernel_size; ++tap_row) {
          for_each_tap(tiles_, sizes_, plane, row, tap_row, strip_.source, [&](int64_t tap, const A* values) {
            if (tap == middle_tap) return;
            const A* slope = slopes(tap, row);
            subtract_differences<1>(own_row, count, &centre, &values, 0, slope, 0, 1);
            add_inside(inside(tiles_, sizes_, row, tap), grad_plane,
                       [=](int64_t place) { return slope[place] * (centre[place] - values[place]); });
          });
        }
        add_inside(inside(tiles_, sizes_, row, middle_tap), grad_plane,
                   [=](int64_t place) { return own_row[place]; });
      }
    }
  }

  // plane(p+t) += value(p) for the places of a row where p+t is inside the image.
  template <typename Value>
  HOST_DEVICE void add_inside(const InsideRange& range, A* plane, Value value) {
    const int64_t step = sizes_.horizontal.stride;
    A* sums = plane + range.input_row * sizes_.horizontal.size + range.first_column;
    if (step == 1) {
#pragma omp simd
      for (int64_t place = range.begin; place < range.end; ++place) sums[place] += value(place);
    } else {
      for (int64_t place = range.begin; place < range.end; ++place) sums[place * step] += value(place);
    }
  }

  const StripTiles<E>& tiles_;
  const PacConv2dSizes& sizes_;
  const StripScratch<E>& strip_;
  const BackwardScratch<E>& own_;
  int64_t middle_;
};

}  // namespace restoration::CPU_ISA

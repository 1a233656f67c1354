// Small matrix products that stay in registers, for CPU kernels that make their operands as they go.
// Pixels lie along the vectors. A tile is kTile pixels of every row of one operand; a panel is kPanelRows rows of the
// other, read from front to back.
#pragma once

#include <utility>

#include "operands_cpu.h"

// Two loops of so many sums in one function, and the compiler keeps them in memory.
#define SEPARATE __attribute__((noinline))

#include "matrix_unit_cpu.h"

namespace restoration::CPU_ISA {

HOST_DEVICE constexpr int64_t round_up(int64_t count, int64_t multiple) {
  return ceil_divide(count, multiple) * multiple;
}

// Threads take longer to wake than one takes to pack fewer numbers.
constexpr int64_t kParallelNumbers = int64_t{1} << 15;

// Elements of a panel of so many groups of steps: each group begins with an element of its own.
template <typename E>
constexpr int64_t panel_elements(int64_t groups, int64_t steps) {
  return round_up(groups * ceil_divide(steps, kSteps<E>), Blocks<E>::kPanelElements);
}

// panels [ceil(rows / kPanelRows), panel_elements · kPanelRows] of a matrix, zero beyond its rows and steps: value(row)
// is a function of group and step.
template <typename E, typename Value>
void pack_panels(E* panels, int64_t rows, int64_t groups, int64_t steps, int threads, Value value) {
  const int64_t elements = panel_elements<E>(groups, steps);
#pragma omp parallel for num_threads(threads) if (rows * groups * steps >= kParallelNumbers)
  for (int64_t first = 0; first < rows; first += kPanelRows<E>) {
    E* packed = panels + first * elements;
    std::memset(static_cast<void*>(packed), 0, elements * kPanelRows<E> * sizeof(E));
    for (int64_t row = 0; row < std::min<int64_t>(kPanelRows<E>, rows - first); ++row) {
      const auto number = value(first + row);
      int64_t element = 0;
      for (int64_t group = 0; group < groups; ++group) {
        for (int64_t step = 0; step < steps; step += kSteps<E>, ++element) {
          E& place = packed[Blocks<E>::panel_place(row, element)];
          if constexpr (kSteps<E> == 2) {
            place = {BFloat16(number(group, step)), BFloat16(step + 1 < steps ? number(group, step + 1) : 0.0f)};
          } else {
            place = number(group, step);
          }
        }
      }
    }
  }
}

template <int kVectors, typename E>
using PanelSums = Vector<AccumulateType<E>>[kPanelRows<E>][kVectors];

// sums += panel^T · tile. Vector v of element e of the tile lies at tile + e · element_stride + v · vector_stride; it
// is multiplied with factors[v] first, where factors are given.
template <int kVectors, typename E>
HOST_DEVICE void add_panel_products(const E* panel, const E* tile, int64_t elements, int64_t element_stride,
                                    int64_t vector_stride, const Vector<E>* factors,
                                    PanelSums<kVectors, E>& sums) {
  for (int64_t element = 0; element < elements; ++element, panel += kPanelRows<E>, tile += element_stride) {
    Vector<E> column[kVectors];
#pragma GCC unroll 4
    for (int vector = 0; vector < kVectors; ++vector) {
      column[vector] = load(tile + vector * vector_stride);
      if (factors != nullptr) column[vector] *= factors[vector];
    }
#pragma GCC unroll 8
    for (int row = 0; row < kPanelRows<E>; ++row) {
#pragma GCC unroll 4
      for (int vector = 0; vector < kVectors; ++vector) {
        sums[row][vector] = add_scaled(sums[row][vector], panel[row], column[vector]);
      }
    }
  }
}

// product [kPanelRows, kTile] = sums.
template <int kVectors, typename E>
HOST_DEVICE void store_sums(const PanelSums<kVectors, E>& sums, AccumulateType<E>* product) {
  using A = AccumulateType<E>;
#pragma GCC unroll 8
  for (int row = 0; row < kPanelRows<E>; ++row) {
#pragma GCC unroll 4
    for (int vector = 0; vector < kVectors; ++vector) {
      store(product + row * kTile<E> + vector * kLanes<A>, sums[row][vector]);
    }
  }
}

// product [kPanelRows, kTile] = panel^T · tile, for kVectors vectors of the tile.
template <int kVectors, typename E>
SEPARATE void panel_times_tile(const E* panel, const E* tile, int64_t elements, int64_t element_stride,
                               int64_t vector_stride, AccumulateType<E>* product) {
  PanelSums<kVectors, E> sums = {};
  add_panel_products<kVectors>(panel, tile, elements, element_stride, vector_stride, nullptr, sums);
  store_sums<kVectors, E>(sums, product);
}

// Calls call(number of vectors as a type) for a tile of which `pixels` are wanted.
template <typename E, typename Call>
HOST_DEVICE void for_tile_of(int64_t pixels, Call call) {
  constexpr int kLanes = CPU_ISA::kLanes<AccumulateType<E>>;
  if constexpr (kTile<E> > 2 * kLanes) {
    if (pixels > 2 * kLanes) return call(std::integral_constant<int, 3>());
  }
  if (pixels > kLanes) {
    call(std::integral_constant<int, 2>());
  } else {
    call(std::integral_constant<int, 1>());
  }
}

// Lane i of the result: lanes i and i^kStep summed, of a where bit kStep of i is 0, of b where it is 1.
template <int kStep, typename A, int... kLane>
HOST_DEVICE Vector<A> fold(const Vector<A>& a, const Vector<A>& b, std::integer_sequence<int, kLane...>) {
  return shuffle<A, ((kLane & kStep) != 0 ? kLanes<A> + kLane : kLane)...>(a, b) +
         shuffle<A, ((kLane & kStep) != 0 ? kLanes<A> + (kLane ^ kStep) : kLane ^ kStep)...>(a, b);
}

// vectors[0] = the sums over the lanes of vectors[0], vectors[1] ... vectors[kLanes - 1].
template <typename A, int kStep = 1>
HOST_DEVICE void sum_lanes(Vector<A>* vectors) {
  if constexpr (kStep < kLanes<A>) {
#pragma GCC unroll 8
    for (int vector = 0; vector < kLanes<A>; vector += 2 * kStep) {
      vectors[vector] =
          fold<kStep, A>(vectors[vector], vectors[vector + kStep], std::make_integer_sequence<int, kLanes<A>>());
    }
    sum_lanes<A, 2 * kStep>(vectors);
  }
}

// sums [kBlockRows, kBlockColumns], row by row, += the products of kBlockRows rows of one operand and kBlockColumns of
// another over all pixels. The rows' vectors lie one after the other, and then those of the next pixels, left_stride or
// right_stride further on.
template <typename E>
SEPARATE void add_block_products(const E* left, int64_t left_stride, const E* right, int64_t right_stride,
                                 int64_t vectors, AccumulateType<E>* sums) {
  using A = AccumulateType<E>;
  Vector<A> block[kBlockSums<E>] = {};
  for (int64_t vector = 0; vector < vectors; ++vector, left += left_stride, right += right_stride) {
    Vector<E> columns[kBlockColumns<E>];
#pragma GCC unroll 4
    for (int column = 0; column < kBlockColumns<E>; ++column) columns[column] = load(right + column * kLanes<E>);
#pragma GCC unroll 4
    for (int row = 0; row < kBlockRows<E>; ++row) {
      const Vector<E> factor = load(left + row * kLanes<E>);
#pragma GCC unroll 4
      for (int column = 0; column < kBlockColumns<E>; ++column) {
        Vector<A>& sum = block[row * kBlockColumns<E> + column];
        sum = multiply_add(sum, factor, columns[column]);
      }
    }
  }
#pragma GCC unroll 8
  for (int first = 0; first < kBlockSums<E>; first += kLanes<A>) {
    sum_lanes<A>(block + first);
    store(sums + first, load(sums + first) + block[first]);
  }
}

}  // namespace restoration::CPU_ISA

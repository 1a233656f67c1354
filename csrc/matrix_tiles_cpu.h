// Small matrix products that stay in registers, for CPU kernels that make their operands as they go.
// Pixels lie along the vectors. A tile is kTile pixels of every row of one operand; a panel is kPanelRows rows of the
// other, read from front to back.
#pragma once

#include "operands_cpu.h"

// Two loops of so many sums in one function, and the compiler keeps them in memory.
#define SEPARATE __attribute__((noinline))

#include "matrix_unit_cpu.h"

namespace restoration::CPU_ISA {

// Elements of a panel of so many groups of steps: each group begins with an element of its own.
template <typename E>
constexpr int64_t panel_elements(int64_t groups, int64_t steps) {
  return round_up(groups * ceil_divide(steps, kSteps<E>), Blocks<E>::kPanelElements);
}

// panels [ceil(rows / kPanelRows), panel_elements · kPanelRows] of a matrix, zero beyond its rows and steps. start(row)
// points to the first number of a row; its groups lie group_stride apart, and the steps of one step_stride.
template <typename E, typename Start>
void pack_panels(E* panels, int64_t rows, int64_t groups, int64_t steps, int64_t group_stride, int64_t step_stride,
                 int threads, Start start) {
  const int64_t elements = panel_elements<E>(groups, steps);
#pragma omp parallel for num_threads(threads) if (rows * groups * steps >= kParallelElements)
  for (int64_t first = 0; first < rows; first += kPanelRows<E>) {
    E* packed = panels + first * elements;
    std::memset(static_cast<void*>(packed), 0, elements * kPanelRows<E> * sizeof(E));
    for (int64_t row = 0; row < std::min<int64_t>(kPanelRows<E>, rows - first); ++row) {
      const auto* numbers = start(first + row);
      int64_t element = 0;
      for (int64_t group = 0; group < groups; ++group, numbers += group_stride) {
        for (int64_t step = 0; step < steps; step += kSteps<E>, ++element) {
          E& place = packed[Blocks<E>::panel_place(row, element)];
          if constexpr (kSteps<E> == 2) {
            // Copied as they are: to round them once more would take longer than all else here.
            place.first = numbers[step * step_stride];
            if (step + 1 < steps) place.second = numbers[(step + 1) * step_stride];
          } else {
            place = static_cast<E>(numbers[step * step_stride]);
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

// turned = tiles with rows and elements exchanged in each tile of kLanes rows, of which there are `rows` in all.
template <typename E>
void turn_tiles(const E* tiles, int64_t rows, E* turned) {
  constexpr int64_t kElements = int64_t{kLanes<E>} * kLanes<E>;
  for (int64_t first = 0; first < rows; first += kLanes<E>, tiles += kElements, turned += kElements) {
    Vector<E> vectors[kLanes<E>];
#pragma GCC unroll 16
    for (int row = 0; row < kLanes<E>; ++row) vectors[row] = load(tiles + row * kLanes<E>);
    transpose<E>(vectors);
#pragma GCC unroll 16
    for (int row = 0; row < kLanes<E>; ++row) store(turned + row * kLanes<E>, vectors[row]);
  }
}

// sums, kBlocks blocks one after the other, += the products of kBlocks · kBlockRows rows of one operand, turned by
// turn_tiles, and kBlockColumns of another over all pixels. The rows' vectors lie one after the other, and then those
// of the next pixels, left_stride or right_stride further on.
template <int kBlocks, typename E>
SEPARATE void add_block_products(const E* left, int64_t left_stride, const E* right, int64_t right_stride,
                                 int64_t vectors, AccumulateType<E>* sums) {
  using A = AccumulateType<E>;
  // From zero: a sum of sums is rounded less than one sum over all strips.
  Vector<A> block[kBlockColumns<E>][kBlocks] = {};
  for (int64_t vector = 0; vector < vectors; ++vector, left += left_stride, right += right_stride) {
    for (int element = 0; element < kLanes<E>; ++element) {
      Vector<E> rows[kBlocks];
#pragma GCC unroll 2
      for (int number = 0; number < kBlocks; ++number) {
        rows[number] = load(left + (number * kLanes<E> + element) * kLanes<E>);
      }
#pragma GCC unroll 12
      for (int column = 0; column < kBlockColumns<E>; ++column) {
        const E factor = right[column * kLanes<E> + element];
#pragma GCC unroll 2
        for (int number = 0; number < kBlocks; ++number) {
          block[column][number] = add_scaled(block[column][number], factor, rows[number]);
        }
      }
    }
  }
#pragma GCC unroll 12
  for (int column = 0; column < kBlockColumns<E>; ++column) {
#pragma GCC unroll 2
    for (int number = 0; number < kBlocks; ++number) {
      A* place = sums + number * kBlockSums<E> + column * kBlockRows<E>;
      store(place, load(place) + block[column][number]);
    }
  }
}

// The same for all rows of the left operand, a multiple of kBlockRows.
template <typename E>
void add_column_products(const E* left, int64_t left_stride, int64_t rows, const E* right, int64_t right_stride,
                         int64_t vectors, AccumulateType<E>* sums) {
  constexpr int64_t kRows = kBlockRows<E>;
  int64_t row = 0;
  for (; row + 2 * kRows <= rows; row += 2 * kRows, sums += 2 * kBlockSums<E>) {
    add_block_products<2>(left + row * kLanes<E>, left_stride, right, right_stride, vectors, sums);
  }
  if (row < rows) add_block_products<1>(left + row * kLanes<E>, left_stride, right, right_stride, vectors, sums);
}

}  // namespace restoration::CPU_ISA

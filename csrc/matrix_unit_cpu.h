// Products of bfloat16 matrices on the matrix unit of the processor (AMX): C [16, 16] += A · B, where A is 16 rows of
// 16 pairs, B 16 rows of 16 pairs, each pair two steps of the sum, and C is in float32; denormal numbers count as zero.
// Two tiles of A and two of B make four of C, which are the eight that the unit has.
#pragma once

#include "operands_cpu.h"

#if defined(__AMX_BF16__)

namespace restoration::CPU_ISA {

// Rows of a tile, and elements of a row.
constexpr int kUnitRows = 16;
constexpr int kUnitTile = kUnitRows * kUnitRows;
// Of a row, of elements that are pairs as of sums.
constexpr int64_t kUnitRowBytes = kUnitRows * sizeof(float);

template <>
struct Blocks<BFloat16Pair> {
  static constexpr int kPanelRows = 2 * kUnitRows;
  static constexpr int kPanelElements = kUnitRows;
  static constexpr int kTile = 2 * kUnitRows;
  static constexpr int kRows = 2 * kUnitRows;
  static constexpr int kColumns = 2 * kUnitRows;

  // Tiles of 16 rows and 16 elements: the upper one, the lower one, and then those of the next elements.
  HOST_DEVICE static int64_t panel_place(int64_t row, int64_t element) {
    return (element / kUnitRows * 2 + row / kUnitRows) * kUnitTile + row % kUnitRows * kUnitRows + element % kUnitRows;
  }
  // Tiles of 16 columns of one operand and 16 rows of the other: columns are what lies one below the other in them.
  HOST_DEVICE static int64_t sum_place(int64_t row, int64_t column) {
    return (column / kUnitRows * 2 + row / kUnitRows) * kUnitTile + column % kUnitRows * kUnitRows + row % kUnitRows;
  }
};

// While it lives, its thread may multiply on the matrix unit.
template <>
class MatrixUnit<BFloat16Pair> {
 public:
  MatrixUnit() {
    struct {
      uint8_t palette = 1;
      uint8_t start_row = 0;
      uint8_t reserved[14] = {};
      uint16_t row_bytes[16] = {};
      uint8_t rows[16] = {};
    } shapes;
    for (int tile = 0; tile < 8; ++tile) {
      shapes.row_bytes[tile] = kUnitRowBytes;
      shapes.rows[tile] = kUnitRows;
    }
    _tile_loadconfig(&shapes);
  }
  ~MatrixUnit() { _tile_release(); }
  MatrixUnit(const MatrixUnit&) = delete;
  MatrixUnit& operator=(const MatrixUnit&) = delete;
};

// product [32, 32] = panel · tile, for kVectors vectors of the tile. Both hold zeros beyond their elements, up to a
// multiple of 16.
template <int kVectors>
SEPARATE void panel_times_tile(const BFloat16Pair* panel, const BFloat16Pair* tile, int64_t elements,
                               int64_t element_stride, int64_t vector_stride, float* product) {
  constexpr int64_t kProductRow = Blocks<BFloat16Pair>::kTile;
  const int64_t row_bytes = element_stride * int64_t{sizeof(BFloat16Pair)};
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t element = 0; element < elements; element += kUnitRows) {
    _tile_loadd(4, panel, kUnitRowBytes);
    _tile_loadd(5, panel + kUnitTile, kUnitRowBytes);
    _tile_loadd(6, tile, row_bytes);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 5, 6);
    if constexpr (kVectors > 1) {
      _tile_loadd(7, tile + vector_stride, row_bytes);
      _tile_dpbf16ps(2, 4, 7);
      _tile_dpbf16ps(3, 5, 7);
    }
    panel += 2 * kUnitTile;
    tile += kUnitRows * element_stride;
  }
  _tile_stored(0, product, kProductRow * sizeof(float));
  _tile_stored(1, product + kUnitRows * kProductRow, kProductRow * sizeof(float));
  if constexpr (kVectors > 1) {
    _tile_stored(2, product + kUnitRows, kProductRow * sizeof(float));
    _tile_stored(3, product + kUnitRows * kProductRow + kUnitRows, kProductRow * sizeof(float));
  }
}

// sums, at the places of Blocks, += the products of 32 rows of one operand, turned by turn_tiles,
// and 32 of another over all pixels.
SEPARATE inline void add_block_products(const BFloat16Pair* left, int64_t left_stride, const BFloat16Pair* right,
                                        int64_t right_stride, int64_t vectors, float* sums) {
  _tile_loadd(0, sums, kUnitRowBytes);
  _tile_loadd(1, sums + kUnitTile, kUnitRowBytes);
  _tile_loadd(2, sums + 2 * kUnitTile, kUnitRowBytes);
  _tile_loadd(3, sums + 3 * kUnitTile, kUnitRowBytes);
  for (int64_t vector = 0; vector < vectors; ++vector, left += left_stride, right += right_stride) {
    _tile_loadd(4, right, kUnitRowBytes);
    _tile_loadd(5, right + kUnitTile, kUnitRowBytes);
    _tile_loadd(6, left, kUnitRowBytes);
    _tile_loadd(7, left + kUnitTile, kUnitRowBytes);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, sums, kUnitRowBytes);
  _tile_stored(1, sums + kUnitTile, kUnitRowBytes);
  _tile_stored(2, sums + 2 * kUnitTile, kUnitRowBytes);
  _tile_stored(3, sums + 3 * kUnitTile, kUnitRowBytes);
}

// The same for all rows of the left operand, as matrix_tiles_cpu.h has it for vectors.
inline void add_column_products(const BFloat16Pair* left, int64_t left_stride, int64_t rows, const BFloat16Pair* right,
                                int64_t right_stride, int64_t vectors, float* sums) {
  for (int64_t row = 0; row < rows; row += Blocks<BFloat16Pair>::kRows, sums += 4 * kUnitTile) {
    add_block_products(left + row * kUnitRows, left_stride, right, right_stride, vectors, sums);
  }
}

}  // namespace restoration::CPU_ISA

#endif

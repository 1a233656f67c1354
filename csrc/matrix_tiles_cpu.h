// Small matrix products that stay in registers, for CPU kernels that make their operands as they go.
// Pixels lie along the vectors. A tile is [depth, kTile] numbers: kTile pixels of every row of one operand; a panel is
// [depth, kPanelRows] numbers of the other, so that both are read from front to back.
#pragma once

#include <type_traits>
#include <utility>

#include "common_cpu.h"

namespace restoration::CPU_ISA {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
constexpr int kPanelRows = 8;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
constexpr int kPanelRows = 4;
#elif defined(__aarch64__)
constexpr int kVectorBytes = 16;
constexpr int kPanelRows = 8;
#else
constexpr int kVectorBytes = 16;
constexpr int kPanelRows = 4;
#endif

// kPanelRows x kTileVectors sums, kTileVectors vectors of a tile and one number of the panel fill the 32 registers of
// AVX-512 and NEON (8 x 3) and the 16 of AVX2 and SSE2 (4 x 3).
constexpr int kTileVectors = 3;

template <typename A>
using Integer = std::conditional_t<sizeof(A) == 4, int32_t, int64_t>;
template <typename A>
constexpr int kLanes = kVectorBytes / sizeof(A);
template <typename A>
constexpr int kTile = kTileVectors * kLanes<A>;

template <typename A>
struct VectorOf {
  typedef A Type __attribute__((vector_size(kVectorBytes)));
};
template <typename A>
using Vector = typename VectorOf<A>::Type;

// std::memcpy, as the address need not be that of a whole vector.
template <typename A>
HOST_DEVICE Vector<A> load(const A* source) {
  Vector<A> vector;
  std::memcpy(&vector, source, sizeof(vector));
  return vector;
}

template <typename A>
HOST_DEVICE void store(A* destination, Vector<A> vector) {
  std::memcpy(destination, &vector, sizeof(vector));
}

HOST_DEVICE constexpr int64_t round_up(int64_t count, int64_t multiple) {
  return ceil_divide(count, multiple) * multiple;
}

// panels [ceil(rows / kPanelRows), depth, kPanelRows] of the matrix value(row, depth), zero below its last row.
template <typename A, typename Value>
void pack_panels(A* panels, int64_t rows, int64_t depth, Value value) {
  for (int64_t first = 0; first < rows; first += kPanelRows) {
    for (int64_t step = 0; step < depth; ++step) {
      for (int64_t row = first; row < first + kPanelRows; ++row) {
        *panels++ = row < rows ? A(value(row, step)) : A(0);
      }
    }
  }
}

template <int kVectors, typename A>
HOST_DEVICE void panel_times_vectors(const A* panel, const A* tile, int64_t depth, A* product) {
  Vector<A> sums[kPanelRows][kVectors] = {};
  for (int64_t step = 0; step < depth; ++step, panel += kPanelRows, tile += kTile<A>) {
    Vector<A> column[kVectors];
#pragma GCC unroll 4
    for (int vector = 0; vector < kVectors; ++vector) column[vector] = load(tile + vector * kLanes<A>);
#pragma GCC unroll 8
    for (int row = 0; row < kPanelRows; ++row) {
#pragma GCC unroll 4
      for (int vector = 0; vector < kVectors; ++vector) sums[row][vector] += panel[row] * column[vector];
    }
  }
#pragma GCC unroll 8
  for (int row = 0; row < kPanelRows; ++row) {
#pragma GCC unroll 4
    for (int vector = 0; vector < kVectors; ++vector) {
      store(product + row * kTile<A> + vector * kLanes<A>, sums[row][vector]);
    }
  }
}

// product [kPanelRows, kTile] = panel^T · tile, of which the first `pixels` of each row are wanted.
template <typename A>
HOST_DEVICE void panel_times_tile(const A* panel, const A* tile, int64_t depth, int64_t pixels, A* product) {
  if (pixels > 2 * kLanes<A>) {
    panel_times_vectors<3>(panel, tile, depth, product);
  } else if (pixels > kLanes<A>) {
    panel_times_vectors<2>(panel, tile, depth, product);
  } else {
    panel_times_vectors<1>(panel, tile, depth, product);
  }
}

// Rows of the two operands in one block of sums over pixels; sums and operands fill two thirds of the registers.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kBlockRows = 4;
#else
constexpr int kBlockRows = 2;
#endif
constexpr int kBlockColumns = 4;
// A multiple of the lanes of every vector, as sum_lanes wants it.
constexpr int kBlockSums = kBlockRows * kBlockColumns;

// Lane i of the result: lanes i and i^kStep summed, of a where bit kStep of i is 0, of b where it is 1.
template <int kStep, typename A, int... kLane>
HOST_DEVICE Vector<A> fold(const Vector<A>& a, const Vector<A>& b, std::integer_sequence<int, kLane...>) {
#define KEPT ((kLane & kStep) != 0 ? kLanes<A> + kLane : kLane)
#define MOVED ((kLane & kStep) != 0 ? kLanes<A> + (kLane ^ kStep) : kLane ^ kStep)
#if defined(__clang__) || __GNUC__ >= 12
  return __builtin_shufflevector(a, b, KEPT...) + __builtin_shufflevector(a, b, MOVED...);
#else
  typedef Integer<A> Lane;
  typedef Lane Order __attribute__((vector_size(kVectorBytes)));
  return __builtin_shuffle(a, b, Order{KEPT...}) + __builtin_shuffle(a, b, Order{MOVED...});
#endif
#undef KEPT
#undef MOVED
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

// Tiles that lie one after the other: those of each image row end with one of fewer vectors.
struct TileRows {
  int64_t rows;
  int64_t tiles;         // a row
  int64_t last_vectors;  // of the last tile of each row, 1 to kTileVectors
};

// sums [kBlockRows, kBlockColumns], row by row, += the products of kBlockRows rows of one operand and kBlockColumns of
// another over all pixels. Consecutive tiles of an operand lie left_stride or right_stride apart.
template <typename A>
HOST_DEVICE void add_block_products(const A* left, int64_t left_stride, const A* right, int64_t right_stride,
                                    const TileRows& tiles, A* sums) {
  Vector<A> block[kBlockSums] = {};
  for (int64_t row = 0; row < tiles.rows; ++row) {
    for (int64_t tile = 0; tile < tiles.tiles; ++tile, left += left_stride, right += right_stride) {
      const int64_t vectors = tile + 1 < tiles.tiles ? kTileVectors : tiles.last_vectors;
      for (int64_t offset = 0; offset < vectors * kLanes<A>; offset += kLanes<A>) {
        Vector<A> columns[kBlockColumns];
#pragma GCC unroll 4
        for (int column = 0; column < kBlockColumns; ++column)
          columns[column] = load(right + column * kTile<A> + offset);
#pragma GCC unroll 4
        for (int row = 0; row < kBlockRows; ++row) {
          const Vector<A> factor = load(left + row * kTile<A> + offset);
#pragma GCC unroll 4
          for (int column = 0; column < kBlockColumns; ++column) {
            block[row * kBlockColumns + column] += factor * columns[column];
          }
        }
      }
    }
  }
#pragma GCC unroll 8
  for (int first = 0; first < kBlockSums; first += kLanes<A>) {
    sum_lanes<A>(block + first);
    store(sums + first, load(sums + first) + block[first]);
  }
}

// e^x of lanes that are at most 0 or NaN, off by less than 2 units in the last place; exactly 0 where that is nearest.
template <typename A>
HOST_DEVICE Vector<A> exp_nonpositive(Vector<A> x) {
  constexpr bool kSingle = sizeof(A) == 4;
  constexpr int kMantissaBits = kSingle ? 23 : 52;
  // Below, e^x is less than half of the smallest denormal number.
  constexpr A kLowest = kSingle ? A(-104) : A(-746);
  const Vector<A> lowest = Vector<A>{} + kLowest;
  x = x < lowest ? lowest : x;
  // Adding 1.5 · 2^kMantissaBits leaves the nearest integer in the lowest bits.
  constexpr A kRounder = A(int64_t{3} << (kMantissaBits - 1));
  const Vector<A> shifted = x * A(1.4426950408889634) + kRounder;
  const Vector<A> power = shifted - kRounder;
  // ln 2 in two parts, of which the first has so few bits that its product with power, up to 11 bits long, is exact.
  constexpr A kLog2High = kSingle ? A(0.693359375) : A(0x1.62e42feep-1);
  constexpr A kLog2Low = kSingle ? A(-2.12194440054690583e-4) : A(0x1.a39ef35793c76p-33);
  const Vector<A> rest = (x - power * kLog2High) - power * kLog2Low;
  // Taylor's series on |rest| <= ln(2)/2: the first term left out is a tenth of a unit in the last place.
  constexpr int kDegree = kSingle ? 7 : 13;
  Vector<A> series = Vector<A>{} + A(1);
#pragma GCC unroll 16
  for (int degree = kDegree; degree > 0; --degree) series = series * rest * (A(1) / A(degree)) + A(1);
  // Two factors, as 2^power may be a denormal number or less.
  typedef Integer<A> Lanes __attribute__((vector_size(kVectorBytes)));
  constexpr int kBias = kSingle ? 127 : 1023;
  Lanes bits;
  std::memcpy(&bits, &shifted, sizeof(bits));
  Integer<A> rounder_bits;
  std::memcpy(&rounder_bits, &kRounder, sizeof(rounder_bits));
  const Lanes exponent = bits - rounder_bits;
  const Lanes half = exponent >> 1;
  const Lanes first_bits = (half + kBias) << kMantissaBits;
  const Lanes second_bits = (exponent - half + kBias) << kMantissaBits;
  Vector<A> first, second;
  std::memcpy(&first, &first_bits, sizeof(first));
  std::memcpy(&second, &second_bits, sizeof(second));
  return series * first * second;
}

}  // namespace restoration::CPU_ISA

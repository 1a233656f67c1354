// Barriers and warp operations. Each lane offers a number, waits for the lanes that its mask names, then reads
// another's.
#pragma once

#include "fibers.h"

namespace simt {

inline int lane() { return block().current->linear % kWarpSize; }

inline void meet(const char* operation, unsigned mask, uint64_t offered) {
  const Runner runner;
  Fiber& fiber = *block().current;
  fiber.operation = operation;
  fiber.mask = mask;
  fiber.offered = offered;
  wait_for(Wait::warp);
}

// The number that lane `source` offered; all bits set, a NaN, where the hardware would give anything.
inline uint64_t received(unsigned mask, int source) {
  return mask >> source & 1 ? block().exchanged[block().current->linear - lane() + source] : ~uint64_t{0};
}

template <typename T>
T shuffle(const char* operation, unsigned mask, T value, int source) {
  static_assert(sizeof(T) <= sizeof(uint64_t), "a shuffle moves at most 8 bytes");
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  meet(operation, mask, bits);
  bits = received(mask, source);
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

}  // namespace simt

inline void __syncthreads() { simt::wait_for(simt::Wait::block); }

inline void __syncwarp(unsigned mask = 0xffffffff) { simt::meet(simt::kWarpBarrier, mask, 0); }

inline unsigned __ballot_sync(unsigned mask, int predicate) {
  simt::meet("__ballot_sync", mask, predicate != 0);
  unsigned votes = 0;
  for (int lane = 0; lane < simt::kWarpSize; ++lane) {
    if (mask >> lane & 1 && simt::received(mask, lane) != 0) votes |= 1u << lane;
  }
  return votes;
}

// A lane that asks beyond the ends of its group of `width` lanes gets its own value back.
template <typename T>
T __shfl_sync(unsigned mask, T value, int source, int width = simt::kWarpSize) {
  return simt::shuffle("__shfl_sync", mask, value, (simt::lane() & ~(width - 1)) | (source & (width - 1)));
}

template <typename T>
T __shfl_up_sync(unsigned mask, T value, int distance, int width = simt::kWarpSize) {
  const int lane = simt::lane();
  return simt::shuffle("__shfl_up_sync", mask, value, (lane & (width - 1)) >= distance ? lane - distance : lane);
}

template <typename T>
T __shfl_down_sync(unsigned mask, T value, int distance, int width = simt::kWarpSize) {
  const int lane = simt::lane();
  return simt::shuffle("__shfl_down_sync", mask, value,
                       (lane & (width - 1)) + distance < width ? lane + distance : lane);
}

template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int difference, int width = simt::kWarpSize) {
  const int lane = simt::lane();
  const int source = lane ^ difference;
  return simt::shuffle("__shfl_xor_sync", mask, value,
                       (source & ~(width - 1)) <= (lane & ~(width - 1)) ? source : lane);
}

// What csrc/async_copy.cuh writes in PTX. The destination holds NaN until its thread waits for the group of the copy:
// the latest that the hardware may write it.
#pragma once

#include "fibers.h"

namespace restoration {

template <int kBytes>
void copy_async(void* shared, const void* global, bool inside) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16, "the sizes that cp.async takes");
  const simt::Runner runner;
  simt::Fiber& fiber = *simt::block().current;
  const auto is_aligned = [](const void* address) { return reinterpret_cast<uintptr_t>(address) % kBytes == 0; };
  if (!is_aligned(shared) || !is_aligned(global)) simt::fail("copy_async of a misaligned address", fiber);
  SIMT_RACES(start_copy(shared, inside ? global : nullptr, kBytes));
  simt::poison(shared, kBytes);
  fiber.copies.push_back({shared, inside ? global : nullptr, kBytes, fiber.copy_groups});
}

inline void commit_copies() {
  const simt::Runner runner;
  ++simt::block().current->copy_groups;
}

template <int kNewestGroups>
void wait_for_copies() {
  const simt::Runner runner;
  simt::Fiber& fiber = *simt::block().current;
  const auto arrives = [&](const simt::Copy& copy) { return copy.group + kNewestGroups < fiber.copy_groups; };
  for (const simt::Copy& copy : fiber.copies) {
    if (!arrives(copy)) continue;
    SIMT_RACES(finish_copy(copy.destination, copy.bytes));
    if (copy.source == nullptr) {
      std::memset(copy.destination, 0, copy.bytes);
    } else {
      std::memcpy(copy.destination, copy.source, copy.bytes);
    }
  }
  fiber.copies.erase(std::remove_if(fiber.copies.begin(), fiber.copies.end(), arrives), fiber.copies.end());
}

}  // namespace restoration

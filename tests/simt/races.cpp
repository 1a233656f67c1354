// Finds races of the kernels that run in fibers: g++ calls __tsan_* at each access to memory, and here is what they do
// instead of the thread sanitizer, which knows neither blocks nor warps. Compiled without instrumentation itself.
//
// Of every two bytes is kept who wrote them last and who has read them since. Blocks run one after the other, so of
// earlier blocks of a launch it is enough to know that they were there: nothing orders blocks. Within a block
// __syncthreads orders all threads, __syncwarp the lanes that it names.
#include "races.h"

#include <algorithm>
#include <array>
#include <cstdint>
#include <memory>
#include <unordered_map>
#include <utility>
#include <vector>

namespace {

constexpr int kWarpSize = 32;
constexpr int kCellBytes = 2;  // of the smallest number that kernels touch
constexpr int kPageCells = 2048;
constexpr int kNobody = -1;

// A moment in a thread of a block: how many barriers and warp barriers it has passed.
struct Moment {
  int64_t block = kNobody;
  int thread = kNobody;
  int barriers = 0;
  int warp_barriers = 0;
};

struct Cell {
  Moment written;
  bool atomically = false;
  int copying_thread = kNobody;  // whose asynchronous copy is on its way
  std::vector<Moment> read;      // since `written`, by threads of one block
  bool read_by_earlier_block = false;
};

using Page = std::array<Cell, kPageCells>;

struct Thread {
  int warp_barriers = 0;
  std::array<int, kWarpSize> seen = {};  // of each lane of the warp, up to which of its warp barriers
};

struct State {
  std::unordered_map<uintptr_t, std::unique_ptr<Page>> pages;
  Page* latest_page = nullptr;
  uintptr_t latest_number = 0;
  std::vector<Thread> threads;
  int64_t block = kNobody;
  int barriers = 0;
  int thread = kNobody;
  bool watching = false;
  uintptr_t stack = 0, stack_end = 0;
  std::string found;
};

State state;

Cell& cell_at(uintptr_t number) {
  const uintptr_t page_number = number / kPageCells;
  if (page_number != state.latest_number || state.latest_page == nullptr) {
    auto& page = state.pages[page_number];
    if (page == nullptr) page = std::make_unique<Page>();
    state.latest_page = page.get();
    state.latest_number = page_number;
  }
  return (*state.latest_page)[number % kPageCells];
}

bool is_before_now(const Moment& moment) {
  if (moment.block != state.block) return moment.block == kNobody;
  if (moment.thread == state.thread || moment.barriers < state.barriers) return true;
  const bool same_warp = moment.thread / kWarpSize == state.thread / kWarpSize;
  return same_warp && state.threads[state.thread].seen[moment.thread % kWarpSize] > moment.warp_barriers;
}

bool is_now(const Moment& moment) {
  return moment.thread == state.thread && moment.block == state.block && moment.barriers == state.barriers &&
         moment.warp_barriers == state.threads[state.thread].warp_barriers;
}

Moment now() { return {state.block, state.thread, state.barriers, state.threads[state.thread].warp_barriers}; }

void report(const char* access, const Moment& other, const char* other_access) {
  if (!state.found.empty()) return;
  const std::string whose = other.block == state.block ? "thread " + std::to_string(other.thread) : "another block";
  state.found = "thread " + std::to_string(state.thread) + " " + access + " what " + whose + " " + other_access;
}

template <typename Use>
void for_each_cell(const void* address, size_t bytes, Use use) {
  const auto first = reinterpret_cast<uintptr_t>(address);
  for (uintptr_t number = first / kCellBytes; number * kCellBytes < first + bytes; ++number) use(cell_at(number));
}

void check_written(const Cell& cell, const char* access, bool atomically = false) {
  if (cell.copying_thread != kNobody) {
    report(access, {state.block, cell.copying_thread}, "copies asynchronously and has not waited for");
  }
  if (is_before_now(cell.written) || (atomically && cell.atomically)) return;
  report(access, cell.written, cell.atomically ? "has changed atomically" : "has written");
}

void read(const void* address, size_t bytes) {
  for_each_cell(address, bytes, [](Cell& cell) {
    auto& read = cell.read;
    if (!read.empty() && is_now(read.back())) return;
    check_written(cell, "reads");
    if (!read.empty() && read[0].block != state.block) {
      cell.read_by_earlier_block = true;
      read.clear();
    }
    if (!read.empty() && read[0].barriers != state.barriers) read.clear();
    if (!read.empty() && read.back().thread == state.thread) read.pop_back();
    read.push_back(now());
  });
}

void write(const void* address, size_t bytes, bool atomically = false) {
  for_each_cell(address, bytes, [atomically](Cell& cell) {
    const char* const access = atomically ? "changes atomically" : "writes";
    check_written(cell, access, atomically);
    if (cell.read_by_earlier_block) report(access, {}, "has read");
    for (const Moment& moment : cell.read) {
      if (!is_before_now(moment)) report(access, moment, "has read");
    }
    cell.read.clear();
    cell.written = now();
    cell.atomically = atomically;
  });
}

bool is_watched(const void* address) {
  const auto place = reinterpret_cast<uintptr_t>(address);
  return state.watching && (place < state.stack || place >= state.stack_end);
}

}  // namespace

namespace simt::races {

void begin_launch() {
  state.pages.clear();
  state.latest_page = nullptr;
  state.block = kNobody;
}

void begin_block(int threads) {
  ++state.block;
  state.barriers = 0;
  state.threads.assign(threads, Thread());
}

void forget(const void* memory, size_t bytes) {
  for_each_cell(memory, bytes, [](Cell& cell) { cell = Cell(); });
}

void watch(int thread, const void* stack, size_t stack_bytes) {
  state.thread = thread;
  state.watching = true;
  state.stack = reinterpret_cast<uintptr_t>(stack);
  state.stack_end = state.stack + stack_bytes;
}

void pause() { state.watching = false; }

void synchronize_block() { ++state.barriers; }

void synchronize_warp(int first, unsigned lanes) {
  for (unsigned left = lanes; left != 0; left &= left - 1) {
    const int lane = __builtin_ctz(left);
    Thread& thread = state.threads[first + lane];
    thread.seen[lane] = ++thread.warp_barriers;
  }
  // What a lane has seen of others, and others of it, all of them have seen now.
  std::array<int, kWarpSize> seen = {};
  for (unsigned left = lanes; left != 0; left &= left - 1) {
    const auto& own = state.threads[first + __builtin_ctz(left)].seen;
    for (int lane = 0; lane < kWarpSize; ++lane) seen[lane] = std::max(seen[lane], own[lane]);
  }
  for (unsigned left = lanes; left != 0; left &= left - 1) state.threads[first + __builtin_ctz(left)].seen = seen;
}

void write_atomically(const void* address, size_t bytes) { write(address, bytes, true); }

void start_copy(const void* destination, const void* source, size_t bytes) {
  if (source != nullptr) read(source, bytes);
  write(destination, bytes);
  for_each_cell(destination, bytes, [](Cell& cell) { cell.copying_thread = state.thread; });
}

void finish_copy(const void* destination, size_t bytes) {
  for_each_cell(destination, bytes, [](Cell& cell) { cell.copying_thread = kNobody; });
  write(destination, bytes);
}

std::string take_found() { return std::exchange(state.found, {}); }

}  // namespace simt::races

extern "C" {

void __tsan_read_range(void* address, size_t bytes) {
  if (is_watched(address)) read(address, bytes);
}
void __tsan_write_range(void* address, size_t bytes) {
  if (is_watched(address)) write(address, bytes);
}

#define DEFINE_ACCESSES(bytes)                                                                      \
  void __tsan_read##bytes(void* address) { __tsan_read_range(address, bytes); }                     \
  void __tsan_write##bytes(void* address) { __tsan_write_range(address, bytes); }                   \
  void __tsan_unaligned_read##bytes(void* address) { __tsan_read_range(address, bytes); }           \
  void __tsan_unaligned_write##bytes(void* address) { __tsan_write_range(address, bytes); }

DEFINE_ACCESSES(1)
DEFINE_ACCESSES(2)
DEFINE_ACCESSES(4)
DEFINE_ACCESSES(8)
DEFINE_ACCESSES(16)

// Called, too, but of nothing that kernels do.
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}
uint8_t __tsan_atomic8_load(const volatile uint8_t* address, int) { return __atomic_load_n(address, __ATOMIC_ACQUIRE); }

}  // extern "C"

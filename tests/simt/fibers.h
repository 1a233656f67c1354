// The threads of one block as fibers, and the scheduler that switches between them at barriers and warp operations.
#pragma once

#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "races.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

namespace simt {

constexpr int kWarpSize = 32;
constexpr const char* kWarpBarrier = "__syncwarp";  // the warp operation that orders memory

// What a fiber waits for.
enum class Wait { nothing, warp, block, finished };

struct FreeDeleter {
  void operator()(void* memory) const { std::free(memory); }
};
using SharedMemory = std::unique_ptr<void, FreeDeleter>;

// All bits set are a NaN in every floating-point format, and -1 in integers.
inline void poison(void* memory, size_t bytes) { std::memset(memory, 0xff, bytes); }

// Shared memory as a block finds it.
inline void renew(void* memory, size_t bytes) {
  poison(memory, bytes);
  SIMT_RACES(forget(memory, bytes));
}

inline SharedMemory allocate_shared(size_t bytes) {
  void* memory = nullptr;
  if (posix_memalign(&memory, 16, bytes == 0 ? 1 : bytes) != 0) throw std::bad_alloc();
  renew(memory, bytes);
  return SharedMemory(memory);
}

// A stack with a page below it that cannot be touched, so that an overflow stops the program instead of corrupting it.
class Stack {
 public:
#if defined(__SANITIZE_ADDRESS__)
  static constexpr size_t kBytes = 256 << 10;  // the sanitizer surrounds every local variable
#else
  static constexpr size_t kBytes = 64 << 10;
#endif
  static constexpr size_t kGuardBytes = 4 << 10;

  Stack()
      : memory_(static_cast<char*>(mmap(nullptr, kBytes + kGuardBytes, PROT_READ | PROT_WRITE,
                                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0))) {
    if (memory_ == MAP_FAILED) throw std::bad_alloc();
    mprotect(memory_, kGuardBytes, PROT_NONE);
  }
  ~Stack() {
#if defined(__SANITIZE_ADDRESS__)
    // A kernel that failed left its variables' surroundings forbidden, and the next stack may get the same addresses.
    __asan_unpoison_memory_region(bottom(), kBytes);
#endif
    munmap(memory_, kBytes + kGuardBytes);
  }
  Stack(const Stack&) = delete;
  Stack& operator=(const Stack&) = delete;

  char* bottom() const { return memory_ + kGuardBytes; }

 private:
  char* memory_;
};

// An asynchronous copy that has not arrived; from nowhere, it brings zeros.
struct Copy {
  void* destination;
  const void* source;
  size_t bytes;
  int group;
};

struct Fiber {
  Stack stack;
  jmp_buf resume_point;
  bool started = false;
  uint3 thread;
  int linear;
  Wait wait;
  const char* operation;  // of a warp wait, to tell a shuffle from a barrier
  unsigned mask;          // lanes that must reach it
  uint64_t offered;       // what this lane gives to the others
  std::vector<Copy> copies;
  int copy_groups;
};

struct SharedArray {
  SharedMemory memory;
  size_t bytes;
};

struct Block {
  uint3 index;
  dim3 grid_size, block_size;
  std::vector<std::unique_ptr<Fiber>> fibers;
  std::vector<uint64_t> exchanged;  // for each thread, what it offered to its warp's last operation
  std::map<const void*, SharedArray> shared_arrays;
  SharedMemory dynamic_shared;
  size_t shared_bytes;
  size_t allowed_shared_bytes;
  Fiber* current = nullptr;
  void (*run_thread)(void*);
  void* kernel_call;
  std::exception_ptr failure;
  jmp_buf scheduler;
#if defined(__SANITIZE_ADDRESS__)
  const void* scheduler_stack;
  size_t scheduler_stack_bytes;
#endif

  int threads() const { return block_size.x * block_size.y * block_size.z; }
};

inline Block& block() {
  static thread_local Block instance;
  return instance;
}

[[noreturn]] inline void fail(const std::string& what, const Fiber& fiber) {
  const Block& here = block();
  const auto text = [](auto size) {
    return "(" + std::to_string(size.x) + ", " + std::to_string(size.y) + ", " + std::to_string(size.z) + ")";
  };
  throw std::runtime_error("simt: " + what + ": block " + text(here.index) + ", thread " + text(fiber.thread));
}

// While it lives, memory is touched by the runner, not by the kernel.
class Runner {
 public:
  Runner() { SIMT_RACES(pause()); }
  ~Runner() { watch(); }
  static void watch() {
    SIMT_RACES(watch(block().current->linear, block().current->stack.bottom(), Stack::kBytes));
  }
};

// In a fiber: hands control to the scheduler until what the fiber waits for has come.
inline void wait_for(Wait wait) {
  const Runner runner;
  Fiber& fiber = *block().current;
  fiber.wait = wait;
  if (_setjmp(fiber.resume_point) == 0) {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(nullptr, block().scheduler_stack, block().scheduler_stack_bytes);
#endif
    _longjmp(block().scheduler, 1);
  }
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, nullptr, nullptr);
#endif
}

// A fiber runs one thread after the other: the same thread of every block of a launch, and of later launches.
inline void fiber_main() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &block().scheduler_stack, &block().scheduler_stack_bytes);
#endif
  Runner::watch();
  for (;;) {
    try {
      block().run_thread(block().kernel_call);
    } catch (...) {
      block().failure = std::current_exception();
    }
    wait_for(Wait::finished);
  }
}

inline void resume(Fiber& fiber) {
  Block& here = block();
  here.current = &fiber;
  if (_setjmp(here.scheduler) == 0) {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(nullptr, fiber.stack.bottom(), Stack::kBytes);
#endif
    if (fiber.started) _longjmp(fiber.resume_point, 1);
    fiber.started = true;
    ucontext_t context;
    getcontext(&context);
    context.uc_stack.ss_sp = fiber.stack.bottom();
    context.uc_stack.ss_size = Stack::kBytes;
    context.uc_link = nullptr;
    makecontext(&context, fiber_main, 0);
    setcontext(&context);
  }
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, nullptr, nullptr);
#endif
  if (here.failure) std::rethrow_exception(std::exchange(here.failure, nullptr));
#if defined(__SANITIZE_THREAD__)
  if (const std::string race = races::take_found(); !race.empty()) fail("race: " + race, fiber);
#endif
}

inline bool is_reversed() { return std::getenv("SIMT_REVERSE") != nullptr; }

// Lets go the lanes whose whole mask has arrived at one operation. Whether there were any.
inline bool release_warp(int first, int count) {
  Block& here = block();
  unsigned undecided = 0;
  for (int lane = 0; lane < count; ++lane) undecided |= unsigned{here.fibers[first + lane]->wait == Wait::warp} << lane;
  bool any = false;
  while (undecided != 0) {
    const Fiber& leader = *here.fibers[first + __builtin_ctz(undecided)];
    unsigned group = 0;
    for (int lane = 0; lane < count; ++lane) {
      const Fiber& fiber = *here.fibers[first + lane];
      const bool together = fiber.mask == leader.mask && fiber.operation == leader.operation;
      group |= (undecided >> lane & together) << lane;
    }
    undecided &= ~group;
    if (leader.mask & ~group) continue;
    if (group & ~leader.mask) fail(std::string(leader.operation) + " by a lane that its mask does not name", leader);
    any = true;
    if (leader.operation == kWarpBarrier) SIMT_RACES(synchronize_warp(first, group));
    for (int lane = 0; lane < count; ++lane) {
      if ((group >> lane & 1) == 0) continue;
      here.exchanged[first + lane] = here.fibers[first + lane]->offered;
      here.fibers[first + lane]->wait = Wait::nothing;
    }
  }
  return any;
}

// Runs a warp until each of its threads waits for the block or has finished.
inline void run_warp(int first, int count, bool reversed) {
  do {
    for (int place = 0; place < count; ++place) {
      Fiber& fiber = *block().fibers[first + (reversed ? count - 1 - place : place)];
      if (fiber.wait == Wait::nothing) resume(fiber);
    }
  } while (release_warp(first, count));
  for (int lane = 0; lane < count; ++lane) {
    const Fiber& fiber = *block().fibers[first + lane];
    if (fiber.wait == Wait::warp)
      fail(std::string(fiber.operation) + " was not reached by every lane that its mask names", fiber);
  }
}

inline void run_block(bool reversed) {
  Block& here = block();
  const int threads = here.threads();
  const int warps = (threads + kWarpSize - 1) / kWarpSize;
  SIMT_RACES(begin_block(threads));
  for (auto& [site, array] : here.shared_arrays) renew(array.memory.get(), array.bytes);
  for (int thread = 0; thread < threads; ++thread) {
    here.fibers[thread]->wait = Wait::nothing;
    here.fibers[thread]->copies.clear();
    here.fibers[thread]->copy_groups = 0;
  }
  for (;;) {
    for (int place = 0; place < warps; ++place) {
      const int first = (reversed ? warps - 1 - place : place) * kWarpSize;
      run_warp(first, std::min(kWarpSize, threads - first), reversed);
    }
    int finished = 0;
    for (int thread = 0; thread < threads; ++thread) finished += here.fibers[thread]->wait == Wait::finished;
    if (finished == threads) return;
    for (int thread = 0; thread < threads; ++thread) {
      Fiber& fiber = *here.fibers[thread];
      if (finished > 0 && fiber.wait == Wait::block)
        fail("__syncthreads was not reached by every thread of the block", fiber);
      fiber.wait = Wait::nothing;
    }
    SIMT_RACES(synchronize_block());
  }
}

// Static and dynamic shared memory together: what a block gets without asking for more, and what it can ask for on a
// GPU of compute capability 8.6.
constexpr size_t kSharedBytes = 48 << 10;
constexpr size_t kMaximumSharedBytes = 99 << 10;
constexpr int64_t kMaximumThreads = 1024;
constexpr int64_t kMaximumGridX = 0x7fffffff;
constexpr int64_t kMaximumGridYZ = 65535;

// What kernels, by their addresses, have asked for.
inline std::map<const void*, size_t>& allowed_shared() {
  static std::map<const void*, size_t> allowed;
  return allowed;
}

inline size_t allowed_shared(const void* kernel) {
  const auto found = allowed_shared().find(kernel);
  return found == allowed_shared().end() ? kSharedBytes : std::max(found->second, kSharedBytes);
}

inline void check_launch(const char* kernel, dim3 grid, dim3 block_size, size_t shared_bytes, size_t allowed_bytes) {
  const int64_t threads = int64_t{block_size.x} * block_size.y * block_size.z;
  const bool grid_fits = grid.x > 0 && grid.y > 0 && grid.z > 0 && grid.x <= kMaximumGridX &&
                         grid.y <= kMaximumGridYZ && grid.z <= kMaximumGridYZ;
  if (!grid_fits || threads == 0 || threads > kMaximumThreads || shared_bytes > allowed_bytes) {
    throw std::runtime_error(std::string("simt: launch of ") + kernel +
                             " with a grid, block or shared memory that CUDA refuses");
  }
}

template <typename T, typename Site>
T* shared_array(size_t count, Site) {
  static const char site = 0;
  const Runner runner;
  Block& here = block();
  SharedArray& array = here.shared_arrays[&site];
  if (array.memory == nullptr) {
    array.bytes = count * sizeof(T);
    here.shared_bytes += array.bytes;
    if (here.shared_bytes > here.allowed_shared_bytes) fail("more shared memory than a block has", *here.current);
    array.memory = allocate_shared(array.bytes);
  }
  return static_cast<T*>(array.memory.get());
}

template <typename Call>
void launch(const char* name, const void* kernel, dim3 grid, dim3 block_size, size_t dynamic_bytes, Call call) {
  check_launch(name, grid, block_size, dynamic_bytes, allowed_shared(kernel));
  Block& here = block();
  here.allowed_shared_bytes = allowed_shared(kernel);
  here.grid_size = grid;
  here.block_size = block_size;
  here.shared_arrays.clear();
  here.shared_bytes = dynamic_bytes;
  here.kernel_call = &call;
  here.run_thread = [](void* kernel_call) { (*static_cast<Call*>(kernel_call))(); };
  const int threads = here.threads();
  while (static_cast<int>(here.fibers.size()) < threads) here.fibers.push_back(std::make_unique<Fiber>());
  here.exchanged.resize(here.fibers.size());
  for (int thread = 0; thread < threads; ++thread) {
    Fiber& fiber = *here.fibers[thread];
    fiber.linear = thread;
    fiber.thread = {thread % block_size.x, thread / block_size.x % block_size.y,
                    thread / (block_size.x * block_size.y)};
  }
  SIMT_RACES(begin_launch());
  const bool reversed = is_reversed();
  const int64_t blocks = int64_t{grid.x} * grid.y * grid.z;
  try {
    for (int64_t number = 0; number < blocks; ++number) {
      const int64_t place = reversed ? blocks - 1 - number : number;
      here.index = {unsigned(place % grid.x), unsigned(place / grid.x % grid.y), unsigned(place / grid.x / grid.y)};
      here.dynamic_shared = allocate_shared(dynamic_bytes);
      run_block(reversed);
    }
  } catch (...) {
    here.fibers.clear();  // they stand in the middle of the kernel
    throw;
  }
}

}  // namespace simt

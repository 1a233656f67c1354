// What the scheduler of fibers.h tells races.cpp, which finds races: two accesses to the same bytes, at least one of
// them a write, with nothing between them that orders them on a GPU. Where g++ does not instrument memory accesses
// (-fsanitize=thread, without its runtime), nothing is told.
#pragma once

#include <cstddef>
#include <string>

namespace simt::races {

void begin_launch();
// Shared memory is forgotten by the block before its first thread runs, for it is another block's from then on.
void begin_block(int threads);
void forget(const void* memory, size_t bytes);

// From here on accesses are the thread's, but for those to its own stack; after pause, only what is told below.
void watch(int thread, const void* stack, size_t stack_bytes);
void pause();

void synchronize_block();
// Lanes of the warp of thread `first`. Other warp operations move numbers between lanes, but order no memory.
void synchronize_warp(int first, unsigned lanes);

void write_atomically(const void* address, size_t bytes);
void start_copy(const void* destination, const void* source, size_t bytes);
void finish_copy(const void* destination, size_t bytes);

// The first race since the last call, in words; empty if there was none.
std::string take_found();

}  // namespace simt::races

#if defined(__SANITIZE_THREAD__)
#define SIMT_RACES(call) simt::races::call
#else
#define SIMT_RACES(call) static_cast<void>(0)
#endif

// What the bindings of all operators share. Each is a header that bindings.cpp includes, and no source file of its own:
// to compile, pybind11 takes longer than they do.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "common.h"

namespace restoration {
namespace {

namespace py = pybind11;
using namespace py::literals;

using Address = std::uintptr_t;
using Unlocked = py::call_guard<py::gil_scoped_release>;

void* pointer(Address address) { return reinterpret_cast<void*>(address); }

// A fork copies only the calling thread: OpenMP's pool in the child is a list of threads that do not exist, and a
// parallel region would wait for them for ever (torch's own operators do). So a forked child computes in one thread.
bool forked = false;

int usable_threads(int64_t threads) { return forked ? 1 : static_cast<int>(threads); }

}  // namespace
}  // namespace restoration

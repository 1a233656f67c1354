"""How a benchmark is measured: judged first, then timed, and said where and on what."""

import functools
import platform
import re
import statistics
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import compare
import torch

from benchmarks import commit
from benchmarks.contest import copy, copy_buffers

# Time for the rounds of one benchmark, and how few or many they are: the median of 5 is the least that bears an
# outlier on either side, and more than 200 change it no more.
SECONDS = 0.5
ROUNDS = (5, 200)
QUICK_ROUNDS = 3


def judge(entry, call):
    """Raises AssertionError if what the call finds is less exact than the same-dtype reference allows.

    Returns whether there was memory for the exact values.
    """
    found = call()
    try:
        exact, plain = _truth(entry.reference)
    except torch.OutOfMemoryError:
        return False
    ulps = compare.ULPS if entry.rival.name in compare.KERNELS else compare.REFERENCE_ULPS[entry.dtype]
    compare.judge_all(found, exact, plain, ulps)
    return True


# Rivals follow each other.
@functools.lru_cache(maxsize=1)
def _truth(reference):
    """What the reference finds in float64 and in the dtype of the benchmark."""
    arguments = reference.arguments()
    wide = compare.convert(arguments, torch.float64, reference.device)
    return reference.call(wide)(), reference.call(arguments)()


def rounds(call, quick):
    """Number of timed rounds, after a first call that is slower than the others."""
    call()
    if quick:
        return QUICK_ROUNDS
    started = time.perf_counter()
    call()
    wanted = SECONDS / (time.perf_counter() - started)
    return min(max(int(wanted), ROUNDS[0]), ROUNDS[1])


def copy_seconds(bytes_moved, device, quick):
    """Median time of a copy of so many bytes, for the share of a copy's speed that a benchmark reaches."""
    buffers = copy_buffers(bytes_moved, device)

    def call():
        copy(**buffers)
        if device == "cuda":
            torch.cuda.synchronize()

    times = []
    for _ in range(rounds(call, quick)):
        started = time.perf_counter()
        call()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


@functools.cache
def circumstances(device):
    """Where a benchmark ran and with what, as it is written beside each result."""
    return {
        "device": device_name(device),
        "commit": commit(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "triton": _version("triton"),
            "cuda": torch.version.cuda,
            "restoration": _version("painting-restoration"),
        },
    }


def device_name(device):
    """The GPU's name, or "CPU" with the processor's name and the number of threads in use."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    threads = torch.get_num_threads()
    return f"CPU, {threads} thread{'s' if threads > 1 else ''}, {_processor()}"


def _processor():
    path = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.+)", path.read_text()) if path.exists() else None
    return found[1] if found else platform.processor() or platform.machine()


def _version(package):
    try:
        return version(package)
    except PackageNotFoundError:
        return None

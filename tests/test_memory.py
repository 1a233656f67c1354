"""What the program says of its memory, and what it gives back."""

import os
import platform
import subprocess
import sys

import pytest
import torch

from restoration import memory
from restoration.memory import MEBIBYTE, PeakMemory, resident, return_freed_pages
from restoration.profile import report

CPU = torch.device("cpu")


def test_a_peak_counted_below_the_idle_memory_is_none(monkeypatch):
    counts = iter((8 * MEBIBYTE, 8 * MEBIBYTE - 4096))
    monkeypatch.setattr(memory, "resident", lambda field: next(counts))
    peak = PeakMemory(CPU).mebibytes()
    assert report({"step": 1.0}, 1, peak).endswith("peak memory: 0 MiB beyond the idle program")


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells what is resident")
def test_pages_freed_between_tensors_in_use_are_returned():
    # Too small for mappings of their own. Those kept lie between all others: the heap cannot shrink from its end.
    tensors = [torch.ones(16 * 1024) for _ in range(1024)]
    del tensors[:-1:2]
    before = resident("VmRSS")
    return_freed_pages()
    assert before - resident("VmRSS") > 16 * MEBIBYTE
    assert all((tensor == 1).all() for tensor in tensors)


REUSE = """
import resource
import torch
from restoration.memory import reuse_freed
for size in {sizes}:
    reuse_freed(size)
def pages(kilobytes):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(kilobytes * 256)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
# Smaller each time: of what alignment cuts from a piece of memory, not all comes back to it.
print([pages(kilobytes) for kilobytes in (40000, 39000, 38000)][-1])
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="of other C libraries nothing is asked")
@pytest.mark.parametrize(
    ("sizes", "environment", "reused"),
    [
        ((), {}, False),
        ((64 * MEBIBYTE, 48 * MEBIBYTE, 1), {}, True),
        ((64 * MEBIBYTE,), {"MALLOC_MMAP_THRESHOLD_": "65536"}, False),
    ],
)
def test_tensors_take_the_pages_of_those_freed_before(sizes, environment, reused):
    """Tensors of 38 MB, in a process of its own, as what is asked of the C library holds for all of one."""
    command = [sys.executable, "-c", REUSE.format(sizes=sizes)]
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=True)
    pages = int(done.stdout)
    assert (pages < 10) is reused  # 19 where they are of 2 MB


def test_pages_of_other_devices_are_not_ours_to_return():
    assert return_freed_pages(torch.device("meta")) is False

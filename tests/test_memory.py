"""What the program says of its memory, and what it gives back."""

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


def test_pages_of_other_devices_are_not_ours_to_return():
    assert return_freed_pages(torch.device("meta")) is False

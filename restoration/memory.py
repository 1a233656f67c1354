"""How much memory the program takes, and giving back what it has freed."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from restoration.errors import UserError

MEBIBYTE = 2**20
CPU = torch.device("cpu")


class PeakMemory:
    """Most memory in use since this was made, beyond what was then: allocated on a GPU, resident on a CPU."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            self._idle = torch.cuda.memory_allocated(device)
        else:
            forget_peak()  # not every system lets a program do so, and none fails for the lack of it
            self._idle = resident("VmRSS")

    def bytes(self) -> int | None:
        """None where the system does not tell."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device) - self._idle
        peak = resident("VmHWM")
        if peak is None or self._idle is None:
            return None
        # Linux adds up the pages of several processors late: its peak can lie some pages below what it said before.
        return max(0, peak - self._idle)

    def mebibytes(self) -> float | None:
        """The same in units of 2^20."""
        peak = self.bytes()
        return None if peak is None else peak / MEBIBYTE


def resident(field: str) -> int | None:
    """Bytes of main memory that the process holds (VmRSS), or the most it has held (VmHWM), where Linux tells."""
    status = Path("/proc/self/status")
    found = re.search(rf"{field}:\s+(\d+)", status.read_text()) if status.exists() else None
    return int(found[1]) * 1024 if found else None


def forget_peak() -> bool:
    """Sets the most memory that the process has held to what it holds; False where the system cannot."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def is_out_of_memory(error: Exception) -> bool:
    """Of a GPU, or of a CPU, whose allocator has no error of its own."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "DefaultCPUAllocator" in str(error)


@contextmanager
def telling_of_memory(message: str) -> Iterator[None]:
    """Makes the end of memory a UserError."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(message) from error


def return_freed_pages(device: torch.device = CPU) -> bool:
    """Gives the pages of a CPU's freed tensors back to the system; False where they are kept, as only glibc gives them.

    Freed pages lie between tensors in use, and what is allocated next does not always fit in: a peak comes on top of
    them. On other devices nothing is done.
    """
    if device.type != "cpu":
        return False
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (AttributeError, OSError):
        return False
    return True

"""The command line's process: its warnings, errors in one line and signals, the pages it asks for, and its company.

Nothing here waits for PyTorch.
"""

from __future__ import annotations

import errno
import logging
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from restoration.errors import ReportedError, UserError

USAGE_ERROR = 2
# Named by the operators' errors where they ask for what cannot be.
VARIABLES = ("RESTORATION_BACKEND", "RESTORATION_CPU_ISA", "RESTORATION_CUDA_FLOAT64")
SIGNAL_BASE = 128  # a shell reports a program that a signal ended as 128 + its number


def log_each_message_once() -> None:
    """Warnings go to standard error, each once: the same picture is read again and again."""
    handler = logging.StreamHandler()
    handler.addFilter(_NewMessages())
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING, handlers=[handler])


class _NewMessages(logging.Filter):
    def __init__(self) -> None:
        super().__init__()
        self._seen: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        message = record.getMessage()
        if message in self._seen:
            return False
        self._seen.add(message)
        return True


@contextmanager
def end_at_sigterm() -> Iterator[None]:
    """As at Ctrl-C, so that nothing half made is left. Training has its own way to stop."""

    def end(number: int, frame: FrameType | None) -> None:
        # Nothing is made before all is imported, and extensions that are being imported swallow exceptions.
        if _imports(frame):
            os._exit(SIGNAL_BASE + number)
        sys.exit(SIGNAL_BASE + number)

    previous = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def _imports(frame: FrameType | None) -> bool:
    """Whether a module is being imported there."""
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False


@contextmanager
def one_line_errors() -> Iterator[None]:
    try:
        yield
    except Exception as error:
        # A full disk may be the one behind standard output, which has no name.
        of_a_file = isinstance(error, OSError) and (error.filename is not None or error.errno == errno.ENOSPC)
        if not (of_a_file or isinstance(error, UserError) or any(name in str(error) for name in VARIABLES)):
            from restoration.memory import is_out_of_memory  # and PyTorch, which what needs no memory does without

            if not is_out_of_memory(error):
                raise
            error = UserError("memory does not suffice")
        if not isinstance(error, ReportedError):
            print(error_line(error), file=sys.stderr, flush=True)
        raise SystemExit(USAGE_ERROR) from None


def error_line(error: Exception) -> str:
    what = error
    if isinstance(error, OSError) and error.filename is not None:
        what = f"{error.filename}: {error.strerror}"
    return f"error: {what}".replace("\n", "\\n")  # a file's name may hold one


def is_one_of_several() -> bool:
    """Whether torchrun, or what does the same, has started this process among others."""
    return "RANK" in os.environ and os.environ.get("WORLD_SIZE", "1") != "1"


def prefer_large_pages() -> None:
    """Has PyTorch, if it has made no tensor yet, ask Linux for pages of 2 MB for its large ones on a CPU.

    The first write to a page waits for the system to clear it. What the environment says already counts.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

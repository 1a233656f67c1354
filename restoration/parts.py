"""The time of the named parts of a step, measured only where somebody asks for it (profile.py)."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Stopwatch:
    """Adds up the time of named parts; one within another counts for itself alone."""

    def __init__(self, device: torch.device) -> None:
        self.seconds: dict[str, float] = {}
        self._device = device
        self._inner: list[float] = []

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        self._inner.append(0.0)
        started = self._now()
        yield
        elapsed = self._now() - started
        self.seconds[name] = self.seconds.get(name, 0.0) + elapsed - self._inner.pop()
        if self._inner:
            self._inner[-1] += elapsed


_running: Stopwatch | None = None


@contextmanager
def part(name: str) -> Iterator[None]:
    """Marks what happens inside as a part of the step; costs nothing unless a step is being measured."""
    if _running is None:
        yield
        return
    with _running.part(name):
        yield


@contextmanager
def measuring(device: torch.device) -> Iterator[Stopwatch]:
    """The parts that run inside are timed; a GPU is waited for at each end of each."""
    global _running
    _running = Stopwatch(device)
    try:
        yield _running
    finally:
        _running = None

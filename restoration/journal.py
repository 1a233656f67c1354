"""The numbers that steps leave on the device, fetched for several steps at a time, and which steps were skipped."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from restoration.blocks import STREAM_LIMIT
from restoration.distributed import ALONE, World
from restoration.errors import UserError
from restoration.step import MEASUREMENTS, Outcome

# One bad picture spoils one step. Since skipped steps change nothing, as many different batches in a row can only fail
# by the weights, and every later one would fail, too.
SKIPPED_IN_A_ROW = 10


class TrainingDivergedError(UserError):
    """Steps in a row had a loss, a gradient or a stream out of range, `first` the first of them."""

    def __init__(self, message: str, first: int = 0) -> None:
        super().__init__(message)
        self.first = first


@dataclass(frozen=True)
class StepRecord:
    """The numbers of one step by name (step.Outcome says which), and the files that it saw."""

    step: int
    numbers: dict[str, float]
    files: Sequence[str]

    @property
    def losses(self) -> dict[str, float]:
        """The weighted losses and their total."""
        return {name: value for name, value in self.numbers.items() if name not in MEASUREMENTS}

    @property
    def skipped(self) -> bool:
        return self.numbers["skipped"] > 0

    def complaint(self) -> str:
        """One line on a skipped step: what was wrong, and with which files."""
        if self.numbers["largest_stream"] < STREAM_LIMIT:
            values = ", ".join(f"{name} {value:.4g}" for name, value in self.numbers.items() if name != "skipped")
            reason = f"loss or gradient is not finite ({values})"
        else:
            reason = (
                f"the network's values reach {self.numbers['largest_stream']:.3g}, past the {STREAM_LIMIT:g} below "
                "which its arithmetic is exact"
            )
        return f"step {self.step}: {reason} on {', '.join(self.files)}"


def joined_record(parts: Sequence[StepRecord]) -> StepRecord:
    """The record of the whole batch, of whose equal parts each process has one."""
    combine = {"ridge_fallbacks": sum, "largest_stream": _largest}
    numbers = {name: combine.get(name, _mean)([part.numbers[name] for part in parts]) for name in parts[0].numbers}
    return StepRecord(parts[0].step, numbers, [file for part in parts for file in part.files])


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _largest(values: Sequence[float]) -> float:
    return math.nan if any(map(math.isnan, values)) else max(values)


class Journal:
    """Keeps outcomes on the device until they are read, all in one transfer; of all processes of world together."""

    def __init__(self, world: World = ALONE) -> None:
        self._world = world
        self._pending: list[tuple[int, tuple[str, ...], Tensor, Sequence[str]]] = []
        self.skipped_in_a_row = 0  # of the steps read, the last ones
        self.last_good = -1  # step of those read that was not skipped
        self._skipped = 0
        self._ridge_fallbacks = 0

    def add(self, step: int, outcome: Outcome, files: Sequence[str]) -> None:
        self._pending.append((step, outcome.names, outcome.numbers, files))

    def read(self) -> list[StepRecord]:
        """The steps since the last reading, in order. TrainingDivergedError after SKIPPED_IN_A_ROW skipped ones."""
        if not self._pending:
            return []
        rows = torch.stack([numbers for _, _, numbers, _ in self._pending]).tolist()
        own = [
            StepRecord(step, dict(zip(names, row, strict=True)), files)
            for (step, names, _, files), row in zip(self._pending, rows, strict=True)
        ]
        self._pending.clear()
        records = [joined_record(parts) for parts in zip(*self._world.gather(own), strict=True)]
        for record in records:
            self._ridge_fallbacks += int(record.numbers["ridge_fallbacks"])
            self._skipped += record.skipped
            if not record.skipped:
                self.skipped_in_a_row, self.last_good = 0, record.step
                continue
            self.skipped_in_a_row += 1
            if self.skipped_in_a_row == SKIPPED_IN_A_ROW:
                raise TrainingDivergedError(
                    f"{record.complaint()}; so did the {SKIPPED_IN_A_ROW - 1} steps before",
                    record.step + 1 - SKIPPED_IN_A_ROW,
                )
        return records

    def summary(self) -> str | None:
        """One line on what did not go as it should in the steps read so far; None where all did."""
        parts = []
        if self._skipped:
            parts.append(f"{self._skipped} steps were skipped")
        if self.skipped_in_a_row:
            parts[-1] += f", the last {self.skipped_in_a_row} of all among them: the weights may be past use"
        if self._ridge_fallbacks:
            parts.append(f"{self._ridge_fallbacks} colour transfers needed more than the everyday ridge")
        return "; ".join(parts) or None

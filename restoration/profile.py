"""Where the time and the memory of a training step go: the command `restoration train --profile`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch

from restoration.collection import find_paintings
from restoration.config import TrainingConfig
from restoration.distributed import ALONE
from restoration.loader import load_batches
from restoration.memory import PeakMemory
from restoration.parts import measuring, part
from restoration.step import Optimisation
from restoration.train import build_step, check_precision, loss_network, memory_told_in_one_line, training_pairs
from restoration.vgg import load_vgg_weights


def report(seconds: dict[str, float], steps: int, peak: float | None) -> str:
    """A table of the parts, milliseconds a step and shares, and the peak of memory in MiB."""
    total = sum(seconds.values())
    width = max(map(len, seconds))
    lines = [
        f"{name:{width}}  {1000 * spent / steps:9.1f} ms  {spent / total:6.1%}"
        for name, spent in sorted(seconds.items(), key=lambda item: -item[1])
    ]
    lines.append(f"{'step':{width}}  {1000 * total / steps:9.1f} ms  (mean of {steps} after a first one)")
    lines.append("peak memory: unknown" if peak is None else f"peak memory: {peak:.0f} MiB beyond the idle program")
    return "\n".join(lines)


def profile_training(
    data: Path,
    config: TrainingConfig,
    *,
    device: torch.device,
    vgg: Path | None = None,
    styles: list[str] | None = None,
    steps: int = 5,
) -> str:
    """The report on a few steps of training from random weights, of which nothing is kept.

    Steps are not captured as a CUDA graph, whose parts could not be told apart.
    """
    check_precision(config, device)
    load_vgg_weights(vgg)  # before paintings are read, which can take minutes
    paintings = find_paintings(data, styles=styles, split="train")
    dataset = training_pairs(paintings, config, vgg)
    features = loss_network(vgg, dataset.paintings)
    batches = load_batches(dataset, ALONE.batches(0, steps + 1, config.batch), config.workers, device)
    memory = PeakMemory(device)
    torch.manual_seed(config.seed)
    optimise = Optimisation(build_step(config, features).to(device), replace(config, capture=False), device)
    with memory_told_in_one_line():
        _step(0, batches, optimise)
        with measuring(device) as stopwatch:
            for step in range(1, steps + 1):
                with part("everything else"):
                    _step(step, batches, optimise)
    return report(stopwatch.seconds, steps, memory.mebibytes())


def _step(step: int, batches: Iterator[dict], optimise: Optimisation) -> None:
    with part("loader"):
        batch = next(batches)
    optimise(step, batch["degraded"], batch["reference"])

"""SSIM and Gram losses over pairs of paintings, by style: a table, JSON and a contact sheet."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

import torch
from rich import box
from rich.table import Table
from torch import Tensor

import restoration
from restoration.data import Pair
from restoration.errors import UserError
from restoration.flow import ReversibleNetwork
from restoration.imaging import contact_sheet, read_image, write_image
from restoration.metrics import Metrics, limit_side, measure
from restoration.reconstruct import recolour
from restoration.vgg import VGG19Features

OUTPUTS = ("metrics.json", "contact_sheet.png")
CLIPPED = 1e-3  # a value this near 0 or 1 in the result, and not in the degraded picture, has lost its detail


@dataclass(frozen=True)
class Evaluation:
    """One pair: metrics of the result, and of the degraded painting as it is (its SSIM is 1)."""

    pair: Pair
    pictures: tuple[Tensor, Tensor, Tensor]  # degraded, reference, result
    result: Metrics
    untouched: Metrics
    clipped: float

    def to_dict(self) -> dict[str, object]:
        return {
            "degraded": str(self.pair.degraded),
            "reference": str(self.pair.reference),
            "style": self.pair.style,
            "result": self.result.to_dict(),
            "untouched": self.untouched.to_dict(),
            "clipped": self.clipped,
        }


def check_output(out: Path, *, force: bool = False) -> None:
    """UserError where out cannot become, or already holds, an evaluation."""
    if out.exists() and not out.is_dir():
        raise UserError(f"{out}: must be a folder")
    for name in OUTPUTS:
        if (out / name).exists() and not force:
            raise UserError(f"{out / name}: exists already (--force overwrites)")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{out}: cannot be made ({error.strerror})") from error


def evaluate_pairs(
    pairs: list[Pair], network: ReversibleNetwork, features: VGG19Features, *, size: int = 512
) -> Iterator[Evaluation]:
    """Recolours pair after pair, longer sides reduced to size, on the device that network and features are on."""
    if size < 1:
        raise UserError(f"--size must be at least 1, got {size}")
    device = next(network.parameters()).device
    for pair in pairs:
        degraded, reference = (limit_side(read_image(path).rgb, size) for path in (pair.degraded, pair.reference))
        result, _ = recolour(network, degraded, reference, device)
        on_device = [picture.to(device) for picture in (degraded, reference, result)]
        yield Evaluation(
            pair,
            pictures=(degraded, reference, result),
            result=measure(*on_device, features),
            untouched=measure(on_device[0], on_device[1], on_device[0], features),
            clipped=newly_clipped(degraded, result),
        )


def write_report(evaluations: list[Evaluation], out: Path, *, size: int) -> None:
    """Writes metrics.json and contact_sheet.png into out, which `check_output` has approved."""
    rows = []
    for evaluation in evaluations:
        pair, metrics = evaluation.pair, evaluation.result
        label = (
            f"{pair.style}: {pair.degraded.name} after {pair.reference.name}, SSIM {metrics.ssim:.3f}, "
            f"relative Gram loss {metrics.relative_gram:.3f} (untouched {evaluation.untouched.relative_gram:.3f})"
        )
        rows.append((label, evaluation.pictures))
    write_image(out / "contact_sheet.png", contact_sheet(rows, ("degraded", "reference", "result")), force=True)
    (out / "metrics.json").write_text(json.dumps(_report(evaluations, size), indent=2) + "\n")


def newly_clipped(degraded: Tensor, result: Tensor) -> float:
    """Share of pixels with a channel at 0 or 1 in the result that was not there in the degraded picture."""

    def clipped(image: Tensor) -> Tensor:
        return ((image < CLIPPED) | (image > 1 - CLIPPED)).any(0)

    return float((clipped(result) & ~clipped(degraded)).float().mean())


def summarise(evaluations: list[Evaluation]) -> dict[str, dict[str, float]]:
    """Means by style and over all pairs, and the share of pairs that came nearer to their reference."""
    groups = {style: [e for e in evaluations if e.pair.style == style] for style in _styles(evaluations)}
    groups["all"] = evaluations
    return {name: _summary(group) for name, group in groups.items()}


def _summary(group: list[Evaluation]) -> dict[str, float]:
    return {
        "pairs": len(group),
        "ssim": mean(e.result.ssim for e in group),
        "gram": mean(e.result.gram for e in group),
        "relative_gram": mean(e.result.relative_gram for e in group),
        "untouched_relative_gram": mean(e.untouched.relative_gram for e in group),
        "improved": mean(e.result.relative_gram < e.untouched.relative_gram for e in group),
        "clipped": mean(e.clipped for e in group),
    }


def _styles(evaluations: list[Evaluation]) -> list[str]:
    return sorted({evaluation.pair.style for evaluation in evaluations})


def _report(evaluations: list[Evaluation], size: int) -> dict[str, object]:
    return {
        "versions": {"restoration": restoration.__version__, "torch": torch.__version__},
        "size": size,
        "summary": summarise(evaluations),
        "pairs": [evaluation.to_dict() for evaluation in evaluations],
    }


def summary_table(evaluations: list[Evaluation]) -> Table:
    """The summary as a table for the terminal."""
    table = Table(
        box=box.SIMPLE,
        padding=(0, 1, 0, 0),
        caption="SSIM: 1 is best. Gram losses: 0 is best; before: relative, not recoloured.",
    )
    for column in ("style", "pairs", "SSIM", "Gram", "relative", "before", "nearer", "clipped"):
        table.add_column(column, justify="left" if column == "style" else "right", no_wrap=True)
    for name, row in summarise(evaluations).items():
        table.add_row(
            name,
            str(row["pairs"]),
            f"{row['ssim']:.3f}",
            f"{row['gram']:.3g}",
            f"{row['relative_gram']:.3f}",
            f"{row['untouched_relative_gram']:.3f}",
            f"{row['improved']:.0%}",
            f"{row['clipped']:.2%}",
        )
    return table

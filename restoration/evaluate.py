"""How well paintings are recoloured: a network beside baselines, on pairs of paintings or on fading that is known."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from restoration.baselines import BASELINES, untouched
from restoration.collection import Pair, evaluation_pairs
from restoration.errors import UnsuitableWeightsError, UserError
from restoration.flow import ReversibleNetwork
from restoration.imaging import from_pillow, read_image, read_rgb, to_pillow
from restoration.metrics import (
    colour_difference,
    limit_side,
    measure_results,
    newly_clipped,
    structural_similarity_index,
    tint_difference,
)
from restoration.recolouring import recolour
from restoration.samples import SAMPLE_SEEDS, SMALLEST_SIDE, draw_painting, fade
from restoration.vgg import VGG19Features

NETWORK, RANDOM_NETWORK, UNTOUCHED = "network", "random weights", "untouched"
PAIRS_A_STYLE = 20
SHEET_CELL = 320  # pixels; no more of a picture is kept, or hundreds of pairs would fill the memory
SHEET_ROWS = 60  # the default's PAIRS_A_STYLE of three styles; what is longer nobody can open

Method = Callable[[Tensor, Tensor], Tensor]  # degraded [3,H,W], reference [3,h,w] -> result [3,H,W], all in [0,1]


@dataclass(frozen=True)
class Case:
    """A painting to recolour. original: what it looked like before it was faded, where that is known."""

    style: str
    name: str
    degraded: Tensor
    reference: Tensor
    original: Tensor | None = None


@dataclass(frozen=True)
class Evaluation:
    """Scores (method -> name -> value, None where a result was not finite); pictures, a sheet's row or none."""

    style: str
    name: str
    scores: dict[str, dict[str, float] | None]
    pictures: dict[str, Tensor]


def check_size(size: int) -> None:
    if size < 1:
        raise UserError(f"--size must be at least 1, got {size}")


def choose_cases(
    data: Path | None, pairs: Path | None = None, *, count: int | None = None, size: int, synthetic: bool = False
) -> tuple[Iterator[Case], int]:
    """The cases that the options of the command line name, and their number. count: PAIRS_A_STYLE if not given.

    UserError where they name none, or a picture that cannot be read, or where an option would do nothing.
    """
    check_size(size)
    if data is None:
        if not synthetic:
            raise UserError("--data must be given (only --synthetic can do without)")
        for option, value in (("--pairs", pairs), ("--count", count)):
            if value is not None:
                raise UserError(f"{option} {value} chooses among the paintings of --data: give that, or leave it out")
        if size < SMALLEST_SIDE:
            raise UserError(f"--size must be at least {SMALLEST_SIDE} where paintings are drawn, got {size}")
        return drawn_cases(size), len(SAMPLE_SEEDS)
    chosen = evaluation_pairs(data, pairs, PAIRS_A_STYLE if count is None else count)
    if synthetic:
        chosen = [pair for pair in chosen if pair.degraded != pair.reference]
        if not chosen:
            raise UserError(f"{data}: --synthetic needs two paintings of a style")
    check_readable(chosen)
    cases = faded_cases if synthetic else pair_cases
    return cases(chosen, size), len(chosen)


def check_readable(pairs: list[Pair]) -> None:
    """UserError, before hours of work, where a picture of the pairs is damaged."""
    for path in sorted({path for pair in pairs for path in (pair.degraded, pair.reference)}):
        read_rgb(path)


def pair_cases(pairs: list[Pair], size: int) -> Iterator[Case]:
    """Pairs of paintings as they are, longer sides reduced to size."""
    for pair in pairs:
        degraded, reference = (_read(path, size) for path in (pair.degraded, pair.reference))
        yield Case(pair.style, pair_name(pair), degraded, reference)


def faded_cases(pairs: list[Pair], size: int) -> Iterator[Case]:
    """The first painting of each pair, faded, to be recoloured after the second."""
    for pair in pairs:
        original = to_pillow(_read(pair.degraded, size))
        # By its name, so that a painting ages the same way whatever others are evaluated.
        faded = fade(np.asarray(original), zlib.crc32(pair.degraded.name.encode()))
        yield Case(pair.style, pair_name(pair), _tensor(faded), _read(pair.reference, size), from_pillow(original))


def drawn_cases(size: int) -> Iterator[Case]:
    """The demonstration's paintings, one a palette, and their references, size pixels wide (768: as it draws them)."""
    sides = [max(side, SMALLEST_SIDE) for side in (2 * size // 3, size)]
    for palette, seeds in SAMPLE_SEEDS.items():
        original, reference = (draw_painting(palette, seed, *sides) for seed in seeds)
        pictures = (_tensor(picture) for picture in (fade(original, seeds[0]), reference, original))
        yield Case(palette, f"painting {seeds[0]} after {seeds[1]}", *pictures)


def _read(path: Path, size: int) -> Tensor:
    return limit_side(read_image(path).rgb, size)


def _tensor(painting: np.ndarray) -> Tensor:
    return from_pillow(Image.fromarray(painting))


def pair_name(pair: Pair) -> str:
    return f"{pair.degraded.name} after {pair.reference.name}"


def choose_methods(network: ReversibleNetwork, device: torch.device, *, baselines: bool) -> dict[str, Method]:
    """The network and the untouched painting; with baselines also the transfers without training and an untrained one.

    The latter is a network of the same architecture whose random weights follow from seed 0.
    """
    methods = {NETWORK: _recolouring(network, device), UNTOUCHED: untouched}
    if baselines:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            random_network = ReversibleNetwork(network.architecture).eval().to(device)
        methods |= BASELINES | {RANDOM_NETWORK: _recolouring(random_network, device)}
    return methods


def _recolouring(network: ReversibleNetwork, device: torch.device) -> Method:
    def method(degraded: Tensor, reference: Tensor) -> Tensor:
        try:
            return recolour(network, degraded, reference, device)[0]
        except UnsuitableWeightsError:
            return torch.full_like(degraded, math.nan)

    return method


def evaluate(
    cases: Iterator[Case], methods: dict[str, Method], features: VGG19Features | None, *, shown_every: int = 1
) -> Iterator[Evaluation]:
    """Recolours case after case by every method and scores the results. Of every so many cases the pictures are kept.

    Without an original: SSIM to the degraded painting, Gram losses (features: `vgg.metric_features`) and tint to the
    reference; with one: CIEDE2000 and SSIM to the original. Either way the share of newly clipped pixels.
    """
    for number, case in enumerate(cases):
        results = {name: method(case.degraded, case.reference) for name, method in methods.items()}
        finite = {name: result for name, result in results.items() if result.isfinite().all()}
        scores = dict(zip(finite, _score(case, list(finite.values()), features), strict=True))
        pictures = _sheet_row(case, results) if number % shown_every == 0 else {}
        yield Evaluation(case.style, case.name, {name: scores.get(name) for name in methods}, pictures)


def rows_apart(number: int) -> int:
    """Of how many cases one is shown, so that a sheet of them has at most SHEET_ROWS."""
    return max(1, math.ceil(number / SHEET_ROWS))


def _sheet_row(case: Case, results: dict[str, Tensor]) -> dict[str, Tensor]:
    shown = {"degraded": case.degraded, "reference": case.reference}
    shown |= {} if case.original is None else {"original": case.original}
    shown |= {name: result.nan_to_num(0.5) for name, result in results.items() if name != UNTOUCHED}
    return {name: limit_side(picture, SHEET_CELL) for name, picture in shown.items()}


def _score(case: Case, results: list[Tensor], features: VGG19Features | None) -> list[dict[str, float]]:
    if case.original is None:
        device = next(features.buffers()).device
        degraded, reference, *moved = (picture.to(device) for picture in (case.degraded, case.reference, *results))
        scores = [
            metrics.to_dict() | {"tint": tint_difference(reference, result)}
            for metrics, result in zip(measure_results(degraded, reference, moved, features), moved, strict=True)
        ]
    else:
        scores = [
            {
                "ssim": structural_similarity_index(case.original, result),
                "ciede2000": colour_difference(case.original, result),
            }
            for result in results
        ]
    clipped = [newly_clipped(case.degraded, result) for result in results]
    return [score | {"clipped": share} for score, share in zip(scores, clipped, strict=True)]

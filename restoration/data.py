"""The pairs of degraded and reference crops that training reads."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from restoration.collection import Painting, by_style, partners_of
from restoration.errors import UserError
from restoration.imaging import from_pillow, read_rgb
from restoration.loader import PictureCache

logger = logging.getLogger(__name__)

# A description needs the painting's statistics, not its details: VGG19 would take 16 times longer on 1024 pixels.
DESCRIBED_SIDE = 256


def small_picture(path: Path) -> Tensor:
    """The whole painting as float32 [3, h, w] in [0, 1], its longer side at most DESCRIBED_SIDE."""
    picture = read_rgb(path)
    picture.thumbnail((DESCRIBED_SIDE, DESCRIBED_SIDE), Image.Resampling.LANCZOS)
    return from_pillow(picture)


class PairDataset(Dataset):
    """Training pairs: a crop to be recoloured and a crop of another work of the same style.

    Sample ``index`` (any integer >= 0; there is no last one) depends on ``seed`` and ``index`` alone, so that a run
    resumed at some step, with any number of workers and any cache, goes on with the same bits. Let
    ``load_batches`` number them.

    A style is drawn evenly (a style of few images counts as much as the others), then an image of it, then the
    reference: any image of the style that shows another work; another file where the style has a single work; the
    same file where it has a single file. ``pairing="nearest"`` narrows this to the ``neighbors`` images whose
    ``describe(small_picture(path)) -> [D]`` is nearest (Euclidean distance).

    Of each image a square is cut whose side is ``crop`` times a factor drawn from ``scale_range`` (but no longer than
    the image's shorter side), resized to ``crop`` and mirrored half of the time. A shorter side under ``crop`` is
    enlarged.

    Every file is decoded once at construction; those that fail are logged and left out (``skipped``; the others are
    ``paintings``), and it is a UserError when none is left. With ``verify=False`` a damaged file is a UserError when it
    is drawn.
    Each process that loads keeps decoded images in memory, up to ``cache_bytes`` (4 a pixel).

    Samples are {"degraded", "reference": float32 [3, crop, crop] in [0, 1]; "degraded_file", "reference_file": str}.
    """

    def __init__(
        self,
        paintings: Sequence[Painting],
        crop: int,
        *,
        pairing: str = "random",
        seed: int = 0,
        scale_range: tuple[float, float] = (1.0, 3.0),
        describe: Callable[[Tensor], Tensor] | None = None,
        neighbors: int = 3,
        verify: bool = True,
        cache_bytes: int = 0,
    ):
        if crop < 1:
            raise UserError(f"crop must be 1 pixel or more, got {crop}")
        if seed < 0:
            raise UserError(f"seed must be 0 or more, got {seed}")
        if pairing not in ("random", "nearest"):
            raise UserError(f"pairing must be 'random' or 'nearest', got '{pairing}'")
        if not 0 < scale_range[0] <= scale_range[1]:
            raise UserError(f"scale_range must be two factors above 0, the smaller first, got {scale_range}")
        if neighbors < 1:
            raise UserError(f"neighbors must be 1 or more, got {neighbors}")
        if pairing == "nearest" and describe is None:
            raise ValueError("describe must be given for pairing='nearest', got None")
        self.crop = crop
        self.seed = seed
        self.scale_range = scale_range
        self.skipped: list[Path] = []
        if verify:
            paintings, self.skipped = _without_damaged(paintings)
        if not paintings:
            raise UserError(f"no painting is left to train on ({len(self.skipped)} damaged)")
        self.paintings = list(paintings)
        self._groups = by_style(paintings)
        self._pictures = PictureCache(cache_bytes)
        self._nearest = None
        if pairing == "nearest":
            self._nearest = [self._nearest_partners(group, describe, neighbors) for group in self._groups]

    def __getitem__(self, index: int) -> dict[str, Any]:
        generator = np.random.default_rng((self.seed, index))
        style = generator.integers(len(self._groups))
        group = self._groups[style]
        place = int(generator.integers(len(group)))
        partners = partners_of(group, place) if self._nearest is None else self._nearest[style][place]
        degraded = group[place].path
        reference = group[partners[int(generator.integers(len(partners)))]].path
        return {
            "degraded": self._draw_crop(degraded, generator),
            "reference": self._draw_crop(reference, generator),
            "degraded_file": str(degraded),
            "reference_file": str(reference),
        }

    def _draw_crop(self, path: Path, generator: np.random.Generator) -> Tensor:
        picture = self._pictures.read(path)
        shorter = min(picture.size)
        smallest, largest = (min(shorter, max(1, round(self.crop * scale))) for scale in self.scale_range)
        side = int(generator.integers(smallest, largest + 1))
        left = int(generator.integers(picture.width - side + 1))
        top = int(generator.integers(picture.height - side + 1))
        box = (left, top, left + side, top + side)
        crop = picture.resize((self.crop, self.crop), Image.Resampling.LANCZOS, box=box)
        if generator.random() < 0.5:
            crop = crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return from_pillow(crop)

    @staticmethod
    def _nearest_partners(
        group: list[Painting], describe: Callable[[Tensor], Tensor], neighbors: int
    ) -> list[list[int]]:
        descriptions = torch.stack([describe(small_picture(painting.path)).detach().cpu() for painting in group])
        nearest = []
        for place in range(len(group)):
            partners = torch.tensor(partners_of(group, place))
            distances = (descriptions[partners] - descriptions[place]).norm(dim=1)
            nearest.append(partners[distances.argsort(stable=True)[:neighbors]].tolist())
        return nearest


def _without_damaged(paintings: Sequence[Painting]) -> tuple[list[Painting], list[Path]]:
    """Decode every file; log those that fail. Returns the sound paintings and the damaged paths."""
    with ThreadPoolExecutor() as pool:
        damages = list(pool.map(_damage, paintings))
    for damage in damages:
        if damage is not None:
            logger.warning("left out: %s", damage)
    sound = [painting for painting, damage in zip(paintings, damages, strict=True) if damage is None]
    return sound, [painting.path for painting, damage in zip(paintings, damages, strict=True) if damage is not None]


def _damage(painting: Painting) -> str | None:
    try:
        read_rgb(painting.path)
    except UserError as error:
        return str(error)
    return None

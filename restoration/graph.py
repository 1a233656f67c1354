"""A training update as one CUDA graph: the thousands of kernels of a step start at the cost of one."""

from __future__ import annotations

import dataclasses
import gc
import logging
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from restoration.errors import UserError

logger = logging.getLogger(__name__)

# Real updates made before capture: libraries load their kernels and Adam makes its moments. PyTorch's own advice.
WARM_UP = 3

Result = TypeVar("Result")


def why_not_captured(module: nn.Module, device: torch.device) -> str | None:
    """None if updates of the module can be captured, else the reason."""
    if device.type != "cuda":
        return f"the device is {device.type}"
    if isinstance(module, DistributedDataParallel):
        return "gradients are averaged over processes"
    return None


class CapturedUpdate:
    """Calls update(degraded, reference), after the first few times by replaying its CUDA graph.

    Where capture fails, the warning says why and updates stay eager; UserError where PyTorch cannot go on after that.
    Crops of other sizes than the captured ones are updated with eagerly, too.

    Args:
        update: returns a dataclass whose tensor fields live on the device; it must not wait for the device.
        generator: of the device's random numbers that update draws. Seeding it between calls counts.
    """

    def __init__(self, update: Callable[[Tensor, Tensor], Result], generator: torch.Generator) -> None:
        self._update = update
        self._generator = generator
        self._remaining: int | None = WARM_UP  # None: never to be captured
        self._graph: torch.cuda.CUDAGraph | None = None
        self._inputs: tuple[Tensor, ...] = ()
        self._stream: torch.cuda.Stream | None = None
        self._outcome = None

    def __call__(self, degraded: Tensor, reference: Tensor) -> Result:
        images = (degraded, reference)
        if self._remaining == 0 and self._graph is None:
            self._try_to_capture(images)
        if self._graph is not None and all(a.shape == b.shape for a, b in zip(images, self._inputs, strict=True)):
            return self._replay(images)
        if self._remaining is None or self._graph is not None:
            return self._update(*images)
        self._remaining -= 1
        return self._warm_up(images)

    def _warm_up(self, images: tuple[Tensor, ...]) -> Result:
        # On the stream of the capture: what libraries and PyTorch's memory keep for a stream is made then.
        self._stream, current = self._stream or torch.cuda.Stream(), torch.cuda.current_stream()
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            outcome = self._update(*images)
        current.wait_stream(self._stream)
        return outcome

    def _try_to_capture(self, images: tuple[Tensor, ...]) -> None:
        current = torch.cuda.current_stream()
        try:
            self._capture(images)
        except RuntimeError as error:
            self._remaining = None
            self._graph = None
            reason = str(_first_of(error)).split("\n")[0]
            # Where CUDA itself broke the capture off, PyTorch has left the stream as it was within.
            torch.cuda.set_stream(current)
            if not self._can_go_on():
                raise UserError(
                    f"the step cannot be captured as a CUDA graph ({reason}), and this PyTorch cannot go on after the "
                    "attempt; give --no-capture"
                ) from error
            logger.warning("steps start kernel by kernel, for they cannot be captured: %s", reason)

    def _capture(self, images: tuple[Tensor, ...]) -> None:
        self._inputs = tuple(image.clone() for image in images)
        gc.collect()  # graphs that are no longer used, each with the memory of a step, hang in cycles
        graph = torch.cuda.CUDAGraph()
        graph.register_generator_state(self._generator)
        # thread_local: the thread that pins the next batch's memory meanwhile does nothing forbidden.
        with torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
            self._outcome = self._update(*self._inputs)
        self._graph = graph

    def _can_go_on(self) -> bool:
        """False where a broken capture has left something in it.

        Before PyTorch 2.12 that is the state of the generator, with which nothing can be drawn: it gets a new one. In
        some versions it is the memory: what other streams have used is kept for ever.
        """
        generator, seed = self._generator, self._generator.initial_seed()
        try:
            if generator.device.type == "cuda":
                generator.graphsafe_set_state(torch.Generator(generator.device))
            torch.rand(1, generator=generator, device=generator.device)
            torch.cuda.empty_cache()
        except RuntimeError:
            return False
        generator.manual_seed(seed)  # the update draws what it would have drawn without the attempt
        return True

    def _replay(self, images: tuple[Tensor, ...]) -> Result:
        for own, given in zip(self._inputs, images, strict=True):
            own.copy_(given)
        self._graph.replay()
        # The next replay writes over what this one found.
        copies = {name: value.clone() for name, value in vars(self._outcome).items() if isinstance(value, Tensor)}
        return dataclasses.replace(self._outcome, **copies)


def _first_of(error: BaseException) -> BaseException:
    """What broke the capture off: the error of ending it, which says only that there was another, takes its place."""
    while isinstance(error.__context__, RuntimeError):
        error = error.__context__
    return error

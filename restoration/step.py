"""One step of training: five passes of the network, all losses, one backward pass, one update."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from restoration.adam import Adam
from restoration.blocks import STREAM_LIMIT
from restoration.config import TrainingConfig
from restoration.flow import ReversibleNetwork, largest_value
from restoration.graph import CapturedUpdate, why_not_captured
from restoration.losses import ReconstructionLoss
from restoration.memory import return_freed_pages
from restoration.parts import part
from restoration.whitening import Moments, moments, transfer_moments

logger = logging.getLogger(__name__)

# Far apart, so that no two runs of neighbouring seeds share the anchors of a step.
SEED_STRIDE = 1_000_003
# What an outcome tells beside the losses.
MEASUREMENTS = ("gradient_norm", "ridge_fallbacks", "largest_stream", "skipped")


@dataclass
class StepResult:
    """What one forward pass of training leaves: weighted losses, the recoloured crops, and how it went."""

    losses: dict[str, Tensor]
    result: Tensor
    ridge_fallbacks: Tensor
    largest_stream: Tensor


class TrainingStep(nn.Module):
    """One module whose forward is the whole step: five passes of the network and all losses.

    Parameters take part in several passes, but each gets its gradient once, from the one backward pass of the sum of
    the losses: what averages gradients over processes wraps this module.
    """

    def __init__(self, network: ReversibleNetwork, losses: ReconstructionLoss) -> None:
        super().__init__()
        self.network = network
        self.losses = losses

    def forward(self, degraded: Tensor, reference: Tensor, generator: torch.Generator) -> StepResult:
        with self.network.unchanged_parameters():
            return self._all_passes(degraded, reference, generator)

    def _all_passes(self, degraded: Tensor, reference: Tensor, generator: torch.Generator) -> StepResult:
        with part("encode"):
            content, style = self._encode_both(degraded, reference)
        with part("transfer"):
            own, wanted = moments(content), moments(style)
        result, fallbacks = self._recoloured(content, own, wanted, degraded)
        with part("encode"):
            encoded_result = self.network.encode(result, in_order=False)
        with part("transfer"):
            reached = moments(encoded_result)
        cycled, more_fallbacks = self._recoloured(encoded_result, reached, own, degraded)
        # The loss network has gone backward by then, with the largest maps of all.
        _return_freed_pages_before_backward(cycled)
        streams = (content, style, encoded_result)
        return_freed_pages(degraded.device)  # of the network, before the loss network takes the most
        return StepResult(
            losses=self.losses(degraded, reference, result, cycled, generator),
            result=result.detach(),
            ridge_fallbacks=fallbacks + more_fallbacks,
            largest_stream=largest_value(streams),
        )

    def _encode_both(self, degraded: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
        """In one batch if sizes agree: half as many kernels to start, each with twice the work."""
        if degraded.shape != reference.shape:
            return self.network.encode(degraded, in_order=False), self.network.encode(reference, in_order=False)
        both = self.network.encode(torch.cat((degraded, reference)), in_order=False)
        # Its backward comes last: what smaller batches have freed by then lies in pieces too small for this one.
        _return_freed_pages_before_backward(both)
        content, style = both.chunk(2)
        return content, style

    def _recoloured(self, z: Tensor, own: Moments, wanted: Moments, like: Tensor) -> tuple[Tensor, Tensor]:
        """The picture, in the size of like, that z becomes, and how many images needed a larger ridge."""
        with part("transfer"):
            transfer = transfer_moments(z, own, wanted)
        with part("decode"):
            return self.network.decode(transfer.z, like.shape[-2:], in_order=False), transfer.fallbacks()


@dataclass(frozen=True)
class Outcome:
    """What a step leaves on the device: numbers by name, float32 [len(names)], and the recoloured crops [B,3,H,W].

    The numbers are the weighted losses, their total, and MEASUREMENTS: the gradient's norm before clipping, how many
    images' colour transfer needed a larger ridge, the largest |stream value|, and 1 where something was out of range
    and nothing was updated, else 0.
    """

    names: tuple[str, ...]
    numbers: Tensor
    result: Tensor


class Optimisation:
    """Steps of Adam; calling one never waits for the device.

    A step whose loss or gradient is not finite, or whose streams leave their exact range, changes neither parameters
    nor Adam's moments. That is decided on the device and told in the outcome.

    On a CUDA device the whole step becomes one CUDA graph where that is possible (graph.py).

    Args:
        module: a TrainingStep on the device, or what wraps one and averages its gradients over processes.
        config: learning rate, clipping, precision, capture and the seed of the anchors.
        device: of module.
    """

    def __init__(self, module: nn.Module, config: TrainingConfig, device: torch.device) -> None:
        self.module = module
        self.config = config
        self.optimizer = Adam(module.parameters(), torch.tensor(config.learning_rate, device=device))
        self._generator = torch.Generator(device)
        reason = why_not_captured(module, device)
        self._run = CapturedUpdate(self._update, self._generator) if config.capture and reason is None else self._update
        if config.capture and reason is not None and device.type == "cuda":
            logger.warning("steps start kernel by kernel: %s", reason)

    def __call__(self, step: int, degraded: Tensor, reference: Tensor) -> Outcome:
        """Makes step number `step` with crops [B,3,H,W] on the device."""
        # Anchors depend on the seed and the step alone, so that a resumed run draws the same ones.
        self._generator.manual_seed(self.config.seed * SEED_STRIDE + step)
        self.optimizer.learning_rate.fill_(learning_rate(self.config, step))
        with _convolutions(tf32=self.config.precision != "fp32"):
            return self._run(degraded, reference)

    def _update(self, degraded: Tensor, reference: Tensor) -> Outcome:
        self.module.zero_grad()  # before the forward pass, which needs the memory
        step = self.module(degraded, reference, self._generator)
        total = torch.stack(list(step.losses.values())).sum()
        usable = total.isfinite() & (step.largest_stream < STREAM_LIMIT)
        # A NaN here makes every gradient NaN, in all processes that average theirs: the norm alone then tells.
        with part("backward"):
            return_freed_pages(total.device)
            (total * torch.where(usable, 1.0, math.nan)).backward()
        with part("optimiser"):
            norm, skipped = self._move()
        measured = (*step.losses.values(), total, norm, step.ridge_fallbacks, step.largest_stream, skipped)
        return Outcome(
            names=(*step.losses, "total", *MEASUREMENTS),
            numbers=torch.stack([number.detach().float() for number in measured]),
            result=step.result,
        )

    def _move(self) -> tuple[Tensor, Tensor]:
        """Updates the parameters unless a gradient is not finite; returns the gradient's norm and 1 where it is not."""
        gradients = [parameter.grad for parameter in self.module.parameters() if parameter.grad is not None]
        norm = nn.utils.get_total_norm(gradients)
        skipped = (~norm.isfinite()).float()
        # Both are looked at in the pass that updates.
        self.optimizer.step((norm / (self.config.gradient_clip or math.inf)).clamp_min(1.0), skipped)
        return norm, skipped


@contextmanager
def _convolutions(tf32: bool) -> Iterator[None]:
    """Has cuDNN use one algorithm in forward and recomputation, and round float32 to tf32 or not: it would by default.

    Torch's older setting reaches all that the newer ones do, but cannot be read once a user has made those differ.
    """
    cudnn = torch.backends.cudnn
    benchmark, *precisions = cudnn.benchmark, cudnn.conv.fp32_precision, cudnn.rnn.fp32_precision
    cudnn.benchmark, cudnn.allow_tf32 = False, tf32
    try:
        yield
    finally:
        cudnn.benchmark, cudnn.allow_tf32 = benchmark, "tf32" in precisions
        cudnn.conv.fp32_precision, cudnn.rnn.fp32_precision = precisions


def _return_freed_pages_before_backward(output: Tensor) -> None:
    """Of the pass of the network that ends with output."""

    def hook(gradient: Tensor) -> None:  # what a hook returns takes the place of the gradient
        return_freed_pages(gradient.device)

    if output.requires_grad:
        output.register_hook(hook)


def learning_rate(config: TrainingConfig, step: int) -> float:
    """Of one step: constant, or falling along half a cosine to a hundredth at the last."""
    if config.schedule == "constant":
        return config.learning_rate
    share = step / max(1, config.iterations - 1)
    return config.learning_rate * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * share)))

"""Backpropagation through a chain of reversible steps that keeps its outputs alone.

Source: Gomez, Ren, Urtasun, Grosse, "The Reversible Residual Network: Backpropagation Without Storing Activations",
NeurIPS 2017. There the rebuilt activations differ from those of forward by rounding, and so do gradients; here streams
hold multiples of a quantum (blocks.STREAM_QUANTUM), and what is rebuilt equals what was, bit for bit.
"""

from __future__ import annotations

import contextvars
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

Streams = tuple[Tensor, ...]


@dataclass(frozen=True)
class Gradients:
    """Gradients to streams; that to the stream of the index `negated`, if any, is held with the opposite sign.

    A coupling subtracts the gradient through its residual function from that to one of two streams. Held with opposite
    signs, the two are added instead, by the kernel that computes the former, and stay of opposite signs.
    """

    of: Streams
    negated: int | None = None

    def plain(self) -> Streams:
        """All with their own sign; what is held negated is negated in place."""
        if self.negated is not None:
            self.of[self.negated].neg_()
        return self.of

    def opposed(self) -> Gradients:
        """Of two streams, one negated."""
        return self if self.negated is not None else Gradients((self.of[0], -self.of[1]), negated=1)


@dataclass(frozen=True)
class Rearrangement:
    """A step that moves numbers to new tensors: `apply` and its inverse `undo`, which is also the gradient of it.

    They take all streams and return a tuple of all; with each_stream, which keeps a gradient negated that is held so,
    they take one and return one.
    """

    apply: Callable[..., Streams | Tensor]
    undo: Callable[..., Streams | Tensor]
    each_stream: bool = False

    def run(self, streams: list[Tensor], in_place: bool = False) -> list[Tensor]:
        """Takes the streams out of the list, which callers hold: with each_stream the first, moved, may be freed."""
        if self.each_stream:
            return [self.apply(streams.pop(0)) for _ in range(len(streams))]
        taken = tuple(streams)
        streams.clear()
        return list(self.apply(*taken))

    @property
    def parameters(self) -> list[nn.Parameter]:
        return []

    def backward(self, streams: Streams, gradients: Gradients) -> tuple[Streams, Gradients, list[Tensor]]:
        """Streams and gradients on entering the step, of those on leaving it, and its parameters' gradients."""
        if self.each_stream:
            before = Gradients(tuple(map(self.undo, gradients.of)), gradients.negated)
            return tuple(map(self.undo, streams)), before, []
        return self.undo(*streams), Gradients(self.undo(*gradients.plain())), []


@dataclass(frozen=True)
class Coupling:
    """A reversible block as a step: (a, b) -> (b, a + F(b)), or with inverse=True its inverse (a, b) -> (b - F(a), a).

    block is a blocks.ReversibleBlock: both directions, in place where asked for, and add(residual, x, alpha,
    grad_addend), which is residual + alpha · F(x), and adds grad_addend to the gradient of x.
    Where its parameters are copies in another precision, gradients go to those of source, in their order.
    """

    block: nn.Module
    inverse: bool = False
    source: nn.Module | None = None

    def run(self, streams: list[Tensor], in_place: bool = False) -> list[Tensor]:
        """With in_place, what changes is written over."""
        run = self.block.inverse if self.inverse else self.block
        return list(run(*streams, in_place=in_place))

    # Walking through a module takes as long as one of its kernels on a small map.
    @functools.cached_property
    def parameters(self) -> list[nn.Parameter]:
        return list((self.source or self.block).parameters())

    @functools.cached_property
    def _trained(self) -> list[nn.Parameter]:
        """Parameters of block, of which those of source take part in training."""
        pairs = zip(self.block.parameters(), self.parameters, strict=True)
        return [own for own, parameter in pairs if parameter.requires_grad]

    def backward(self, streams: Streams, gradients: Gradients) -> tuple[Streams, Gradients, list[Tensor]]:
        """As of Rearrangement. F is evaluated once: taking back what was added is also what is differentiated."""
        alpha = -1.0 if self.inverse else 1.0
        changing, keeping = (0, 1) if self.inverse else (1, 0)
        changed, kept = streams[changing], streams[keeping]
        gradients = gradients.opposed()
        grad_changed, grad_kept = gradients.of[changing], gradients.of[keeping]
        x = kept.detach().requires_grad_()
        with torch.enable_grad():
            rebuilt = self.block.add(changed, x, -alpha, grad_kept)
        # rebuilt = changed - alpha F(x) where forward had + alpha F(x): the same derivatives but for their sign.
        grad_kept, *found = torch.autograd.grad(rebuilt, (x, *self._trained), grad_changed)
        if found and gradients.negated == keeping:
            torch._foreach_neg_(found)
        before, grad_before = (rebuilt.detach(), kept), (grad_changed, grad_kept)
        if self.inverse:
            before, grad_before = before[::-1], grad_before[::-1]
        return before, Gradients(grad_before, 1 - gradients.negated), found


Step = Rearrangement | Coupling


def run_chain(steps: Sequence[Step], streams: list[Tensor], reversible: bool = True) -> Sequence[Tensor]:
    """Applies the steps one after another, differentiable in streams and parameters.

    With reversible, backward rebuilds the input of every step from its output, so that beside the outputs no more than
    one step's activations are held at a time, however many steps there are. The streams must then be multiples of
    blocks.STREAM_QUANTUM, so that steps can be undone exactly; a gradient of gradients cannot be taken. Without,
    PyTorch keeps all activations. Streams may be taken out of the list: where no gradients are recorded, they are freed
    as early as nobody else holds them, and those that steps have made are written over.
    """
    if not (reversible and torch.is_grad_enabled()):
        own = False  # streams of whoever called
        for step in steps:
            streams = step.run(streams, in_place=own)
            own = own or (isinstance(step, Rearrangement) and not torch.is_grad_enabled())
        return streams
    parameters = [parameter for step in steps for parameter in step.parameters]
    return _Chain.apply(steps, len(streams), *streams, *parameters)


class _Chain(torch.autograd.Function):
    """Parameters are inputs, and their gradients are returned: whatever watches them sees each pass only once."""

    @staticmethod
    def forward(ctx, steps: Sequence[Step], count: int, *tensors: Tensor) -> Streams:
        ctx.steps = steps
        ctx.count = count
        ctx.circumstances = _Circumstances.here(tensors[0].device)
        streams = run_chain(steps, list(tensors[:count]))  # no gradients are recorded here
        ctx.versions = [parameter._version for parameter in tensors[count:]]
        ctx.save_for_backward(*streams)
        return tuple(streams)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.circumstances.run(_chain_gradients, ctx, gradients)


def _chain_gradients(ctx, of_outputs: Streams) -> tuple[Tensor | None, ...]:
    # Detached: saved outputs remember this very chain as their origin, and the steps' own gradients would pass into it.
    streams = tuple(stream.detach() for stream in ctx.saved_tensors)
    gradients = Gradients(tuple(gradient.detach() for gradient in of_outputs))
    parameters = [parameter for step in ctx.steps for parameter in step.parameters]
    if ctx.versions != [parameter._version for parameter in parameters]:
        raise RuntimeError("a parameter was changed in place since forward: activations would be rebuilt as others")
    found = _room_for_gradients([parameter for parameter in parameters if parameter.requires_grad])
    for step in reversed(ctx.steps):
        streams, gradients, of_parameters = step.backward(streams, gradients)
        trained = [parameter for parameter in step.parameters if parameter.requires_grad]
        if trained:
            torch._foreach_copy_([found[parameter] for parameter in trained], of_parameters)
    return None, None, *gradients.plain(), *(found.get(parameter) for parameter in parameters)


def _room_for_gradients(parameters: list[nn.Parameter]) -> dict[nn.Parameter, Tensor]:
    # In one piece: left among the temporary tensors of every step, small gradients would keep a C library's heap from
    # being used again, a tenth of the memory of a step on a CPU.
    if not parameters:
        return {}
    sizes = [parameter.numel() for parameter in parameters]
    pieces = parameters[0].new_empty(sum(sizes)).split(sizes)
    return {parameter: piece.view_as(parameter) for parameter, piece in zip(parameters, pieces, strict=True)}


@dataclass(frozen=True)
class _Circumstances:
    """What decides, beside its inputs, what F computes: backward may run in another thread, outside of autocast."""

    device_type: str
    autocast: bool
    dtype: torch.dtype
    context: contextvars.Context

    @staticmethod
    def here(device: torch.device) -> _Circumstances:
        kind = device.type
        return _Circumstances(
            kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind), contextvars.copy_context()
        )

    def run(self, function: Callable, *arguments: object) -> object:
        def call() -> object:
            # No cache: a cast kept from forward, where no gradients are recorded, would hide its parameter.
            with torch.autocast(self.device_type, self.dtype, self.autocast, cache_enabled=False):
                return function(*arguments)

        return self.context.run(call)

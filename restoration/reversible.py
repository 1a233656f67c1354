"""Backpropagation through a chain of reversible steps that keeps its outputs alone.

Source: Gomez, Ren, Urtasun, Grosse, "The Reversible Residual Network: Backpropagation Without Storing Activations",
NeurIPS 2017. There the rebuilt activations differ from those of forward by rounding, and so do gradients; here streams
hold multiples of a quantum (blocks.STREAM_QUANTUM), and what is rebuilt equals what was, bit for bit.
"""

from __future__ import annotations

import contextvars
import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from restoration.differentiation import differentiable_once

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
class Evaluation:
    """The parameters of a step at the time of one evaluation, and what tells whether they still are what they were."""

    parameters: Sequence[Tensor] = ()
    # Of the same memory, also where a parameter has been given another since, with a version that both share.
    aliases: Sequence[Tensor] = ()
    versions: Sequence[int] = ()
    block: Sequence[tuple[int, ...]] = ()  # _identities of the parameters that the block computes with

    def check(self) -> None:
        if [alias._version for alias in self.aliases] != self.versions:
            raise RuntimeError("a parameter was changed in place since forward: activations would be rebuilt as others")


# Where a module keeps a parameter.
Place = tuple[dict[str, nn.Parameter | None], str]


def _places(module: nn.Module) -> list[Place]:
    modules = list(module.modules())
    if any(getattr(each, "_is_replica", False) for each in modules):
        raise RuntimeError(
            "run_chain: reversible must be False within nn.DataParallel, whose copies of a module hide its parameters, "
            "or take DistributedDataParallel"
        )
    return [
        (each._parameters, name)
        for each in modules
        for name, parameter in each._parameters.items()
        if parameter is not None
    ]


def _parameters_at(places: Sequence[Place]) -> list[Tensor]:
    """One that is shared counts once, as in Module.parameters."""
    return list(dict.fromkeys(parameters[name] for parameters, name in places))


def _identities(parameters: Sequence[Tensor]) -> list[tuple[int, ...]]:
    return [(id(parameter), parameter.data_ptr(), parameter._version) for parameter in parameters]


def _has_hooks(parameter: Tensor) -> bool:
    return bool(parameter._backward_hooks)


@contextmanager
def _standing_in(places: Sequence[Place], stand_ins: Sequence[Tensor]) -> Iterator[None]:
    """Context in which a module computes with stand_ins, in the order of _parameters_at."""
    own = [parameters[name] for parameters, name in places]
    of = dict(zip(dict.fromkeys(own), stand_ins, strict=True))
    try:
        for parameters, name in places:
            parameters[name] = of[parameters[name]]
        yield
    finally:
        for (parameters, name), parameter in zip(places, own, strict=True):
            parameters[name] = parameter


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

    def evaluation(self) -> Evaluation:
        return Evaluation()

    def backward(
        self, streams: Streams, gradients: Gradients, forward: Evaluation
    ) -> tuple[Streams, Gradients, list[Tensor]]:
        """Streams and gradients on entering the step, of those on leaving it, and its trained parameters' gradients."""
        if self.each_stream:
            before = Gradients(tuple(map(self.undo, gradients.of)), gradients.negated)
            return tuple(map(self.undo, streams)), before, []
        return self.undo(*streams), Gradients(self.undo(*gradients.plain())), []


@dataclass(frozen=True)
class Coupling:
    """A reversible block as a step: (a, b) -> (b, a + F(b)), or with inverse=True its inverse (a, b) -> (b - F(a), a).

    block is a blocks.ReversibleBlock: both directions, in place where asked for, and add(residual, x, alpha,
    grad_addend), which is residual + alpha · F(x), and adds grad_addend to the gradient of x.
    It computes with its parameters and arguments alone: what it draws or remembers would be other when it is evaluated
    again. Where its parameters are copies in another precision, gradients go to those of source, in their order.
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
    def _own_places(self) -> list[Place]:
        return _places(self.block)

    @functools.cached_property
    def _source_places(self) -> list[Place]:
        return self._own_places if self.source is None else _places(self.source)

    def evaluation(self) -> Evaluation:
        """That which is about to be made."""
        parameters = _parameters_at(self._source_places)
        aliases = [parameter.detach() for parameter in parameters]
        versions = [alias._version for alias in aliases]
        return Evaluation(parameters, aliases, versions, _identities(_parameters_at(self._own_places)))

    @contextmanager
    def _as_in(self, forward: Evaluation) -> Iterator[list[Tensor]]:
        """Context in which the block computes with the parameters of then: those that are trained.

        Where its parameters were replaced or rounded anew since, as torch.func.functional_call does, others stand in
        for them; so they do for those with hooks, which are to see the gradient that backward returns, and it alone.
        """
        own = _parameters_at(self._own_places)
        stand_in = _identities(own) != forward.block or any(map(_has_hooks, own))
        if stand_in:
            own = [
                alias.detach() if self.source is None else torch.empty_like(parameter).copy_(alias)
                for parameter, alias in zip(own, forward.aliases, strict=True)
            ]
        trained = [
            each.requires_grad_() for each, then in zip(own, forward.parameters, strict=True) if then.requires_grad
        ]
        with _standing_in(self._own_places, own) if stand_in else nullcontext():
            yield trained

    def backward(
        self, streams: Streams, gradients: Gradients, forward: Evaluation
    ) -> tuple[Streams, Gradients, list[Tensor]]:
        """As of Rearrangement. F is evaluated once: taking back what was added is also what is differentiated."""
        alpha = -1.0 if self.inverse else 1.0
        changing, keeping = (0, 1) if self.inverse else (1, 0)
        changed, kept = streams[changing], streams[keeping]
        gradients = gradients.opposed()
        grad_changed, grad_kept = gradients.of[changing], gradients.of[keeping]
        x = kept.detach().requires_grad_()
        forward.check()
        with self._as_in(forward) as trained, torch.enable_grad():
            rebuilt = self.block.add(changed, x, -alpha, grad_kept)
        # rebuilt = changed - alpha F(x) where forward had + alpha F(x): the same derivatives but for their sign.
        grad_kept, *found = torch.autograd.grad(rebuilt, (x, *trained), grad_changed)
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
    blocks.STREAM_QUANTUM, so that steps can be undone exactly, and blocks must compute the same each time, without
    dropout, spectral_norm and the like; a gradient of gradients cannot be taken. Without, PyTorch keeps all
    activations. Streams may be taken out of the list: where no gradients are recorded, they are freed as early as
    nobody else holds them, and those that steps have made are written over.
    """
    if not (reversible and torch.is_grad_enabled()):
        own = False  # streams of whoever called
        for step in steps:
            streams = step.run(streams, in_place=own)
            own = own or (isinstance(step, Rearrangement) and not torch.is_grad_enabled())
        return streams
    evaluations = [step.evaluation() for step in steps]
    parameters = [parameter for evaluation in evaluations for parameter in evaluation.parameters]
    # A compiler would cut the chain into pieces, which may not write over each other's streams.
    apply = torch._dynamo.disable(_Chain.apply) if torch.compiler.is_compiling() else _Chain.apply
    return apply(steps, evaluations, len(streams), *streams, *parameters)


class _Chain(torch.autograd.Function):
    """Parameters are inputs, and their gradients are returned: whatever watches them sees each pass only once."""

    @staticmethod
    def forward(ctx, steps: Sequence[Step], evaluations: Sequence[Evaluation], count: int, *tensors: Tensor) -> Streams:
        ctx.steps = steps
        ctx.evaluations = evaluations
        ctx.circumstances = _Circumstances.here(tensors[0].device)
        streams = run_chain(steps, list(tensors[:count]))  # no gradients are recorded here
        ctx.save_for_backward(*streams)
        return tuple(streams)

    @staticmethod
    @differentiable_once("ReversibleNetwork: reversible must be False where second derivatives are taken, got True")
    def backward(ctx, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.circumstances.run(_chain_gradients, ctx, gradients)


def _chain_gradients(ctx, of_outputs: Streams) -> tuple[Tensor | None, ...]:
    # Detached: saved outputs remember this very chain as their origin, and the steps' own gradients would pass into it.
    streams = tuple(stream.detach() for stream in ctx.saved_tensors)
    gradients = Gradients(tuple(gradient.detach() for gradient in of_outputs))
    # One for each time that a parameter takes part: autograd adds those of steps that share it.
    found = _room_for_gradients([parameter for each in ctx.evaluations for parameter in each.parameters])
    end = len(found)
    for step, forward in zip(reversed(ctx.steps), reversed(ctx.evaluations), strict=True):
        streams, gradients, of_parameters = step.backward(streams, gradients, forward)
        first = end - len(forward.parameters)
        if of_parameters:
            torch._foreach_copy_([room for room in found[first:end] if room is not None], of_parameters)
        end = first
    return None, None, None, *gradients.plain(), *found


def _room_for_gradients(parameters: list[Tensor]) -> list[Tensor | None]:
    """Memory for that of each parameter which is trained."""
    # In one piece: left among the temporary tensors of every step, small gradients would keep a C library's heap from
    # being used again, a tenth of the memory of a step on a CPU.
    sizes = [parameter.numel() for parameter in parameters if parameter.requires_grad]
    if not sizes:
        return [None] * len(parameters)
    pieces = iter(parameters[0].new_empty(sum(sizes)).split(sizes))
    return [next(pieces).view_as(parameter) if parameter.requires_grad else None for parameter in parameters]


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

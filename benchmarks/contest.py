"""What is measured: an operator's kernels beside its rivals, forward and with gradients, at several sizes."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from compare import KERNELS, as_tuple, public

from restoration_kernels._backend import BACKENDS, OPERATORS, why_not_on
from restoration_kernels._samples import DIFFERENTIABLE, Sample, samples

DIRECTIONS = ("forward", "forward+backward")
# The device that a backend's kernels run on; all else runs on both.
_DEVICES = {"cuda": "cuda", "triton": "cuda", "cpu": "cpu"}


def _unchanged(arguments):
    return arguments


@dataclass(frozen=True, eq=False)
class Rival:
    """One way to compute an operator, or, as a floor, work that takes no longer than any way can.

    Attributes:
        name: what the report calls it.
        function: of the operator's keyword arguments, or of those that prepare made of them.
        prepare: untimed; lays out tensors or builds what a caller would keep from call to call.
        floor: computes something else, and is therefore not checked.
        compiled: is measured through torch.compile as well.
    """

    name: str
    function: Callable
    prepare: Callable[[dict], dict] = _unchanged
    floor: bool = False
    compiled: bool = False

    def through_compiler(self, name, compiler):
        """The same work through torch.compile."""

        def prepare(arguments):
            # torch.compile gives up on a function that it has compiled for several sizes.
            torch.compiler.reset()
            return self.prepare(arguments)

        function = torch.compile(self.function, fullgraph=True, dynamic=False, backend=compiler)
        return Rival(name, function, prepare)


@dataclass(frozen=True, eq=False)
class Contest:
    """An operator and what it is measured against.

    Attributes:
        operator: the public name.
        traffic: of the operator's keyword arguments: for each direction the fewest bytes that have to be read and
            written, however the operator is computed.
        series: samples that differ in nothing but the number of pixels, for the plots. Those of size "model" are
            measured as well.
        rivals: the best plain formulation, and floors. The reference, itself and compiled, and a copy of as many bytes
            are always there.
        dtypes: of the samples' numbers.
    """

    operator: str
    traffic: Callable[..., dict[str, int]]
    series: Sequence[Sample] = ()
    rivals: Sequence[Rival] = ()
    dtypes: Sequence[torch.dtype] = (torch.float32,)

    @functools.cached_property
    def reference(self):
        """The definition, by which every rival is judged."""
        return Rival("reference", self.by("reference"))

    @property
    def differentiable(self):
        """The arguments that gradients are asked for."""
        return DIFFERENTIABLE.get(self.operator, ())

    def by(self, backend):
        """The operator as a backend computes it."""
        return public(self.operator, backend)

    def has(self, backend):
        """Whether a backend has kernels for it."""
        return OPERATORS[self.operator].has(backend)

    def why_not(self, backend, arguments):
        """None if a backend can run this call, else the reason."""
        return OPERATORS[self.operator].why_not(backend, **arguments)

    def samples(self, quick):
        """What is measured."""
        return samples(self.operator, "odd")[:1] if quick else [*samples(self.operator, "model"), *self.series]

    def entries(self, device, quick):
        """The benchmarks for a device; quick ones are of one sample for tests."""
        directions = DIRECTIONS if self.differentiable else DIRECTIONS[:1]
        return [
            Entry(self, rival, sample, dtype, direction, device)
            for sample in self.samples(quick)
            for dtype in self.dtypes
            for direction in directions
            for rival in self._everybody(direction, device, quick)
        ]

    def _everybody(self, direction, device, quick):
        here = [backend for backend in KERNELS if self.has(backend) and _DEVICES[backend] == device]
        kernels = [Rival(backend, self.by(backend)) for backend in here]
        # Generating code takes minutes in all, and shows nothing that a quick run looks for.
        compiler = "aot_eager" if quick else "inductor"
        plain = [rival for rival in self.rivals if rival.compiled]
        return [
            # First: the others are compared with it.
            Rival("copy", copy, functools.partial(self._buffers, direction), floor=True),
            *kernels,
            self.reference,
            self.reference.through_compiler("compiled", compiler),
            *self.rivals,
            *(rival.through_compiler(f"{rival.name} compiled", compiler) for rival in plain),
        ]

    def _buffers(self, direction, arguments):
        """Arguments of a copy that reads and writes the operator's bytes, half of them each."""
        return copy_buffers(self.traffic(**arguments)[direction], _tensors(arguments)[0].device)


@dataclass(frozen=True, eq=False)
class Composite(Contest):
    """What is made of several operators, as a model calls them.

    Attributes:
        operator: what the report calls it.
        function: of a sample's keyword arguments and backend.
        parts: the operators in it; a backend takes part that has kernels for all of them.
        differentiable: the arguments that gradients are asked for.
        quick_sample: for tests.
    """

    function: Callable = None
    parts: Sequence[str] = ()
    differentiable: Sequence[str] = ()
    quick_sample: Sample = None

    def by(self, backend):
        """The function with this backend."""
        return functools.partial(self.function, backend=backend)

    def has(self, backend):
        """Whether a backend has kernels for all parts."""
        return all(OPERATORS[part].has(backend) for part in self.parts)

    def why_not(self, backend, arguments):
        """None if a backend can run here, else the reason."""
        return why_not_on(backend, _tensors(arguments)[0].device) if backend in KERNELS else None

    def samples(self, quick):
        """What is measured."""
        return [self.quick_sample] if quick else self.series


@dataclass(frozen=True)
class Entry:
    """One benchmark."""

    contest: Contest
    rival: Rival
    sample: Sample
    dtype: torch.dtype
    direction: str
    device: str

    def __str__(self):
        return f"{self.group}/{self.rival.name.replace(' ', '_')}"

    @property
    def size(self):
        """The sample, and the dtype where it is not the usual one."""
        name = str(self.dtype).removeprefix("torch.")
        return self.sample.name if name == "float32" else f"{self.sample.name}_{name}"

    @property
    def group(self):
        """What the rivals of one table have in common."""
        return f"{self.contest.operator}/{self.direction}/{self.size}"

    @property
    def in_series(self):
        """Whether a plot shows it."""
        return self.sample in self.contest.series

    @property
    def names(self):
        """The arguments that gradients are asked for."""
        return self.contest.differentiable if self.direction == "forward+backward" else ()

    @property
    def reference(self):
        """The entry that this one is judged by."""
        return replace(self, rival=self.contest.reference)

    @property
    def uncaptured(self):
        """The entry whose memory is measured: one that replays no CUDA graph, whose memory is not counted."""
        return self

    def arguments(self):
        """Keyword arguments of the public function, nobody else's, so that an operator may write to them."""
        shared = _arguments(self.sample, self.dtype, self.device)
        return {name: value.clone() if torch.is_tensor(value) else value for name, value in shared.items()}

    def why_not(self, arguments):
        """None if the rival can run here, else the reason."""
        return self.contest.why_not(self.rival.name, arguments) if self.rival.name in BACKENDS else None

    def call(self, arguments):
        """A function of no arguments that works once on prepared ones, waits for the end, and returns what it found.

        That is the output, or each of several, and, where gradients are timed, those of its product with a fixed random
        tensor, by name.
        """
        leaves = {
            name: arguments[name].detach().requires_grad_()
            for name in self.names
            if torch.is_tensor(arguments.get(name))
        }
        arguments = arguments | leaves
        cotangents = [_cotangent(output) for output in as_tuple(self.rival.function(**arguments))] if leaves else None

        def work():
            with torch.set_grad_enabled(bool(leaves)):
                outputs = as_tuple(self.rival.function(**arguments))
            # A floor need not use every argument.
            unused = self.rival.floor
            wanted = list(leaves.values())
            gradients = torch.autograd.grad(outputs, wanted, cotangents, allow_unused=unused) if leaves else ()
            if self.device == "cuda":
                torch.cuda.synchronize()
            names = ("output", *(f"output {number}" for number in range(1, len(outputs))))
            found = {name: output.detach() for name, output in zip(names, outputs, strict=True)}
            return found | dict(zip(leaves, gradients, strict=True))

        return work

    def description(self, arguments):
        """What a report needs to know of the benchmark."""
        image = _tensors(arguments)[0]
        # [B, C, H, W], or rows [B, S, D], of which each counts as a pixel.
        channels = image.shape[1] if image.dim() == 4 else image.shape[-1]
        return {
            "operator": self.contest.operator,
            "direction": self.direction,
            "size": self.size,
            "rival": self.rival.name,
            "floor": self.rival.floor,
            "in_series": self.in_series,
            "megapixels": image.numel() / channels / 1e6,
            "bytes_moved": self.contest.traffic(**arguments)[self.direction],
        }


def copy(destination, source):
    """The floor of what is limited by memory."""
    return destination.copy_(source)


def copy_buffers(bytes_moved, device):
    """Arguments of a copy that moves so many bytes, those read and those written."""
    # Written to: memory that nobody has written to is not there yet, or all the same page.
    source = torch.randn(max(bytes_moved // 8, 1), device=device)
    return {"destination": source.clone(), "source": source}


def _cotangent(output):
    """The same numbers for every rival and dtype: rounded to the fewest digits that one of them has."""
    generator = torch.Generator(output.device).manual_seed(1)
    numbers = torch.randn(output.shape, generator=generator, device=output.device)
    # Laid out like the output: no rival is made to rearrange what it was given by the next layer.
    return torch.empty_like(output).copy_(numbers.to(torch.bfloat16))


# Rivals follow each other on the same sample.
@functools.lru_cache(maxsize=1)
def _arguments(sample, dtype, device):
    return sample.arguments(dtype, device)


def _tensors(arguments):
    return [value for value in arguments.values() if torch.is_tensor(value)]

"""The reversible network: encode a painting to 32 channels, decode it exactly; colours change in between."""

from __future__ import annotations

import copy
import functools
import logging
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from restoration.blocks import (
    STREAM_LIMIT,
    PixelAdaptiveFeatureExtraction,
    ReversibleBlock,
    round_to_quantum,
    round_to_quantum_,
)
from restoration.convolution import has_fast_bf16, replicate_up_to
from restoration.reversible import Coupling, Rearrangement, Step, Streams, run_chain
from restoration.whitening import Transfer, transfer_statistics
from restoration_kernels import _require as require

logger = logging.getLogger(__name__)

IMAGE_CHANNELS = 3
MINIMUM_SIDE = 8  # a quarter of it, at the coarsest stage, is the least that reflection padding of 1 accepts
SIDE_MULTIPLE = 4  # two squeezes by 2
_SQUEEZED = SIDE_MULTIPLE**2  # pixels that the squeezes turn into channels of one

NETWORK_PRECISIONS = ("fp32", "bf16")


@dataclass(frozen=True)
class Architecture:
    """What decides the shapes and the meaning of the parameters; kept in every checkpoint."""

    half_channels: int = 16  # of one half at full resolution, at least 4; 4 and 16 times as many after the squeezes
    blocks_per_stage: int = 10
    refinement_blocks: int = 2
    dpca: bool = True
    cafe: bool = True

    def __post_init__(self) -> None:
        for name, least in (("half_channels", 4), ("blocks_per_stage", 1), ("refinement_blocks", 0)):
            require.integer("Architecture", name, getattr(self, name), least)
        for name in ("dpca", "cafe"):
            require.boolean("Architecture", name, getattr(self, name))

    def to_dict(self) -> dict[str, int | bool]:
        return asdict(self)


@dataclass(frozen=True)
class Reconstruction:
    """The recoloured painting [B,3,H,W] (not clamped) and how the transfer of its colours went."""

    image: Tensor
    transfer: Transfer


class ReversibleNetwork(nn.Module):
    """encode: [B,3,H,W] in [0,1] -> z [B,32,H',W']; decode is its exact inverse.

    H' and W' are H and W padded by replication to at least 8 and to multiples of 4. The input is first rounded to
    multiples of 2^-16 (blocks.STREAM_QUANTUM); from there on decode(encode(x), size) returns it bit for bit on one
    device, in both precisions of the residual functions, while values stay below 2^8 (blocks.STREAM_LIMIT): of z,
    check_stream_range says so. With reversible, backward rebuilds activations in place of keeping them
    (reversible.run_chain). TypeError and ValueError name the argument that is not as said here.
    """

    def __init__(
        self, architecture: Architecture | None = None, precision: str = "fp32", reversible: bool = True
    ) -> None:
        super().__init__()
        if precision not in NETWORK_PRECISIONS:
            raise ValueError(
                f"ReversibleNetwork: precision must be one of {', '.join(NETWORK_PRECISIONS)}, got {precision!r}"
            )
        self.architecture = architecture = architecture or Architecture()
        self.precision = precision
        self.reversible = reversible

        def blocks(count: int, channels: int) -> nn.ModuleList:
            switches = {"dpca": architecture.dpca, "cafe": architecture.cafe}
            return nn.ModuleList(ReversibleBlock(channels, **switches) for _ in range(count))

        half = architecture.half_channels
        self.stages = nn.ModuleList(blocks(architecture.blocks_per_stage, half * 4**stage) for stage in range(3))
        self.refinement = blocks(architecture.refinement_blocks, half * 4**2)
        self._rounded = _RoundedCopy()
        self._known_couplings: dict[bool, list[list[Coupling]]] | None = None

    def _residual_precision(self, device: torch.device) -> AbstractContextManager[None]:
        if self.precision == "fp32":
            return nullcontext()
        if device.type == "cpu":
            _warn_where_bf16_gains_nothing()
        # No cache: it saves nothing where a pass casts each parameter once, and holds all of them.
        return torch.autocast(device.type, torch.bfloat16, cache_enabled=False)

    def encode(self, image: Tensor, in_order: bool = True) -> Tensor:
        """[B,3,H,W] -> z [B,2*half_channels,H',W'], differentiable.

        With in_order=False the pixels of z lie as the last blocks leave them, [B,2*half_channels,4H',W'/4]: what treats
        all alike, as the transfer does, need not wait for copies that put them in order.
        """
        with self._residual_precision(image.device):
            (code,) = run_chain(self._encoding([_JOIN]), [self._on_grid(image)], self.reversible)
        if in_order:
            return _pixel_shuffle(_pixel_shuffle(code))
        return code.unflatten(1, (-1, _SQUEEZED)).flatten(2, 3)

    def decode(self, z: Tensor, size: Sequence[int] | None = None, in_order: bool = True) -> Tensor:
        """z [B,2*half_channels,H',W'] -> [B,3,H,W], cropped to size = (H, W) where given, differentiable.

        z is rounded to multiples of 2^-16 first. in_order as z was encoded.
        """
        self._check_code(z, size, in_order)
        z = round_to_quantum(z)  # in memory of its own, which the chain may write over
        code = _pixel_unshuffle(_pixel_unshuffle(z)) if in_order else z.unflatten(2, (_SQUEEZED, -1)).flatten(1, 2)
        with self._residual_precision(z.device):
            first, _ = run_chain(self._decoding([_SPLIT]), [code], self.reversible)
        image = first[:, :IMAGE_CHANNELS]
        return image if size is None else image[..., : size[0], : size[1]]

    @torch.no_grad()
    def encode_halves(self, image: Tensor) -> list[Tensor]:
        """z in two parts [B,half_channels,H',W'], without gradients: to join them takes their memory twice more."""
        with self._residual_precision(image.device):
            return run_chain(self._encoding((_UP, _UP)), [self._on_grid(image)])

    @torch.no_grad()
    def decode_halves(self, halves: list[Tensor]) -> Tensor:
        """`decode` of such parts, without gradients: they are rounded in place, and taken out of the list."""
        halves[:] = map(round_to_quantum_, halves)
        with self._residual_precision(halves[0].device):
            first, _ = run_chain(self._decoding((_DOWN, _DOWN)), halves)
        return first[:, :IMAGE_CHANNELS].clone()  # a view would keep all channels

    def _on_grid(self, image: Tensor) -> Tensor:
        """Padded to a size that the network accepts, and rounded to multiples of STREAM_QUANTUM."""
        self._check_image("image", image)
        return round_to_quantum(pad_to_valid_size(image))

    def _check_image(self, name: str, image: Tensor) -> None:
        weight = self.stages[0][0].features.weight
        require.tensor("ReversibleNetwork", name, image, ("B", IMAGE_CHANNELS, "H", "W"), like=("the weights", weight))

    def _check_code(self, z: Tensor, size: Sequence[int] | None, in_order: bool) -> None:
        shape = ("B", 2 * self.architecture.half_channels, "H", "W")
        weight = self.stages[0][0].features.weight
        *_, H, W = require.tensor("ReversibleNetwork", "z", z, shape, like=("the weights", weight))
        if not in_order:
            H, W = H / SIDE_MULTIPLE, W * SIDE_MULTIPLE
        if min(H, W) < MINIMUM_SIDE or H % SIDE_MULTIPLE or W % SIDE_MULTIPLE:
            must = f"have sides that are multiples of {SIDE_MULTIPLE} and at least {MINIMUM_SIDE}, as encode returns it"
            require.fail("ReversibleNetwork", "z", must, require.shape_of(z))
        if size is not None and not (0 < size[0] <= H and 0 < size[1] <= W):
            require.fail("ReversibleNetwork", "size", f"lie between (1, 1) and z's, ({H:g}, {W:g})", tuple(size))

    @contextmanager
    def unchanged_parameters(self) -> Iterator[None]:
        """Context in which no parameter changes: passes find them, and round them, once."""
        self._known_couplings = self._couplings_of_now()
        try:
            yield
        finally:
            self._known_couplings = None

    def _couplings(self, inverse: bool = False) -> list[list[Coupling]]:
        """Of the blocks of each stage, and of the refinement, in the order of encode."""
        return (self._known_couplings or self._couplings_of_now())[inverse]

    def _couplings_of_now(self) -> dict[bool, list[list[Coupling]]]:
        """By whether they are inverse; blocks with the numbers that the parameters have now."""
        if self.reversible and torch._C._are_functorch_transforms_active():
            raise RuntimeError("ReversibleNetwork: reversible must be False within transforms of torch.func, got True")
        sections = nn.ModuleList([*self.stages, self.refinement])
        # Plain autograd differentiates the rounding of each parameter, too.
        copies = self._rounded.of(sections) if self.precision == "bf16" and self.reversible else sections
        return {
            inverse: [
                [Coupling(block, inverse, source) for block, source in zip(*section, strict=True)]
                for section in zip(copies, sections, strict=True)
            ]
            for inverse in (False, True)
        }

    def _encoding(self, ending: Sequence[Step]) -> list[Step]:
        """ending: the steps after the refinement."""
        *stages, refinement = self._couplings()
        steps: list[Step] = [Rearrangement(self._expand, self._reduce)]
        for index, stage in enumerate(stages):
            if index > 0:
                steps.append(_DOWN)
            steps += stage
        return [*steps, *refinement, *ending]

    def _decoding(self, beginning: Sequence[Step]) -> list[Step]:
        """beginning: the steps that undo such an ending."""
        *stages, refinement = self._couplings(inverse=True)
        steps: list[Step] = [*beginning, *reversed(refinement)]
        for index, stage in reversed(list(enumerate(stages))):
            steps += reversed(stage)
            if index > 0:
                steps.append(_UP)
        return steps

    def _expand(self, image: Tensor) -> Streams:
        first = F.pad(image, (0, 0, 0, 0, 0, self.architecture.half_channels - IMAGE_CHANNELS))
        return first, torch.zeros_like(first)

    @staticmethod
    def _reduce(first: Tensor, second: Tensor) -> Streams:
        return (first[:, :IMAGE_CHANNELS],)

    def forward(self, degraded: Tensor, reference: Tensor, strength: float = 1.0) -> Reconstruction:
        """Recolours degraded [B,3,H,W] after reference [B,3,h,w] or [1,3,h,w], in [0,1]; sizes need not match.

        Raises OverflowError where values leave the range in which the network is exact.
        """
        self._check_pictures(degraded, reference)
        content, style = self.encode(degraded), self.encode(reference)
        transfer = transfer_statistics(content, style, strength=strength)
        check_stream_range(content, style, transfer.z)
        return Reconstruction(self.decode(transfer.z, degraded.shape[-2:]), transfer)

    def _check_pictures(self, degraded: Tensor, reference: Tensor) -> None:
        for name, image in (("degraded", degraded), ("reference", reference)):
            self._check_image(name, image)
            check_colours("ReversibleNetwork", name, image)
        if len(reference) not in (1, len(degraded)):
            must = f"have a batch of 1 or of degraded's, {len(degraded)}"
            require.fail("ReversibleNetwork", "reference", must, len(reference))


@functools.cache  # warns once a process
def _warn_where_bf16_gains_nothing() -> None:
    if not has_fast_bf16():
        logger.warning(
            "bf16 gains nothing over fp32 here: PyTorch has no library of its convolutions for this processor, and "
            "they are computed in float32"
        )


class _RoundedCopy:
    """A copy of blocks whose convolutions have their weights in bfloat16: rounded once a pass of the network, or step.

    Autocast would do it in every block, forward and backward, and as often turn gradients into float32. The copy has
    the forward hooks that the blocks had when it was made. Each pass writes to it, so that one thread alone may train.
    """

    def __init__(self) -> None:
        self._copy: nn.Module | None = None
        self._structure: object = None

    # A copy made in inference mode could not be written to in any other. To leave that mode switches gradients on, so
    # no_grad comes second.
    @torch.inference_mode(False)
    @torch.no_grad()
    def of(self, blocks: nn.Module) -> nn.Module:
        """The copy with the numbers that the blocks have now; on one device always the same tensors."""
        if (structure := _structure(blocks)) != self._structure:
            self._copy, self._structure = copy.deepcopy(blocks).requires_grad_(), structure
            for module in self._copy.modules():
                if isinstance(module, PixelAdaptiveFeatureExtraction):
                    module.to(torch.bfloat16)
                    # As its maps are: else every convolution would bring its weights into their layout.
                    module.value_and_guide.to(memory_format=torch.channels_last)
        torch._foreach_copy_(list(self._copy.parameters()), list(blocks.parameters()))
        return self._copy


def _structure(module: nn.Module) -> object:
    """All but the numbers: a parametrisation, for one, changes the class of what it is registered for."""
    modules = [(name, type(each)) for name, each in module.named_modules()]
    return modules, [(name, each.shape, each.device) for name, each in module.named_parameters()]


def _join(first: Tensor, second: Tensor) -> Streams:
    return (torch.cat((first, second), 1),)


def _split(code: Tensor) -> Streams:
    first, second = (half.contiguous() for half in code.chunk(2, 1))  # no copies in a batch of one
    return first, second


# PyTorch's own of the two move number by number on a CPU.
def _pixel_unshuffle(x: Tensor) -> Tensor:
    """[B,C,2H,2W] -> [B,4C,H,W]."""
    return x.unflatten(3, (-1, 2)).unflatten(2, (-1, 2)).permute(0, 1, 3, 5, 2, 4).flatten(1, 3)


def _pixel_shuffle(x: Tensor) -> Tensor:
    """[B,4C,H,W] -> [B,C,2H,2W]."""
    by_pairs = x.device.type == "cpu" and not torch.compiler.is_compiling()  # which writes into no view
    return _PixelShuffle.apply(x) if by_pairs else F.pixel_shuffle(x, 2)


class _PixelShuffle(torch.autograd.Function):
    @staticmethod
    def setup_context(ctx, inputs: tuple[Tensor], output: Tensor) -> None:
        pass

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        left, right = x.unflatten(1, (-1, 2, 2)).permute(3, 0, 1, 4, 2, 5)
        pairs = x.new_empty(*left.shape, 2)
        # Neighbouring columns are the parts of a complex number, which PyTorch interleaves in vectors.
        torch.complex(left, right, out=torch.view_as_complex(pairs))
        return pairs.flatten(4, 5).flatten(2, 3)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return _pixel_unshuffle(gradient)


_DOWN = Rearrangement(_pixel_unshuffle, _pixel_shuffle, each_stream=True)
_UP = Rearrangement(_pixel_shuffle, _pixel_unshuffle, each_stream=True)
_JOIN = Rearrangement(_join, _split)
_SPLIT = Rearrangement(_split, _join)


def pad_to_valid_size(image: Tensor) -> Tensor:
    """Replicates the right and lower edges of [B,C,H,W] up to a size that the network accepts."""
    return replicate_up_to(image, MINIMUM_SIDE, SIDE_MULTIPLE)


def check_colours(caller: str, name: str, image: Tensor) -> None:
    """ValueError where values lie outside of [0, 1], as those of 0 to 255, or are NaN. Waits for the device."""
    least, most = (value.item() for value in image.aminmax())
    if not (least >= 0 and most <= 1):
        require.fail(caller, name, "lie in [0, 1]", f"values from {least:g} to {most:g}")


def largest_value(streams: Iterable[Tensor]) -> Tensor:
    """Largest absolute value of all streams, on their device, without gradients; NaN where there is one."""
    return torch.stack([torch.linalg.vector_norm(stream.detach(), math.inf) for stream in streams]).amax()


def check_stream_range(*streams: Tensor) -> float:
    """Largest absolute value; raises OverflowError where sums of stream values may have lost their exactness."""
    largest = largest_value(streams).item()
    if not largest < STREAM_LIMIT:
        raise OverflowError(
            f"the network's values reach {largest:.3g}, past the {STREAM_LIMIT:g} below which its arithmetic is "
            "exact: these weights do not suit this picture"
        )
    return largest

"""Contrastive coherence preserving loss: differences of neighbouring features, told apart from one another."""

import functools
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import _backend, _checks, _launch, _registration
from .ccpl_info_nce import info_nce
from .ccpl_reference import neighbor_difference_reference

_OPERATOR = _backend.Operator("neighbor_difference", neighbor_difference_reference)

# Bounds the gradient of the unit vector where a difference vanishes, yet shortens one of norm 0.1 by less than 1e-6.
UNIT_LENGTH_EPS = 1e-4


def sample_neighbors(
    height: int,
    width: int,
    num_anchors: int,
    *,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
) -> tuple[Tensor, Tensor]:
    """Draws places of a map, without repetition, together with the eight places around each.

    Args:
        height, width: size of the map, at least 3 x 3 and at most 2^40 places.
        num_anchors: how many, N: at most the (height - 2)·(width - 2) places that have eight neighbours.
        generator: source of the random numbers, on any device; None is torch's own on device. The same state gives
            the same places. torch.compile can put none into a graph: with fullgraph=True it must be None.
        device: of the result; None is the generator's, or torch's default device.

    Returns:
        anchors [N] and neighbors [N, 8], int64 places row·width + column; neighbours row by row from the upper left.
        Every set of N places is equally likely. Time and memory grow with N, not with the map. The numbers are drawn
        where the generator is: with one on the result's device nothing waits for a GPU, and a CUDA graph can hold it.

    Raises:
        TypeError, ValueError: an argument is not as said here.
    """
    _checks.sample_neighbors(height, width, num_anchors, generator, device)
    return _sample_maps([(height, width)], [num_anchors], generator, device)[0]


def _sample_maps(sizes, counts, generator, device):
    """:func:`sample_neighbors` for several maps in as many operations as for one: each is a launch on a GPU."""
    source = device if generator is None else generator.device
    width = _column([width for _, width in sizes], source)
    spare = [(height - 2) * (width - 2) - count for (height, width), count in zip(sizes, counts, strict=True)]
    inner = _draw_without_repetition(_column(spare, source), max(counts), generator)
    anchors = torch.add(inner, inner // (width - 2), alpha=2) + (width + 1)
    steps = torch.arange(-1, 2, device=source)
    around = (steps[:, None] * width[:, :, None] + steps).flatten(1)
    neighbors = anchors[:, :, None] + torch.cat([around[:, None, :4], around[:, None, 5:]], dim=2)
    return [
        (of_map[:count].to(device), around_them[:count].to(device))
        for of_map, around_them, count in zip(anchors, neighbors, counts, strict=True)
    ]


def _column(numbers, device):
    """[len(numbers), 1]. Not copied from the host, for which a GPU would be waited for, and which no graph can hold."""
    return torch.stack([torch.full((1,), number, device=device) for number in numbers])


def _draw_without_repetition(spare, count, generator):
    """A random subset for each row, by Floyd's method: draw i is one of the first spare + i + 1 places; if taken,
    spare + i is. spare [maps, 1]: places less draws; a row of fewer draws than count [maps, count] ends with others."""
    index = torch.arange(count, device=spare.device)
    last = index + spare
    # One part in 2^62 / places favours the first places: of those that are let in, one in 2^22.
    # torch.compile knows no random numbers of a varying count with a generator, None included.
    source = {} if generator is None else {"generator": generator}
    drawn = torch.randint(2**62, last.shape, device=spare.device, **source) % (last + 1)
    ordered, order = drawn.sort(stable=True)
    repeated = order.gather(1, torch.searchsorted(ordered, drawn)) != index
    # What was drawn is taken if it was drawn before, or if it is the spare place of an earlier draw that needed it:
    # an answer that stands at the end of a chain of draws, each of which halves the length of in each round.
    earlier = torch.where(repeated | (drawn < spare), index, drawn - spare)
    for _ in range((count - 1).bit_length()):
        earlier = earlier.gather(1, earlier)
    return torch.where(repeated.gather(1, earlier), last, drawn)


def neighbor_difference(features: Tensor, anchors: Tensor, neighbors: Tensor, *, backend: str | None = None) -> Tensor:
    """Differences between the features at some places and at their neighbours.

    Row 8n + j = features at anchors[n] - features at neighbors[n, j].

    Args:
        features: [B, C, H, W] of any floating dtype.
        anchors, neighbors: places row·W + column as int64, [N] and [N, 8], on the device of features, as
            :func:`sample_neighbors` gives them. That they lie inside the map, anchors off its border, is checked, which
            waits for a GPU. Of a graph that torch.compile made, the kernel checks that they lie inside: on "cpu" a
            ValueError, on "cuda" the end of the CUDA context, on "triton" NaN.
        backend: "cuda", "triton", "cpu" or "reference"; None leaves the choice to :func:`use_backend`.

    Returns:
        [B, 8N, C] in the dtype of features. Gradients: features, as one dense tensor in their layout, NCHW or
        channels-last (the reference: in whichever autograd makes). Places may repeat; where they do, their gradients
        are added up in an order that is fixed on the CPU, for half precision, and under
        torch.use_deterministic_algorithms(True). The reference can be differentiated twice.

    Raises:
        TypeError, ValueError: an argument is not as said here.
        RuntimeError: the backend asked for cannot run this call.

    Source: Wu, Zhu, Du, Bai, CCPL: Contrastive Coherence Preserving Loss for Versatile Style Transfer (2022).
    """
    _checks.neighbor_difference(features, anchors, neighbors)
    return _OPERATOR.run(backend, features=features, anchors=anchors, neighbors=neighbors)


def ccpl_loss(
    features: Sequence[Tensor],
    targets: Sequence[Tensor],
    num_anchors: int | Sequence[int] = 64,
    temperature: float = 0.07,
    *,
    projections: Sequence[nn.Module] | nn.ModuleList | None = None,
    generator: torch.Generator | None = None,
    backend: str | None = None,
) -> Tensor:
    """Contrastive coherence preserving loss of the feature maps of two images, from several layers of a network.

    For each layer: anchors are drawn once for both images, the differences to their eight neighbours are projected,
    brought to unit length as d / sqrt(|d|² + eps²) with eps = 1e-4, and compared by :func:`info_nce`; the positive of
    a row is the same place in targets, the negatives are all other rows of that image. Mean over rows and batch, sum
    over layers.

    Args:
        features: list of [B, C, H, W], one a layer, at least 3 x 3 pixels.
        targets: list like features; they and their projections are constants.
        num_anchors: N for every layer, or a list with one number for each. Each at most (H - 2)·(W - 2).
        temperature: τ, at least 1e-30.
        projections: one module for each layer, [B, 8N, C] -> [B, 8N, D] of any floating dtype, applied to both sides;
            None leaves them out.
        generator: source of the anchors, see :func:`sample_neighbors`. None inside of torch.compile(fullgraph=True),
            and within torch.utils.checkpoint, which evaluates twice: it takes back to the same anchors PyTorch's own
            source alone.
        backend: "cuda", "triton", "cpu" or "reference"; None leaves the choice to :func:`use_backend`.

    Returns:
        A scalar, at least 0, of float32, or float64 where what projections return (without them, features) is that; 0
        for an empty batch. Gradients: features and projections. In a flat region, where differences are zero, the
        gradient to a projected difference stays finite: no longer than 2/(τ·eps) = 2.9e5 at τ = 0.07, divided by the
        number of rows B·8N.

    Raises:
        TypeError, ValueError: an argument is not as said here.
        RuntimeError: the backend asked for cannot run this call.

    Source: Wu, Zhu, Du, Bai (2022), as used by Sun, Zhang, Wu (2025), doi 10.1038/s40494-025-01595-0, eq. 7.
    """
    if backend is not None:
        _checks.backend("ccpl_loss", backend, "the argument", _backend.BACKENDS)
    counts, projections = _checks.ccpl_loss(features, targets, num_anchors, temperature, projections, generator)
    places = _sample_maps([maps.shape[2:] for maps in features], counts, generator, features[0].device)
    return sum(
        layer_loss(maps, target, *drawn, projection, temperature, backend, layer)
        for layer, (maps, target, drawn, projection) in enumerate(
            zip(features, targets, places, projections, strict=True)
        )
    )


def layer_loss(features, target, anchors, neighbors, projection, temperature, backend, layer=0):
    """What one layer adds to :func:`ccpl_loss`, at given places."""

    def directions(maps):
        # Straight to the operator: places just drawn need no check, for which a GPU would have to be waited for.
        differences = _OPERATOR.run(backend, features=maps, anchors=anchors, neighbors=neighbors)
        if projection is None:
            return _unit_length(differences)
        projected = projection(differences)
        _checks.ccpl_projection(layer, differences, projected)
        return _unit_length(projected)

    with torch.no_grad():
        key = directions(target)
    losses = info_nce(directions(features), key, temperature, backend=backend)
    # The mean of no losses would be NaN.
    return losses.mean() if len(losses) else losses.sum()


def _unit_length(vectors):
    wide = vectors.to(torch.promote_types(vectors.dtype, torch.float32))
    width = wide.shape[-1]
    # One kernel forward and one backward on a GPU.
    return F.rms_norm(wide, (width,), eps=UNIT_LENGTH_EPS**2 / width) / math.sqrt(width)


class CCPLoss(nn.Module):
    """:func:`ccpl_loss` with one projection head for each layer: Linear C -> C, ReLU, Linear C -> C/4.

    The heads, ``projections``, are trained together with the network that makes the features.

    Args:
        channels: C of each layer; the default is VGG19's relu1_1, relu2_1, relu3_1, relu4_1.
        num_anchors, temperature: as for :func:`ccpl_loss`.
        project: False leaves the heads out.
        device, dtype: of the heads, a floating dtype; None is torch's own default.

    Raises:
        TypeError, ValueError: an argument is not as said here.

    Source: Wu, Zhu, Du, Bai (2022).
    """

    def __init__(
        self,
        channels: Sequence[int] = (64, 128, 256, 512),
        num_anchors: int | Sequence[int] = 64,
        temperature: float = 0.07,
        project: bool = True,
        *,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _checks.ccpl_loss_module(channels, num_anchors, temperature, project, device, dtype)
        self.channels = tuple(channels)
        self.num_anchors = num_anchors
        self.temperature = temperature
        heads = (_projection_head(count, device=device, dtype=dtype) for count in channels)
        self.projections = nn.ModuleList(heads) if project else None

    def forward(
        self,
        features: Sequence[Tensor],
        targets: Sequence[Tensor],
        *,
        generator: torch.Generator | None = None,
        backend: str | None = None,
    ) -> Tensor:
        """The loss of lists of [B, C, H, W], with C the channels given at the start, in the heads' dtype or autocast.

        Inside of torch.compile(fullgraph=True) generator must be None, see :func:`sample_neighbors`.
        """
        if self.projections is not None:
            _checks.ccpl_loss_module_call(features, self.channels)
        return ccpl_loss(
            features,
            targets,
            self.num_anchors,
            self.temperature,
            projections=self.projections,
            generator=generator,
            backend=backend,
        )


def _projection_head(channels, **kind):
    wide, narrow = (nn.Linear(channels, count, **kind) for count in (channels, max(channels // 4, 1)))
    return nn.Sequential(wide, nn.ReLU(), narrow)


# The kernels of neighbor_difference. maps is what they call features in either layout, contiguous: [B, C, H, W], or
# [B, H, W, C] where channels_last; places [N, 9] holds each anchor and its neighbours.


def _triton_cannot(features, **_):
    # CUDA takes 65,535 blocks, of 64 channels, along the second axis of a grid.
    return "its kernel takes at most 2^21 channels" if features.shape[1] > 2**21 else None


def _allocate_forward(maps, places, channels_last):
    return (maps.new_empty(maps.shape[0], 8 * places.shape[0], maps.shape[3 if channels_last else 1]),)


def _launch_forward(backend, outputs, maps, places, channels_last):
    (y,) = outputs
    tensors = {"x": maps, "places": places, "y": y}
    _launch_kernel("forward", backend, tensors, maps.shape, len(places), channels_last)


def _allocate_backward(grad_y, places, height, width, channels_last, wanted):
    B, _, C = grad_y.shape
    shape = (B, height, width, C) if channels_last else (B, C, height, width)
    return [grad_y.new_empty(shape) if wish else None for wish in wanted]


def _launch_backward(backend, outputs, grad_y, places, height, width, channels_last, wanted):
    (grad_x,) = outputs
    entries, order = places.flatten(), None
    _launch.fill_with_zeros(grad_x)
    # Sums of half precision are kept in float32, to which the gradient's memory cannot be added atomically.
    atomic = backend != "cpu" and grad_y.dtype in (torch.float32, torch.float64)
    if not atomic or torch.are_deterministic_algorithms_enabled():
        entries, order = entries.sort(stable=True)
    tensors = {"grad_y": grad_y, "places": entries, "order": order, "grad_x": grad_x}
    _launch_kernel("backward", backend, tensors, grad_x.shape, len(places), channels_last)


def _launch_kernel(direction, backend, tensors, shape, anchors, channels_last):
    batch, channels, height, width = (shape[axis] for axis in ((0, 3, 1, 2) if channels_last else range(4)))
    channel_stride, place_stride = (1, channels) if channels_last else (height * width, 1)
    sizes = {
        "batch": batch,
        "channels": channels,
        "map_places": height * width,
        "anchors": anchors,
        "channel_stride": channel_stride,
        "place_stride": place_stride,
    }
    if backend == "triton":
        getattr(_launch.triton("ccpl"), direction)(**tensors, **sizes)
        return
    dtype = tensors["x" if direction == "forward" else "grad_y"].dtype
    _launch.run(f"neighbor_difference_{direction}", backend, tensors, sizes, dtype)


def _save_for_backward(inputs, outputs):
    maps, places, channels_last, _ = inputs
    height, width = maps.shape[1:3] if channels_last else maps.shape[2:]
    return places, height, width, channels_last


_forward = _registration.define(
    "neighbor_difference(Tensor maps, Tensor places, bool channels_last, str backend) -> Tensor",
    _allocate_forward,
    _launch_forward,
)
_backward = _registration.define(
    "neighbor_difference_backward(Tensor grad_y, Tensor places, SymInt height, SymInt width, bool channels_last,"
    " bool[] wanted, str backend) -> Tensor[]",
    _allocate_backward,
    _launch_backward,
)
_differentiable = _registration.differentiate(_forward, _backward, _save_for_backward, count=1)


def _run(backend, features, anchors, neighbors):
    channels_last = not features.is_contiguous() and features.is_contiguous(memory_format=torch.channels_last)
    maps = features.permute(0, 2, 3, 1) if channels_last else features
    places = torch.cat([anchors[:, None], neighbors], dim=1)
    return _differentiable(maps, places, channels_last, backend)


_OPERATOR.register("cuda", functools.partial(_run, "cuda"))
_OPERATOR.register("triton", functools.partial(_run, "triton"), _triton_cannot)
_OPERATOR.register("cpu", functools.partial(_run, "cpu"), lambda features, **_: _backend.no_float16(features))

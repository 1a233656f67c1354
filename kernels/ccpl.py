"""Contrastive coherence preserving loss: differences of neighbouring features, told apart from one another."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from . import _backend, _checks
from .ccpl_reference import info_nce_reference, neighbor_difference_reference

_NEIGHBOR_DIFFERENCE = _backend.Operator("neighbor_difference", neighbor_difference_reference)
_INFO_NCE = _backend.Operator("info_nce", info_nce_reference)

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
        height, width: size of the map, at least 3 x 3.
        num_anchors: how many, N: at most the (height - 2)·(width - 2) places that have eight neighbours.
        generator: source of the random numbers, on any device; None is torch's own on the CPU. The same state gives
            the same places.
        device: of the result; None is the generator's.

    Returns:
        anchors [N] and neighbors [N, 8], int64 places row·width + column; neighbours row by row from the upper left.
        Every set of N places is equally likely. Time and memory grow with N, not with the map. The numbers are drawn on
        the host, so torch.compile(fullgraph=True) cannot trace this function.

    Raises:
        TypeError, ValueError: an argument is not as said here.
    """
    _checks.sample_neighbors(height, width, num_anchors, generator)
    inner = _draw_without_repetition((height - 2) * (width - 2), num_anchors, generator)
    anchors = (inner // (width - 2) + 1) * width + inner % (width - 2) + 1
    steps = [row * width + column for row in (-1, 0, 1) for column in (-1, 0, 1) if (row, column) != (0, 0)]
    neighbors = anchors[:, None] + torch.tensor(steps, device=anchors.device)
    return anchors.to(device), neighbors.to(device)


def _draw_without_repetition(places, count, generator):
    device = "cpu" if generator is None else generator.device
    # Up to half of the places, repetitions are few: 1.4·count draws give count different ones, on average.
    if 2 * count > places:
        return torch.randperm(places, generator=generator, device=device)[:count]
    drawn = {}
    while len(drawn) < count:
        draws = torch.randint(places, (count,), generator=generator, device=device)
        # A dictionary keeps the order of the first appearances, so cutting it off later favours no place.
        drawn |= dict.fromkeys(draws.tolist())
    return torch.tensor(list(drawn)[:count], device=device)


def neighbor_difference(features: Tensor, anchors: Tensor, neighbors: Tensor, *, backend: str | None = None) -> Tensor:
    """Differences between the features at some places and at their neighbours.

    Row 8n + j = features at anchors[n] - features at neighbors[n, j].

    Args:
        features: [B, C, H, W] of any floating dtype.
        anchors, neighbors: places row·W + column as int64, [N] and [N, 8], on the device of features, as
            :func:`sample_neighbors` gives them. That they lie inside the map is checked, which waits for a GPU;
            not while torch.compile traces.
        backend: "cuda", "triton", "cpu" or "reference"; None leaves the choice to :func:`use_backend`.

    Returns:
        [B, 8N, C] in the dtype of features. Gradients: features, as one dense tensor; the reference can be
        differentiated twice.

    Raises:
        TypeError, ValueError: an argument is not as said here.
        RuntimeError: the backend asked for cannot run this call.

    Source: Wu, Zhu, Du, Bai, CCPL: Contrastive Coherence Preserving Loss for Versatile Style Transfer (2022).
    """
    _checks.neighbor_difference(features, anchors, neighbors)
    return _NEIGHBOR_DIFFERENCE.run(backend, features=features, anchors=anchors, neighbors=neighbors)


def info_nce(query: Tensor, key: Tensor, temperature: float = 0.07, *, backend: str | None = None) -> Tensor:
    """Contrastive loss of every row: how well query i finds key i among all keys of its image.

    loss[b, i] = -log(exp(q_i·k_i / τ) / sum over j of exp(q_i·k_j / τ)). Rows are taken as they are, never normalised.

    Args:
        query, key: [B, S, D] of the same floating dtype. Under torch.autocast, half precision is cast to float32.
        temperature: τ, positive.
        backend: "cuda", "triton", "cpu" or "reference"; None leaves the choice to :func:`use_backend`.

    Returns:
        [B, S], in the dtype of query, or float32 where that is of half precision; at least 0. Products and sums are at
        least float32. The reference holds 3·B·S² numbers. Gradients: query only, key is a constant; for rows of unit
        length that of loss[b, i] is no longer than 2/τ. The reference can be differentiated twice.

    Raises:
        TypeError, ValueError: an argument is not as said here.
        RuntimeError: the backend asked for cannot run this call.

    Source: Sun, Zhang, Wu (2025), doi 10.1038/s40494-025-01595-0, eq. 7, without its sum over rows.
    """
    query, key = _backend.autocast((query, key), torch.float32)
    _checks.info_nce(query, key, temperature)
    return _INFO_NCE.run(backend, query=query, key=key, temperature=temperature)


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
        temperature: τ, positive.
        projections: one module for each layer, [B, 8N, C] -> [B, 8N, D], applied to both sides; None leaves them out.
        generator: source of the anchors, see :func:`sample_neighbors`.
        backend: "cuda", "triton", "cpu" or "reference"; None leaves the choice to :func:`use_backend`.

    Returns:
        A scalar, at least 0, of float32, or float64 where the features are that. Gradients: features and projections.
        In a flat region, where differences are zero, the gradient to a projected difference stays finite: no longer
        than 2/(τ·eps) = 2.9e5 at τ = 0.07, divided by the number of rows B·8N.

    Raises:
        TypeError, ValueError: an argument is not as said here.
        RuntimeError: the backend asked for cannot run this call.

    Source: Wu, Zhu, Du, Bai (2022), as used by Sun, Zhang, Wu (2025), doi 10.1038/s40494-025-01595-0, eq. 7.
    """
    counts, projections = _checks.ccpl_loss(features, targets, num_anchors, temperature, projections)
    layers = zip(features, targets, counts, projections, strict=True)
    return sum(_layer_loss(*layer, temperature, generator, backend) for layer in layers)


def _layer_loss(features, target, num_anchors, projection, temperature, generator, backend):
    height, width = features.shape[2:]
    anchors, neighbors = sample_neighbors(height, width, num_anchors, generator=generator, device=features.device)

    def directions(maps):
        # Straight to the operator: places just drawn need no check, for which a GPU would have to be waited for.
        differences = _NEIGHBOR_DIFFERENCE.run(backend, features=maps, anchors=anchors, neighbors=neighbors)
        return _unit_length(differences if projection is None else projection(differences))

    with torch.no_grad():
        key = directions(target)
    return info_nce(directions(features), key, temperature, backend=backend).mean()


def _unit_length(vectors):
    wide = vectors.to(torch.promote_types(vectors.dtype, torch.float32))
    return wide / (wide.square().sum(-1, keepdim=True) + UNIT_LENGTH_EPS**2).sqrt()


class CCPLoss(nn.Module):
    """:func:`ccpl_loss` with one projection head for each layer: Linear C -> C, ReLU, Linear C -> C/4.

    The heads, ``projections``, are trained together with the network that makes the features.

    Args:
        channels: C of each layer; the default is VGG19's relu1_1, relu2_1, relu3_1, relu4_1.
        num_anchors, temperature: as for :func:`ccpl_loss`.
        project: False leaves the heads out.

    Source: Wu, Zhu, Du, Bai (2022).
    """

    def __init__(
        self,
        channels: Sequence[int] = (64, 128, 256, 512),
        num_anchors: int | Sequence[int] = 64,
        temperature: float = 0.07,
        project: bool = True,
    ) -> None:
        super().__init__()
        self.num_anchors = num_anchors
        self.temperature = temperature
        self.projections = nn.ModuleList(map(_projection_head, channels)) if project else None

    def forward(
        self,
        features: Sequence[Tensor],
        targets: Sequence[Tensor],
        *,
        generator: torch.Generator | None = None,
        backend: str | None = None,
    ) -> Tensor:
        """The loss of lists of [B, C, H, W], with C the channels given at the start."""
        return ccpl_loss(
            features,
            targets,
            self.num_anchors,
            self.temperature,
            projections=self.projections,
            generator=generator,
            backend=backend,
        )


def _projection_head(channels):
    return nn.Sequential(nn.Linear(channels, channels), nn.ReLU(), nn.Linear(channels, max(channels // 4, 1)))

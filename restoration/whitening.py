"""Cholesky transfer of first and second moments between encoded paintings (cWCT).

Source: Wen, Gao, Zou, "CAP-VSTNet", CVPR 2023, whose cWCT it is; the ridge is this project's. Moments and
factors are in float64: whitening a nearly grey painting divides by standard deviations a thousandth of the largest.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from restoration.differentiation import differentiable_once
from restoration_kernels import _require as require

# Multiples of trace/C added to the diagonal, tried in this order; the last one factors any finite covariance.
RIDGE_LADDER = (1e-6, 1e-4, 1e-2, 1.0)
# Variance of half a stream quantum: below it, spread is the rounding's own, and a flat picture has trace 0.
RIDGE_FLOOR = 2.0**-34
# Pixels treated at a time, in whole rows: 32 channels of them are 8 MB in float64, whatever the picture's size.
CHUNK = 1 << 15


@dataclass(frozen=True)
class Moments:
    """mean [B,C] and covariance [B,C,C], float64, over pixels (weighted by a region's mask where one was given)."""

    mean: Tensor
    covariance: Tensor


@dataclass(frozen=True)
class Transfer:
    """The transferred z and, for content and style, the index into RIDGE_LADDER that each image needed, int64 [B]."""

    z: Tensor
    content_ridge: Tensor
    style_ridge: Tensor

    def fallbacks(self) -> Tensor:
        """Number of images, as a tensor on the device, whose covariance needed more than the everyday ridge."""
        return torch.maximum(self.content_ridge, self.style_ridge).gt(0).sum()


def moments(z: Tensor, mask: Tensor | None = None) -> Moments:
    """Mean and covariance over the pixels of z [B,C,H,W]; mask [B,H,W] or [H,W], bool, restricts them to a region.

    Differentiable once, and only z is kept for it.
    """
    return Moments(*_Moments.apply(z, _weights(z, mask)))


@torch.no_grad()
def moments_of_parts(parts: Sequence[Tensor], mask: Tensor | None = None) -> Moments:
    """`moments` of z whose channels lie in several tensors [B,·,H,W], without gradients, and without joining them."""
    mean, covariance, _ = _measure(parts, _weights(parts[0], mask))
    return Moments(mean[..., 0], covariance)


def _weights(z: Tensor, mask: Tensor | None) -> Tensor | None:
    return None if mask is None else mask.to(z.device).expand(z.shape[0], *z.shape[2:])[:, None].double()


class _Moments(torch.autograd.Function):
    """Weighted mean and covariance of z [B,C,H,W], weights [B,1,H,W]."""

    @staticmethod
    def forward(ctx, z: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor]:
        mean, covariance, ctx.count = _measure([z], weights)
        ctx.save_for_backward(z, weights, mean)
        return mean[..., 0], covariance

    @staticmethod
    @differentiable_once("moments: has no second derivatives")
    def backward(ctx, grad_mean: Tensor, grad_covariance: Tensor) -> tuple[Tensor, None]:
        z, weights, mean = ctx.saved_tensors
        # The covariance's gradient through the mean is a sum of deviations from it, which is zero.
        symmetric = (grad_covariance + grad_covariance.transpose(1, 2)) / ctx.count
        shift = grad_mean[..., None] / ctx.count - torch.bmm(symmetric, mean)
        parts = []
        for piece, weight in _pieces([z], weights):
            part = torch.baddbmm(shift, symmetric, piece)
            parts.append((part if weight is None else part * weight).to(z.dtype))
        return torch.cat(parts, 2).reshape(z.shape), None


def _measure(parts: Sequence[Tensor], weights: Tensor | None) -> tuple[Tensor, Tensor, Tensor | int]:
    """Weighted mean [B,C,1] and covariance [B,C,C], in float64, and the sum of weights; parts as of `_pieces`."""
    B, C = len(parts[0]), sum(part.shape[1] for part in parts)
    count = parts[0][0, 0].numel() if weights is None else weights.sum((2, 3)).clamp_min(1.0)[..., None]
    total = parts[0].new_zeros(B, C, 1, dtype=torch.float64)
    for piece, weight in _pieces(parts, weights):
        total += (piece if weight is None else piece * weight).sum(2, keepdim=True)
    mean = total / count
    covariance = parts[0].new_zeros(B, C, C, dtype=torch.float64)
    for piece, weight in _pieces(parts, weights):
        piece -= mean
        covariance.baddbmm_(piece if weight is None else piece * weight, piece.transpose(1, 2))
    return mean, covariance / count, count


def _pieces(parts: Sequence[Tensor], weights: Tensor | None) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Copies in float64 [B,C,·] of the channels of all parts [B,·,H,W], some rows at a time, and their weights."""
    for rows in _strips(parts[0]):
        strips = [part[:, :, rows] for part in parts]
        strip = torch.cat(strips, 1) if len(strips) > 1 else strips[0]
        yield strip.to(torch.float64, copy=True).flatten(2), None if weights is None else weights[:, :, rows].flatten(2)


def _strips(z: Tensor) -> list[slice]:
    """The rows of z [B,C,H,W], CHUNK pixels at a time."""
    height, width = z.shape[2:]
    rows = max(1, CHUNK // width)
    return [slice(top, top + rows) for top in range(0, height, rows)]


def blend(parts: Sequence[Moments], weights: Sequence[float]) -> Moments:
    """Weighted mean of several references' moments; weights are normalised to sum 1."""
    _check_weights("blend", weights, len(parts))
    shares = [weight / sum(weights) for weight in weights]
    return Moments(
        sum(share * part.mean for share, part in zip(shares, parts, strict=True)),
        sum(share * part.covariance for share, part in zip(shares, parts, strict=True)),
    )


def _check_weights(caller: str, weights: Sequence[float], count: int) -> None:
    if len(weights) != count:
        raise ValueError(f"{caller}: weights must have one entry a reference ({count}), got {len(weights)}")
    if not all(0 <= weight < math.inf for weight in weights) or not 0 < sum(weights) < math.inf:
        raise ValueError(f"{caller}: weights must be non-negative with a positive sum, got {list(weights)}")


def regularised_cholesky(covariance: Tensor) -> tuple[Tensor, Tensor]:
    """Lower factor of covariance + ridge [B,C,C] and the index [B] of the first rung of RIDGE_LADDER that factors it.

    A covariance that is not finite, which no rung factors, gives a factor of NaN and the index len(RIDGE_LADDER). The
    rung is found without gradient and without asking the device to wait.
    """
    C = covariance.shape[-1]
    identity = torch.eye(C, dtype=covariance.dtype, device=covariance.device)
    scale = covariance.diagonal(dim1=-2, dim2=-1).sum(-1) / C
    ridges = torch.stack([share * scale + RIDGE_FLOOR for share in RIDGE_LADDER])
    with torch.no_grad():
        # The last rung is taken where none of these works, untried.
        candidates = covariance + ridges[:-1, :, None, None] * identity
        works = torch.linalg.cholesky_ex(candidates).info == 0
        rung = torch.cat((works, works.new_ones(1, len(covariance)))).int().argmax(0)  # the first of several that work
    regularised = covariance + ridges.gather(0, rung[None])[0, :, None, None] * identity
    factor, info = torch.linalg.cholesky_ex(regularised)
    failed = info != 0
    return factor.masked_fill(failed[:, None, None], torch.nan), rung.masked_fill(failed, len(RIDGE_LADDER))


def transfer_moments(z: Tensor, content: Moments, style: Moments, strength: float = 1.0) -> Transfer:
    """Moves z [B,C,H,W] from the content's moments to the style's: L_s L_c^-1 (z - mean_c) + mean_s.

    strength in [0,1] scales the change: 0 returns z, 1 the full transfer. The change is what is computed, so equal
    moments return z exactly.
    """
    _check_strength("transfer_moments", strength)
    change, *ridges = _change(content, style, strength, z.dtype)
    return Transfer(_Moved.apply(z, *change), *ridges)


@torch.no_grad()
def transfer_parts_(
    parts: Sequence[Tensor], content: Moments, style: Moments, strength: float = 1.0
) -> tuple[Tensor, Tensor]:
    """`transfer_moments` of z whose channels lie in several tensors [B,·,H,W], in place. Returns the two ridges."""
    _check_strength("transfer_parts_", strength)
    change, *ridges = _change(content, style, strength, parts[0].dtype)
    for rows in _strips(parts[0]):
        pieces = [part[:, :, rows] for part in parts]
        moved = _Moved.apply(torch.cat(pieces, 1), *change)
        torch._foreach_copy_(pieces, moved.split([piece.shape[1] for piece in pieces], 1))
    return tuple(ridges)


def _check_strength(caller: str, strength: float) -> None:
    if not 0.0 <= strength <= 1.0:
        raise ValueError(f"{caller}: strength must lie in [0, 1], got {strength}")


def _change(
    content: Moments, style: Moments, strength: float, dtype: torch.dtype
) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor, Tensor]:
    """What is added to z, matrix [B,C,C] · (z - centre [B,C,1]) + shift [B,C,1], and the ridges of both.

    The centre is the content's mean, rounded to dtype: of a nearly flat content the matrix enlarges deviations ten
    thousand times, and would enlarge the rounding of whole values as much.
    """
    counts = [len(content.covariance), len(style.covariance)]
    factors, ridges = regularised_cholesky(torch.cat((content.covariance, style.covariance)))
    content_factor, style_factor = factors.split(counts)
    matrix = torch.linalg.solve_triangular(content_factor, style_factor, upper=False, left=False)
    change = matrix - torch.eye(matrix.shape[1], dtype=matrix.dtype, device=matrix.device)
    mean = content.mean[..., None]
    centre = mean.detach().to(dtype)  # around whichever centre, z moves to the same
    shift = style.mean[..., None] - mean - torch.matmul(change, mean - centre)
    return (strength * change.to(dtype), strength * shift.to(dtype), centre), *ridges.split(counts)


class _Moved(torch.autograd.Function):
    """z [B,C,H,W] + change · (z - centre) + shift; each map that is kept or held takes as much memory as z."""

    @staticmethod
    def forward(ctx, z: Tensor, change: Tensor, shift: Tensor, centre: Tensor) -> Tensor:
        ctx.save_for_backward(z, change, centre)
        # Not in place, as in blocks._RoundToQuantum.
        return torch.baddbmm(shift, change, z.flatten(2) - centre).reshape(z.shape) + z

    @staticmethod
    @differentiable_once("transfer_moments: has no second derivatives")
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        z, change, centre = ctx.saved_tensors
        grad = grad.flatten(2)
        grad_change = torch.bmm(grad, (z.flatten(2) - centre).transpose(1, 2))
        grad_z = torch.baddbmm(grad, change.transpose(1, 2), grad).reshape(z.shape)
        return grad_z, grad_change, grad.sum(2, keepdim=True), None


def transfer_statistics(
    content: Tensor,
    styles: Tensor | Sequence[Tensor],
    *,
    weights: Sequence[float] | None = None,
    content_labels: Tensor | None = None,
    style_labels: Tensor | Sequence[Tensor] | None = None,
    strength: float = 1.0,
) -> Transfer:
    """Gives content [B,C,H,W] the mean and covariance of one or several styles, each [B,C,h,w] or [1,C,h,w].

    weights: share of each of several styles (equal by default). content_labels [H,W] and style_labels (one [h,w] for
    each style; padded, where the pictures were), integers: every label of the content takes the statistics of the same
    label in the styles; a label that no style has takes those of the whole styles. strength in [0,1]. Differentiable in
    content and styles.
    Raises TypeError or ValueError where content or a style is not as said here or there is none, where strength is out
    of range, where weights are negative, not finite or zero altogether, where there are not as many of
    them, or of style_labels, as styles, where labels have another size, and where those of one side are given alone.
    """
    _check_strength("transfer_statistics", strength)
    styles = [styles] if isinstance(styles, Tensor) else list(styles)
    _check_codes(content, styles)
    weights = [1.0] * len(styles) if weights is None else list(weights)
    _check_weights("transfer_statistics", weights, len(styles))
    if content_labels is None and style_labels is None:
        style = blend([moments(one) for one in styles], weights)
        return transfer_moments(content, moments(content), style, strength)

    style_labels = [style_labels] if isinstance(style_labels, Tensor) else list(style_labels or ())
    _check_labels(content, content_labels, styles, style_labels)
    content_labels = content_labels.to(content.device)
    z = content
    ridges = []
    for label in content_labels.unique().tolist():
        region = content_labels == label
        masks = [labels == label for labels in style_labels]
        shares = [weight * float(mask.any()) for weight, mask in zip(weights, masks, strict=True)]
        if sum(shares) == 0:
            masks, shares = [None] * len(styles), weights
        style = blend([moments(one, mask) for one, mask in zip(styles, masks, strict=True)], shares)
        part = transfer_moments(content, moments(content, region), style, strength)
        z = torch.where(region, part.z, z)
        ridges.append((part.content_ridge, part.style_ridge))
    content_ridges, style_ridges = zip(*ridges, strict=True)
    return Transfer(z, torch.stack(content_ridges).amax(0), torch.stack(style_ridges).amax(0))


def _check_codes(content: Tensor, styles: Sequence[Tensor]) -> None:
    caller = "transfer_statistics"
    B, C, *_ = require.tensor(caller, "content", content, ("B", "C", "H", "W"))
    if not styles:
        require.fail(caller, "styles", "hold at least one reference", "none")
    for style in styles:
        count, *_ = require.tensor(caller, "styles", style, ("B", C, "h", "w"), device_of=("content", content))
        if count not in (1, B):
            require.fail(caller, "styles", f"have a batch of 1 or of content's, {B}", count)


def _check_labels(
    content: Tensor, content_labels: Tensor | None, styles: Sequence[Tensor], style_labels: Sequence[Tensor]
) -> None:
    caller, count = "transfer_statistics", len(style_labels)
    if content_labels is None or not style_labels:
        alone, missing = ("style", "content") if content_labels is None else ("content", "style")
        raise ValueError(f"{caller}: {missing}_labels must be given together with {alone}_labels, got None")
    if count != len(styles):
        raise ValueError(f"{caller}: style_labels must have one entry a reference ({len(styles)}), got {count}")
    names = ("content_labels", *("style_labels",) * count)
    for name, z, labels in zip(names, (content, *styles), (content_labels, *style_labels), strict=True):
        if labels.shape != z.shape[2:]:
            raise ValueError(f"{caller}: {name} must be of shape {list(z.shape[2:])}, got {list(labels.shape)}")

"""Colour transfers that need no training: what a network has to surpass.

Each takes a degraded painting [3,H,W] and a reference [3,h,w], RGB in [0,1] on the CPU, and returns [3,H,W] in [0,1].
"""

from __future__ import annotations

import numpy as np
import torch
from skimage.exposure import match_histograms
from torch import Tensor

# RGB to the cone responses L, M, S, as printed by Reinhard et al. 2001. The way back is the exact inverse: with the
# paper's rounded one, grey comes back with 0.7 % more blue.
RGB_TO_LMS = torch.tensor(
    [[0.3811, 0.5783, 0.0402], [0.1967, 0.7244, 0.0782], [0.0241, 0.1288, 0.8444]], dtype=torch.float64
)
# Ruderman's decorrelation of log L, M, S into l (light), alpha (yellow-blue) and beta (red-green).
LMS_TO_LALPHABETA = torch.diag(torch.tensor([3, 6, 2], dtype=torch.float64).rsqrt()) @ torch.tensor(
    [[1, 1, 1], [1, 1, -2], [1, -1, 0]], dtype=torch.float64
)
# Black has no logarithm: the least response is that of the darkest grey which 8 bits tell from black.
DARKEST = 1 / 255
# Variance of rounding to 8 bits, added where one divides by a spread: a flat painting has no other.
ROUNDING_VARIANCE = 1 / (12 * 255**2)


def untouched(degraded: Tensor, reference: Tensor) -> Tensor:
    """The degraded painting as it is."""
    return degraded


def reinhard(degraded: Tensor, reference: Tensor) -> Tensor:
    """Mean and deviation of each axis of the l-alpha-beta space, of pixel values as they are stored (not linearised).

    Source: Reinhard, Ashikhmin, Gooch, Shirley, "Color transfer between images", IEEE Computer Graphics and
    Applications 21 (2001).
    """
    content, style = (
        LMS_TO_LALPHABETA @ (RGB_TO_LMS @ _pixels(image)).clamp_min(DARKEST).log10() for image in (degraded, reference)
    )
    deviation, mean = torch.std_mean(content, 1, correction=0, keepdim=True)
    style_deviation, style_mean = torch.std_mean(style, 1, correction=0, keepdim=True)
    moved = (content - mean) * (style_deviation / deviation.clamp_min(ROUNDING_VARIANCE**0.5)) + style_mean
    responses = 10 ** torch.linalg.solve(LMS_TO_LALPHABETA, moved)
    return _picture(torch.linalg.solve(RGB_TO_LMS, responses), degraded)


def histogram_matching(degraded: Tensor, reference: Tensor) -> Tensor:
    """The reference's distribution of red, of green and of blue, each for itself (scikit-image)."""
    matched = match_histograms(degraded.double().numpy(), reference.double().numpy(), channel_axis=0)
    return torch.from_numpy(np.asarray(matched)).to(degraded.dtype).clamp(0, 1)


def monge_kantorovich(degraded: Tensor, reference: Tensor) -> Tensor:
    """The linear map of RGB that gives the reference's mean and covariance and moves colours least.

    Source: Pitié, Kokaram, "The linear Monge-Kantorovitch linear colour mapping for example-based colour transfer",
    CVMP 2007: C_d^(-1/2) (C_d^(1/2) C_r C_d^(1/2))^(1/2) C_d^(-1/2), C_d and C_r the covariances of both paintings.
    """
    content, style = _pixels(degraded), _pixels(reference)
    covariance = torch.cov(content, correction=0) + ROUNDING_VARIANCE * torch.eye(3, dtype=torch.float64)
    root = _power(covariance, 0.5)
    inverse_root = _power(covariance, -0.5)
    matrix = inverse_root @ _power(root @ torch.cov(style, correction=0) @ root, 0.5) @ inverse_root
    moved = matrix @ (content - content.mean(1, keepdim=True)) + style.mean(1, keepdim=True)
    return _picture(moved, degraded)


BASELINES = {
    "untouched": untouched,
    "Reinhard": reinhard,
    "histogram matching": histogram_matching,
    "Monge-Kantorovich": monge_kantorovich,
}


def _pixels(image: Tensor) -> Tensor:
    """[3,H,W] as float64 [3,H·W]."""
    return image.double().flatten(1)


def _picture(pixels: Tensor, like: Tensor) -> Tensor:
    return pixels.reshape(like.shape).to(like.dtype).clamp(0, 1)


def _power(matrix: Tensor, exponent: float) -> Tensor:
    """A symmetric positive semidefinite matrix to a power; eigenvalues that rounding made negative count as 0."""
    values, vectors = torch.linalg.eigh(matrix)
    return vectors * values.clamp_min(0) ** exponent @ vectors.T

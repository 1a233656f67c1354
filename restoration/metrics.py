"""How well structure was kept (SSIM), how near the reference's colour style came (Gram loss), what was clipped."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass

import numpy as np
import torch
import torch.nn.functional as F
from skimage.color import deltaE_ciede2000, rgb2lab
from skimage.metrics import structural_similarity
from torch import Tensor

from restoration.convolution import replicate_up_to
from restoration.vgg import VGG19Features

# The Gaussian window of Wang et al. 2004: sigma 1.5 cut at 3.5 sigma is 11 pixels wide.
SSIM_SIGMA = 1.5
SSIM_WINDOW = 11
# Metrics of larger pictures are taken at this longer side: VGG19 features of a 12-megapixel scan alone take 3 GB.
MEASURED_SIDE = 1024
# Values nearer to 0 or 1 than this are written as 0 or 255.
HALF_STEP = 0.5 / 255


@dataclass(frozen=True)
class Metrics:
    """ssim: 1 is best. gram, relative_gram: 0 is best; gram depends on the scale of the features, relative does not."""

    ssim: float
    gram: float
    relative_gram: float

    def to_dict(self) -> dict[str, float]:
        return asdict(self)


def measure(degraded: Tensor, reference: Tensor, result: Tensor, features: VGG19Features) -> Metrics:
    """SSIM of result against degraded and Gram losses of result against reference, each [3,H,W] in [0,1].

    Pictures whose longer side exceeds MEASURED_SIDE are reduced to it first. features: `vgg.metric_features`.
    """
    return measure_results(degraded, reference, [result], features)[0]


@torch.no_grad()
def measure_results(
    degraded: Tensor, reference: Tensor, results: Iterable[Tensor], features: VGG19Features
) -> list[Metrics]:
    """`measure` of several results for one pair, for which the reference is looked at once."""
    degraded, reference = (limit_side(image, MEASURED_SIDE) for image in (degraded, reference))
    wanted = gram_matrices(reference, features)
    measured = []
    for result in results:
        result = limit_side(result, MEASURED_SIDE)
        gram, relative = gram_losses(gram_matrices(result, features), wanted)
        measured.append(Metrics(structural_similarity_index(degraded, result), gram, relative))
    return measured


def colour_difference(first: Tensor, second: Tensor) -> float:
    """CIEDE2000 between pictures [3,H,W] in [0,1] of one size, mean over pixels: 0 is best, 1 is just noticeable."""
    first, second = (rgb2lab(image.double().cpu().numpy(), channel_axis=0) for image in (first, second))
    return float(deltaE_ciede2000(first, second, channel_axis=0).mean())


def tint_difference(first: Tensor, second: Tensor) -> float:
    """Distance between the mean a*, b* (CIELAB) of two pictures [3,H,W] of any sizes: 0 is best."""
    first, second = (rgb2lab(image.double().cpu().numpy(), channel_axis=0).mean((1, 2)) for image in (first, second))
    return float(np.hypot(*(first - second)[1:]))


def newly_clipped(degraded: Tensor, result: Tensor) -> float:
    """Share of pixels with a channel that 8 bits store as 0 or 255 in the result and not in the degraded picture."""

    def clipped(image: Tensor) -> Tensor:
        return ((image < HALF_STEP) | (image > 1 - HALF_STEP)).any(0)

    return float((clipped(result) & ~clipped(degraded)).float().mean())


def structural_similarity_index(first: Tensor, second: Tensor) -> float:
    """SSIM (Wang et al. 2004), mean over channels and the pixels around which a whole window fits.

    Sides under the window are replicated up to it.
    """
    first, second = replicate_up_to(torch.stack((first.cpu(), second.cpu())), SSIM_WINDOW).numpy()
    return float(
        structural_similarity(
            first,
            second,
            channel_axis=0,
            data_range=1.0,
            gaussian_weights=True,
            sigma=SSIM_SIGMA,
            use_sample_covariance=False,
        )
    )


def gram_matrices(image: Tensor, features: VGG19Features) -> list[Tensor]:
    """F F^T / (C H W) of each layer's features F [C, H·W], in float64."""
    matrices = []
    for feature in features(image[None]):
        values = feature[0].flatten(1)
        matrices.append((values @ values.T).double() / values.numel())
    return matrices


def gram_losses(result: list[Tensor], reference: list[Tensor]) -> tuple[float, float]:
    """Mean over layers of the mean squared difference, and of the squared difference over the reference's square."""
    pairs = list(zip(result, reference, strict=True))
    plain = [(a - b).square().mean() for a, b in pairs]
    relative = [(a - b).square().sum() / b.square().sum() for a, b in pairs]
    return float(torch.stack(plain).mean()), float(torch.stack(relative).mean())


def limit_side(image: Tensor, longest: int) -> Tensor:
    """[3,H,W] reduced, with antialiasing, so that its longer side is at most longest."""
    height, width = image.shape[-2:]
    scale = longest / max(height, width)
    if scale >= 1:
        return image
    size = (max(1, round(height * scale)), max(1, round(width * scale)))
    return F.interpolate(image[None], size, mode="bicubic", antialias=True)[0].clamp(0, 1)

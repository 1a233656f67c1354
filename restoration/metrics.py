"""How well structure was kept (SSIM) and how near the reference's colour style came (Gram loss)."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from skimage.metrics import structural_similarity
from torch import Tensor

from restoration.vgg import VGG19Features

# The Gaussian window of Wang et al. 2004: sigma 1.5 cut at 3.5 sigma is 11 pixels wide.
SSIM_SIGMA = 1.5
SSIM_WINDOW = 11
# Metrics of larger pictures are taken at this longer side: VGG19 features of a 12-megapixel scan alone take 3 GB.
MEASURED_SIDE = 1024


@dataclass(frozen=True)
class Metrics:
    """ssim: 1 is best. gram, relative_gram: 0 is best; gram depends on the scale of the features, relative does not."""

    ssim: float
    gram: float
    relative_gram: float

    def to_dict(self) -> dict[str, float]:
        return asdict(self)


@torch.no_grad()
def measure(degraded: Tensor, reference: Tensor, result: Tensor, features: VGG19Features) -> Metrics:
    """SSIM of result against degraded and Gram losses of result against reference, each [3,H,W] in [0,1].

    Pictures whose longer side exceeds MEASURED_SIDE are reduced to it first. features: `vgg.metric_features`.
    """
    degraded, reference, result = (limit_side(image, MEASURED_SIDE) for image in (degraded, reference, result))
    gram, relative = gram_losses(gram_matrices(result, features), gram_matrices(reference, features))
    return Metrics(structural_similarity_index(degraded, result), gram, relative)


def structural_similarity_index(first: Tensor, second: Tensor) -> float:
    """SSIM (Wang et al. 2004), mean over channels and pixels; sides under the window are replicated up to it."""
    height, width = first.shape[-2:]
    missing = (0, max(0, SSIM_WINDOW - width), 0, max(0, SSIM_WINDOW - height))
    first, second = (
        F.pad(image[None].cpu(), missing, mode="replicate")[0].numpy() if any(missing) else image.cpu().numpy()
        for image in (first, second)
    )
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

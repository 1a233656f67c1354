"""Dual pooling attention. The template of a benchmark: bytes that must move, sizes, rivals; the rest is shared."""

import torch
import torch.nn.functional as F

from benchmarks.contest import Contest, Rival
from restoration_kernels import _samples


def traffic(x, **_):
    """Forward reads x for the means and again to scale it, and writes y.

    Backward reads the gradient and x for the gradient to the means, the gradient again, and writes that to x.
    """
    return {"forward": 3 * x.nbytes, "forward+backward": 7 * x.nbytes}


def pooling(x, weight, pool_size=50):
    """As one writes it: the paper's two poolings."""
    means = F.adaptive_avg_pool2d(x, pool_size).mean((2, 3))
    logits = F.conv1d(means[:, None], weight[None, None], padding=weight.shape[0] // 2)
    return x * torch.sigmoid(logits)[:, 0, :, None, None]


def sample(side, operator="dual_pool_attention"):
    """A batch of maps of the width that the network has in the middle."""
    make = _samples._dual_pool_attention(2, 64, side, side)
    return _samples.Sample(operator, f"64_at_{side}", "series", make)


CONTESTS = [
    Contest(
        "dual_pool_attention",
        traffic,
        series=[sample(side) for side in (128, 256, 512, 1024)],
        rivals=[Rival("pooling", pooling)],
    )
]


def test_speed(measure, entry):
    measure(entry)

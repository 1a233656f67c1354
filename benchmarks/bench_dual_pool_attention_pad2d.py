"""Dual pooling attention into a padded map, against the operators that it takes the place of."""

import torch
import torch.nn.functional as F

from benchmarks.contest import Contest, Rival
from restoration_kernels import _samples, dual_pool_attention


def traffic(x, **_):
    """Forward reads x for the means and again to scale it, and writes y.

    Backward reads the gradient and x and writes the gradient to x, to which it adds that of the means.
    """
    return {"forward": 3 * x.nbytes, "forward+backward": 8 * x.nbytes}


def separate(x, weight, padding=1, pool_size=50):
    """The fused attention, then layout and padding by PyTorch."""
    y = dual_pool_attention(x, weight, pool_size=pool_size)
    return F.pad(y.contiguous(memory_format=torch.channels_last), (padding,) * 4, mode="reflect")


def sample(side):
    """A batch of maps of the width that the network has in the middle."""
    make = _samples._dual_pool_attention(2, 64, side, side)
    return _samples.Sample("dual_pool_attention_pad2d", f"64_at_{side}", "series", make)


CONTESTS = [
    Contest(
        "dual_pool_attention_pad2d",
        traffic,
        series=[sample(side) for side in (128, 256, 512)],
        rivals=[Rival("separate", separate)],
    )
]


def test_speed(measure, entry):
    measure(entry)

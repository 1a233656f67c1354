"""Dual pooling attention into a padded map, against the operators that it takes the place of."""

import torch
import torch.nn.functional as F

from benchmarks.bench_dual_pool_attention import sample, traffic
from benchmarks.contest import Contest, Rival
from restoration_kernels import dual_pool_attention

OPERATOR = "dual_pool_attention_pad2d"


def separate(x, weight, padding=1, pool_size=50):
    """The fused attention, then layout and padding by PyTorch."""
    y = dual_pool_attention(x, weight, pool_size=pool_size)
    return F.pad(y.contiguous(memory_format=torch.channels_last), (padding,) * 4, mode="reflect")


# The padding adds next to nothing to the bytes that the attention moves.
CONTESTS = [
    Contest(
        OPERATOR,
        traffic,
        series=[sample(side, OPERATOR) for side in (128, 256, 512)],
        rivals=[Rival("separate", separate)],
    )
]


def test_speed(measure, entry):
    measure(entry)

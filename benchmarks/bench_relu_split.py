"""ReLU and split of what one convolution leaves for another, against the operators that it takes the place of."""

import torch.nn.functional as F

from benchmarks.contest import Contest, Rival
from restoration_kernels import _samples

OPERATOR = "relu_split"


def traffic(x, channels):
    """Forward reads x and writes as much. Backward reads the gradient and what came out of the ReLU, and writes x's."""
    rectified = x.nbytes * channels // x.shape[1]
    return {"forward": 2 * x.nbytes, "forward+backward": 4 * x.nbytes + rectified}


def separate(x, channels):
    """As one writes it."""
    value, guide = (part.contiguous() for part in x.split([channels, x.shape[1] - channels], 1))
    return F.relu(value), guide


def sample(side):
    """Of a batch of maps of the width that the network has in the middle."""
    return _samples.Sample(OPERATOR, f"16_and_8_at_{side}", "series", _samples._relu_split(2, 24, side, side, 16))


CONTESTS = [
    Contest(
        OPERATOR,
        traffic,
        series=[sample(side) for side in (128, 256, 512, 1024)],
        rivals=[Rival("separate", separate)],
    )
]


def test_speed(measure, entry):
    measure(entry)

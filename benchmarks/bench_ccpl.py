"""The two operators of the contrastive coherence loss."""

import torch
import torch.nn.functional as F

from benchmarks.contest import Contest, Rival
from restoration_kernels import _samples


def difference_traffic(features, anchors, **_):
    """Forward reads nine places an anchor and writes eight rows; backward reads the rows and writes the whole map."""
    row = features.shape[0] * features.shape[1] * features.element_size() * len(anchors)
    return {"forward": 17 * row, "forward+backward": 25 * row + features.nbytes}


def indexing(features, anchors, neighbors):
    """As one writes it: two indexed reads of the flattened map."""
    places = features.flatten(2)
    differences = places[:, :, anchors][..., None] - places[:, :, neighbors]
    return differences.flatten(2).mT


def one_place(features, **_):
    """A read whose gradient is what every gradient here consists of: a new map of zeros, but for a few numbers."""
    return features[:, :, 0, 0]


def nce_traffic(query, key, **_):
    """Rows in and losses out; backward reads rows again and writes the gradient. Products and exp take the time."""
    rows = query.nbytes + key.nbytes
    return {"forward": rows, "forward+backward": 2 * rows + query.nbytes}


def cross_entropy(query, key, temperature):
    """As one writes it: all logits, with the diagonal as target."""
    logits = query @ key.detach().mT / temperature
    target = torch.arange(query.shape[1], device=query.device).expand(query.shape[:2])
    return F.cross_entropy(logits.mT, target, reduction="none")


def difference_sample(side):
    """64 anchors on maps of 64 channels."""
    make = _samples._neighbor_difference(1, 64, side, side, 64)
    return _samples.Sample("neighbor_difference", f"64_at_{side}", "series", make)


def nce_sample(rows):
    """Rows of the length that the second layer's projection head makes."""
    return _samples.Sample("info_nce", f"{rows}_rows", "series", _samples._info_nce(1, rows, 64))


CONTESTS = [
    Contest(
        "neighbor_difference",
        difference_traffic,
        series=[difference_sample(side) for side in (128, 256, 512, 1024)],
        rivals=[Rival("indexing", indexing), Rival("zeros", one_place, floor=True)],
    ),
    Contest(
        "info_nce",
        nce_traffic,
        series=[nce_sample(rows) for rows in (512, 2048, 8192, 32768)],
        rivals=[Rival("cross_entropy", cross_entropy)],
    ),
]


def test_speed(measure, entry):
    measure(entry)

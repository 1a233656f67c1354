"""The two operators of the contrastive coherence loss, and the whole of it."""

import torch
import torch.nn.functional as F

from benchmarks.contest import Composite, Contest, Rival
from restoration_kernels import _samples, sample_neighbors
from restoration_kernels.ccpl import layer_loss


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


def loss_sample(name, *layers, anchors):
    """Feature maps of two images, layers of (channels, side), places, and the weights of the projection heads."""

    def make(generator):
        def normal(*shape):
            return torch.randn(*shape, generator=generator)

        arguments = {}
        for number, (C, side) in enumerate(layers):
            places = sample_neighbors(side, side, anchors, generator=generator)
            head = [normal(C, C) / C**0.5, normal(C), normal(C // 4, C) / C**0.5, normal(C // 4)]
            tensors = (normal(1, C, side, side), normal(1, C, side, side), *places, *head)
            arguments |= {f"{part}_{number}": tensor for part, tensor in zip(LAYER, tensors, strict=True)}
        return arguments

    return _samples.Sample("ccpl_loss", name, "series", make)


# The tensors of one layer. All but the targets and the places are trained.
LAYER = ("features", "target", "anchors", "neighbors", "weight", "bias", "last_weight", "last_bias")
TRAINED = [f"{part}_{number}" for number in range(4) for part in ("features", *LAYER[4:])]


def layers_of(tensors):
    """The tensors of each layer, in the order of LAYER."""
    return [[tensors[f"{part}_{number}"] for part in LAYER] for number in range(len(tensors) // len(LAYER))]


def whole_loss(backend, **tensors):
    """ccpl_loss once the anchors are drawn, so that all rivals work at the same places."""
    return sum(layer_loss(*layer[:4], projection(*layer[4:]), 0.07, backend) for layer in layers_of(tensors))


def projection(weight, bias, last_weight, last_bias):
    """The head that CCPLoss trains for a layer."""
    return lambda differences: F.linear(F.relu(F.linear(differences, weight, bias)), last_weight, last_bias)


def loss_traffic(**tensors):
    """As for the differences, of both images; parameters are read, and their gradients written."""
    layers = layers_of(tensors)
    moved = [difference_traffic(layer[0], layer[2]) for layer in layers]
    parameters = sum(tensor.nbytes for layer in layers for tensor in layer[4:])
    forward = sum(traffic["forward"] for traffic in moved)
    backward = sum(traffic["forward+backward"] for traffic in moved)
    return {"forward": 2 * forward + parameters, "forward+backward": forward + backward + 2 * parameters}


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
    Composite(
        "ccpl_loss",
        loss_traffic,
        # VGG19's relu1_1, relu2_1, relu3_1 and relu4_1.
        series=[
            loss_sample(
                f"4_layers_of_{side}", (64, side), (128, side // 2), (256, side // 4), (512, side // 8), anchors=64
            )
            for side in (128, 256, 512)
        ],
        function=whole_loss,
        parts=("neighbor_difference", "info_nce"),
        differentiable=TRAINED,
        quick_sample=loss_sample("small", (16, 12), (32, 9), anchors=5),
    ),
]


def test_speed(measure, entry):
    measure(entry)

"""Places that the loss compares: where they lie, how evenly and how cheaply they are drawn."""

import collections
import itertools
import math
from unittest import mock

import compare
import pytest
import torch
from torch._subclasses import FakeTensorMode

from restoration_kernels import ccpl_loss, sample_neighbors


@pytest.mark.parametrize(("height", "width", "num_anchors"), [(7, 10, 1), (7, 10, 20), (7, 10, 40), (34, 34, 1024)])
def test_sample_neighbors(height, width, num_anchors):
    places = sample_neighbors(height, width, num_anchors, generator=compare.seeded(0))
    assert_places(*places, height, width, num_anchors)


def test_places_of_several_maps_are_drawn_at_once(monkeypatch):
    sizes, counts, seen = [(7, 10), (3, 3), (30, 20)], [40, 1, 9], []

    def note(features, target, anchors, neighbors, *_):
        seen.append((anchors, neighbors))
        return 0.0

    monkeypatch.setattr("restoration_kernels.ccpl.layer_loss", note)
    maps = [torch.zeros(1, 1, *size) for size in sizes]
    with mock.patch("torch.randint", wraps=torch.randint) as randint:
        ccpl_loss(maps, maps, counts)
    randint.assert_called_once()
    for places, size, count in zip(seen, sizes, counts, strict=True):
        assert_places(*places, *size, count)


def assert_places(anchors, neighbors, height, width, num_anchors):
    """Different places off the border, each with those around it."""
    assert anchors.dtype == neighbors.dtype == torch.int64
    assert len(set(anchors.tolist())) == num_anchors
    for anchor, around in zip(anchors.tolist(), neighbors.tolist(), strict=True):
        row, column = divmod(anchor, width)
        assert 0 < row < height - 1 and 0 < column < width - 1
        steps = [(i, j) for i in (-1, 0, 1) for j in (-1, 0, 1) if (i, j) != (0, 0)]
        assert around == [(row + i) * width + column + j for i, j in steps]


def test_sample_neighbors_repeats_with_its_generator():
    first, again, later = (sample_neighbors(30, 30, 64, generator=compare.seeded(seed))[0] for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, later)


def test_sample_neighbors_favours_no_set_of_places(monkeypatch):
    """All that the generator can give, four draws on a map of six inner places, makes each of the 15 sets 24 times."""
    sets = collections.Counter()
    for draws in itertools.product(range(3), range(4), range(5), range(6)):
        monkeypatch.setattr(torch, "randint", lambda *_, draws=draws, **__: torch.tensor(draws))
        sets[frozenset(sample_neighbors(4, 5, 4)[0].tolist())] += 1
    assert len(sets) == math.comb(6, 4)
    assert set(sets.values()) == {24}


def test_sample_neighbors_favours_no_place():
    """12 places, thousands of draws: every place is an anchor equally often, within five standard deviations."""
    generator, draws = torch.Generator().manual_seed(0), 1000
    anchors = torch.cat([sample_neighbors(5, 6, 4, generator=generator)[0] for _ in range(draws)])
    counts = torch.unique(anchors, return_counts=True)[1]
    assert len(counts) == 12
    assert (counts - draws / 3).abs().max() < 5 * math.sqrt(draws * 1 / 3 * 2 / 3)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_sample_neighbors_waits_for_no_device(device):
    """No number comes back to the host and no shape depends on one: fake tensors have none, and raise."""
    with FakeTensorMode():
        anchors, neighbors = sample_neighbors(7, 10, 20, device=device)
    assert anchors.device.type == neighbors.device.type == device
    assert (anchors.shape, neighbors.shape) == ((20,), (20, 8))


def test_sample_neighbors_costs_nothing_on_a_large_map():
    # The largest that is taken; a permutation of all of its places would take 8 TB.
    assert sample_neighbors(2**20, 2**20, 64)[0].max() > 2**20


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((2, 9, 1), "height must be an integer of at least 3, got 2"),
        ((4, 2.0, 1), "width must be an integer of at least 3, got 2.0"),
        ((4, 5, 0), "num_anchors must be an integer of at least 1, got 0"),
        ((2**21, 2**20, 1), r"height and width must have at most 2\^40 places, got 2097152 x 1048576"),
        ((2**63, 3, 1), r"height and width must have at most 2\^40 places, got 9223372036854775808 x 3"),
        ((4, 5, 7), "num_anchors must be at most the 6 interior places of 4 x 5, got 7"),
    ],
)
def test_rejects_draws(arguments, message):
    with pytest.raises(ValueError, match=f"^sample_neighbors: {message}$"):
        sample_neighbors(*arguments)
    with pytest.raises(TypeError, match=r"^sample_neighbors: generator must be a torch.Generator or None, got int$"):
        sample_neighbors(4, 5, 1, generator=3)
    for device in ("foo", 2.5):
        message = f"^sample_neighbors: device must be a torch.device, the name of one, or None, got {device!r}$"
        with pytest.raises(ValueError, match=message):
            sample_neighbors(4, 5, 1, device=device)

"""Recolouring of tensors: statistics, what is noted and refused, memory, the range of the result."""

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from restoration.blocks import STREAM_LIMIT
from restoration.checkpoints import load_network
from restoration.errors import UserError
from restoration.flow import Architecture, ReversibleNetwork
from restoration.metrics import newly_clipped
from restoration.recolouring import KNEE, MARGIN, fit_range, recolour

CPU = torch.device("cpu")


def small_network(scale=1.0):
    torch.manual_seed(0)
    network = ReversibleNetwork(Architecture(4, 1, 1))
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(scale)
    return network


PICTURE = torch.rand(3, 16, 20, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("degraded", "reference", "message"),
    [
        (PICTURE[None], PICTURE, r"degraded must be of shape \[3, H, W\], got shape \[1, 3, 16, 20\]"),
        (PICTURE, PICTURE[:1], r"reference must be of shape \[3, H, W\], got shape \[1, 16, 20\]"),
        (PICTURE.double(), PICTURE, "degraded must have dtype torch.float32, got torch.float64"),
        (PICTURE, PICTURE * 255, r"reference must lie in \[0, 1\], got values from .* to 25.*"),
        (PICTURE * float("nan"), PICTURE, r"degraded must lie in \[0, 1\], got values from nan to nan"),
    ],
)
def test_rejects(degraded, reference, message):
    with pytest.raises(ValueError, match=f"^recolour: {message}$"):
        recolour(small_network(), degraded, reference, CPU)


@pytest.mark.parametrize("size", [(1, 1), (3, 3), (1, 32)])
def test_pictures_with_fewer_pixels_than_channels(size):
    """Their covariance alone would not tell what their margin holds, which then left the shipped network's range."""
    generator = torch.Generator().manual_seed(0)
    small, large = (torch.rand(3, *sides, generator=generator) for sides in (size, (40, 50)))
    network = load_network()
    assert recolour(network, small, large, CPU)[0].shape == small.shape
    assert recolour(network, large, small, CPU)[0].shape == large.shape


def test_results_are_fitted_into_the_range(monkeypatch):
    monkeypatch.setattr("restoration.recolouring.fit_range", lambda image: torch.full_like(image, 0.25))
    result, _ = recolour(small_network(), *torch.rand(2, 3, 16, 16), CPU)
    assert (result == 0.25).all()


@pytest.mark.parametrize(("contrast", "deviation"), [(0.002, 0.1), (0.05, 3.7), (0.2, None)])
def test_contrast_raised_out_of_noise_is_noted(tmp_path, contrast, deviation):
    drawing, reference = torch.rand(2, 3, 40, 40)
    _, notes = recolour(load_network(), 0.5 + contrast * (drawing - 0.5), reference, CPU)
    expected = f"hardly any drawing: values deviate by {deviation} of 255"
    assert any(expected in note for note in notes) is (deviation is not None)


@pytest.mark.parametrize(("gain", "noted"), [(3.9, False), (4.1, True)])
def test_a_contrast_grown_fourfold_is_noted(monkeypatch, gain, noted):
    degraded, reference = 0.5 + 0.1 * torch.rand(2, 3, 16, 16)
    monkeypatch.setattr("restoration.recolouring.fit_range", lambda _: 0.5 + gain * (degraded - 0.5))
    assert bool(recolour(small_network(), degraded, reference, CPU)[1]) is noted


@pytest.mark.parametrize(("ridges", "notes"), [((1, 0), ["0.0001"]), ((0, 2), ["0.01"]), ((0, 0), [])])
def test_a_larger_ridge_is_noted(monkeypatch, ridges, notes):
    monkeypatch.setattr("restoration.recolouring.transfer_parts_", lambda *_: torch.tensor(ridges))
    _, found = recolour(small_network(), *torch.rand(2, 3, 16, 16), CPU)
    assert list(found) == [
        f"colours nearly flat: statistics were regularised with {note} in place of 1e-06" for note in notes
    ]


def test_the_margin_has_no_part_in_the_statistics():
    """A network that does nothing gives the picture the very mean of the reference."""
    network, pictures = small_network(0.0), 0.4 + 0.2 * torch.rand(2, 3, 24, 24)
    pictures[0, :, 0], pictures[1, :, :, -1] = 0.3, 0.7
    result, _ = recolour(network, *pictures, CPU)
    assert torch.allclose(result.mean((1, 2)), pictures[1].mean((1, 2)), atol=1e-4)


def test_weights_that_overflow_are_named():
    with pytest.raises(UserError, match="these weights do not suit"):
        recolour(small_network(1e4), *torch.rand(2, 3, 16, 16), CPU)


@pytest.mark.parametrize("half", [0, 1])
def test_values_past_the_range_in_either_half_are_named(monkeypatch, half):
    def overflow(code, *_):
        code[half][0, 0, 0, 0] = STREAM_LIMIT
        return torch.zeros(2, 1)

    monkeypatch.setattr("restoration.recolouring.transfer_parts_", overflow)
    with pytest.raises(UserError, match="values reach 256, past"):
        recolour(small_network(), *torch.rand(2, 3, 16, 16), CPU)


def test_a_result_that_is_not_finite_is_named(monkeypatch):
    monkeypatch.setattr(ReversibleNetwork, "decode_halves", lambda *_: torch.full((1, 3, 64, 64), torch.nan))
    with pytest.raises(UserError, match="values that are not finite"):
        recolour(small_network(), *torch.rand(2, 3, 16, 16), CPU)


class LiveBytes(TorchDispatchMode):
    """The most bytes that the results of operators held at a time."""

    def __init__(self):
        super().__init__()
        self._storages, self.most = {}, 0

    def __torch_dispatch__(self, operator, types, arguments=(), options=None):
        results = operator(*arguments, **(options or {}))
        for result in results if isinstance(results, (tuple, list)) else [results]:
            if isinstance(result, torch.Tensor):
                storage = result.untyped_storage()
                self._storages[storage.data_ptr()] = StorageWeakRef(storage), storage.nbytes()
        alive = {place: kept for place, kept in self._storages.items() if not kept[0].expired()}
        self._storages, self.most = alive, max(self.most, sum(size for _, size in alive.values()))
        return results


def test_memory_is_the_streams_and_less_than_as_much_again(monkeypatch):
    """Streams of one picture at a time, 128 bytes a pixel; no map of theirs waits for a later one."""
    monkeypatch.setattr("restoration.whitening.CHUNK", 1024)
    network, side = ReversibleNetwork(), 352
    degraded, reference = torch.rand(2, 3, side, side)
    with LiveBytes() as live:
        recolour(network, degraded, reference, CPU)
    padded = (side + 2 * MARGIN) ** 2
    streams, maps_between, pictures = 2 * 64, 64 + 48, 40  # padded and convolved; both as read, one with its margin
    assert streams * padded < live.most < (streams + maps_between + pictures) * padded


def ramp(low, high, count=1001):
    """Red runs from low to high; green and blue stay inside."""
    image = torch.full((3, 1, count), 0.5)
    image[0, 0] = torch.linspace(low, high, count)
    image[1, 0] = torch.linspace(0, 1, count)
    return image


@pytest.mark.parametrize("low, high", [(-0.3, 1.2), (-0.001, 1.0), (0.0, 1.5), (-2.0, 3.0)])
def test_shades_out_of_range_are_compressed_not_cut(low, high):
    image = ramp(low, high)
    red = image[0, 0]
    result = fit_range(image)[0, 0]
    assert result.min() >= 0 and result.max() <= 1
    inner = (red >= KNEE) & (red <= 1 - KNEE)
    assert torch.equal(result[inner], red[inner])
    inside = (red >= 0) & (red <= 1)
    assert (result - red)[inside].abs().max() <= KNEE / 2 + 1e-6
    assert (result.diff() > 0).all()  # no two shades become one


def test_channels_within_range_stay_to_the_bit():
    image = ramp(-0.3, 1.2)
    assert torch.equal(fit_range(image)[1:], image[1:])
    inside = ramp(0, 1)
    assert torch.equal(fit_range(inside), inside)


def test_compression_clips_fewer_pixels_than_cutting():
    image = ramp(-0.3, 1.2)
    degraded = torch.full_like(image, 0.5)
    image[1] = 0.5
    assert newly_clipped(degraded, image.clamp(0, 1)) > 0.3
    assert newly_clipped(degraded, fit_range(image)) < 0.1


def test_edges_are_coloured_like_the_inside(monkeypatch):
    """A plain border must not turn into a frame where convolutions meet the edge."""
    network = small_network(2)
    degraded = torch.full((3, 120, 120), 0.4)
    degraded[:, 56:64, 56:64] = torch.rand(3, 8, 8)
    reference = torch.rand(3, 40, 40)

    def frame():
        result, _ = recolour(network, degraded, reference, CPU)
        return (result[:, 0] - result[:, 24]).abs().mean()

    shown = frame()
    monkeypatch.setattr("restoration.recolouring.MARGIN", 0)
    assert shown < 0.1 * frame()


def test_only_visible_pixels_count(monkeypatch):
    """With a frame of another colour, that of the picture alone, but for what convolutions see past its edge."""
    torch.manual_seed(0)
    network, degraded, inner = small_network(), torch.rand(3, 24, 24), 0.5 + 0.1 * torch.rand(3, 40, 40)
    framed, seen = torch.zeros(3, 80, 80), torch.zeros(80, 80, dtype=torch.bool)
    framed[0], framed[:, 20:60, 20:60] = 1.0, inner
    seen[20:60, 20:60] = True
    alone, masked, all_of_it = (
        recolour(network, degraded, reference, CPU, visible=(None, visible))[0].mean((1, 2))
        for reference, visible in ((inner, None), (framed, seen), (framed, None))
    )
    assert (masked - alone).abs().max() < 0.02 < 0.1 < (all_of_it - alone).abs().max()


def test_an_error_of_another_kind_comes_out_as_it_is(monkeypatch):
    def fail(*_):
        raise RuntimeError("bug")

    monkeypatch.setattr(ReversibleNetwork, "encode_halves", fail)
    with pytest.raises(RuntimeError, match=r"^bug$"):
        recolour(small_network(), *torch.rand(2, 3, 16, 16), CPU)

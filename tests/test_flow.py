"""The reversible network: exact inverse, padding, precision, and what its blocks compute."""

import logging

import pytest
import torch

from restoration import flow
from restoration.blocks import GUIDE_CHANNELS, STREAM_LIMIT, STREAM_QUANTUM, ReversibleBlock, round_to_quantum
from restoration.flow import (
    Architecture,
    ReversibleNetwork,
    _pixel_shuffle,
    _pixel_unshuffle,
    check_stream_range,
    pad_to_valid_size,
)
from restoration.reversible import Coupling, run_chain

SMALL = Architecture(half_channels=4, blocks_per_stage=2, refinement_blocks=1)


def network(precision="fp32", scale=1.0, **switches):
    torch.manual_seed(0)
    made = ReversibleNetwork(Architecture(4, 2, 1, **switches), precision)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.mul_(scale)
    return made


def picture(*size, batch=1):
    """An 8-bit picture, as files hold them."""
    generator = torch.Generator().manual_seed(sum(size))
    return torch.randint(0, 256, (batch, 3, *size), generator=generator) / 255


def on_grid(x):
    return torch.round(x / STREAM_QUANTUM) * STREAM_QUANTUM


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("size", [(8, 8), (16, 20), (37, 61), (1, 1), (5, 130)])
@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_decode_inverts_encode_bit_for_bit(precision, size, scale):
    net = network(precision, scale)
    x = picture(*size, batch=2)
    with torch.no_grad():
        z = net.encode(x)
        assert not torch.equal(z[:, :3, : size[0], : size[1]], on_grid(x)), "the network must do something"
        assert torch.equal(net.decode(z, size), on_grid(x))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_halves_are_those_of_the_code(precision):
    net, size = network(precision), (21, 30)
    x = picture(*size, batch=2)
    halves = net.encode_halves(x)
    with torch.no_grad():
        z = net.encode(x)
        assert torch.equal(torch.cat(halves, 1), z)
        moved = [half + 0.3 for half in halves]
        assert torch.equal(net.decode_halves(moved), net.decode(z + 0.3))
    image = net.decode_halves(halves)
    assert torch.equal(image[..., : size[0], : size[1]], on_grid(x))
    assert moved == halves == [], "a caller's list keeps no half alive"
    assert image.untyped_storage().nbytes() == image.nbytes, "a picture keeps no other channels alive"


@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_compiled_passes_are_the_eager_ones(precision):
    net, x = network(precision), picture(16, 20)
    compiled = (torch.compile(each, backend="aot_eager") for each in (net.encode, net.decode))
    results = []
    for encode, decode in ((net.encode, net.decode), compiled):
        z = encode(x)
        image = decode(z + 0.3)
        results.append([z, image, *torch.autograd.grad(image.square().mean(), list(net.parameters()))])
    for eager, ours in zip(*results, strict=True):
        assert torch.equal(eager, ours)


@pytest.mark.parametrize("batch", [1, 2])
def test_pixels_out_of_order_are_the_same(batch):
    """Each stays where its channels are, so that its code is moved and decoded alike."""
    net, size = network(), (12, 20)
    x = picture(*size, batch=batch)
    with torch.no_grad():
        z, unordered = net.encode(x), net.encode(x, in_order=False)
        assert unordered.shape == (batch, z.shape[1], 48, 5) and not torch.equal(unordered.flatten(), z.flatten())
        # One pixel of each square of 4 x 4, then another of each.
        squares = z.unflatten(3, (-1, 2, 2)).unflatten(2, (-1, 2, 2)).permute(0, 1, 4, 7, 3, 6, 2, 5)
        assert torch.equal(unordered.flatten(), squares.flatten())
        assert torch.equal(net.decode(unordered + 0.3, size, in_order=False), net.decode(z + 0.3, size))
        assert torch.equal(unordered, net.encode(x, in_order=False)), "decoding writes over no code"


@pytest.mark.parametrize("switches", [{"dpca": False}, {"cafe": False}, {"dpca": False, "cafe": False}])
def test_ablated_networks_are_exactly_invertible_too(switches):
    net = network(**switches)
    x = picture(19, 23)
    with torch.no_grad():
        assert torch.equal(net.decode(net.encode(x), (19, 23)), on_grid(x))


def test_ablation_switches_remove_the_modules_parameters():
    full, reduced = (network(**switches).state_dict() for switches in ({}, {"dpca": False, "cafe": False}))
    assert any("attention" in name for name in full)
    assert any("guide" in name for name in full)
    assert not any("attention" in name for name in reduced)
    assert {name.split(".")[-1] for name in reduced} == {"weight", "bias"}
    for name, parameter in reduced.items():
        guides = GUIDE_CHANNELS if "value_and_guide" in name else 0
        assert len(parameter) == len(full[name]) - guides


def test_default_architecture_has_the_papers_shape():
    net = ReversibleNetwork()
    assert [len(stage) for stage in net.stages] == [10, 10, 10]
    assert [stage[0].features.weight.shape[0] for stage in net.stages] == [16, 64, 256]
    assert len(net.refinement) == 2
    with torch.no_grad():
        assert net.encode(torch.zeros(1, 3, 8, 8)).shape == (1, 32, 8, 8)


def test_encoding_keeps_places_where_they_are():
    """A changed pixel must change z around it only: the squeezes and the refinement undo each other's moves."""
    net = network(dpca=False)  # attention pools over the whole picture
    x = picture(160, 160)
    changed = x.clone()
    changed[..., 80, 80] = 1 - changed[..., 80, 80]
    with torch.no_grad():
        moved = (net.encode(x) != net.encode(changed)).any(1)[0].nonzero()
    assert (moved - 80).abs().max() < 79


@pytest.mark.parametrize("shape", [(1, 4, 2, 2), (2, 12, 3, 5)])
def test_pixel_shuffles_are_pytorchs(shape):
    x = torch.randn(shape)
    shuffled = torch.nn.functional.pixel_shuffle(x, 2)
    assert torch.equal(_pixel_shuffle(x), shuffled)
    assert torch.equal(_pixel_unshuffle(shuffled), x)


def test_inverse_block_swaps_the_halves_back():
    torch.manual_seed(1)
    block = ReversibleBlock(8).double()
    first, second = (on_grid(torch.randn(2, 8, 9, 7, dtype=torch.float64)) for _ in range(2))
    forward = block(first, second)
    assert torch.equal(forward[0], second)
    assert all(torch.equal(a, b) for a, b in zip(block.inverse(*forward), (first, second), strict=True))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("switches", [{}, {"cafe": False}], ids=str)
def test_inference_writes_over_its_own_maps_alone_and_gives_the_same_bits(switches, layout):
    net = network(**switches)
    x = picture(20, 24).contiguous(memory_format=layout)
    z = net.encode(x)  # recording gradients
    image = net.decode(z, (20, 24))
    with torch.no_grad():
        assert torch.equal(net.encode(x), z)
        assert torch.equal(net.decode(z, (20, 24)), image)
        assert torch.equal(net.encode(x), z), "x has changed"
        assert torch.equal(net.decode(z, (20, 24)), image), "z has changed"


def test_without_gradients_a_block_changes_nothing_that_it_was_given():
    block = ReversibleBlock(8)
    given = tuple(on_grid(torch.randn(1, 8, 9, 7)) for _ in range(2))
    before = tuple(stream.clone() for stream in given)
    steps = [Coupling(block), Coupling(block, inverse=True)] * 2
    with torch.no_grad():
        after = run_chain(steps, list(given))
    assert all(torch.equal(a, b) for a, b in zip((*given, *after), before * 2, strict=True))


def test_gradients_reach_every_parameter_through_both_directions():
    net = network()
    x = picture(16, 16)
    z = net.encode(x)
    # Noise, for the first block's half of the channels is zero in encoding and next to zero in plain decoding.
    (z.square().mean() + net.decode(z + torch.randn_like(z), (16, 16)).square().mean()).backward()
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 0, name


def test_rounding_passes_gradients_straight_through():
    x = torch.randn(50, dtype=torch.float64, requires_grad=True)
    y = round_to_quantum(x)
    assert torch.equal(y.detach(), on_grid(x.detach()))
    y.sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x))


def test_own_statistics_bring_the_picture_back():
    x = picture(45, 52)
    with torch.no_grad():
        result = network()(x, x).image
    assert (result - x).abs().max() < 1 / 255


def test_strength_zero_changes_nothing():
    x = picture(21, 30)
    with torch.no_grad():
        assert torch.equal(network()(x, picture(17, 64), strength=0.0).image, on_grid(x))


def test_recolouring_looks_at_the_range(monkeypatch):
    looked_at = []
    monkeypatch.setattr("restoration.flow.check_stream_range", lambda *streams: looked_at.extend(streams))
    net, x, y = network(), picture(12, 16), picture(8, 20)
    with torch.no_grad():
        z = net(x, y).transfer.z
        assert all(map(torch.equal, looked_at, (net.encode(x), net.encode(y), z))) and len(looked_at) == 3


def test_guides_and_outputs_begin_at_a_tenth_of_pytorchs_scale():
    features = ReversibleBlock(64).features
    values, guides = features.value_and_guide.weight.split([features.value_channels, GUIDE_CHANNELS])
    for weight, share in ((values, 1), (guides, 0.1), (features.weight, 0.1)):
        assert weight.std().item() == pytest.approx(share / (3 * weight[0].numel()) ** 0.5, rel=0.05)


@pytest.mark.parametrize("size,padded", [((1, 1), (8, 8)), ((8, 9), (8, 12)), ((13, 4), (16, 8))])
def test_padding_replicates_to_a_valid_size(size, padded):
    x = picture(*size)
    y = pad_to_valid_size(x)
    assert y.shape[-2:] == padded
    assert torch.equal(y[..., : size[0], : size[1]], x)
    assert torch.equal(y[..., -1, -1], x[..., -1, -1])


def test_different_sizes_of_painting_and_reference():
    with torch.no_grad():
        assert network()(picture(33, 21), picture(17, 64)).image.shape == (1, 3, 33, 21)


def test_values_past_the_exact_range_are_an_error():
    assert check_stream_range(torch.tensor([1.0, -2.5])) == 2.5
    for bad in (STREAM_LIMIT, float("nan"), float("inf")):
        with pytest.raises(OverflowError, match="exact"):
            check_stream_range(torch.tensor([1.0, bad]))
        with pytest.raises(OverflowError):
            check_stream_range(torch.tensor([1.0]), torch.tensor([bad]))


@pytest.mark.parametrize("fast", [True, False])
def test_a_processor_without_fast_bf16_is_told_once(fast, monkeypatch, caplog):
    monkeypatch.setattr(flow, "has_fast_bf16", lambda: fast)
    flow._warn_where_bf16_gains_nothing.cache_clear()
    for precision in ("fp32", "bf16", "bf16"):
        network(precision).encode(picture(16, 16))
    told = ["bf16 gains nothing over fp32 here" in record.message for record in caplog.records]
    assert told == ([] if fast else [True])
    assert all(record.levelno == logging.WARNING for record in caplog.records)


def test_a_first_pass_in_inference_mode_spoils_no_later_one():
    net, x = network("bf16"), picture(16, 20)
    with torch.inference_mode():
        first = net.encode(x)
    z = net.encode(x)
    z.sum().backward()
    assert torch.equal(z, first)


IMAGE = picture(16, 20)
CODE = torch.zeros(1, 8, 16, 20)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda net: net.encode(IMAGE[0]), r"image must be of shape \[B, 3, H, W\], got shape \[3, 16, 20\]"),
        (lambda net: net.encode_halves(IMAGE[:, :1]), r"image must be of shape \[B, 3, H, W\], got .*\[1, 1, 16, 20\]"),
        (lambda net: net.encode(IMAGE.byte()), "image must have the dtype of the weights, torch.float32, got .*uint8"),
        (lambda net: net.decode(CODE[:, 1:]), r"z must be of shape \[B, 8, H, W\], got shape \[1, 7, 16, 20\]"),
        (
            lambda net: net.decode(CODE[..., 1:]),
            r"z must have sides that are multiples of 4 and at least 8, .* 16, 19\]",
        ),
        (
            lambda net: net.decode(CODE[..., :4]),
            r"z must have sides that are multiples of 4 and at least 8, .* 16, 4\]",
        ),
        (lambda net: net.decode(CODE, in_order=False), "z must have sides .*, as encode returns it, got .*"),  # 4 x 80
        (lambda net: net.decode(CODE, (16, 21)), r"size must lie between \(1, 1\) and z's, \(16, 20\), got \(16, 21\)"),
        (lambda net: net.decode(CODE, (0, 20)), "size must lie between .*, got .*"),
        (lambda net: net(255 * IMAGE, IMAGE), r"degraded must lie in \[0, 1\], got values from 0 to 255"),
        (lambda net: net(IMAGE, IMAGE - 1), r"reference must lie in \[0, 1\], got values from -1 to 0"),
        (lambda net: net(IMAGE * float("nan"), IMAGE), r"degraded must lie in \[0, 1\], got values from nan to nan"),
        (
            lambda net: net(IMAGE, IMAGE.expand(2, -1, -1, -1)),
            "reference must have a batch of 1 or of degraded's, 1, got 2",
        ),
    ],
)
def test_rejects(call, message):
    with pytest.raises(ValueError, match=f"^ReversibleNetwork: {message}$"):
        call(network())


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"half_channels": 3}, "half_channels must be an integer of at least 4, got 3"),  # would drop colours
        ({"blocks_per_stage": 0}, "blocks_per_stage must be an integer of at least 1, got 0"),
        ({"refinement_blocks": -1}, "refinement_blocks must be an integer of at least 0, got -1"),
        ({"dpca": "no"}, "dpca must be True or False, got 'no'"),
    ],
)
def test_rejects_unknown_architectures(setting, message):
    with pytest.raises(ValueError, match=f"^Architecture: {message}$"):
        Architecture(**setting)


def test_rejects_unknown_precision():
    with pytest.raises(ValueError, match="precision must be one of fp32, bf16, got 'int8'"):
        ReversibleNetwork(SMALL, "int8")

"""The CUDA kernels of the gradients of the pixel-adaptive convolution on the CPU, behind the public function."""

import itertools

import compare
import pytest
import simt_build
import torch
from simt_build import needs_compiler

from restoration_kernels._samples import convert, samples

pytestmark = [needs_compiler, pytest.mark.usefixtures("simulated_gpu")]

OPERATOR = "pac_conv2d"
GRADIENTS = ("x", "guide", "weight", "bias")
TINY = samples(OPERATOR, "tiny")


def example(channels, outputs, guides, size, taps, *, batch=1, shared=False, **options):
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=generator)

    filters = (1, 1) if shared else (outputs, channels)
    return {
        "x": normal(batch, channels, *size),
        "guide": normal(batch, guides, *size) / (2 * guides) ** 0.5,
        "weight": normal(*filters, taps, taps) / (filters[1] * taps**2) ** 0.5,
        "bias": normal(outputs),
        **options,
    }


# Beside the samples: tiles of every size, and their edges; several passes over the channels of x, with which m cannot
# replace k; columns of the weights' product that are of one tap; pixels that nobody reads; more images, and more shares
# of the pixels, than a grid holds.
EXAMPLES = {
    "few_channels": example(3, 20, 9, (5, 27), 3, padding=1, batch=5),
    "passes": example(70, 9, 2, (9, 15), 3, padding=1, alpha=-0.5),
    "one_tap": example(64, 65, 3, (3, 27), 3, padding=1, normalize=True),
    "phases": example(17, 18, 2, (9, 11), 3, stride=(2, 4), padding=1, normalize=True, batch=2),
    # Phases of 129 and of 128 pixels, one more than a tile.
    "long_phases": example(2, 2, 1, (257, 1), 3, stride=(2, 1), padding=1),
    "far_taps": example(9, 3, 2, (7, 9), 5, padding=(6, 3), dilation=(3, 2)),
    # What all taps read of a tile does not fit into shared memory.
    "farther_taps": example(12, 5, 2, (6, 9), 5, padding=32, dilation=16),
    "many_outputs": example(5, 290, 2, (3, 5), 3, padding=1),
    # Several rectangles on both axes, and deeper products than one.
    "rectangles": example(6, 37, 2, (18, 35), 3, padding=1, batch=2),
    "shares": example(2, 3, 1, (30, 41), 3, padding=1),
    "shared": example(19, 19, 2, (5, 60), 3, shared=True, padding=1, batch=5),
    # More shares than a block adds up at once, more channels than one pass takes, more images than a grid holds, and
    # several tiles of outputs.
    "shared_blocks": example(2, 2, 1, (40, 60), 3, shared=True, padding=1),
    "shared_passes": example(12, 12, 2, (5, 9), 3, shared=True, padding=1),
    "wide_passes": example(20, 3, 2, (5, 6), 3, padding=1),
    "images": example(2, 3, 2, (4, 5), 3, padding=1, normalize=True, batch=5),
    "output_tiles": example(3, 150, 2, (5, 6), 3, padding=1),
    "one_tap_tiles": example(64, 130, 2, (3, 6), 3, padding=1),
    "shared_normalize": example(5, 5, 2, (6, 9), 5, shared=True, padding=3, stride=(1, 2), normalize=True, alpha=2.0),
}


def differentiate(backend, arguments, names=GRADIENTS):
    """The gradients by name; not the output, which other tests judge."""
    results = compare.differentiate(compare.public(OPERATOR, backend), arguments, names)
    return {name: results[name] for name in names if name in results}


def judge(arguments, ulps=compare.ULPS):
    ours = differentiate("cuda", arguments)
    exact = differentiate("reference", convert(arguments, torch.float64, "cpu"))
    compare.judge_all(ours, exact, differentiate("reference", arguments), ulps)
    return ours


def judge_in_both_orders(arguments, monkeypatch):
    """No bit depends on which threads run first."""
    monkeypatch.delenv("SIMT_REVERSE", raising=False)
    ours = judge(arguments)
    monkeypatch.setenv("SIMT_REVERSE", "1")
    for name, reverse in differentiate("cuda", arguments).items():
        assert torch.equal(reverse, ours[name]), name


def judge_dtype(arguments, dtype, monkeypatch):
    """Barriers are the same for every dtype: the orders are compared in float32, where products cost least here."""
    arguments = convert(arguments, dtype, "cpu")
    if dtype == torch.float32:
        return judge_in_both_orders(arguments, monkeypatch)
    judge(arguments, compare.kernel_ulps(dtype))


@pytest.mark.parametrize("sample", TINY, ids=lambda sample: sample.name)
@compare.every_dtype()
def test_samples(sample, dtype, monkeypatch):
    judge_dtype(sample.arguments(dtype), dtype, monkeypatch)


@pytest.mark.parametrize("sample", samples(OPERATOR, "odd"), ids=lambda sample: sample.name)
def test_odd_samples(sample, monkeypatch):
    judge_in_both_orders(sample.arguments(torch.float32), monkeypatch)


@pytest.mark.parametrize("name", EXAMPLES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_examples(name, dtype, monkeypatch):
    judge_dtype(EXAMPLES[name], dtype, monkeypatch)


@pytest.mark.parametrize("stride", [(1, 2), (3, 1), (2, 6), (4, 3)], ids=str)
def test_taps_that_read_a_phase(stride):
    """Every tap, some or none, as strides and dilations divide each other; or fewer pixels than a stride."""
    for dilation, padding in itertools.product([(1, 2), (2, 3), (4, 1), (3, 6)], [(6, 7), (9, 12)]):
        judge(example(3, 2, 1, (5, 4), 3, stride=stride, dilation=dilation, padding=padding, normalize=True))
        judge(example(2, 2, 1, (6, 7), 5, stride=stride, dilation=dilation, padding=(13, 11)))


@pytest.mark.parametrize("name", ["few_channels", "passes", "phases", "farther_taps", "rectangles"])
def test_tf32(name, monkeypatch):
    """Operands keep 13 bits less than float32's."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    judge(EXAMPLES[name], compare.ULPS * 2**13)


def test_tf32_is_asked_for(monkeypatch):
    """Its rounding shows, and only where torch allows it for convolutions."""
    exact = differentiate("cuda", EXAMPLES["few_channels"])
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    rounded = differentiate("cuda", EXAMPLES["few_channels"])
    assert all(not torch.equal(rounded[name], exact[name]) for name in ("x", "guide", "weight"))
    assert torch.equal(rounded["bias"], exact["bias"])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["few_channels", "phases", "shared"])
def test_gradient_of_a_wide_residual(name, dtype):
    """A convolution of half precision in a stream of float32, whose gradient is float32."""
    arguments = convert(EXAMPLES[name], dtype, "cpu")
    y = compare.public(OPERATOR, "reference")(**arguments)
    judge({**arguments, "residual": torch.zeros_like(y, dtype=torch.float32)})


@pytest.mark.parametrize("name", ["phases", "shared_normalize"])
def test_only_requested_grads(name):
    everything = differentiate("cuda", EXAMPLES[name])
    for gradient in GRADIENTS:
        compare.judge(
            gradient, differentiate("cuda", EXAMPLES[name], (gradient,))[gradient], everything[gradient].double()
        )


@pytest.mark.parametrize("sample", TINY, ids=lambda sample: sample.name)
def test_empty_batch(sample):
    arguments = sample.arguments(torch.float32)
    for name in ("x", "guide", "residual"):
        arguments[name] = arguments[name][:0] if arguments.get(name) is not None else None
    for name, gradient in differentiate("cuda", arguments).items():
        assert gradient.shape == arguments[name].shape
        assert not gradient.any()


@pytest.mark.parametrize("name", ["few_channels", "passes", "shared"])
def test_memory(name):
    """One number for each tap and place where m replaces k, two where it cannot."""
    arguments = EXAMPLES[name]
    B, C, H, W = arguments["x"].shape
    sizes = {"batch": B, "channels": C, "guide_channels": arguments["guide"].shape[1], "height": H, "width": W}
    sizes.update(out_channels=len(arguments["bias"]), kernel_size=3, stride=(1, 1), padding=(1, 1), dilation=(1, 1))
    sizes.update(normalize=False, shared=name == "shared", dtype=simt_build.dtype_code(arguments["x"]))
    count = simt_build.load_extension().pac_conv2d_backward_workspace_cuda
    planes = 1 if name == "few_channels" else 2
    guide_alone = count(**sizes, wanted=(False, True, False, False))
    assert 0 <= guide_alone - planes * 9 * B * H * W * 4 <= 2 * 9 * 4 * 64 * 128
    assert count(**sizes, wanted=(False, False, False, True)) <= 4 * 4 * len(arguments["bias"])


@pytest.mark.parametrize("spoiled", [torch.inf, torch.nan])
@pytest.mark.parametrize("name", ["few_channels", "passes"])
def test_spoiled_guide_stays_local(name, spoiled):
    """One pixel of Inf or NaN is felt in the nine pixels around it, and in no other lane of a tile."""
    arguments = EXAMPLES[name]
    clean = differentiate("cuda", arguments, ("x", "guide"))
    guide = arguments["guide"].clone()
    guide[:, 1, 2, 7] = spoiled
    results = differentiate("cuda", {**arguments, "guide": guide}, ("x", "guide"))
    elsewhere = torch.ones(guide.shape[2:], dtype=torch.bool)
    elsewhere[1:4, 6:9] = False
    for gradient, result in results.items():
        assert torch.equal(result[:, :, elsewhere], clean[gradient][:, :, elsewhere]), gradient
    assert results["guide"][:, 1, 2, 7].isnan().all()
    assert results["x"].isfinite().all() == (spoiled == torch.inf)


def test_spoiled_guide_is_not_felt_where_nobody_reads():
    """The slope of an output that does not exist is never read: 0 times Inf would be NaN."""
    arguments = {"x": torch.ones(1, 1, 3, 3), "guide": torch.zeros(1, 1, 3, 3), "weight": torch.ones(2, 1, 3, 3)}
    arguments["guide"][0, 0, 0, 0] = torch.inf
    assert differentiate("cuda", arguments, ("guide",))["guide"].isnan().nonzero().tolist() == [
        [0, 0, 0, 0],
        [0, 0, 1, 1],
    ]


def test_taps_inside_whose_kernels_are_zero():
    """Far from the colours inside, an output whose centre lies outside has nothing to divide by."""
    arguments = {"x": torch.ones(1, 1, 1, 1), "guide": torch.full((1, 1, 1, 1), 20.0)}
    judge({**arguments, "weight": torch.ones(1, 1, 3, 3), "padding": 2, "normalize": True})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_spoiled_x_stays_local(dtype):
    """It reaches the guide's gradient through the slopes of the outputs that read it."""
    arguments = convert(EXAMPLES["few_channels"], dtype, "cpu")
    clean = differentiate("cuda", arguments, ("x", "guide"))
    x = arguments["x"].clone()
    x[:, 1, 2, 7] = torch.nan
    results = differentiate("cuda", {**arguments, "x": x}, ("x", "guide"))
    assert torch.equal(results["x"], clean["x"])
    elsewhere = torch.ones(x.shape[2:], dtype=torch.bool)
    elsewhere[1:4, 6:9] = False
    assert torch.equal(results["guide"][:, :, elsewhere], clean["guide"][:, :, elsewhere])
    assert results["guide"][:, :, ~elsewhere].isnan().all()

"""The CUDA kernels of the pixel-adaptive convolution on the CPU, behind the public functions, as on a GPU."""

import compare
import pytest
import torch
import torch.nn.functional as F
from simt_build import both_orders, needs_compiler

from restoration_kernels import pac_conv2d, pac_conv2d_, pac_kernel2d
from restoration_kernels._samples import samples

pytestmark = [needs_compiler, pytest.mark.usefixtures("simulated_gpu")]

OPERATOR = "pac_conv2d"


@pytest.fixture
def tf32(monkeypatch):
    """Lets float32 factors be rounded to tf32."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)


def example(channels, outputs, guides, size, taps, *, dtype=torch.float32, batch=1, shared=False, **options):
    """Arguments of a call; more than its samples have, the channels of several tiles."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=generator).to(dtype)

    filters = (1, 1) if shared else (outputs, channels)
    return {
        "x": normal(batch, channels, *size),
        "guide": normal(batch, guides, *size) / (2 * guides) ** 0.5,
        "weight": normal(*filters, taps, taps) / (filters[1] * taps**2) ** 0.5,
        "bias": normal(outputs),
        **options,
    }


def judge(arguments, plain=pac_conv2d):
    ours = pac_conv2d(**arguments, backend="cuda")
    exact = pac_conv2d(**compare.convert(arguments, torch.float64, "cpu"), backend="reference")
    ulps = compare.kernel_ulps(arguments["x"].dtype)
    compare.judge("output", ours, exact, plain(**arguments, backend="reference"), ulps)


def pac_conv2d_in_tf32(x, guide, weight, bias, *, backend, normalize=False, **geometry):
    """The reference with both operands of its matrix product rounded."""
    kernel = pac_kernel2d(guide, weight.shape[-1], normalize=normalize, **geometry)[:, 0].flatten(1, 2)
    columns = F.unfold(x, weight.shape[-1], **geometry).unflatten(1, (x.shape[1], -1)) * kernel.flatten(2)[:, None]
    y = compare.round_to_tf32(weight).flatten(1) @ compare.round_to_tf32(columns).flatten(1, 2) + bias[:, None]
    return y.unflatten(2, kernel.shape[2:])


# Beside the samples: more tiles of outputs than a grid holds, slabs of unequal size, rows and columns of several tiles;
# taps in several groups; segments, for taps and pixels far apart; one tap; more shared memory than comes unasked; few
# channels, of which a fragment takes several taps.
EXAMPLES = {
    "tiles": example(9, 200, 3, (3, 20), 3, padding=1),
    "groups": example(9, 17, 2, (9, 20), 5, padding=(2, 3), dilation=(1, 2), normalize=True),
    "segments": example(12, 10, 2, (9, 150), 3, padding=(0, 70), dilation=(2, 70), stride=(3, 1)),
    "large_shared": example(9, 34, 1, (5, 300), 5, padding=(2, 0), dilation=(1, 47), stride=(2, 1)),
    "stride": example(17, 4, 9, (7, 131), 3, stride=(2, 4), padding=1, batch=2),
    "one_tap": example(8, 3, 1, (2, 5), 1),
    "few_channels": example(3, 18, 2, (3, 70), 5, padding=(2, 1)),
    "four_channels": example(4, 16, 2, (5, 20), 3, padding=1),
    "shared": example(19, 19, 2, (5, 70), 3, shared=True, padding=1),
    # Several tiles for one block: of outputs, whose kernel is kept; of channels with one filter.
    "kept_kernel": example(2, 200, 2, (3, 5), 5, padding=2),
    "shared_tiles": example(28, 28, 2, (3, 20), 3, shared=True, padding=1),
    "shared_groups": example(5, 5, 2, (5, 9), 5, shared=True, padding=3, dilation=2, normalize=True),
}
every_example = pytest.mark.parametrize("arguments", EXAMPLES.values(), ids=EXAMPLES.keys())


@both_orders
@pytest.mark.parametrize("sample", samples(OPERATOR, "tiny", "odd"), ids=lambda sample: sample.name)
@compare.every_dtype()
def test_samples(sample, dtype, order):
    judge(sample.arguments(dtype))


@both_orders
@every_example
@compare.every_dtype()
def test_examples(arguments, dtype, order):
    judge(compare.convert(arguments, dtype, "cpu"))


@both_orders
@pytest.mark.parametrize("name", [name for name in EXAMPLES if "shared" not in name or name == "large_shared"])
def test_tf32(name, tf32, order):
    judge(EXAMPLES[name], pac_conv2d_in_tf32)


def test_tf32_is_asked_for(monkeypatch):
    """Its rounding shows, and only where torch allows it for convolutions."""
    arguments = EXAMPLES["groups"]
    exact = pac_conv2d(**arguments, backend="cuda")
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    assert not torch.equal(pac_conv2d(**arguments, backend="cuda"), exact)


@both_orders
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("alpha", [1.0, -0.5])
def test_epilogue(dtype, alpha, order):
    """Rounded before alpha and residual, out of place and in it, to a residual of float32 too."""
    arguments = compare.convert(EXAMPLES["groups"], dtype, "cpu")
    quantum = 2.0**-4
    rounded = pac_conv2d(**arguments, quantum=quantum, residual=torch.zeros(1, 17, 9, 18), backend="cuda")
    plain = pac_conv2d(**arguments, residual=torch.zeros(1, 17, 9, 18), backend="cuda")
    assert torch.equal(rounded, (plain / quantum).round() * quantum)
    for residual in (torch.randn(1, 17, 9, 18), torch.randn(1, 17, 9, 18).to(dtype)):
        options = {"alpha": alpha, "quantum": quantum, "backend": "cuda"}
        output = pac_conv2d(**arguments, residual=residual, **options)
        assert output.dtype == residual.dtype
        assert torch.equal(output, (residual.float() + alpha * rounded).to(residual.dtype))
        assert pac_conv2d_(residual, **arguments, **options) is residual
        assert torch.equal(residual, output)


def test_epilogue_takes_itself_back():
    arguments = compare.convert(EXAMPLES["groups"], torch.bfloat16, "cpu")
    stream = torch.randn(1, 17, 9, 18).div(2**-16).round().mul(2**-16)
    there = pac_conv2d(**arguments, residual=stream, quantum=2**-16, backend="cuda")
    assert torch.equal(pac_conv2d_(there, **arguments, alpha=-1.0, quantum=2**-16, backend="cuda"), stream)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("spoiled", [torch.inf, torch.nan])
def test_spoiled_guide_stays_local(dtype, spoiled):
    """Also in lanes that a fragment or a tile has beyond the image and the last channel."""
    arguments = compare.convert(EXAMPLES["tiles"], dtype, "cpu")
    clean = pac_conv2d(**arguments, backend="cuda")
    guide = arguments["guide"].clone()
    guide[:, 1, 1, 16] = spoiled
    output = pac_conv2d(**{**arguments, "guide": guide}, backend="cuda")
    elsewhere = torch.ones(3, 20, dtype=torch.bool)
    elsewhere[:, 15:18] = False
    assert torch.equal(output[:, :, elsewhere], clean[:, :, elsewhere])
    if spoiled == torch.inf:
        centre_alone = F.conv2d(
            arguments["x"].float(), arguments["weight"][:, :, 1:2, 1:2].float(), arguments["bias"].float()
        )
        torch.testing.assert_close(output[:, :, 1, 16].float(), centre_alone[:, :, 1, 16], rtol=1e-2, atol=1e-2)
        assert output.isfinite().all()


def test_inf_in_x_stays_local():
    arguments = compare.convert(EXAMPLES["tiles"], torch.float32, "cpu")
    clean = pac_conv2d(**arguments, backend="cuda")
    x = arguments["x"].clone()
    x[:, 8, 0, 3] = torch.inf
    output = pac_conv2d(**{**arguments, "x": x}, backend="cuda")
    elsewhere = torch.ones(3, 20, dtype=torch.bool)
    elsewhere[:2, 2:5] = False
    assert torch.equal(output[:, :, elsewhere], clean[:, :, elsewhere])
    assert not output[:, :, ~elsewhere].isfinite().any()


def test_normalize_without_taps_gives_the_bias():
    x, weight, bias = torch.randn(1, 9, 1, 1), torch.randn(3, 9, 3, 3), torch.tensor([0.5, -1.0, 2.0])
    output = pac_conv2d(x, x, weight, bias, padding=3, normalize=True, backend="cuda")
    assert torch.equal(output[0, :, 0, 0], bias)
    assert not torch.equal(output[0, :, 2, 2], bias)


def test_planes_of_more_than_32_bits_are_refused():
    x = torch.zeros(1, 1, 1, 1)
    with pytest.raises(RuntimeError, match="its kernel counts the pixels of a padded plane in 32 bits"):
        pac_conv2d(x, x, x, padding=2**15, backend="cuda")


def test_taps_beyond_32_bits(monkeypatch):
    compare.check_taps_beyond_32_bits("cuda", monkeypatch)

"""Pixel-adaptive convolution in pieces: strips, tiles, threads, instruction sets, and maps larger than the samples."""

import importlib
import itertools
from unittest import mock

import compare
import pytest
import torch

from restoration_kernels._samples import Sample, _pac_conv2d, samples

OPERATOR = "pac_conv2d"
GRADIENTS = ("x", "guide", "weight", "bias", "residual")
TRITON_MODULES = ("pac_conv2d_triton", "pac_conv2d_backward_triton", "pac_conv2d_backward_weight_triton")
# Taps that reach from a thread's rows far into those of the next.
FAR_TAPS = _pac_conv2d(1, 8, 8, 2, 96, 40, 3, padding=16, dilation=16)


# Beyond what the samples reach: strips narrower than the image, taps read one by one, channels of the guide in blocks.
@pytest.mark.parametrize(
    ("channels", "outputs", "guides", "size", "taps", "options"),
    [
        (70, 9, 9, (9, 130), 3, {"padding": 1}),
        (70, 3, 17, (11, 210), 3, {"padding": (1, 3), "stride": (1, 2), "normalize": True}),
        (40, 2, 1, (19, 140), 5, {"padding": 20, "dilation": (3, 16)}),
        (40, 40, 8, (19, 140), 5, {"padding": 32, "dilation": 16}),
    ],
    ids=["narrow_strips", "stride", "dilation", "far_taps"],
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_many_channels(channels, outputs, guides, size, taps, options, dtype):
    check_against_reference("cpu", channels, outputs, guides, size, taps, options, dtype)


@pytest.mark.parametrize("backend", compare.KERNELS)
@pytest.mark.parametrize(("taps", "dilation"), [(3, 1), (3, 4), (5, 1), (5, 2)])
@pytest.mark.parametrize("normalize", [False, True], ids=["plain", "normalized"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_same_padding(backend, taps, dilation, normalize, dtype):
    """Output places are the image's, so that k_t(p) = k_-t(p+t) may serve twice; normalised, it may not."""
    options = {"padding": taps // 2 * dilation, "dilation": dilation, "normalize": normalize}
    check_against_reference(backend, 16, 16, 3, (70, 40), taps, options, dtype)


def test_one_filter_for_a_large_map():
    """Its gradient is a sum over all places and channels, which float32 alone would blur."""
    check_against_reference("cpu", 32, 32, 4, (128, 128), 3, {"padding": 1, "shared": True}, torch.float32)


# Small enough for Triton's interpreter: tiles of places and steps of products that do not fit, and a stride's phases.
@compare.every_backend(OPERATOR)
@pytest.mark.parametrize(
    ("channels", "outputs", "guides", "size", "options"),
    [
        (18, 17, 17, (5, 33), {"padding": 1}),
        (17, 18, 3, (9, 35), {"stride": (2, 1), "padding": (2, 0), "normalize": True}),
        (17, 17, 2, (9, 35), {"stride": (2, 1), "padding": (0, 1), "shared": True}),
        (33, 2, 2, (3, 5), {"padding": 1}),
    ],
    ids=["guide", "stride", "shared", "channels"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_many_tiles(backend, channels, outputs, guides, size, options, dtype):
    check_against_reference(backend, channels, outputs, guides, size, 3, options, dtype)


@compare.every_backend(OPERATOR)
def test_a_stride_far_beyond_the_map(backend):
    """Lanes beyond the only output place lie beyond what 32 bits count."""
    check_against_reference(backend, 2, 2, 2, (1, 17), 1, {"stride": (1, 2**28 - 1)}, torch.float32)


@compare.every_backend(OPERATOR)
@pytest.mark.parametrize("options", [{"padding": 1}, {"stride": (2, 1), "normalize": True}], ids=["same", "stride"])
def test_half_precision_on_tensor_cores(backend, options):
    """As few channels as they multiply and a few more, on a map small enough for every run of Triton's interpreter."""
    check_against_reference(backend, 18, 17, 2, (3, 5), 3, options, torch.float16)


@pytest.mark.parametrize(
    ("channels", "outputs", "options", "dtype"),
    [
        (3, 17, {"padding": 1}, torch.float32),
        (5, 5, {"padding": 1, "shared": True}, torch.float32),
        (16, 65, {"padding": 1}, torch.float16),
    ],
    ids=["sum-float32", "filter-float32", "dot-float16"],
)
def test_many_tiles_of_triton(monkeypatch, channels, outputs, options, dtype):
    """Every tile that a call may take gives right results, not only the first, which deterministic calls take."""
    pytest.importorskip("triton")
    counts = []

    def start_with_one(tuned, grid, *arguments):
        counts.append(len(tuned.configs))
        tuned.fn[grid](*arguments, **tuned.configs[number % len(tuned.configs)].all_kwargs())

    for module in TRITON_MODULES:
        monkeypatch.setattr(f"restoration_kernels.{module}.start", start_with_one)
    for number in itertools.count():
        check_against_reference("triton", channels, outputs, 3, (3, 17), 3, options, dtype)
        if number + 1 >= max(counts):
            break


def test_many_tiles_of_one_program_of_triton(monkeypatch):
    """Of maps so large that a program adds up the gradient of the weights over several tiles of places."""
    pytest.importorskip("triton")
    monkeypatch.setattr("restoration_kernels.pac_conv2d_backward_weight_triton._PROGRAMS", 1)
    check_against_reference("triton", 4, 5, 2, (5, 17), 3, {"padding": 1}, torch.float32)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("operator", ["pac_conv2d", "pac_conv2d_"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_triton_times_tiles(operator, dtype):
    """Where runs may differ, as in training, the first call tries all tiles: no trial may leave its marks."""
    arguments = compare.arguments_for("triton", samples(operator, "odd")[0], dtype)
    names = GRADIENTS if operator == OPERATOR else ()
    reference = compare.public(OPERATOR, "reference")
    exact = compare.differentiate(reference, compare.convert(arguments, torch.float64, "cpu"), names)
    plain = compare.differentiate(reference, arguments, names)
    importlib.import_module("restoration_kernels.pac_conv2d_triton").tuner.cache_clear()
    torch.use_deterministic_algorithms(False)
    compare.judge_all(compare.differentiate(compare.public(operator, "triton"), arguments, names), exact, plain)


@pytest.mark.parametrize("deterministic", [True, False])
def test_triton_times_no_tiles_where_runs_must_not_differ(deterministic):
    """A clock might choose another tile, and with it other bits, in the next run."""
    pytest.importorskip("triton")
    first = mock.Mock(all_kwargs=lambda: {"ROWS": 2})
    tuned = mock.MagicMock(configs=[first, mock.Mock()])
    torch.use_deterministic_algorithms(deterministic)
    importlib.import_module("restoration_kernels.pac_conv2d_triton").start(tuned, "grid", "x")
    if deterministic:
        tuned.fn["grid"].assert_called_once_with("x", ROWS=2)
        tuned["grid"].assert_not_called()
    else:
        tuned["grid"].assert_called_once_with("x")
        tuned.fn["grid"].assert_not_called()


@pytest.mark.parametrize("backend", compare.KERNELS)
def test_taps_beyond_32_bits(backend, monkeypatch):
    compare.check_taps_beyond_32_bits(backend, monkeypatch)


@pytest.mark.parametrize(
    "sample",
    [samples(OPERATOR, "odd")[0], Sample(OPERATOR, "far_taps", "odd", FAR_TAPS)],
    ids=lambda sample: sample.name,
)
def test_any_thread_count(sample):
    """Threads share the strips of an image; what they add to the same gradients does not depend on who was first."""
    arguments = sample.arguments(torch.float32)
    function, threads = compare.public(OPERATOR, "cpu"), torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3, 4, 4):
            torch.set_num_threads(count)
            results.append(compare.differentiate(function, arguments, GRADIENTS))
    finally:
        torch.set_num_threads(threads)
    for name, value in results[0].items():
        for other in results[1:]:
            if name in ("output", "x", "guide"):
                assert torch.equal(other[name], value), name
            compare.judge(name, other[name], value.double())
        assert torch.equal(results[-2][name], results[-1][name]), name


@compare.every_lesser_instruction_set()
def test_lesser_instruction_sets(isa, dtype, tmp_path):
    compare.check_instruction_set(samples(OPERATOR, "odd")[0], isa, dtype, tmp_path)


def check_against_reference(backend, channels, outputs, guides, size, taps, options, dtype):
    """Output and gradients by the judge, of random tensors."""
    generator = torch.Generator().manual_seed(0)
    filters = (1, 1) if options.get("shared") else (outputs, channels)

    def normal(*shape):
        return torch.randn(shape, generator=generator).to(compare.device(backend), dtype)

    arguments = {
        "x": normal(1, channels, *size),
        "guide": normal(1, guides, *size) / (2 * guides) ** 0.5,
        "weight": normal(*filters, taps, taps) / (filters[1] * taps**2) ** 0.5,
        "bias": normal(outputs),
        **{name: value for name, value in options.items() if name != "shared"},
    }
    compare.skip_unless_able(backend, OPERATOR, arguments)
    reference = compare.public(OPERATOR, "reference")
    ours = compare.differentiate(compare.public(OPERATOR, backend), arguments, GRADIENTS)
    exact = compare.differentiate(reference, compare.convert(arguments, torch.float64, "cpu"), GRADIENTS)
    if dtype == torch.float64:
        compare.judge_all(ours, exact, ulps=compare.REFERENCE_ULPS[dtype])
    else:
        compare.judge_all(ours, exact, compare.differentiate(reference, arguments, GRADIENTS))

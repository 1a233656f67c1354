"""The CUDA kernels of the contrastive loss on the CPU, behind the public functions, as a GPU would run them."""

import compare
import pytest
import simt_build
import torch
from simt_build import both_orders, needs_compiler

from restoration_kernels import info_nce, neighbor_difference
from restoration_kernels._samples import DIFFERENTIABLE, samples

pytestmark = [needs_compiler, pytest.mark.usefixtures("simulated_gpu")]

CASES = [
    pytest.param(sample, id=f"{sample.operator}-{sample.name}")
    for operator in ("neighbor_difference", "info_nce")
    for sample in samples(operator, "tiny", "odd")
]


@both_orders
@pytest.mark.parametrize("sample", CASES)
@compare.every_dtype()
def test_values(sample, dtype, order):
    arguments = sample.arguments(dtype)
    names = DIFFERENTIABLE[sample.operator]
    reference = compare.public(sample.operator, "reference")
    ours = compare.differentiate(compare.public(sample.operator, "cuda"), arguments, names)
    exact = compare.differentiate(reference, compare.convert(arguments, torch.float64, "cpu"), names)
    ulps = compare.kernel_ulps(dtype)
    compare.judge_all(ours, exact, compare.differentiate(reference, arguments, names), ulps)


@both_orders
@pytest.mark.parametrize("width", [1, 16, 65, 130, 300])
def test_info_nce_of_any_width(width, order):
    """Beside the edges of tiles, wider than the columns that one block owns, and more images than a grid holds."""
    query, key = torch.nn.functional.normalize(torch.randn(2, 5, 67, width, dtype=torch.float64), dim=-1)
    results = [
        compare.differentiate(compare.public("info_nce", backend), {"query": query, "key": key}, ("query",))
        for backend in ("cuda", "reference")
    ]
    compare.judge_all(*results, ulps=compare.REFERENCE_ULPS[torch.float64])


@both_orders
@pytest.mark.parametrize(
    "shape", [(5, 65, 64), (1, 150, 72), (1, 129, 128), (1, 16, 8), (1, 1, 8), (1, 20, 136)], ids=str
)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_info_nce_on_tensor_cores(shape, dtype, order):
    """Rows and keys that end in the middle of a tile, widths in the middle of a fragment; and what they do not take."""
    query, key = torch.nn.functional.normalize(torch.randn(2, *shape, dtype=torch.float64), dim=-1).to(dtype)
    arguments = {"query": query, "key": key}
    ours, plain = (
        compare.differentiate(compare.public("info_nce", backend), arguments, ("query",))
        for backend in ("cuda", "reference")
    )
    exact = compare.differentiate(
        compare.public("info_nce", "reference"), compare.convert(arguments, torch.float64, "cpu"), ("query",)
    )
    compare.judge_all(ours, exact, plain)


@both_orders
@pytest.mark.parametrize("deterministic", [True, False], ids=["sorted", "atomic"])
@pytest.mark.parametrize("channels_last", [True, False], ids=["channels_last", "nchw"])
def test_repeated_places_accumulate(deterministic, channels_last, order):
    torch.use_deterministic_algorithms(deterministic, warn_only=True)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    features = torch.randn(3, 5, 4, 4, dtype=torch.float64).contiguous(memory_format=layout)
    anchors, neighbors = torch.tensor([5, 5, 10]), torch.full((3, 8), 5)
    arguments = {"features": features, "anchors": anchors, "neighbors": neighbors}
    ours, right = (
        compare.differentiate(compare.public("neighbor_difference", backend), arguments, ("features",))
        for backend in ("cuda", "reference")
    )
    compare.judge_all(ours, right)
    assert ours["features"].is_contiguous(memory_format=layout)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "channels_last"])
def test_places_beyond_32_bits(layout, monkeypatch):
    compare.check_places_beyond_32_bits("cuda", layout, monkeypatch)


@pytest.mark.parametrize("place", [-1, 16])
def test_places_that_nobody_has_looked_at_end_the_kernel(monkeypatch, place):
    monkeypatch.setattr("restoration_kernels._checks.neighbor_difference", lambda *arguments: None)
    anchors, neighbors = torch.tensor([5, place]), torch.full((2, 8), 6)
    with pytest.raises(RuntimeError, match=r"^simt: __trap"):
        neighbor_difference(torch.zeros(1, 3, 4, 4), anchors, neighbors, backend="cuda")


def test_atomic_addition_refuses_half_precision():
    addresses = dict.fromkeys(("grad_y", "places", "order", "grad_x"), 0)
    names = ("batch", "channels", "map_places", "anchors", "channel_stride", "place_stride", "stream")
    dtype = simt_build.load_extension().DTYPES["float16"]
    with pytest.raises(ValueError, match=r"^neighbor_difference: order must be given for half precision, got none$"):
        simt_build.load_extension().neighbor_difference_backward_cuda(
            **addresses, **dict.fromkeys(names, 0), dtype=dtype
        )


def test_empty_batch():
    features, rows = torch.empty(0, 2, 4, 4, requires_grad=True), torch.empty(0, 3, 2, requires_grad=True)
    places = torch.tensor([5]), torch.zeros(1, 8, dtype=torch.int64)
    for output, leaf in (
        (neighbor_difference(features, *places, backend="cuda"), features),
        (info_nce(rows, rows, backend="cuda"), rows),
    ):
        (gradient,) = torch.autograd.grad(output.sum(), leaf)
        assert gradient.shape == leaf.shape

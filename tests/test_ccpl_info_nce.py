import math
from pathlib import Path

import compare
import pytest
import torch
import torch.nn.functional as F

from benchmarks import bench_ccpl, peak_memory
from restoration_kernels import info_nce
from restoration_kernels._samples import Sample, _info_nce

OPERATOR = "info_nce"
TEMPERATURE = 0.07
ROWS = torch.randn(1, 6, 3)


def definition(query, key, temperature):
    """The cross-entropy of one row after the other, with the row's own number as its class."""
    images = [q @ k.T / temperature for q, k in zip(query, key, strict=True)]
    losses = [[F.cross_entropy(row, torch.tensor(i)) for i, row in enumerate(logits)] for logits in images]
    return torch.stack([torch.stack(image) for image in losses])


@compare.every_case(OPERATOR)
@compare.every_dtype()
def test_forward(backend, sample, dtype):
    compare.check_values(backend, sample, dtype, definition)


@compare.every_case(OPERATOR)
@compare.every_dtype()
def test_backward(backend, sample, dtype):
    compare.check_values(backend, sample, dtype, definition, ("query",))


@compare.every_tiny_case(OPERATOR)
def test_gradcheck(backend, sample):
    compare.check_gradcheck(backend, sample)


@compare.one_case(OPERATOR, backends=compare.KERNELS)
def test_second_derivatives_refused(backend, sample):
    compare.check_second_derivatives_refused(backend, sample)


@compare.every_tiny_case(OPERATOR, backends=compare.KERNELS)
def test_opcheck(backend, sample):
    compare.check_opcheck(backend, sample)


@compare.one_case(OPERATOR)
def test_compile(backend, sample):
    # The reference is plain PyTorch, of which inductor makes C++ that takes ten seconds to compile.
    compare.check_compile(backend, sample, "aot_eager" if backend == "reference" else "inductor")


def test_compile_varying_temperature():
    """What changes between calls becomes a variable of the graph."""
    torch.compiler.reset()
    query, key = F.normalize(torch.randn(2, 1, 6, 4), dim=-1)
    compiled = torch.compile(info_nce, backend="aot_eager", fullgraph=True)
    for temperature in (0.07, 0.1, 0.2):
        assert torch.equal(compiled(query, key, temperature), info_nce(query, key, temperature))


@pytest.mark.slow
@compare.one_case(OPERATOR, backends=("reference",))
def test_compile_reference(backend, sample):
    compare.check_compile(backend, sample, "inductor")


@compare.one_case(OPERATOR)
def test_export(backend, sample):
    compare.check_export(backend, sample, {"query": (0, 1, 2), "key": (0, 1, 2)})


@compare.one_case(OPERATOR)
@compare.every_layout()
def test_layouts(backend, sample, layout):
    compare.check_layouts(backend, sample, layout)


@compare.one_case(OPERATOR)
def test_edge_shapes(backend, sample):
    compare.check_empty_batch(backend, sample, batched=("query", "key"))


@compare.one_case(OPERATOR)
def test_only_requested_grads(backend, sample):
    compare.check_only_requested_grads(backend, sample)


@compare.every_case(OPERATOR)
def test_deterministic(backend, sample):
    compare.check_deterministic(backend, sample)


@compare.one_case(OPERATOR)
def test_autocast_widens_rows(backend, sample):
    arguments = compare.arguments_for(backend, sample, torch.bfloat16)
    query, key = arguments["query"].float(), arguments["key"].float()
    with torch.autocast(query.device.type, torch.bfloat16):
        output = info_nce(query, arguments["key"], backend=backend)
    assert output.dtype == torch.float32
    assert torch.equal(output, info_nce(query, key, backend=backend))


def test_documented_temperature():
    query, key = torch.randn(2, 1, 5, 3)
    assert torch.equal(info_nce(query, key), info_nce(query, key, TEMPERATURE))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((ROWS, ROWS[:, 1:]), r"key must be of shape \[1, 6, 3\], got shape \[1, 5, 3\]"),
        ((ROWS, ROWS.double()), r"key must have the dtype of query, torch.float32, got torch.float64"),
        ((ROWS, ROWS, 0), r"temperature must be a finite positive number, got 0"),
        ((ROWS, ROWS, 9e-31), r"temperature must be at least 1e-30, got 9e-31"),
        ((ROWS, ROWS, math.nan), r"temperature must be a finite positive number, got nan"),
    ],
)
@compare.every_backend(OPERATOR)
def test_rejects(arguments, message, backend):
    with pytest.raises(ValueError, match=f"^info_nce: {message}$"):
        info_nce(*arguments, backend=backend)


@compare.every_backend(OPERATOR)
def test_identity_far_apart(backend):
    """Orthogonal rows: the others weigh exp(-1/τ) each. Logits of ten thousand neither overflow nor vanish."""
    rows = torch.eye(4, dtype=torch.float64, device=compare.device(backend))[None]
    compare.skip_unless_able(backend, OPERATOR, {"query": rows, "key": rows})
    loss = info_nce(rows, rows, TEMPERATURE, backend=backend)
    torch.testing.assert_close(loss, torch.full_like(loss, math.log1p(3 * math.exp(-1 / TEMPERATURE))))
    assert torch.equal(info_nce(700 * rows, rows, TEMPERATURE, backend=backend), torch.zeros_like(loss))
    backwards = info_nce(700 * rows, rows.flip(1), TEMPERATURE, backend=backend)
    torch.testing.assert_close(backwards, torch.full_like(loss, 10_000))


@compare.every_backend(OPERATOR)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_identity_found_exactly(backend, dtype):
    """Far from all other rows: no digit of large logits may be left over, and a loss is never negative."""
    rows = torch.eye(32, dtype=dtype, device=compare.device(backend))[None]
    compare.skip_unless_able(backend, OPERATOR, {"query": rows, "key": rows})
    # A temperature whose inverse is rounded, and multiples of it whose products are.
    query = rows * torch.linspace(600, 700, 32, device=rows.device)[:, None].to(dtype)
    assert torch.equal(info_nce(query, rows, TEMPERATURE, backend=backend).cpu(), torch.zeros(1, 32))


def run_info_nce(backend, query, key, temperature):
    """Loss and gradient to the query, of the sum of all losses."""
    arguments = {name: rows.to(compare.device(backend)) for name, rows in (("query", query), ("key", key))}
    compare.skip_unless_able(backend, OPERATOR, {**arguments, "temperature": temperature})
    query = arguments["query"].requires_grad_()
    loss = info_nce(query, arguments["key"], temperature, backend=backend)
    return loss.detach().cpu(), torch.autograd.grad(loss.sum(), query)[0].cpu()


@compare.every_backend(OPERATOR)
@pytest.mark.parametrize("temperature", [0.07, 0.01])
@pytest.mark.parametrize("shape", [(2, 97, 16), (1, 130, 512)], ids=str)
def test_identity_cross_entropy(backend, temperature, shape):
    """That of all logits at once, with the diagonal as target."""
    query, key = F.normalize(torch.randn(2, *shape, dtype=torch.float64), dim=-1)
    loss, gradient = run_info_nce(backend, query, key, temperature)
    query.requires_grad_()
    logits = query @ key.mT / temperature
    target = torch.arange(shape[1]).expand(shape[0], -1)
    expected = F.cross_entropy(logits.mT, target, reduction="none")
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected.sum(), query)[0], rtol=1e-6, atol=1e-6)
    assert gradient.norm(dim=-1).max() <= 2 / temperature


def test_rounds_like_the_reference():
    """Thousands of keys, added up one after the other, would round twice as much as the judge allows."""
    sample = Sample(OPERATOR, "3000_rows", "odd", _info_nce(1, 3000, 64))
    compare.check_values("cpu", sample, torch.float32, None, ("query",))


@pytest.mark.slow
def test_of_many_rows_takes_little_memory():
    """Where every copy of the logits would take 4 GB."""
    name = "info_nce/forward+backward/32768_rows/cpu"
    peak = peak_memory.measure_files({Path(bench_ccpl.__file__): [name]}, quick=False)[name]
    if peak is None:
        pytest.skip("only Linux tells the peak, and only of a kernel that can run")
    assert peak < 100e6


@compare.every_backend(OPERATOR)
def test_identity_by_hand(backend):
    """Two places of each of two colours: a row finds its own key among two that are the same, and two others."""
    rows = torch.tensor([[[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0]]], dtype=torch.float64)
    loss, gradient = run_info_nce(backend, rows, rows, 1.0)
    total = 2 * math.e + 2
    torch.testing.assert_close(loss, torch.full_like(loss, math.log(total) - 1))
    pull, push = 2 * math.e / total - 1, 2 / total
    expected = torch.tensor([[[pull, push], [pull, push], [push, pull], [push, pull]]], dtype=torch.float64)
    torch.testing.assert_close(gradient, expected)


@compare.every_backend(OPERATOR)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_of_one_row_is_zero(backend, dtype):
    query, key = torch.randn(2, 3, 1, 20, dtype=dtype)
    loss, gradient = run_info_nce(backend, query, key, 0.01)
    assert not loss.any() and not gradient.any()


@compare.every_backend(OPERATOR)
@pytest.mark.parametrize("place", ["query", "key"])
def test_shows_nan(backend, place):
    """A diverged network is seen, not averaged away."""
    rows = {name: torch.randn(1, 70, 5) for name in ("query", "key")}
    rows[place][0, 40, 2] = math.nan
    loss, _ = run_info_nce(backend, **rows, temperature=0.07)
    expected = torch.arange(70) == 40 if place == "query" else torch.ones(70, dtype=torch.bool)
    assert torch.equal(loss[0].isnan(), expected)


@compare.every_backend(OPERATOR)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_of_half_precision_is_float32(backend, dtype):
    query = torch.randn(1, 5, 3, dtype=dtype, device=compare.device(backend))
    compare.skip_unless_able(backend, OPERATOR, {"query": query, "key": query})
    assert info_nce(query, query, backend=backend).dtype == torch.float32


@compare.every_backend(OPERATOR)
def test_key_gets_no_gradient(backend):
    query, key = torch.randn(2, 1, 5, 3, device=compare.device(backend))
    key.requires_grad_()
    compare.skip_unless_able(backend, OPERATOR, {"query": query, "key": key})
    assert not info_nce(query, key, backend=backend).requires_grad

"""The template for the tests of an operator: what compare.py asks of every operator, then what is special to this."""

import compare
import pytest
import torch
import torch.nn.functional as F

from restoration_kernels import _backend, dual_pool_attention
from restoration_kernels._samples import Sample, _dual_pool_attention

OPERATOR = "dual_pool_attention"


def definition(x, weight, pool_size=50):
    """As the paper draws it: two poolings, then the filter over channels, one sum at a time."""
    means = F.adaptive_avg_pool2d(x, pool_size).mean((2, 3))
    reach = len(weight) // 2
    padded = F.pad(means, (reach, reach))
    logits = [sum(weight[j] * padded[:, c + j] for j in range(len(weight))) for c in range(x.shape[1])]
    return x * torch.sigmoid(torch.stack(logits, 1))[:, :, None, None]


@compare.every_case(OPERATOR)
@compare.every_dtype()
def test_forward(backend, sample, dtype):
    compare.check_values(backend, sample, dtype, definition)


@compare.every_case(OPERATOR)
@compare.every_dtype()
def test_backward(backend, sample, dtype):
    compare.check_values(backend, sample, dtype, definition, ("x", "weight"))


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


@pytest.mark.slow
@compare.one_case(OPERATOR, backends=("reference",))
def test_compile_reference(backend, sample):
    compare.check_compile(backend, sample, "inductor")


@compare.one_case(OPERATOR)
def test_export(backend, sample):
    compare.check_export(backend, sample, dynamic={"x": (0, 1, 2, 3)})


@compare.one_case(OPERATOR)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_autocast(backend, sample, dtype):
    """The maps keep their dtype; the weight, a parameter, follows them."""
    arguments = compare.arguments_for(backend, sample, dtype)
    expected = dual_pool_attention(**arguments, backend=backend)
    with torch.autocast(expected.device.type, torch.bfloat16):
        output = dual_pool_attention(**{**arguments, "weight": arguments["weight"].float()}, backend=backend)
    assert output.dtype == dtype
    assert torch.equal(output, expected)


@compare.one_case(OPERATOR)
@compare.every_layout()
def test_layouts(backend, sample, layout):
    compare.check_layouts(backend, sample, layout)


@compare.one_case(OPERATOR)
def test_result_is_contiguous(backend, sample):
    arguments = compare.arguments_for(backend, sample, torch.float32)
    arguments["x"] = arguments["x"].contiguous(memory_format=torch.channels_last)
    assert dual_pool_attention(**arguments, backend=backend).is_contiguous()


@compare.one_case(OPERATOR)
def test_edge_shapes(backend, sample):
    compare.check_empty_batch(backend, sample, batched=("x",))
    # Rows much longer than columns, more channels than a filter reaches, a filter longer than the channels are many;
    # more tiles of a plane, and more planes, than Triton's kernels add up at once.
    for shape, taps, pool_size in (
        *(((1, 1, 1, 300), 1, 50), ((1, 40, 2, 3), 3, 1), ((3, 2, 55, 51), 9, 50)),
        *(((1, 1, 16 * 257, 1), 3, 50), ((2, 130, 1, 3), 3, 50)),
    ):
        x = torch.randn(shape, dtype=torch.float64, device=compare.device(backend))
        arguments = {"x": x, "weight": torch.randn(taps, dtype=x.dtype, device=x.device), "pool_size": pool_size}
        ours, exact = (
            compare.differentiate(function, arguments, ("x", "weight"))
            for function in (compare.public(OPERATOR, backend), definition)
        )
        compare.judge_all(ours, exact, ulps=compare.REFERENCE_ULPS[torch.float64])


@pytest.mark.parametrize("backend", compare.KERNELS)
@pytest.mark.parametrize("shape", [(1, 3, 300, 300), (1, 2, 1100, 1100)], ids=str)
def test_large_maps(backend, shape):
    """Planes of several strips, and results that the CPU's kernel writes past the caches, which could not hold them."""
    sample = Sample(OPERATOR, "large", "odd", _dual_pool_attention(*shape))
    compare.check_values(backend, sample, torch.float32, definition, ("x", "weight"))


@compare.one_case(OPERATOR)
def test_only_requested_grads(backend, sample):
    compare.check_only_requested_grads(backend, sample)


@compare.every_case(OPERATOR)
def test_deterministic(backend, sample):
    compare.check_deterministic(backend, sample)


@compare.one_case(OPERATOR)
def test_identity_zero_weight_halves(backend, sample):
    x = compare.arguments_for(backend, sample, torch.float32)["x"]
    assert torch.equal(dual_pool_attention(x, x.new_zeros(3), backend=backend), x / 2)


@compare.every_backend(OPERATOR)
def test_identity_constant_maps(backend):
    """The pooled mean of a constant is that constant, whatever the overlap of the bins."""
    x = torch.full((1, 3, 61, 37), 0.5, dtype=torch.float64, device=compare.device(backend))
    weight = torch.tensor([0.0, 2.0, 0.0]).to(x)
    compare.skip_unless_able(backend, OPERATOR, {"x": x, "weight": weight})
    expected = 0.5 * torch.sigmoid(torch.ones_like(x[:1, :1, :1, :1]))
    torch.testing.assert_close(dual_pool_attention(x, weight, backend=backend), expected.expand_as(x))


X = torch.randn(1, 4, 5, 6)
WEIGHT = torch.randn(3)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((None, WEIGHT), TypeError, r"x must be a dense tensor of shape \[B, C, H, W\], got NoneType"),
        ((X.to_sparse(), WEIGHT), TypeError, r"x must be a dense tensor .*, got a tensor of layout torch.sparse_coo"),
        ((X[0], WEIGHT), ValueError, r"x must be of shape \[B, C, H, W\], got shape \[4, 5, 6\]"),
        (
            (X[..., :0], WEIGHT),
            ValueError,
            r"x must be empty along no axis .*, got shape \[1, 4, 5, 0\]",
        ),
        ((X.long(), WEIGHT), ValueError, r"x must have dtype .*, got torch.int64"),
        ((X, WEIGHT.double()), ValueError, r"weight must have the dtype of x, torch.float32, got torch.float64"),
        ((X, WEIGHT.to("meta")), ValueError, r"weight must be on the device of x, cpu, got meta"),
        ((X, WEIGHT[:2]), ValueError, r"weight must have an odd number of entries, got 2"),
        ((X, WEIGHT[None]), ValueError, r"weight must be of shape \[k\], got shape \[1, 3\]"),
    ],
)
@compare.every_backend(OPERATOR)
def test_rejects(arguments, error, message, backend):
    with pytest.raises(error, match=f"^dual_pool_attention: {message}$"):
        dual_pool_attention(*arguments, backend=backend)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize(
    ("layout", "got"), [(torch.strided, "a nested tensor"), (torch.jagged, "a tensor of layout torch.jagged")]
)
def test_rejects_nested_tensors(layout, got):
    x = torch.nested.nested_tensor([*X], layout=layout)
    message = rf"x must be a dense tensor of shape \[B, C, H, W\], got {got}"
    with pytest.raises(TypeError, match=f"^dual_pool_attention: {message}$"):
        dual_pool_attention(x, WEIGHT)


@pytest.mark.parametrize("pool_size", [0, 2.0, True, None, 2**20 + 1, 2**63])
def test_rejects_pool_size(pool_size):
    with pytest.raises(ValueError, match=r"^dual_pool_attention: pool_size must be an integer from 1 to 1048576, got "):
        dual_pool_attention(X, WEIGHT, pool_size=pool_size)


@pytest.mark.parametrize("sides", [(1, 2**30 + 1), (2**30 + 1, 1)], ids=["columns", "rows"])
@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_gpu_kernels_refuse_sides_that_they_cannot_count(backend, sides, monkeypatch):
    monkeypatch.setattr(_backend, "why_not_on", lambda backend, device: None)
    with pytest.raises(RuntimeError, match=r": its kernel takes at most 2\^30 rows or columns$"):
        dual_pool_attention(X[:1, :1, :1, :1].expand(1, 1, *sides), WEIGHT, backend=backend)

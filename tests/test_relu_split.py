"""What compare.py asks of every operator, and what is special to this: two outputs, and a change of layout."""

import compare
import pytest
import torch

from restoration_kernels import relu_split
from restoration_kernels._samples import samples

OPERATOR = "relu_split"


def definition(x, channels):
    """Number by number."""
    zero = torch.zeros((), dtype=x.dtype, device=x.device)
    rectified = [torch.where(x[:, channel] > 0, x[:, channel], zero) for channel in range(channels)]
    return torch.stack(rectified, 1), torch.stack([x[:, channel] for channel in range(channels, x.shape[1])], 1)


@compare.every_case(OPERATOR)
@compare.every_dtype()
def test_forward(backend, sample, dtype):
    compare.check_values(backend, sample, dtype, definition)


@compare.every_case(OPERATOR)
@compare.every_dtype()
def test_backward(backend, sample, dtype):
    compare.check_values(backend, sample, dtype, definition, ("x",))


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


@compare.one_case(OPERATOR)
def test_export(backend, sample):
    compare.check_export(backend, sample, dynamic={"x": (0, 2, 3)})


@compare.one_case(OPERATOR)
@compare.every_layout()
def test_layouts(backend, sample, layout):
    compare.check_layouts(backend, sample, layout)


@compare.every_case(OPERATOR)
def test_deterministic(backend, sample):
    compare.check_deterministic(backend, sample)


@compare.one_case(OPERATOR)
def test_autocast(backend, sample):
    """Nothing is computed that autocast could cast: the dtype of x stays."""
    arguments = compare.arguments_for(backend, sample, torch.float32)
    with torch.autocast(arguments["x"].device.type, torch.bfloat16):
        outputs = relu_split(**arguments, backend=backend)
    assert [output.dtype for output in outputs] == [torch.float32] * 2


# Parts of a tile, whole ones, and a tile whose channels go both ways; rows longer than a tile; many images.
EDGE_SHAPES = [((1, 32, 4, 64), 16), ((1, 17, 2, 3), 16), ((2, 33, 5, 131), 1), ((1, 3, 1, 300), 2), ((5, 2, 3, 1), 1)]


@compare.one_case(OPERATOR)
def test_edge_shapes(backend, sample):
    compare.check_empty_batch(backend, sample, batched=("x",))
    for shape, channels in EDGE_SHAPES:
        arguments = {"x": torch.randn(shape, device=compare.device(backend)), "channels": channels}
        ours = compare.differentiate(compare.public(OPERATOR, backend), arguments, ("x",))
        exact = compare.differentiate(definition, arguments, ("x",))
        assert all(torch.equal(ours[name], exact[name]) for name in exact), shape


@compare.one_case(OPERATOR)
def test_layout_of_results(backend, sample):
    """What the next operators read without a copy: planes forward, pixels backward."""
    arguments = compare.arguments_for(backend, sample, torch.float32)
    arguments["x"].requires_grad_()
    outputs = relu_split(**arguments, backend=backend)
    assert all(output.is_contiguous() for output in outputs)
    if backend != "reference":
        (gradient,) = torch.autograd.grad(compare.joined(outputs).sum(), arguments["x"])
        assert gradient.is_contiguous(memory_format=torch.channels_last)


@compare.one_case(OPERATOR)
def test_gradient_of_one_output(backend, sample):
    """The other's is zero."""
    arguments = compare.arguments_for(backend, sample, torch.float32)
    x, channels = arguments["x"].requires_grad_(), arguments["channels"]
    for number in (0, 1):
        (gradient,) = torch.autograd.grad(relu_split(x, channels, backend=backend)[number].sum(), x)
        inside = torch.arange(x.shape[1], device=x.device)[:, None, None] < channels
        expected = inside & (x > 0) if number == 0 else ~inside.expand_as(x)
        assert torch.equal(gradient, expected.float())


@compare.one_case(OPERATOR)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_special_numbers(backend, sample, dtype):
    """Nothing is rounded, the smallest numbers included; NaN passes, and so does its gradient, as in torch.relu."""
    compare.arguments_for(backend, sample, dtype)
    if backend == "triton" and dtype == torch.bfloat16 and not torch.cuda.is_available():
        pytest.skip("Triton's interpreter takes the smallest bfloat16 numbers for zero")
    tiny = torch.finfo(dtype).smallest_normal / 2
    numbers = [torch.nan, torch.inf, -torch.inf, 0.0, -0.0, tiny, -tiny, -1.0]
    x = torch.tensor(numbers, dtype=dtype, device=compare.device(backend)).repeat(2, 1)[None, :, None]
    x.requires_grad_()
    rectified, rest = relu_split(x, 1, backend=backend)
    torch.testing.assert_close(rectified, torch.relu(x[:, :1]), rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(rest, x[:, 1:], rtol=0, atol=0, equal_nan=True)
    (gradient,) = torch.autograd.grad((rectified, rest), x, [torch.ones_like(rest), torch.full_like(rest, tiny)])
    (expected,) = torch.autograd.grad(torch.relu(x[:, :1]).sum(), x)
    expected[:, 1] = tiny
    assert torch.equal(gradient, expected)


@compare.every_lesser_instruction_set()
def test_lesser_instruction_sets(isa, dtype, tmp_path):
    compare.check_instruction_set(samples(OPERATOR, "odd")[0], isa, dtype, tmp_path)


X = torch.randn(1, 4, 5, 6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((X, 0), "channels must be an integer from 1 to 3, got 0"),
        ((X, 4), "channels must be an integer from 1 to 3, got 4"),
        ((X, 1.0), "channels must be an integer from 1 to 3, got 1.0"),
        ((X[:, :1], 1), "x must have at least 2 channels, got 1"),
        ((X[0], 1), r"x must be of shape \[B, C, H, W\], got shape \[4, 5, 6\]"),
        ((X.int(), 1), "x must have dtype torch.float16 or .*, got torch.int32"),
    ],
)
def test_rejects(arguments, message):
    with pytest.raises(ValueError, match=f"^{OPERATOR}: {message}$"):
        relu_split(*arguments)


def test_cpu_kernel_refuses_float16():
    with pytest.raises(RuntimeError, match=r": its kernel takes no float16$"):
        relu_split(X.half(), 1, backend="cpu")

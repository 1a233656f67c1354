"""pac_conv2d_: the result written over the residual."""

import compare
import pytest
import torch

from restoration_kernels import pac_conv2d, pac_conv2d_

X, GUIDE, WEIGHT = torch.randn(2, 3, 6, 7), torch.randn(2, 4, 6, 7), torch.randn(5, 3, 3, 3)
SQUARE = torch.randn(1, 3, 3, 3)  # of the shape that one filter gives it
WIDE = torch.randn(2, 3, 6, 14)  # every other column of which has the shape of X
TENSORS = {"residual": torch.zeros(2, 5, 4, 5), "x": X, "guide": GUIDE, "weight": WEIGHT, "bias": torch.randn(5)}


@compare.one_case("pac_conv2d_", backends=compare.KERNELS)
def test_opcheck_in_place(backend, sample):
    compare.check_opcheck_in_place(backend, sample)


@compare.every_case("pac_conv2d_")
@compare.every_dtype()
def test_in_place(backend, sample, dtype):
    arguments = compare.arguments_for(backend, sample, dtype)
    expected = pac_conv2d(**arguments, backend=backend)
    output = pac_conv2d_(**arguments, backend=backend)
    assert output is arguments["residual"]
    assert torch.equal(output, expected)


@compare.one_case("pac_conv2d_")
def test_in_place_is_a_change_that_autograd_sees(backend, sample):
    arguments = compare.arguments_for(backend, sample, torch.float32)
    leaf = torch.ones_like(arguments["residual"], requires_grad=True)
    saved = leaf * 2
    loss = saved.square().sum()
    with torch.no_grad():
        pac_conv2d_(**{**arguments, "residual": saved}, backend=backend)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@compare.one_case("pac_conv2d_")
def test_compile_in_place(backend, sample):
    torch.compiler.reset()
    arguments = compare.arguments_for(backend, sample, torch.float32)
    expected = pac_conv2d(**arguments, backend=backend)
    compiled = torch.compile(pac_conv2d_, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(**arguments, backend=backend), expected)
    assert torch.equal(arguments["residual"], expected)


def adjacent(first, second, shared=0):
    """Copies that follow each other in memory, or share the last numbers of the first."""
    memory = first.new_empty(first.numel() + second.numel() - shared)
    copies = memory[: first.numel()].view_as(first), memory[-second.numel() :].view_as(second)
    return tuple(copy.copy_(tensor) for copy, tensor in zip(copies, (first, second), strict=True))


@compare.one_case("pac_conv2d_")
@pytest.mark.parametrize("name", ["x", "guide", "weight", "bias"])
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_refuses_to_write_into_another_tensor(backend, sample, name, compiled):
    """Which begins with the last number of residual. torch.compile knows no addresses; the op does."""
    if compiled and backend == "reference":
        pytest.skip("needs no refusal: it computes all of the result before it writes")
    torch.compiler.reset()
    arguments = compare.arguments_for(backend, sample, torch.float32)
    arguments["residual"], arguments[name] = adjacent(arguments["residual"], arguments[name], shared=1)
    function = torch.compile(pac_conv2d_, fullgraph=True, backend="eager") if compiled else pac_conv2d_
    with pytest.raises(ValueError, match=f"^pac_conv2d_: {name} must share no memory with residual, "):
        function(**arguments, backend=backend)


@compare.one_case("pac_conv2d_")
@pytest.mark.parametrize("names", [("x", "residual"), ("residual", "x")], ids=["behind", "before"])
def test_in_place_next_to_another_tensor(backend, sample, names):
    """Views that follow each other without a gap, as the channels of one map do, share nothing."""
    arguments = compare.arguments_for(backend, sample, torch.float32)
    expected = pac_conv2d(**arguments, backend=backend)
    arguments |= zip(names, adjacent(*(arguments[name] for name in names)), strict=True)
    assert torch.equal(pac_conv2d_(**arguments, backend=backend), expected)


@compare.one_case("pac_conv2d_")
def test_autocast_in_place(backend, sample):
    """As pac_conv2d: half precision inside, added to float32."""
    arguments = compare.arguments_for(backend, sample, torch.float32)
    with torch.autocast(arguments["x"].device.type, torch.bfloat16):
        expected = pac_conv2d(**arguments, backend=backend)
        assert torch.equal(pac_conv2d_(**arguments, backend=backend), expected)


@compare.one_case("pac_conv2d_")
def test_in_place_on_inference_tensors(backend, sample):
    arguments = compare.arguments_for(backend, sample, torch.float32)
    with torch.inference_mode():
        residual = arguments.pop("residual").clone()
        expected = pac_conv2d(**arguments, residual=residual, backend=backend)
        assert torch.equal(pac_conv2d_(residual, **arguments, backend=backend), expected)
    with pytest.raises(ValueError, match=r"residual must be written to inside torch.inference_mode\(\) alone"):
        pac_conv2d_(residual, **arguments, backend=backend)


def test_shapes_without_numbers():
    assert pac_conv2d_(**{name: value.to("meta") for name, value in TENSORS.items()}).shape == (2, 5, 4, 5)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"residual": torch.zeros(2, 5, 5, 4).mT}, r"residual must be contiguous, got strides .*"),
        ({"residual": torch.zeros(2, 5, 4, 4)}, r"residual must be of shape \[2, 5, 4, 5\], got shape \[2, 5, 4, 4\]"),
        ({"residual": torch._neg_view(torch.zeros(2, 5, 4, 5))}, r"residual must be without the negative bit .*"),
        ({"residual": X.flatten()[:200].view(2, 5, 4, 5)}, r"x must share no memory with residual, .*"),
        ({"residual": X.flatten()[-200:].view(2, 5, 4, 5)}, r"x must share no memory with residual, .*"),
        ({"residual": WIDE.flatten()[-200:].view(2, 5, 4, 5), "x": WIDE[..., ::2]}, r"x must share no memory .*"),
        (
            {"residual": SQUARE, "x": SQUARE, "guide": SQUARE * 1, "weight": SQUARE[:, :1, :1, :1], "bias": None},
            r"x must share no memory .*",
        ),
    ],
    ids=["strides", "shape", "negative", "overlap", "overlap behind", "overlap strided", "same"],
)
@compare.every_backend("pac_conv2d_")
def test_rejects_in_place(changed, message, backend):
    with pytest.raises(ValueError, match=f"^pac_conv2d_: {message}$"):
        pac_conv2d_(**{**TENSORS, **changed}, backend=backend)


@pytest.mark.parametrize("name", TENSORS)
@compare.every_backend("pac_conv2d_")
def test_rejects_gradients(name, backend):
    arguments = {**TENSORS, name: TENSORS[name].clone().requires_grad_()}
    message = rf"{name} must require no gradient \(.*\), got one that does"
    with pytest.raises(ValueError, match=f"^pac_conv2d_: {message}$"):
        pac_conv2d_(**arguments, backend=backend)

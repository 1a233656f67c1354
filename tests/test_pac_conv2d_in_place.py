"""pac_conv2d_: the result written over the residual."""

import compare
import pytest
import torch

from restoration_kernels import pac_conv2d, pac_conv2d_

X, GUIDE, WEIGHT = torch.randn(2, 3, 6, 7), torch.randn(2, 4, 6, 7), torch.randn(5, 3, 3, 3)
SQUARE = torch.randn(1, 3, 3, 3)  # of the shape that one filter gives it


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


@compare.one_case("pac_conv2d_")
def test_a_compiled_graph_in_place_refuses_overlaps(backend, sample):
    """torch.compile knows no addresses; the op does. The reference computes all of the result before it writes."""
    if backend == "reference":
        pytest.skip("needs no refusal")
    torch.compiler.reset()
    arguments = compare.arguments_for(backend, sample, torch.float32)
    del arguments["residual"]
    x = arguments["x"] = torch.zeros(1, 5, 9, 9, device=arguments["x"].device)
    arguments |= {"guide": x[:, :2] + 1, "weight": torch.ones(2, 5, 3, 3, device=x.device), "bias": None, "padding": 1}
    compiled = torch.compile(pac_conv2d_, fullgraph=True, backend="eager")
    with pytest.raises(ValueError, match="x must share no memory with residual"):
        compiled(x[:, 1:3], **arguments, backend=backend)


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
    arguments = {"residual": torch.zeros(2, 5, 4, 5), "x": X, "guide": GUIDE, "weight": WEIGHT}
    assert pac_conv2d_(**{name: value.to("meta") for name, value in arguments.items()}).shape == (2, 5, 4, 5)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"residual": torch.zeros(2, 5, 5, 4).mT}, r"residual must be contiguous, got strides .*"),
        ({"residual": torch.zeros(2, 5, 4, 4)}, r"residual must be of shape \[2, 5, 4, 5\], got shape \[2, 5, 4, 4\]"),
        ({"weight": WEIGHT.clone().requires_grad_()}, r"weight must require no gradient \(.*\), got one that does"),
        ({"residual": X.flatten()[:200].view(2, 5, 4, 5)}, r"x must share no memory with residual, .*"),
        ({"residual": X.flatten()[-200:].view(2, 5, 4, 5)}, r"x must share no memory with residual, .*"),
        (
            {"residual": SQUARE, "x": SQUARE, "guide": SQUARE * 1, "weight": SQUARE[:, :1, :1, :1]},
            r"x must share no memory .*",
        ),
    ],
    ids=["strides", "shape", "gradient", "overlap", "overlap behind", "same"],
)
@compare.every_backend("pac_conv2d_")
def test_rejects_in_place(changed, message, backend):
    arguments = {"residual": torch.zeros(2, 5, 4, 5), "x": X, "guide": GUIDE, "weight": WEIGHT, **changed}
    with pytest.raises(ValueError, match=f"^pac_conv2d_: {message}$"):
        pac_conv2d_(**arguments, backend=backend)

"""Convolutions of bfloat16 with and without a library for them."""

import compare
import pytest
import torch
import torch.nn.functional as F

from restoration import convolution


@pytest.fixture(params=[True, False], ids=["library", "no-library"])
def fast(request, monkeypatch):
    monkeypatch.setattr(convolution, "has_fast_bf16", lambda: request.param)
    return request.param


def operands():
    shapes = {"x": (2, 5, 9, 7), "weight": (6, 5, 3, 3), "bias": (6,)}
    return {name: torch.randn(shape).bfloat16().float() for name, shape in shapes.items()}


def convolve(function, tensors):
    """The output and its gradients, for gradients of the output that bfloat16 holds."""
    tensors = {name: tensor.detach().requires_grad_() for name, tensor in tensors.items()}
    y = function(*tensors.values(), padding=1)
    gradients = torch.autograd.grad(y, list(tensors.values()), torch.arange(y.numel()).view(y.shape).remainder(9).to(y))
    return {"y": y.detach(), **dict(zip(tensors, gradients, strict=True))}


def test_bfloat16_is_convolved_to_its_own_precision(fast):
    tensors = operands()
    exact = convolve(F.conv2d, {name: tensor.double() for name, tensor in tensors.items()})
    rounded = {name: tensor.bfloat16() for name, tensor in tensors.items()}
    found = convolve(convolution.conv2d, rounded)
    assert all(tensor.dtype == torch.bfloat16 for tensor in found.values())
    compare.judge_all(found, exact)
    # Within autocast parameters may be float32's; their gradients are then, too.
    with torch.autocast("cpu", torch.bfloat16):
        mixed = convolve(convolution.conv2d, tensors | {"x": rounded["x"]})
    for name, tensor in mixed.items():
        assert tensor.dtype == (torch.float32 if name in ("weight", "bias") else torch.bfloat16)
        assert torch.equal(tensor, found[name].to(tensor.dtype)), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_other_numbers_are_convolved_as_they_are(fast, dtype):
    tensors = {name: tensor.to(dtype) for name, tensor in operands().items()}
    found, expected = (convolve(function, tensors) for function in (convolution.conv2d, F.conv2d))
    assert all(torch.equal(found[name], expected[name]) for name in expected)

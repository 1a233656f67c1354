"""Autograd functions of our own: second derivatives are an error, never zero in silence; compilers change nothing."""

import pytest
import torch

from restoration.blocks import round_to_quantum
from restoration.losses import channel_statistics
from restoration.vgg import _FrozenConvolution
from restoration.whitening import moments, transfer_statistics

STYLE = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(1))
WEIGHT = torch.rand(2, 3, 3, 3, generator=torch.Generator().manual_seed(2))

ONCE = {
    "moments": lambda x: moments(x).covariance,
    "transfer_moments": lambda x: transfer_statistics(x, STYLE).z,
    "channel_statistics": lambda x: channel_statistics(x)[1].square(),
    "VGG19Features": lambda x: _FrozenConvolution.apply(x, WEIGHT, torch.zeros(2), True),
}


def picture():
    return torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0)).requires_grad_()


@pytest.mark.parametrize("name", ONCE)
def test_second_derivatives_are_refused(name):
    """Also where the gradients that backward is given are constants, those of a sum."""
    x = picture()
    (expected,) = torch.autograd.grad(ONCE[name](x).sum(), x)
    (first,) = torch.autograd.grad(ONCE[name](x).sum(), x, create_graph=True)
    assert torch.equal(first, expected)
    with pytest.raises(RuntimeError, match=f"^{name}: has no second derivatives$"):
        first.square().sum().backward()


@pytest.mark.parametrize("function", [round_to_quantum, *ONCE.values()], ids=["round_to_quantum", *ONCE])
def test_compiled_gradients_are_the_eager_ones(function):
    def gradient(function):
        x = picture()
        return torch.autograd.grad(function(2 * x).square().sum(), x)[0]

    torch.compiler.reset()
    assert torch.equal(gradient(torch.compile(function, backend="aot_eager")), gradient(function))

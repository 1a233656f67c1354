"""Second derivatives of what has none: an error, never zero in silence."""

import pytest
import torch

from restoration.losses import channel_statistics
from restoration.vgg import _FrozenConvolution
from restoration.whitening import moments, transfer_statistics

STYLE = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("name", "function"),
    [
        ("moments", lambda x: moments(x).covariance),
        ("transfer_moments", lambda x: transfer_statistics(x, STYLE).z),
        ("channel_statistics", lambda x: channel_statistics(x)[1].square()),
        ("VGG19Features", lambda x: _FrozenConvolution.apply(x, torch.ones(2, 3, 3, 3), torch.zeros(2), True)),
    ],
)
def test_second_derivatives_are_refused(name, function):
    """Also where the gradients that backward is given are constants, those of a sum."""
    x = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0)).requires_grad_()
    (expected,) = torch.autograd.grad(function(x).sum(), x)
    (first,) = torch.autograd.grad(function(x).sum(), x, create_graph=True)
    assert torch.equal(first, expected)
    with pytest.raises(RuntimeError, match=f"^{name}: has no second derivatives$"):
        first.square().sum().backward()

"""PacConv2d and pac_kernel2d: the same convolution as a layer, and its kernel alone."""

import pytest
import torch

from restoration_kernels import PacConv2d, pac_conv2d, pac_kernel2d


def test_kernel():
    guide = torch.zeros(1, 2, 3, 4)
    guide[0, :, 1, 1] = torch.tensor([3.0, 4.0])
    kernel = pac_kernel2d(guide, 3, padding=1)
    assert kernel.shape == (1, 1, 3, 3, 3, 4)
    expected = torch.full((3, 3), torch.exp(torch.tensor(-12.5)))
    expected[1, 1] = 1
    torch.testing.assert_close(kernel[0, 0, :, :, 1, 1], expected)
    normalized = pac_kernel2d(guide, 3, padding=1, normalize=True)
    torch.testing.assert_close(normalized.sum((2, 3)), torch.ones(1, 1, 3, 4))
    # In the corner four taps lie inside; those towards the pixel of another colour hardly count.
    torch.testing.assert_close(
        normalized[0, 0, :, :, 0, 0], torch.tensor([[0, 0, 0], [0, 1, 1], [0, 1, 0]]) / 3, atol=1e-5, rtol=0
    )


def shapes(tensors):
    return {name: list(tensor.shape) for name, tensor in tensors.items()}


def test_module():
    layer = PacConv2d(3, 5, 3, stride=2, padding=1, dilation=2, normalize_kernel=True)
    assert {name: list(value.shape) for name, value in layer.state_dict().items()} == {
        "weight": [5, 3, 3, 3],
        "bias": [5],
    }
    x, guide = torch.randn(1, 3, 8, 8), torch.randn(1, 2, 8, 8)
    geometry = dict(stride=2, padding=1, dilation=2, normalize=True)
    assert torch.equal(layer(x, guide), pac_conv2d(x, guide, layer.weight, layer.bias, **geometry))
    assert 0.9 * 27**-0.5 < layer.weight.abs().max() <= 27**-0.5


def test_module_shared_filters():
    layer = PacConv2d(3, 3, 5, padding=2, bias=False, shared_filters=True)
    assert shapes(layer.state_dict()) == {"weight": [1, 1, 5, 5]}
    assert layer(torch.randn(1, 3, 4, 4), torch.randn(1, 2, 4, 4)).shape == (1, 3, 4, 4)
    with pytest.raises(
        ValueError, match=r"^PacConv2d: out_channels must equal in_channels = 3 with shared_filters, got 4$"
    ):
        PacConv2d(3, 4, 5, shared_filters=True)


@pytest.mark.parametrize("argument", ["bias", "normalize_kernel", "shared_filters"])
def test_rejects_switches_of_the_module(argument):
    with pytest.raises(ValueError, match=f"^PacConv2d: {argument} must be True or False, got 'no'$"):
        PacConv2d(3, 3, 3, **{argument: "no"})


def test_rejects_kernel_size():
    guide = torch.zeros(2, 4, 6, 7)
    with pytest.raises(ValueError, match=r"^pac_kernel2d: kernel_size must be an odd integer of at least 1, got 4$"):
        pac_kernel2d(guide, 4)
    with pytest.raises(ValueError, match=r"^pac_kernel2d: guide must be at least 7 x 7 to give an output, got 6 x 7$"):
        pac_kernel2d(guide, 7)

"""PacConv2d and pac_kernel2d: the same convolution as a layer, and its kernel alone."""

import io

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


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*torch.jit:DeprecationWarning")
def test_traced_module_is_saved_with_its_gradients():
    layer, x, guide = PacConv2d(3, 5, 3, padding=1), torch.randn(2, 3, 6, 7), torch.randn(2, 4, 6, 7)
    file = io.BytesIO()
    torch.jit.save(torch.jit.trace(layer, (x, guide)), file)
    file.seek(0)
    loaded = torch.jit.load(file)
    results = []
    for module in (layer, loaded):
        output = module(x, guide)
        results.append((output, *torch.autograd.grad(output.square().sum(), module.parameters())))
    for ours, expected in zip(*results, strict=True):
        assert torch.equal(ours, expected)


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


def test_module_draws_weight_and_bias():
    """Both within 1/sqrt(products summed in one output), as torch.nn.Conv2d does."""
    for parameter in PacConv2d(8, 400, 3).parameters():
        assert 0.9 * 72**-0.5 < parameter.abs().max() <= 72**-0.5


def test_module_shared_filters():
    layer = PacConv2d(3, 3, 5, padding=2, bias=False, shared_filters=True)
    assert shapes(layer.state_dict()) == {"weight": [1, 1, 5, 5]}
    assert layer(torch.randn(1, 3, 4, 4), torch.randn(1, 2, 4, 4)).shape == (1, 3, 4, 4)
    with pytest.raises(
        ValueError, match=r"^PacConv2d: out_channels must equal in_channels = 3 with shared_filters, got 4$"
    ):
        PacConv2d(3, 4, 5, shared_filters=True)


@pytest.mark.parametrize("shared", [False, True])
def test_device_and_dtype(shared):
    layer = PacConv2d(3, 3, 5, shared_filters=shared, device="meta", dtype=torch.float64)
    assert {(each.device.type, each.dtype) for each in layer.parameters()} == {("meta", torch.float64)}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"in_channels": 0}, "in_channels must be an integer of at least 1, got 0"),
        ({"out_channels": 2.0}, "out_channels must be an integer of at least 1, got 2.0"),
        ({"kernel_size": 2}, "kernel_size must be an odd integer of at least 1, got 2"),
        ({"stride": 0}, "stride must be an integer of at least 1 or a pair of them, got 0"),
        ({"padding": -1}, "padding must be an integer of at least 0 or a pair of them, got -1"),
        ({"dilation": 0}, "dilation must be an integer of at least 1 or a pair of them, got 0"),
        ({"bias": "no"}, "bias must be True or False, got 'no'"),
        ({"normalize_kernel": "no"}, "normalize_kernel must be True or False, got 'no'"),
        ({"shared_filters": "no"}, "shared_filters must be True or False, got 'no'"),
        ({"device": "gpu"}, "device must be a torch.device, the name of one, or None, got 'gpu'"),
        ({"dtype": torch.int32}, "dtype must be None or one of torch.float16, .*, got torch.int32"),
    ],
    ids=lambda case: ",".join(case) if isinstance(case, dict) else "",
)
def test_rejects_module(changed, message):
    with pytest.raises(ValueError, match=f"^PacConv2d: {message}$"):
        PacConv2d(**{"in_channels": 3, "out_channels": 3, "kernel_size": 3, **changed})


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"kernel_size": 4}, "kernel_size must be an odd integer of at least 1, got 4"),
        ({"kernel_size": 7}, "guide must be at least 7 x 7 to give an output, got 6 x 7"),
        ({"normalize": "no"}, "normalize must be True or False, got 'no'"),
    ],
    ids=["even", "large", "normalize"],
)
def test_rejects_kernel(changed, message):
    with pytest.raises(ValueError, match=f"^pac_kernel2d: {message}$"):
        pac_kernel2d(**{"guide": torch.zeros(2, 4, 6, 7), "kernel_size": 3, **changed})

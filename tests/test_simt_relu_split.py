"""The CUDA kernels that split a map on the CPU, against the reference, bit for bit."""

import compare
import pytest
import simt_build
import torch
from simt_build import both_orders, needs_compiler

from restoration_kernels import relu_split

pytestmark = needs_compiler

# Two tiles of channels of which one goes both ways, several of rows and columns; less than a tile; whole tiles.
SHAPES = [((2, 18, 37, 70), 5), ((1, 3, 5, 9), 2), ((1, 32, 4, 64), 16), ((3, 2, 1, 1), 1)]


@both_orders
@pytest.mark.parametrize(("shape", "channels"), SHAPES, ids=str)
@compare.every_dtype()
def test_relu_split(shape, channels, dtype, order):
    x = torch.randn(shape, dtype=torch.float64).to(dtype).requires_grad_()
    outputs = relu_split(x, channels, backend="reference")
    gradients = [torch.randn_like(output) for output in outputs]
    (grad_x,) = torch.autograd.grad(outputs, x, gradients)
    for ours, expected in zip(run_relu_split(x.detach(), channels, gradients), (*outputs, grad_x), strict=True):
        assert torch.equal(ours, expected)


def test_relu_split_without_images():
    rectified, rest, grad_x = run_relu_split(torch.empty(0, 3, 5, 7), 2, torch.empty(0, 3, 5, 7).split((2, 1), 1))
    assert [tensor.shape for tensor in (rectified, rest, grad_x)] == [(0, 2, 5, 7), (0, 1, 5, 7), (0, 3, 5, 7)]


def test_a_grid_that_32_bits_cannot_count_is_refused():
    """Cut to 32 bits it would be one of a single block, and the rest of the outputs left unwritten."""
    sizes = {"batch": 2**32 + 1, "channels": 2, "split": 1, "height": 1, "width": 1}
    x = torch.zeros(1, 2, 1, 1)
    with pytest.raises(RuntimeError, match="a grid of 4294967297 blocks is too large for CUDA"):
        simt_build.load_extension().relu_split_forward_cuda(
            x=x.data_ptr(), rectified=0, rest=0, **sizes, dtype=simt_build.dtype_code(x), stream=0
        )


def run_relu_split(x, channels, gradients):
    """rectified, rest and grad_x by the CUDA kernels. What they do not write stays NaN."""
    extension = simt_build.load_extension()
    batch, _, height, width = x.shape
    sizes = {"batch": batch, "channels": x.shape[1], "split": channels, "height": height, "width": width}
    options = {**sizes, "dtype": simt_build.dtype_code(x), "stream": 0}
    x = x.contiguous(memory_format=torch.channels_last)
    gradients = [gradient.contiguous() for gradient in gradients]
    rectified, rest = (torch.full_like(gradient, torch.nan) for gradient in gradients)
    grad_x = torch.full_like(x, torch.nan)
    extension.relu_split_forward_cuda(x=x.data_ptr(), rectified=rectified.data_ptr(), rest=rest.data_ptr(), **options)
    extension.relu_split_backward_cuda(
        grad_rectified=gradients[0].data_ptr(),
        grad_rest=gradients[1].data_ptr(),
        rectified=rectified.data_ptr(),
        grad_x=grad_x.data_ptr(),
        **options,
    )
    return rectified, rest, grad_x

"""Whole maps of more than 2^31 numbers, on a GPU with room for them: offsets in 32 bits would end before.

A map repeats a small pattern, and so do the results: they need not be compared with other maps of such a size.
Operators that can do with a few places of a map are asked about it by compare.py, on every backend.
"""

import compare
import pytest
import torch
import torch.nn.functional as F
from test_dual_pool_attention import definition as attention
from test_relu_split import definition as split

from restoration_kernels import dual_pool_attention, dual_pool_attention_pad2d, relu_split

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

PERIOD, POOL_SIZE = 10, 50
# (channels, side): more planes, or more of one plane, than 32 bits count. A pooling bin holds whole periods.
SIZES = [pytest.param(6, 19_000, id="planes"), pytest.param(1, 46_500, id="plane")]
MAPS_AT_ONCE = 4.5  # x, output, cotangent, gradient, and what checks them

every_kernel = pytest.mark.parametrize("backend", ["cuda", "triton"])


def pattern(channels, side):
    """[1, channels, PERIOD, PERIOD]; skips where the GPU has no room for maps of it."""
    compare.skip_without_gpu_memory(MAPS_AT_ONCE * channels * side**2 * torch.bfloat16.itemsize)
    return torch.randn(1, channels, PERIOD, PERIOD, device="cuda").bfloat16()


def repeated(small, side, padding=0, layout=torch.contiguous_format):
    """The pattern over and over, inside a frame of zeros."""
    whole = side + 2 * padding
    result = torch.empty(
        (1, small.shape[1], whole, whole), dtype=small.dtype, device=small.device, memory_format=layout
    )
    band = F.pad(small.repeat(1, 1, 1, side // PERIOD), (padding, padding)).contiguous(memory_format=layout)
    for number in range(side // PERIOD):
        result[:, :, padding:][:, :, number * PERIOD : (number + 1) * PERIOD] = band
    for edge in (result[:, :, :padding], result[:, :, whole - padding :]):
        edge.zero_()
    return result


def check_repeated(name, found, exact):
    """Every period has the same bits, the first of which are judged."""
    band, first = found[:, :, :PERIOD], found[:, :, :PERIOD, :PERIOD]
    assert torch.equal(band, first.repeat(1, 1, 1, found.shape[3] // PERIOD)), f"{name} differs in the first rows"
    for row in range(0, found.shape[2], PERIOD):
        assert torch.equal(found[:, :, row : row + PERIOD], band), f"{name} differs in the rows from {row} on"
    compare.judge(name, first, exact)


@every_kernel
@pytest.mark.parametrize(("channels", "side"), SIZES)
@pytest.mark.parametrize("padding", [0, 1])
def test_dual_pool_attention(backend, channels, side, padding):
    small = pattern(channels, side)
    weight = torch.randn(3, device=small.device).bfloat16().requires_grad_()
    cotangent = torch.randn_like(small)
    x = repeated(small, side).requires_grad_()
    if padding == 0:
        y = dual_pool_attention(x, weight, pool_size=POOL_SIZE, backend=backend)
        inside, cotangents = y, repeated(cotangent, side)
    else:
        y = dual_pool_attention_pad2d(x, weight, padding=padding, pool_size=POOL_SIZE, backend=backend)
        inside = y[:, :, padding:-padding, padding:-padding]
        cotangents = repeated(cotangent, side, padding, torch.channels_last)
    exact = [tensor.detach().double().requires_grad_() for tensor in (small, weight)]
    exact_y = attention(*exact, pool_size=PERIOD)
    exact_x, exact_weight = torch.autograd.grad(exact_y, exact, cotangent.double())

    check_repeated("output", inside.detach(), exact_y.detach())
    grad_x, grad_weight = torch.autograd.grad(y, (x, weight), cotangents)
    check_repeated("gradient of x", grad_x, exact_x)
    compare.judge("gradient of weight", grad_weight, exact_weight * (side // PERIOD) ** 2)


@every_kernel
@pytest.mark.parametrize(("channels", "side"), SIZES[:1])
def test_relu_split(backend, channels, side):
    small = pattern(channels, side)
    cotangents = torch.randn_like(small).split([2, channels - 2], 1)
    x = repeated(small, side, layout=torch.channels_last).requires_grad_()
    outputs = relu_split(x, 2, backend=backend)
    for name, output, exact in zip(("rectified", "rest"), outputs, split(small, 2), strict=True):
        check_repeated(name, output.detach(), exact.double())
    (gradient,) = torch.autograd.grad(outputs, x, [repeated(cotangent, side) for cotangent in cotangents])
    small = small.double().requires_grad_()
    (exact,) = torch.autograd.grad(split(small, 2), small, [cotangent.double() for cotangent in cotangents])
    check_repeated("gradient of x", gradient, exact)

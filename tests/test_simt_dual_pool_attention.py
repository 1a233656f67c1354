"""The CUDA kernels of dual pooling attention on the CPU, padded or not, against the definition in float64."""

import compare
import pytest
import simt_build
import torch
import torch.nn.functional as F
from simt_build import both_orders, needs_compiler

pytestmark = needs_compiler

# Odd, aligned, smaller than the pooling, wider than a tile, tall, one pixel; two tiles each way in every dtype, more
# planes than a block adds up at once.
SHAPES = [
    *((2, 5, 37, 61), (1, 4, 33, 64), (2, 3, 7, 200), (1, 2, 3, 1100), (1, 2, 500, 3), (2, 4, 1, 1)),
    *((1, 2, 18, 2056), (2, 130, 1, 3)),
]


@both_orders
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@compare.every_dtype()
def test_dual_pool_attention(shape, dtype, order):
    check_dual_pool_attention(shape, dtype, dtype)


# Two tiles of channels, several of rows and columns; padding of nearly a side; less than a tile; one pixel; more tiles
# than a warp adds up at once; a tile that begins with the last mirrored row.
PAD2D_SHAPES = [
    *(((2, 18, 37, 70), 1), ((1, 3, 5, 9), 4), ((1, 16, 4, 64), 2), ((3, 2, 1, 1), 0)),
    *(((1, 2, 140, 8), 4), ((1, 2, 24, 8), 4)),
]


@both_orders
@pytest.mark.parametrize(("shape", "padding"), PAD2D_SHAPES, ids=str)
@compare.every_dtype()
def test_dual_pool_attention_pad2d(shape, padding, dtype, order):
    check_dual_pool_attention(shape, dtype, dtype, padding)


@both_orders
@pytest.mark.parametrize(("shape", "padding"), PAD2D_SHAPES, ids=str)
@pytest.mark.parametrize("output_dtype", [torch.float16, torch.bfloat16], ids=str)
def test_dual_pool_attention_pad2d_to_half_precision(shape, padding, output_dtype, order):
    check_dual_pool_attention(shape, torch.float32, output_dtype, padding)


def check_dual_pool_attention(shape, dtype, output_dtype, padding=None):
    generator = torch.Generator().manual_seed(0)
    x, grad_y = (
        torch.randn(size, generator=generator, dtype=torch.float64) for size in (shape, padded_shape(shape, padding))
    )
    weight = torch.randn(5, generator=generator, dtype=torch.float64).to(dtype)
    x, grad_y = x.to(dtype), grad_y.to(output_dtype)
    # The padded operator adds to the gradient of x.
    grad_addend = None if padding is None else torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    exact = define_dual_pool_attention(x.double(), weight.double(), grad_y.double(), padding, grad_addend)
    plain = define_dual_pool_attention(x, weight, grad_y.to(dtype), padding, grad_addend)
    ours = run_dual_pool_attention(x, weight, grad_y, padding=padding, grad_addend=grad_addend)
    ulps = compare.kernel_ulps(dtype)
    for name, result, right, reference in zip(("y", "grad_x", "grad_weight"), ours, exact, plain, strict=True):
        compare.judge(name, result, right, reference.to(result.dtype), ulps)


def padded_shape(shape, padding):
    """Of y: that of x, with a padding on every side unless it is None."""
    batch, channels, height, width = shape
    return batch, channels, height + 2 * (padding or 0), width + 2 * (padding or 0)


either_operator = pytest.mark.parametrize("padding", [None, 1], ids=["plain", "pad2d"])


@either_operator
@pytest.mark.parametrize("wanted", ["grad_x", "grad_weight"])
def test_dual_pool_attention_computes_what_is_wanted(wanted, padding):
    x, weight = torch.randn(2, 3, 5, 7), torch.randn(3)
    grad_y = torch.randn(padded_shape(x.shape, padding))
    everything = run_dual_pool_attention(x, weight, grad_y, padding=padding)
    one = run_dual_pool_attention(x, weight, grad_y, wanted=(wanted,), padding=padding)
    for name, alone, together in zip(("grad_x", "grad_weight"), one[1:], everything[1:], strict=True):
        assert torch.equal(alone, together) if name == wanted else alone.isnan().all()


@either_operator
def test_dual_pool_attention_without_images(padding):
    x = torch.empty(0, 3, 5, 7)
    grad_y = torch.empty(padded_shape(x.shape, padding))
    y, grad_x, grad_weight = run_dual_pool_attention(x, torch.randn(3), grad_y, padding=padding)
    assert y.shape == grad_y.shape
    assert grad_x.shape == x.shape
    assert torch.equal(grad_weight, torch.zeros(3))


def test_dual_pool_attention_refuses_an_unknown_dtype():
    extension = simt_build.load_extension()
    with pytest.raises(ValueError, match=r"^dual_pool_attention: dtype must be .*, got code 7$"):
        extension.dual_pool_attention_workspace_cuda(batch=1, channels=1, height=1, width=1, dtype=7)


def define_dual_pool_attention(x, weight, grad_y, padding=None, grad_addend=None):
    """The definition, with torch's own pooling and padding: y, grad_x, grad_weight."""
    x, weight = x.requires_grad_(), weight.requires_grad_()
    mean = F.adaptive_avg_pool2d(x, 50).mean((2, 3))
    scale = torch.sigmoid(F.conv1d(mean[:, None], weight[None, None], padding=len(weight) // 2))[:, 0]
    y = x * scale[:, :, None, None]
    if padding is not None:
        y = F.pad(y, (padding,) * 4, mode="reflect")
    grad_x, grad_weight = torch.autograd.grad(y, (x, weight), grad_y)
    return y.detach(), grad_x if grad_addend is None else grad_x + grad_addend, grad_weight


def run_dual_pool_attention(x, weight, grad_y, wanted=("grad_x", "grad_weight"), padding=None, grad_addend=None):
    """The same by the CUDA kernels, with a padding by the padded operator's. What they do not write stays NaN."""
    extension = simt_build.load_extension()
    x, weight, grad_y = x.detach(), weight.detach(), grad_y.detach()
    batch, channels, height, width = x.shape
    sizes = {"batch": batch, "channels": channels, "height": height, "width": width, "dtype": simt_build.dtype_code(x)}
    operator, options = "dual_pool_attention", {"taps": len(weight), "pool_size": 50, "stream": 0}
    if padding is not None:
        operator += "_pad2d"
        options.update(padding=padding, output_dtype=simt_build.dtype_code(grad_y))
        grad_y = grad_y.contiguous(memory_format=torch.channels_last)
    workspace = torch.empty(getattr(extension, f"{operator}_workspace_cuda")(**sizes), dtype=torch.uint8)
    mean, scale = torch.full((2, batch, channels), torch.nan, dtype=simt_build.accumulate_dtype(x.dtype))
    y, grad_x, grad_weight = (torch.full_like(tensor, torch.nan) for tensor in (grad_y, x, weight))
    tensors = {"x": x, "weight": weight, "mean": mean, "scale": scale, "workspace": workspace}
    common = {**sizes, **options, **{name: tensor.data_ptr() for name, tensor in tensors.items()}}
    workspace.fill_(255)
    getattr(extension, f"{operator}_forward_cuda")(y=y.data_ptr(), **common)
    workspace.fill_(255)
    if padding is not None:
        common["grad_addend"] = 0 if grad_addend is None else grad_addend.data_ptr()
    getattr(extension, f"{operator}_backward_cuda")(
        grad_y=grad_y.data_ptr(),
        grad_x=grad_x.data_ptr() if "grad_x" in wanted else 0,
        grad_weight=grad_weight.data_ptr() if "grad_weight" in wanted else 0,
        **common,
    )
    return y, grad_x, grad_weight

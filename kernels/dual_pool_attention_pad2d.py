"""Dual pooling attention into the map that a convolution reads: padded, channels last, in the convolution's dtype."""

import functools
import math

import torch
from torch import Tensor

from . import _backend, _checks, _launch, _registration
from .dual_pool_attention import allocate_backward
from .dual_pool_attention_pad2d_reference import dual_pool_attention_pad2d_reference

_OPERATOR = _backend.Operator("dual_pool_attention_pad2d", dual_pool_attention_pad2d_reference)


def dual_pool_attention_pad2d(
    x: Tensor,
    weight: Tensor,
    padding: int = 1,
    *,
    pool_size: int = 50,
    dtype: torch.dtype | None = None,
    grad_addend: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """dual_pool_attention(x, weight), padded by reflection: what a convolution without padding of its own reads.

    The same as ``F.pad(dual_pool_attention(x, weight), (padding,) * 4, mode="reflect")`` in the channels-last layout
    and in dtype, without the passes over x that cast, attention, layout and padding take one by one.

    Args:
        x: feature maps [B, C, H, W] of any floating dtype.
        weight: filter [k] over neighbouring channels, k odd, of the dtype and device of x. Under torch.autocast it is
            cast to the dtype of x.
        padding: pixels on every side, at least 0 and less than H and W.
        pool_size: rows and columns of the attention's first pooling, 1 to 2^20.
        dtype: of the result; None is that of x.
        grad_addend: [B, C, H, W] of the dtype and device of x, without gradients of its own: added to the gradient of
            x while that is written. What reaches x beside this call, where it is known beforehand, as in the backward
            pass of a reversible network, takes no pass of its own then.
        backend: "cuda", "triton", "cpu" or "reference"; None leaves the choice to :func:`use_backend`.

    Returns:
        [B, C, H + 2 padding, W + 2 padding] of dtype, contiguous in torch.channels_last. Gradients: x and weight, for
        which x, weight and two numbers a channel are kept; only the reference can be differentiated twice.

    Raises:
        TypeError, ValueError: an argument is not as said here.
        RuntimeError: the backend asked for cannot run this call. Kernels return the dtype of x, or float16 or bfloat16
            from float32; the CPU's takes no float16.

    Source: Sun, Zhang, Wu (2025), doi 10.1038/s40494-025-01595-0, Fig. 3; the padding is that of their convolutions.
    """
    (weight,) = _backend.autocast((weight,), getattr(x, "dtype", None))
    _checks.dual_pool_attention_pad2d(x, weight, padding, pool_size, dtype, grad_addend)
    return _OPERATOR.run(
        backend,
        x=x,
        weight=weight,
        padding=padding,
        pool_size=pool_size,
        dtype=dtype or x.dtype,
        grad_addend=grad_addend,
    )


def _kernels_cannot(x, dtype):
    if dtype in (None, x.dtype) or (x.dtype == torch.float32 and dtype.itemsize == 2):
        return None
    return f"its kernel returns the dtype of x, or half precision from float32, not {dtype} from {x.dtype}"


def _cpu_cannot(x, dtype=None, **_):
    return _backend.no_float16(x, dtype) or _kernels_cannot(x, dtype)


# The kernels count in 32 bits: CUDA rows and columns, as the attention's, Triton the pixels of a plane.
def _cuda_cannot(x, padding=1, dtype=None, **_):
    if max(_padded(x, padding)) > 2**30:
        return "its kernel takes at most 2^30 rows or columns, padding included"
    return _kernels_cannot(x, dtype)


def _triton_cannot(x, padding=1, dtype=None, **_):
    if math.prod(_padded(x, padding)) > 2**30:
        return "its kernel takes at most 2^30 pixels of a plane, padding included"
    return _kernels_cannot(x, dtype)


def _padded(x, padding):
    return [side + 2 * padding for side in x.shape[2:]]


def _allocate_forward(x, weight, grad_addend, padding, pool_size, dtype):
    B, C = x.shape[:2]
    mean = x.new_empty((B, C), dtype=torch.promote_types(x.dtype, torch.float32))
    return x.new_empty((B, *_padded(x, padding), C), dtype=dtype), mean, torch.empty_like(mean)


def _launch_forward(backend, outputs, x, weight, grad_addend, padding, pool_size, dtype):
    y, mean, scale = outputs
    _launch_kernel(
        "forward", backend, {"x": x, "weight": weight, "y": y, "mean": mean, "scale": scale}, padding, pool_size, dtype
    )


def _launch_backward(backend, outputs, grad_y, x, weight, mean, scale, grad_addend, padding, pool_size, dtype, wanted):
    grad_x, grad_weight = outputs
    tensors = {"grad_y": grad_y, "x": x, "weight": weight, "mean": mean, "scale": scale}
    tensors |= {"grad_addend": grad_addend, "grad_x": grad_x, "grad_weight": grad_weight}
    _launch_kernel("backward", backend, tensors, padding, pool_size, dtype)


def _launch_kernel(direction, backend, tensors, padding, pool_size, dtype):
    if backend == "triton":
        getattr(_launch.triton("dual_pool_attention_pad2d"), direction)(**tensors, padding=padding, pool_size=pool_size)
        return
    x = tensors["x"]
    sizes = _launch.image_sizes(x)
    if backend == "cuda":
        tensors["workspace"] = _launch.workspace("dual_pool_attention_pad2d", sizes, x)
    sizes.update(taps=len(tensors["weight"]), pool_size=pool_size, padding=padding)
    sizes.update(output_dtype=_launch.dtype_code(dtype))
    _launch.run(f"dual_pool_attention_pad2d_{direction}", backend, tensors, sizes, x.dtype)


def _save_for_backward(inputs, outputs):
    x, weight, grad_addend, padding, pool_size, dtype, _ = inputs
    _, mean, scale = outputs
    return x, weight, mean, scale, grad_addend, padding, pool_size, dtype


_forward = _registration.define(
    "dual_pool_attention_pad2d(Tensor x, Tensor weight, Tensor? grad_addend, SymInt padding, SymInt pool_size,"
    " ScalarType dtype, str backend) -> (Tensor y, Tensor mean, Tensor scale)",
    _allocate_forward,
    _launch_forward,
)
_backward = _registration.define(
    "dual_pool_attention_pad2d_backward(Tensor grad_y, Tensor x, Tensor weight, Tensor mean, Tensor scale,"
    " Tensor? grad_addend, SymInt padding, SymInt pool_size, ScalarType dtype, bool[] wanted, str backend) -> Tensor[]",
    allocate_backward,
    _launch_backward,
)
_differentiable = _registration.differentiate(_forward, _backward, _save_for_backward, count=2)


def _run(backend, x, weight, padding, pool_size, dtype, grad_addend):
    # The op knows rows of pixels with their channels, the caller a map whose strides say the same.
    return _differentiable(x, weight, grad_addend, padding, pool_size, dtype, backend)[0].permute(0, 3, 1, 2)


_OPERATOR.register("cuda", functools.partial(_run, "cuda"), _cuda_cannot)
_OPERATOR.register("triton", functools.partial(_run, "triton"), _triton_cannot)
_OPERATOR.register("cpu", functools.partial(_run, "cpu"), _cpu_cannot)

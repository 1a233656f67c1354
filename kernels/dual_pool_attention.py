"""Dual pooling attention: feature maps scaled channel by channel, after their pooled means.

The template for new operators, as CONTRIBUTING.md says: the public function, what each backend cannot run, and the
registration of its kernels (dual_pool_attention_triton.py and csrc/dual_pool_attention*).
"""

import functools

import torch
from torch import Tensor

from . import _backend, _checks, _launch, _registration
from .dual_pool_attention_reference import dual_pool_attention_reference

_OPERATOR = _backend.Operator("dual_pool_attention", dual_pool_attention_reference)


def dual_pool_attention(x: Tensor, weight: Tensor, *, pool_size: int = 50, backend: str | None = None) -> Tensor:
    """Scales every channel of x by sigmoid(conv1d over channels of its pooled mean).

    The mean of a channel is that of ``adaptive_avg_pool2d(x, pool_size)``: a weighted mean of the pixels, because the
    bins overlap where pool_size does not divide H or W. With m[c] that mean and k the length of weight::

        y[b, c, h, w] = x[b, c, h, w] · sigmoid(sum over j of weight[j] · m[b, c + j - k // 2]),   m zero outside

    Args:
        x: feature maps [B, C, H, W] of any floating dtype and size, also smaller than pool_size.
        weight: filter [k] over neighbouring channels, k odd, of the dtype and device of x. Under torch.autocast it is
            cast to the dtype of x.
        pool_size: rows and columns of the first pooling, 1 to 2^20.
        backend: "cuda", "triton", "cpu" or "reference"; None leaves the choice to :func:`use_backend`.

    Returns:
        A contiguous tensor of the shape and dtype of x. Memory beside it: about a thousandth of x (the reference: B·C·W
        numbers). Gradients: x and weight, for which x, weight and two numbers a channel are kept; the reference, which
        keeps more, can be differentiated twice.

    Raises:
        TypeError, ValueError: an argument is not as said here.
        RuntimeError: the backend asked for cannot run this call.

    Source: Sun, Zhang, Wu (2025), doi 10.1038/s40494-025-01595-0, Fig. 3.
    """
    (weight,) = _backend.autocast((weight,), getattr(x, "dtype", None))
    _checks.dual_pool_attention(x, weight, pool_size)
    return _OPERATOR.run(backend, x=x, weight=weight, pool_size=pool_size)


def _allocate_forward(x, weight, pool_size):
    mean = x.new_empty(x.shape[:2], dtype=torch.promote_types(x.dtype, torch.float32))
    return torch.empty_like(x, memory_format=torch.contiguous_format), mean, torch.empty_like(mean)


def _launch_forward(backend, outputs, x, weight, pool_size):
    y, mean, scale = outputs
    _launch_kernel("forward", backend, {"x": x, "weight": weight, "y": y, "mean": mean, "scale": scale}, pool_size)


def allocate_backward(grad_y, x, weight, *others):
    """Of :func:`dual_pool_attention`, and of what else has gradients to x and weight; others ends with the wanted."""
    wanted = others[-1]
    return [
        torch.empty_like(value, memory_format=torch.contiguous_format) if wish else None
        for value, wish in zip((x, weight), wanted, strict=True)
    ]


def _launch_backward(backend, outputs, grad_y, x, weight, mean, scale, pool_size, wanted):
    grad_x, grad_weight = outputs
    tensors = {"grad_y": grad_y, "x": x, "weight": weight, "mean": mean, "scale": scale}
    _launch_kernel("backward", backend, {**tensors, "grad_x": grad_x, "grad_weight": grad_weight}, pool_size)


def _launch_kernel(direction, backend, tensors, pool_size):
    if backend == "triton":
        getattr(_launch.triton("dual_pool_attention"), direction)(**tensors, pool_size=pool_size)
        return
    x = tensors["x"]
    sizes = _launch.image_sizes(x)
    if backend == "cuda":
        tensors["workspace"] = _launch.workspace("dual_pool_attention", sizes, x)
    sizes.update(taps=len(tensors["weight"]), pool_size=pool_size)
    _launch.run(f"dual_pool_attention_{direction}", backend, tensors, sizes, x.dtype)


def _save_for_backward(inputs, outputs):
    x, weight, pool_size, _ = inputs
    _, mean, scale = outputs
    return x, weight, mean, scale, pool_size


_forward = _registration.define(
    "dual_pool_attention(Tensor x, Tensor weight, SymInt pool_size, str backend)"
    " -> (Tensor y, Tensor mean, Tensor scale)",
    _allocate_forward,
    _launch_forward,
)
_backward = _registration.define(
    "dual_pool_attention_backward(Tensor grad_y, Tensor x, Tensor weight, Tensor mean, Tensor scale, SymInt pool_size,"
    " bool[] wanted, str backend) -> Tensor[]",
    allocate_backward,
    _launch_backward,
)
_differentiable = _registration.differentiate(_forward, _backward, _save_for_backward, count=2)


def _run(backend, x, weight, pool_size):
    return _differentiable(x, weight, pool_size, backend)[0]


_OPERATOR.register("cuda", functools.partial(_run, "cuda"), _backend.rows_in_32_bits)
_OPERATOR.register("triton", functools.partial(_run, "triton"), _backend.rows_in_32_bits)
_OPERATOR.register("cpu", functools.partial(_run, "cpu"), _backend.no_float16)

"""ReLU of a map's first channels, split off the others: from pixels of one convolution to planes of the next."""

import functools

from torch import Tensor

from . import _backend, _checks, _launch, _registration
from .relu_split_reference import relu_split_reference

_OPERATOR = _backend.Operator("relu_split", relu_split_reference)


def relu_split(x: Tensor, channels: int, *, backend: str | None = None) -> tuple[Tensor, Tensor]:
    """relu(x[:, :channels]) and x[:, channels:]: the value and the guide of a pixel-adaptive convolution.

    Where one convolution computes both, which is faster than one for each, its output lies in pixels (channels last),
    and :func:`pac_conv2d` reads planes. This takes one pass over x, and one over its gradient, where split, ReLU and
    the change of layout take three each.

    Args:
        x: feature maps [B, C, H, W] of any floating dtype, without copies where contiguous in torch.channels_last.
        channels: how many go through the ReLU, 1 to C - 1.
        backend: "cuda", "triton", "cpu" or "reference"; None leaves the choice to :func:`use_backend`.

    Returns:
        [B, channels, H, W] and [B, C - channels, H, W] of the dtype of x, each contiguous; NaN stays NaN. Gradients:
        x, laid out in torch.channels_last, for which the first output is kept; only the reference, whose gradient is
        laid out as autograd makes it, can be differentiated twice.

    Raises:
        TypeError, ValueError: an argument is not as said here.
        RuntimeError: the backend asked for cannot run this call. The CPU's kernel takes no float16.

    Source: Sun, Zhang, Wu (2025), doi 10.1038/s40494-025-01595-0, Fig. 4.
    """
    _checks.relu_split(x, channels)
    return _OPERATOR.run(backend, x=x, channels=channels)


def _triton_cannot(x, **_):
    # It counts the pixels of a plane in 32 bits.
    return "its kernel takes at most 2^30 pixels of a plane" if x.shape[2] * x.shape[3] > 2**30 else None


def _allocate_forward(x, channels):
    B, H, W, C = x.shape
    return x.new_empty((B, channels, H, W)), x.new_empty((B, C - channels, H, W))


def _launch_forward(backend, outputs, x, channels):
    rectified, rest = outputs
    _launch_kernel("forward", backend, {"x": x, "rectified": rectified, "rest": rest}, x)


def _allocate_backward(grad_rectified, grad_rest, rectified, wanted):
    B, channels, H, W = rectified.shape
    return [rectified.new_empty((B, H, W, channels + grad_rest.shape[1])) if wanted[0] else None]


def _launch_backward(backend, outputs, grad_rectified, grad_rest, rectified, wanted):
    (grad_x,) = outputs
    gradients = {"grad_rectified": grad_rectified, "grad_rest": grad_rest}
    _launch_kernel("backward", backend, {**gradients, "rectified": rectified, "grad_x": grad_x}, grad_x)


def _launch_kernel(direction, backend, tensors, pixels):
    """pixels: the tensor [B,H,W,C] among them."""
    if backend == "triton":
        getattr(_launch.triton("relu_split"), direction)(**tensors)
        return
    sizes = dict(zip(("batch", "height", "width", "channels"), pixels.shape, strict=True))
    sizes["split"] = tensors["rectified"].shape[1]
    _launch.run(f"relu_split_{direction}", backend, tensors, sizes, pixels.dtype)


_forward = _registration.define(
    "relu_split(Tensor x, SymInt channels, str backend) -> (Tensor rectified, Tensor rest)",
    _allocate_forward,
    _launch_forward,
)
_backward = _registration.define(
    "relu_split_backward(Tensor grad_rectified, Tensor grad_rest, Tensor rectified, bool[] wanted, str backend)"
    " -> Tensor[]",
    _allocate_backward,
    _launch_backward,
)
_differentiable = _registration.differentiate(
    _forward, _backward, lambda inputs, outputs: (outputs[0],), count=1, outputs=2
)


def _run(backend, x, channels):
    # The op knows rows of pixels with their channels, the caller a map whose strides say the same.
    return _differentiable(x.permute(0, 2, 3, 1), channels, backend)


_OPERATOR.register("cuda", functools.partial(_run, "cuda"), _backend.rows_in_32_bits)
_OPERATOR.register("triton", functools.partial(_run, "triton"), _triton_cannot)
_OPERATOR.register("cpu", functools.partial(_run, "cpu"), _backend.no_float16)

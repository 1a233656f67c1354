"""Pixel-adaptive convolution: a convolution whose every tap is weighted by the likeness of two pixels of a guide."""

import functools
import math

import torch
from torch import Tensor, nn
from torch.nn.modules.utils import _pair

from . import _backend, _checks, _launch, _registration
from .pac_conv2d_reference import pac_conv2d_reference, pac_conv2d_reference_, pac_kernel2d_reference

IntOrPair = int | tuple[int, int]

_OPERATOR = _backend.Operator("pac_conv2d", pac_conv2d_reference)
_IN_PLACE = _backend.Operator("pac_conv2d_", pac_conv2d_reference_)

# Of a plane with its padding, or of weights or channels, on a GPU: tiles beyond the end still fit into 32 bits.
_MOST_NUMBERS = 2**30


def pac_conv2d(
    x: Tensor,
    guide: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: IntOrPair = 1,
    padding: IntOrPair = 0,
    dilation: IntOrPair = 1,
    normalize: bool = False,
    residual: Tensor | None = None,
    alpha: float = 1.0,
    quantum: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """residual + alpha · (pixel-adaptive convolution of x guided by guide + bias).

    For the output place p, which lies at the centre tap, and the taps t of a K x K kernel::

        k_t(p) = exp(-1/2 |guide(p) - guide(p + t)|²)
        y[o](p) = bias[o] + sum over t and c of k_t(p) · weight[o, c, t] · x[c](p + t)

    x and guide are 0 outside the image. The centre tap's k is 1 by definition. A constant guide gives
    torch.nn.functional.conv2d.

    Args:
        x: values [B, C, H, W] of any floating dtype.
        guide: [B, G, H, W], any number of channels.
        weight: [O, C, K, K], K odd; or [1, 1, K, K], one filter that every channel shares (O = C).
        bias: [O] or None. All these have the dtype and device of x; torch.autocast casts them as for conv2d.
        stride, padding, dilation: integer up to 2^30 or (vertical, horizontal), as in conv2d.
        normalize: divide k_t(p) by the sum of k(p) over the taps inside the image; a place with none gives the bias, as
            does one whose centre lies outside, by a wide padding, and whose k(p) are all too small for the dtype.
        residual: [B, O, H', W'], added at the end, in the dtype of x, or float32 where x is of half precision; or None.
        alpha: a finite factor; -1 inverts a reversible block.
        quantum: power of two from 2^-126 to 2^127: the convolution + bias is rounded to its nearest multiples (ties to
            even) before alpha and residual, so that a float32 residual of such multiples below 2^24·quantum is added to
            without error. The gradient passes through as if nothing were rounded. None rounds nothing.
        backend: "cuda", "triton", "cpu" or "reference"; None leaves the choice to :func:`use_backend`.

    Returns:
        [B, O, H', W'] in the dtype of residual, or of x. Gradients: x, guide, weight, bias, residual; the reference can
        be differentiated twice. Saved for backward: the inputs. Memory beside the results: on the CPU below 1 MB a
        thread (more with K above 7) and a copy of weight, in backward another copy a thread and, in bfloat16, the
        gradients of x and guide in float32; in CUDA a copy of weight and, in backward, K² numbers of float32 for each
        output place (twice as many with normalize or more than 64 channels, 8 of a shared filter) and at most 8 MB
        more, or one more copy of weight where that is larger; in Triton likewise, with K² numbers and K² more for every
        64 channels (16 without tensor cores) and at most 16 MB, or such a copy; the reference holds about K²·(2C + G)
        numbers for each output place. Triton compares tiles in its first call with a number of channels and a dtype,
        not under torch.use_deterministic_algorithms; as of any Triton kernel, the first call must not be while a CUDA
        graph is captured. On GPUs products of float32 are rounded to tf32 where torch.backends.cudnn.allow_tf32 (or
        conv.fp32_precision there) asks for it, as in conv2d. Inf or NaN in the guide spoils the output and the
        gradients of x and guide in reach of one kernel only: next to a pixel of Inf the taps vanish, at it the centre
        remains, and the guide's gradient is NaN there. What such numbers are multiplied with outside the image, where
        taps count as zero, is zero or NaN as the backend has it.

    Raises:
        TypeError, ValueError: an argument is not as said here.
        RuntimeError: the backend asked for cannot run this call.

    Source: Su et al., Pixel-Adaptive Convolutional Neural Networks (2019), eq. 3; Sun, Zhang, Wu (2025),
    doi 10.1038/s40494-025-01595-0, eq. 5.
    """
    x, guide, weight, bias = _backend.autocast((x, guide, weight, bias))
    stride, padding, dilation = _checks.pac_conv2d(
        "pac_conv2d", x, guide, weight, bias, stride, padding, dilation, normalize, residual, alpha, quantum
    )
    return _OPERATOR.run(
        backend,
        x=x,
        guide=guide,
        weight=weight,
        bias=bias,
        stride=stride,
        padding=padding,
        dilation=dilation,
        normalize=normalize,
        residual=residual,
        alpha=alpha,
        quantum=quantum,
    )


def pac_conv2d_(
    residual: Tensor,
    x: Tensor,
    guide: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: IntOrPair = 1,
    padding: IntOrPair = 0,
    dilation: IntOrPair = 1,
    normalize: bool = False,
    alpha: float = 1.0,
    quantum: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """:func:`pac_conv2d` written into residual, for inference: with alpha = -1 it takes back what it added.

    Args:
        residual: [B, O, H', W'], contiguous, sharing no memory with the other tensors.
        others: as for :func:`pac_conv2d`. None may require gradients, unless grad mode is off.

    Returns:
        residual.

    Raises:
        TypeError, ValueError: an argument is not as said here; residual is then untouched.
        RuntimeError: the backend asked for cannot run this call.
    """
    x, guide, weight, bias = _backend.autocast((x, guide, weight, bias))
    stride, padding, dilation = _checks.pac_conv2d_(
        residual, x, guide, weight, bias, stride, padding, dilation, normalize, alpha, quantum
    )
    return _IN_PLACE.run(
        backend,
        residual=residual,
        x=x,
        guide=guide,
        weight=weight,
        bias=bias,
        stride=stride,
        padding=padding,
        dilation=dilation,
        normalize=normalize,
        alpha=alpha,
        quantum=quantum,
    )


def pac_kernel2d(
    guide: Tensor,
    kernel_size: int,
    *,
    stride: IntOrPair = 1,
    padding: IntOrPair = 0,
    dilation: IntOrPair = 1,
    normalize: bool = False,
) -> Tensor:
    """The k_t(p) of :func:`pac_conv2d`, to look at.

    Args:
        guide: [B, G, H, W] of any floating dtype.
        kernel_size: K, odd.
        stride, padding, dilation, normalize: as for :func:`pac_conv2d`.

    Returns:
        [B, 1, K, K, H', W'], values in [0, 1]. Taps outside the image see a guide of 0; normalised, they are 0. Always
        the reference. Gradients: guide.

    Raises:
        TypeError, ValueError: an argument is not as said here.
    """
    stride, padding, dilation = _checks.pac_kernel2d(guide, kernel_size, stride, padding, dilation, normalize)
    return pac_kernel2d_reference(
        guide, kernel_size, stride=stride, padding=padding, dilation=dilation, normalize=normalize
    )


class PacConv2d(nn.Module):
    """:func:`pac_conv2d` with learned weight and bias. Loads the state dict of pacnet's layer of the same name.

    Args:
        in_channels, out_channels: C and O; equal if shared_filters.
        kernel_size: K, odd.
        stride, padding, dilation: integer or (vertical, horizontal).
        bias: whether to learn one.
        normalize_kernel: the argument normalize of :func:`pac_conv2d`.
        shared_filters: one filter [1, 1, K, K] for all channels in place of [O, C, K, K].
        device, dtype: of weight and bias, a floating dtype; None is torch's own default.

    Raises:
        TypeError, ValueError: an argument is not as said here.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        stride: IntOrPair = 1,
        padding: IntOrPair = 0,
        dilation: IntOrPair = 1,
        bias: bool = True,
        normalize_kernel: bool = False,
        shared_filters: bool = False,
        *,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        geometry = (kernel_size, stride, padding, dilation)
        switches = (bias, normalize_kernel, shared_filters)
        _checks.pac_conv2d_module(in_channels, out_channels, *geometry, *switches, device, dtype)
        self.stride = stride
        self.padding = padding
        self.dilation = dilation
        self.normalize_kernel = normalize_kernel
        filters = (1, 1) if shared_filters else (out_channels, in_channels)
        kind = {"device": device, "dtype": dtype}
        self.weight = nn.Parameter(torch.empty(*filters, kernel_size, kernel_size, **kind))
        self.bias = nn.Parameter(torch.empty(out_channels, **kind)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws weight and bias uniformly within 1/sqrt(products summed in one output), as torch.nn.Conv2d does."""
        bound = 1 / math.sqrt(self.weight[0].numel())
        nn.init.uniform_(self.weight, -bound, bound)
        if self.bias is not None:
            nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, x: Tensor, guide: Tensor) -> Tensor:
        """[B, C, H, W] and [B, G, H, W] -> [B, O, H', W']."""
        return pac_conv2d(
            x,
            guide,
            self.weight,
            self.bias,
            stride=self.stride,
            padding=self.padding,
            dilation=self.dilation,
            normalize=self.normalize_kernel,
        )

    def extra_repr(self) -> str:
        """What print shows of the layer."""
        return (
            f"weight={list(self.weight.shape)}, stride={self.stride}, padding={self.padding}, "
            f"dilation={self.dilation}, bias={self.bias is not None}, normalize_kernel={self.normalize_kernel}"
        )


def _gpu_cannot(x, weight, guide=None, stride=1, padding=0, dilation=1, **others):
    if weight.numel() > _MOST_NUMBERS:
        return "its kernel takes at most 2^30 weights"
    if max(tensor.shape[1] for tensor in (x, guide) if tensor is not None) > _MOST_NUMBERS:
        return "its kernel takes at most 2^30 channels"
    if max(_pair(stride)) > _MOST_NUMBERS:
        return "its kernel counts the steps of a stride in 32 bits"
    margins, gaps = _pair(padding), _pair(dilation)
    height, width = (x.shape[2 + axis] + 2 * margins[axis] + weight.shape[-1] * gaps[axis] for axis in (0, 1))
    return "its kernel counts the pixels of a padded plane in 32 bits" if height * width > _MOST_NUMBERS else None


def _out_channels(x, weight):
    return x.shape[1] if _is_shared(weight) else weight.shape[0]


def _is_shared(weight):
    # One filter of one channel is both; sharing it gives the same.
    return weight.shape[:2] == (1, 1)


def _options(x, guide, weight, stride, padding, dilation, normalize):
    """What the kernels are told beside addresses."""
    B, C, H, W = x.shape
    return {
        "batch": B,
        "channels": C,
        "guide_channels": guide.shape[1],
        "out_channels": _out_channels(x, weight),
        "height": H,
        "width": W,
        "kernel_size": weight.shape[-1],
        "stride": stride,
        "padding": padding,
        "dilation": dilation,
        "normalize": normalize,
        "shared": _is_shared(weight),
    }


def _allocate_forward(x, guide, weight, bias, residual, stride, padding, dilation, normalize, alpha, quantum):
    like = x if residual is None else residual
    size = _checks.output_size(x, weight.shape[-1], stride, padding, dilation)
    return (like.new_empty((x.shape[0], _out_channels(x, weight), *size)),)


def _launch_forward(
    backend, outputs, x, guide, weight, bias, residual, stride, padding, dilation, normalize, alpha, quantum
):
    (y,) = outputs
    if backend == "triton":
        return _launch.triton("pac_conv2d").forward(
            x, guide, weight, bias, residual, y, stride, padding, dilation, normalize, alpha, quantum
        )
    geometry = _options(x, guide, weight, stride, padding, dilation, normalize)
    tensors = {"x": x, "guide": guide, "weight": weight, "bias": bias, "residual": residual, "y": y}
    if backend == "cuda":
        # As for conv2d, whose sums these are.
        geometry["allow_tf32"] = _launch.convolves_in_tf32()
        tensors["workspace"] = _launch.workspace("pac_conv2d_forward", geometry, x)
    options = {"alpha": alpha, "quantum": quantum or 0.0, "output_dtype": _launch.dtype_code(y.dtype)}
    _launch.run("pac_conv2d_forward", backend, tensors, geometry | options, x.dtype)


def _launch_in_place(backend, residual, *arguments):
    x, guide, weight, bias, *options = arguments
    _launch_forward(backend, (residual,), x, guide, weight, bias, residual, *options)


def _allocate_backward(grad_y, x, guide, weight, stride, padding, dilation, normalize, alpha, wanted):
    outputs = (
        (x, x.shape),
        (guide, guide.shape),
        (weight, weight.shape),
        (weight, (_out_channels(x, weight),)),
        (grad_y, grad_y.shape),
    )
    return [like.new_empty(shape) if wish else None for (like, shape), wish in zip(outputs, wanted, strict=True)]


def _launch_backward(backend, outputs, grad_y, x, guide, weight, stride, padding, dilation, normalize, alpha, wanted):
    *gradients, grad_residual = outputs
    if grad_residual is not None:
        # A copy: an op may not return what it was given.
        grad_residual.copy_(grad_y)
    if all(gradient is None for gradient in gradients):
        return
    if backend == "triton":
        return _launch.triton("pac_conv2d_backward").backward(
            grad_y, x, guide, weight, *gradients, stride, padding, dilation, normalize, alpha
        )
    geometry = _options(x, guide, weight, stride, padding, dilation, normalize)
    names = ("grad_x", "grad_guide", "grad_weight", "grad_bias")
    tensors = {"grad_y": grad_y, "x": x, "guide": guide, "weight": weight, **dict(zip(names, gradients, strict=True))}
    options = {"alpha": alpha, "output_dtype": _launch.dtype_code(grad_y.dtype)}
    if backend == "cuda":
        options["allow_tf32"] = _launch.convolves_in_tf32()
        made = [gradient is not None for gradient in gradients]
        tensors["workspace"] = _launch.workspace("pac_conv2d_backward", {**geometry, "wanted": made}, x)
    _launch.run("pac_conv2d_backward", backend, tensors, geometry | options, x.dtype)


def _save_for_backward(inputs, outputs):
    x, guide, weight, _, _, stride, padding, dilation, normalize, alpha, _, _ = inputs
    return x, guide, weight, stride, padding, dilation, normalize, alpha


_GEOMETRY = "SymInt[2] stride, SymInt[2] padding, SymInt[2] dilation, bool normalize, float alpha"
_forward = _registration.define(
    "pac_conv2d(Tensor x, Tensor guide, Tensor weight, Tensor? bias, Tensor? residual, "
    f"{_GEOMETRY}, float? quantum, str backend) -> Tensor",
    _allocate_forward,
    _launch_forward,
)
_forward_in_place = _registration.define_in_place(
    "pac_conv2d_(Tensor(a!) residual, Tensor x, Tensor guide, Tensor weight, Tensor? bias, "
    f"{_GEOMETRY}, float? quantum, str backend) -> ()",
    _launch_in_place,
)
_backward = _registration.define(
    f"pac_conv2d_backward(Tensor grad_y, Tensor x, Tensor guide, Tensor weight, {_GEOMETRY}, bool[] wanted, "
    "str backend) -> Tensor[]",
    _allocate_backward,
    _launch_backward,
)
_differentiable = _registration.differentiate(_forward, _backward, _save_for_backward, count=5)


def _run(backend, x, guide, weight, bias, *, residual, stride, padding, dilation, normalize, alpha, quantum):
    return _differentiable(
        x, guide, weight, bias, residual, stride, padding, dilation, normalize, alpha, quantum, backend
    )


def _run_in_place(backend, residual, x, guide, weight, bias, *, stride, padding, dilation, normalize, alpha, quantum):
    _forward_in_place(residual, x, guide, weight, bias, stride, padding, dilation, normalize, alpha, quantum, backend)
    return residual


_OPERATOR.register("cuda", functools.partial(_run, "cuda"), _gpu_cannot)
_IN_PLACE.register("cuda", functools.partial(_run_in_place, "cuda"), _gpu_cannot)
_OPERATOR.register("triton", functools.partial(_run, "triton"), _gpu_cannot)
_IN_PLACE.register("triton", functools.partial(_run_in_place, "triton"), _gpu_cannot)
_OPERATOR.register("cpu", functools.partial(_run, "cpu"), _backend.no_float16)
_IN_PLACE.register("cpu", functools.partial(_run_in_place, "cpu"), _backend.no_float16)

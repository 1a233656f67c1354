"""Pixel-adaptive convolution in plain PyTorch: the definition that every backend is measured against."""

import torch
import torch.nn.functional as F
from torch.nn.modules.utils import _pair


def pac_kernel2d_reference(guide, kernel_size, *, stride=1, padding=0, dilation=1, normalize=False):
    """k_t(p) = exp(-1/2 |g(p) - g(p+t)|²) (Sun 2025, eq. 5) for guide [B, G, H, W], as [B, 1, K, K, H', W']."""
    taps = _taps(guide, kernel_size, stride, padding, dilation)
    centre = taps[len(taps) // 2]
    # The centre is 1 by definition, whose gradient to the guide is 0: computed, it would be NaN where the guide is Inf.
    one = centre[:, :0].sum(1, True) + 1
    values = [one if tap is centre else torch.exp(-0.5 * (centre - tap).square().sum(1, True)) for tap in taps]
    kernel = torch.stack(values, dim=2)
    if normalize:
        inside = torch.stack(_taps(torch.ones_like(guide[:, :1]), kernel_size, stride, padding, dilation), dim=2)
        kernel = torch.where(inside > 0, kernel, 0)
        total = kernel.sum(dim=2, keepdim=True)
        # A place with no tap inside the image has only zeros here; dividing them by 1 leaves the bias alone.
        kernel = kernel / torch.where(total == 0, 1, total)
    return kernel.unflatten(2, (kernel_size, kernel_size))


def pac_conv2d_reference(
    x,
    guide,
    weight,
    bias=None,
    *,
    stride=1,
    padding=0,
    dilation=1,
    normalize=False,
    residual=None,
    alpha=1.0,
    quantum=None,
):
    """residual + alpha * (b[o] + sum over t of k_t(p) sum over c of W[o,c,t] x[c](p+t)), x zero outside the image."""
    kernel_size = weight.shape[-1]
    kernel = pac_kernel2d_reference(
        guide, kernel_size, stride=stride, padding=padding, dilation=dilation, normalize=normalize
    )
    taps = _taps(x, kernel_size, stride, padding, dilation)
    scaled = [tap * k for tap, k in zip(taps, kernel.flatten(2, 3).unbind(2), strict=True)]
    if weight.shape[:2] == (1, 1):
        y = (torch.stack(scaled, dim=2) * weight.reshape(-1, 1, 1)).sum(2)
        y = y if bias is None else y + bias.view(-1, 1, 1)
    else:
        weights = weight.permute(0, 2, 3, 1).flatten(1)
        if bias is not None:
            # As the weights of ones: where inputs are thousands and outputs few, the bias gradient of conv2d itself, in
            # bfloat16 on processors with AMX, writes past its end (PyTorch 2.13).
            scaled.append(torch.ones_like(scaled[0][:, :1]))
            weights = torch.cat((weights, bias[:, None]), dim=1)
        y = F.conv2d(torch.cat(scaled, dim=1), weights[:, :, None, None])
    if quantum is not None:
        y = _rounded(y, quantum)
    return alpha * y if residual is None else residual + alpha * y


def pac_conv2d_reference_(residual, x, guide, weight, bias=None, **options):
    """:func:`pac_conv2d_reference` with this residual, written back into it."""
    return residual.copy_(pac_conv2d_reference(x, guide, weight, bias, residual=residual, **options))


def _taps(image, kernel_size, stride, padding, dilation):
    """image at p + t for every tap t, row by row: K² views [B, C, H', W'] of the zero-padded image."""
    steps, margins, gaps = _pair(stride), _pair(padding), _pair(dilation)
    padded = F.pad(image, (margins[1], margins[1], margins[0], margins[0]))

    def positions(tap, axis):
        last_start = padded.shape[2 + axis] - gaps[axis] * (kernel_size - 1)
        return slice(tap * gaps[axis], tap * gaps[axis] + last_start, steps[axis])

    return [padded[:, :, positions(i, 0), positions(j, 1)] for i in range(kernel_size) for j in range(kernel_size)]


def _rounded(y, quantum):
    # torch.compile takes no Function that has a tangent.
    rounding = _RoundToMultiple if torch.compiler.is_compiling() else _RoundToMultipleWithTangent
    # float16 overflows when divided by a small quantum; a power of two makes the division itself exact. Casts stay
    # outside of the Function: compiled by PyTorch 2.11, one that ends with a cast to what it is has no gradient.
    wide = y.to(torch.promote_types(y.dtype, torch.float32))
    return rounding.apply(wide, float(quantum)).to(y.dtype)


class _RoundToMultiple(torch.autograd.Function):
    """Nearest multiple of quantum, ties to even, with the gradient of the identity (straight-through)."""

    generate_vmap_rule = True

    @staticmethod
    def forward(y, quantum):
        scaled = y / quantum
        # What is too large to be scaled has no fraction.
        return torch.where(scaled.isfinite(), torch.round(scaled) * quantum, y)

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, grad_y):
        return grad_y, None


class _RoundToMultipleWithTangent(_RoundToMultiple):
    @staticmethod
    def jvp(ctx, tangent, _):
        return tangent.clone()

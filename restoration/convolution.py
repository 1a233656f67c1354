"""Convolutions of bfloat16 also on processors for which PyTorch has no library of them: in float32, and rounded once.
And what makes pictures large enough for convolutions.

PyTorch itself multiplies bfloat16 number by number there (x86 without AVX-512, say), in many times float32's time.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor


@functools.cache
def has_fast_bf16() -> bool:
    """Whether PyTorch multiplies bfloat16 by a library on this CPU."""
    try:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    except AttributeError:  # a PyTorch without that library
        return False


def computing_dtype(x: Tensor) -> torch.dtype:
    """What x is to be convolved in: its own dtype, or float32 in the place of bfloat16 without a library."""
    number_by_number = x.dtype == torch.bfloat16 and x.device.type == "cpu" and not has_fast_bf16()
    return torch.float32 if number_by_number else x.dtype


def conv2d(x: Tensor, weight: Tensor, bias: Tensor, padding: int = 0) -> Tensor:
    """F.conv2d in the dtype of x, also within autocast."""
    dtype = computing_dtype(x)
    if dtype == x.dtype:
        return F.conv2d(x, weight, bias, padding=padding)
    weight, bias = (tensor.to(x.dtype).to(dtype) for tensor in (weight, bias))
    # Autocast would round x once more, and convolve what it rounded.
    with torch.autocast(x.device.type, enabled=False):
        return F.conv2d(x.to(dtype), weight, bias, padding=padding).to(x.dtype)


def replicate_up_to(image: Tensor, least: int, multiple: int = 1) -> Tensor:
    """Replicates the right and lower edges of [B,C,H,W] until both sides are multiples, and no shorter than least."""
    below, right = (-(-max(least, side) // multiple) * multiple - side for side in image.shape[-2:])
    return F.pad(image, (0, right, 0, below), mode="replicate") if right or below else image

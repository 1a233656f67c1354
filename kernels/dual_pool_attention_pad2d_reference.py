"""Dual pooling attention into a padded map in plain PyTorch: the definition that every backend is measured against."""

import torch
import torch.nn.functional as F

from .dual_pool_attention_reference import dual_pool_attention_reference


def dual_pool_attention_pad2d_reference(x, weight, *, padding=1, pool_size=50, dtype=None, grad_addend=None):
    """pad(dual_pool_attention(x)) by reflection, cast to dtype, channels last."""
    if grad_addend is not None:
        x = _AddToGradient.apply(x, grad_addend)
    y = dual_pool_attention_reference(x, weight, pool_size=pool_size)
    y = F.pad(y, (padding,) * 4, mode="reflect").to(dtype or x.dtype)
    return y.contiguous(memory_format=torch.channels_last)


class _AddToGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, grad_addend):
        ctx.save_for_backward(grad_addend)
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad_x):
        (grad_addend,) = ctx.saved_tensors
        return grad_x + grad_addend, None

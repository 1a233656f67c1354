"""Dual pooling attention into a padded map in plain PyTorch: the definition that every backend is measured against."""

import torch
import torch.nn.functional as F

from .dual_pool_attention_reference import dual_pool_attention_reference


def dual_pool_attention_pad2d_reference(x, weight, *, padding=1, pool_size=50, dtype=None, grad_addend=None):
    """pad(dual_pool_attention(x)) by reflection, cast to dtype, channels last."""
    if grad_addend is not None:
        # torch.compile takes no Function that has a tangent.
        adding = _AddToGradient if torch.compiler.is_compiling() else _AddToGradientWithTangent
        x = adding.apply(x, grad_addend)
    y = dual_pool_attention_reference(x, weight, pool_size=pool_size)
    y = F.pad(y, (padding,) * 4, mode="reflect").to(dtype or x.dtype)
    return y.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)


class _AddToGradient(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x, grad_addend):
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(inputs[1])

    @staticmethod
    def backward(ctx, grad_x):
        (grad_addend,) = ctx.saved_tensors
        return grad_x + grad_addend, None


class _AddToGradientWithTangent(_AddToGradient):
    @staticmethod
    def jvp(ctx, tangent, _):
        return tangent.view_as(tangent)

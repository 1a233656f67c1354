"""Dual pooling attention: feature maps scaled channel by channel, after their pooled means."""

from torch import Tensor

from . import _backend, _checks
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
        pool_size: rows and columns of the first pooling, at least 1.
        backend: "cuda", "triton", "cpu" or "reference"; None leaves the choice to :func:`use_backend`.

    Returns:
        A tensor like x. Memory beside it: B·C·W numbers for the means. Gradients: x and weight; the reference can be
        differentiated twice.

    Raises:
        TypeError, ValueError: an argument is not as said here.
        RuntimeError: the backend asked for cannot run this call.

    Source: Sun, Zhang, Wu (2025), doi 10.1038/s40494-025-01595-0, Fig. 3.
    """
    (weight,) = _backend.autocast((weight,), getattr(x, "dtype", None))
    _checks.dual_pool_attention(x, weight, pool_size)
    return _OPERATOR.run(backend, x=x, weight=weight, pool_size=pool_size)

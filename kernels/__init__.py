"""Fused PyTorch operators for colour reconstruction of paintings. Installed as ``restoration_kernels``."""

if __name__ != "restoration_kernels":
    raise ImportError(
        f"this package is installed as restoration_kernels, not as {__name__}: the name `kernels` belongs to another "
        "package; write `import restoration_kernels`"
    )

from importlib.metadata import version as _version

from ._backend import available_backends, use_backend
from .ccpl import CCPLoss, ccpl_loss, info_nce, neighbor_difference, sample_neighbors
from .dual_pool_attention import dual_pool_attention
from .dual_pool_attention_pad2d import dual_pool_attention_pad2d
from .matting_laplacian import (
    matting_laplacian_apply,
    matting_laplacian_energy,
    matting_laplacian_matrix,
)
from .pac_conv2d import PacConv2d, pac_conv2d, pac_conv2d_, pac_kernel2d
from .relu_split import relu_split

__version__ = _version("painting-restoration")

__all__ = [
    "CCPLoss",
    "PacConv2d",
    "available_backends",
    "ccpl_loss",
    "dual_pool_attention",
    "dual_pool_attention_pad2d",
    "info_nce",
    "matting_laplacian_apply",
    "matting_laplacian_energy",
    "matting_laplacian_matrix",
    "neighbor_difference",
    "pac_conv2d",
    "pac_conv2d_",
    "pac_kernel2d",
    "relu_split",
    "sample_neighbors",
    "use_backend",
]

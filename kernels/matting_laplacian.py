"""The Matting Laplacian: how far an image is from being, window by window, a linear function of a guide's colours."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from . import _backend, _checks
from .matting_laplacian_reference import (
    matting_laplacian_apply_reference,
    matting_laplacian_energy_reference,
    matting_laplacian_matrix_reference,
)

if TYPE_CHECKING:
    from scipy.sparse import csr_array

_ENERGY = _backend.Operator("matting_laplacian_energy", matting_laplacian_energy_reference)
_APPLY = _backend.Operator("matting_laplacian_apply", matting_laplacian_apply_reference)


def matting_laplacian_energy(
    image: Tensor, guide: Tensor, *, eps: float = 1e-7, radius: int = 1, backend: str | None = None
) -> Tensor:
    """1/(H·W) sum over channels V of V^T M V, with M the Matting Laplacian of the guide.

    For every window w of n = (2·radius + 1)² pixels inside the image, C_w (n x 3) the guide's colours and x_w (n) the
    image's values there, both less their mean::

        a_w = (C_w^T C_w / n + eps / n · Id)^-1 C_w^T x_w / n        r_w = x_w - C_w a_w
        V^T M V = sum over w of |r_w|² + eps · |a_w|²                 gradient 2 M V

    Args:
        image: [B, C, H, W] with any number of channels; values in [0, 1] give energies of at most C·n/4.
        guide: [B, 3, H, W], the colours, of the dtype and device of image. eps is meant for values in [0, 1].
        eps: weight of the slopes a_w, positive; the smaller, the freer the fit where the guide is flat.
        radius: 1, 2 or 3.
        backend: "cuda", "triton", "cpu" or "reference"; None leaves the choice to :func:`use_backend`.

    Returns:
        [B], in the dtype of image, or float32 where that is of half precision. An image smaller than a window has no
        energy: 0. The sums are float64 inside. Under torch.autocast, half precision arguments are cast to float32.
        The reference holds about 7·(n + 3)·(C + 1) float64 numbers a pixel in training. Gradients: image, and by the
        reference alone, which can be differentiated twice, also guide.

    Raises:
        TypeError, ValueError: an argument is not as said here.
        RuntimeError: the backend asked for cannot run this call.

    Source: Levin, Lischinski, Weiss, A Closed-Form Solution to Natural Image Matting (2008), eq. 12, as the loss of
    Sun, Zhang, Wu (2025), doi 10.1038/s40494-025-01595-0, eq. 9.
    """
    image, guide = _backend.autocast((image, guide), torch.float32)
    _checks.matting_laplacian("matting_laplacian_energy", image, guide, eps, radius)
    return _ENERGY.run(backend, image=image, guide=guide, eps=eps, radius=radius)


def matting_laplacian_apply(
    image: Tensor, guide: Tensor, *, eps: float = 1e-7, radius: int = 1, backend: str | None = None
) -> Tensor:
    """M V for every channel V of the image, with M the Matting Laplacian of the guide; for solvers.

    (M V)_i = sum over the windows that contain pixel i of r_w[i], in the notation of :func:`matting_laplacian_energy`,
    which also tells about arguments, memory, gradients and errors. M is symmetric, M >= 0 and M 1 = 0.

    Returns:
        A tensor like image, not divided by the number of pixels; zero where the image is smaller than a window.
    """
    image, guide = _backend.autocast((image, guide), torch.float32)
    _checks.matting_laplacian("matting_laplacian_apply", image, guide, eps, radius)
    return _APPLY.run(backend, image=image, guide=guide, eps=eps, radius=radius)


def matting_laplacian_matrix(guide: Tensor, *, eps: float = 1e-7, radius: int = 1) -> "csr_array":
    """The Matting Laplacian of one guide [3, H, W] as a sparse matrix, to check against and to export.

    Args:
        guide: the colours, on any device; no gradient flows to it.
        eps, radius: as for :func:`matting_laplacian_energy`.

    Returns:
        scipy.sparse.csr_array [H·W, H·W] of float64, pixels in row-major order, sorted indices: (4·radius + 1)² entries
        a row away from the border, which is 25·12 bytes a pixel at radius 1; about twice that while it is built.

    Raises:
        TypeError, ValueError: an argument is not as said here.

    Source: Levin, Lischinski, Weiss (2008), eq. 12.
    """
    _checks.matting_laplacian_matrix(guide, eps, radius)
    return matting_laplacian_matrix_reference(guide, eps=eps, radius=radius)

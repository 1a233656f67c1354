"""The Matting Laplacian: how far an image is from being, window by window, a linear function of a guide's colours."""

import functools
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from . import _backend, _checks, _launch, _registration
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
        eps: weight of the slopes a_w, a finite number of at least 1e-300; the smaller, the freer the fit where the
            guide is flat. Below about 1e-24 the reference loses digits in windows whose colours depend on each other,
            as those of a grey guide.
        radius: 1, 2 or 3.
        backend: "cuda", "triton", "cpu" or "reference"; None leaves the choice to :func:`use_backend`.

    Returns:
        [B], in the dtype of image, or float32 where that is of half precision. An image smaller than a window has no
        energy: 0. As nearly grey guides make nearly singular fits, everything is float64 inside, or pairs of float32
        whose result is as exact (docs/matting_laplacian.md). Half precision arguments are cast to float32. Gradients:
        image, computed in the same pass as the energy and kept, so that training holds one tensor like image; the
        reference holds about 3.5·(n + 3)·(C + 1) float64 numbers a pixel. By the reference alone, which can be
        differentiated twice, also guide, for which it holds twice as many.

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
        A tensor like image (float32 under torch.autocast), not divided by the number of pixels; zero where the image is
        smaller than a window.
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


def _cannot(image, guide, **_):
    if guide.requires_grad and torch.is_grad_enabled():
        return "its kernel gives no gradient to guide; use backend='reference', or guide.detach()"
    return None


def _cuda_cannot(image, guide, **_):
    return _backend.rows_in_32_bits(image) or _cannot(image, guide)


def _launch_kernel(backend, image, guide, product, energy, factor, eps, radius):
    """product = factor · M image and energy, either of which may be None."""
    if backend == "triton":
        _launch.triton("matting_laplacian").run(image, guide, product, energy, factor, eps, radius)
        return
    tensors = {"image": image, "guide": guide, "product": product, "energy": energy}
    sizes = _launch.image_sizes(image) | {"radius": radius}
    if backend == "cuda":
        tensors["workspace"] = _launch.workspace("matting_laplacian", sizes, image)
    _launch.run("matting_laplacian", backend, tensors, {**sizes, "factor": factor, "eps": eps}, image.dtype)


def _allocate_energy(image, guide, eps, radius, with_gradient):
    return image.new_empty(image.shape[0]), image.new_empty(image.shape if with_gradient else 0)


def _launch_energy(backend, outputs, image, guide, eps, radius, with_gradient):
    energy, gradient = outputs
    product = gradient if with_gradient else None
    _launch_kernel(backend, image, guide, product, energy, _energy_factor(image), eps, radius)


def _energy_factor(image):
    """Of the product M V in the gradient of the energy, which is divided by the number of pixels."""
    return 2 / (image.shape[2] * image.shape[3])


def _save_for_energy_backward(inputs, outputs):
    image, guide, eps, radius, with_gradient, _ = inputs
    # Without: a graph traced of an image that needed no gradient, and then differentiated all the same.
    return (outputs[1], None, None, eps, radius) if with_gradient else (None, image, guide, eps, radius)


def _allocate_energy_backward(grad_energy, gradient, image, guide, eps, radius, wanted):
    return [torch.empty_like(image if gradient is None else gradient, memory_format=torch.contiguous_format)]


def _launch_energy_backward(backend, outputs, grad_energy, gradient, image, guide, eps, radius, wanted):
    (grad_image,) = outputs
    if gradient is None:
        gradient = grad_image
        _launch_kernel(backend, image, guide, gradient, None, _energy_factor(image), eps, radius)
    torch.mul(gradient, grad_energy[:, None, None, None], out=grad_image)


def _allocate_apply(image, guide, eps, radius):
    return (image.new_empty(image.shape),)


def _launch_apply(backend, outputs, image, guide, eps, radius):
    _launch_kernel(backend, image, guide, outputs[0], None, 1.0, eps, radius)


def _allocate_apply_backward(grad_product, guide, eps, radius, wanted):
    return [grad_product.new_empty(grad_product.shape)]


def _launch_apply_backward(backend, outputs, grad_product, guide, eps, radius, wanted):
    # M is symmetric.
    _launch_apply(backend, outputs, grad_product, guide, eps, radius)


_energy = _registration.define(
    "matting_laplacian_energy(Tensor image, Tensor guide, float eps, SymInt radius, bool with_gradient, str backend)"
    " -> (Tensor energy, Tensor gradient)",
    _allocate_energy,
    _launch_energy,
)
_energy_backward = _registration.define(
    "matting_laplacian_energy_backward(Tensor grad_energy, Tensor? gradient, Tensor? image, Tensor? guide, float eps,"
    " SymInt radius, bool[] wanted, str backend) -> Tensor[]",
    _allocate_energy_backward,
    _launch_energy_backward,
)
_differentiable_energy = _registration.differentiate(_energy, _energy_backward, _save_for_energy_backward, count=1)

_apply = _registration.define(
    "matting_laplacian_apply(Tensor image, Tensor guide, float eps, SymInt radius, str backend) -> Tensor",
    _allocate_apply,
    _launch_apply,
)
_apply_backward = _registration.define(
    "matting_laplacian_apply_backward(Tensor grad_product, Tensor guide, float eps, SymInt radius, bool[] wanted,"
    " str backend) -> Tensor[]",
    _allocate_apply_backward,
    _launch_apply_backward,
)
_differentiable_apply = _registration.differentiate(
    _apply, _apply_backward, lambda inputs, outputs: inputs[1:4], count=1
)


def _run_energy(backend, image, guide, eps, radius):
    image, guide = _widened(image), _widened(guide)
    with_gradient = image.requires_grad and torch.is_grad_enabled()
    return _differentiable_energy(image, guide, eps, radius, with_gradient, backend)[0]


def _run_apply(backend, image, guide, eps, radius):
    return _differentiable_apply(_widened(image), _widened(guide), eps, radius, backend).to(image.dtype)


def _widened(tensor):
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


for _operator, _run in ((_ENERGY, _run_energy), (_APPLY, _run_apply)):
    _operator.register("cuda", functools.partial(_run, "cuda"), _cuda_cannot)
    _operator.register("triton", functools.partial(_run, "triton"), _cannot)
    _operator.register("cpu", functools.partial(_run, "cpu"), _cannot)

"""Matting Laplacian: the energy, and with it the gradient, beside one product of a matrix that was built before."""

import torch

from benchmarks.contest import Contest, Rival
from restoration_kernels import _samples, matting_laplacian_matrix


def traffic(image, guide, **_):
    """Energy alone reads image and guide; the gradient is written in the same pass."""
    read = image.nbytes + guide.nbytes
    return {"forward": read, "forward+backward": read + image.nbytes}


class _Quadratic(torch.autograd.Function):
    """V^T M V / (H·W) for every image of a batch, each with its matrix."""

    @staticmethod
    def forward(ctx, image, products_by):
        columns = image.detach().double().flatten(2).mT.contiguous()
        products = torch.stack([multiply(each) for multiply, each in zip(products_by, columns, strict=True)])
        ctx.save_for_backward((products.mT.reshape(image.shape) * (2 / columns.shape[1])).to(image.dtype))
        return ((columns * products).sum((1, 2)) / columns.shape[1]).to(image.dtype)

    @staticmethod
    def backward(ctx, grad_energy):
        (gradient,) = ctx.saved_tensors
        return grad_energy[:, None, None, None] * gradient, None


def _build(arguments):
    """Products with the matrices of all guides, built untimed: 25 entries a row at radius 1."""
    options = {name: arguments[name] for name in ("eps", "radius") if name in arguments}
    matrices = [matting_laplacian_matrix(each, **options) for each in arguments["guide"]]
    by_device = _on_gpu if arguments["guide"].is_cuda else _on_cpu
    return {"image": arguments["image"], "products_by": [by_device(matrix) for matrix in matrices]}


def _on_cpu(matrix):
    # In one thread; several times faster than torch's own in two.
    return lambda columns: torch.from_numpy(matrix @ columns.numpy())


def _on_gpu(matrix):
    parts = (torch.from_numpy(part).cuda() for part in (matrix.indptr, matrix.indices, matrix.data))
    return torch.sparse_csr_tensor(*parts, matrix.shape, check_invariants=False).matmul


def csr_product(image, products_by):
    """What no loss that has to build its matrix can be faster than."""
    return _Quadratic.apply(image, products_by)


def sample(side):
    """A colour picture whose guide is a pale copy of another."""
    make = _samples._matting_laplacian(1, 3, side, side, colour=0.1)
    return _samples.Sample("matting_laplacian_energy", f"3_at_{side}", "series", make)


CONTESTS = [
    Contest(
        "matting_laplacian_energy",
        traffic,
        series=[sample(side) for side in (128, 256, 512, 1024, 2048)],
        rivals=[Rival("csr product", csr_product, _build)],
    )
]


def test_speed(measure, entry):
    measure(entry)

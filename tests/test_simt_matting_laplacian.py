"""The CUDA kernel of the Matting Laplacian on the CPU, in each of its arithmetics, against the reference in float64."""

import compare
import matting_guides
import pytest
import simt_build
import torch
from simt_build import both_orders, needs_compiler

from restoration_kernels import matting_laplacian_apply, matting_laplacian_energy

pytestmark = needs_compiler

# Odd, one window, no window, several tiles each way, one row of windows.
SHAPES = [(2, 3, 37, 61), (1, 1, 3, 3), (5, 2, 2, 6), (1, 2, 40, 70), (1, 4, 3, 80)]


@both_orders
@pytest.mark.parametrize("radius", [1, 2, 3])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(
    ("dtype", "float64"),
    [(torch.float32, "fast"), (torch.float32, "slow"), (torch.float64, "fast")],
    ids=str,
    indirect=["float64"],
)
def test_matting_laplacian(shape, radius, dtype, order, float64):
    check_matting_laplacian(shape, dtype, radius)


@pytest.mark.parametrize("shape", [(1, 1, 3, 7720), (5, 2, 4, 40)], ids=["tiles", "images"])
def test_matting_laplacian_of_more_than_fit_at_once(shape):
    """Tiles in the block that adds up their energies, images in a grid."""
    check_matting_laplacian(shape, torch.float32, radius=1)


def check_matting_laplacian(shape, dtype, radius):
    batch, _, height, width = shape
    generator = torch.Generator().manual_seed(0)
    image = torch.rand(shape, generator=generator, dtype=torch.float64).to(dtype)
    guide = torch.rand(batch, 3, height, width, generator=generator, dtype=torch.float64).to(dtype)
    energy, product = run_matting_laplacian(image, guide, radius=radius)
    options = {"radius": radius, "backend": "reference"}
    exact_energy = matting_laplacian_energy(image.double(), guide.double(), **options)
    exact_product = matting_laplacian_apply(image.double(), guide.double(), **options)
    ulps = compare.kernel_ulps(dtype)
    compare.judge("energy", energy, exact_energy, ulps=ulps)
    compare.judge("product", product, exact_product, ulps=ulps)


@matting_guides.both_speeds_of_float64
@pytest.mark.parametrize("eps", [1e-15, 1e-7, 1e-5])
@pytest.mark.parametrize("picture", matting_guides.PICTURES)
def test_matting_laplacian_accuracy(picture, eps, float64):
    """The bounds of test_accuracy_in_float32, in the CUDA kernel."""
    guide = matting_guides.draw(picture)
    for name in ("stylised", "affine"):
        image = matting_guides.recolour(name, guide)
        ours = run_matting_laplacian(image, guide, eps=eps)
        pair, options = (image.double(), guide.double()), {"eps": eps, "backend": "reference"}
        exact = matting_laplacian_energy(*pair, **options), matting_laplacian_apply(*pair, **options)
        for result, right, bound in zip(ours, exact, (2e-7, 5e-7), strict=True):
            assert (result.double() - right).abs().max() <= bound * right.abs().max(), name


def test_matting_laplacian_computes_in_two_float_where_float64_is_slow(monkeypatch):
    """But not float64 tensors, nor where a fit may be too nearly singular for it, or eps too large."""
    guide = matting_guides.draw("noise")

    def same(eps, guide):
        products = []
        for speed in ("fast", "slow"):
            monkeypatch.setenv("RESTORATION_CUDA_FLOAT64", speed)
            products.append(run_matting_laplacian(0.7 * guide + 0.1, guide, eps=eps)[1])
        return torch.equal(*products)

    assert not same(1e-7, guide)
    assert same(1e-16, guide)
    assert same(1e39, guide)
    assert same(1e-7, guide.double())
    monkeypatch.setenv("RESTORATION_CUDA_FLOAT64", "")
    run_matting_laplacian(guide, guide)
    monkeypatch.setenv("RESTORATION_CUDA_FLOAT64", "quick")
    with pytest.raises(ValueError, match="RESTORATION_CUDA_FLOAT64 must be fast or slow, got"):
        run_matting_laplacian(guide, guide)


@matting_guides.both_speeds_of_float64
def test_matting_laplacian_computes_what_is_wanted(float64):
    image, guide = torch.rand(2, 2, 3, 9, 40)
    energy, product = run_matting_laplacian(image, guide)
    assert torch.equal(run_matting_laplacian(image, guide, wanted=("energy",))[0], energy)
    assert torch.equal(run_matting_laplacian(image, guide, wanted=("product",))[1], product)


def test_matting_laplacian_without_images():
    energy, product = run_matting_laplacian(*torch.rand(2, 0, 3, 5, 7))
    assert energy.shape == (0,)
    assert product.shape == (0, 3, 5, 7)


def run_matting_laplacian(image, guide, *, eps=1e-7, radius=1, wanted=("energy", "product")):
    """Energy and product by the CUDA kernels. What they do not write stays NaN."""
    extension = simt_build.load_extension()
    sizes = dict(zip(("batch", "channels", "height", "width"), image.shape, strict=True), radius=radius)
    sizes["dtype"] = simt_build.dtype_code(image)
    energy, product = torch.full_like(image[:, 0, 0, 0], torch.nan), torch.full_like(image, torch.nan)
    workspace = torch.full((extension.matting_laplacian_workspace_cuda(**sizes),), 255, dtype=torch.uint8)
    extension.matting_laplacian_cuda(
        image=image.data_ptr(),
        guide=guide.data_ptr(),
        product=product.data_ptr() if "product" in wanted else 0,
        energy=energy.data_ptr() if "energy" in wanted else 0,
        workspace=workspace.data_ptr(),
        factor=1.0,
        eps=eps,
        stream=0,
        **sizes,
    )
    return energy, product

import compare
import numpy as np
import pytest
import torch

from restoration_kernels import matting_laplacian_apply, matting_laplacian_energy, matting_laplacian_matrix
from restoration_kernels._samples import samples

OPERATORS = ("matting_laplacian_energy", "matting_laplacian_apply")


def dense_matrix(guide, eps, radius):
    """Window by window for one guide [3, H, W], with the orthogonal factor of a window's colours over √eps·Id.

    That factor's rows q_a give Levin et al.'s eq. 12 as (a == b) - 1/n - q_a·q_b without forming a covariance, whose
    inverse would be good to ten digits only where the colours are nearly grey.
    """
    _, height, width = guide.shape
    matrix = np.zeros((height * width, height * width))
    steps = range(-radius, radius + 1)
    for row in range(radius, height - radius):
        for column in range(radius, width - radius):
            window = [(row + i) * width + column + j for i in steps for j in steps]
            colours = guide.reshape(3, -1)[:, window].T
            augmented = np.concatenate([colours - colours.mean(0), np.sqrt(eps) * np.eye(3)])
            q = np.linalg.qr(augmented)[0][: len(window)]
            matrix[np.ix_(window, window)] += np.eye(len(window)) - 1 / len(window) - q @ q.T
    return matrix


def apply_definition(image, guide, eps=1e-7, radius=1):
    matrices = [torch.from_numpy(dense_matrix(each.numpy(), eps, radius)) for each in guide]
    flat = image.flatten(2)
    return torch.stack([each @ matrix.T for each, matrix in zip(flat, matrices, strict=True)]).view_as(image)


def energy_definition(image, guide, eps=1e-7, radius=1):
    return (image * apply_definition(image, guide, eps, radius)).sum((1, 2, 3)) / image[0, 0].numel()


DEFINITIONS = dict(zip(OPERATORS, (energy_definition, apply_definition), strict=True))


@compare.every_case(*OPERATORS)
@compare.every_dtype()
def test_forward(backend, sample, dtype):
    compare.check_values(backend, sample, dtype, DEFINITIONS[sample.operator])


@compare.every_case(*OPERATORS)
@compare.every_dtype()
def test_backward(backend, sample, dtype):
    compare.check_values(backend, sample, dtype, DEFINITIONS[sample.operator], ("image",))


@compare.every_case(*OPERATORS)
def test_gradcheck(backend, sample):
    compare.check_gradcheck(backend, sample)


@pytest.mark.parametrize("operator", [matting_laplacian_energy, matting_laplacian_apply])
def test_gradcheck_of_the_guide(operator):
    """Of the reference alone; with a large eps, as a nearly singular window is too curved for differences."""
    image, guide = torch.rand(2, 1, 3, 4, 4, dtype=torch.float64).requires_grad_().unbind()
    with compare.one_thread():
        assert torch.autograd.gradcheck(
            lambda *tensors: operator(*tensors, eps=0.1, backend="reference"), (image, guide)
        )


@compare.one_case(*OPERATORS)
def test_compile(backend, sample):
    compare.check_compile(backend, sample)


@compare.one_case(*OPERATORS)
def test_autocast(backend, sample):
    """Half precision is too coarse for windows that are nearly flat: it is widened."""
    arguments = compare.arguments_for(backend, sample, torch.bfloat16)
    wide = {name: value.float() for name, value in arguments.items()}
    function = compare.public(sample.operator, backend)
    with torch.autocast(arguments["image"].device.type, torch.bfloat16):
        output = function(image=arguments["image"], guide=wide["guide"])
    assert output.dtype == torch.float32
    assert torch.equal(output, function(**wide))


@compare.one_case(*OPERATORS)
@compare.every_layout()
def test_layouts(backend, sample, layout):
    compare.check_layouts(backend, sample, layout)


@compare.one_case(*OPERATORS)
def test_edge_shapes(backend, sample):
    compare.check_empty_batch(backend, sample, batched=("image", "guide"))
    function = compare.public(sample.operator, backend)
    for size in ((1, 1), (2, 5), (5, 2)):
        arguments = {"image": torch.rand(2, 3, *size), "guide": torch.rand(2, 3, *size)}
        for name, result in compare.differentiate(function, arguments, ("image",)).items():
            assert not result.any(), f"{name}: an image smaller than a window has no energy"


@compare.one_case(*OPERATORS)
def test_only_requested_grads(backend, sample):
    compare.check_only_requested_grads(backend, sample)


@compare.every_case(*OPERATORS)
def test_deterministic(backend, sample):
    compare.check_deterministic(backend, sample)


@pytest.mark.parametrize("sample", samples(OPERATORS[1], "tiny"), ids=lambda sample: sample.name)
def test_matrix(sample):
    """Symmetric, positive semi-definite, zero on constants, and the definition's."""
    arguments = sample.arguments(torch.float64)
    guide, options = arguments["guide"][0], {name: arguments[name] for name in ("eps", "radius") if name in arguments}
    matrix = matting_laplacian_matrix(guide, **options)
    assert matrix.has_sorted_indices
    dense = matrix.toarray()
    np.testing.assert_allclose(dense, dense_matrix(guide.numpy(), **{"eps": 1e-7, "radius": 1, **options}), atol=1e-9)
    np.testing.assert_array_equal(dense, dense.T)
    np.testing.assert_allclose(dense.sum(1), 0, atol=1e-12)
    assert np.linalg.eigvalsh(dense).min() > -1e-12


@compare.every_backend(OPERATORS[1])
@pytest.mark.parametrize("radius", [1, 2, 3])
def test_identity_apply_is_the_matrix(backend, radius):
    image, guide = torch.rand(2, 1, 3, 9, 8, dtype=torch.float64)
    matrix = matting_laplacian_matrix(guide[0], radius=radius)
    expected = torch.from_numpy((matrix @ image[0].flatten(1).numpy().T).T).view_as(image)
    output = matting_laplacian_apply(image, guide, radius=radius, backend=backend)
    compare.judge("M V", output, expected, ulps=compare.REFERENCE_ULPS[torch.float64])


@compare.every_backend(OPERATORS[0])
def test_identity_gradient(backend):
    """2 M V / (H·W), with M V by the reference."""
    image, guide = torch.rand(2, 2, 3, 7, 6, dtype=torch.float64)
    (gradient,) = torch.autograd.grad(
        matting_laplacian_energy(image.requires_grad_(), guide, backend=backend).sum(), image
    )
    expected = 2 * matting_laplacian_apply(image.detach(), guide, backend="reference") / 42
    compare.judge("gradient", gradient, expected, ulps=compare.REFERENCE_ULPS[torch.float64])


@compare.every_backend(OPERATORS[0])
def test_identity_explained_by_the_guide(backend):
    """A linear function of the colours costs eps times its squared slopes in each of the windows, or a little less."""
    guide = torch.rand(1, 3, 7, 6, dtype=torch.float64)
    slopes, eps = torch.tensor([0.2, -0.5, 0.3], dtype=torch.float64), 1e-5
    image = 0.4 + torch.einsum("c,bchw->bhw", slopes, guide)[:, None]
    limit = eps * slopes.square().sum() * (5 * 4) / (7 * 6)
    energy = matting_laplacian_energy(image, guide, eps=eps, backend=backend)
    assert 0.99 * limit < energy < limit
    flat = matting_laplacian_energy(torch.full_like(image, 0.7), guide, eps=eps, backend=backend)
    assert flat.abs() < 1e-28


@compare.every_backend(OPERATORS[0])
def test_grey_guide_in_float32(backend):
    """A guide without colour makes every 3x3 system singular but for eps; float32 must not notice."""
    generator = torch.Generator().manual_seed(0)
    grey = torch.rand(1, 1, 20, 20, generator=generator).expand(1, 3, 20, 20)
    image = torch.rand(1, 3, 20, 20, generator=generator)
    energy = matting_laplacian_energy(image, grey, backend=backend)
    exact = matting_laplacian_energy(image.double(), grey.double(), backend="reference")
    compare.judge("energy", energy, exact)


def test_matrix_of_an_image_without_window():
    matrix = matting_laplacian_matrix(torch.rand(3, 2, 4))
    assert matrix.shape == (8, 8)
    assert not matrix.toarray().any()


IMAGE = torch.rand(2, 1, 5, 6)
GUIDE = torch.rand(2, 3, 5, 6)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"image": IMAGE[0]}, r"image must be of shape \[B, C, H, W\], got shape \[1, 5, 6\]"),
        ({"guide": GUIDE[:, :1]}, r"guide must be of shape \[2, 3, 5, 6\], got shape \[2, 1, 5, 6\]"),
        ({"guide": GUIDE.double()}, r"guide must have the dtype of image, torch.float32, got torch.float64"),
        ({"image": IMAGE.byte()}, r"image must have dtype .*, got torch.uint8"),
        ({"eps": 0.0}, r"eps must be a finite positive number, got 0.0"),
        ({"eps": torch.nan}, r"eps must be a finite positive number, got nan"),
        ({"radius": 4}, r"radius must be an integer from 1 to 3, got 4"),
        ({"radius": 1.0}, r"radius must be an integer from 1 to 3, got 1.0"),
    ],
    ids=lambda case: ",".join(case) if isinstance(case, dict) else "",
)
@compare.one_case(*OPERATORS)
def test_rejects(changed, message, backend, sample):
    with pytest.raises(ValueError, match=f"^{sample.operator}: {message}$"):
        compare.public(sample.operator, backend)(**{"image": IMAGE, "guide": GUIDE, **changed})


def test_rejects_matrix():
    with pytest.raises(ValueError, match=r"^matting_laplacian_matrix: guide must be of shape \[3, H, W\], got .*$"):
        matting_laplacian_matrix(GUIDE)
    with pytest.raises(ValueError, match=r"^matting_laplacian_matrix: eps must be a finite positive number, got -1$"):
        matting_laplacian_matrix(GUIDE[0], eps=-1)

import functools
from pathlib import Path

import compare
import matting_guides
import numpy as np
import pytest
import torch
from pictures import PAINTINGS, needs_paintings
from PIL import Image

from restoration_kernels import matting_laplacian_apply, matting_laplacian_energy, matting_laplacian_matrix
from restoration_kernels._samples import Sample, _matting_laplacian, convert, samples

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


def prepare(backend, operator, *tensors):
    """Image and guide on the backend's device; skips if it cannot run them."""
    image, guide = (tensor.to(compare.device(backend)) for tensor in tensors)
    compare.skip_unless_able(backend, operator, {"image": image, "guide": guide})
    return image, guide


DEFINITIONS = dict(zip(OPERATORS, (energy_definition, apply_definition), strict=True))


@compare.every_case(*OPERATORS)
@compare.every_dtype()
def test_forward(backend, sample, dtype):
    compare.check_values(backend, sample, dtype, DEFINITIONS[sample.operator])


@compare.every_case(*OPERATORS)
@compare.every_dtype()
def test_backward(backend, sample, dtype):
    compare.check_values(backend, sample, dtype, DEFINITIONS[sample.operator], ("image",))


@compare.every_tiny_case(*OPERATORS)
def test_gradcheck(backend, sample):
    compare.check_gradcheck(backend, sample)


@compare.one_case(*OPERATORS, backends=compare.KERNELS)
def test_second_derivatives_refused(backend, sample):
    compare.check_second_derivatives_refused(backend, sample)


@compare.every_tiny_case(*OPERATORS, backends=compare.KERNELS)
def test_opcheck(backend, sample):
    compare.check_opcheck(backend, sample)


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
    # The reference is plain PyTorch, of which inductor makes C++ that takes long to compile.
    compare.check_compile(backend, sample, "aot_eager" if backend == "reference" else "inductor")


@compare.one_case(*OPERATORS)
def test_export(backend, sample):
    compare.check_export(backend, sample, dynamic={"image": (0, 1, 2, 3), "guide": (0, 2, 3)})


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
    for size in ((1, 1), (1, 3), (3, 1), (2, 5), (5, 2)):
        pair = torch.rand(2, 2, 3, *size, device=compare.device(backend))
        arguments = dict(zip(("image", "guide"), pair, strict=True))
        for name, result in compare.differentiate(function, arguments, ("image",)).items():
            assert not result.any(), f"{name}: an image smaller than a window has no energy"


@compare.every_backend(OPERATORS[1])
def test_apply_without_a_window_is_zero(backend):
    """Whatever the image holds."""
    image, guide = prepare(
        backend, OPERATORS[1], torch.tensor([[[[torch.nan, torch.inf, 1.0]]]]), torch.rand(1, 3, 1, 3)
    )
    results = compare.differentiate(compare.public(OPERATORS[1], backend), {"image": image, "guide": guide}, ("image",))
    assert all(torch.equal(result, torch.zeros_like(image)) for result in results.values())


@pytest.mark.parametrize("backend", compare.KERNELS)
@pytest.mark.parametrize("radius", [1, 2, 3])
def test_many_windows(backend, radius):
    """More in a row than a CPU fits at once, and rows for several threads, whatever the radius."""
    sample = Sample(OPERATORS[0], "many_windows", "odd", _matting_laplacian(1, 3, 40, 75, radius=radius))
    compare.check_values(backend, sample, torch.float64, energy_definition, ("image",))


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("width", [18, 21])
def test_large_flat_guide(backend, width):
    """16 windows in a row fill the vectors of every CPU; of 19 the last vector reaches beyond the guide, to zeros."""
    arguments = {
        "image": torch.full((1, 1, 12, width), 0.5, dtype=torch.float64),
        "guide": torch.full((1, 3, 12, width), 1e160, dtype=torch.float64),
    }
    for name, result in compare.differentiate(compare.public(OPERATORS[0], backend), arguments, ("image",)).items():
        assert torch.equal(result, torch.zeros_like(result)), name


@compare.one_case(*OPERATORS)
def test_only_requested_grads(backend, sample):
    compare.check_only_requested_grads(backend, sample)


@compare.one_case(OPERATORS[0], backends=compare.KERNELS)
@pytest.mark.parametrize("enabled", [True, False], ids=["grad", "no_grad"])
def test_energy_without_gradients_computes_none(backend, sample, enabled):
    """It is made in the same pass as the energy, and nearly doubles its time."""
    arguments = compare.arguments_for(backend, sample, torch.float32)
    arguments["image"].requires_grad_()
    with torch.set_grad_enabled(enabled), compare.Recorder() as recorder:
        matting_laplacian_energy(**arguments, backend=backend)
    ((_, (*_, with_gradient, _)),) = recorder.calls
    assert with_gradient is enabled


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
    assert matrix.indices.dtype == matrix.indptr.dtype == np.int32  # of 12 bytes an entry as said
    dense = matrix.toarray()
    np.testing.assert_allclose(dense, dense_matrix(guide.numpy(), **{"eps": 1e-7, "radius": 1, **options}), atol=1e-9)
    np.testing.assert_array_equal(dense, dense.T)
    np.testing.assert_allclose(dense.sum(1), 0, atol=1e-12)
    assert np.linalg.eigvalsh(dense).min() > -1e-12


@compare.every_backend(OPERATORS[1])
@pytest.mark.parametrize("radius", [1, 2, 3])
def test_identity_apply_is_the_matrix(backend, radius):
    image, guide = prepare(backend, OPERATORS[1], *torch.rand(2, 1, 3, 9, 8, dtype=torch.float64))
    matrix = matting_laplacian_matrix(guide[0], radius=radius)
    expected = torch.from_numpy((matrix @ image[0].flatten(1).cpu().numpy().T).T).view_as(image)
    output = matting_laplacian_apply(image, guide, radius=radius, backend=backend)
    compare.judge("M V", output, expected, ulps=compare.REFERENCE_ULPS[torch.float64])


@pytest.mark.parametrize(("size", "radius"), [((60, 70), 1), ((50, 60), 3), ((3, 2100), 1)])
def test_identity_matrix_in_blocks(size, radius):
    """Of 2048 windows, or of one row where that has more. A guide that is learned is taken as it is."""
    image, guide = torch.rand(2, 1, 3, *size, dtype=torch.float64)
    matrix = matting_laplacian_matrix(guide[0].clone().requires_grad_(), radius=radius)
    product = torch.from_numpy((matrix @ image[0].flatten(1).numpy().T).T).view_as(image)
    expected = matting_laplacian_apply(image, guide, radius=radius, backend="reference")
    compare.judge("M V", product, expected, ulps=compare.REFERENCE_ULPS[torch.float64])


@compare.every_backend(OPERATORS[0])
def test_identity_gradient(backend):
    """2 M V / (H·W), with M V by the reference."""
    image, guide = prepare(backend, OPERATORS[0], *torch.rand(2, 2, 3, 7, 6, dtype=torch.float64))
    (gradient,) = torch.autograd.grad(
        matting_laplacian_energy(image.requires_grad_(), guide, backend=backend).sum(), image
    )
    expected = 2 * matting_laplacian_apply(image.detach(), guide, backend="reference") / 42
    compare.judge("gradient", gradient, expected, ulps=compare.REFERENCE_ULPS[torch.float64])


@compare.every_backend(OPERATORS[1])
@pytest.mark.parametrize("radius", [1, 2, 3])
def test_identity_symmetric_and_positive(backend, radius):
    """<x, M y> = <M x, y>, <x, M x> >= 0 and M 1 = 0, however grey the guide."""
    images, guides = torch.rand(2, 2, 3, 9, 8, dtype=torch.float64)
    images, guide = prepare(backend, OPERATORS[1], images, 0.5 + 1e-4 * guides)
    x, y = images[:1], images[1:]
    guide = guide[:1]
    apply = functools.partial(matting_laplacian_apply, guide=guide, radius=radius, backend=backend)
    products = x * apply(y)
    assert (products.sum() - (y * apply(x)).sum()).abs() < 1e-12 * products.abs().sum()
    assert (x * apply(x)).sum() > 0
    assert apply(torch.full_like(x, 0.7)).abs().max() < 1e-12


@compare.every_backend(OPERATORS[0])
@pytest.mark.parametrize(
    "change", [lambda x: x.mT, lambda x: x.flip(2), lambda x: x.flip(3)], ids=["mT", "rows", "columns"]
)
def test_identity_mirrored(backend, change):
    """Mirroring image and guide mirrors the gradient and leaves the energy alone."""
    image, guide = prepare(backend, OPERATORS[0], *torch.rand(2, 1, 3, 40, 21, dtype=torch.float64))
    energy = compare.public(OPERATORS[0], backend)
    plain, mirrored = (
        compare.differentiate(energy, {"image": pair[0], "guide": pair[1]}, ("image",))
        for pair in ((image, guide), (change(image), change(guide)))
    )
    ulps = compare.REFERENCE_ULPS[torch.float64]
    compare.judge("energy", mirrored["output"], plain["output"], ulps=ulps)
    compare.judge("gradient", mirrored["image"], change(plain["image"]), ulps=ulps)


@compare.every_backend(OPERATORS[0])
def test_identity_explained_by_the_guide(backend):
    """A linear function of the colours costs eps times its squared slopes in each of the windows, or a little less."""
    guide = torch.rand(1, 3, 7, 6, dtype=torch.float64)
    slopes, eps = torch.tensor([0.2, -0.5, 0.3], dtype=torch.float64), 1e-5
    image = 0.4 + torch.einsum("c,bchw->bhw", slopes, guide)[:, None]
    image, guide = prepare(backend, OPERATORS[0], image, guide)
    limit = eps * slopes.square().sum() * (5 * 4) / (7 * 6)
    energy = matting_laplacian_energy(image, guide, eps=eps, backend=backend)
    assert 0.99 * limit < energy < limit
    flat = matting_laplacian_energy(torch.full_like(image, 0.7), guide, eps=eps, backend=backend)
    assert flat.abs() < 1e-28


@compare.every_backend(OPERATORS[0])
@pytest.mark.parametrize("eps", [1e-7, 1e-5])
@pytest.mark.parametrize("picture", matting_guides.PICTURES)
def test_accuracy_in_float32(backend, picture, eps):
    """Greyness of the guide must not show: bounds far below what a covariance in float32 allows."""
    check_accuracy(backend, matting_guides.draw(picture), eps)


@matting_guides.both_speeds_of_float64
@pytest.mark.parametrize("picture", matting_guides.PICTURES)
def test_accuracy_in_each_arithmetic_of_the_gpu(picture, float64):
    """Whichever this one would choose."""
    check_accuracy("cuda", matting_guides.draw(picture), eps=1e-7)


@needs_paintings
@compare.every_backend(OPERATORS[0])
@pytest.mark.parametrize("style", ["ink_wash", "blue_green", "light_crimson"])
def test_accuracy_on_photographs(backend, style):
    file = min(Path(PAINTINGS, style).glob("*.jpg"))
    height, width = matting_guides.SIZE
    with Image.open(file) as photograph:
        pixels = np.asarray(photograph.convert("RGB").crop((200, 200, 200 + width, 200 + height)))
    check_accuracy(backend, torch.tensor(pixels / 255, dtype=torch.float32).permute(2, 0, 1)[None], eps=1e-7)


def check_accuracy(backend, guide, eps):
    """The energy and gradient of a stylised and an affine image, float32, against the float64 reference."""
    for name in ("stylised", "affine"):
        pair = prepare(backend, OPERATORS[0], matting_guides.recolour(name, guide), guide)
        arguments = {"image": pair[0], "guide": pair[1], "eps": eps}
        ours = compare.differentiate(compare.public(OPERATORS[0], backend), arguments, ("image",))
        exact = compare.differentiate(
            compare.public(OPERATORS[0], "reference"), convert(arguments, torch.float64, "cpu"), ("image",)
        )
        errors = {
            key: ((ours[key].cpu().double() - exact[key]).abs().max() / exact[key].abs().max()).item() for key in exact
        }
        assert errors["output"] <= 2e-7 and errors["image"] <= 5e-7, (name, errors)


@compare.one_case(*OPERATORS, backends=compare.KERNELS)
def test_gradient_to_the_guide_is_refused(backend, sample):
    """By name; without a wish the reference is taken, which has it."""
    arguments = compare.arguments_for(backend, sample, torch.float32)
    arguments["guide"].requires_grad_()
    message = f"reference can.*got '{backend}' from the argument: its kernel gives no gradient to guide"
    with pytest.raises(RuntimeError, match=message):
        compare.public(sample.operator, backend)(**arguments)
    output = compare.public(sample.operator, None)(**arguments)
    assert torch.autograd.grad(output.sum(), arguments["guide"])[0].any()
    with torch.no_grad():
        compare.public(sample.operator, backend)(**arguments)


@pytest.mark.parametrize("operator", [matting_laplacian_energy, matting_laplacian_apply])
def test_thread_count_changes_nothing(operator):
    image, guide = torch.rand(2, 2, 3, 70, 40)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = operator(image, guide, backend="cpu")
        torch.set_num_threads(3)
        assert torch.equal(operator(image, guide, backend="cpu"), alone)
    finally:
        torch.set_num_threads(threads)


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
        ({"eps": 5e-309}, r"eps must be at least 1e-300, got 5e-309"),
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

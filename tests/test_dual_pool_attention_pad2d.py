"""What compare.py asks of every operator, and what is special to this: padding, layout, a dtype of its own."""

import compare
import pytest
import test_dual_pool_attention
import torch

from restoration_kernels import dual_pool_attention, dual_pool_attention_pad2d
from restoration_kernels._samples import Sample, samples

OPERATOR = "dual_pool_attention_pad2d"


def definition(x, weight, padding=1, pool_size=50):
    """The attention's definition, then every padded pixel one by one."""
    y = test_dual_pool_attention.definition(x, weight, pool_size)

    def mirrored(size):
        places = range(-padding, size + padding)
        return [abs(place) if place < size else 2 * (size - 1) - place for place in places]

    rows = torch.stack([y[:, :, row] for row in mirrored(x.shape[2])], 2)
    return torch.stack([rows[..., column] for column in mirrored(x.shape[3])], 3)


@compare.every_case(OPERATOR)
@compare.every_dtype()
def test_forward(backend, sample, dtype):
    compare.check_values(backend, sample, dtype, definition)


@compare.every_case(OPERATOR)
@compare.every_dtype()
def test_backward(backend, sample, dtype):
    compare.check_values(backend, sample, dtype, definition, ("x", "weight"))


@compare.every_tiny_case(OPERATOR)
def test_gradcheck(backend, sample):
    compare.check_gradcheck(backend, sample)


@compare.one_case(OPERATOR, backends=compare.KERNELS)
def test_second_derivatives_refused(backend, sample):
    compare.check_second_derivatives_refused(backend, sample)


@compare.every_tiny_case(OPERATOR, backends=compare.KERNELS)
def test_opcheck(backend, sample):
    compare.check_opcheck(backend, sample)


@compare.one_case(OPERATOR)
def test_compile(backend, sample):
    # The reference is plain PyTorch, of which inductor makes C++ that takes ten seconds to compile.
    compare.check_compile(backend, sample, "aot_eager" if backend == "reference" else "inductor")


@compare.one_case(OPERATOR)
def test_export(backend, sample):
    compare.check_export(backend, sample, dynamic={"x": (0, 2, 3)})


@compare.one_case(OPERATOR)
@compare.every_layout()
def test_layouts(backend, sample, layout):
    compare.check_layouts(backend, sample, layout)


@compare.one_case(OPERATOR)
def test_only_requested_grads(backend, sample):
    compare.check_only_requested_grads(backend, sample)


@compare.every_case(OPERATOR)
def test_deterministic(backend, sample):
    compare.check_deterministic(backend, sample)


@compare.one_case(OPERATOR)
def test_edge_shapes(backend, sample):
    compare.check_empty_batch(backend, sample, batched=("x",))
    # Rows longer than what is moved at once, columns of one pixel, sums long enough to be emptied on the way, and rows
    # whose last tile ends where their mirror begins.
    shapes = [(1, 1, 1, 300), (1, 17, 2, 3), (2, 33, 5, 131), (1, 3, 20, 260), (1, 1, 20, 5)]
    for shape, padding in zip(shapes, (0, 1, 4, 2, 4), strict=True):
        x = torch.randn(shape, dtype=torch.float64, device=compare.device(backend)).requires_grad_()
        weight = torch.randn(3, dtype=torch.float64, device=x.device).requires_grad_()
        results = []
        for function in (dual_pool_attention_pad2d, definition):
            options = {"backend": backend} if function is dual_pool_attention_pad2d else {}
            y = function(x, weight, padding, **options)
            cotangent = torch.linspace(-1, 1, y.numel(), dtype=y.dtype, device=y.device).reshape(y.shape)
            results.append((y, *torch.autograd.grad(y, (x, weight), cotangent)))
        for name, ours, exact in zip(("y", "grad_x", "grad_weight"), *results, strict=True):
            compare.judge(f"{name} of {shape}", ours, exact, ulps=compare.REFERENCE_ULPS[torch.float64])


@compare.one_case(OPERATOR)
def test_half_precision_from_float32(backend, sample):
    """The convolution's dtype: y is rounded once, and the gradient to x keeps float32."""
    arguments = compare.arguments_for(backend, sample, torch.float32)
    with torch.autocast(arguments["x"].device.type, torch.bfloat16):
        found = compare.differentiate(
            lambda **rest: dual_pool_attention_pad2d(**rest, dtype=torch.bfloat16, backend=backend),
            arguments,
            ("x", "weight"),
        )
    exact = compare.differentiate(definition, compare.convert(arguments, torch.float64, "cpu"), ("x", "weight"))
    assert [found[name].dtype for name in ("output", "x", "weight")] == [torch.bfloat16, torch.float32, torch.float32]
    compare.judge("output", found["output"], exact["output"])
    for name in ("x", "weight"):
        compare.judge(name, found[name], exact[name], ulps=32)


@compare.every_case(OPERATOR)
def test_identity_rounded_to_bfloat16(backend, sample):
    """To nearest, and nothing else differs: the judge would let digits be cut off."""
    arguments = compare.arguments_for(backend, sample, torch.float32)
    y = dual_pool_attention_pad2d(**arguments, dtype=torch.bfloat16, backend=backend)
    assert torch.equal(y, dual_pool_attention_pad2d(**arguments, backend=backend).bfloat16())


@compare.every_backend(OPERATOR)
def test_nan_stays_nan_in_bfloat16(backend):
    """Also the largest, all of whose bits are set: rounded as a number it would become zero."""
    x = torch.full((1, 2, 3, 37), 0x7FFFFFFF, dtype=torch.int32, device=compare.device(backend)).view(torch.float32)
    weight = x.new_ones(1)
    compare.skip_unless_able(backend, OPERATOR, {"x": x, "weight": weight, "dtype": torch.bfloat16})
    assert dual_pool_attention_pad2d(x, weight, dtype=torch.bfloat16, backend=backend).isnan().all()


@compare.one_case(OPERATOR)
def test_autocast_gives_the_weight_the_dtype_of_x(backend, sample):
    arguments = compare.arguments_for(backend, sample, torch.bfloat16)
    with torch.autocast(arguments["x"].device.type, torch.bfloat16):
        y = dual_pool_attention_pad2d(**{**arguments, "weight": arguments["weight"].float()}, backend=backend)
    assert torch.equal(y, dual_pool_attention_pad2d(**arguments, backend=backend))


@compare.one_case(OPERATOR)
def test_channels_last(backend, sample):
    y = dual_pool_attention_pad2d(**compare.arguments_for(backend, sample, torch.float32), backend=backend)
    assert y.is_contiguous(memory_format=torch.channels_last)


@compare.one_case(OPERATOR)
def test_identity_inside_is_the_attention(backend, sample):
    arguments = compare.arguments_for(backend, sample, torch.float32)
    inside = dual_pool_attention_pad2d(**arguments, padding=2, backend=backend)[..., 2:-2, 2:-2]
    assert torch.equal(inside, dual_pool_attention(**arguments, backend=backend))


def with_addend(sample):
    """The sample, its gradient to x starting from a random map."""

    def make(generator):
        arguments = sample.make(generator)
        return {**arguments, "grad_addend": torch.randn(arguments["x"].shape, generator=generator)}

    return Sample(OPERATOR, f"{sample.name}_addend", sample.size, make)


@compare.every_case(OPERATOR)
@compare.every_dtype()
def test_grad_addend(backend, sample, dtype):
    """It is added to the gradient of x, and changes nothing else."""
    arguments = compare.arguments_for(backend, with_addend(sample), dtype)
    grad_addend = arguments.pop("grad_addend")
    function = compare.public(OPERATOR, backend)
    expected = compare.differentiate(function, arguments, ("x", "weight"))
    found = compare.differentiate(function, {**arguments, "grad_addend": grad_addend}, ("x", "weight"))
    compare.judge("x", found.pop("x"), expected.pop("x").double() + grad_addend.double())
    for name, value in found.items():
        assert torch.equal(value, expected[name]), name


@compare.one_case(OPERATOR)
def test_grad_addend_in_other_layouts_and_graphs(backend, sample):
    sample = with_addend(sample)
    compare.check_layouts(backend, sample, "channels_last")
    compare.check_compile(backend, sample)
    if backend != "reference":
        compare.check_opcheck(backend, sample)


@compare.every_lesser_instruction_set()
def test_lesser_instruction_sets(isa, dtype, tmp_path):
    compare.check_instruction_set(with_addend(samples(OPERATOR, "odd")[0]), isa, dtype, tmp_path)


X = torch.randn(1, 4, 5, 6)
WEIGHT = torch.randn(3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"padding": -1}, "padding must be an integer of at least 0, got -1"),
        ({"padding": 1.0}, "padding must be an integer of at least 0, got 1.0"),
        ({"padding": 5}, r"padding must be less than both sides of x, \[5, 6\], got 5"),
        ({"dtype": torch.int64}, r"dtype must be None or one of torch.float16, .*, got torch.int64"),
        ({"grad_addend": X[:, 1:]}, r"grad_addend must be of shape \[1, 4, 5, 6\], got shape \[1, 3, 5, 6\]"),
        ({"grad_addend": X.double()}, "grad_addend must have the dtype of x, torch.float32, got torch.float64"),
        (
            {"grad_addend": X.clone().requires_grad_()},
            "grad_addend must be without gradients, got one that requires them",
        ),
        ({"pool_size": 0}, "pool_size must be an integer from 1 to 1048576, got 0"),
        ({"weight": WEIGHT[:2]}, "weight must have an odd number of entries, got 2"),
    ],
)
def test_rejects(options, message):
    with pytest.raises(ValueError, match=f"^{OPERATOR}: {message}$"):
        dual_pool_attention_pad2d(**{"x": X, "weight": WEIGHT, **options})


def test_cpu_kernel_refuses_other_dtypes():
    with pytest.raises(
        RuntimeError, match=r": its kernel returns the dtype of x, or half precision from float32, not "
    ):
        dual_pool_attention_pad2d(X, WEIGHT, dtype=torch.float64, backend="cpu")
    with pytest.raises(RuntimeError, match=r": its kernel takes no float16$"):
        dual_pool_attention_pad2d(X.half(), WEIGHT.half(), backend="cpu")

from unittest import mock

import compare
import pytest
import torch
import torch.nn.functional as F

from restoration_kernels import pac_conv2d, pac_conv2d_
from restoration_kernels._samples import Sample, _pac_conv2d, samples

OPERATOR = "pac_conv2d"
GRADIENTS = ("x", "guide", "weight", "bias", "residual")


def sample_named(name):
    return next(sample for sample in samples(OPERATOR) if sample.name == name)


def definition(
    x,
    guide,
    weight,
    bias=None,
    stride=(1, 1),
    padding=(0, 0),
    dilation=(1, 1),
    normalize=False,
    residual=None,
    alpha=1.0,
):
    """Place by place and tap by tap."""
    step, margin, gap = (pair if isinstance(pair, tuple) else (pair, pair) for pair in (stride, padding, dilation))
    K = weight.shape[-1]
    shared = weight.shape[:2] == (1, 1)
    sizes = [(x.shape[2 + a] + 2 * margin[a] - gap[a] * (K - 1) - 1) // step[a] + 1 for a in (0, 1)]

    def value(image, row, column):
        inside = 0 <= row < image.shape[2] and 0 <= column < image.shape[3]
        return image[:, :, row, column] if inside else None

    def place(row, column):
        top, left = row * step[0] - margin[0], column * step[1] - margin[1]
        centre = value(guide, top + K // 2 * gap[0], left + K // 2 * gap[1])
        centre = torch.zeros_like(guide[:, :, 0, 0]) if centre is None else centre
        result, total = x.new_zeros(x.shape[0], x.shape[1] if shared else weight.shape[0]), 0
        for i in range(K):
            for j in range(K):
                q = top + i * gap[0], left + j * gap[1]
                if value(x, *q) is None:
                    continue
                k = torch.exp(-((centre - value(guide, *q)) ** 2).sum(1, keepdim=True) / 2)
                taps = value(x, *q) * weight[0, 0, i, j] if shared else value(x, *q) @ weight[:, :, i, j].T
                result, total = result + k * taps, total + k
        if normalize and torch.is_tensor(total):
            result = result / total
        return result if bias is None else result + bias

    rows = [torch.stack([place(row, column) for column in range(sizes[1])], -1) for row in range(sizes[0])]
    output = alpha * torch.stack(rows, -2)
    return output if residual is None else residual + output


@compare.every_case(OPERATOR)
@compare.every_dtype()
def test_forward(backend, sample, dtype):
    compare.check_values(backend, sample, dtype, definition)


@compare.every_case(OPERATOR)
@compare.every_dtype()
def test_backward(backend, sample, dtype):
    compare.check_values(backend, sample, dtype, definition, GRADIENTS)


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
    compare.check_compile(backend, sample)


@compare.one_case(OPERATOR)
def test_compile_varying_numbers(backend, sample):
    """A number that changes between calls becomes a variable of the graph."""
    torch.compiler.reset()
    arguments = compare.arguments_for(backend, sample, torch.float32)
    x = arguments["x"].requires_grad_()
    compiled = torch.compile(pac_conv2d, fullgraph=True, backend="aot_eager")
    for alpha, quantum in ((-0.5, 0.25), (2.0, 0.125), (3.0, 0.5)):
        arguments |= {"alpha": alpha, "quantum": quantum, "backend": backend}
        ours, eager = compiled(**arguments), pac_conv2d(**arguments)
        assert torch.equal(ours, eager)
        assert torch.equal(*(torch.autograd.grad(output.sum(), x)[0] for output in (ours, eager)))


@pytest.mark.parametrize("shared", [False, True], ids=["filters", "shared"])
@compare.every_backend(OPERATOR)
def test_edge_shapes_of_strides(backend, shared):
    """A stride far beyond the image costs no more than one as long as it is."""
    generator = compare.seeded(0)
    shapes = {"x": (1, 2, 5, 4), "guide": (1, 2, 5, 4), "weight": (1, 1, 3, 3) if shared else (3, 2, 3, 3)}
    arguments = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    arguments = compare.convert(arguments, torch.float32, compare.device(backend)) | {"stride": 60_000, "padding": 1}
    compare.skip_unless_able(backend, OPERATOR, arguments)
    names = ("x", "guide", "weight")
    exact = compare.differentiate(
        compare.public(OPERATOR, "reference"), compare.convert(arguments, torch.float64, "cpu"), names
    )
    compare.judge_all(compare.differentiate(compare.public(OPERATOR, backend), arguments, names), exact, ulps=8)


@compare.one_case(OPERATOR)
def test_autocast(backend, sample):
    """Half precision inside, as for conv2d, added to a residual of float32."""
    arguments = compare.arguments_for(backend, sample, torch.float32)
    half = {name: arguments[name].bfloat16() for name in ("x", "guide", "weight", "bias")}
    expected = pac_conv2d(**{**arguments, **half}, backend=backend)
    with torch.autocast(expected.device.type, torch.bfloat16):
        output = pac_conv2d(**arguments, backend=backend)
    assert output.dtype == torch.float32
    assert torch.equal(output, expected)


@compare.one_case(OPERATOR, backends=compare.KERNELS)
def test_half_precision_beside_a_residual_of_float32(backend, sample):
    """What autocast makes of a float32 stream: each gradient has the dtype of its own tensor, and its own rounding."""
    arguments = compare.arguments_for(backend, sample, torch.bfloat16)
    arguments["residual"] = arguments["residual"].float()
    reference = compare.public(OPERATOR, "reference")
    ours = compare.differentiate(compare.public(OPERATOR, backend), arguments, GRADIENTS)
    assert {name: ours[name].dtype for name in GRADIENTS} == {name: arguments[name].dtype for name in GRADIENTS}
    exact = compare.differentiate(reference, compare.convert(arguments, torch.float64, "cpu"), GRADIENTS)
    compare.judge_all(ours, exact, compare.differentiate(reference, arguments, GRADIENTS))


@compare.one_case(OPERATOR)
@compare.every_layout()
def test_layouts(backend, sample, layout):
    compare.check_layouts(backend, sample, layout)


@compare.every_case(OPERATOR)
def test_edge_shapes(backend, sample):
    compare.check_empty_batch(backend, sample, batched=("x", "guide", "residual"))


@compare.one_case(OPERATOR)
def test_only_requested_grads(backend, sample):
    compare.check_only_requested_grads(backend, sample)


@compare.every_backend(OPERATOR)
def test_backward_to_a_shared_filter_alone(backend):
    sample = sample_named("shared")
    arguments = compare.arguments_for(backend, sample, torch.float32)
    function = compare.public(OPERATOR, backend)
    alone, all_of_them = (compare.differentiate(function, arguments, names) for names in (("weight",), GRADIENTS))
    compare.judge("weight", alone["weight"], all_of_them["weight"])


@compare.every_case(OPERATOR)
def test_deterministic(backend, sample):
    compare.check_deterministic(backend, sample)


@compare.every_backend(OPERATOR)
@pytest.mark.parametrize(
    "geometry", [{}, {"stride": 2, "padding": 1}, {"padding": (4, 1), "dilation": (1, 2)}], ids=str
)
def test_identity_constant_guide(backend, geometry):
    """Where the guide does not change there is nothing to adapt to; nor at the border, where x is zero."""
    x = torch.randn(2, 3, 8, 9, dtype=torch.float64, device=compare.device(backend))
    weight, bias, guide = torch.randn(4, 3, 3, 3).to(x), torch.randn(4).to(x), torch.zeros(2, 5, 8, 9).to(x)
    compare.skip_unless_able(backend, OPERATOR, {"x": x, "guide": guide, "weight": weight})
    output = pac_conv2d(x, guide, weight, bias, **geometry, backend=backend)
    compare.judge(str(geometry), output, F.conv2d(x, weight, bias, **geometry), ulps=compare.REFERENCE_ULPS[x.dtype])


@compare.every_backend(OPERATOR)
def test_identity_grad_x(backend):
    """k_t(p) = k_-t(p+t): the gradient to x is the same operator on grad_y with the weights transposed and flipped."""
    x = torch.randn(2, 3, 9, 14, dtype=torch.float64, device=compare.device(backend), requires_grad=True)
    guide, grad_y = torch.randn(2, 2, 9, 14).to(x), torch.randn(2, 5, 9, 14).to(x)
    weight = torch.randn(5, 3, 3, 3).to(x)
    compare.skip_unless_able(backend, OPERATOR, {"x": x, "guide": guide, "weight": weight})
    geometry = {"padding": 2, "dilation": 2, "backend": backend}
    (grad_x,) = torch.autograd.grad(pac_conv2d(x, guide, weight, **geometry), x, grad_y)
    expected = pac_conv2d(grad_y, guide, weight.transpose(0, 1).flip(2, 3), **geometry)
    compare.judge("grad_x", grad_x, expected, ulps=compare.REFERENCE_ULPS[x.dtype])


@compare.every_backend(OPERATOR)
def test_identity_distant_guide(backend):
    """Between colours far apart every kernel but the centre's is 0, to the bit: what is left is a 1x1 convolution."""
    rows, columns = torch.meshgrid(torch.arange(9), torch.arange(20), indexing="ij")
    # Distances of 1e4 and more between any two neighbours.
    guide = (1e4 * (rows % 2 + 2 * (columns % 2)).double())[None, None].to(compare.device(backend))
    x, weight, bias = torch.randn(1, 3, 9, 20).to(guide), torch.randn(5, 3, 3, 3).to(guide), torch.randn(5).to(guide)
    compare.skip_unless_able(backend, OPERATOR, {"x": x, "guide": guide, "weight": weight})
    output = pac_conv2d(x, guide, weight, bias, padding=1, backend=backend)
    alone = weight.clone()
    alone.view(5, 3, 9)[:, :, [0, 1, 2, 3, 5, 6, 7, 8]] = 0
    assert torch.equal(output, pac_conv2d(x, torch.zeros_like(guide), alone, bias, padding=1, backend=backend))
    compare.judge("1x1", output, F.conv2d(x, alone[:, :, 1:2, 1:2], bias), ulps=compare.REFERENCE_ULPS[x.dtype])


@compare.every_backend(OPERATOR)
@pytest.mark.parametrize("magnitude", [1e-40, 1e-20, 1e4, 1e30])
def test_guide_of_any_magnitude(backend, magnitude):
    """Denormal, tiny, huge and overflowing differences give kernels of 1 or 0 and finite gradients."""
    same = sample_named("same")
    arguments = compare.arguments_for(backend, same, torch.float32)
    arguments["guide"] *= magnitude
    results = compare.differentiate(compare.public(OPERATOR, backend), arguments, GRADIENTS)
    kernel = (1, 1) if magnitude < 1 else (0, 1)
    reach = torch.full((3, 3), float(kernel[0]))
    reach[1, 1] = 1
    weight = arguments["weight"] * reach.to(arguments["weight"])
    expected = F.conv2d(arguments["x"], weight, arguments["bias"], padding=1)
    torch.testing.assert_close(results["output"], expected)
    assert results["x"].isfinite().all()
    assert results["guide"].isfinite().all()


@compare.every_backend(OPERATOR)
def test_backward_of_many_channels_of_two_images(backend):
    """What blocks of channels add to the gradient of the guide stays with its image."""
    sample = Sample(OPERATOR, "two_images", "odd", _pac_conv2d(2, 17, 2, 1, 2, 3, 3, padding=1))
    compare.check_values(backend, sample, torch.float32, definition, GRADIENTS)


@compare.every_backend(OPERATOR)
def test_backward_where_all_kernels_are_zero(backend):
    """Outside the image the centre is 0: far from all colours inside, which leaves nothing to divide by."""
    sample = sample_named("no_tap_inside")
    arguments = compare.arguments_for(backend, sample, torch.float32)
    arguments["guide"] = 1e4 + arguments["guide"]
    results = compare.differentiate(compare.public(OPERATOR, backend), arguments, GRADIENTS)
    assert all(result.isfinite().all() for result in results.values())


@compare.every_backend(OPERATOR)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_identity_inverse(backend, dtype):
    """What a block adds to a float32 stream of multiples of the quantum, it takes away again to the bit."""
    arguments = compare.arguments_for(backend, samples(OPERATOR, "odd")[0], dtype)
    quantum = 2.0**-16
    stream = torch.randn(2, 24, 37, 61, device=arguments["x"].device).div(quantum).round().mul(quantum)
    output = pac_conv2d(**arguments, residual=stream, quantum=quantum, backend=backend)
    assert output.dtype == torch.float32
    assert not torch.equal(output, stream)
    assert torch.equal(output / quantum, (output / quantum).round())
    assert torch.equal(pac_conv2d_(output, **arguments, alpha=-1.0, quantum=quantum, backend=backend), stream)


@compare.every_backend(OPERATOR)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_quantum_rounds_to_nearest_before_alpha(backend, dtype):
    """Ties to even, on either side of zero."""
    quantum, alpha = 2.0**-4, 0.5
    x = quantum * torch.tensor([[[[0.5, 1.5, 2.5, -0.5, -1.5, 0.7, -0.7, 0.2]]]]).to(compare.device(backend), dtype)
    weight = x.new_ones(1, 1, 1, 1)
    compare.skip_unless_able(backend, OPERATOR, {"x": x, "guide": x, "weight": weight})
    output = pac_conv2d(x, torch.zeros_like(x), weight, alpha=alpha, quantum=quantum, backend=backend)
    assert (output / (alpha * quantum)).flatten().tolist() == [0, 2, 2, 0, -2, 1, -1, 0]


@compare.one_case(OPERATOR)
def test_quantum_passes_the_gradient(backend, sample):
    arguments = compare.arguments_for(backend, sample, torch.float64)
    smooth, rounded = (
        compare.differentiate(compare.public(OPERATOR, backend), {**arguments, "quantum": quantum}, GRADIENTS)
        for quantum in (None, 0.5)
    )
    assert not torch.equal(smooth.pop("output"), rounded.pop("output"))
    for name in smooth:
        assert torch.equal(smooth[name], rounded[name]), name


@pytest.mark.parametrize("backend", compare.KERNELS)
def test_bfloat16_is_rounded_to_nearest(backend):
    """Once, of a sum in float32. The judge would let digits be cut off."""
    x = torch.rand(1, 1, 9, 70, device=compare.device(backend)).bfloat16()
    weight, bias = x.new_ones(1, 1, 1, 1), x.new_full((1,), 0.7)
    compare.skip_unless_able(backend, OPERATOR, {"x": x, "guide": x, "weight": weight})
    output = pac_conv2d(x, x, weight, bias, backend=backend)
    assert torch.equal(output, (x.float() + bias.float()).bfloat16())


@compare.every_backend(OPERATOR)
def test_quantum_of_half_precision(backend):
    """Numbers times 2^16 overflow float16, numbers do not."""
    x = torch.full((1, 1, 1, 1), 3.0, dtype=torch.float16, device=compare.device(backend))
    compare.skip_unless_able(backend, OPERATOR, {"x": x, "guide": x, "weight": x})
    assert pac_conv2d(x, x, torch.ones_like(x), quantum=2.0**-16, backend=backend).item() == 3.0


@compare.every_backend(OPERATOR)
def test_the_least_quantum_leaves_finite_numbers_as_they_are(backend):
    """Numbers divided by it overflow float32."""
    x = torch.tensor([8.0, -3e38, 2.0**-120, float("inf")], device=compare.device(backend)).view(1, 1, 2, 2)
    weight = x.new_ones(1, 1, 1, 1)
    compare.skip_unless_able(backend, OPERATOR, {"x": x, "guide": x, "weight": weight})
    guide = torch.zeros_like(x)
    assert torch.equal(pac_conv2d(x, guide, weight, quantum=2.0**-126, backend=backend), x)


@compare.every_backend(OPERATOR)
@pytest.mark.parametrize("spoiled", [torch.inf, torch.nan])
def test_spoiled_guide_stays_local(backend, spoiled):
    """One pixel of Inf or NaN in the guide is felt in the nine pixels around it, forward and backward."""
    same = sample_named("same")
    arguments = compare.arguments_for(backend, same, torch.float32)
    function = compare.public(OPERATOR, backend)
    clean = compare.differentiate(function, arguments, ("x", "guide"))
    arguments["guide"][:, 1, 2, 2] = spoiled
    results = compare.differentiate(function, arguments, ("x", "guide"))
    elsewhere = torch.ones(5, 6, dtype=torch.bool)
    elsewhere[1:4, 1:4] = False
    for name, result in results.items():
        torch.testing.assert_close(result[:, :, elsewhere], clean[name][:, :, elsewhere])
    if spoiled == torch.inf:
        # There the taps towards other pixels vanish, and the centre is 1 by definition.
        centre_alone = F.conv2d(arguments["x"], arguments["weight"][:, :, 1:2, 1:2], arguments["bias"])
        torch.testing.assert_close(results["output"][:, :, 2, 2], centre_alone[:, :, 2, 2])
        assert results["output"].isfinite().all()
        assert results["x"].isfinite().all()


@compare.every_backend(OPERATOR)
def test_spoiled_guide_reaches_no_pixel_between_centres(backend):
    """With a stride, neighbours of which neither is a centre are joined by no kernel: Inf in one stays there."""
    same = sample_named("same")
    arguments = {**compare.arguments_for(backend, same, torch.float32), "stride": 2}
    function = compare.public(OPERATOR, backend)
    clean = compare.differentiate(function, arguments, ("guide",))
    arguments["guide"][:, 1, 1, 1] = torch.inf
    results = compare.differentiate(function, arguments, ("guide",))
    rows, columns = [0, 1, 1, 2], [1, 0, 2, 1]
    torch.testing.assert_close(results["guide"][:, :, rows, columns], clean["guide"][:, :, rows, columns])


@compare.every_backend(OPERATOR)
@pytest.mark.parametrize("column", [0, 63])
def test_spoiled_guide_stays_at_its_edge(backend, column):
    """NaN at an end of a row is not felt at the other end of its neighbours, where rows follow without a gap."""
    sample = sample_named("same")
    arguments = compare.arguments_for(backend, sample, torch.float32)
    for name in ("x", "guide"):
        arguments[name] = torch.randn(2, arguments[name].shape[1], 5, 64).to(arguments[name])
    function = compare.public(OPERATOR, backend)
    clean = compare.differentiate(function, arguments, ("x", "guide"))
    arguments["guide"][:, 1, 2, column] = torch.nan
    results = compare.differentiate(function, arguments, ("x", "guide"))
    elsewhere = torch.ones(5, 64, dtype=torch.bool)
    elsewhere[1:4, max(column - 1, 0) : column + 2] = False
    for name, result in results.items():
        torch.testing.assert_close(result[:, :, elsewhere], clean[name][:, :, elsewhere])


@compare.every_backend(OPERATOR)
def test_no_tap_inside_gives_the_bias(backend):
    x = torch.randn(1, 2, 1, 1, device=compare.device(backend))
    weight, bias = torch.randn(3, 2, 3, 3).to(x), torch.tensor([0.5, -1.0, 2.0]).to(x)
    compare.skip_unless_able(backend, OPERATOR, {"x": x, "guide": x, "weight": weight})
    output = pac_conv2d(x, x, weight, bias, padding=3, normalize=True, backend=backend)
    assert torch.equal(output[0, :, 0, 0], bias)
    assert not torch.equal(output[0, :, 2, 2], bias)


X, GUIDE, WEIGHT = torch.randn(2, 3, 6, 7), torch.randn(2, 4, 6, 7), torch.randn(5, 3, 3, 3)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"x": X[0]}, r"x must be of shape \[B, C, H, W\], got shape \[3, 6, 7\]"),
        ({"x": X.int()}, r"x must have dtype .*, got torch.int32"),
        ({"guide": GUIDE[:1]}, r"guide must be of shape \[2, G, 6, 7\], got shape \[1, 4, 6, 7\]"),
        ({"guide": GUIDE[..., 1:]}, r"guide must be of shape \[2, G, 6, 7\], got shape \[2, 4, 6, 6\]"),
        ({"guide": GUIDE.half()}, r"guide must have the dtype of x, torch.float32, got torch.float16"),
        ({"guide": GUIDE.to("meta")}, r"guide must be on the device of x, cpu, got meta"),
        ({"weight": WEIGHT.double()}, r"weight must have the dtype of x, torch.float32, got torch.float64"),
        ({"weight": WEIGHT[:, :2]}, r"weight must be of shape \[O, 3, K, K\] or .*, got shape \[5, 2, 3, 3\]"),
        ({"weight": WEIGHT[..., :2, :2]}, r"weight must have a square kernel of odd size, got 2 x 2"),
        ({"weight": WEIGHT[..., :1]}, r"weight must have a square kernel of odd size, got 3 x 1"),
        ({"bias": torch.randn(4)}, r"bias must be of shape \[5\], got shape \[4\]"),
        ({"bias": torch.randn(5).double()}, r"bias must have the dtype of x, torch.float32, got torch.float64"),
        ({"bias": torch.randn(5).to("meta")}, r"bias must be on the device of x, cpu, got meta"),
        ({"stride": 0}, r"stride must be an integer of at least 1 or a pair of them, got 0"),
        ({"stride": (1, 2**30 + 1)}, r"stride must be at most 2\^30, got \(1, 1073741825\)"),
        ({"stride": (2**30 + 1, 1)}, r"stride must be at most 2\^30, got \(1073741825, 1\)"),
        ({"padding": (1, -1)}, r"padding must be an integer of at least 0 or a pair of them, got \(1, -1\)"),
        ({"dilation": 1.5}, r"dilation must be an integer of at least 1 or a pair of them, got 1.5"),
        ({"dilation": (1, 2, 3)}, r"dilation must be an integer .*, got \(1, 2, 3\)"),
        ({"dilation": (2, 4)}, r"x must be at least 5 x 9 to give an output, got 6 x 7"),
        ({"residual": torch.randn(2, 5, 6, 7)}, r"residual must be of shape \[2, 5, 4, 5\], got shape \[2, 5, 6, 7\]"),
        ({"residual": torch.ones(2, 5, 4, 5).half()}, r"residual must have dtype torch.float32, .*, got torch.float16"),
        ({"residual": torch.ones(2, 5, 4, 5).to("meta")}, r"residual must be on the device of x, cpu, got meta"),
        ({"alpha": torch.nan}, r"alpha must be a finite number, got nan"),
        ({"alpha": 10**400}, r"alpha must be a finite number, got 10+"),
        ({"normalize": "no"}, r"normalize must be True or False, got 'no'"),
        ({"quantum": 0.3}, r"quantum must be a power of two from 2\^-126 to 2\^127, got 0.3"),
        ({"quantum": 2.0**-127}, r"quantum must be a power of two from 2\^-126 to 2\^127, got 5.8.*e-39"),
        ({"quantum": 2.0**128}, r"quantum must be a power of two from 2\^-126 to 2\^127, got 3.4.*e\+38"),
        ({"quantum": 2**53 + 1}, r"quantum must be a power of two from 2\^-126 to 2\^127, got 9007199254740993"),
        ({"quantum": -0.5}, r"quantum must be a finite positive number, got -0.5"),
    ],
    ids=lambda case: ",".join(case) if isinstance(case, dict) else "",
)
@compare.every_backend(OPERATOR)
def test_rejects(changed, message, backend):
    with pytest.raises(ValueError, match=f"^pac_conv2d: {message}$"):
        pac_conv2d(**{"x": X, "guide": GUIDE, "weight": WEIGHT, **changed}, backend=backend)


@compare.every_dtype()
def test_reference_leaves_the_bias_to_no_convolution(dtype):
    """Whose gradient to it, in bfloat16 on AMX, writes past its end for these channels (PyTorch 2.13)."""
    x, guide, weight = torch.randn(1, 256, 3, 5), torch.randn(1, 2, 3, 5), torch.randn(4, 256, 3, 3) / 48
    bias = torch.randn(4, dtype=dtype, requires_grad=True)
    arguments = (x.to(dtype), guide.to(dtype), weight.to(dtype))
    with mock.patch("torch.nn.functional.conv2d", wraps=F.conv2d) as conv2d:
        y = pac_conv2d(*arguments, bias, padding=1, backend="reference")
    (call,) = conv2d.call_args_list
    assert len(call.args) == 2 and not call.kwargs
    without = pac_conv2d(*arguments, padding=1, backend="reference")
    assert (y - without - bias.view(-1, 1, 1)).abs().max() < 8 * torch.finfo(dtype).eps
    assert torch.autograd.grad(y.float().sum(), bias)[0].eq(15).all()


def test_reference_of_one_tap_reaches_the_guide_with_zero():
    guide = GUIDE.clone().requires_grad_()
    pac_conv2d(X, guide, WEIGHT[..., :1, :1], backend="reference").sum().backward()
    assert guide.grad.eq(0).all()

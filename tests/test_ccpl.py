import math

import compare
import pytest
import torch
import torch.nn.functional as F
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from restoration_kernels import CCPLoss, _backend, ccpl_loss, neighbor_difference, sample_neighbors
from restoration_kernels.ccpl import UNIT_LENGTH_EPS

OPERATOR = "neighbor_difference"
TEMPERATURE = 0.07


def definition(features, anchors, neighbors):
    """One difference after the other."""
    places = features.flatten(2)
    rows = [places[:, :, anchors[n]] - places[:, :, neighbors[n, j]] for n in range(len(anchors)) for j in range(8)]
    return torch.stack(rows, 1)


@compare.every_case(OPERATOR)
@compare.every_dtype()
def test_forward(backend, sample, dtype):
    compare.check_values(backend, sample, dtype, definition)


@compare.every_case(OPERATOR)
@compare.every_dtype()
def test_backward(backend, sample, dtype):
    compare.check_values(backend, sample, dtype, definition, ("features",))


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


def test_compile_varying_numbers():
    """What changes between calls becomes a variable of the graph: here the number of places, and the temperature."""
    torch.compiler.reset()
    features, targets = torch.randn(2, 1, 8, 9, 7)

    def loss(num_anchors, temperature):
        torch.manual_seed(0)
        return ccpl_loss([features], [targets], num_anchors, temperature)

    compiled = torch.compile(loss, backend="aot_eager")
    for num_anchors, temperature in ((12, 0.07), (20, 0.1), (16, 0.2)):
        assert torch.isfinite(compiled(num_anchors, temperature))


def test_shapes_without_numbers():
    features, anchors, neighbors = (tensor.to("meta") for tensor in (FEATURES, ANCHORS, NEIGHBORS))
    assert neighbor_difference(features, anchors, neighbors).shape == (1, 16, 2)
    with FakeTensorMode():
        places = torch.zeros(2, dtype=torch.int64), torch.zeros(2, 8, dtype=torch.int64)
        assert neighbor_difference(torch.zeros(2, 3, 4, 5), *places).shape == (2, 16, 3)


def test_make_fx_traces_places():
    """Numbers of tensors that are being traced cannot be looked at, as checks of places do."""
    inputs = FEATURES, ANCHORS, NEIGHBORS
    graph = make_fx(lambda *tensors: neighbor_difference(*tensors))(*inputs)
    assert torch.equal(graph(*inputs), neighbor_difference(*inputs))


@pytest.mark.slow
@compare.one_case(OPERATOR, backends=("reference",))
def test_compile_reference(backend, sample):
    compare.check_compile(backend, sample, "inductor")


@compare.one_case(OPERATOR)
def test_export(backend, sample):
    # Not W: places would be others, and some on the border.
    axes = {"features": (0, 1, 2), "anchors": (0,), "neighbors": (0,)}
    compare.check_export(backend, sample, axes)


@compare.one_case(OPERATOR)
@compare.every_layout()
def test_layouts(backend, sample, layout):
    compare.check_layouts(backend, sample, layout)


@compare.one_case(OPERATOR)
def test_edge_shapes(backend, sample):
    compare.check_empty_batch(backend, sample, batched=("features",))


@compare.one_case(OPERATOR)
def test_only_requested_grads(backend, sample):
    compare.check_only_requested_grads(backend, sample)


@compare.every_case(OPERATOR)
def test_deterministic(backend, sample):
    compare.check_deterministic(backend, sample)


@compare.one_case(OPERATOR)
def test_autocast_keeps_features(backend, sample):
    arguments = compare.arguments_for(backend, sample, torch.float32)
    with torch.autocast(arguments["features"].device.type, torch.bfloat16):
        output = neighbor_difference(**arguments, backend=backend)
    assert torch.equal(output, neighbor_difference(**arguments, backend=backend))


@compare.every_backend(OPERATOR)
def test_edge_shapes_of_places(backend):
    """More channels than one of Triton's programs takes."""
    features = torch.randn(1, 70, 4, 4, dtype=torch.float64, device=compare.device(backend))
    anchors = torch.tensor([5, 6], device=features.device)
    arguments = {"features": features, "anchors": anchors, "neighbors": anchors.new_tensor(range(16)).view(2, 8)}
    compare.skip_unless_able(backend, OPERATOR, arguments)
    ours, exact = (
        compare.differentiate(function, arguments, ("features",))
        for function in (compare.public(OPERATOR, backend), definition)
    )
    compare.judge_all(ours, exact, ulps=compare.REFERENCE_ULPS[torch.float64])


@compare.every_backend(OPERATOR)
@pytest.mark.parametrize("deterministic", [True, False], ids=["deterministic", "atomic"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "channels_last"])
def test_repeated_places_accumulate(backend, deterministic, layout):
    """Anchors that repeat, and neighbours that are all the same; the gradient keeps the layout of the features."""
    torch.use_deterministic_algorithms(deterministic, warn_only=True)
    features = torch.randn(2, 5, 4, 4, device=compare.device(backend)).contiguous(memory_format=layout)
    anchors = torch.tensor([5, 5, 10], device=features.device)
    arguments = {"features": features, "anchors": anchors, "neighbors": anchors.new_full((3, 8), 5)}
    compare.skip_unless_able(backend, OPERATOR, arguments)
    ours = compare.differentiate(compare.public(OPERATOR, backend), arguments, ("features",))
    exact = {**arguments, "features": features.double()}
    compare.judge_all(ours, compare.differentiate(definition, exact, ("features",)))
    assert backend == "reference" or ours["features"].is_contiguous(memory_format=layout)


@pytest.mark.parametrize("deterministic", [True, False])
def test_gpu_kernels_add_in_order_where_runs_must_not_differ(deterministic, monkeypatch):
    """And only there: atomic sums need no sorted places."""
    orders = []
    monkeypatch.setattr(_backend, "why_not_on", lambda backend, device: None)
    monkeypatch.setattr("restoration_kernels.ccpl._launch_kernel", lambda *call: orders.append(call[2].get("order")))
    torch.use_deterministic_algorithms(deterministic, warn_only=True)
    features = FEATURES.clone().requires_grad_()
    neighbor_difference(features, ANCHORS, NEIGHBORS, backend="triton").sum().backward()
    assert (orders[-1] is not None) is deterministic


@pytest.mark.parametrize("backend", compare.KERNELS)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "channels_last"])
def test_places_beyond_32_bits(backend, layout, monkeypatch):
    compare.check_places_beyond_32_bits(backend, layout, monkeypatch)


def test_ccpl_identity_by_hand():
    """A centre of zero, four neighbours (-1, 0), four (0, -1): each row equals four of the eight, itself included."""
    features = torch.zeros(1, 2, 3, 3, dtype=torch.float64)
    features[0, 0, 0, :] = features[0, 0, 1, 0] = -2
    features[0, 1, 2, :] = features[0, 1, 1, 2] = -3
    expected = math.log(4 + 4 * math.exp(-1 / TEMPERATURE))
    # The lengths 2 and 3 become 1 but for eps²; neither they nor an offset count.
    by_hand = pytest.approx(expected, rel=UNIT_LENGTH_EPS**2)
    assert ccpl_loss([features], [features], 1).item() == by_hand
    assert ccpl_loss([features], [7 + 5 * features], 1).item() == by_hand
    assert ccpl_loss([features] * 3, [features] * 3, 1).item() / 3 == by_hand
    assert ccpl_loss([features], [-features], 1).item() == pytest.approx(expected + 1 / TEMPERATURE)


def test_ccpl_is_made_of_its_parts():
    maps = torch.randn(2, 2, 3, 6, 7, dtype=torch.float64)
    projection = torch.nn.Linear(3, 2).double()
    loss = ccpl_loss([maps[0]], [maps[1]], 5, 0.5, projections=[projection], generator=compare.seeded(3))
    places = sample_neighbors(6, 7, 5, generator=compare.seeded(3))
    query, key = (F.normalize(projection(definition(each, *places)), dim=-1) for each in maps)
    losses = [F.cross_entropy(q @ k.T / 0.5, torch.arange(40)) for q, k in zip(query, key, strict=True)]
    torch.testing.assert_close(loss, torch.stack(losses).mean(), rtol=1e-7, atol=0)


@compare.every_backend("info_nce")
def test_ccpl_hands_its_backend_on(backend):
    """To both of its operators, forward and backward; the reference has no ops."""
    features = torch.randn(1, 2, 4, 5, device=compare.device(backend), requires_grad=True)
    compare.skip_unless_able(backend, "info_nce", {"query": features})
    with compare.Recorder() as recorder:
        ccpl_loss([features], [features], 2, backend=backend).backward()
    operators = {(op.name().partition("::")[2], args[-1]) for op, args in recorder.calls}
    names = {name + suffix for name in (OPERATOR, "info_nce") for suffix in ("", "_backward")}
    assert operators == ({(name, backend) for name in names} if backend != "reference" else set())


def test_targets_are_projected_without_gradients():
    """Nothing of theirs is kept for backward."""
    seen = []

    def projection(rows):
        seen.append(torch.is_grad_enabled())
        return rows

    ccpl_loss([FEATURES], [FEATURES], 1, projections=[projection])
    assert sorted(seen) == [False, True]


def test_documented_defaults():
    """64 anchors for each layer and a temperature of 0.07."""
    features, targets = ([maps] for maps in torch.randn(2, 1, 3, 12, 12))
    expected = ccpl_loss(features, targets, 64, TEMPERATURE, generator=compare.seeded(3))
    assert torch.equal(ccpl_loss(features, targets, generator=compare.seeded(3)), expected)
    assert torch.equal(CCPLoss(project=False)(features, targets, generator=compare.seeded(3)), expected)


def test_module_keeps_its_settings():
    maps = [torch.randn(1, 3, 6, 6, generator=generator) for generator in map(compare.seeded, (1, 2))]
    module = CCPLoss((3,), num_anchors=4, temperature=0.5, project=False)
    expected = ccpl_loss([maps[0]], [maps[1]], 4, 0.5, generator=compare.seeded(3))
    assert torch.equal(module([maps[0]], [maps[1]], generator=compare.seeded(3)), expected)
    with pytest.raises(ValueError, match="backend must be one of"):
        module(maps, maps, backend="nonsense")


def test_ccpl_gradients():
    loss_function = CCPLoss((3, 8), num_anchors=[4, 6])
    features = [torch.randn(1, 3, 5, 5, requires_grad=True), torch.randn(1, 8, 6, 6, requires_grad=True)]
    targets = [torch.randn_like(layer).requires_grad_() for layer in features]
    loss_function(features, targets).backward()
    assert all(layer.grad.any() for layer in features)
    assert all(layer.grad is None for layer in targets)
    assert all(parameter.grad is not None for parameter in loss_function.parameters())


@compare.every_backend("info_nce")
def test_ccpl_of_an_empty_batch_is_zero(backend):
    features = torch.zeros(0, 4, 5, 5, device=compare.device(backend), requires_grad=True)
    compare.skip_unless_able(backend, "info_nce", {"query": features})
    module = CCPLoss((4,), num_anchors=2).to(features.device)
    loss = module([features], [features], backend=backend)
    assert loss.item() == 0
    loss.backward()
    assert features.grad.shape == features.shape
    assert all(parameter.grad.eq(0).all() for parameter in module.parameters())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16], ids=str)
@compare.every_backend("info_nce")
def test_ccpl_gradient_is_bounded_in_flat_regions(backend, dtype):
    """As the docstring of ccpl_loss promises: 2/(τ·eps) divided by the number of rows, for each difference."""
    features = torch.zeros(1, 2, 3, 3, dtype=dtype, device=compare.device(backend), requires_grad=True)
    anchors = torch.zeros(1, dtype=torch.int64, device=features.device)
    compare.skip_unless_able(backend, OPERATOR, {"features": features, "anchors": anchors})
    targets = torch.randn(1, 2, 3, 3, generator=compare.seeded(0)).to(features)
    loss = ccpl_loss([features], [targets], 1, backend=backend)
    assert loss.item() == pytest.approx(math.log(8), rel=1e-6)
    loss.backward()
    neighbors = features.grad.flatten(2)[:, :, [0, 1, 2, 3, 5, 6, 7, 8]]
    assert 0 < neighbors.norm(dim=1).max() <= 2 / (TEMPERATURE * 1e-4) / 8


def test_module():
    shapes = {name: list(value.shape) for name, value in CCPLoss((8,)).state_dict().items()}
    assert shapes == {
        "projections.0.0.weight": [8, 8],
        "projections.0.0.bias": [8],
        "projections.0.2.weight": [2, 8],
        "projections.0.2.bias": [2],
    }
    assert len(CCPLoss().projections) == 4
    elsewhere = CCPLoss((8,), device="meta", dtype=torch.float64)
    assert {(each.device.type, each.dtype) for each in elsewhere.parameters()} == {("meta", torch.float64)}
    features = [torch.randn(1, 8, 5, 5)]
    bare = CCPLoss((8,), num_anchors=3, project=False)
    assert not list(bare.parameters())
    expected = ccpl_loss(features, features, 3, generator=compare.seeded(0))
    assert torch.equal(bare(features, features, generator=compare.seeded(0)), expected)


def test_module_without_heads_takes_a_number_of_anchors_for_each_layer():
    """Of which it does not know how many there will be."""
    layers, counts = [torch.randn(1, 2, 4, 5), torch.randn(1, 3, 6, 6)], [2, 9]
    loss = CCPLoss(num_anchors=counts, project=False)(layers, layers, generator=compare.seeded(0))
    assert torch.equal(loss, ccpl_loss(layers, layers, counts, generator=compare.seeded(0)))


FEATURES = torch.randn(1, 2, 4, 5)
ANCHORS, NEIGHBORS = sample_neighbors(4, 5, 2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((FEATURES[0], ANCHORS, NEIGHBORS), r"features must be of shape \[B, C, H, W\], got shape \[2, 4, 5\]"),
        ((FEATURES, ANCHORS, NEIGHBORS[:1]), r"neighbors must be of shape \[2, 8\], got shape \[1, 8\]"),
        ((FEATURES, ANCHORS.int(), NEIGHBORS), r"anchors must have dtype torch.int64, got torch.int32"),
        ((FEATURES, ANCHORS * 0 + 20, NEIGHBORS), r"anchors must lie in 0 to 19, .* of 4 x 5, got 20 to 20"),
        *(
            (
                (FEATURES, torch.tensor([7, place]), NEIGHBORS),
                rf"anchors must lie off the border of 4 x 5, .* neighbours, got {place}",
            )
            for place in (2, 10, 14, 17)
        ),
        ((FEATURES, ANCHORS, NEIGHBORS.to("meta")), r"neighbors must be on the device of features, cpu, got meta"),
        ((FEATURES, ANCHORS, NEIGHBORS * 0 - 1), r"neighbors must lie in 0 to 19, .* of 4 x 5, got -1 to -1"),
    ],
)
@compare.every_backend(OPERATOR)
def test_rejects_places(arguments, message, backend):
    with pytest.raises(ValueError, match=f"^neighbor_difference: {message}$"):
        neighbor_difference(*arguments, backend=backend)


@pytest.mark.skipif(_backend.extension()[0] is None, reason=str(_backend.extension()[1]))
@pytest.mark.parametrize("place", [-1, 20])
def test_places_of_a_compiled_graph_are_looked_at_by_the_kernel(place):
    torch.compiler.reset()
    compiled = torch.compile(neighbor_difference, fullgraph=True, backend="aot_eager")
    for anchors, neighbors in ((ANCHORS * 0 + place, NEIGHBORS), (ANCHORS, NEIGHBORS * 0 + place)):
        with pytest.raises(ValueError, match=rf"neighbor_difference: places must lie in 0 to 19, got {place}$"):
            compiled(FEATURES, anchors, neighbors, backend="cpu")


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((FEATURES, FEATURES), {}, r"ccpl_loss: features must be a list with one entry for each layer, got a tensor"),
        (([], []), {}, r"ccpl_loss: features must have one entry for each layer, got none"),
        (([FEATURES], [FEATURES] * 2), {}, r"ccpl_loss: targets must have 1 entries, one for each layer, got 2"),
        (
            ([FEATURES], [torch.randn(1, 6, 3)]),
            {},
            r"ccpl_loss: targets\[0\] must be of shape .*, got shape \[1, 6, 3\]",
        ),
        (([FEATURES], [FEATURES]), {"projections": []}, r"ccpl_loss: projections must have 1 entries, .*, got 0"),
        (
            ([FEATURES], [FEATURES], 1),
            {"projections": [1]},
            r"ccpl_loss: projections\[0\] must be a module .*, got int",
        ),
        (([FEATURES], [FEATURES], 1), {"backend": "x"}, r"ccpl_loss: backend must be one of .*, got 'x' from .*"),
        (([FEATURES], [FEATURES], [1, 2]), {}, r"ccpl_loss: num_anchors must have 1 entries, .*, got 2"),
        (([FEATURES], [FEATURES]), {}, r"ccpl_loss: num_anchors must be at most the 6 interior places of .*, got 64"),
        (([FEATURES] * 2, [FEATURES] * 2, [1, 64]), {}, r"ccpl_loss: num_anchors\[1\] must be at most .*, got 64"),
        (([FEATURES[..., :2]],) * 2, {}, r"ccpl_loss: features\[0\] must be at least 3 x 3, got 4 x 2"),
        (([FEATURES[:, :, :2]],) * 2, {}, r"ccpl_loss: features\[0\] must be at least 3 x 3, got 2 x 5"),
        (([FEATURES], [FEATURES], 1, 0.0), {}, r"ccpl_loss: temperature must be a finite positive number, got 0.0"),
        (([FEATURES], [FEATURES], 1, 9e-31), {}, r"ccpl_loss: temperature must be at least 1e-30, got 9e-31"),
        (
            ([FEATURES], [FEATURES.double()], 1),
            {},
            r"ccpl_loss: targets\[0\] must have the dtype of features\[0\], torch.float32, got torch.float64",
        ),
        (
            ([FEATURES, FEATURES.to("meta")], [FEATURES] * 2, 1),
            {},
            r"ccpl_loss: features\[1\] must be on the device of features\[0\], cpu, got meta",
        ),
    ],
)
def test_rejects_layers(arguments, options, message):
    generator = torch.Generator()
    before = generator.get_state()
    with pytest.raises((TypeError, ValueError), match=f"^{message}$"):
        ccpl_loss(*arguments, generator=generator, **options)
    assert torch.equal(generator.get_state(), before)


@pytest.mark.parametrize(
    ("projection", "error", "got"),
    [
        (lambda rows: None, TypeError, "NoneType"),
        (lambda rows: rows.to_sparse(), TypeError, "a tensor of layout torch.sparse_coo"),
        (lambda rows: rows.long(), ValueError, "torch.int64"),
        (lambda rows: rows[..., :0], ValueError, r"shape \[1, 8, 0\]"),
        (lambda rows: rows[0], ValueError, r"shape \[8, 2\]"),
        (lambda rows: rows[:, 1:], ValueError, r"shape \[1, 7, 2\]"),
    ],
    ids=["none", "sparse", "integers", "no width", "no batch", "fewer rows"],
)
def test_rejects_what_projections_return(projection, error, got):
    must = r"return a floating-point tensor of shape \[1, 8, D\]"
    with pytest.raises(error, match=rf"^ccpl_loss: projections\[1\] must {must}, got {got}$"):
        ccpl_loss([FEATURES] * 2, [FEATURES] * 2, 1, projections=[None, projection])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"channels": 64}, "channels must be a list with one entry for each layer, got int"),
        ({"channels": ()}, "channels must have one entry for each layer, got none"),
        ({"channels": (8, 0)}, r"channels\[1\] must be an integer of at least 1, got 0"),
        ({"num_anchors": "x"}, "num_anchors must be an integer of at least 1, got 'x'"),
        ({"num_anchors": [8] * 3}, "num_anchors must have 4 entries, one for each layer, got 3"),
        ({"temperature": -1.0}, "temperature must be a finite positive number, got -1.0"),
        ({"temperature": True}, "temperature must be a finite positive number, got True"),
        ({"temperature": 9e-31}, "temperature must be at least 1e-30, got 9e-31"),
        ({"project": 1}, "project must be True or False, got 1"),
        ({"device": "gpu"}, "device must be a torch.device, the name of one, or None, got 'gpu'"),
        ({"dtype": "float32"}, "dtype must be None or one of torch.float16, .*, got float32"),
    ],
)
def test_rejects_module(options, message):
    with pytest.raises((TypeError, ValueError), match=f"^CCPLoss: {message}$"):
        CCPLoss(**options)


@pytest.mark.parametrize(
    ("channels", "message"),
    [
        ((4,), r"features\[0\] must be of shape \[B, 4, H, W\], got shape \[1, 8, 5, 5\]"),
        ((8, 8), "features must have 2 entries, one for each layer, got 1"),
    ],
)
def test_heads_are_for_their_channels(channels, message):
    features = [torch.randn(1, 8, 5, 5)]
    with pytest.raises(ValueError, match=f"^CCPLoss: {message}$"):
        CCPLoss(channels, num_anchors=3)(features, features)

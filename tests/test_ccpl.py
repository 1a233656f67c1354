import collections
import itertools
import math
from pathlib import Path
from unittest import mock

import compare
import pytest
import torch
import torch.nn.functional as F
from torch._subclasses import FakeTensorMode

from benchmarks import bench_ccpl, peak_memory
from restoration_kernels import CCPLoss, _backend, ccpl_loss, info_nce, neighbor_difference, sample_neighbors
from restoration_kernels._samples import Sample, _info_nce
from restoration_kernels.ccpl import UNIT_LENGTH_EPS

OPERATORS = ("neighbor_difference", "info_nce")
TEMPERATURE = 0.07


def definition(**arguments):
    return info_nce_definition(**arguments) if "query" in arguments else neighbor_difference_definition(**arguments)


def neighbor_difference_definition(features, anchors, neighbors):
    """One difference after the other."""
    places = features.flatten(2)
    rows = [places[:, :, anchors[n]] - places[:, :, neighbors[n, j]] for n in range(len(anchors)) for j in range(8)]
    return torch.stack(rows, 1)


def info_nce_definition(query, key, temperature):
    """The cross-entropy of one row after the other, with the row's own number as its class."""
    images = [q @ k.T / temperature for q, k in zip(query, key, strict=True)]
    losses = [[F.cross_entropy(row, torch.tensor(i)) for i, row in enumerate(logits)] for logits in images]
    return torch.stack([torch.stack(image) for image in losses])


@compare.every_case(*OPERATORS)
@compare.every_dtype()
def test_forward(backend, sample, dtype):
    compare.check_values(backend, sample, dtype, definition)


@compare.every_case(*OPERATORS)
@compare.every_dtype()
def test_backward(backend, sample, dtype):
    compare.check_values(backend, sample, dtype, definition, ("features", "query"))


@compare.every_tiny_case(*OPERATORS)
def test_gradcheck(backend, sample):
    compare.check_gradcheck(backend, sample)


@compare.one_case(*OPERATORS, backends=compare.KERNELS)
def test_second_derivatives_refused(backend, sample):
    compare.check_second_derivatives_refused(backend, sample)


@compare.every_tiny_case(*OPERATORS, backends=compare.KERNELS)
def test_opcheck(backend, sample):
    compare.check_opcheck(backend, sample)


@compare.one_case(*OPERATORS)
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
    query, key = F.normalize(torch.randn(2, 1, 6, 4), dim=-1)
    compiled = torch.compile(info_nce, backend="aot_eager", fullgraph=True)
    for temperature in (0.07, 0.1, 0.2):
        assert torch.equal(compiled(query, key, temperature), info_nce(query, key, temperature))


def test_shapes_without_numbers():
    features, anchors, neighbors = (tensor.to("meta") for tensor in (FEATURES, ANCHORS, NEIGHBORS))
    assert neighbor_difference(features, anchors, neighbors).shape == (1, 16, 2)
    with FakeTensorMode():
        places = torch.zeros(2, dtype=torch.int64), torch.zeros(2, 8, dtype=torch.int64)
        assert neighbor_difference(torch.zeros(2, 3, 4, 5), *places).shape == (2, 16, 3)


@pytest.mark.slow
@compare.one_case(*OPERATORS, backends=("reference",))
def test_compile_reference(backend, sample):
    compare.check_compile(backend, sample, "inductor")


@compare.one_case(*OPERATORS)
def test_export(backend, sample):
    # Not W: places would be others, and some on the border.
    axes = {"features": (0, 1, 2), "anchors": (0,), "neighbors": (0,), "query": (0, 1, 2), "key": (0, 1, 2)}
    compare.check_export(backend, sample, axes)


@compare.one_case(*OPERATORS)
@compare.every_layout()
def test_layouts(backend, sample, layout):
    compare.check_layouts(backend, sample, layout)


@compare.one_case(*OPERATORS)
def test_edge_shapes(backend, sample):
    compare.check_empty_batch(backend, sample, batched=("features", "query", "key"))


@compare.one_case(*OPERATORS)
def test_only_requested_grads(backend, sample):
    compare.check_only_requested_grads(backend, sample)


@compare.every_case(*OPERATORS)
def test_deterministic(backend, sample):
    compare.check_deterministic(backend, sample)


@compare.one_case("neighbor_difference")
def test_autocast_keeps_features(backend, sample):
    arguments = compare.arguments_for(backend, sample, torch.float32)
    with torch.autocast(arguments["features"].device.type, torch.bfloat16):
        output = neighbor_difference(**arguments, backend=backend)
    assert torch.equal(output, neighbor_difference(**arguments, backend=backend))


@compare.one_case("info_nce")
def test_autocast_widens_rows(backend, sample):
    arguments = compare.arguments_for(backend, sample, torch.bfloat16)
    query, key = arguments["query"].float(), arguments["key"].float()
    with torch.autocast(query.device.type, torch.bfloat16):
        output = info_nce(query, arguments["key"], backend=backend)
    assert output.dtype == torch.float32
    assert torch.equal(output, info_nce(query, key, backend=backend))


@pytest.mark.parametrize(("height", "width", "num_anchors"), [(7, 10, 1), (7, 10, 20), (7, 10, 40), (34, 34, 1024)])
def test_sample_neighbors(height, width, num_anchors):
    places = sample_neighbors(height, width, num_anchors, generator=_seeds(0)[0])
    assert_places(*places, height, width, num_anchors)


def test_places_of_several_maps_are_drawn_at_once(monkeypatch):
    sizes, counts, seen = [(7, 10), (3, 3), (30, 20)], [40, 1, 9], []

    def note(features, target, anchors, neighbors, *_):
        seen.append((anchors, neighbors))
        return 0.0

    monkeypatch.setattr("restoration_kernels.ccpl.layer_loss", note)
    maps = [torch.zeros(1, 1, *size) for size in sizes]
    with mock.patch("torch.randint", wraps=torch.randint) as randint:
        ccpl_loss(maps, maps, counts)
    randint.assert_called_once()
    for places, size, count in zip(seen, sizes, counts, strict=True):
        assert_places(*places, *size, count)


def assert_places(anchors, neighbors, height, width, num_anchors):
    """Different places off the border, each with those around it."""
    assert anchors.dtype == neighbors.dtype == torch.int64
    assert len(set(anchors.tolist())) == num_anchors
    for anchor, around in zip(anchors.tolist(), neighbors.tolist(), strict=True):
        row, column = divmod(anchor, width)
        assert 0 < row < height - 1 and 0 < column < width - 1
        steps = [(i, j) for i in (-1, 0, 1) for j in (-1, 0, 1) if (i, j) != (0, 0)]
        assert around == [(row + i) * width + column + j for i, j in steps]


def test_sample_neighbors_repeats_with_its_generator():
    first, again, later = (sample_neighbors(30, 30, 64, generator=generator)[0] for generator in _seeds(1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, later)


def _seeds(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def test_sample_neighbors_favours_no_set_of_places(monkeypatch):
    """All that the generator can give, four draws on a map of six inner places, makes each of the 15 sets 24 times."""
    sets = collections.Counter()
    for draws in itertools.product(range(3), range(4), range(5), range(6)):
        monkeypatch.setattr(torch, "randint", lambda *_, draws=draws, **__: torch.tensor(draws))
        sets[frozenset(sample_neighbors(4, 5, 4)[0].tolist())] += 1
    assert len(sets) == math.comb(6, 4)
    assert set(sets.values()) == {24}


def test_sample_neighbors_favours_no_place():
    """12 places, thousands of draws: every place is an anchor equally often, within five standard deviations."""
    generator, draws = torch.Generator().manual_seed(0), 1000
    anchors = torch.cat([sample_neighbors(5, 6, 4, generator=generator)[0] for _ in range(draws)])
    counts = torch.unique(anchors, return_counts=True)[1]
    assert len(counts) == 12
    assert (counts - draws / 3).abs().max() < 5 * math.sqrt(draws * 1 / 3 * 2 / 3)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_sample_neighbors_waits_for_no_device(device):
    """No number comes back to the host and no shape depends on one: fake tensors have none, and raise."""
    with FakeTensorMode():
        anchors, neighbors = sample_neighbors(7, 10, 20, device=device)
    assert anchors.device.type == neighbors.device.type == device
    assert (anchors.shape, neighbors.shape) == ((20,), (20, 8))


def test_sample_neighbors_costs_nothing_on_a_large_map():
    # A permutation of all places would take 320 GB.
    assert sample_neighbors(200_000, 200_000, 64)[0].max() > 200_000


@compare.every_backend("info_nce")
def test_info_nce_identity_far_apart(backend):
    """Orthogonal rows: the others weigh exp(-1/τ) each. Logits of ten thousand neither overflow nor vanish."""
    rows = torch.eye(4, dtype=torch.float64, device=compare.device(backend))[None]
    compare.skip_unless_able(backend, "info_nce", {"query": rows, "key": rows})
    loss = info_nce(rows, rows, TEMPERATURE, backend=backend)
    torch.testing.assert_close(loss, torch.full_like(loss, math.log1p(3 * math.exp(-1 / TEMPERATURE))))
    assert torch.equal(info_nce(700 * rows, rows, TEMPERATURE, backend=backend), torch.zeros_like(loss))
    backwards = info_nce(700 * rows, rows.flip(1), TEMPERATURE, backend=backend)
    torch.testing.assert_close(backwards, torch.full_like(loss, 10_000))


@compare.every_backend("info_nce")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_info_nce_identity_found_exactly(backend, dtype):
    """Far from all other rows: no digit of large logits may be left over, and a loss is never negative."""
    rows = torch.eye(32, dtype=dtype, device=compare.device(backend))[None]
    compare.skip_unless_able(backend, "info_nce", {"query": rows, "key": rows})
    # A temperature whose inverse is rounded, and multiples of it whose products are.
    query = rows * torch.linspace(600, 700, 32, device=rows.device)[:, None].to(dtype)
    assert torch.equal(info_nce(query, rows, TEMPERATURE, backend=backend).cpu(), torch.zeros(1, 32))


def run_info_nce(backend, query, key, temperature):
    """Loss and gradient to the query, of the sum of all losses."""
    arguments = {name: rows.to(compare.device(backend)) for name, rows in (("query", query), ("key", key))}
    compare.skip_unless_able(backend, "info_nce", {**arguments, "temperature": temperature})
    query = arguments["query"].requires_grad_()
    loss = info_nce(query, arguments["key"], temperature, backend=backend)
    return loss.detach().cpu(), torch.autograd.grad(loss.sum(), query)[0].cpu()


@compare.every_backend("info_nce")
@pytest.mark.parametrize("temperature", [0.07, 0.01])
@pytest.mark.parametrize("shape", [(2, 97, 16), (1, 130, 512)], ids=str)
def test_info_nce_identity_cross_entropy(backend, temperature, shape):
    """That of all logits at once, with the diagonal as target."""
    query, key = F.normalize(torch.randn(2, *shape, dtype=torch.float64, generator=_seeds(0)[0]), dim=-1)
    loss, gradient = run_info_nce(backend, query, key, temperature)
    query.requires_grad_()
    logits = query @ key.mT / temperature
    target = torch.arange(shape[1]).expand(shape[0], -1)
    expected = F.cross_entropy(logits.mT, target, reduction="none")
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected.sum(), query)[0], rtol=1e-6, atol=1e-6)
    assert gradient.norm(dim=-1).max() <= 2 / temperature


def test_info_nce_rounds_like_the_reference():
    """Thousands of keys, added up one after the other, would round twice as much as the judge allows."""
    sample = Sample("info_nce", "3000_rows", "odd", _info_nce(1, 3000, 64))
    compare.check_values("cpu", sample, torch.float32, None, ("query",))


@pytest.mark.slow
def test_info_nce_of_many_rows_takes_little_memory():
    """Where every copy of the logits would take 4 GB."""
    name = "info_nce/forward+backward/32768_rows/cpu"
    peak = peak_memory.measure_files({Path(bench_ccpl.__file__): [name]}, "cpu", quick=False)[name]
    if peak is None:
        pytest.skip("only Linux tells the peak, and only of a kernel that can run")
    assert peak < 100e6


@compare.every_backend("info_nce")
def test_info_nce_identity_by_hand(backend):
    """Two places of each of two colours: a row finds its own key among two that are the same, and two others."""
    rows = torch.tensor([[[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0]]], dtype=torch.float64)
    loss, gradient = run_info_nce(backend, rows, rows, 1.0)
    total = 2 * math.e + 2
    torch.testing.assert_close(loss, torch.full_like(loss, math.log(total) - 1))
    pull, push = 2 * math.e / total - 1, 2 / total
    expected = torch.tensor([[[pull, push], [pull, push], [push, pull], [push, pull]]], dtype=torch.float64)
    torch.testing.assert_close(gradient, expected)


@compare.every_backend("info_nce")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_info_nce_of_one_row_is_zero(backend, dtype):
    query, key = torch.randn(2, 3, 1, 20, dtype=dtype)
    loss, gradient = run_info_nce(backend, query, key, 0.01)
    assert not loss.any() and not gradient.any()


@compare.every_backend("info_nce")
@pytest.mark.parametrize("place", ["query", "key"])
def test_info_nce_shows_nan(backend, place):
    """A diverged network is seen, not averaged away."""
    rows = {name: torch.randn(1, 70, 5) for name in ("query", "key")}
    rows[place][0, 40, 2] = math.nan
    loss, _ = run_info_nce(backend, **rows, temperature=0.07)
    expected = torch.arange(70) == 40 if place == "query" else torch.ones(70, dtype=torch.bool)
    assert torch.equal(loss[0].isnan(), expected)


@compare.every_backend("neighbor_difference")
@pytest.mark.parametrize("deterministic", [True, False], ids=["deterministic", "atomic"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "channels_last"])
def test_repeated_places_accumulate(backend, deterministic, layout):
    """Anchors that repeat, and neighbours that are all the same; the gradient keeps the layout of the features."""
    torch.use_deterministic_algorithms(deterministic, warn_only=True)
    features = torch.randn(2, 5, 4, 4, device=compare.device(backend)).contiguous(memory_format=layout)
    anchors = torch.tensor([5, 5, 10], device=features.device)
    arguments = {"features": features, "anchors": anchors, "neighbors": anchors.new_full((3, 8), 5)}
    compare.skip_unless_able(backend, "neighbor_difference", arguments)
    ours = compare.differentiate(compare.public("neighbor_difference", backend), arguments, ("features",))
    exact = {**arguments, "features": features.double()}
    compare.judge_all(ours, compare.differentiate(neighbor_difference_definition, exact, ("features",)))
    assert backend == "reference" or ours["features"].is_contiguous(memory_format=layout)


@pytest.mark.parametrize("backend", compare.KERNELS)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "channels_last"])
def test_places_beyond_32_bits(backend, layout, monkeypatch):
    compare.check_places_beyond_32_bits(backend, layout, monkeypatch)


@compare.every_backend("info_nce")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_info_nce_of_half_precision_is_float32(backend, dtype):
    query = torch.randn(1, 5, 3, dtype=dtype, device=compare.device(backend))
    compare.skip_unless_able(backend, "info_nce", {"query": query, "key": query})
    assert info_nce(query, query, backend=backend).dtype == torch.float32


@compare.every_backend("info_nce")
def test_info_nce_key_gets_no_gradient(backend):
    query, key = torch.randn(2, 1, 5, 3, device=compare.device(backend))
    key.requires_grad_()
    compare.skip_unless_able(backend, "info_nce", {"query": query, "key": key})
    assert not info_nce(query, key, backend=backend).requires_grad


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
    loss = ccpl_loss([maps[0]], [maps[1]], 5, 0.5, projections=[projection], generator=_seeds(3)[0])
    places = sample_neighbors(6, 7, 5, generator=_seeds(3)[0])
    query, key = (F.normalize(projection(neighbor_difference_definition(each, *places)), dim=-1) for each in maps)
    torch.testing.assert_close(loss, info_nce_definition(query, key, 0.5).mean(), rtol=1e-7, atol=0)


def test_module_keeps_its_settings():
    maps = [torch.randn(1, 3, 6, 6, generator=generator) for generator in _seeds(1, 2)]
    module = CCPLoss((3,), num_anchors=4, temperature=0.5, project=False)
    expected = ccpl_loss([maps[0]], [maps[1]], 4, 0.5, generator=_seeds(3)[0])
    assert torch.equal(module([maps[0]], [maps[1]], generator=_seeds(3)[0]), expected)
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
    compare.skip_unless_able(backend, "neighbor_difference", {"features": features, "anchors": anchors})
    targets = torch.randn(1, 2, 3, 3, generator=_seeds(0)[0]).to(features)
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
    features = [torch.randn(1, 8, 5, 5)]
    bare = CCPLoss((8,), num_anchors=3, project=False)
    assert not list(bare.parameters())
    expected = ccpl_loss(features, features, 3, generator=_seeds(0)[0])
    assert torch.equal(bare(features, features, generator=_seeds(0)[0]), expected)


FEATURES, ROWS = torch.randn(1, 2, 4, 5), torch.randn(1, 6, 3)
ANCHORS, NEIGHBORS = sample_neighbors(4, 5, 2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((2, 9, 1), "height must be an integer of at least 3, got 2"),
        ((4, 2.0, 1), "width must be an integer of at least 3, got 2.0"),
        ((4, 5, 0), "num_anchors must be an integer of at least 1, got 0"),
        ((2**21, 2**20, 1), r"height and width must have at most 2\^40 places, got 2097152 x 1048576"),
        ((2**63, 3, 1), r"height and width must have at most 2\^40 places, got 9223372036854775808 x 3"),
        ((4, 5, 7), "num_anchors must be at most the 6 interior places of 4 x 5, got 7"),
    ],
)
def test_rejects_draws(arguments, message):
    with pytest.raises(ValueError, match=f"^sample_neighbors: {message}$"):
        sample_neighbors(*arguments)
    with pytest.raises(TypeError, match=r"^sample_neighbors: generator must be a torch.Generator or None, got int$"):
        sample_neighbors(4, 5, 1, generator=3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((FEATURES[0], ANCHORS, NEIGHBORS), r"features must be of shape \[B, C, H, W\], got shape \[2, 4, 5\]"),
        ((FEATURES, ANCHORS, NEIGHBORS[:1]), r"neighbors must be of shape \[2, 8\], got shape \[1, 8\]"),
        ((FEATURES, ANCHORS.int(), NEIGHBORS), r"anchors must have dtype torch.int64, got torch.int32"),
        ((FEATURES, ANCHORS * 0 + 20, NEIGHBORS), r"anchors must lie in 0 to 19, .* of 4 x 5, got 20 to 20"),
        (
            (FEATURES, torch.tensor([7, 14]), NEIGHBORS),
            r"anchors must lie off the border of 4 x 5, .* neighbours, got 14",
        ),
        ((FEATURES, ANCHORS, NEIGHBORS * 0 - 1), r"neighbors must lie in 0 to 19, .* of 4 x 5, got -1 to -1"),
    ],
)
@compare.every_backend("neighbor_difference")
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
    ("arguments", "message"),
    [
        ((ROWS, ROWS[:, 1:]), r"key must be of shape \[1, 6, 3\], got shape \[1, 5, 3\]"),
        ((ROWS, ROWS.double()), r"key must have the dtype of query, torch.float32, got torch.float64"),
        ((ROWS, ROWS, 0), r"temperature must be a finite positive number, got 0"),
        ((ROWS, ROWS, math.nan), r"temperature must be a finite positive number, got nan"),
    ],
)
@compare.every_backend("info_nce")
def test_rejects(arguments, message, backend):
    with pytest.raises(ValueError, match=f"^info_nce: {message}$"):
        info_nce(*arguments, backend=backend)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((FEATURES, FEATURES), {}, r"ccpl_loss: features must be a list with one entry for each layer, got a tensor"),
        (([], []), {}, r"ccpl_loss: features must have one entry for each layer, got none"),
        (([FEATURES], [FEATURES] * 2), {}, r"ccpl_loss: targets must have 1 entries, one for each layer, got 2"),
        (([FEATURES], [ROWS]), {}, r"ccpl_loss: targets\[0\] must be of shape .*, got shape \[1, 6, 3\]"),
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
        (([FEATURES[..., :2]],) * 2, {}, r"ccpl_loss: features\[0\] must be at least 3 x 3, got \d x 2"),
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
        ({"project": 1}, "project must be True or False, got 1"),
    ],
)
def test_rejects_module(options, message):
    with pytest.raises((TypeError, ValueError), match=f"^CCPLoss: {message}$"):
        CCPLoss(**options)

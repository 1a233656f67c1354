"""The training step: reversible or not, skipped where out of range, captured where it can be, never waiting."""

import logging
import subprocess
import sys
from unittest import mock

import compare
import pytest
import torch

from restoration import convolution, graph, step
from restoration.blocks import STREAM_QUANTUM
from restoration.config import make_config
from restoration.errors import UserError
from restoration.journal import Journal
from restoration.profile import profile_training
from restoration.reversible import _chain_gradients
from restoration.step import MEASUREMENTS, Optimisation, Outcome, learning_rate
from restoration.train import build_step, train
from restoration.vgg import loss_features
from restoration.whitening import moments, transfer_moments

CPU = torch.device("cpu")


def optimisation(**overrides):
    config = make_config("small", **{"crop": 32, "batch": 1, "blocks": 1, "anchors": 8, **overrides})
    torch.manual_seed(0)
    return Optimisation(build_step(config, loss_features()), config, CPU)


def crops(side=32, seed=0, batch=1):
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(2, batch, 3, 4, 4, generator=generator)
    return [torch.nn.functional.interpolate(one, size=(side, side), mode="bicubic").clamp(0, 1) for one in coarse]


def numbers(outcome):
    return dict(zip(outcome.names, outcome.numbers.tolist(), strict=True))


def state(optimise):
    """Parameters and all that Adam keeps."""
    kept = [value for state in optimise.optimizer.state.values() for value in state.values()]
    return [value.detach().clone() for value in (*optimise.module.parameters(), *kept)]


def unchanged(before, after):
    return all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_an_outcome_names_its_numbers():
    outcome = optimisation()(0, *crops())
    found = numbers(outcome)
    losses = {"ccp", "style", "matting", "cycle"}
    assert set(found) == losses | {"total", *MEASUREMENTS}
    assert found["total"] == pytest.approx(sum(found[name] for name in losses), rel=1e-6)
    assert found["skipped"] == 0 and found["gradient_norm"] > 0 and 0 < found["largest_stream"] < 256
    assert not outcome.numbers.requires_grad and not outcome.result.requires_grad, "an outcome keeps no graph alive"


def test_both_paintings_are_encoded_at_once_where_sizes_agree(monkeypatch):
    """To the same numbers, but for sums in another order that are rounded to another quantum."""
    module = optimisation().module
    degraded, reference = crops()
    apart = [module.network.encode(crop, in_order=False) for crop in (degraded, reference)]
    batches = []
    encode = module.network.encode
    monkeypatch.setattr(
        module.network, "encode", lambda image, **order: batches.append(len(image)) or encode(image, **order)
    )
    module(degraded, reference, torch.Generator())
    assert batches == [2, 1]
    for together, alone in zip(module._encode_both(degraded, reference), apart, strict=True):
        torch.testing.assert_close(together, alone, rtol=0, atol=16 * STREAM_QUANTUM)
    batches.clear()
    module(degraded, reference[..., :24], torch.Generator())
    assert batches == [1, 1, 1]


def test_losses_and_largest_stream_are_of_the_right_pictures(monkeypatch):
    """The cycle gives the result the moments back that the degraded painting had."""
    module = optimisation().module
    given, streams = [], []
    module.losses.register_forward_pre_hook(lambda losses, inputs: given.extend(inputs))
    monkeypatch.setattr(step, "largest_value", lambda found: streams.extend(found) or torch.zeros(()))
    degraded, reference = crops()
    result = module(degraded, reference, torch.Generator()).result
    content, style = module._encode_both(degraded, reference)
    encoded = module.network.encode(result, in_order=False)
    transfer = transfer_moments(encoded, moments(encoded), moments(content))
    cycled = module.network.decode(transfer.z, degraded.shape[-2:], in_order=False)
    assert unchanged((degraded, reference, result, cycled), given[:4])
    assert unchanged((content, style, encoded), streams)


def test_a_step_returns_pages_before_what_takes_the_most(monkeypatch):
    """Before its losses, before they go backward, when the loss network has, and before the pass of both does."""
    optimise = optimisation()
    events = []
    monkeypatch.setattr(step, "return_freed_pages", lambda device: events.append(f"pages of {device}"))
    optimise.module.losses.register_forward_pre_hook(lambda *_: events.append("losses"))

    def marked(module, inputs):
        (image,) = (image.view_as(image) for image in inputs)
        if image.requires_grad:
            image.register_hook(lambda gradient: events.append("loss network"))
        return image

    optimise.module.losses.features.register_forward_pre_hook(marked)
    monkeypatch.setattr(
        "restoration.reversible._chain_gradients", lambda *given: events.append("pass") or _chain_gradients(*given)
    )
    optimise(0, *crops())
    pages = "pages of cpu"
    assert events == [pages, "losses", pages, "loss network", pages, "pass", "pass", "pass", pages, "pass"]


@pytest.mark.parametrize("poison", ["input", "stream"])
def test_a_step_out_of_range_changes_nothing(poison):
    optimise = optimisation()
    optimise(0, *crops())
    degraded, reference = crops(seed=1)
    if poison == "input":
        reference[0, 0, 0, 0] = float("nan")
    else:
        reference[...] *= 1_000.0
    before = state(optimise)
    outcome = optimise(1, degraded, reference)
    assert numbers(outcome)["skipped"] == 1
    assert unchanged(before, state(optimise))
    assert numbers(optimise(2, *crops()))["skipped"] == 0
    assert not unchanged(before, state(optimise))

    journal = Journal()
    journal.add(1, outcome, ["faded.png", "kept.png"])
    (record,) = journal.read()
    assert "step 1" in record.complaint() and "faded.png, kept.png" in record.complaint()
    assert journal.read() == []
    assert "1 steps were skipped" in journal.summary()


def test_a_loss_that_is_not_finite_skips_its_step_though_its_gradient_is(monkeypatch):
    optimise = optimisation()
    optimise(0, *crops())
    before, losses = state(optimise), optimise.module.losses
    compute = losses.forward
    monkeypatch.setattr(losses, "forward", lambda *given: {k: v + torch.inf for k, v in compute(*given).items()})
    assert numbers(optimise(1, *crops()))["skipped"] == 1
    assert unchanged(before, state(optimise))


@pytest.mark.parametrize("clip", [1e-3, 1e9, 0.0])
def test_clipping_bounds_the_gradient_that_adam_sees(clip):
    """After one step Adam's first moment is a tenth of the gradient that it was given."""
    optimise = optimisation(gradient_clip=clip)
    norm = numbers(optimise(0, *crops()))["gradient_norm"]
    assert 1e-3 < norm < 1e9
    first = [state["exp_avg"] for state in optimise.optimizer.state.values()]
    assert torch.nn.utils.get_total_norm(first) == pytest.approx(0.1 * (1e-3 if clip == 1e-3 else norm), rel=1e-3)


def test_anchors_are_of_seed_and_step_and_the_rate_is_scheduled(monkeypatch):
    seeds = set()
    for seed in (0, 1):
        optimise = optimisation(seed=seed, schedule="cosine", iterations=3)
        monkeypatch.setattr(optimise, "_run", lambda *_, drawn=optimise._generator: seeds.add(drawn.initial_seed()))
        for number in range(3):
            optimise(number, *crops())
            rate = learning_rate(optimise.config, number)
            assert optimise.optimizer.learning_rate == pytest.approx(rate, rel=1e-6)
    assert len(seeds) == 6


def test_ridge_fallbacks_reach_the_journal(monkeypatch):
    monkeypatch.setattr("restoration.whitening.RIDGE_LADDER", (-2.0, 1e-4, 1e-2, 1.0))
    optimise, journal = optimisation(), Journal()
    journal.add(0, optimise(0, *crops()), [])
    (record,) = journal.read()
    assert record.numbers["ridge_fallbacks"] == 2
    assert "2 colour transfers" in journal.summary()


def needs_a_number(op):
    """Or a size that depends on numbers, on the host."""
    return any(name in op.name() for name in ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "unique"))


def test_a_step_asks_for_no_number():
    optimise = optimisation()
    optimise(0, *crops())
    with compare.Recorder(needs_a_number) as recorder:
        outcome = optimise(1, *crops())
    assert [op.name() for op, _ in recorder.calls] == []
    with compare.Recorder(needs_a_number) as recorder:
        outcome.numbers[0].item()
    assert recorder.calls


def test_reversible_and_plain_steps_train_alike():
    curves = []
    for reversible in (True, False):
        optimise = optimisation(reversible=reversible)
        curves.append([numbers(optimise(step, *crops(seed=step)))["total"] for step in range(3)])
    assert curves[0] == pytest.approx(curves[1], rel=1e-6)


@pytest.mark.slow
def test_reversible_and_plain_training_agree_for_long():
    curves = []
    for reversible in (True, False):
        optimise = optimisation(reversible=reversible, blocks=2)
        curves.append([numbers(optimise(step, *crops(seed=step % 4)))["total"] for step in range(20)])
    assert curves[0] == pytest.approx(curves[1], rel=1e-5)


def test_bf16_is_of_network_and_loss_network():
    features = loss_features()
    for precision, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        step = build_step(make_config("small", precision=precision), features)
        assert step.network.precision == precision
        assert step.losses.features.block4_conv1_weight.dtype == dtype
        assert all(parameter.dtype == torch.float32 for parameter in step.parameters())


def test_each_step_rounds_the_parameters_of_its_own_once(monkeypatch):
    optimise = optimisation(precision="bf16")
    rounded = optimise.module.network._rounded
    copies = []
    of = rounded.of
    monkeypatch.setattr(rounded, "of", lambda blocks: copies.append(blocks) or of(blocks))
    for number in range(2):
        before = [parameter.detach().bfloat16() for parameter in optimise.module.network.parameters()]
        optimise(number, *crops())
        assert len(copies) == number + 1
        assert unchanged(before, [parameter.bfloat16() for parameter in rounded._copy.parameters()])


CONVOLUTIONS = (torch.ops.aten.convolution.default, torch.ops.aten.convolution_backward.default)


@pytest.mark.parametrize("cafe", [True, False])
@pytest.mark.parametrize(("fast", "dtype"), [(True, torch.bfloat16), (False, torch.float32)])
def test_a_step_in_bf16_convolves_in_what_the_processor_is_fast_at(fast, dtype, cafe, monkeypatch):
    monkeypatch.setattr(convolution, "has_fast_bf16", lambda: fast)
    with compare.Recorder(lambda op: op in CONVOLUTIONS) as recorder:
        optimisation(precision="bf16", cafe=cafe)(0, *crops())
    assert {value.dtype for _, args in recorder.calls for value in args if torch.is_tensor(value)} == {dtype}


def test_tf32_is_refused_on_a_cpu(tmp_path):
    settings = make_config("small", precision="tf32")
    for work in (
        lambda: train(tmp_path, tmp_path / "run", settings, device=CPU),
        lambda: profile_training(tmp_path, settings, device=CPU),
    ):
        with pytest.raises(UserError, match="--precision tf32 is of CUDA devices, got the device cpu"):
            work()


@pytest.fixture
def cudnn():
    """Whose tf32 a test may set in either way."""
    yield torch.backends.cudnn
    torch.backends.cudnn.allow_tf32 = False


@pytest.mark.parametrize("before", [True, False, "tf32", "ieee"])
def test_tf32_holds_during_a_step_alone_whichever_setting_was_used(cudnn, monkeypatch, before):
    older = isinstance(before, bool)
    if older:
        cudnn.allow_tf32 = before
    else:
        cudnn.conv.fp32_precision = before

    def settings():
        # The older one cannot be read after the newer ones were used.
        tf32 = cudnn.allow_tf32 if older else None
        return tf32, cudnn.conv.fp32_precision, cudnn.rnn.fp32_precision, cudnn.benchmark

    outside, within = settings(), []
    optimise = optimisation(precision="tf32")
    monkeypatch.setattr(
        optimise, "_run", lambda *_: within.append((cudnn.allow_tf32, cudnn.conv.fp32_precision == "tf32"))
    )
    for precision, wanted in (("tf32", True), ("fp32", False), ("bf16", True)):
        optimise.config = make_config("small", precision=precision)
        optimise(0, *crops())
        assert within.pop() == (wanted, wanted) and settings() == outside


def test_what_is_captured():
    module = torch.nn.Linear(1, 1)
    assert graph.why_not_captured(module, torch.device("cuda")) is None
    assert graph.why_not_captured(module, CPU) == "the device is cpu"
    wrapped = torch.nn.parallel.DistributedDataParallel.__new__(torch.nn.parallel.DistributedDataParallel)
    assert "processes" in graph.why_not_captured(wrapped, torch.device("cuda"))


def test_a_failed_capture_is_reported_once_and_steps_go_on(monkeypatch, caplog):
    drawn, streams, generator = [], [], torch.Generator()
    update = graph.CapturedUpdate(lambda *_: drawn.append(torch.rand(1, generator=generator).item()), generator)

    def fail(images):
        torch.rand(1, generator=generator)
        try:
            raise RuntimeError("operation not permitted when stream is capturing\nmore")
        finally:  # as torch.cuda.graph ends it
            raise RuntimeError("operation failed due to a previous error during capture")

    monkeypatch.setattr(update, "_warm_up", lambda images: update._update(*images))
    monkeypatch.setattr(update, "_capture", fail)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: "the stream before")
    monkeypatch.setattr(torch.cuda, "set_stream", streams.append)
    with caplog.at_level(logging.WARNING):
        for _ in range(graph.WARM_UP + 3):
            generator.manual_seed(5)
            update(*crops())
    # Each as if there had been no attempt.
    assert drawn == [torch.rand(1, generator=torch.Generator().manual_seed(5)).item()] * (graph.WARM_UP + 3)
    assert [record.getMessage() for record in caplog.records] == [
        "steps start kernel by kernel, for they cannot be captured: operation not permitted when stream is capturing"
    ]
    assert streams == ["the stream before"]
    update = graph.CapturedUpdate(update._update, torch.Generator())
    monkeypatch.setattr(update, "_capture", fail)
    monkeypatch.setattr(update, "_can_go_on", lambda: False)
    with pytest.raises(UserError, match=r"captured as a CUDA graph \(operation not permitted .*; give --no-capture"):
        update._try_to_capture(crops())


def test_a_replay_takes_new_pictures_and_spares_what_the_last_one_found():
    """Outcomes are read some steps later."""
    own = [torch.zeros(1, 3, 2, 2) for _ in range(2)]
    outcome = Outcome(("sum",), torch.zeros(1), torch.zeros(1, 3, 2, 2))

    def replay():
        outcome.numbers.copy_(own[0].mean() + own[1].mean())
        outcome.result.copy_(own[0])

    update = graph.CapturedUpdate(None, torch.Generator())
    update._inputs, update._outcome, update._graph = own, outcome, mock.Mock(replay=replay)
    found = [update(torch.full_like(own[0], number), torch.full_like(own[1], 10 * number)) for number in (1, 2, 3)]
    assert [one.numbers.item() for one in found] == [11, 22, 33]
    assert [one.result.mean().item() for one in found] == [1, 2, 3]


@pytest.mark.parametrize("wish", [True, False])
def test_convolutions_take_one_algorithm(monkeypatch, wish):
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", wish)
    with step._convolutions(tf32=False):
        assert not torch.backends.cudnn.benchmark
    assert torch.backends.cudnn.benchmark == wish


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("batch", [1, 2])
def test_replayed_steps_are_the_eager_ones(batch):
    device = torch.device("cuda")
    curves = []
    for capture in (True, False):
        settings = make_config("small", crop=32, batch=batch, blocks=1, capture=capture)
        torch.manual_seed(0)
        optimise = Optimisation(build_step(settings, loss_features()).to(device), settings, device)
        images = [[crop.to(device) for crop in crops(seed=step, batch=batch)] for step in range(graph.WARM_UP + 3)]
        curves.append([numbers(optimise(step, *pair))["total"] for step, pair in enumerate(images)])
        assert not capture or optimise._run._graph is not None
    assert curves[0] == pytest.approx(curves[1], rel=1e-3)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_capture_that_waits_for_the_device_ends_in_eager_steps_or_an_error():
    """In a process of its own: after a capture that broke off, PyTorch may not work as before."""
    code = """
import torch
from restoration import graph
from restoration.errors import UserError

def update(degraded, reference):
    drawn = torch.rand(1, generator=generator, device="cuda")
    torch.cuda.synchronize()
    return drawn

generator = torch.Generator("cuda")
captured = graph.CapturedUpdate(update, generator)
images = [torch.rand(1, 3, 32, 32, device="cuda") for _ in range(2)]
drawn = []
try:
    for _ in range(graph.WARM_UP + 2):
        generator.manual_seed(5)
        drawn.append(captured(*images).item())
    assert set(drawn) == {drawn[0]}
except UserError as error:
    assert "--no-capture" in str(error)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_other_sizes_than_the_captured_ones_are_eager(monkeypatch):
    eager, replayed = [], []
    update = graph.CapturedUpdate(lambda *images: eager.append(images), torch.Generator())

    def capture(images):
        update._inputs, update._graph = images, object()

    monkeypatch.setattr(update, "_warm_up", lambda images: update._update(*images))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: None)
    monkeypatch.setattr(update, "_capture", capture)
    monkeypatch.setattr(update, "_replay", replayed.append)
    for _ in range(graph.WARM_UP + 2):
        update(*crops())
    update(*crops(side=40))
    assert len(eager) == graph.WARM_UP + 1 and len(replayed) == 2

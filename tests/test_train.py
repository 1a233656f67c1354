"""The training loop: resuming to the bit, stopping, divergence, what a run leaves behind."""

import itertools
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from unittest import mock

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_runs import config, tensors

from restoration.checkpoints import load_checkpoint, load_network
from restoration.collection import find_paintings
from restoration.dataset import build_dataset
from restoration.distributed import World
from restoration.errors import UserError
from restoration.journal import Journal, TrainingDivergedError
from restoration.loader import load_batches
from restoration.profile import profile_training
from restoration.runs import checkpoints_of, newest_checkpoint, steps_done
from restoration.step import Optimisation, TrainingStep
from restoration.train import (
    _warn_of_imbalance,
    build_step,
    statistics_of,
    stop_requests,
    train,
    training_pairs,
    until_they_end,
)
from restoration.vgg import loss_features

CPU = torch.device("cpu")


def test_a_run_leaves_checkpoints_scalars_pictures_settings_and_weights(paintings, tmp_path):
    run = tmp_path / "run"
    last = train(paintings, run, config(), device=CPU)
    assert last == newest_checkpoint(run) == run / "checkpoint-0000004.safetensors"
    assert json.loads((run / "config.json").read_text())["crop"] == 24
    events = EventAccumulator(str(run))
    events.Reload()
    losses = {f"loss/{name}" for name in ("ccp", "style", "matting", "cycle", "total")}
    measured = {f"step/{name}" for name in ("gradient_norm", "ridge_fallbacks", "largest_stream")}
    assert losses | measured <= set(events.Tags()["scalars"])
    assert events.Tags()["images"]
    assert not load_network(run / "network.safetensors").training
    description = load_checkpoint(last).description
    assert description["step"] == 4 and description["versions"]["torch"] == torch.__version__


def test_the_seed_chooses_the_first_weights(paintings, tmp_path, monkeypatch):
    monkeypatch.setattr("restoration.train._run_steps", lambda run, config, step_module, *_: step_module)
    one, same, other = (
        torch.cat(
            [weights.flatten() for weights in train(paintings, tmp_path, config(seed=seed), device=CPU).parameters()]
        )
        for seed in (1, 1, 2)
    )
    assert torch.equal(one, same) and not torch.equal(one, other)


def test_given_vgg_weights_are_of_losses_and_nearest_pairs(paintings, tmp_path, monkeypatch):
    vgg, given, features = tmp_path / "vgg.pth", [], loss_features()
    shutil.copytree(paintings, tmp_path, dirs_exist_ok=True)
    (tmp_path / "ink/0.png").write_text("no image")

    def measure(path, pictures):
        given.append((path, len(list(pictures))))
        return "means"

    monkeypatch.setattr("restoration.train.measure_channel_means", measure)
    for name in ("load_vgg_weights", "loss_features", "metric_features"):
        monkeypatch.setattr(f"restoration.train.{name}", lambda *arguments: given.append(arguments) or features)
    train(tmp_path, tmp_path / "run", config(iterations=1, pairing="nearest"), device=CPU, vgg=vgg)
    assert given == [(vgg,), (vgg,), (vgg, 5), (vgg, "means")]


@pytest.mark.parametrize(
    "error", [UserError("0.png: no such file"), RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. ")]
)
def test_where_no_more_pictures_come_what_was_trained_is_saved(paintings, tmp_path, monkeypatch, capsys, error):
    whole = train(paintings, tmp_path / "whole", config(iterations=3), device=CPU)

    def load_some(*arguments):
        yield from itertools.islice(load_batches(*arguments), 3)
        raise error

    monkeypatch.setattr("restoration.train.load_batches", load_some)
    with pytest.raises(UserError):
        train(paintings, tmp_path / "run", config(iterations=9, checkpoint_every=9), device=CPU)
    (saved,) = checkpoints_of(tmp_path / "run")
    assert f"saved {saved}, from which --resume goes on" in capsys.readouterr().out
    expected, found = tensors(whole), tensors(saved)
    assert all(torch.equal(tensor, found[name]) for name, tensor in expected.items())

    def load_none(*arguments):
        raise error
        yield

    monkeypatch.setattr("restoration.train.load_batches", load_none)
    with pytest.raises(UserError):
        train(paintings, tmp_path / "none", config(), device=CPU)
    assert not checkpoints_of(tmp_path / "none") and "saved" not in capsys.readouterr().out
    monkeypatch.setattr("restoration.train.load_batches", load_some)
    poison(monkeypatch, 2, 3)  # the last step: what came before it may have spoiled the weights
    with pytest.raises(UserError):
        train(paintings, tmp_path / "doubtful", config(iterations=9, checkpoint_every=9), device=CPU)
    assert not checkpoints_of(tmp_path / "doubtful")


def test_of_several_processes_none_saves_alone():
    def load_none():
        yield {}
        raise UserError("0.png: no such file")

    saved = []
    for size in (1, 2):
        with pytest.raises(UserError, match="no such file"):
            list(until_they_end(load_none(), World(size=size), lambda size=size: saved.append(size)))
    assert saved == [1]


def test_pairs_are_as_the_settings_say_and_damaged_files_told(paintings, tmp_path, capsys):
    shutil.copytree(paintings, tmp_path, dirs_exist_ok=True)
    damaged = tmp_path / "ink/0.png"
    damaged.write_text("no image")
    settings = config(pairing="nearest", seed=5, largest_box=1.5, workers=2, cache_mb=3)
    dataset = training_pairs(find_paintings(tmp_path), settings, None)
    assert (dataset.crop, dataset.seed, dataset.scale_range) == (24, 5, (1.0, 1.5))
    assert dataset._nearest is not None and dataset._pictures._limit == 3 * 2**20 // 2
    assert f"1 damaged files left out: {damaged}" in capsys.readouterr().out


def test_a_missing_picture_of_a_data_set_is_left_out(paintings, tmp_path, capsys):
    build_dataset(paintings, tmp_path / "data", crop=32, stride=32)
    lost = sorted(tmp_path.glob("data/train/*/*.png"))[0]
    lost.unlink()
    train(tmp_path / "data", tmp_path / "run", config(iterations=1), device=CPU)
    assert f"1 damaged files left out: {lost}" in capsys.readouterr().out


def test_a_description_has_unit_length_in_each_layer():
    layers = [torch.rand(1, 2, 4, 5), 100 * torch.rand(1, 3, 2, 3)]
    description = statistics_of(lambda images: layers)(torch.rand(3, 8, 8))
    for found, (layer,) in zip(description.split([4, 6]), layers, strict=True):
        expected = torch.cat((layer.mean((1, 2)), layer.std((1, 2))))
        torch.testing.assert_close(found, expected / expected.norm())


def test_workers_and_cache_change_nothing(paintings, tmp_path):
    plain = tensors(train(paintings, tmp_path / "plain", config(workers=0, cache_mb=0), device=CPU))
    cached = tensors(train(paintings, tmp_path / "cached", config(workers=2, cache_mb=1), device=CPU))
    assert all(torch.equal(tensor, cached[name]) for name, tensor in plain.items())


def test_a_run_starts_from_given_weights(paintings, tmp_path):
    train(paintings, tmp_path / "first", config(), device=CPU)
    weights = tmp_path / "first" / "network.safetensors"
    second = train(
        paintings, tmp_path / "second", config(iterations=1, learning_rate=1e-30), device=CPU, initial_weights=weights
    )
    started = load_checkpoint(second).part("network.")
    for name, tensor in load_checkpoint(weights).part("network.").items():
        assert (tensor.float() - started[name]).abs().max() <= 1e-20, name
    with pytest.raises(UserError, match="--initial-weights"):
        train(paintings, tmp_path / "second", config(), device=CPU, initial_weights=weights, resume=True)
    with pytest.raises(UserError, match="another architecture"):
        train(paintings, tmp_path / "third", config(blocks=2), device=CPU, initial_weights=weights)
    assert not (tmp_path / "third").exists()


def test_parameters_move_and_only_the_newest_checkpoints_stay(paintings, tmp_path):
    run = tmp_path / "run"
    train(paintings, run, config(checkpoint_every=1, keep_checkpoints=2), device=CPU)
    kept = sorted(path.name for path in run.glob("checkpoint-*"))
    assert kept == ["checkpoint-0000003.safetensors", "checkpoint-0000004.safetensors"]
    before, after = (tensors(run / name) for name in kept)
    moved = [name for name in before if name.startswith("network.") and not torch.equal(before[name], after[name])]
    assert len(moved) > 10


def test_bf16_and_nearest_pairs_and_ablations_train(paintings, tmp_path):
    settings = {"precision": "bf16", "pairing": "nearest", "dpca": False, "cafe": False, "ccpl": False}
    last = train(paintings, tmp_path / "run", config(iterations=2, **settings), device=CPU)
    assert not any(name.startswith("losses.") for name in tensors(last))


def poison(monkeypatch, from_step, to_step):
    """Makes the style loss of these steps NaN."""
    real, steps = TrainingStep.forward, itertools.count()

    def poisoned(module, *arguments):
        outcome = real(module, *arguments)
        if from_step <= next(steps) < to_step:
            outcome.losses["style"] = outcome.losses["style"] * float("nan")
        return outcome

    monkeypatch.setattr(TrainingStep, "forward", poisoned)


def test_a_bad_step_is_skipped_and_reported(paintings, tmp_path, monkeypatch, capfd):
    run = tmp_path / "run"
    poison(monkeypatch, 2, 3)
    smoothed = {}
    monkeypatch.setattr("restoration.train._status", lambda shown, rate: smoothed.update(shown))
    data = tmp_path / "[bold]a[" / "b]"  # what rich would take for markup
    shutil.copytree(paintings, data)
    after = train(data, run, config(iterations=3, checkpoint_every=1), device=CPU)
    before = tensors(run / "checkpoint-0000002.safetensors")
    for name, value in before.items():
        assert torch.equal(value, tensors(after)[name]), name
    shown = capfd.readouterr().out
    assert "skipped step 2: loss or gradient is not finite" in shown and "style nan" in shown
    file = rf"{re.escape(str(data))}/\w+/\d\.png"
    assert re.search(rf" on {file}, {file}\n", shown)
    assert "1 steps were skipped, the last 1 of all among them: the weights may be past use" in shown
    last = train(data, run, config(checkpoint_every=1), device=CPU, resume=True)
    assert any(not torch.equal(value, tensors(last)[name]) for name, value in before.items())
    assert {"ccp", "style", "matting", "cycle", "total"} == smoothed.keys()
    assert all(map(math.isfinite, smoothed.values()))


def test_losses_of_zero_are_told_without_a_comparison():
    progress = mock.Mock()
    _warn_of_imbalance({"matting": 0.0, "total": 0.0}, progress)
    assert progress.console.print.call_count == 1


def test_a_loss_that_drowns_the_others_is_told(paintings, tmp_path, capfd):
    alone = {"ccpl": False, "style_weight": 0.0, "matting_weight": 0.0}
    for weight, others, told in ((10.0, {}, False), (1e8, {}, True), (1e7, alone, False)):
        train(paintings, tmp_path / f"{weight}", config(iterations=2, cycle_weight=weight, **others), device=CPU)
        shown = " ".join(capfd.readouterr().out.split())
        assert shown.count("weighted losses at step 0: ") == 1
        assert ("one of them exceeds all others by more than 100 times" in shown) == told


DOUBTFUL = "checkpoint-0000002.safetensors, which may be past use"


@pytest.mark.parametrize(
    ("every", "left", "advice"),
    [
        (1, [1, 2], f"once {DOUBTFUL}, is removed, --resume goes on from checkpoint-0000001.safetensors"),
        (2, [2], "checkpoint-0000002.safetensors may be past use, and there is no other"),
        (3, [], "no checkpoint was made"),
    ],
)
def test_divergence_stops_and_says_where_to_go_on(paintings, tmp_path, monkeypatch, every, left, advice):
    """Step 1 may have spoiled the weights: nothing after it proves checkpoint 2, and no later one is made."""
    run = tmp_path / "run"
    poison(monkeypatch, 2, 1_000)
    with pytest.raises(TrainingDivergedError, match=rf"step 11: .*style nan.*\.png.*; {advice}$"):
        train(paintings, run, config(iterations=50, checkpoint_every=every, keep_checkpoints=1), device=CPU)
    assert [path.name for path in checkpoints_of(run)] == [f"checkpoint-{step:07d}.safetensors" for step in left]


def test_a_checkpoint_waits_for_a_step_that_is_not_skipped(paintings, tmp_path, monkeypatch):
    run = tmp_path / "run"
    poison(monkeypatch, 1, 2)
    train(paintings, run, config(iterations=5), device=CPU)
    assert [path.name for path in checkpoints_of(run)] == [f"checkpoint-{step:07d}.safetensors" for step in (3, 4, 5)]


def test_a_run_of_skipped_steps_alone_leaves_no_weights(paintings, tmp_path, monkeypatch):
    poison(monkeypatch, 0, 1_000)
    with pytest.raises(TrainingDivergedError, match="all 2 steps were skipped; no checkpoint was made"):
        train(paintings, tmp_path / "run", config(iterations=2, checkpoint_every=1), device=CPU)
    assert not list(tmp_path.glob("run/*.safetensors"))


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. "), "take fewer --workers"),
        (RuntimeError("DataLoader worker (pid(s) 7) exited unexpectedly"), "take fewer --workers"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "take a smaller --crop or --batch"),
        (torch.OutOfMemoryError("CUDA out of memory"), "take a smaller --crop or --batch"),
    ],
)
def test_what_the_system_puts_an_end_to_is_one_line(paintings, tmp_path, monkeypatch, error, told):
    def fail(*_):
        raise error

    monkeypatch.setattr(Optimisation, "__call__", fail)
    before = threading.excepthook
    with pytest.raises(UserError, match=told):
        train(paintings, tmp_path / "run", config(), device=CPU)
    assert threading.excepthook is before
    with pytest.raises(UserError, match=told):
        profile_training(paintings, config(), device=CPU, steps=1)
    monkeypatch.setattr(Optimisation, "__call__", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train(paintings, tmp_path / "other", config(), device=CPU)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_that_comes_again_later_acts_at_once_and_those_after_training_as_before(number, monkeypatch):
    acted = []

    def own(number, frame):
        acted.append(number)

    before = signal.signal(number, own)
    try:
        with stop_requests() as stop:
            assert stop.signal == 0
        assert signal.getsignal(number) is own
        with stop_requests() as stop:
            for _ in range(2):
                signal.raise_signal(number)
                assert stop.signal == number and not acted
            monkeypatch.setattr("restoration.train.AGAIN", -1.0)
            signal.raise_signal(number)
            assert acted
    finally:
        signal.signal(number, before)


def test_nohup_is_obeyed():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stop_requests() as stop:
            signal.raise_signal(signal.SIGHUP)
            assert stop.signal == 0
    finally:
        signal.signal(signal.SIGHUP, before)


def test_what_a_signal_saves_among_skipped_steps_may_be_past_use(paintings, tmp_path, monkeypatch):
    poison(monkeypatch, 2, 1_000)
    add = Journal.add

    def interrupt(journal, step, *arguments):
        add(journal, step, *arguments)
        if step == 3:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Journal, "add", interrupt)
    with pytest.raises(InterruptedError, match="which may be past use: the last 2 steps were skipped"):
        train(paintings, tmp_path / "run", config(iterations=9, checkpoint_every=2), device=CPU)
    assert [steps_done(path) for path in checkpoints_of(tmp_path / "run")] == [2, 4]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signals_save_before_leaving(paintings, tmp_path, number):
    run = tmp_path / "run"
    command = [sys.executable, "-m", "restoration", "train", "--data", paintings, "--out", run, "--preset", "small"]
    options = ["--crop", "24", "--batch", "1", "--blocks", "1", "--checkpoint-every", "2", "--workers", "1"]
    process = subprocess.Popen(
        [*map(str, command), *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),  # these tests may run under nohup
    )
    deadline = time.monotonic() + 120
    while newest_checkpoint(run) is None and time.monotonic() < deadline:
        time.sleep(0.1)
    os.killpg(process.pid, number)  # the loader's process, too
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 128 + number
    assert "stopped by signal" in errors and "Traceback" not in errors
    assert f"saved {newest_checkpoint(run)}" in errors.replace("\n", "")
    assert load_checkpoint(newest_checkpoint(run)).description["step"] >= 2


def test_rejects(paintings, tmp_path, monkeypatch):
    run = tmp_path / "run"
    with pytest.raises(UserError, match="no checkpoint to resume from"):
        train(paintings, run, config(), device=CPU, resume=True)
    with pytest.raises(UserError, match="not a folder"):
        train(tmp_path / "nowhere", run, config(), device=CPU)
    with pytest.raises(UserError, match="unknown style 'oil'; known styles: green, ink"):
        train(paintings, run, config(), device=CPU, styles=["oil"])
    with pytest.raises(UserError, match="--out must be a name in UTF-8"):
        train(paintings, tmp_path / "\udcff", config(), device=CPU)
    assert not run.exists()
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"run: cannot be written to .*file is no folder"):
        train(tmp_path / "nowhere", tmp_path / "file" / "run", config(), device=CPU)
    monkeypatch.setattr("os.access", lambda path, mode: False)
    with pytest.raises(UserError, match=f"run: cannot be written to .{tmp_path} takes no files"):
        train(tmp_path / "nowhere", run, config(), device=CPU)
    monkeypatch.undo()
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "network.safetensors").touch()
    with pytest.raises(UserError, match=r"network\.safetensors: is of something else and would be written over"):
        train(paintings, foreign, config(), device=CPU)
    (foreign / "config.json").write_text('{"mine": 1}')
    with pytest.raises(UserError, match=r"config\.json: is of something else and would be written over"):
        train(paintings, foreign, config(), device=CPU)
    assert (foreign / "config.json").read_text() == '{"mine": 1}'
    train(paintings, run, config(iterations=1), device=CPU)
    with pytest.raises(UserError, match="holds a training run already"):
        train(paintings, run, config(), device=CPU)
    with pytest.raises(UserError, match="reached step 1 already"):
        train(paintings, run, config(iterations=1), device=CPU, resume=True)
    with pytest.raises(UserError, match="another architecture"):
        train(paintings, run, config(blocks=2), device=CPU, resume=True)


def test_what_is_wrong_beside_the_paintings_is_said_before_they_are_read(tmp_path, paintings, monkeypatch):
    run = tmp_path / "run"
    train(paintings, run, config(iterations=1), device=CPU)
    monkeypatch.setattr("restoration.train.find_paintings", lambda *_, **__: pytest.fail("paintings were sought"))
    with pytest.raises(UserError, match="has reached step 1 already; give more --iterations"):
        train(paintings, run, config(iterations=1), device=CPU, resume=True)
    with pytest.raises(UserError, match="missing: no such checkpoint"):
        train(paintings, tmp_path / "other", config(), device=CPU, initial_weights=tmp_path / "missing")
    weights = run / "network.safetensors"
    with pytest.raises(UserError, match=f"{weights}: holds a network of another architecture"):
        train(paintings, tmp_path / "other", config(blocks=2), device=CPU, initial_weights=weights)
    with pytest.raises(UserError, match=r"missing\.pth: no such file of VGG19 weights"):
        train(paintings, tmp_path / "other", config(), device=CPU, vgg=tmp_path / "missing.pth")
    monkeypatch.setattr("restoration.profile.find_paintings", lambda *_, **__: pytest.fail("paintings were sought"))
    with pytest.raises(UserError, match=r"missing\.pth: no such file of VGG19 weights"):
        profile_training(paintings, config(), device=CPU, vgg=tmp_path / "missing.pth")


def test_one_backward_pass_gives_every_parameter_a_gradient():
    step = build_step(config(), loss_features())
    images = torch.nn.functional.interpolate(torch.rand(2, 3, 4, 4), size=(24, 24), mode="bicubic").clamp(0, 1)
    outcome = step(images[:1], images[1:], torch.Generator().manual_seed(0))
    sum(outcome.losses.values()).backward()
    silent = [name for name, parameter in step.named_parameters() if parameter.grad is None]
    assert not silent

"""Going on with a training run: to the bit, with its own inputs, from checkpoints that are its own and whole."""

import contextlib
import itertools
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_runs import config, tensors

from restoration.collection import find_paintings
from restoration.errors import UserError
from restoration.files import sole_writer
from restoration.runs import changed_inputs, checkpoints_of, inputs_of, newest_checkpoint, resumed_config
from restoration.train import train
from restoration.vgg import loss_features

CPU = torch.device("cpu")


def test_resuming_is_exact(paintings, tmp_path):
    whole = train(paintings, tmp_path / "whole", config(), device=CPU)
    train(paintings, tmp_path / "parts", config(iterations=3), device=CPU)
    assert newest_checkpoint(tmp_path / "parts").name == "checkpoint-0000003.safetensors"
    parts = train(paintings, tmp_path / "parts", config(), device=CPU, resume=True)
    expected, resumed = tensors(whole), tensors(parts)
    assert expected.keys() == resumed.keys()
    for name, tensor in expected.items():
        assert torch.equal(tensor, resumed[name]), name


def test_a_resumed_run_takes_the_place_of_what_followed_its_checkpoint(paintings, tmp_path, monkeypatch):
    """In TensorBoard, too, where its speed is that of its own steps."""
    run = tmp_path / "run"
    train(paintings, run, config(batch=2), device=CPU).unlink()
    # TensorBoard reads in order of names, which may be another than that of time within a second.
    next(run.glob("*tfevents*")).rename(run / "0.tfevents")
    monkeypatch.setattr("restoration.train.time", SimpleNamespace(monotonic=itertools.count().__next__))
    train(paintings, run, config(batch=2), device=CPU, resume=True)
    events = EventAccumulator(str(run))
    events.Reload()
    speeds = events.Scalars("speed/images_per_second")
    assert [speed.step for speed in speeds] == [0, 1, 2, 3]
    assert [speed.value for speed in speeds[2:]] == [2, 2]
    assert [image.step for image in events.Images("degraded | reference | result")] == [0, 2]


def test_the_last_checkpoint_says_that_the_weights_are_there(paintings, tmp_path, monkeypatch):
    saved = []
    for name in ("save_weights", "save_training"):
        monkeypatch.setattr(f"restoration.train.{name}", lambda *given, name=name: saved.append((name, given[-1])))
    train(paintings, tmp_path / "run", config(iterations=2, checkpoint_every=1), device=CPU)
    assert saved == [("save_training", 1), ("save_weights", 2), ("save_training", 2)]


def test_a_run_goes_on_with_its_styles_and_loss_network_and_without_its_settings_file(paintings, tmp_path, monkeypatch):
    run, features, seen = tmp_path / "run", loss_features(), []

    def note(path, found):
        seen.append((path, {painting.style for painting in found}))
        return features

    monkeypatch.setattr("restoration.train.load_vgg_weights", lambda path: None)
    monkeypatch.setattr("restoration.train.loss_network", note)
    monkeypatch.chdir(tmp_path)
    train(paintings, run, config(iterations=1), device=CPU, vgg=Path("vgg.pth"), styles=["ink"])
    (run / "config.json").unlink()
    monkeypatch.chdir(paintings)
    train(paintings, run, config(iterations=2), device=CPU, resume=True)
    assert seen == [(Path("vgg.pth"), {"ink"}), (tmp_path / "vgg.pth", {"ink"})]


def test_a_run_that_goes_on_with_other_paintings_or_weights_says_so(paintings, tmp_path, monkeypatch, capsys):
    run, vgg = tmp_path / "run", tmp_path / "vgg.pth"
    shutil.copytree(paintings, tmp_path / "moved")
    vgg.write_text("weights")
    monkeypatch.setattr("restoration.train.load_vgg_weights", lambda path: None)
    monkeypatch.setattr("restoration.train.loss_network", lambda *_: loss_features())
    train(paintings, run, config(iterations=1), device=CPU, vgg=vgg)
    train(tmp_path / "moved", run, config(iterations=2), device=CPU, resume=True)
    assert "trained with" not in capsys.readouterr().out
    (tmp_path / "moved" / "ink" / "0.png").unlink()
    vgg.write_text("others")
    train(tmp_path / "moved", run, config(iterations=3), device=CPU, resume=True)
    said = capsys.readouterr().out
    for name in ("the paintings", "the VGG weights"):
        assert f"{name} are not those that checkpoint-0000002.safetensors was trained with" in said


def test_what_an_older_program_did_not_save_is_no_other():
    now = {"paintings": "a", "vgg_contents": "b"}
    assert changed_inputs({}, now) == changed_inputs({"paintings": "a", "vgg_contents": None}, now) == []
    assert changed_inputs({"paintings": "c"}, now) == ["the paintings"]


def test_paintings_are_others_where_style_work_or_size_is_another(folders):
    first, *others = find_paintings(folders)

    def told(painting):
        return inputs_of(folders, [painting, *others], None, None)["paintings"]

    before = told(first)
    assert before == told(replace(first, split="train"))
    assert before not in [told(replace(first, **{name: "other"})) for name in ("style", "painting_id")]
    first.path.write_bytes(first.path.read_bytes() + b"more")
    assert before != told(first)


def test_a_folder_without_checkpoints_has_no_settings_to_resume(tmp_path):
    with pytest.raises(UserError, match=f"^{tmp_path}: holds no checkpoint to resume from$"):
        resumed_config(tmp_path, {})


def test_a_damaged_checkpoint_names_the_one_before_it(paintings, tmp_path):
    newest = train(paintings, tmp_path, config(), device=CPU)
    newest.write_bytes(newest.read_bytes()[:1000])
    with pytest.raises(UserError, match=r"truncated.*once it is removed, --resume goes on from checkpoint-0000002"):
        resumed_config(tmp_path, {})
    checkpoints_of(tmp_path)[0].unlink()
    with pytest.raises(UserError, match="there is no older one"):
        resumed_config(tmp_path, {})


def test_weights_that_are_named_like_a_checkpoint_are_not_gone_on_with(paintings, tmp_path):
    run = tmp_path / "run"
    train(paintings, run, config(iterations=1), device=CPU)
    shutil.copy(run / "network.safetensors", run / "checkpoint-0000002.safetensors")
    saying = "checkpoint-0000002.safetensors: is no checkpoint of a training run, .* goes on from checkpoint-0000001"
    with pytest.raises(UserError, match=saying):
        resumed_config(run, {})
    with pytest.raises(UserError, match="is no checkpoint of a training run"):
        train(paintings, run, config(iterations=3), device=CPU, resume=True)


def test_a_checkpoint_of_another_step_than_its_name_says_is_not_gone_on_with(paintings, tmp_path):
    """Newer ones would count as older than it, and be removed."""
    run = tmp_path / "run"
    train(paintings, run, config(iterations=2), device=CPU)
    newest = newest_checkpoint(run)
    newest.rename(run / "checkpoint-0000020.safetensors")
    with pytest.raises(UserError, match=r"checkpoint-0000020.safetensors: is of step 2, not of the 20 of its name"):
        resumed_config(run, {})


def test_copies_of_checkpoints_under_other_names_are_left_alone(paintings, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    copies = [
        "checkpoint-0000001-good.safetensors",
        "checkpoint-best.safetensors",
        "checkpoint-0000002.safetensors.old",
    ]
    for name in copies:
        (run / name).touch()
    last = train(paintings, run, config(checkpoint_every=1, keep_checkpoints=1), device=CPU)
    assert sorted(path.name for path in run.glob("checkpoint-*")) == sorted([*copies, last.name])
    assert newest_checkpoint(run) == last
    for name in ("checkpoint-9999999.safetensors", "checkpoint-10000000.safetensors"):
        (run / name).touch()
        assert newest_checkpoint(run).name == name


def test_a_run_that_went_on_in_the_folder_meanwhile_is_not_mixed_with_this_one(paintings, tmp_path, monkeypatch):
    run = tmp_path / "run"
    other = run / "checkpoint-0000089.safetensors"

    @contextlib.contextmanager
    def slow(folder):
        with sole_writer(folder):
            other.touch()
            yield

    monkeypatch.setattr("restoration.train.sole_writer", slow)
    with pytest.raises(UserError, match="another run has changed its checkpoints meanwhile"):
        train(paintings, run, config(), device=CPU)
    assert sorted(path.name for path in run.iterdir()) == [".lock", other.name]

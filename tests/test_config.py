"""Settings of training: presets, what overrides them, what is refused."""

import pytest
import torch
from tiny_runs import config, tensors

from restoration.checkpoints import load_checkpoint, save_checkpoint
from restoration.config import TrainingConfig, make_config
from restoration.errors import UserError
from restoration.losses import LossWeights
from restoration.runs import newest_checkpoint, resumed_config
from restoration.step import learning_rate
from restoration.train import LOG_EVERY, READ_EVERY, build_step, train
from restoration.vgg import loss_features

CPU = torch.device("cpu")


def test_loss_weights_are_settings():
    contrast = {"anchors": 7, "temperature": 0.2, "projection": False}
    step = build_step(config(style_weight=3.0, ccp_weight=0.0, style_distance="l2", **contrast), loss_features())
    assert step.losses.weights == LossWeights(ccp=0.0, style=3.0)
    assert step.losses.style_distance == "l2"
    assert (step.losses.contrast.num_anchors, step.losses.contrast.temperature) == (7, 0.2)
    assert not list(step.losses.parameters()) and list(build_step(config(), loss_features()).losses.parameters())
    with pytest.raises(UserError, match="--style-weight"):
        config(style_weight=-1.0)


def test_presets_and_overrides(tmp_path, paintings):
    paper = make_config("paper")
    assert (paper.crop, paper.batch, paper.iterations, paper.learning_rate) == (512, 2, 80_000, 1e-5)
    assert (paper.gradient_clip, paper.schedule, paper.style_distance, paper.blocks) == (0, "constant", "mse", 10)
    assert paper.loss_weights() == LossWeights(ccp=5, style=1, matting=1500, cycle=10)
    assert (paper.anchors, paper.temperature, paper.projection) == (64, 0.07, True)
    assert (paper.largest_box, paper.cache_mb) == (3, 512)
    assert (paper.checkpoint_every, paper.keep_checkpoints) == (500, 3)
    assert max(READ_EVERY.values()) <= LOG_EVERY <= 50, "a skipped step is told of after 50 at most"
    small = make_config("small")
    assert (small.crop, small.iterations, small.learning_rate, small.gradient_clip) == (128, 1_000, 1e-4, 5.0)
    assert make_config("small", crop=64, seed=None).crop == 64
    for overrides, message in (
        ({"crop": 8}, "--crop must be at least 24, got 8"),
        ({"learning_rate": float("nan")}, "--learning-rate must lie between"),
        ({"schedule": "linear"}, "--schedule must be one of constant, cosine, got 'linear'"),
        ({"batch": 0}, "--batch must be at least 1"),
        ({"seed": -1}, "--seed must be at least 0, got -1"),
        ({"seed": 2**64}, "--seed must be at most 1099511627776, got 18446744073709551616"),
        ({"largest_box": float("inf")}, "--largest-box must be at most 1000.0, got inf"),
        ({"ccp_weight": float("inf")}, "--ccp-weight must be at most 1000000000000.0, got inf"),
        ({"iterations": 10**400}, "--iterations must be at most 10000000, got 10000"),
        ({"anchors": 10**400}, "--anchors must be at most 10000000, got 10000"),
        ({"gradient_clip": float("nan")}, r"--gradient-clip must be at least 0\.0, got nan"),
        ({"temperature": 0.0}, "--temperature must be at least 0.001, got 0.0"),
        ({"workers": 10**6}, "--workers must be at most 1000, got 1000000"),
        ({"learning_rate": 1e-50}, "--learning-rate must lie between 1e-30 and 1, got 1e-50"),
        ({"gradient_clip": 1e-50}, "--gradient-clip must be 0 or at least 1e-30, got 1e-50"),
        ({f"{name}_weight": 0.0 for name in ("ccp", "style", "matting", "cycle")}, "one must be above 0"),
        (
            {"ccpl": False} | {f"{name}_weight": 0.0 for name in ("style", "matting", "cycle")},
            "--cycle-weight with --no-ccpl: one must be above 0",
        ),
    ):
        with pytest.raises(UserError, match=message):
            make_config("small", **overrides)
    with pytest.raises(UserError, match="--preset must be one of paper, small, got 'huge'"):
        make_config("huge")
    run = tmp_path / "run"
    train(paintings, run, config(iterations=1, seed=5), device=CPU)
    assert resumed_config(run, {"iterations": 9, "seed": None}) == config(iterations=9, seed=5)
    changes = {("blocks", 2): ("--blocks 1", "--blocks 2")}
    changes |= {(name, False): (f"--{name}", f"--no-{name}") for name in ("dpca", "cafe", "ccpl", "projection")}
    for (name, other), (kept, asked) in changes.items():
        with pytest.raises(UserError, match=f"{kept} must stay, as when the run in {run} was started, got {asked}"):
            resumed_config(run, {name: other})
    with pytest.raises(UserError, match="--batch must be at least 1, got 0"):
        resumed_config(run, {"batch": 0})
    path = newest_checkpoint(run)
    stored, description = tensors(path), load_checkpoint(path).description
    save_checkpoint(path, stored, {**description, "training": {**description["training"], "of_an_older_version": 1}})
    assert resumed_config(run, {}) == config(iterations=1, seed=5)


def test_learning_rate_schedules():
    constant, cosine = TrainingConfig(iterations=11), TrainingConfig(iterations=11, schedule="cosine")
    assert {learning_rate(constant, step) for step in range(11)} == {1e-5}
    rates = [learning_rate(cosine, step) for step in range(11)]
    assert rates[0] == pytest.approx(1e-5) and rates[-1] == pytest.approx(1e-7)
    assert rates == sorted(rates, reverse=True)

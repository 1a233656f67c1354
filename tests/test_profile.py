"""Where time and memory of a training step go."""

import re

import pytest
import torch
from tiny_runs import config

import restoration.parts
from restoration.parts import Stopwatch, measuring, part
from restoration.profile import profile_training

CPU = torch.device("cpu")


def test_a_profile_names_all_parts_and_keeps_nothing(paintings, tmp_path):
    table = profile_training(paintings, config(), device=CPU, steps=2)
    parts = dict(re.findall(r"^(\w[\w ]*?) +([\d.]+) ms", table, re.MULTILINE))
    losses = {f"{name} loss" for name in ("style", "matting", "cycle", "contrastive")}
    passes = {"loader", "encode", "transfer", "decode", "loss network", "backward", "optimiser", "everything else"}
    assert parts.keys() == losses | passes | {"step"}
    assert sum(map(float, parts.values())) == pytest.approx(2 * float(parts["step"]), rel=0.02, abs=1)
    assert re.search(r"peak memory: (\d+ MiB|unknown)", table)


def test_a_first_step_is_not_measured_and_five_are(paintings, monkeypatch):
    measured = []
    monkeypatch.setattr(
        "restoration.profile._step", lambda *arguments: measured.append(restoration.parts._running is not None)
    )
    assert "(mean of 5 after a first one)" in profile_training(paintings, config(), device=CPU)
    assert measured == [False] + [True] * 5


def test_profiles_of_one_seed_start_from_the_same_weights(paintings, monkeypatch):
    weights = []

    def keep_weights(step, batches, optimise):
        weights.append(torch.nn.utils.parameters_to_vector(optimise.module.parameters()))

    monkeypatch.setattr("restoration.profile._step", keep_weights)
    for _ in range(2):
        profile_training(paintings, config(), device=CPU, steps=1)
    assert torch.equal(weights[0], weights[-1])


def test_parts_within_parts_count_once(monkeypatch):
    clock = iter((0, 1, 3, 4, 7, 10))
    monkeypatch.setattr(Stopwatch, "_now", lambda stopwatch: next(clock))
    with part("unmeasured"):
        pass
    with measuring(CPU) as stopwatch, part("outer"):
        for _ in range(2):
            with part("inner"):
                pass
    assert stopwatch.seconds == {"outer": 5, "inner": 5}

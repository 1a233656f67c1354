"""Evaluation: what each method is judged by, failures that are counted, verdicts, the same answer twice."""

import json
import math
import os
from unittest import mock

import numpy as np
import pytest
import torch
from pictures import fill_the_disk
from PIL import Image

from restoration.baselines import BASELINES, untouched
from restoration.collection import Pair
from restoration.errors import UserError
from restoration.evaluate import (
    NETWORK,
    RANDOM_NETWORK,
    UNTOUCHED,
    Case,
    Evaluation,
    choose_cases,
    choose_methods,
    drawn_cases,
    evaluate,
    faded_cases,
    rows_apart,
)
from restoration.evaluation_report import check_output, markdown_table, summarise, write_report
from restoration.flow import Architecture, ReversibleNetwork
from restoration.metrics import colour_difference
from restoration.vgg import metric_features

CPU = torch.device("cpu")
FEATURES = metric_features()


def small_network(scale=1.0):
    torch.manual_seed(1)
    network = ReversibleNetwork(Architecture(4, 1, 1)).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(scale)
    return network


def picture(seed):
    """Noise in one colour, another one for each seed."""
    generator = torch.Generator().manual_seed(seed)
    return 0.8 * torch.rand(3, 1, 1, generator=generator) + 0.2 * torch.rand(3, 24, 32, generator=generator)


@pytest.fixture
def paintings(tmp_path):
    root = tmp_path / "paintings"
    (root / "ink").mkdir(parents=True)
    generator = np.random.default_rng(0)
    for number in range(2):
        coarse = Image.fromarray(generator.integers(0, 256, (6, 8, 3), dtype=np.uint8))
        coarse.resize((40, 30), Image.Resampling.BICUBIC).save(root / "ink" / f"{number}.png")
    return root


def results_by_hand(**scores):
    """Evaluations of one style; method -> a list of (relative Gram, SSIM, clipped) or None, a pair each."""

    def values(score):
        return score and dict(zip(("relative_gram", "ssim", "clipped"), score, strict=True))

    columns = {name.replace("_", " "): list(map(values, column)) for name, column in scores.items()}
    pairs = zip(*columns.values(), strict=True)
    return [Evaluation("ink", f"pair {n}", dict(zip(columns, row, strict=True)), {}) for n, row in enumerate(pairs)]


def test_every_method_is_scored_on_every_pair():
    cases = [Case("ink", "one", picture(0), picture(1)), Case("green", "two", picture(2), picture(3))]
    methods = choose_methods(small_network(), CPU, baselines=True)
    assert set(methods) == {NETWORK, RANDOM_NETWORK, *BASELINES}
    one, two = evaluate(iter(cases), methods, FEATURES)
    assert list(one.scores) == list(methods) and one.style == "ink" and two.name == "two"
    assert one.scores[UNTOUCHED]["ssim"] == 1 and one.scores[UNTOUCHED]["clipped"] == 0
    assert one.scores["Monge-Kantorovich"]["relative_gram"] < one.scores[UNTOUCHED]["relative_gram"]
    assert list(one.pictures) == ["degraded", "reference", *(name for name in methods if name != UNTOUCHED)]


def test_tint_is_measured_from_the_reference_and_clipping_from_the_degraded_painting():
    """sRGB red is at a* = 80.1, b* = 67.2, and clipped in each pixel."""
    red = torch.zeros(3, 16, 16)
    red[0] = 1
    methods = {NETWORK: lambda degraded, reference: reference, UNTOUCHED: lambda degraded, reference: degraded}
    (evaluation,) = evaluate(iter([Case("ink", "one", torch.full_like(red, 0.5), red)]), methods, FEATURES)
    scores = [evaluation.scores[name] for name in methods]
    assert [score["clipped"] for score in scores] == [1, 0]
    assert [score["tint"] for score in scores] == pytest.approx([0, math.hypot(80.1, 67.2)], abs=0.1)


def test_pictures_are_kept_no_larger_than_a_sheet_shows_them(monkeypatch):
    monkeypatch.setattr("restoration.evaluate.SHEET_CELL", 16)
    cases = [Case("ink", "one", picture(0), picture(1), picture(2))]
    (evaluation,) = evaluate(iter(cases), choose_methods(small_network(), CPU, baselines=False), None)
    assert {max(shown.shape) for shown in evaluation.pictures.values()} == {16}


def test_random_weights_are_always_the_same_ones():
    network = small_network()
    torch.manual_seed(5)
    expected = choose_methods(network, CPU, baselines=True)[RANDOM_NETWORK](picture(0), picture(1))
    torch.manual_seed(6)
    before = torch.random.get_rng_state()
    methods = choose_methods(network, CPU, baselines=True)
    assert torch.equal(methods[RANDOM_NETWORK](picture(0), picture(1)), expected)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_a_result_that_is_not_finite_counts_and_stops_nothing():
    cases = [Case("ink", "one", picture(0), picture(1))]
    (evaluation,) = evaluate(iter(cases), choose_methods(small_network(1e4), CPU, baselines=False), FEATURES)
    assert evaluation.scores[NETWORK] is None and evaluation.scores[UNTOUCHED] is not None
    assert evaluation.pictures[NETWORK].isfinite().all()
    summary = summarise([evaluation])
    assert summary["ink"][NETWORK]["finite"] == 0 and "ssim" not in summary["ink"][NETWORK]
    assert "0%" in markdown_table(summary)


def test_means_worst_and_shares():
    evaluations = results_by_hand(network=[(0.2, 0.9, 0.01), (0.4, 0.8, 0.03), None], untouched=[(0.3, 1.0, 0.0)] * 3)
    row = summarise(evaluations)["ink"][NETWORK]
    assert row["pairs"] == 3 and row["finite"] == pytest.approx(2 / 3)
    assert row["relative_gram"] == pytest.approx(0.3) and row["ssim"] == pytest.approx(0.85)
    assert row["clipped"] == pytest.approx(0.02) and row["most_clipped"] == 0.03
    assert row["nearer"] == 0.5


@pytest.mark.parametrize(
    "network, surpassed",
    [((0.2, 0.9), True), ((0.2, 0.89), False), ((0.31, 0.95), False), ((0.3, 0.95), False)],
)
def test_surpassed_needs_a_nearer_style_at_no_lower_ssim(network, surpassed):
    evaluations = results_by_hand(network=[(*network, 0)], untouched=[(1, 1, 0)], Reinhard=[(0.3, 0.9, 0)])
    summary = summarise(evaluations)
    assert summary["ink"]["Reinhard"]["surpassed"] is surpassed
    assert "surpassed" not in summary["ink"][UNTOUCHED]
    assert markdown_table(summary).count("| Reinhard") == 2  # the style, and all


def test_synthetic_scores_compare_with_the_original(paintings):
    pair = Pair(paintings / "ink" / "0.png", paintings / "ink" / "1.png", "ink")
    (case,) = faded_cases([pair], 512)
    (again,) = faded_cases([pair], 512)
    assert torch.equal(case.degraded, again.degraded)
    assert colour_difference(case.original, case.original) == 0
    methods = {NETWORK: lambda degraded, reference: case.original, UNTOUCHED: lambda degraded, reference: degraded}
    (evaluation,) = evaluate(iter([case]), methods, None)
    assert evaluation.scores[NETWORK] == {
        "ssim": 1.0,
        "ciede2000": 0.0,
        "clipped": evaluation.scores[NETWORK]["clipped"],
    }
    assert evaluation.scores[UNTOUCHED]["ciede2000"] > 2
    assert list(evaluation.pictures) == ["degraded", "reference", "original", NETWORK]


def test_a_painting_fades_the_same_way_wherever_it_lies(paintings, tmp_path):
    one = paintings / "ink" / "0.png"
    (tmp_path / one.name).write_bytes(one.read_bytes())
    first, second = faded_cases([Pair(path, one, "ink") for path in (one, tmp_path / one.name)], 64)
    assert torch.equal(first.degraded, second.degraded)


def test_each_painting_fades_in_its_own_way(paintings):
    one, reference, other = (paintings / "ink" / f"{number}.png" for number in range(3))
    other.write_bytes(one.read_bytes())
    first, second = faded_cases([Pair(path, reference, "ink") for path in (one, other)], 512)
    assert torch.equal(first.original, second.original) and not torch.equal(first.degraded, second.degraded)


def test_drawn_cases_are_the_demonstrations():
    cases = list(drawn_cases(96))
    assert [case.style for case in cases] == ["blue_green", "ochre"]
    for case in cases:
        assert case.degraded.shape == case.original.shape == case.reference.shape == (3, 64, 96)
        assert colour_difference(case.degraded, case.original) > 5


def test_choosing_cases(paintings):
    for synthetic in (False, True):
        cases, number = choose_cases(paintings, count=5, size=20, synthetic=synthetic)
        cases = list(cases)
        assert number == len(cases) == 2
        assert max(cases[0].degraded.shape) == max(cases[0].reference.shape) == 20
        assert (cases[0].original is not None) == synthetic
    assert choose_cases(paintings, count=1, size=20)[1] == 1
    with mock.patch("restoration.evaluate.evaluation_pairs", return_value=[]) as chosen:
        choose_cases(paintings, size=20)
    chosen.assert_called_once_with(paintings, None, 20)
    (paintings / "ink" / "1.png").unlink()
    with pytest.raises(UserError, match="two paintings of a style"):
        choose_cases(paintings, count=5, size=20, synthetic=True)
    with pytest.raises(UserError, match="--data must be given"):
        choose_cases(None, count=5, size=20)
    with pytest.raises(UserError, match="--size must be at least 1, got 0"):
        choose_cases(paintings, count=5, size=0)


@pytest.mark.parametrize("synthetic", [False, True])
def test_a_damaged_picture_is_found_before_the_work(paintings, synthetic):
    damaged = paintings / "ink" / "1.png"
    damaged.write_bytes(damaged.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"1.png: is damaged or truncated"):
        choose_cases(paintings, count=5, size=20, synthetic=synthetic)


def test_the_same_evaluation_twice_leaves_the_same_files(paintings, tmp_path):
    def run(out):
        cases, _ = choose_cases(paintings, count=5, size=32)
        evaluations = list(evaluate(cases, choose_methods(small_network(), CPU, baselines=True), FEATURES))
        check_output(out)
        write_report(evaluations, out, size=32)
        return {path.name: path.read_bytes() for path in out.iterdir()}

    first = run(tmp_path / "first")
    assert sorted(first) == ["contact_sheet.png", "metrics.json", "table.md"]
    assert first == run(tmp_path / "second")
    report = json.loads(first["metrics.json"])
    assert report["size"] == 32 and len(report["pairs"]) == 2
    assert all(math.isfinite(value) for value in report["pairs"][0]["scores"][NETWORK].values())
    with pytest.raises(UserError, match="exists already"):
        check_output(tmp_path / "first")


def test_a_sheet_of_many_pairs_shows_some_of_them(tmp_path, monkeypatch):
    assert [rows_apart(number) for number in (60, 61)] == [1, 2]
    monkeypatch.setattr("restoration.evaluate.SHEET_ROWS", 2)
    assert [rows_apart(number) for number in (1, 2, 3, 4, 5)] == [1, 1, 2, 2, 3]
    methods = dict.fromkeys((NETWORK, UNTOUCHED), untouched)
    cases = [Case("ink", str(number), picture(0), picture(1)) for number in range(5)]
    evaluations = list(evaluate(iter(cases), methods, FEATURES, shown_every=rows_apart(5)))
    assert [bool(evaluation.pictures) for evaluation in evaluations] == [True, False, False, True, False]
    write_report(evaluations, tmp_path, size=32)
    assert len(json.loads((tmp_path / "metrics.json").read_text())["pairs"]) == 5


def test_scores_are_kept_where_the_sheet_cannot_be_written(tmp_path, monkeypatch):
    methods = dict.fromkeys((NETWORK, UNTOUCHED), untouched)
    evaluations = list(evaluate(iter([Case("ink", "one", picture(0), picture(1))]), methods, FEATURES))

    def fail(*arguments, **options):
        raise UserError("contact_sheet.png: cannot be written (No space left on device)")

    monkeypatch.setattr("restoration.evaluation_report.write_image", fail)
    with pytest.raises(UserError, match="No space left"):
        write_report(evaluations, tmp_path, size=32)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.json", "table.md"]


def test_a_style_whose_name_is_no_utf8_is_written_as_it_is(tmp_path):
    methods = dict.fromkeys((NETWORK, UNTOUCHED), untouched)
    (evaluation,) = evaluate(iter([Case("\udcff", "one", picture(0), picture(1))]), methods, FEATURES)
    write_report([evaluation], tmp_path, size=32)
    assert b"| \xff " in (tmp_path / "table.md").read_bytes()


@pytest.mark.parametrize("name", ["metrics.json", "table.md", "contact_sheet.png"])
def test_what_appears_while_it_is_evaluated_is_replaced_by_force_alone(tmp_path, name):
    methods = dict.fromkeys((NETWORK, UNTOUCHED), untouched)
    evaluations = list(evaluate(iter([Case("ink", "one", picture(0), picture(1))]), methods, FEATURES))
    (tmp_path / name).write_text("theirs")
    with pytest.raises(UserError, match=f"{name}: exists already"):
        write_report(evaluations, tmp_path, size=32)
    assert (tmp_path / name).read_text() == "theirs"
    write_report(evaluations, tmp_path, size=32, force=True)
    assert (tmp_path / name).read_bytes() != b"theirs"


@pytest.mark.parametrize("name", ["metrics.json", "table.md", "contact_sheet.png"])
def test_what_cannot_be_written_is_found_before_the_work(tmp_path, name):
    (tmp_path / name).mkdir()
    with pytest.raises(UserError, match=f"{name}: is a folder, cannot be overwritten"):
        check_output(tmp_path, force=True)


def test_a_report_does_not_lie_among_the_paintings(tmp_path):
    (tmp_path / "data").mkdir()
    for out in (tmp_path / "data", tmp_path / "data" / "ink" / "scores"):
        with pytest.raises(UserError, match=f"{out}: must lie outside of {tmp_path / 'data'}"):
            check_output(out, tmp_path / "data", force=True)
    check_output(tmp_path / "data_scores", tmp_path / "data")


def test_a_folder_without_the_right_to_write_is_found_before_the_work(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path)
    with pytest.raises(UserError, match="cannot be written to"):
        check_output(tmp_path)


def test_a_full_disk_leaves_the_former_report(tmp_path, monkeypatch):
    cases = [Case("ink", "one", picture(0), picture(1))]
    evaluations = list(evaluate(iter(cases), choose_methods(small_network(), CPU, baselines=False), FEATURES))
    write_report(evaluations, tmp_path, size=32)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    fill_the_disk(monkeypatch)
    with pytest.raises(UserError, match=r"cannot be written \(No space left on device\)"):
        write_report(evaluations, tmp_path, size=64, force=True)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before

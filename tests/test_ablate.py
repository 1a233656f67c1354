"""The ablation: equal budgets, nothing done twice, verdicts that know about chance."""

import json
import shutil
import sys

import pytest
import torch
from pictures import fill_the_disk

from restoration import ablate
from restoration.ablate import DIVERGED, VARIANTS, WHOLE, Run, compare, plan, report
from restoration.checkpoints import save_network
from restoration.cli import main
from restoration.collection import evaluation_pairs
from restoration.config import make_config
from restoration.errors import UserError
from restoration.flow import Architecture, ReversibleNetwork
from restoration.journal import TrainingDivergedError
from restoration.runs import newest_checkpoint
from restoration.vgg import metric_features

TINY = ("--crop", "24", "--batch", "1", "--blocks", "1", "--size", "32", "--count", "1", "--device", "cpu")


SCORES = {"ssim": 0.9, "relative_gram": 0.2, "finite": 1.0}


def call(capsys, monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["restoration", "ablate", *map(str, arguments)])
    with pytest.raises(SystemExit) as left:
        main()
    return left.value.code or 0, *capsys.readouterr()


def test_runs_are_equal_but_for_one_switch_and_the_seed():
    planned = plan({"iterations": 7, "crop": 64}, seeds=2)
    assert [(variant, config.seed) for variant, config in planned] == [(v, seed) for seed in (0, 1) for v in VARIANTS]
    whole = make_config("small", iterations=7, crop=64, keep_checkpoints=1)
    for variant, config in planned:
        different = {name for name, value in config.to_dict().items() if value != whole.to_dict()[name]}
        assert different - {"seed"} == ({variant.split()[1].lower()} if variant != "all" else set())


def test_what_is_done_is_not_done_twice(paintings, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(ablate, "VARIANTS", {name: VARIANTS[name] for name in ("without CCPL", "all")})
    out = tmp_path / "out"
    arguments = ("--data", paintings, "--out", out, *TINY)

    def run(*options):
        """Runs the command; returns its exit code, and which folders of runs it wrote into."""
        before = {path: path.stat().st_mtime_ns for path in out.glob("*/*")}
        code, printed, error = call(capsys, monkeypatch, *arguments, *options)
        changed = {path.parent.name for path in out.glob("*/*") if path.stat().st_mtime_ns != before.get(path)}
        return code, printed + error, changed

    folders = {f"{variant}_seed{seed}" for variant in ("without_CCPL", "all") for seed in (0, 1)}
    code, printed, changed = run("--iterations", 1)
    assert code == 0 and changed == folders
    assert "that seeds alone explain" in printed and (out / "table.md").read_text() in printed
    found = json.loads((out / "ablation.json").read_text())
    assert len(found["runs"]) == 4 and found["settings"]["iterations"] == 1

    newest_checkpoint(out / "all_seed1").unlink()
    code, _, changed = run("--iterations", 1)
    assert code == 0 and changed == {"all_seed1"}
    assert json.loads((out / "ablation.json").read_text()) == found

    code, printed, changed = run("--iterations", 2)
    assert code == 0 and changed == folders and "all, seed 1: 1 of 2 steps done" in printed
    for options, message in (
        (("--iterations", 1), "has reached step 2 already"),
        (("--iterations", 2, "--learning-rate", 0.5), "was begun with learning_rate 0.0001, now 0.5"),
        (("--iterations", 2, "--precision", "bf16"), "was begun with precision fp32, now bf16"),
    ):
        code, printed, changed = run(*options)
        assert code == 2 and message in printed and not changed


@pytest.fixture
def ablated(paintings, tmp_path, capsys, monkeypatch):
    """A folder of paintings of two styles, and a function that ablates in one out.

    The latter returns exit code, standard error, and the names of the files of runs that it wrote.
    """
    monkeypatch.setattr(ablate, "VARIANTS", {WHOLE: VARIANTS[WHOLE]})
    data, out = tmp_path / "data", tmp_path / "out"
    for style in ("ink", "green"):
        shutil.copytree(paintings / "ink", data / style)

    def run(*options, data=data):
        before = {path: path.stat().st_mtime_ns for path in out.glob("*/*")}
        arguments = ("--data", data, "--out", out, *TINY, "--iterations", 1, *options)
        code, _, error = call(capsys, monkeypatch, *arguments)
        changed = {path.name for path in out.glob("*/*") if path.stat().st_mtime_ns != before.get(path)}
        return code, error, changed

    return data, out, run


def test_runs_of_other_paintings_are_not_taken_for_these(ablated):
    data, out, run = ablated
    assert run("--style", "ink")[0] == 0

    def refused(message, *options):
        code, error, changed = run(*options)
        assert code == 2 and f"all_seed0: {message}" in error and "take another --out" in error
        assert error.count("\n") == 1 and not changed

    refused("was begun with the styles ink, now green, ink")
    refused("was begun with the styles ink, now green", "--style", "green")
    (data / "MANIFEST.csv").write_text("file,painting_id\nink/0.png,a\nink/1.png,b\n")
    (data / "SPLIT.csv").write_text("painting_id,split\na,train\nb,test\n")
    refused("was begun with other paintings of ink than --data holds now", "--style", "ink")
    for table in ("MANIFEST.csv", "SPLIT.csv"):
        (data / table).unlink()
    moved = data.rename(data.with_name("moved"))
    assert run("--style", "ink", data=moved) == (0, "", set())
    moved.rename(data)
    (data / "ink" / "0.png").write_bytes((data / "ink" / "1.png").read_bytes())
    refused("was begun with other paintings of ink than --data holds now", "--style", "ink")
    (out / "all_seed0" / "paintings.json").unlink()
    refused("does not tell which paintings it was begun with", "--style", "ink")


def test_other_pairs_or_another_size_are_evaluated_and_nothing_is_trained(ablated, tmp_path):
    data, _, run = ablated
    table = tmp_path / "pairs.csv"
    table.write_text("degraded,reference\ngreen/0.png,ink/1.png\n")
    assert run("--style", "ink", "--pairs", table)[0] == 0
    (data / "green" / "0.png").write_bytes((data / "green" / "1.png").read_bytes())
    for options in ((), ("--size", 24)):
        code, _, changed = run("--style", "ink", "--pairs", table, *options)
        assert code == 0 and changed == {"scores.json"}


def test_a_run_that_is_trained_anew_is_evaluated_anew(ablated):
    _, out, run = ablated
    assert run()[0] == 0
    for folder in out.glob("*_seed*"):
        newest_checkpoint(folder).unlink()
    code, _, changed = run("--learning-rate", 0.01)
    assert code == 0 and "scores.json" in changed


def test_a_damaged_picture_of_the_pairs_is_found_before_the_work(ablated, tmp_path):
    data, out, run = ablated
    damaged = data / "green" / "0.png"
    damaged.write_bytes(damaged.read_bytes()[:-100])
    code, error, _ = run("--style", "ink")
    assert code == 2 and "0.png: is damaged or truncated" in error and error.count("\n") == 1 and not out.exists()


def test_pictures_of_one_pair_at_most_are_kept(paintings, tmp_path, monkeypatch):
    kept = []

    def evaluate(*arguments, **options):
        for evaluation in evaluate_all(*arguments, **options):
            kept.append(bool(evaluation.pictures))
            yield evaluation

    evaluate_all = ablate.evaluate
    monkeypatch.setattr(ablate, "evaluate", evaluate)
    save_network(tmp_path / "checkpoint-0000001.safetensors", ReversibleNetwork(Architecture(4, 1, 1)), {})
    pairs = evaluation_pairs(paintings, None, 2)
    ablate._evaluated(tmp_path, pairs, metric_features(), 16, torch.device("cpu"))
    assert len(kept) == len(pairs) > 1 and sum(kept) <= 1


def test_one_seed_or_no_size_is_refused(paintings, tmp_path, capsys, monkeypatch):
    code, _, err = call(capsys, monkeypatch, "--data", paintings, "--out", tmp_path / "out", *TINY, "--seeds", 1)
    assert code == 2 and "--seeds must be at least 2" in err and not (tmp_path / "out").exists()
    code, _, err = call(capsys, monkeypatch, "--data", paintings, "--out", tmp_path / "out", *TINY, "--seeds", 10**9)
    assert code == 2 and "--seeds must be at most 1000" in err and not (tmp_path / "out").exists()
    code, _, err = call(capsys, monkeypatch, "--data", paintings, "--out", tmp_path / "out", *TINY, "--size", 0)
    assert code == 2 and "--size must be at least 1, got 0" in err and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "name", ["ablation.json", "table.md", "all_seed1/scores.json", "without_CCPL_seed0/paintings.json"]
)
def test_a_file_of_something_else_is_neither_replaced_nor_found_after_the_work(
    paintings, tmp_path, capsys, monkeypatch, name
):
    foreign = tmp_path / name
    foreign.parent.mkdir(exist_ok=True)
    foreign.write_text('{"ink": "a"}')
    code, _, err = call(capsys, monkeypatch, "--data", paintings, "--out", tmp_path, *TINY, "--iterations", 1)
    assert code == 2 and f"{name}: was not written by an ablation; move it elsewhere" in err and err.count("\n") == 1
    assert foreign.read_text() == '{"ink": "a"}' and set(tmp_path.glob("*/*")) <= {foreign}


def test_an_out_that_cannot_be_written_to_is_found_before_the_work(paintings, tmp_path, capsys, monkeypatch):
    (tmp_path / "file").touch()
    code, _, err = call(capsys, monkeypatch, "--data", paintings, "--out", tmp_path / "file", *TINY)
    assert code == 2 and "file: cannot be written to" in err and err.count("\n") == 1


def test_a_full_disk_leaves_the_former_report(tmp_path, monkeypatch):
    runs = [Run(variant, seed, {"all": SCORES}) for variant in VARIANTS for seed in (0, 1)]
    report(runs, tmp_path, {})
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    fill_the_disk(monkeypatch)
    with pytest.raises(UserError, match=r"ablation.json: cannot be written \(No space left on device\)"):
        report(runs, tmp_path, {"iterations": 2})
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_difference_is_judged_against_what_seeds_do():
    """Spread 0.01·sqrt(2) for each of four variants: t(0.975, 4) = 2.776 times it is what two seeds may differ by."""
    ssim = {"without DPCA": 0.80, "without CAFE": 0.86, "without CCPL": 0.84, "all": 0.90}
    runs = [
        Run(variant, seed, {"all": {"ssim": value + 0.01 * (2 * seed - 1), "relative_gram": 0.2}})
        for variant, value in ssim.items()
        for seed in (0, 1)
    ]
    table = compare(runs)
    entry = table["without DPCA"]["ssim"]
    assert entry["mean"] == pytest.approx(0.80) and entry["spread"] == pytest.approx(0.01 * 2**0.5)
    assert entry["difference"] == pytest.approx(-0.10)
    assert entry["chance"] == pytest.approx(2.776 * 0.01 * 2**0.5, rel=1e-3)  # 0.0393
    exceeding = {variant: table[variant]["ssim"]["exceeds"] for variant in ssim if variant != "all"}
    assert exceeding == {"without DPCA": True, "without CAFE": True, "without CCPL": True}
    assert table["without CAFE"]["ssim"]["difference"] == pytest.approx(-0.04)
    assert not table["without CAFE"]["relative_gram"]["exceeds"]


@pytest.mark.parametrize("lost", VARIANTS)
def test_a_variant_that_diverged_has_no_scores_and_hides_no_others(tmp_path, lost):
    runs = [Run(v, s, DIVERGED if (v, s) == (lost, 1) else {"all": SCORES}) for s in (0, 1) for v in VARIANTS]
    text = report(runs, tmp_path, {})
    rows = {line.split("|")[1].strip(): line for line in text.splitlines() if line.startswith("| ")}
    assert rows[lost].count("diverged") == 2 and text.count("diverged") == 3
    assert f"- {lost}, seed 1: diverged" in text
    assert text.count("against all") == (0 if lost == WHOLE else 4)
    others = json.loads((tmp_path / "ablation.json").read_text())["comparison"]
    assert others.pop(lost) == {}
    assert {scores["ssim"]["mean"] for scores in others.values()} == {0.9}


def test_a_part_of_the_results_that_is_not_finite_is_told(tmp_path):
    runs = [Run(v, s, {"all": SCORES | {"finite": 0.5 if v == WHOLE else 1.0}}) for s in (0, 1) for v in VARIANTS]
    text = report(runs, tmp_path, {})
    assert "- all, seed 0: its means are of the 50% of the results that are finite" in text
    assert text.count("finite") == 2


def test_a_training_that_diverges_does_not_end_the_others(paintings, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(ablate, "VARIANTS", {name: VARIANTS[name] for name in ("without CCPL", WHOLE)})
    trained = ablate.train

    def train(data, folder, config, **options):
        if not config.ccpl:
            raise TrainingDivergedError("step 9: loss or gradient is not finite")
        return trained(data, folder, config, **options)

    monkeypatch.setattr(ablate, "train", train)
    out = tmp_path / "out"
    code, printed, _ = call(capsys, monkeypatch, "--data", paintings, "--out", out, *TINY, "--iterations", 1)
    assert code == 0 and "without CCPL, seed 1: step 9: loss or gradient is not finite" in printed
    assert "- without CCPL, seed 1: diverged" in (out / "table.md").read_text()
    assert newest_checkpoint(out / "all_seed1") is not None

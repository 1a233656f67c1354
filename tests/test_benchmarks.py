"""The benchmarks' gate, what they write down, and the report that is made of it."""

import contextlib
import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from benchmarks import ROOT, bench_ccpl, measure, report
from benchmarks.contest import Composite, Contest, Rival
from benchmarks.measure import judge
from restoration_kernels._samples import samples

# A bench file with rivals that are wrong, wasteful, and too large for any computer.
BENCH_FILE = """
import torch
from benchmarks.bench_dual_pool_attention import pooling, test_speed, traffic
from benchmarks.contest import Contest, Rival

def wrong(**arguments):
    return pooling(**arguments) * 1.01

def wasteful(**arguments):
    torch.ones(2**24, dtype=torch.uint8)
    return pooling(**arguments)

def gigantic(**arguments):
    return torch.ones(2**60)

def nothing(x, **arguments):
    return x * 1

rivals = [Rival(rival.__name__, rival) for rival in (pooling, wrong, wasteful, gigantic)]
CONTESTS = [Contest("dual_pool_attention", traffic, rivals=[*rivals, Rival("nothing", nothing, floor=True)])]
"""


@pytest.fixture(scope="module")
def quick_run(tmp_path_factory):
    """A quick run of that file, forward, and of the floor with gradients: its output and what it saved."""
    folder = tmp_path_factory.mktemp("benchmarks")
    (folder / "bench_sample.py").write_text(BENCH_FILE)
    command = [sys.executable, "-m", "pytest", "-p", "benchmarks.conftest", "-q", str(folder / "bench_sample.py")]
    command += [
        "--quick",
        "--device",
        "cpu",
        "-k",
        "nothing or not backward",
        f"--benchmark-json={folder / 'saved.json'}",
    ]
    # In what it takes for a worker of pytest-xdist, pytest-benchmark measures nothing.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    return result, folder / "saved.json"


def test_wrong_rival_fails_the_run(quick_run):
    result, saved = quick_run
    assert result.returncode == 1, result.stdout + result.stderr
    assert "1 failed" in result.stdout
    assert "output: error" in result.stdout
    groups = {benchmark["name"].split("/", 1)[1] for benchmark in json.loads(saved.read_text())["benchmarks"]}
    rivals = ("reference", "compiled", "pooling", "wasteful", "nothing", "copy")
    assert groups >= {*(f"forward/odd/{rival}]" for rival in rivals), "forward+backward/odd/nothing]"}
    assert "forward/odd/wrong]" not in groups


def test_results_say_what_was_measured_and_where(quick_run):
    run = report.load(quick_run[1])
    assert "--quick" in run["command"]
    reference = next(result for result in run["results"] if result["rival"] == "reference")
    B, C, H, W = samples("dual_pool_attention", "odd")[0].arguments()["x"].shape
    expected = {
        "operator": "dual_pool_attention",
        "direction": "forward",
        "size": "odd",
        "floor": False,
        "judged": True,
        "in_series": False,
        "bytes_moved": 3 * 4 * B * C * H * W,
        "megapixels": B * H * W / 1e6,
    }
    assert {name: reference[name] for name in expected} == expected
    assert reference["device"].startswith("CPU, ")
    assert reference["versions"].keys() >= {"python", "torch", "triton", "cuda"}
    assert reference["commit"]
    assert reference["share_of_copy"] > 0


def test_of_every_file_the_same_share_is_measured_where_time_is_limited():
    """Rivals stay together; what takes long to compile, and series, come last."""
    command = [sys.executable, "-m", "pytest", "benchmarks", "--device", "cpu", "--time-limit", "1", "--co", "-q"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\n\n")[0]
    places = {}
    for number, line in enumerate(listed.splitlines()):
        file, entry = line.split("::", 1)
        if "compiled" not in entry and "series" not in entry:
            places.setdefault(file, {}).setdefault(entry.rpartition("/")[0], []).append(number)
    assert len(places) == len(list(ROOT.glob("benchmarks/bench_*.py")))
    runs = [list(groups.values()) for groups in places.values()]
    assert all(numbers == list(range(numbers[0], numbers[-1] + 1)) for groups in runs for numbers in groups)
    assert max(groups[0][-1] for groups in runs) < min(groups[1][0] for groups in runs)
    assert max(numbers[-1] for groups in runs for numbers in groups) < len(listed.splitlines()) - 1


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells the peak")
def test_peak_memory(quick_run):
    """In a fresh process; what does not fit is a result of its own."""
    run = report.load(quick_run[1])
    peaks = {result["rival"]: result.get("peak_bytes") for result in run["results"]}
    # A process's resident memory is counted to within some hundred kilobytes.
    assert abs(peaks["wasteful"] - peaks["pooling"] - 2**24) < 2**20
    assert abs(peaks["nothing"]) < 2**20
    assert [result["rival"] for result in run["results"] if "seconds" not in result] == ["gigantic"]


def right(x, weight):
    from benchmarks.bench_dual_pool_attention import pooling

    return pooling(x, weight)


@pytest.mark.parametrize(
    ("function", "passes"),
    [
        (right, ("forward", "forward+backward")),
        # Its output is right, its gradients are not.
        (lambda x, weight: right(x, weight.detach()) + 0 * weight.sum(), ("forward",)),
        (lambda x, weight: right(x, weight) * 1.0001, ()),
        (lambda x, weight: right(x, weight) / 0, ()),
    ],
)
def test_gate(function, passes):
    rival = Rival("rival", function)
    contest = Contest("dual_pool_attention", lambda **_: {}, rivals=[rival])
    entries = [entry for entry in contest.entries("cpu", quick=True) if entry.rival is rival]
    assert [entry.direction for entry in entries] == ["forward", "forward+backward"]
    for entry in entries:
        call = entry.call(entry.arguments())
        if entry.direction in passes:
            judge(entry, call)
        else:
            with pytest.raises(AssertionError, match="error"):
                judge(entry, call)


def test_gate_without_memory_for_the_exact_values(monkeypatch):
    def exhausted(reference):
        raise torch.OutOfMemoryError

    rival = Rival("rival", right)
    contest = Contest("dual_pool_attention", lambda **_: {}, rivals=[rival])
    entry = next(entry for entry in contest.entries("cpu", quick=True) if entry.rival is rival)
    call = entry.call(entry.arguments())
    assert judge(entry, call)
    monkeypatch.setattr(measure, "_truth", exhausted)
    assert not judge(entry, call)


@pytest.mark.parametrize("factor", [1, 1.0001])
def test_gate_of_what_is_made_of_several_operators(factor):
    rival = Rival("rival", lambda **tensors: factor * bench_ccpl.whole_loss("cpu", **tensors))
    (contest,) = (replace(each, rivals=[rival]) for each in bench_ccpl.CONTESTS if isinstance(each, Composite))
    entries = [entry for entry in contest.entries("cpu", quick=True) if entry.rival in (rival, contest.reference)]
    assert len(entries) == 4
    for entry in entries:
        wrong = entry.rival is rival and factor != 1
        with pytest.raises(AssertionError, match="error") if wrong else contextlib.nullcontext():
            judge(entry, entry.call(entry.arguments()))


def saved_file(path, *results, out_of_memory=()):
    facts = {
        "operator": "sample",
        "direction": "forward",
        "floor": False,
        "in_series": True,
        "device": "CPU, 2 threads, Processor",
        "commit": "0123abc",
        "versions": {"torch": "2.11", "cuda": None},
        "peak_bytes": 2**20,
        "share_of_copy": 0.5,
    }
    benchmarks = [
        {"extra_info": {**facts, **result}, "stats": {"median": result["milliseconds"] / 1e3}} for result in results
    ]
    failed = [{name: value for name, value in facts.items() if name != "peak_bytes"} | one for one in out_of_memory]
    path.write_text(
        json.dumps(
            {
                "benchmarks": benchmarks,
                "out_of_memory": failed,
                "command": "pytest benchmarks/",
                "datetime": "2026-01-02T03:04:05",
            }
        )
    )
    return path


@pytest.fixture
def saved(tmp_path):
    def results(rival, milliseconds, **more):
        return [
            {"rival": rival, "size": f"{size}_pixels", "megapixels": size, "milliseconds": size * milliseconds, **more}
            for size in (1, 4)
        ]

    return saved_file(
        tmp_path / "cpu.json",
        *results("cpu", 2.0),
        *results("reference", 300.0, peak_bytes=3 * 2**20, share_of_copy=0.0123),
        *results("rival", 300.1, peak_bytes=2**20, judged=False),
        *results("copy", 1.0, floor=True, peak_bytes=None, share_of_copy=1.0),
        out_of_memory=[{"rival": "compiled", "size": "4_pixels", "megapixels": 4}],
    )


def test_report_table(saved, capsys):
    report.main([str(saved)])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == ("**CPU, 2 threads, Processor**, commit 0123abc, 2026-01-02, torch 2.11. `pytest benchmarks/`")
    assert len({line.count("|") for line in lines[2:] if line}) == 1, "rows of different lengths"
    assert lines[4:] == [
        "| sample | 1_pixels | cpu | **2** | 50% | **1** |  |  |  |",
        "| sample | 1_pixels | reference | 300 | 1.2% | 3 |  |  |  |",
        "| sample | 1_pixels | rival (not judged) | 300 | 50% | **1** |  |  |  |",
        "| sample | 1_pixels | copy (floor) | 1 | 100% |  |  |  |  |",
        "| sample | 4_pixels | cpu | **8** | 50% | **1** |  |  |  |",
        "| sample | 4_pixels | reference | 1200 | 1.2% | 3 |  |  |  |",
        "| sample | 4_pixels | rival (not judged) | 1200 | 50% | **1** |  |  |  |",
        "| sample | 4_pixels | copy (floor) | 4 | 100% |  |  |  |  |",
        "| sample | 4_pixels | compiled | out of memory |  |  |  |  |  |",
        "",
    ]


def test_report_plots(saved, tmp_path, monkeypatch):
    figure = pytest.importorskip("matplotlib.figure").Figure
    drawn = {}
    monkeypatch.setattr(figure, "savefig", lambda self, path, **_: drawn.setdefault(path.name, self))
    report.main([str(saved), "--plots", str(tmp_path / "plots")])
    assert list(drawn) == ["sample_time.png", "sample_memory.png"]
    time = drawn["sample_time.png"].axes[0]
    assert (time.get_xscale(), time.get_yscale()) == ("log", "log")
    lines = {line.get_label(): line for line in time.lines}
    assert lines["reference"].get_xydata().tolist() == [[1.0, 300.0], [4.0, 1200.0]]
    crosses = [line.get_xdata().tolist() for line in time.lines if line.get_marker() == "x"]
    assert crosses == [[4.0]]
    memory = {line.get_label(): line for line in drawn["sample_memory.png"].axes[0].lines}
    assert memory["reference"].get_ydata().tolist() == [3.0, 3.0]
    assert len(memory["copy"].get_xdata()) == 0


def test_report_rejects_empty_files(tmp_path):
    with pytest.raises(SystemExit, match="holds no benchmarks"):
        report.main([str(saved_file(tmp_path / "empty.json"))])

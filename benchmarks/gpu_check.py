"""``python -m benchmarks.gpu_check [--step STEP] [--out FOLDER]``: what only a GPU can show, in under nine minutes.

Builds the package for this GPU, runs the tests, the memory and race checkers of the CUDA toolkit, and the benchmarks;
what is missing here is skipped, and the summary says so. Needs no network, and installs into a folder of its own.
"""

import argparse
import importlib.metadata
import importlib.util
import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from benchmarks import ROOT, commit, report

STEPS = {"tests": ["tests"], "sanitize": ["memcheck", "racecheck"], "bench": ["bench"]}
# What each command may take; what one leaves over, its successor may use. The sum leaves of nine minutes what the last
# one needs to end, asked to and then made to, and this program itself.
SECONDS = {"build": 110, "tests": 155, "memcheck": 55, "racecheck": 50, "bench": 130}
SECONDS_TO_END = 8
# Before its time is up, a run of benchmarks must have finished the last one and have written its file.
SECONDS_TO_FINISH = 30
# A log is cut to its end, so that a folder of results stays small enough to be passed on.
LOG_BYTES = 8 * 2**20
# What compute-sanitizer writes where it finds something: a run that was stopped has no exit status to tell.
FOUND_BY_SANITIZER = r"Invalid __|Race reported|\b[1-9]\d* hazard"
# Small samples, in as many processes as a GPU can hold contexts of, one for each core: most of the time is compiling.
TEST_PROCESSES = min(os.cpu_count() or 1, 16)
# CUDA sources run on the CPU, in place of a GPU.
NEEDLESS_TESTS = "tests/test_simt*"
INSTALLED = ROOT / "build" / "gpu-check-installed"
RESULTS = ROOT / "benchmarks" / "results"
DISTRIBUTION = "painting-restoration"


class Check:
    """The commands of one check, their logs, and the summary that grows with each."""

    def __init__(self, out, names):
        self.out = out
        self.names = names
        self.started = time.monotonic()
        self.failed = False
        self.lines = []
        out.mkdir(parents=True, exist_ok=True)
        for name in SECONDS:
            (out / f"{name}.log").unlink(missing_ok=True)

    def say(self, text):
        """Prints the text and adds it to the summary, which is then there even if the next command never ends."""
        print(text, flush=True)
        self.lines.append(text)
        (self.out / "summary.md").write_text("\n".join(self.lines) + "\n")

    def seconds(self, name):
        """How long a command may take: what is left, less what is kept for its successors."""
        successors = self.names[self.names.index(name) + 1 :]
        left = sum(SECONDS.values()) - (time.monotonic() - self.started)
        return max(left - sum(SECONDS[successor] for successor in successors), 1)

    def run(self, name, command, **environment):
        """Exit status of a command, or None if it was stopped; its output goes to the log of that name."""
        path = os.pathsep.join(filter(None, [str(INSTALLED), os.environ.get("PYTHONPATH")]))
        environment = {**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1", **environment}
        log = self.out / f"{name}.log"
        with log.open("a") as output:
            output.write(f"$ {shlex.join(command)}\n")
            output.flush()
            process = subprocess.Popen(
                command,
                cwd=ROOT,
                env=environment,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=_heed_interrupts,
            )
            status = _wait(process, self.seconds(name))
        if log.stat().st_size > LOG_BYTES:
            log.write_bytes(log.read_bytes()[-LOG_BYTES:])
        return status

    def judge(self, name, status, unfinished_fails=False):
        """Says how a command ended."""
        if status is None:
            self.say(f"- {name}: **unfinished**, stopped when its time was up: {self.last_line(name)}")
            self.failed |= unfinished_fails
        elif status == 0:
            self.say(f"- {name}: passed: {self.last_line(name)}")
        else:
            self.say(f"- {name}: **failed** with status {status}, see {name}.log: {self.last_line(name)}")
            self.failed = True

    def last_line(self, name):
        """What a log ends with: most tools say there how it went."""
        lines = (self.out / f"{name}.log").read_text(errors="replace").split("\n")
        return next((line.strip(" =") for line in reversed(lines) if line.strip(" =")), "")


def _heed_interrupts():
    # Shells start what shall run in the background with interrupts ignored, and children inherit that.
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _wait(process, seconds):
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        pass
    # pytest still writes what it has found when it is interrupted.
    for number in (signal.SIGINT, signal.SIGKILL):
        os.killpg(process.pid, number)
        try:
            process.wait(SECONDS_TO_END)
            break
        except subprocess.TimeoutExpired:
            pass
    return None


def main(arguments=None):
    """Exit status: 0, 1 if anything was wrong, or 2 without a GPU."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_check", description=__doc__.split(": ", 1)[1])
    parser.add_argument("--step", choices=[*STEPS, "all"], default="all")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "gpu-check", help="folder for summary and logs")
    options = parser.parse_args(arguments)
    reason = why_no_gpu()
    if reason is not None:
        print(f"gpu-check needs a GPU: {reason}", file=sys.stderr)
        return 2
    steps = list(STEPS) if options.step == "all" else [options.step]
    check = Check(options.out.resolve(), ["build", *(name for step in steps for name in STEPS[step])])
    introduce(check)
    if build(check):
        for step in steps:
            {"tests": test, "sanitize": sanitize, "bench": bench}[step](check)
    check.say(f"\n{'Something is wrong' if check.failed else 'Nothing wrong was found'}: {options.out}")
    return int(check.failed)


def why_no_gpu():
    """None if torch can use a GPU, else the reason."""
    if importlib.util.find_spec("torch") is None:
        return "torch is not installed"
    import torch

    return None if torch.cuda.is_available() else "torch finds no CUDA device"


def introduce(check):
    """Says what is checked, on what, with what."""
    import torch

    check.say(f"# GPU check on {torch.cuda.get_device_name()}\n")
    versions = f"Python {platform.python_version()}, torch {torch.__version__}, CUDA {torch.version.cuda}"
    check.say(f"Commit {commit()}, {versions}\n")


def build(check):
    """Installs the package with kernels for this GPU alone; returns whether that went well."""
    import torch

    # Into a folder: this Python may be one that the system or its owner wants left as it is.
    install = ["-m", "pip", "install", "--no-build-isolation", "--no-deps", "--no-index", "--disable-pip-version-check"]
    architecture = "{}{}-real".format(*torch.cuda.get_device_capability())
    shutil.rmtree(INSTALLED, ignore_errors=True)
    command = [sys.executable, *install, "--target", str(INSTALLED), "."]
    status = check.run("build", command, RESTORATION_CUDA="1", RESTORATION_CUDA_ARCHS=architecture)
    check.judge("build", status, unfinished_fails=True)
    if status != 0:
        return False
    check.run("build", [sys.executable, "-m", "restoration_kernels"])
    table = (check.out / "build.log").read_text().rsplit("\n$ ", 1)[1].split("\n", 1)[1]
    check.say(f"\n```\n{table.rstrip()}\n```\n")
    # Tests would skip what does not run, and pass.
    if not re.search(r" cuda +available$", table, re.MULTILINE):
        check.say("- build: **failed**: its CUDA kernels do not run here")
        check.failed = True
        return False
    return True


def test(check):
    """Runs the test-suite, or the part of it whose needs are met here."""
    command = [sys.executable, "-m", "pytest", "-q", "--continue-on-collection-errors"]
    missing = missing_packages()
    if missing:
        check.say(f"- tests: skipped are those of the package restoration, which needs {', '.join(missing)}")
        command += kernel_tests()
    command.append(f"--ignore-glob={NEEDLESS_TESTS}")
    environment = {}
    if importlib.util.find_spec("xdist") is not None:
        # As `make test` does. One file has most of the Triton kernels to compile: by files, others would wait for it.
        command += ["-n", str(TEST_PROCESSES), "--dist", "worksteal"]
        environment = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
    check.judge("tests", check.run("tests", command, **environment), unfinished_fails=True)


def missing_packages():
    """Names of the packages that the installed distribution asks for and that are not here."""
    from packaging.requirements import Requirement

    (distribution,) = importlib.metadata.distributions(name=DISTRIBUTION, path=[str(INSTALLED)])
    wanted = [Requirement(line) for line in distribution.requires or []]
    wanted = [one.name for one in wanted if one.marker is None or one.marker.evaluate({"extra": ""})]
    return [name for name in wanted if not any(importlib.metadata.distributions(name=name))]


def kernel_tests():
    """The test files that do not import the package restoration, or the benchmarks of it."""
    imports = re.compile(r"^\s*(?:from|import) (?:restoration\b|benchmarks import steps\b)", re.MULTILINE)
    needless = set(ROOT.glob(NEEDLESS_TESTS))
    paths = sorted(set(ROOT.glob("tests/test_*.py")) - needless)
    return [str(path) for path in paths if not imports.search(path.read_text())]


def sanitize(check):
    """Looks for accesses out of bounds, and for races in shared memory."""
    tool = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
    if tool is None:
        check.say("- memcheck, racecheck: skipped: compute-sanitizer is not installed")
        return
    options = ["--error-exitcode", "9", "--target-processes", "application-only"]
    # torch asks the driver for functions that it may lack, and copes: only what kernels do counts.
    memcheck = [tool, "--tool", "memcheck", "--report-api-errors", "no", *options, sys.executable]
    racecheck = [tool, "--tool", "racecheck", *options, sys.executable]
    # Each tensor by itself, so that memcheck knows where it ends.
    environment = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    if (
        check.run("memcheck", [*memcheck, "-c", "import torch; torch.ones(1, device='cuda').item()"], **environment)
        != 0
    ):
        check.say(f"- memcheck, racecheck: skipped: compute-sanitizer does not run here: {check.last_line('memcheck')}")
        return
    for name, command in (("memcheck", memcheck), ("racecheck", racecheck)):
        status = check.run(name, [*command, "-m", "benchmarks.small_calls"], **environment)
        # What it found before it was stopped counts.
        found = re.search(FOUND_BY_SANITIZER, (check.out / f"{name}.log").read_text(errors="replace"))
        check.judge(name, status, unfinished_fails=found is not None)


def bench(check):
    """Runs the benchmarks, and keeps what they measured under the device's name."""
    import torch

    saved = ROOT / "build" / "gpu-check.json"
    saved.parent.mkdir(exist_ok=True)
    saved.unlink(missing_ok=True)
    limit = max(check.seconds("bench") - SECONDS_TO_FINISH, SECONDS_TO_FINISH)
    command = [sys.executable, "-m", "pytest", "benchmarks", "-q", "--device", "cuda", f"--benchmark-json={saved}"]
    missing = missing_packages()
    if missing:
        check.say(f"- bench: without whole training steps, which need {', '.join(missing)}")
        command.append("--ignore=benchmarks/bench_restoration.py")
    check.judge("bench", check.run("bench", [*command, "--time-limit", f"{limit:.0f}"]))
    # Some versions of pytest-benchmark make an empty file before the first measurement.
    if not saved.exists() or saved.stat().st_size == 0:
        return
    name = re.sub(r"[^A-Za-z0-9.-]+", "_", torch.cuda.get_device_name()).strip("_") + ".json"
    for folder in (RESULTS, check.out):
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(saved, folder / name)
    check.say(f"\n{report.table(report.load(saved))}")


if __name__ == "__main__":
    sys.exit(main())

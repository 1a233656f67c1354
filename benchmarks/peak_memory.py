"""Peak memory of benchmarks, each run untimed.

On a CPU in a fresh process: ``python -m benchmarks.peak_memory FILE QUICK NAME...`` prints one line of JSON for each
benchmark named.
"""

import gc
import json
import os
import re
import resource
import runpy
import signal
import subprocess
import sys
from pathlib import Path

import torch

from benchmarks import ROOT
from benchmarks.contest import copy
from restoration.memory import PeakMemory, forget_peak, is_out_of_memory, return_freed_pages

OUT_OF_MEMORY = "out of memory"
# Of the memory that is free when a process starts, how much it may take: with the rest other programs live on, and the
# kernel need not choose one of them to end.
FREE_SHARE = 0.8


def measure(entry):
    """Peak bytes beyond the arguments, results included; OUT_OF_MEMORY, or None where it cannot be measured.

    In this process: a GPU's memory is counted by the byte.
    """
    try:
        return _peak(entry.uncaptured)
    except Exception as error:  # of one benchmark; the others go on
        if is_out_of_memory(error):
            return OUT_OF_MEMORY
        # It comes again when the benchmark is timed, and then fails that one.
        print(f"{entry}: no peak of memory: {error}", file=sys.stderr)
        return None


def measure_files(names, quick):
    """The same for a CPU, by name, in processes that have run nothing else.

    Args:
        names: of entries, quick or not, by the path of their bench file.
    """
    return {name: peak for path in names for name, peak in _measure_file(path, quick, names[path]).items()}


def _measure_file(path, quick, names):
    command = [sys.executable, "-m", "benchmarks.peak_memory", str(path), str(int(quick)), *names]
    # Every tensor then is memory of its own, returned as soon as it is freed.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    result = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=False)
    if result.returncode != 0:
        raise RuntimeError(f"the peak memory of {path.name} could not be measured; the messages above say why")
    peaks = dict.fromkeys(names)
    for line in result.stdout.splitlines():
        peaks.update(json.loads(line))
    return peaks


def main():
    """The fresh process.

    Each benchmark gets a fork of it, which has imported everything and run nothing: a process never quite returns to
    what it was.
    """
    path, quick, *names = sys.argv[1:]
    contests = runpy.run_path(path)["CONTESTS"]
    entries = {str(entry): entry for contest in contests for entry in contest.entries("cpu", quick == "1")}
    for name in names:
        child = os.fork()
        if child == 0:
            _limit_memory()
            _print(name, measure(entries[name]))
            os._exit(0)
        status = os.waitpid(child, 0)[1]
        if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
            _print(name, OUT_OF_MEMORY)


def _print(name, peak):
    print(json.dumps({name: peak}), flush=True)


def _peak(entry):
    arguments = entry.arguments()
    if entry.why_not(arguments) is not None or entry.rival.function is copy:  # which allocates nothing
        return None
    call = entry.call(entry.rival.prepare(arguments))
    call()  # loads code and starts threads
    gc.collect()
    if entry.device == "cuda":
        torch.cuda.empty_cache()
    elif not (return_freed_pages() and forget_peak()):
        return None
    peak = PeakMemory(torch.device(entry.device))
    call()
    return peak.bytes()


def _limit_memory():
    """Makes an allocation fail where there is no memory for it; by default Linux ends some process later on."""
    free = Path("/proc/meminfo")
    if free.exists():
        kilobytes = int(re.search(r"MemAvailable:\s+(\d+)", free.read_text())[1])
        resource.setrlimit(resource.RLIMIT_DATA, (int(kilobytes * 1024 * FREE_SHARE),) * 2)


if __name__ == "__main__":
    main()

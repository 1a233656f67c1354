"""Options and the one fixture of the benchmarks; a bench file is a list CONTESTS and a function that takes both."""

import collections
import os
import shlex
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from benchmarks import peak_memory
from benchmarks.measure import circumstances, copy_seconds, judge, rounds

OUT_OF_MEMORY = pytest.StashKey[list]()
STARTED = pytest.StashKey[float]()


def pytest_addoption(parser):
    group = parser.getgroup("restoration benchmarks")
    group.addoption("--quick", action="store_true", help="tiny sizes, few rounds: shows that the benchmarks still run")
    group.addoption("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    group.addoption("--time-limit", type=float, metavar="SECONDS", help="skip benchmarks that would start later")


def pytest_configure(config):
    config.addinivalue_line("python_files", "bench_*.py")
    config.stash[OUT_OF_MEMORY] = []
    config.stash[STARTED] = time.monotonic()


def pytest_generate_tests(metafunc):
    if "entry" in metafunc.fixturenames:
        option = metafunc.config.option
        contests = metafunc.module.CONTESTS
        metafunc.parametrize("entry", [e for c in contests for e in c.entries(option.device, option.quick)], ids=str)


def pytest_collection_modifyitems(config, items):
    if config.option.time_limit is not None:
        # Better the model's sizes of all operators than all sizes of some.
        items.sort(key=lambda item: _entry(item).in_series)


def _entry(item):
    return item.callspec.params["entry"]


@pytest.fixture(scope="session")
def peaks(request):
    """Peak memory of the benchmarks by name, all before the first is timed."""
    names = collections.defaultdict(dict)
    for item in request.session.items:
        # The reference, too, where it is not among those asked for: whether it fits decides who can be judged.
        names[item.path] |= {str(_entry(item)): None, str(_entry(item).reference): None}
    option = request.config.option
    # Most of the time goes into compiling, on the CPU; but what runs on the CPU is better alone with its memory.
    with ThreadPoolExecutor(1 if option.device == "cpu" else os.cpu_count()) as pool:
        files = [pool.submit(peak_memory.measure, path, option.device, option.quick, names[path]) for path in names]
        return {name: peak for file in files for name, peak in file.result().items()}


@pytest.fixture
def measure(benchmark, peaks, pytestconfig):
    """Judges an entry, times it, and writes beside the times what a report needs."""
    option = pytestconfig.option

    def run(entry):
        if option.time_limit is not None and time.monotonic() - pytestconfig.stash[STARTED] > option.time_limit:
            pytest.skip(f"later than {option.time_limit:g} s")
        arguments = entry.arguments()
        reason = entry.why_not(arguments)
        if reason is not None:
            pytest.skip(reason)
        facts = {**entry.description(arguments), **circumstances(entry.device)}
        if peaks[str(entry)] == peak_memory.OUT_OF_MEMORY:
            pytestconfig.stash[OUT_OF_MEMORY].append(facts)
            pytest.skip(peak_memory.OUT_OF_MEMORY)
        call = entry.call(entry.rival.prepare(arguments))
        facts["judged"] = not entry.rival.floor and peaks[str(entry.reference)] != peak_memory.OUT_OF_MEMORY
        if facts["judged"]:
            judge(entry, call)
        benchmark.group = entry.group
        benchmark.pedantic(call, rounds=rounds(call, option.quick))
        if benchmark.stats is not None:
            copied = copy_seconds(facts["bytes_moved"], entry.device, option.quick)
            facts |= {"peak_bytes": peaks[str(entry)], "share_of_copy": copied / benchmark.stats.stats.median}
        benchmark.extra_info.update(facts)

    return run


def pytest_benchmark_update_machine_info(machine_info):
    # Results are published: the name of somebody's computer is nobody's business.
    machine_info.pop("node", None)
    machine_info.get("cpu", {}).pop("flags", None)


def pytest_benchmark_update_json(config, output_json):
    output_json["command"] = shlex.join(["pytest", *config.invocation_params.args])
    output_json["out_of_memory"] = config.stash[OUT_OF_MEMORY]
    for benchmark in output_json["benchmarks"]:
        # What extra_info says in fewer words.
        for name in ("params", "param", "options"):
            del benchmark[name]

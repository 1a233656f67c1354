"""Options and fixtures of the benchmarks; a bench file is a list CONTESTS and a function of `measure` and `entry`."""

import collections
import gc
import shlex
import time

import pytest
import torch

from benchmarks import peak_memory
from benchmarks.contest import copy
from benchmarks.measure import circumstances, copy_seconds, judge, rounds

COPY_SECONDS = pytest.StashKey[dict]()
OUT_OF_MEMORY = pytest.StashKey[list]()
STARTED = pytest.StashKey[float]()


def pytest_addoption(parser):
    group = parser.getgroup("restoration benchmarks")
    group.addoption("--quick", action="store_true", help="tiny sizes, few rounds: shows that the benchmarks still run")
    group.addoption("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    group.addoption("--time-limit", type=float, metavar="SECONDS", help="skip benchmarks that would start later")


def pytest_configure(config):
    config.addinivalue_line("python_files", "bench_*.py")
    config.stash[COPY_SECONDS] = {}
    config.stash[OUT_OF_MEMORY] = []
    config.stash[STARTED] = time.monotonic()
    torch.backends.cudnn.allow_tf32 = False  # rivals that are no convolutions have no tf32


def pytest_generate_tests(metafunc):
    if "entry" in metafunc.fixturenames:
        option = metafunc.config.option
        contests = metafunc.module.CONTESTS
        metafunc.parametrize("entry", [e for c in contests for e in c.entries(option.device, option.quick)], ids=str)


def pytest_collection_modifyitems(config, items):
    if config.option.time_limit is None:
        return
    groups = collections.defaultdict(dict)  # of each file, in order
    for item in items:
        groups[item.path].setdefault(_entry(item).group, len(groups[item.path]))

    def place(item):
        # Of every file the same share, whatever there is time for; rivals, who share a sample, stay together.
        own = groups[item.path]
        return *_urgency(_entry(item)), own[_entry(item).group] / len(own)

    items.sort(key=place)


def _entry(item):
    return item.callspec.params["entry"]


def _urgency(entry):
    """Where time is limited, what compiles for long comes last, and better all operators than all sizes."""
    return entry.rival.name.endswith("compiled"), entry.in_series


@pytest.fixture(scope="session")
def peaks(request):
    """Function that gives peaks of memory by name, those of an entry and its reference among them.

    On a CPU all are measured before the first entry is timed, or all as urgent if time is limited.
    """
    option = request.config.option
    found = {}

    def of_entry(entry):
        # The reference, too, where it is not among those asked for: whether it fits decides who can be judged.
        if option.device == "cuda":
            for one in (entry, entry.reference):
                if str(one) not in found:
                    found[str(one)] = peak_memory.measure(one)
        elif str(entry) not in found:
            names = collections.defaultdict(dict)
            for item in request.session.items:
                other = _entry(item)
                if option.time_limit is None or _urgency(other) == _urgency(entry):
                    names[item.path] |= {str(other): None, str(other.reference): None}
            found.update(peak_memory.measure_files(names, option.quick))
        return found

    return of_entry


@pytest.fixture
def measure(benchmark, peaks, pytestconfig):
    """Judges an entry, times it, and writes beside the times what a report needs."""
    option = pytestconfig.option

    def run(entry):
        if option.time_limit is not None and time.monotonic() - pytestconfig.stash[STARTED] > option.time_limit:
            pytest.skip(f"later than {option.time_limit:g} s")
        if entry.device == "cuda":
            gc.collect()  # what the entry before has left, a captured step among it, hangs in cycles
            torch.cuda.empty_cache()
        arguments = entry.arguments()
        reason = entry.why_not(arguments)
        if reason is not None:
            pytest.skip(reason)
        facts = {**entry.description(arguments), **circumstances(entry.device)}
        peak_of = peaks(entry)
        if peak_of[str(entry)] == peak_memory.OUT_OF_MEMORY:
            pytestconfig.stash[OUT_OF_MEMORY].append(facts)
            pytest.skip(peak_memory.OUT_OF_MEMORY)
        call = entry.call(entry.rival.prepare(arguments))
        facts["judged"] = not entry.rival.floor and peak_of[str(entry.reference)] != peak_memory.OUT_OF_MEMORY
        if facts["judged"]:
            facts["judged"] = judge(entry, call)
        benchmark.group = entry.group
        benchmark.pedantic(call, rounds=rounds(call, option.quick))
        if benchmark.stats is not None:
            seconds = benchmark.stats.stats.median
            copied = _copied(pytestconfig, entry, facts["bytes_moved"], seconds)
            facts |= {"peak_bytes": peak_of[str(entry)], "share_of_copy": copied / seconds}
        benchmark.extra_info.update(facts)

    return run


def _copied(config, entry, bytes_moved, seconds):
    """Time of the copy of so many bytes: what it just took, or took as the first of its group, or takes now."""
    times = config.stash[COPY_SECONDS]
    if entry.rival.function is copy:
        times[bytes_moved] = seconds
    elif bytes_moved not in times:
        times[bytes_moved] = copy_seconds(bytes_moved, entry.device, config.option.quick)
    return times[bytes_moved]


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

"""Registers, shared memory, stack and spills of every CUDA kernel, as ptxas reports them.

As a compiler launcher, ``resource_report.py nvcc ... -o OBJECT`` runs the command and keeps its report in
``OBJECT.ptxas``. setup.py then collects the reports of a build into one JSON file.
"""

import json
import re
import subprocess
import sys
from pathlib import Path

_KERNEL = re.compile(r"Compiling entry function '(?P<symbol>\w+)' for '(?P<architecture>\w+)'")
_STACK = re.compile(
    r"(?P<stack_bytes>\d+) bytes stack frame, (?P<spill_store_bytes>\d+) bytes spill stores, "
    r"(?P<spill_load_bytes>\d+) bytes spill loads"
)
_REGISTERS = re.compile(r"Used (?P<registers>\d+) registers")
_SHARED = re.compile(r"(?P<shared_bytes>\d+) bytes smem")


def parse(report):
    """One dictionary for each kernel and architecture in the text that ``nvcc --ptxas-options=-v`` prints."""
    kernels = []
    for line in report.splitlines():
        if match := _KERNEL.search(line):
            kernels.append({**match.groupdict(), "shared_bytes": 0})
        elif kernels:
            # Functions that are not inlined have a stack line of their own, after the kernel that calls them.
            for pattern in (_STACK, _REGISTERS, _SHARED):
                if match := pattern.search(line):
                    for name, number in match.groupdict().items():
                        kernels[-1][name] = max(int(number), kernels[-1].get(name, 0))
    return kernels


def collect(folder, path):
    """Writes the reports of all objects below the folder to one JSON file."""
    reports = sorted(Path(folder).rglob("*.ptxas"))
    kernels = [kernel for report in reports for kernel in parse(report.read_text())]
    Path(path).write_text(json.dumps(kernels, indent=1) + "\n")


def _launch(command):
    result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    # CMake also sends dependency scans and links through the launcher; only a compilation has a report.
    if "ptxas info" in result.stdout:
        Path(command[command.index("-o") + 1] + ".ptxas").write_text(result.stdout)
    messages = [line for line in result.stdout.splitlines() if not _is_report(line)]
    if messages:
        print("\n".join(messages))
    return result.returncode


def _is_report(line):
    return line.startswith("ptxas info") or _STACK.search(line) is not None


if __name__ == "__main__":
    sys.exit(_launch(sys.argv[1:]))

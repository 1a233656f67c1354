"""The runner's search for races, by its own planted ones, and the CUDA kernels under it."""

import ctypes
import re
import subprocess
import sys

import pytest
import simt_build
import torch
from simt_build import both_orders, needs_compiler, pointer


@pytest.fixture(scope="module")
def planted():
    library = simt_build.load_library(simt_build.SIMT / "planted_races.cu", "races")
    library.run.restype = ctypes.c_char_p
    return library


def run(planted, kernel):
    y = torch.zeros(2 * 96)
    error = planted.run(kernel.encode(), pointer(y))
    return None if error is None else error.decode()


@needs_compiler
@both_orders
@pytest.mark.parametrize(
    "kernel", ["own", "lane", "warp", "overwrite", "sum", "halves", "own block", "copy", "copy over"]
)
def test_kernels_without_a_race_pass(planted, order, kernel):
    assert run(planted, kernel) is None


# Which of the two accesses comes second depends on the order of threads.
BETWEEN_THREADS = "(reads what thread [0-9]+ has written|writes what thread [0-9]+ has read)"
BETWEEN_BLOCKS = "(reads what another block has written|writes what another block has read)"
COPY = "reads what thread [0-9]+ copies asynchronously and has not waited for"


@needs_compiler
@both_orders
@pytest.mark.parametrize(
    ("kernel", "accesses"),
    [
        ("lane without order", BETWEEN_THREADS),
        ("lane by shuffle", BETWEEN_THREADS),
        ("half warp", BETWEEN_THREADS),
        ("warp by warp barrier", BETWEEN_THREADS),
        ("overwrite too early", BETWEEN_THREADS),
        ("sum without atomics", BETWEEN_BLOCKS),
        ("sum read too early", "(reads|changes) .*atomically.*"),
        ("other block", BETWEEN_BLOCKS),
        ("copy without waiting", COPY),
        ("copy waited for by its thread alone", COPY),
        ("copy over too early", BETWEEN_THREADS),
    ],
)
def test_races_are_found(planted, order, kernel, accesses):
    assert re.search(f"^simt: race: thread [0-9]+ {accesses}: block", run(planted, kernel))
    assert run(planted, "warp") is None, "the runner did not recover"


@needs_compiler
@pytest.mark.slow
def test_kernels_have_no_races():
    """The CUDA kernels of every operator, in a process of its own; float64 and float16 take the same ways."""
    command = [sys.executable, simt_build.SIMT / "run_kernels.py", simt_build.build_extension("races")]
    command += ["float32", "bfloat16"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr

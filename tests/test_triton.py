"""The Triton kernels without a GPU: their values under Triton's interpreter, and their machine code."""

import json
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import torch

from restoration_kernels._backend import OPERATORS

TESTS = Path(__file__).parent
KERNELS = TESTS.parent / "kernels"
SOURCES = sorted(KERNELS.glob("*_triton.py"))
ARCHITECTURES = {86, 90}

triton = pytest.importorskip("triton")


def version(module):
    return tuple(int(number) for number in module.__version__.split(".")[:2])


def run(command, **environment):
    """What a process of its own prints: Triton decides between interpreter and compiler when it is imported."""
    outer = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, *command], env={**outer, **environment}, capture_output=True, text=True, cwd=TESTS.parent
    )
    assert result.returncode == 0, result.stdout[-8000:] + result.stderr[-8000:]
    return result.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, on which the operators' own tests run")
@pytest.mark.skipif(
    version(triton) < (3, 7) and version(np) >= (2, 4),
    reason="Triton's interpreter before 3.7 cannot count a loop with numpy 2.4",
)
def test_values_under_the_interpreter(tmp_path):
    """The judge of every operator, on forward and backward."""
    stems = [path.name.removesuffix("_reference.py") for path in sorted(KERNELS.glob("*_reference.py"))]
    files = [TESTS / f"test_{stem}.py" for stem in stems]
    values = "(test_backward and not float64) or test_edge_shapes or (test_in_place and float32)"
    # The interpreter takes half a minute, or a whole one, for one of these operators' odd samples.
    guides = "test_spoiled_guide or test_guide_of_any_magnitude"
    others = f"test_many_tiles or {guides} or test_half_precision or beyond_32_bits"
    chosen = f"triton and ({values} or {others}) and not ((pac_conv2d or pad2d) and odd)"
    options = ["-q", "-p", "no:cacheprovider", "-k", chosen]

    def judged(file):
        path = tmp_path / f"{file.stem}.xml"
        run(["-m", "pytest", *options, f"--junitxml={path}", str(file)], TRITON_INTERPRET="1", OMP_NUM_THREADS="1")
        return ElementTree.parse(path)

    # The interpreter keeps one core busy, and is the longest of all tests.
    with ThreadPoolExecutor(os.cpu_count()) as processes:
        reports = list(processes.map(judged, filter(Path.exists, files)))
    cases = [case for report in reports for case in report.iter("testcase")]
    assert not [case.get("name") for case in cases if case.find("skipped") is not None]
    for name, operator in OPERATORS.items():
        assert operator.has("triton") == any(f"triton-{name}-" in case.get("name") for case in cases)


@pytest.fixture(scope="module")
def machine_code():
    return [json.loads(line) for line in run([TESTS / "triton_build.py"]).splitlines()]


def test_every_kernel_compiles_for_every_architecture(machine_code):
    written = {name for path in SOURCES for name in re.findall(r"^def (\w+_kernel)\(", path.read_text(), re.M)}
    compiled = {(kernel["kernel"], kernel["architecture"]) for kernel in machine_code}
    assert compiled - {("spilling_kernel", architecture) for architecture in ARCHITECTURES} == {
        (name, architecture) for name in written for architecture in ARCHITECTURES
    }


def test_every_kernel_fits_into_shared_memory(machine_code):
    """Of a block: 99 KB on an RTX 3090 and 227 KB on Hopper."""
    limits = {86: 99 * 1024, 90: 227 * 1024}
    too_large = [kernel for kernel in machine_code if kernel["shared"] > limits[kernel["architecture"]]]
    assert not too_large
    assert max(kernel["shared"] for kernel in machine_code) > 48 * 1024


def test_no_kernel_spills(machine_code):
    """Registers that overflow go to the stack, in memory."""
    spilling = {kernel["kernel"] for kernel in machine_code if kernel["STACK"] or kernel["LOCAL"]}
    assert spilling == {"spilling_kernel"}, [kernel for kernel in machine_code if kernel["STACK"] or kernel["LOCAL"]]

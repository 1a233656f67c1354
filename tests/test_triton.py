"""The Triton kernels without a GPU: their values under Triton's interpreter, and their machine code."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import torch

import restoration_kernels
from restoration_kernels._backend import OPERATORS

TESTS = Path(__file__).parent
KERNELS = TESTS.parent / "kernels"
SOURCES = sorted(KERNELS.glob("*_triton.py"))
ARCHITECTURES = {86, 90}
WRITTEN_IN_TRITON = [name for name, operator in OPERATORS.items() if operator.has("triton")]


def written_in(operator):
    """The module of the package that has the operator, and whose name its tests have."""
    return getattr(restoration_kernels, operator).__module__.rpartition(".")[2]


MODULES = sorted(set(map(written_in, WRITTEN_IN_TRITON)))

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


def files_of(module):
    """Its files: those whose names begin with its own, and not with that of another, longer one."""
    return [
        path
        for path in sorted(TESTS.glob(f"test_{module}*.py"))
        if module == max((name for name in MODULES if path.stem.startswith(f"test_{name}")), key=len)
    ]


def interpreted(report, modules, chosen):
    """Names of the modules' tests chosen, all of which passed under Triton's interpreter."""
    command = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", f"triton and {chosen}", f"--junitxml={report}"]
    command += [str(path) for module in modules for path in files_of(module)]
    run(command, TRITON_INTERPRET="1", OMP_NUM_THREADS="1")
    cases = list(ElementTree.parse(report).iter("testcase"))
    assert not [case.get("name") for case in cases if case.find("skipped") is not None]
    return [case.get("name") for case in cases]


def needs_interpreter(test):
    """Skips a test where there is none that can run the kernels, and where there is no need of it."""
    gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, on which the operators' own tests run")
    broken = version(triton) < (3, 7) and version(np) >= (2, 4)
    reason = "Triton's interpreter before 3.7 cannot count a loop with numpy 2.4"
    return gpu(pytest.mark.skipif(broken, reason=reason)(test))


# Chosen by name, as with pytest -k. The interpreter takes half a minute, or a whole one, for one of the first, up to
# twelve seconds for one of the second; half precision is judged in small maps, too.
TOO_LONG = "(pac_conv2d or pad2d) and odd"
LONG = "float16 and (odd or many_tiles)"


@needs_interpreter
@pytest.mark.parametrize("module", MODULES)
def test_values_under_the_interpreter(tmp_path, module):
    """The judge of every operator, on forward and backward."""
    values = "(test_backward and not float64) or test_edge_shapes or (test_in_place and float32)"
    guides = "test_spoiled_guide or test_guide_of_any_magnitude"
    numbers = "(test_special_numbers and float32) or test_the_least_quantum or test_identity_grad_x"
    others = f"test_many_tiles or {guides} or test_half_precision or test_quantum or beyond_32_bits or {numbers}"
    cases = interpreted(tmp_path / "report.xml", [module], f"({values} or {others}) and not ({TOO_LONG} or {LONG})")
    judged = {name for name in OPERATORS if any(f"triton-{name}-" in case for case in cases)}
    assert judged == {name for name in WRITTEN_IN_TRITON if written_in(name) == module}


@needs_interpreter
@pytest.mark.slow
def test_values_in_half_precision_under_the_interpreter(tmp_path):
    chosen = f"(test_backward or test_many_tiles) and {LONG} and not ({TOO_LONG})"
    assert interpreted(tmp_path / "report.xml", MODULES, chosen)


@pytest.fixture(scope="module")
def machine_code():
    return [json.loads(line) for line in run([TESTS / "triton_build.py"]).splitlines()]


@pytest.mark.slow
def test_every_kernel_compiles_for_every_architecture(machine_code):
    written = {name for path in SOURCES for name in re.findall(r"^def (\w+_kernel)\(", path.read_text(), re.M)}
    compiled = {(kernel["kernel"], kernel["architecture"]) for kernel in machine_code}
    assert compiled - {("spilling_kernel", architecture) for architecture in ARCHITECTURES} == {
        (name, architecture) for name in written for architecture in ARCHITECTURES
    }


@pytest.mark.slow
def test_every_kernel_fits_into_shared_memory(machine_code):
    """Of a block: 99 KB on an RTX 3090 and 227 KB on Hopper."""
    limits = {86: 99 * 1024, 90: 227 * 1024}
    too_large = [kernel for kernel in machine_code if kernel["shared"] > limits[kernel["architecture"]]]
    assert not too_large
    assert max(kernel["shared"] for kernel in machine_code) > 48 * 1024


@pytest.mark.slow
def test_no_kernel_spills(machine_code):
    """Registers that overflow go to the stack, in memory."""
    spilling = {kernel["kernel"] for kernel in machine_code if kernel["STACK"] or kernel["LOCAL"]}
    assert spilling == {"spilling_kernel"}, [kernel for kernel in machine_code if kernel["STACK"] or kernel["LOCAL"]]

"""The Triton kernels without a GPU: their values under Triton's interpreter, and their machine code."""

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import compare
import numpy as np
import pytest
import torch

import restoration_kernels
from restoration_kernels._backend import OPERATORS
from restoration_kernels._samples import DIFFERENTIABLE, Sample, _matting_laplacian, _pac_conv2d

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


def interpreted(report, files, chosen):
    """Names of the files' tests chosen, all of which passed under Triton's interpreter."""
    command = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", f"triton and {chosen}", f"--junitxml={report}"]
    command += map(str, files)
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
    losses = "test_repeated_places_accumulate or test_shows_nan"
    chosen = f"({values} or {others} or {losses}) and not ({TOO_LONG} or {LONG})"
    cases = interpreted(tmp_path / "report.xml", files_of(module), chosen)
    judged = {name for name in OPERATORS if any(f"triton-{name}-" in case for case in cases)}
    assert judged == {name for name in WRITTEN_IN_TRITON if written_in(name) == module}


@needs_interpreter
@pytest.mark.slow
def test_values_in_half_precision_under_the_interpreter(tmp_path):
    chosen = f"(test_backward or test_many_tiles) and {LONG} and not ({TOO_LONG})"
    assert interpreted(tmp_path / "report.xml", [path for module in MODULES for path in files_of(module)], chosen)


@needs_interpreter
def test_kernels_under_the_interpreter(tmp_path):
    """The tests that follow, which are skipped in a process whose Triton compiles for a GPU that is not there."""
    assert interpreted(tmp_path / "report.xml", [Path(__file__)], "test_kernel_")


# Each with the fewest numbers that show what others do not: sums over taps of a second image, a third block of the
# guide's channels, weights of which a program has one tap, distances in float64, products in more than one step, and
# images of a guide whose three channels are not as many as theirs.
@pytest.mark.parametrize(
    ("operator", "make", "dtype"),
    [
        ("pac_conv2d", _pac_conv2d(2, 1, 1, 1, 2, 3, 3, padding=1, normalize=True), torch.float32),
        ("pac_conv2d", _pac_conv2d(1, 1, 1, 33, 1, 2, 3, padding=1), torch.float32),
        ("pac_conv2d", _pac_conv2d(1, 32, 1, 1, 1, 2, 3, padding=1), torch.float32),
        ("pac_conv2d", _pac_conv2d(1, 2, 2, 2, 2, 3, 3, padding=1), torch.float64),
        ("pac_conv2d", _pac_conv2d(1, 33, 16, 1, 1, 2, 1), torch.float16),
        ("matting_laplacian_energy", _matting_laplacian(2, 1, 3, 4), torch.float32),
        ("matting_laplacian_energy", _matting_laplacian(2, 4, 3, 4), torch.float32),
    ],
    ids=["second_sum", "third_guides", "entries_of_one_tap", "float64", "two_steps", "one_channel", "four_channels"],
)
def test_kernel_of_few_numbers(operator, make, dtype):
    check_against_reference(operator, make, dtype)


def test_kernel_with_a_share_of_several_images(monkeypatch):
    """Of nine tiles of places in three images, the first of two programs takes five."""
    monkeypatch.setattr("restoration_kernels.pac_conv2d_backward_weight_triton._PROGRAMS", 2)
    check_against_reference("pac_conv2d", _pac_conv2d(3, 2, 3, 1, 3, 4, 1), torch.float32)


def test_kernel_of_the_tile_that_needs_most_programs(monkeypatch):
    """Of rows that would fit into one tile of those that may be tried, and take two of this one."""
    tiles = {8: ((4, 4, 1), (8, 4, 1))}
    monkeypatch.setattr("restoration_kernels.pac_conv2d_backward_triton._INPUT_TILES", tiles)
    check_against_reference("pac_conv2d", _pac_conv2d(1, 5, 5, 1, 5, 1, 1, shared=True), torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_kernel_keeps_nan_in_its_image_and_output(dtype):
    arguments = on_triton("pac_conv2d", _pac_conv2d(2, 17, 16, 1, 2, 3, 3, padding=1, bias=False), dtype)
    arguments["x"][1] = arguments["weight"][1] = math.nan
    output = restoration_kernels.pac_conv2d(**arguments, backend="triton")
    assert output[1].isnan().all()
    assert output[0, 1].isnan().all()
    assert output[0, 0].isfinite().all()
    assert output[0, 2:].isfinite().all()


@pytest.mark.parametrize(("outputs", "spoiled"), [(1, "x"), (1, "weight"), (2, "weight")])
def test_kernel_keeps_inf_to_pixels_and_taps_that_meet(outputs, spoiled):
    """Inf in x leaves those taps of a shared filter finite that miss it, and Inf in a tap the pixels that it misses."""
    arguments = on_triton("pac_conv2d", _pac_conv2d(1, 1, outputs, 1, 3, 3, 3, padding=1), torch.float32)
    arguments[spoiled][..., 0, 0] = math.inf
    name = {"x": "weight", "weight": "x"}[spoiled]
    ours, plain = (
        compare.differentiate(compare.public("pac_conv2d", backend), arguments, (name,))[name]
        for backend in ("triton", "reference")
    )
    missed = torch.ones(3, 3, dtype=torch.bool)
    missed[:2, :2] = False
    assert torch.equal(plain[0, 0].isfinite().cpu(), missed)
    torch.testing.assert_close(ours, plain, equal_nan=True)


def test_kernel_gives_nan_for_places_beyond_the_map(monkeypatch):
    """Nobody has looked at the places of a compiled graph."""
    monkeypatch.setattr("restoration_kernels._checks.neighbor_difference", lambda *arguments: None)
    arguments = {
        "features": torch.ones(1, 2, 3, 3),
        "anchors": torch.tensor([4]),
        "neighbors": torch.tensor([[-1, 9, 0, 0, 0, 0, 0, 0]]),
    }
    arguments = {name: value.to(compare.device("triton")) for name, value in arguments.items()}
    compare.skip_unless_able("triton", "neighbor_difference", arguments)
    output = restoration_kernels.neighbor_difference(**arguments, backend="triton")
    assert output[0].isnan().tolist() == [[True] * 2] * 2 + [[False] * 2] * 6


def test_kernel_adds_up_probabilities_too_small_for_float16():
    query = torch.zeros(1, 64, 2, dtype=torch.float16, device=compare.device("triton"))
    query[0, 0, 0] = 1
    key = query.clone()
    key[0, 1:, 1] = 1
    arguments = {"query": query, "key": key, "temperature": 1 / 18}
    compare.skip_unless_able("triton", "info_nce", arguments)
    loss = restoration_kernels.info_nce(**{**arguments, "query": query.requires_grad_()}, backend="triton")
    (gradient,) = torch.autograd.grad(loss[0, 0], query)
    assert gradient[0, 0, 1].item() == pytest.approx(18 * 63 * math.exp(-18), rel=0.02)


def test_kernel_loses_no_digit_of_a_loss_to_large_logits():
    """Of two equal rows, whose logits are 10⁴."""
    rows = torch.tensor([[[100.0, 0.0]] * 2], device=compare.device("triton"))
    arguments = {"query": rows, "key": rows, "temperature": 1.0}
    compare.skip_unless_able("triton", "info_nce", arguments)
    loss = restoration_kernels.info_nce(**arguments, backend="triton")
    torch.testing.assert_close(loss, torch.full_like(loss, math.log(2)))


def on_triton(operator, make, dtype):
    """The sample's arguments; skips where Triton cannot run them."""
    return compare.arguments_for("triton", Sample(operator, "few", "odd", make), dtype)


def check_against_reference(operator, make, dtype):
    """Output and all gradients by the judge."""
    compare.check_values("triton", Sample(operator, "few", "odd", make), dtype, None, DIFFERENTIABLE[operator])


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

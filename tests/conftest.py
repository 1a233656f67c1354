"""Settings that hold for every test."""

import os
from types import SimpleNamespace

import numpy as np
import pytest
import simt_build
import torch
from PIL import Image

from restoration_kernels import _backend


@pytest.fixture(autouse=True)
def numbers_of_its_own():
    """Every test draws the same numbers, whatever ran before it in its process."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def uninitialised_memory_is_nan():
    """torch.empty then gives NaN, so that an output nobody wrote is seen; warn_only, as some torch operators object."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def float32_in_full_width(monkeypatch):
    """Else torch's convolutions on a GPU, and ours, round float32 to tf32; tests of that allow it themselves."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.fixture(autouse=True)
def pages_of_the_system(monkeypatch):
    """Else a test of the command line, which asks for large ones, would leave that to all tests after it."""
    monkeypatch.setenv("THP_MEM_ALLOC_ENABLE", "0")


@pytest.fixture(autouse=True)
def large_gpu_memory_is_returned():
    """Else a process would keep what one test took from the tests of all others."""
    yield
    if torch.cuda.is_initialized() and torch.cuda.memory_reserved() > 2**30:
        torch.cuda.empty_cache()


@pytest.fixture(autouse=True)
def a_fault_of_a_kernel_ends_the_process():
    """It leaves a process in which nothing works on the GPU: test after test would fail, none of them to blame."""
    yield
    if not torch.cuda.is_initialized():
        return
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        if "PYTEST_XDIST_WORKER" in os.environ:
            os._exit(3)  # the test is named, and another process goes on with the others
        pytest.exit(f"a kernel's fault: {error}", returncode=3)


@pytest.fixture
def simulated_gpu(monkeypatch):
    """Lets the cuda backend run on CPU tensors, in the runner of simt_build."""
    if not simt_build.compiler():
        pytest.skip("no C++ compiler")
    module = simt_build.load_extension()
    monkeypatch.setattr(_backend, "extension", lambda: (module, None))
    monkeypatch.setattr(_backend, "why_not_on", lambda backend, device: None)
    # Also where there is a GPU, whose addresses the runner could not read.
    monkeypatch.setattr("compare.device", lambda backend: "cpu")
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=0))


@pytest.fixture
def order(request, monkeypatch):
    """In which the runner of simt_build takes blocks and threads; simt_build.both_orders asks for it."""
    monkeypatch.delenv("SIMT_REVERSE", raising=False)
    if request.param == "reverse":
        monkeypatch.setenv("SIMT_REVERSE", "1")
    return request.param


@pytest.fixture
def float64(request, monkeypatch):
    """Its speed, as CUDA kernels are to take it for; matting_guides.both_speeds_of_float64 asks for it."""
    monkeypatch.setenv("RESTORATION_CUDA_FLOAT64", request.param)


@pytest.fixture(scope="session")
def paintings(tmp_path_factory):
    """Two styles of three smooth pictures."""
    root = tmp_path_factory.mktemp("paintings")
    generator = np.random.default_rng(0)
    for style in ("ink", "green"):
        (root / style).mkdir()
        for number in range(3):
            coarse = Image.fromarray(generator.integers(0, 256, (6, 8, 3), dtype=np.uint8))
            coarse.resize((80, 60), Image.Resampling.BICUBIC).save(root / style / f"{number}.png")
    return root


@pytest.fixture
def folders(tmp_path):
    """Two styles without tables: blue 1..2, ink 1..4."""
    from pictures import paint  # it needs the package restoration, without which the kernels' tests run, too

    for number in (1, 2):
        paint(tmp_path / f"blue/{number}.png", seed=number)
    for number in (1, 2, 3, 4):
        paint(tmp_path / f"ink/{number}.png", seed=10 + number)
    return tmp_path

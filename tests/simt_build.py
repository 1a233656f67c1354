"""Compiles the project's .cu files with g++ against simt/simt.h, so that CUDA kernels run on the CPU.

``load_extension()`` gives a module with the functions of ``restoration_kernels._C``, those ending in ``_cuda``
included: they take addresses of CPU memory, and any stream. Objects are kept in ``build/simt`` under a hash of all that
they depend on.
"""

import ctypes
import fcntl
import functools
import hashlib
import importlib.machinery
import importlib.util
import os
import runpy
import shlex
import shutil
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pybind11
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
CSRC = ROOT / "csrc"
SIMT = ROOT / "tests" / "simt"
CACHE = ROOT / "build" / "simt"

# -O1 compiles a third faster than -O2, and tests are small. Fortified longjmp refuses to switch stacks. Unique symbols
# would give all libraries of a process one state of the runner, whether races are looked for or not.
FLAGS = (
    "-std=c++17",
    "-O1",
    "-g",
    "-fPIC",
    "-fopenmp",
    "-Wall",
    "-Wextra",
    "-Wno-unknown-pragmas",
    "-U_FORTIFY_SOURCE",
    "-fno-gnu-unique",
)
# What watches a kernel's accesses to memory, and the compiler's options for it. Misaligned vectors, which the CPU reads
# without complaint, are an error on a GPU. Races are found by simt/races.cpp, not by the thread sanitizer's runtime.
CHECKS = {
    None: (),
    "memory": ("-fsanitize=address,alignment", "-fno-sanitize-recover=alignment", "-fno-omit-frame-pointer"),
    "races": ("-fsanitize=thread",),
}
INCLUDES = tuple(f"-I{path}" for path in (CSRC, SIMT, sysconfig.get_paths()["include"], pybind11.get_include()))
DEFINITIONS = (
    "-DCPU_ISA=baseline",
    "-DRESTORATION_MODULE=_simt",
    '-DRESTORATION_VERSION="simt"',
    "-DRESTORATION_CUDA",
    '-DRESTORATION_CUDA_VERSION="simt"',
    '-DRESTORATION_CUDA_ARCHITECTURES="simt"',
    "-DRESTORATION_MAXIMUM_GRID_Y=3",  # makes kernels loop over what a grid cannot hold
)


parse_resources = runpy.run_path(str(CSRC / "resource_report.py"))["parse"]


def compiler():
    """The command of the C++ compiler, in words: CXX may name arguments, or a launcher before it. Empty without one."""
    return shlex.split(os.environ.get("CXX") or shutil.which("g++") or "")


needs_compiler = pytest.mark.skipif(not compiler(), reason="no C++ compiler")
both_orders = pytest.mark.parametrize("order", ["forward", "reverse"], indirect=True)  # the fixture is in conftest.py


def nvcc():
    """The CUDA compiler, or None."""
    return os.environ.get("CUDACXX") or shutil.which("nvcc")


@functools.cache
def load_extension():
    """The extension with its CUDA kernels compiled for the CPU."""
    path = build_extension()
    loader = importlib.machinery.ExtensionFileLoader("_simt", str(path))
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader(loader.name, loader))
    loader.exec_module(module)
    return module


def build_extension(check=None):
    """Path of the module that load_extension loads, with a check of its accesses to memory."""
    return _link([CSRC / "bindings.cpp", *sorted(CSRC.glob("*_cpu.cpp")), *sorted(CSRC.glob("*.cu"))], check)


def load_library(source, check=None):
    """A shared library made of one .cu file with C functions, through ctypes."""
    return ctypes.CDLL(str(_link([source], check)))


def build_sanitized_program(source):
    """A program made of one .cu file with a main function, under the check of memory."""
    return _link([source], "memory", shared=False)


def address_sanitizer_environment():
    """Environment in which Python can load a sanitized module. The interpreter itself leaks by design."""
    runtime = _run([*compiler(), "-print-file-name=libasan.so"]).strip()
    return {**os.environ, "LD_PRELOAD": runtime, "ASAN_OPTIONS": "detect_leaks=0", "OMP_NUM_THREADS": "1"}


def resource_report(source):
    """What ptxas says of each kernel of a .cu file, for sm_86 and sm_90."""
    targets = [f"-gencode=arch=compute_{number},code=sm_{number}" for number in (86, 90)]
    command = [nvcc(), "-std=c++17", "-O3", *targets, "--ptxas-options=-v", "-c", str(source)]
    path = _cached(command, source.read_bytes() + _headers(), ".cuda.o")
    return parse_resources(path.with_name(f"{path.name}.log").read_text())


def dtype_code(tensor):
    """What the bindings call the tensor's dtype."""
    return load_extension().DTYPES[str(tensor.dtype).removeprefix("torch.")]


def accumulate_dtype(dtype):
    """The dtype that the kernels keep sums in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _link(sources, check, shared=True):
    options = CHECKS[check]
    if check == "races":
        # Kernels alone are watched, so they come first: of functions shared with the CPU the linker keeps the first.
        sources = [*sorted(sources, key=lambda source: source.suffix != ".cu"), SIMT / "races.cpp"]
        options = ()
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        watched = [CHECKS[check] if source.suffix == ".cu" else options for source in sources]
        objects = list(pool.map(_compile, sources, watched))
    command = [*compiler(), *FLAGS, *options, *(["-shared"] if shared else []), *map(str, objects)]
    return _cached(command, b"".join(path.name.encode() for path in objects), ".so" if shared else "")


def _compile(source, options):
    command = [*compiler(), *FLAGS, *options, *DEFINITIONS, *INCLUDES, "-x", "c++", "-c", str(source)]
    return _cached(command, source.read_bytes() + _headers(), ".o")


def _headers():
    paths = sorted(path for folder in (CSRC, SIMT) for path in folder.iterdir() if path.suffix in (".h", ".cuh"))
    return b"".join(path.read_bytes() for path in paths)


def _cached(command, content, suffix):
    """The output of the command, run only where no earlier run with the same content left it."""
    digest = hashlib.sha256(content + repr(command).encode() + _compiler_version().encode()).hexdigest()[:24]
    path = CACHE / (digest + suffix)
    if not path.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        # Of several processes of tests one runs it, and the others wait.
        with open(path.with_name(f"{path.name}.lock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not path.exists():
                unfinished = path.with_name(f"{path.name}.unfinished")
                path.with_name(f"{path.name}.log").write_text(_run([*command, "-o", str(unfinished)]))
                unfinished.replace(path)
    return path


@functools.cache
def _compiler_version():
    return _run([*compiler(), "--version"])


def _run(command):
    result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if result.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}\n{result.stdout}")
    return result.stdout


def pointer(tensor):
    """The address of a tensor's numbers, for a function of a library of load_library."""
    return ctypes.c_void_p(tensor.data_ptr())

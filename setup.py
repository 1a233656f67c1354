"""Builds the extension restoration_kernels._C from csrc with CMake and Ninja; the rest is in pyproject.toml.

Environment: RESTORATION_CUDA=0 leaves the CUDA kernels out, 1 or a CUDACXX demands them (default: where nvcc is found);
RESTORATION_CUDA_ARCHS names the architectures by number, as in "86-real,90"; CXX and CUDACXX name the compilers,
CXX with options or after a launcher, as in "ccache g++", if need be.
"""

import hashlib
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"

# Code for the RTX 3090 that the network is trained on and for Hopper, and PTX that the driver compiles at first use on
# any other device with cp.async and products of bfloat16: an A100, or what is newer.
DEFAULT_ARCHITECTURES = "86-real,90-real,80-virtual"


class CMakeBuild(build_ext):
    """Configures and builds csrc, in a folder that stays, and hands the module to setuptools."""

    def build_extension(self, extension):
        module = build_module(self.distribution.get_version())
        destination = Path(self.get_ext_fullpath(extension.name))
        destination.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(module, destination)


def build_module(version):
    """Path of the module, built anew as far as anything that it depends on has changed."""
    compiler = find_compiler()
    nvcc = find_nvcc()
    # What CMake cannot change in a folder once configured gives another folder. What a build in isolation leaves behind
    # (the paths of its deleted cmake, ninja and pybind11) is overwritten by passing it each time.
    toolchain = repr((str(ROOT), compiler, nvcc, sysconfig.get_platform(), sys.implementation.cache_tag))
    folder = ROOT / "build" / f"csrc-{hashlib.sha256(toolchain.encode()).hexdigest()[:12]}"
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    options = {
        "CMAKE_BUILD_TYPE": "Release",
        "CMAKE_CXX_COMPILER": compiler,
        "CMAKE_MAKE_PROGRAM": tool("ninja"),
        "MODULE_SUFFIX": suffix,
        "PYBIND11_INCLUDE": pybind11_include(),
        "PYTHON": sys.executable,
        "PYTHON_INCLUDE": sysconfig.get_paths()["include"],
        "RESTORATION_CUDA": "ON" if nvcc else "OFF",
    }
    if nvcc:
        options |= {"CMAKE_CUDA_COMPILER": nvcc, "CMAKE_CUDA_ARCHITECTURES": architectures()}
    digest = runpy.run_path(str(ROOT / "kernels" / "_sources.py"))["digest"]
    options["RESTORATION_VERSION"] = f"{version}+{digest(CSRC)}"
    cmake = tool("cmake")
    definitions = [f"-D{name}={value}" for name, value in options.items()]
    run([cmake, "-G", "Ninja", "-S", str(CSRC), "-B", str(folder), *definitions], nvcc)
    run([cmake, "--build", str(folder)], nvcc)
    if nvcc:
        collect = runpy.run_path(str(CSRC / "resource_report.py"))["collect"]
        collect(folder, ROOT / "build" / "resources.json")
    return folder / f"_C{suffix}"


def find_compiler():
    """CMake's list of the C++ compiler that CXX names and its arguments, or of the first of the usual compilers."""
    words = shlex.split(os.environ.get("CXX", ""))
    programs = words[:1] or ["c++", "g++", "clang++"]
    found = next(filter(None, map(shutil.which, programs)), None)
    if found is None:
        raise CompileError(
            f"restoration_kernels needs a C++17 compiler for its CPU kernels, and none was found (looked for "
            f"{', '.join(programs)}). Install one (on Debian or Ubuntu: apt install g++) or name it in CXX."
        )
    return ";".join([found, *words[1:]])


def find_nvcc():
    """The CUDA compiler, or None where the CUDA kernels are not to be built."""
    wish = os.environ.get("RESTORATION_CUDA", "")
    if wish not in ("", "0", "1"):
        raise CompileError(f"RESTORATION_CUDA must be 0, 1 or unset, got {wish!r}.")
    if wish == "0":
        return None
    if os.environ.get("CUDACXX"):
        candidates = [os.environ["CUDACXX"]]
    else:
        homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
        candidates = ["nvcc", *(f"{home}/bin/nvcc" for home in homes if home)]
    found = next(filter(None, map(shutil.which, candidates)), None)
    if found is None and (wish == "1" or os.environ.get("CUDACXX")):
        raise CompileError(
            f"RESTORATION_CUDA=1 or CUDACXX demands CUDA kernels, but nvcc was not found (looked for "
            f"{', '.join(candidates)}): install the CUDA toolkit, name nvcc in CUDACXX, or set RESTORATION_CUDA=0."
        )
    return found


def architectures():
    """CMake's list of CUDA architectures."""
    wish = os.environ.get("RESTORATION_CUDA_ARCHS") or DEFAULT_ARCHITECTURES
    names = re.split(r"[,; ]+", wish.strip())
    for name in names:
        if not re.fullmatch(r"\d{2,3}[af]?(-real|-virtual)?", name):
            raise CompileError(
                f"RESTORATION_CUDA_ARCHS must be a list such as {DEFAULT_ARCHITECTURES}, got {name!r} in {wish!r}."
            )
    return ";".join(names)


def tool(name):
    """Path of cmake or ninja: that of the Python package, which is there in a build in isolation, or the system's."""
    try:
        package = __import__(name)
        folder = Path(package.CMAKE_BIN_DIR if name == "cmake" else package.BIN_DIR)
        found = shutil.which(str(folder / name))
    except (ImportError, AttributeError):  # a folder of that name on the path is imported as an empty package
        found = shutil.which(name)
    if found is None:
        raise CompileError(f"building restoration_kernels needs {name}: pip install {name}")
    return found


def pybind11_include():
    """Folder of pybind11's headers."""
    try:
        import pybind11
    except ImportError as error:
        raise CompileError("building restoration_kernels needs pybind11: pip install pybind11") from error
    return pybind11.get_include()


def run(command, nvcc):
    """Runs a build step; its own messages have said what went wrong."""
    if subprocess.run(command, check=False).returncode != 0:
        hint = f" If nvcc ({nvcc}) is to blame, RESTORATION_CUDA=0 builds without the CUDA kernels." if nvcc else ""
        raise CompileError(f"building restoration_kernels._C failed; the messages above say why.{hint}")


setup(ext_modules=[Extension("restoration_kernels._C", sources=[])], cmdclass={"build_ext": CMakeBuild})

"""The compiled extension: how it behaves among threads, forks and instruction sets, and every way to install it."""

import json
import os
import runpy
import shutil
import subprocess
import sys
import sysconfig
import types
import zipfile
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path

import pytest
import simt_build
import torch

from restoration_kernels import _backend, _sources

ROOT = simt_build.ROOT
EXTENSION, REASON = _backend.extension()
needs_extension = pytest.mark.skipif(EXTENSION is None, reason=str(REASON))
linux_only = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc, or forks")

# What is put before each script that runs in a process of its own.
PRELUDE = """
import os, sys
import torch
from restoration_kernels import _backend
sys.path.insert(0, {tests!r})
from test_build import forward
torch.set_num_threads(1)
x, weight = torch.linspace(-1, 1, 8 * 300 * 200).view(2, 4, 300, 200), torch.tensor([0.5, -1.0, 2.0])
"""


def forward(x, weight, threads):
    """dual_pool_attention by the CPU kernel."""
    batch, channels, height, width = x.shape
    y, mean, scale = torch.empty_like(x), torch.empty(batch, channels), torch.empty(batch, channels)
    EXTENSION.dual_pool_attention_forward_cpu(
        x=x.data_ptr(),
        weight=weight.data_ptr(),
        y=y.data_ptr(),
        mean=mean.data_ptr(),
        scale=scale.data_ptr(),
        batch=batch,
        channels=channels,
        height=height,
        width=width,
        taps=len(weight),
        pool_size=50,
        dtype=EXTENSION.DTYPES["float32"],
        threads=threads,
    )
    return y


def run_script(script, **environment):
    """What the script prints; its failure, or more than a minute (a deadlock), as AssertionError."""
    command = [sys.executable, "-c", PRELUDE.format(tests=str(ROOT / "tests")) + script]
    result = subprocess.run(
        command, env={**os.environ, **environment}, capture_output=True, text=True, timeout=60, check=False
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


@needs_extension
def test_build_info():
    info = EXTENSION.build_info()
    assert info["version"].partition("+")[::2] == (version("painting-restoration"), _sources.digest(ROOT / "csrc"))
    assert set(info) == {"version", "compiler", "cuda", "cuda_architectures", "openmp", "cpu_isa"}
    assert (info["cuda"] is None) == (info["cuda_architectures"] == [])
    assert hasattr(EXTENSION, "dual_pool_attention_forward_cuda") == (info["cuda"] is not None)


@needs_extension
def test_an_extension_of_other_sources_is_told_of(tmp_path, recwarn):
    assert EXTENSION is _backend.extension.__wrapped__()[0]
    _backend._warn_of_other_sources(EXTENSION, tmp_path / "none")
    assert not recwarn, "installed elsewhere, or just built"
    (tmp_path / "bindings.cpp").write_text("// another")
    with pytest.warns(UserWarning, match=f"built from other sources than those in {tmp_path}: build it again"):
        _backend._warn_of_other_sources(EXTENSION, tmp_path)


@needs_extension
def test_bindings_take_keywords_only():
    with pytest.raises(TypeError, match="incompatible function arguments"):
        EXTENSION.dual_pool_attention_forward_cpu(*range(13))


@needs_extension
def test_every_thread_count_gives_the_same_bits():
    x, weight = torch.randn(2, 3, 181, 97), torch.randn(5)
    results = [forward(x, weight, threads) for threads in (1, 2, 3, 8)]
    assert all(torch.equal(result, results[0]) for result in results)


@needs_extension
def test_two_python_threads_at_once():
    inputs = [(torch.randn(2, 4, 250, 130), torch.randn(5)) for _ in range(4)]
    expected = [forward(x, weight, 1) for x, weight in inputs]
    with ThreadPoolExecutor(2) as pool:
        for _ in range(5):
            results = pool.map(lambda pair: forward(*pair, 2), inputs)
            assert all(torch.equal(*pair) for pair in zip(results, expected, strict=True))


@needs_extension
@linux_only
def test_threads_are_those_of_torch():
    """One OpenMP runtime in the process, and no second thread where torch is told to use one."""
    printed = run_script("""
def count():
    return len(os.listdir("/proc/self/task"))
before = count()
forward(x, weight, torch.get_num_threads())
one = count()
torch.set_num_threads(2)
forward(x, weight, torch.get_num_threads())
runtimes = {line.split()[-1] for line in open("/proc/self/maps") if "omp" in line.rpartition("/")[2]}
print(one - before, count() - before, len(runtimes))
""")
    assert printed.split() == ["0", "1", "1"]


@needs_extension
@linux_only
def test_forked_processes_keep_working():
    """A fork after a parallel kernel: OpenMP's threads are gone in the child, which must not wait for them."""
    printed = run_script("""
class Dataset(torch.utils.data.Dataset):
    def __len__(self):
        return 4
    def __getitem__(self, index):
        return forward(x, weight, 2).sum(dtype=torch.float64)
expected = forward(x, weight, 2)
child = os.fork()
if child == 0:
    os._exit(0 if (forward(x, weight, 2).numpy() == expected.numpy()).all() else 1)
print(os.waitpid(child, 0)[1])
loader = torch.utils.data.DataLoader(Dataset(), num_workers=2, multiprocessing_context="fork")
print(all(torch.isclose(total, expected.sum(dtype=torch.float64)) for total in loader))
""")
    assert printed.split() == ["0", "True"]


@needs_extension
def test_empty_instruction_set_is_none():
    """As of every other variable."""
    best = EXTENSION.build_info()["cpu_isa"]
    run_script(f"assert _backend.extension()[0].build_info()['cpu_isa'] == {best!r}", RESTORATION_CPU_ISA="")


@needs_extension
@pytest.mark.parametrize("isa", ["baseline", "avx2"])
def test_lesser_instruction_sets(isa, tmp_path):
    """What the kernels do on older processors; all other tests run the best that this one has."""
    if EXTENSION.build_info()["cpu_isa"] == "baseline":
        pytest.skip("this processor runs one instruction set")
    script = f"torch.save([_backend.extension()[0].build_info(), forward(x, weight, 2)], {str(tmp_path / 'y')!r})"
    run_script(script, RESTORATION_CPU_ISA=isa)
    info, y = torch.load(tmp_path / "y")
    x, weight = torch.linspace(-1, 1, 8 * 300 * 200).view(2, 4, 300, 200), torch.tensor([0.5, -1.0, 2.0])
    assert info["cpu_isa"] == isa
    torch.testing.assert_close(y, forward(x, weight, 1))


@needs_extension
def test_unknown_instruction_set():
    script = "import sys; sys.path.insert(0, sys.argv[1]); import _C"
    command = [sys.executable, "-c", script, os.path.dirname(EXTENSION.__file__)]
    environment = {**os.environ, "RESTORATION_CPU_ISA": "avx9000"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert "ImportError: RESTORATION_CPU_ISA must be one that this processor runs" in result.stderr


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"PATH": "", "CXX": ""}, "needs a C++17 compiler for its CPU kernels, and none was found"),
        ({"CXX": "no-such-compiler"}, "looked for no-such-compiler"),
        ({"RESTORATION_CUDA": "yes"}, "RESTORATION_CUDA must be 0, 1 or unset, got 'yes'"),
        ({"CUDACXX": "/no/nvcc"}, "nvcc was not found (looked for /no/nvcc)"),
        ({"CUDACXX": "true", "RESTORATION_CUDA_ARCHS": "8.6"}, "RESTORATION_CUDA_ARCHS must be a list such as 86-real"),
    ],
)
def test_build_errors_name_cause_and_remedy(tmp_path, environment, message):
    copy_tree(tmp_path / "tree", code=False)
    command = [sys.executable, "setup.py", "build_ext"]
    result = subprocess.run(
        command, cwd=tmp_path / "tree", env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )
    assert result.returncode != 0
    assert message in result.stderr.splitlines()[-1]


@pytest.fixture
def setup_functions(monkeypatch):
    """Functions of setup.py, which itself builds nothing here."""
    monkeypatch.setattr("setuptools.setup", lambda **options: None)
    return runpy.run_path(str(ROOT / "setup.py"))


def test_nvcc_that_nobody_asks_for_may_be_missing(setup_functions, monkeypatch):
    for name in ("RESTORATION_CUDA", "CUDACXX"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("shutil.which", lambda program: None)
    assert setup_functions["find_nvcc"]() is None
    monkeypatch.setenv("RESTORATION_CUDA", "1")
    with pytest.raises(setup_functions["CompileError"], match="demands CUDA kernels"):
        setup_functions["find_nvcc"]()


def program(path):
    """An executable file that does nothing."""
    path.write_text("#!/bin/sh\n")
    path.chmod(0o755)
    return str(path)


@pytest.mark.parametrize(
    ("wish", "arguments"),
    [("g++", ""), ("g++ -m64", ";-m64"), ("g++ '-DNAME=a b'", ";-DNAME=a b"), ("", ""), (" ", "")],
)
def test_compiler_with_its_arguments(setup_functions, tmp_path, monkeypatch, wish, arguments):
    """As CMake's list; make and CMake take the same from CXX."""
    compiler = program(tmp_path / "g++")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CXX", wish)
    assert setup_functions["find_compiler"]() == compiler + arguments


def test_compiler_after_a_launcher(setup_functions, tmp_path, monkeypatch):
    launcher = program(tmp_path / "ccache")
    monkeypatch.setenv("CXX", f"{launcher} g++ -m64")
    assert setup_functions["find_compiler"]() == f"{launcher};g++;-m64"


@pytest.mark.parametrize("name", ["cmake", "ninja"])
def test_folder_that_hides_a_tool(setup_functions, tmp_path, monkeypatch, name):
    """Python imports any folder on its path as a package, here one of CMake's modules without the package cmake."""
    monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setenv("PATH", str(tmp_path))
    path = program(tmp_path / name)
    assert setup_functions["tool"](name) == path


def copy_tree(folder, code=True):
    """A copy of what an installation needs, to build in without touching this checkout."""
    folder.mkdir()
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    if code:
        for name in ("csrc", "kernels", "restoration"):
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    return folder


def pip(*arguments, **environment):
    """Runs pip; skips where a build in isolation cannot fetch its requirements."""
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *map(str, arguments)]
    result = subprocess.run(
        command, env={**os.environ, **environment}, capture_output=True, text=True, timeout=900, check=False
    )
    if "No matching distribution found for" in result.stdout + result.stderr:
        pytest.skip("the build requirements cannot be fetched here")
    assert result.returncode == 0, result.stdout + result.stderr


def installed_build_info(folder):
    """build_info of the package installed in a folder, imported by a process that sees no GPU."""
    script = """
import json, site, sys
site.addsitedir(sys.argv[1])
sys.path += sys.argv[2:]
import restoration_kernels
from restoration_kernels import _C
print(json.dumps([restoration_kernels.__file__, _C.__file__, _C.build_info()]))
"""
    # -S: an editable install of this checkout, which site would activate, must not be found first.
    dependencies = {sysconfig.get_paths()[name] for name in ("purelib", "platlib")}
    command = [sys.executable, "-S", "-c", script, str(folder), *dependencies]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    package, extension, info = json.loads(result.stdout)
    return Path(package).parent, Path(extension), info


WITHOUT_ISOLATION = ("--no-build-isolation", "--no-deps")


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """One tree that the slow tests build in one after the other, as a person does."""
    return copy_tree(tmp_path_factory.mktemp("build") / "tree")


@pytest.mark.slow
def test_wheel_in_isolation(tree, tmp_path):
    """Twice in one tree: the second build finds the folder of the first, whose cmake and pybind11 are deleted."""
    pip("wheel", "--no-deps", "--wheel-dir", tmp_path, tree)
    built = {path: path.stat().st_mtime_ns for path in tree.rglob("*.cu.o")}
    pip("wheel", "--no-deps", "--wheel-dir", tmp_path, tree)
    assert {path: path.stat().st_mtime_ns for path in tree.rglob("*.cu.o")} == built, "nvcc ran again for nothing"

    (wheel,) = tmp_path.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    package, extension, info = installed_build_info(tmp_path / "site")
    assert package == extension.parent == tmp_path / "site" / "restoration_kernels"
    assert (info["cuda"] is None) == (simt_build.nvcc() is None)


@pytest.mark.slow
def test_build_collects_the_resources_of_every_kernel(tree):
    if simt_build.nvcc() is None:
        pytest.skip("no nvcc")
    pip("wheel", *WITHOUT_ISOLATION, "--wheel-dir", tree.parent, tree)
    report = json.loads((tree / "build" / "resources.json").read_text())
    assert {kernel["architecture"] for kernel in report} == {"sm_86", "sm_90"}
    symbols = " ".join(kernel["symbol"] for kernel in report)
    for source in tree.glob("csrc/*.cu"):
        assert f"{source.stem}_cu" in symbols, f"{source.name} has no kernel in the report"


@pytest.mark.slow
@pytest.mark.parametrize(("name", "cuda"), [("device.cu", ""), ("dual_pool_attention.h", "0")])
def test_edited_source_is_built_anew(tree, tmp_path, name, cuda):
    if not cuda and simt_build.nvcc() is None:
        pytest.skip("no nvcc")
    times = []
    for text in ("", "", "\n"):
        with open(tree / "csrc" / name, "a") as source:
            source.write(text)
        pip("wheel", *WITHOUT_ISOLATION, "--wheel-dir", tmp_path, tree, RESTORATION_CUDA=cuda)
        times.append(max(path.stat().st_mtime_ns for path in tree.glob("build/csrc-*/_C*.so")))
    assert times[0] == times[1] < times[2]


@pytest.mark.slow
def test_copies_for_an_instruction_set_hold_no_shared_code(tree, tmp_path):
    """Of a function in several files the linker keeps one copy: it could be one that this processor cannot run."""
    pip("wheel", *WITHOUT_ISOLATION, "--wheel-dir", tmp_path, tree, RESTORATION_CUDA="0")
    objects = list(tree.glob("build/csrc-*/CMakeFiles/cpu_avx*.dir/*.o"))
    if not objects or shutil.which("nm") is None:
        pytest.skip("one instruction set, or no nm")
    for path in objects:
        symbols = subprocess.run(["nm", "--defined-only", path], check=True, capture_output=True, text=True).stdout
        weak_functions = [line for line in symbols.splitlines() if line.split()[-2] == "W" and "avx" not in line]
        assert not weak_functions, path


@pytest.mark.slow
def test_source_distribution(tree, tmp_path):
    command = [sys.executable, "setup.py", "-q", "sdist", "--dist-dir", str(tmp_path)]
    subprocess.run(command, cwd=tree, check=True, capture_output=True)
    (archive,) = tmp_path.glob("*.tar.gz")
    pip("install", *WITHOUT_ISOLATION, "--target", tmp_path / "site", archive, RESTORATION_CUDA="0")
    _, _, info = installed_build_info(tmp_path / "site")
    assert info["cuda"] is None


@pytest.mark.slow
def test_editable_install(tree, tmp_path):
    pip("install", *WITHOUT_ISOLATION, "--ignore-installed", "--prefix", tmp_path, "-e", tree, RESTORATION_CUDA="0")
    (site,) = tmp_path.glob("lib/python*/site-packages")
    package, extension, _ = installed_build_info(site)
    assert package == extension.parent == tree / "kernels"

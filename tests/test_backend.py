import asyncio
import contextlib
import importlib.util
import logging
import re
import subprocess
import sys
import threading
import warnings
from pathlib import Path

import compare
import pytest
import torch

import restoration_kernels
from restoration_kernels import _backend, available_backends, dual_pool_attention, use_backend
from restoration_kernels.__main__ import main


@pytest.fixture
def operator(monkeypatch):
    """An operator that answers with the name of its backend; its cpu kernel takes float32 only, the others nothing."""
    monkeypatch.setattr(_backend, "OPERATORS", dict(_backend.OPERATORS))
    monkeypatch.setattr(_backend, "why_not_here", {"cuda": "no device", "triton": "no triton"}.get)
    monkeypatch.delenv(_backend.ENVIRONMENT_VARIABLE, raising=False)
    operator = _backend.Operator("sample", lambda x: "reference")
    operator.register("cpu", lambda x: "cpu", lambda x: None if x.dtype == torch.float32 else f"x is {x.dtype}")
    operator.register("cuda", lambda x: "cuda", lambda x: None)
    return operator


X = torch.zeros(1)


def test_automatic_choice_is_the_fastest_that_can(operator, caplog):
    with caplog.at_level(logging.DEBUG, "restoration_kernels"):
        assert operator.run(None, x=X) == "cpu"
        assert operator.run(None, x=X.double()) == "reference"
    assert "sample skips cuda: no device" in caplog.messages
    assert "sample skips triton: no triton kernel in this version" in caplog.messages
    assert "sample skips cpu: x is torch.float64" in caplog.messages


def test_argument_beats_context_beats_environment(operator, monkeypatch):
    monkeypatch.setenv("RESTORATION_BACKEND", "reference")
    assert operator.run(None, x=X) == "reference"
    with use_backend("cpu"):
        assert operator.run(None, x=X) == "cpu"
        assert operator.run("reference", x=X) == "reference"
        with use_backend("reference"):
            assert operator.run(None, x=X) == "reference"
        assert operator.run(None, x=X) == "cpu"
        with use_backend(None):
            assert operator.run(None, x=X) == "reference"
    monkeypatch.setenv("RESTORATION_BACKEND", "")
    assert operator.run(None, x=X) == "cpu"


def test_context_ends_with_an_exception(operator):
    with pytest.raises(KeyError), use_backend("reference"):
        raise KeyError
    assert operator.run(None, x=X) == "cpu"


def test_context_holds_for_its_thread_and_task_alone(operator):
    seen = {}

    async def task(name):
        with use_backend(name):
            await asyncio.sleep(0)
            seen[name] = operator.run(None, x=X)

    async def both():
        await asyncio.gather(task("cpu"), task("reference"))

    asyncio.run(both())
    with use_backend("reference"):
        thread = threading.Thread(target=lambda: seen.update(thread=operator.run(None, x=X)))
        thread.start()
        thread.join()
    assert seen == {"cpu": "cpu", "reference": "reference", "thread": "cpu"}


@pytest.mark.parametrize(
    ("wish", "reason"),
    [("cuda", "no device"), ("triton", "no triton kernel in this version"), ("cpu", "x is torch.float64")],
)
def test_wish_that_cannot_be_met(operator, wish, reason):
    must = "sample: backend must be able to run this call (reference can; without a wish the fastest of them does)"
    with pytest.raises(RuntimeError) as raised:
        operator.run(wish, x=X.double())
    assert str(raised.value) == f"{must}, got {wish!r} from the argument: {reason}"
    with pytest.raises(RuntimeError) as raised, use_backend(wish):
        operator.run(None, x=X.double())
    assert str(raised.value) == f"{must}, got {wish!r} from use_backend: {reason}"


@compare.one_case(*compare.DIFFERENTIABLE)
def test_batched_gradients_refused(backend, sample):
    compare.check_batched_gradients_refused(backend, sample)


@compare.one_case(*compare.DIFFERENTIABLE)
def test_autocast_leaves_float64_alone(backend, sample):
    arguments = compare.arguments_for(backend, sample, torch.float64)
    function = compare.public(sample.operator, backend)
    with torch.autocast(compare.device(backend), torch.bfloat16):
        output = compare.joined(function(**arguments))
    assert torch.equal(output, compare.joined(function(**arguments)))
    assert output.dtype == torch.float64


@compare.one_case(
    "pac_conv2d",
    "info_nce",
    "matting_laplacian_apply",
    "dual_pool_attention",
    "dual_pool_attention_pad2d",
    backends=compare.KERNELS,
)
def test_backward_notices_that_inputs_have_changed(backend, sample):
    """Those that it reads again: it would compute gradients of other numbers in silence."""
    arguments = compare.arguments_for(backend, sample, torch.float32)
    leaf, *others = (value for value in arguments.values() if torch.is_tensor(value))
    leaf.requires_grad_()
    output = compare.public(sample.operator, backend)(**arguments)
    for other in others:
        other.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


def test_unknown_backend(monkeypatch):
    must = "backend must be one of cuda, triton, cpu, reference"
    x, weight = torch.zeros(1, 1, 1, 1), torch.zeros(1)
    with pytest.raises(ValueError, match=f"^use_backend: {must}, got 'gpu' from the argument$"):
        use_backend("gpu")
    with pytest.raises(ValueError, match=f"^dual_pool_attention: {must}, got 'gpu' from the argument$"):
        dual_pool_attention(x, weight, backend="gpu")
    monkeypatch.setenv("RESTORATION_BACKEND", "CPU")
    with pytest.raises(ValueError, match=r"got 'CPU' from the environment variable RESTORATION_BACKEND$"):
        dual_pool_attention(x, weight)


def test_cuda_tensor_on_the_reference_warns_once(operator, monkeypatch):
    reasons = {"cuda": "no device", "triton": "no triton", "cpu": "x is on cuda"}
    monkeypatch.setattr(operator, "why_not", lambda backend, x: reasons[backend])
    with pytest.warns(UserWarning, match="^sample runs CUDA tensors on the slow reference: no device; no triton; x is"):
        operator._report("reference", torch.device("cuda"), {"x": X})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        operator._report("reference", torch.device("cuda"), {"x": X})


def test_available_backends(operator):
    assert available_backends() == ("cpu", "reference")


def test_compile_takes_the_wish_of_its_tracing():
    x, weight = torch.randn(1, 3, 4, 4), torch.randn(3)
    compiled = torch.compile(lambda x: dual_pool_attention(x, weight), fullgraph=True, backend="eager")
    with use_backend("reference"):
        assert torch.equal(compiled(x), dual_pool_attention(x, weight))


@pytest.fixture
def extension(monkeypatch):
    """Replaces the compiled module, and triton, by what a function returns or raises; "missing" where there is none."""

    def replace(load):
        monkeypatch.setattr(_backend.importlib.util, "find_spec", lambda name: None if load == "missing" else object())
        monkeypatch.setattr(_backend.importlib, "import_module", load)
        monkeypatch.setattr(_backend, "_warn_of_other_sources", lambda module, csrc: None)
        forget()

    def forget():
        _backend.extension.cache_clear()
        _backend._why_no_triton.cache_clear()

    yield replace
    monkeypatch.undo()
    forget()


def broken(name):
    raise ImportError("undefined symbol: spam")


@pytest.mark.parametrize(
    ("load", "reason"),
    [
        (broken, "the compiled extension failed to load (undefined symbol: spam); reinstall the package"),
        ("missing", "the compiled extension was not built; reinstall the package where a C++ compiler is present"),
    ],
)
def test_reference_works_without_the_extension(extension, load, reason, capsys):
    x, weight = torch.randn(1, 3, 4, 4), torch.randn(3)
    expected = dual_pool_attention(x, weight, backend="reference")
    extension(load)
    assert _backend.why_not_here("cuda") == reason
    assert torch.equal(dual_pool_attention(x, weight), expected)
    message = (
        "dual_pool_attention: backend must be able to run this call (reference can; without a wish the fastest of "
        f"them does), got 'cpu' from the argument: {reason}"
    )
    with pytest.raises(RuntimeError) as raised:
        dual_pool_attention(x, weight, backend="cpu")
    assert str(raised.value) == message
    main()
    assert f"compiled extension: {reason}\n" in capsys.readouterr().out


def test_a_wish_for_instructions_is_not_passed_over(extension):
    """Without the extension every call would take the slow reference, and say nothing."""
    message = "RESTORATION_CPU_ISA must be one that this processor runs (baseline), got avx9000"

    def refuse(name):
        raise ImportError(message)

    extension(refuse)
    with pytest.raises(ValueError) as raised:
        dual_pool_attention(torch.randn(1, 3, 4, 4), torch.randn(3))
    assert str(raised.value) == message


def test_table_says_in_one_line_which_instructions_are_unknown(extension, capsys):
    def refuse(name):
        raise ImportError("RESTORATION_CPU_ISA must be one that this processor runs (baseline), got sse9")

    extension(refuse)
    with pytest.raises(SystemExit) as raised:
        main()
    assert raised.value.code == 2
    message = "RESTORATION_CPU_ISA must be one that this processor runs (baseline), got sse9\n"
    assert capsys.readouterr() == ("", message)


def test_table_says_in_one_line_which_backend_is_unknown(monkeypatch, capsys):
    monkeypatch.setenv(_backend.ENVIRONMENT_VARIABLE, "gpu")
    with pytest.raises(SystemExit) as raised:
        main()
    assert raised.value.code == 2
    wish = "'gpu' from the environment variable RESTORATION_BACKEND"
    message = f"restoration_kernels: backend must be one of cuda, triton, cpu, reference, got {wish}\n"
    assert capsys.readouterr() == ("", message)


def test_wish_for_an_absent_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(_backend, "_ON_ANY_DEVICE", ("reference",))
    for backend in ("cuda", "triton"):
        with pytest.raises(RuntimeError, match=f"reference can; .* got '{backend}' from the argument: .*no CUDA dev"):
            dual_pool_attention(torch.zeros(1, 1, 1, 1), torch.zeros(1), backend=backend)


def test_tensors_where_the_backend_cannot_read_them(operator, monkeypatch):
    monkeypatch.setattr(_backend, "why_not_here", lambda backend: None)
    assert operator.why_not("cuda", x=X) == "the tensors are on cpu, not on cuda"
    assert operator.why_not("cpu", x=X.to("meta")) == "the tensors are on meta, not on cpu"


class Extension:
    """A compiled module for other GPUs than the one that is there, or for none."""

    def __init__(self, cuda):
        self.cuda = cuda

    def build_info(self):
        return {"cuda": self.cuda}

    def cuda_unavailable_reason(self, *, device):
        return "no kernel image is available" if device == 0 else None


def test_extension_without_kernels_for_the_gpu(extension, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device", contextlib.nullcontext)
    extension(lambda name: Extension(None))
    assert _backend.why_not_here("cuda").startswith("the compiled extension was built without CUDA kernels; reinstall")
    extension(lambda name: Extension("13.0"))
    assert _backend.why_not_here("cuda") is None
    _backend._why_not_on_gpu.cache_clear()
    try:
        reason = _backend.why_not_on("cuda", torch.device("cuda", 0))
        assert reason.startswith(
            "the compiled kernels do not run on this GPU (no kernel image is available); reinstall"
        )
        assert _backend.why_not_on("cuda", torch.device("cuda", 1)) is None
    finally:
        _backend._why_not_on_gpu.cache_clear()


def test_triton_runs_on_the_cpu_when_interpreted(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(_backend, "_why_no_triton", lambda: None)
    monkeypatch.setattr(_backend, "_ON_ANY_DEVICE", ("triton", "reference"))
    assert _backend.why_not_here("triton") is None
    assert _backend.why_not_on("triton", torch.device("cpu")) is None
    assert _backend.why_not_here("cuda") is not None


def test_triton_that_fails_to_load_is_skipped(extension, monkeypatch):
    """By the automatic choice, as the compiled extension."""
    x, weight = torch.randn(1, 3, 4, 4), torch.randn(3)
    expected = dual_pool_attention(x, weight, backend="reference")
    monkeypatch.setattr(_backend, "_ON_ANY_DEVICE", ("triton",))
    monkeypatch.setattr(_backend, "_FOR_CPU_TENSORS", ("triton", "cpu", "reference"))
    extension(broken)
    assert torch.equal(dual_pool_attention(x, weight), expected)
    reason = "the package triton failed to load (undefined symbol: spam); reinstall it"
    assert _backend.why_not_here("triton") == reason
    with pytest.raises(RuntimeError, match=re.escape(f"got 'triton' from the argument: {reason}")):
        dual_pool_attention(x, weight, backend="triton")


def test_triton_is_left_out_where_no_gpu_needs_it(extension, monkeypatch):
    """Its import takes a second."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(_backend, "_ON_ANY_DEVICE", ())
    loaded = []
    extension(loaded.append)
    assert _backend.why_not_here("triton") == "torch finds no CUDA device"
    assert loaded == []


def test_table_names_every_operator_and_backend(capsys):
    main()
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    for name in _backend.OPERATORS:
        assert [line[1] for line in lines if line[0] == name] == list(_backend.BACKENDS)
        assert [name, "reference", "available"] in lines


def test_public_names_are_exported():
    assert all(hasattr(restoration_kernels, name) for name in restoration_kernels.__all__)


def test_import_leaves_the_compiler_out():
    """It takes as long as torch itself, and few compile."""
    loaded = "import restoration_kernels, sys; print('torch._dynamo' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", loaded], capture_output=True, text=True, check=True)
    assert run.stdout == "False\n"
    theirs = torch.compiler.assume_constant_result(lambda: None)
    assert vars(theirs) == vars(_backend._constant_when_compiled(lambda: None))


def test_import_under_another_name_is_refused(monkeypatch):
    source = Path(restoration_kernels.__file__)
    spec = importlib.util.spec_from_file_location("kernels", source, submodule_search_locations=[str(source.parent)])
    monkeypatch.setitem(sys.modules, "kernels", importlib.util.module_from_spec(spec))
    with pytest.raises(ImportError, match=r"installed as restoration_kernels, not as kernels: .* belongs to another"):
        spec.loader.exec_module(sys.modules["kernels"])

import asyncio
import importlib.util
import logging
import sys
import threading
import warnings
from pathlib import Path

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


def test_cuda_tensor_on_the_reference_warns_once(operator):
    reasons = {"cuda": "no device", "triton": "no triton", "cpu": "x is on cuda", "reference": None}
    with pytest.warns(UserWarning, match="^sample runs CUDA tensors on the slow reference: no device; no triton; x is"):
        operator._report("reference", torch.device("cuda"), reasons)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        operator._report("reference", torch.device("cuda"), reasons)


def test_available_backends(operator):
    assert available_backends() == ("cpu", "reference")


def test_compile_takes_the_wish_of_its_tracing():
    x, weight = torch.randn(1, 3, 4, 4), torch.randn(3)
    compiled = torch.compile(lambda x: dual_pool_attention(x, weight), fullgraph=True, backend="eager")
    with use_backend("reference"):
        assert torch.equal(compiled(x), dual_pool_attention(x, weight))


def test_extension_that_fails_to_load_keeps_its_error(monkeypatch):
    def fail(name):
        raise ImportError("undefined symbol: spam")

    monkeypatch.setattr(_backend.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(_backend.importlib, "import_module", fail)
    _backend.extension.cache_clear()
    try:
        for backend in ("cpu", "cuda"):
            reason = "the compiled extension failed to load (undefined symbol: spam); reinstall the package"
            assert _backend.why_not_here(backend) == reason
    finally:
        _backend.extension.cache_clear()


def test_extension_that_was_not_built(monkeypatch):
    monkeypatch.setattr(_backend.importlib.util, "find_spec", lambda name: None)
    _backend.extension.cache_clear()
    try:
        assert _backend.why_not_here("cpu").startswith("the compiled extension was not built; reinstall")
        assert _backend.why_not_here("reference") is None
    finally:
        _backend.extension.cache_clear()


def test_table_names_every_operator_and_backend(capsys):
    main()
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    for name in _backend.OPERATORS:
        assert [line[1] for line in lines if line[0] == name] == list(_backend.BACKENDS)
        assert [name, "reference", "available"] in lines


def test_public_names_are_exported():
    assert all(hasattr(restoration_kernels, name) for name in restoration_kernels.__all__)


def test_import_under_another_name_is_refused(monkeypatch):
    source = Path(restoration_kernels.__file__)
    spec = importlib.util.spec_from_file_location("kernels", source, submodule_search_locations=[str(source.parent)])
    monkeypatch.setitem(sys.modules, "kernels", importlib.util.module_from_spec(spec))
    with pytest.raises(ImportError, match=r"installed as restoration_kernels, not as kernels: .* belongs to another"):
        spec.loader.exec_module(sys.modules["kernels"])

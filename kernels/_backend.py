"""Which backend runs a call: the names, the user's wish, the choice, and the compiled extension."""

import contextlib
import contextvars
import functools
import importlib
import importlib.util
import logging
import os
import warnings
from pathlib import Path

import torch

from . import _checks, _sources

# Fastest first: the automatic choice takes the first that can run the call.
BACKENDS = ("cuda", "triton", "cpu", "reference")
ENVIRONMENT_VARIABLE = "RESTORATION_BACKEND"
# Read by the extension, which fails to load where it names what the processor does not run.
_CPU_ISA_VARIABLE = "RESTORATION_CPU_ISA"
# Triton asks for its interpreter, which runs kernels in Python for tests and debugging, when it is imported.
_ON_ANY_DEVICE = ("triton",) if os.environ.get("TRITON_INTERPRET") == "1" else ()
# Those that a CPU's tensors may have; to ask others for the reason why not takes as long as a kernel on a small map.
_FOR_CPU_TENSORS = (*_ON_ANY_DEVICE, "cpu", "reference")
# torch.autocast leaves float64 alone.
_AUTOCAST_DTYPES = (torch.float16, torch.bfloat16, torch.float32)

_logger = logging.getLogger("restoration_kernels")
_context_wish = contextvars.ContextVar("restoration_kernels_backend", default=None)


# Every operator by its public name, filled as the package is imported.
OPERATORS = {}


class Operator:
    """The backends of one operator.

    A backend is a function that runs a call and a predicate of the same keyword arguments that answers "can you run
    this, and if not, why" with None or the reason. The predicates drive the choice, the errors, the test skips and the
    table of ``python -m restoration_kernels``. The reference runs everything.
    """

    def __init__(self, name, reference):
        self.name = name
        self._runs = {"reference": reference}
        self._predicates = {}
        self._warned = False
        OPERATORS[name] = self

    def register(self, backend, run, predicate=lambda **arguments: None):
        """Adds a kernel: run(**arguments) computes, predicate(**arguments) is None or the reason why it cannot.

        Whether the backend works here and on the tensors' device is asked first, for all operators.
        """
        self._runs[backend] = run
        self._predicates[backend] = predicate

    def has(self, backend):
        """Whether the package has a kernel for this backend, usable on this machine or not."""
        return backend in self._runs

    def why_not(self, backend, **arguments):
        """None if the backend can run this call on this machine, else the reason."""
        if not self.has(backend):
            return f"no {backend} kernel in this version"
        if backend == "reference":
            return None
        device = _device(arguments.values())
        return why_not_on(backend, device) or _why_not_now() or self._predicates[backend](**arguments)

    def run(self, wish, **arguments):
        """Runs a checked call on the backend wished for (None: by context, environment, or the fastest that can)."""
        device = _device(arguments.values())
        name = self._choose(wish, device, arguments)
        run = self._runs[name]
        # The public function has cast its arguments, by one rule for all backends; the reference must not cast again.
        # Kernels cast nothing, and need not be told.
        if name != "reference" or not _autocasts(device):
            return run(**arguments)
        with torch.autocast(device.type, enabled=False):
            return run(**arguments)

    def _choose(self, wish, device, arguments):
        source = "the argument"
        if wish is None:
            wish, source = _ambient_wish()
        if wish is not None:
            _checks.backend(self.name, wish, source, BACKENDS)
            if self.why_not(wish, **arguments) is None:
                return wish
            _checks.able(self.name, wish, source, {name: self.why_not(name, **arguments) for name in BACKENDS})
        for name in _FOR_CPU_TENSORS if device.type == "cpu" else BACKENDS:
            if self.why_not(name, **arguments) is None:
                break
        if not torch.compiler.is_compiling():
            self._report(name, device, arguments)
        return name

    def _report(self, chosen, device, arguments):
        warns = chosen == "reference" and device.type == "cuda" and not self._warned
        if not (warns or _logger.isEnabledFor(logging.DEBUG)):
            return
        reasons = {name: self.why_not(name, **arguments) for name in BACKENDS[: BACKENDS.index(chosen)]}
        for name, reason in reasons.items():
            _logger.debug("%s skips %s: %s", self.name, name, reason)
        if warns:
            self._warned = True
            skipped = "; ".join(reasons.values())
            warnings.warn(f"{self.name} runs CUDA tensors on the slow reference: {skipped}", stacklevel=5)


def available_backends() -> tuple[str, ...]:
    """Names of the backends that run at least one operator on this machine, fastest first."""
    return tuple(
        name
        for name in BACKENDS
        if why_not_here(name) is None and any(operator.has(name) for operator in OPERATORS.values())
    )


def use_backend(name: str | None) -> contextlib.AbstractContextManager[None]:
    """Context manager: every operator inside runs on this backend, unless its argument ``backend`` names another.

    The wish holds for this thread or asynchronous task alone. It cannot be met by every call: one that the backend
    cannot run raises RuntimeError and says why. ``torch.compile`` reads the wish once, while it traces; inside of a
    function that is compiled with ``fullgraph=True`` there can be none. A backward pass takes the backend of its
    forward pass, but what an activation checkpoint computes anew there is a new call: it belongs into the same block.

    Args:
        name: "cuda", "triton", "cpu" or "reference"; None takes an outer wish back: the environment's holds again.
    """
    if name is not None:
        _checks.backend("use_backend", name, "the argument", BACKENDS)
    return _use_backend(name)


@contextlib.contextmanager
def _use_backend(name):
    token = _context_wish.set(name)
    try:
        yield
    finally:
        _context_wish.reset(token)


def _constant_when_compiled(function):
    """What torch.compiler.assume_constant_result does, less its import of the compiler, which takes a second."""
    function._dynamo_marked_constant = True
    return function


# Neither context variables nor the environment can be traced by torch.compile: it takes their value as a constant.
@_constant_when_compiled
def _ambient_wish():
    wish = _context_wish.get()
    if wish is not None:
        return wish, "use_backend"
    return os.environ.get(ENVIRONMENT_VARIABLE) or None, f"the environment variable {ENVIRONMENT_VARIABLE}"


@functools.cache
def extension():
    """The compiled module and None, or None and the reason why it cannot be used. Loaded once, on first demand."""
    if importlib.util.find_spec("restoration_kernels._C") is None:
        return None, "the compiled extension was not built; reinstall the package where a C++ compiler is present"
    try:
        module = importlib.import_module("restoration_kernels._C")
    except ImportError as error:
        # Not one to be passed over in silence: nobody who wishes for certain instructions wants the reference.
        if str(error).startswith(_CPU_ISA_VARIABLE):
            raise ValueError(str(error)) from error
        return None, f"the compiled extension failed to load ({error}); reinstall the package"
    _warn_of_other_sources(module, Path(__file__).parents[1] / "csrc")
    return module, None


def _warn_of_other_sources(module, csrc):
    """An editable install keeps its extension where a pull or an edit changes the sources: arguments may differ."""
    if csrc.is_dir() and not module.build_info()["version"].endswith(f"+{_sources.digest(csrc)}"):
        warnings.warn(
            f"the compiled extension was built from other sources than those in {csrc}: build it again, `pip install "
            "-e .`",
            stacklevel=2,
        )


@functools.cache
def _why_no_triton():
    """None if the package triton can be used, else the reason. Its import takes a second: only for those who ask."""
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    try:
        importlib.import_module("triton")
    except ImportError as error:
        return f"the package triton failed to load ({error}); reinstall it"
    return None


@_constant_when_compiled
def why_not_here(backend):
    """None if this machine and this installation can run kernels of the backend, else the reason."""
    if backend in ("cuda", "cpu") and extension()[0] is None:
        return extension()[1]
    if backend in ("cuda", "triton") and not torch.cuda.is_available() and backend not in _ON_ANY_DEVICE:
        return "torch finds no CUDA device"
    if backend == "triton":
        return _why_no_triton()
    if backend == "cuda" and extension()[0].build_info()["cuda"] is None:
        return "the compiled extension was built without CUDA kernels; reinstall the package where nvcc is present"
    return None


@_constant_when_compiled
def why_not_on(backend, device):
    """None if kernels of the backend can run here on tensors of this device, else the reason."""
    reason = why_not_here(backend)
    if reason is not None or backend in _ON_ANY_DEVICE:
        return reason
    wanted = "cpu" if backend == "cpu" else "cuda"
    if device.type != wanted:
        return f"the tensors are on {device.type}, not on {wanted}"
    return _why_not_on_gpu(device.index) if backend == "cuda" else None


@_constant_when_compiled
def _why_not_now():
    """None if kernels can run where the call stands, else the reason: torch would leave derivatives out in silence."""
    if torch._C._are_functorch_transforms_active():
        return "its kernel knows no transforms of torch.func"
    if torch.autograd.forward_ad._current_level >= 0:
        return "its kernel knows no forward-mode differentiation"
    return None


@functools.cache
def _why_not_on_gpu(index):
    with torch.cuda.device(index):
        reason = extension()[0].cuda_unavailable_reason(device=index)
    return reason and f"the compiled kernels do not run on this GPU ({reason}); reinstall the package on this machine"


def no_float16(x, dtype=None, **_):
    """A predicate: CPU kernels take none, and return none."""
    return "its kernel takes no float16" if torch.float16 in (x.dtype, dtype) else None


def rows_in_32_bits(x, **_):
    """A predicate: CUDA kernels count rows and columns, and those of a tile beyond the edge, in 32 bits."""
    return "its kernel takes at most 2^30 rows or columns" if max(x.shape[2:]) > 2**30 else None


def autocast(tensors, dtype=None):
    """The tensors as torch.autocast wants them, unchanged outside of it and where they are None or float64.

    Args:
        dtype: the operator's dtype under autocast; None is the one autocast was given, as for torch's convolutions.
    """
    device = _device(tensors)
    if device is None or not _autocasts(device):
        return tensors
    dtype = dtype if isinstance(dtype, torch.dtype) else torch.get_autocast_dtype(device.type)
    return tuple(
        tensor.to(dtype) if isinstance(tensor, torch.Tensor) and tensor.dtype in _AUTOCAST_DTYPES else tensor
        for tensor in tensors
    )


def _device(values):
    """That of the first tensor, or None. A loop, as next() of an expression takes twice as long."""
    for value in values:
        if isinstance(value, torch.Tensor):
            return value.device
    return None


def _autocasts(device):
    return _has_autocast(device.type) and torch.is_autocast_enabled(device.type)


# torch.compile of torch 2.11 cannot trace the question.
@_constant_when_compiled
def _has_autocast(device_type):
    return torch.amp.is_autocast_available(device_type)

"""The judge of all operators, and the questions that every operator must answer in the same way.

The judge: the largest error of a backend is at most twice that of the reference in the same dtype, both against the
reference in float64, plus a few units in the last place of the largest value.
"""

import contextlib
import functools
import os
import subprocess
import sys

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import restoration_kernels
from restoration_kernels._backend import BACKENDS, OPERATORS, extension
from restoration_kernels._samples import DIFFERENTIABLE, convert, samples

# Four roundings: of the product, of the sum, of the epilogue, and of the result to its dtype.
ULPS = 4
# What has registered ops: the reference is plain PyTorch.
KERNELS = tuple(name for name in BACKENDS if name != "reference")
# Of the reference, which has nobody to be compared with. Its intermediate results are rounded to the dtype too, some
# many times over; in float64 the definitions' own roundings, of sums of thousands of numbers, count as well.
REFERENCE_ULPS = {torch.float64: 2**12, torch.float32: 32, torch.float16: 32, torch.bfloat16: 32}


def every_backend(operator):
    """Parametrises a test over the backends that have a kernel for the operator."""
    return pytest.mark.parametrize("backend", _backends(operator))


def every_case(*operators):
    """Parametrises a test over backends and samples: tiny ones for the reference, odd ones too for the kernels."""
    return _cases(operators, lambda found: found)


def every_tiny_case(*operators, backends=BACKENDS):
    """Parametrises a test over backends and tiny samples: for what calls an operator thousands of times."""
    return _cases(operators, lambda found: [sample for sample in found if sample.size == "tiny"], backends)


def one_case(*operators, backends=BACKENDS):
    """Parametrises a test over backends, with the first sample of each operator, which has all of its tensors."""
    return _cases(operators, lambda found: found[:1], backends)


def _cases(operators, select, backends=BACKENDS):
    cases = [
        pytest.param(backend, sample, id=f"{backend}-{operator}-{sample.name}")
        for operator in operators
        for backend in _backends(operator)
        if backend in backends
        for sample in select(samples(operator, *(("tiny",) if backend == "reference" else ("tiny", "odd"))))
    ]
    return pytest.mark.parametrize(("backend", "sample"), cases)


def _backends(operator):
    return [name for name in BACKENDS if OPERATORS[operator].has(name)]


def every_dtype():
    """Parametrises a test over the dtypes that every operator takes."""
    return pytest.mark.parametrize(
        "dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=lambda dtype: str(dtype)[6:]
    )


def arguments_for(backend, sample, dtype):
    """The sample's arguments on the backend's device; skips, for the predicate's reason, if it cannot run them."""
    arguments = sample.arguments(dtype, device(backend))
    skip_unless_able(backend, sample.operator, arguments)
    return arguments


def device(backend):
    """Where the backend's tensors live."""
    return "cuda" if backend in ("cuda", "triton") and torch.cuda.is_available() else "cpu"


def seeded(seed):
    """A generator of random numbers on the CPU."""
    return torch.Generator().manual_seed(seed)


def skip_unless_able(backend, operator, arguments):
    """Skips, for the predicate's reason, if the backend cannot run this call."""
    reason = OPERATORS[operator].why_not(backend, **arguments)
    if reason is not None:
        pytest.skip(f"{operator} on {backend}: {reason}")


def differentiate(function, arguments, names):
    """function's output, joined, and the gradient of its product with a fixed random tensor by each argument named."""
    names = [name for name in names if arguments.get(name) is not None]
    leaves = {name: arguments[name].detach().requires_grad_() for name in names}
    result = function(**{**arguments, **leaves})
    outputs = as_tuple(result)
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(output.shape, generator=generator, dtype=torch.float64) for output in outputs]
    # Representable in every dtype: the judge is to see the operator's rounding, not that of its input.
    cotangents = [weight.to(torch.bfloat16).to(output) for weight, output in zip(weights, outputs, strict=True)]
    gradients = torch.autograd.grad(outputs, list(leaves.values()), cotangents) if leaves else ()
    return {"output": joined(result).detach(), **dict(zip(names, gradients, strict=True))}


def as_tuple(result):
    """What an operator returns, one map or several."""
    return result if isinstance(result, tuple) else (result,)


def joined(result):
    """What an operator returns, as one tensor: several maps follow each other along the channels."""
    return torch.cat(result, 1) if isinstance(result, tuple) else result


def public(operator, backend):
    """The public function, bound to a backend."""
    return functools.partial(getattr(restoration_kernels, operator), backend=backend)


def judge(name, ours, exact, plain=None, ulps=ULPS):
    """Raises, naming the worst place, if ours is further from exact than the reference's plain allows."""
    exact = exact.to(ours.device)
    assert ours.shape == exact.shape, f"{name}: shape {list(ours.shape)}, not {list(exact.shape)}"
    if exact.numel() == 0:
        return
    scale = exact.abs().max()
    allowed = ulps * torch.finfo(ours.dtype).eps * scale
    if plain is not None:
        allowed = allowed + 2 * (plain.to(exact) - exact).abs().max()
    error = (ours.to(torch.float64) - exact).abs()
    if not (error <= allowed).all():
        # NaN counts as infinitely wrong, and is then the worst.
        worst = tuple(map(int, torch.unravel_index(error.nan_to_num(torch.inf).argmax(), error.shape)))
        raise AssertionError(
            f"{name}: error {error[worst]:.3e} at {worst} (ours {ours[worst]:.9g}, exact {exact[worst]:.9g}), "
            f"allowed {allowed:.3e}, largest value {scale:.3g}"
        )


def kernel_ulps(dtype):
    """Of a kernel. Nothing is more exact than float64, so there the rounding of the exact values counts."""
    return REFERENCE_ULPS[dtype] if dtype == torch.float64 else ULPS


def judge_all(ours, exact, plain=None, ulps=ULPS):
    """The judge for an output and gradients by name."""
    assert ours.keys() == exact.keys()
    for name in ours:
        judge(name, ours[name], exact[name], plain and plain[name], ulps)


def round_to_tf32(x):
    """Float32 with 10 bits of mantissa, ties away from zero."""
    return (x.view(torch.int32) + 0x1000 & ~0x1FFF).view(torch.float32)


def check_values(backend, sample, dtype, definition, names=()):
    """Output and gradients by the judge, against a definition in loops where the sample is tiny enough for it.

    The reference must be within REFERENCE_ULPS of the exact values.
    """
    arguments = arguments_for(backend, sample, dtype)
    reference = public(sample.operator, "reference")
    exactly = definition if sample.size == "tiny" else reference
    ours = differentiate(public(sample.operator, backend), arguments, names)
    exact = differentiate(exactly, convert(arguments, torch.float64, "cpu"), names)
    if backend == "reference":
        judge_all(ours, exact, ulps=REFERENCE_ULPS[dtype])
    else:
        plain = differentiate(reference, arguments, names)
        assert {name: value.dtype for name, value in ours.items()} == {name: plain[name].dtype for name in ours}
        judge_all(ours, exact, plain, kernel_ulps(dtype))


def check_gradcheck(backend, sample):
    """Analytic gradients against differences, in float64; of the reference the second derivatives too."""
    arguments = arguments_for(backend, sample, torch.float64)
    names = [name for name in DIFFERENTIABLE[sample.operator] if arguments.get(name) is not None]

    def function(*leaves):
        return public(sample.operator, backend)(**{**arguments, **dict(zip(names, leaves, strict=True))})

    leaves = [arguments[name].requires_grad_() for name in names]
    with one_thread():
        assert torch.autograd.gradcheck(function, leaves)
        if backend == "reference":
            assert torch.autograd.gradgradcheck(function, leaves, fast_mode=True)


@contextlib.contextmanager
def one_thread():
    """Waking a second thread takes longer than a tiny call, of which gradcheck makes thousands."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def check_second_derivatives_refused(backend, sample):
    """Kernels have no second derivatives and say so; check_gradcheck asks the reference for its."""
    message = f"^{sample.operator}: backend must be 'reference' where second derivatives are taken, got '{backend}'$"

    def gradient(backend, loss):
        arguments = arguments_for(backend, sample, torch.float32)
        leaf = arguments[DIFFERENTIABLE[sample.operator][0]].requires_grad_()
        output = joined(public(sample.operator, backend)(**arguments))
        return torch.autograd.grad(loss(output), leaf, create_graph=True)[0]

    # The first has a gradient that depends on the output, the second a constant one.
    for loss in (lambda output: output.square().sum(), torch.sum):
        if gradient("reference", loss).requires_grad:
            with pytest.raises(RuntimeError, match=message):
                gradient(backend, loss).sum().backward()


def check_batched_gradients_refused(backend, sample):
    """Kernels take one grad_output at a time and say so; the reference takes several."""
    arguments = arguments_for(backend, sample, torch.float32)
    leaf = arguments[DIFFERENTIABLE[sample.operator][0]].requires_grad_()
    output = joined(public(sample.operator, backend)(**arguments))
    seeds = torch.ones(2, *output.shape).to(output)

    def gradients(seed):
        return torch.autograd.grad(output, leaf, seed, retain_graph=True)

    message = rf"^{sample.operator}: backend must be 'reference' where gradients .* in batches \(.*\), got '{backend}'$"
    refused = contextlib.nullcontext() if backend == "reference" else pytest.raises(RuntimeError, match=message)
    with refused:
        torch.autograd.grad(output, leaf, seeds, retain_graph=True, is_grads_batched=True)
    with refused:
        torch.func.vmap(gradients)(seeds)


class Recorder(TorchDispatchMode):
    """Keeps the calls of the ops that are wanted: by default those that the package registers."""

    def __init__(self, wanted=lambda op: op.namespace == "restoration_kernels"):
        super().__init__()
        self.wanted = wanted
        self.calls = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if self.wanted(op):
            self.calls.append((op, args))
        return op(*args, **(kwargs or {}))


def kept_for_backward(function, *arguments):
    """The tensors that autograd keeps of a call, one of each place in memory."""
    kept = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.setdefault(x.data_ptr(), x), lambda x: x):
        function(*arguments)
    return list(kept.values())


def check_opcheck(backend, sample):
    """What a call registers with torch.library, forward and backward, keeps torch's rules."""
    arguments = arguments_for(backend, sample, torch.float32)
    with Recorder() as recorder:
        differentiate(public(sample.operator, backend), arguments, DIFFERENTIABLE[sample.operator])
    assert len({op for op, _ in recorder.calls}) >= 2
    for op, args in recorder.calls:
        # Backward ops refuse to be differentiated, which opcheck would take for a fault.
        needs_grad = not op.name().endswith("_backward")
        args = [
            value.detach().clone().requires_grad_(needs_grad and value.is_floating_point())
            if torch.is_tensor(value)
            else value
            for value in args
        ]
        torch.library.opcheck(op, args)


def check_opcheck_in_place(backend, sample):
    """As check_opcheck, for an operator that writes into an argument and has no gradients."""
    with Recorder() as recorder:
        public(sample.operator, backend)(**arguments_for(backend, sample, torch.float32))
    ((op, args),) = recorder.calls
    torch.library.opcheck(op, args)


def check_compile(backend, sample, compiler="aot_eager"):
    """torch.compile takes the operator as one graph, forward and backward, and changes nothing."""
    # All operators pass through one function here, and torch.compile gives up on one it has compiled eight times.
    torch.compiler.reset()
    arguments = arguments_for(backend, sample, torch.float32)
    function = public(sample.operator, backend)
    compiled = torch.compile(function, fullgraph=True, backend=compiler)
    names = DIFFERENTIABLE[sample.operator]
    judge_all(differentiate(compiled, arguments, names), differentiate(function, arguments, names))


# Each leaves the values of a tensor alone, but for "expanded", which repeats the first along the batch; and the fewest
# axes a tensor needs for it.
LAYOUTS = {
    "transposed": (2, lambda tensor: tensor.mT.contiguous().mT),
    "channels_last": (4, lambda tensor: tensor.contiguous(memory_format=torch.channels_last)),
    "sliced": (1, lambda tensor: torch.stack([tensor, torch.zeros_like(tensor)], -1)[..., 0]),
    "expanded": (1, lambda tensor: tensor[:1].expand_as(tensor)),
}


def every_layout():
    """Parametrises a test over ways to lay out a tensor."""
    return pytest.mark.parametrize("layout", LAYOUTS)


def check_layouts(backend, sample, layout):
    """Strides do not matter: values and gradients are those of contiguous copies."""
    axes, lay_out = LAYOUTS[layout]
    arguments = arguments_for(backend, sample, torch.float32)
    strided = {
        name: lay_out(value) if torch.is_tensor(value) and value.dim() >= axes else value
        for name, value in arguments.items()
    }
    contiguous = {name: value.contiguous() if torch.is_tensor(value) else value for name, value in strided.items()}
    function, names = public(sample.operator, backend), DIFFERENTIABLE[sample.operator]
    judge_all(differentiate(function, strided, names), differentiate(function, contiguous, names))


def check_empty_batch(backend, sample, batched):
    """A batch of none gives an output of none, and zero gradients to what the images share."""
    arguments = arguments_for(backend, sample, torch.float32)
    full = differentiate(public(sample.operator, backend), arguments, ())["output"]
    empty = {name: value[:0] if name in batched and value is not None else value for name, value in arguments.items()}
    results = differentiate(public(sample.operator, backend), empty, DIFFERENTIABLE[sample.operator])
    assert results.pop("output").shape == (0, *full.shape[1:])
    for name, gradient in results.items():
        assert gradient.shape == empty[name].shape
        assert not gradient.any()


def check_only_requested_grads(backend, sample):
    """A gradient asked for alone is the one that comes when all are asked for, and kernels compute no other."""
    arguments = arguments_for(backend, sample, torch.float32)
    function, names = public(sample.operator, backend), DIFFERENTIABLE[sample.operator]
    everything = differentiate(function, arguments, names)
    for name in everything.keys() - {"output"}:
        with Recorder() as recorder:
            judge(name, differentiate(function, arguments, (name,))[name], everything[name])
        lists = [value for _, args in recorder.calls for value in args if isinstance(value, list)]
        for wanted in (value for value in lists if isinstance(value[0], bool)):
            assert sum(wanted) == 1


def check_export(backend, sample, dynamic):
    """torch.export takes the operator, with axes of any length (dynamic names them), and gradients without asking."""
    arguments = arguments_for(backend, sample, torch.float32)
    tensors = {name: value for name, value in arguments.items() if torch.is_tensor(value)}
    options = {name: value for name, value in arguments.items() if name not in tensors}

    class Module(torch.nn.Module):
        def forward(self, tensors):
            return public(sample.operator, backend)(**tensors, **options)

    axes = {name: dict.fromkeys(dynamic.get(name, ()), torch.export.Dim.AUTO) for name in tensors}
    program = torch.export.export(Module(), (tensors,), dynamic_shapes=(axes,)).module()
    for longer in (tensors, {name: _lengthen(value, dynamic.get(name, ())) for name, value in tensors.items()}):
        found, wanted = (
            differentiate(lambda call=call, **tensors: call(tensors), longer, DIFFERENTIABLE[sample.operator])
            for call in (program, Module())
        )
        for name, tensor in found.items():
            judge(name, tensor, wanted[name])


def _lengthen(tensor, axes):
    for axis in axes:
        tensor = torch.cat([tensor, tensor], axis)
    return tensor


def check_deterministic(backend, sample):
    """Two calls give the same bits."""
    arguments = arguments_for(backend, sample, torch.float32)
    function, names = public(sample.operator, backend), DIFFERENTIABLE[sample.operator]
    first, second = (differentiate(function, arguments, names) for _ in range(2))
    for name in first:
        assert torch.equal(first[name], second[name]), name


# The last of these channels begins more than 2^31 numbers after the first.
MAP_CHANNELS, MAP_SIDE = 7, 20_000


def skip_without_gpu_memory(needed):
    """Skips where the GPU has not that many bytes left, and a margin for tests in other processes."""
    free, _ = torch.cuda.mem_get_info()
    if free < 1.2 * needed:
        pytest.skip(f"{needed / 2**30:.0f} GiB of the GPU's memory needed, {free / 2**30:.0f} free")


def _untouched_map(channels, backend, monkeypatch, layout=torch.contiguous_format):
    """Feature maps of which the system gives only the memory that is touched: a few places cost nothing on a CPU."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    shape = (1, channels, MAP_SIDE, MAP_SIDE)
    if device(backend) == "cuda":
        skip_without_gpu_memory(3 * channels * MAP_SIDE**2 * torch.bfloat16.itemsize)  # its gradient, and a copy
    try:
        return torch.empty(shape, dtype=torch.bfloat16, device=device(backend), memory_format=layout)
    except RuntimeError as error:
        pytest.skip(f"no address space for {channels * MAP_SIDE**2:,} numbers: {error}")


def check_places_beyond_32_bits(backend, layout, monkeypatch):
    """neighbor_difference and its gradient at the ends of a map of more than 2^31 numbers."""
    features = _untouched_map(MAP_CHANNELS, backend, monkeypatch, layout)
    anchors = torch.tensor([1, MAP_SIDE // 2, MAP_SIDE - 2]) * MAP_SIDE + MAP_SIDE - 2
    places = anchors[:, None] + torch.tensor([0, *(y * MAP_SIDE + x for y in (-1, 0, 1) for x in (-1, 0, 1) if y or x)])
    arguments = {
        "features": features.requires_grad_(),
        "anchors": anchors.to(features.device),
        "neighbors": places[:, 1:].to(features.device),
    }
    skip_unless_able(backend, "neighbor_difference", arguments)
    rows, columns = (index.flatten().to(features.device) for index in (places // MAP_SIDE, places % MAP_SIDE))
    values = torch.randn(1, MAP_CHANNELS, *places.shape).bfloat16()
    features.detach()[:, :, rows, columns] = values.flatten(2).to(features)

    differences = public("neighbor_difference", backend)(**arguments)
    expected = (values[..., :1].double() - values[..., 1:].double()).permute(0, 2, 3, 1).flatten(1, 2)
    judge("output", differences.detach(), expected)
    weights = torch.randint(-4, 5, differences.shape)
    (gradient,) = torch.autograd.grad(differences, features, weights.to(differences))
    added = weights.view(1, *places[:, 1:].shape, MAP_CHANNELS).permute(0, 3, 1, 2).double()
    judge("gradient", gradient[:, :, rows, columns], torch.cat([added.sum(-1, keepdim=True), -added], -1).flatten(2))


def check_taps_beyond_32_bits(backend, monkeypatch):
    """pac_conv2d in a map of more than 2^31 numbers, with a stride that takes it from one end to the other."""
    kernel, stride = 3, (MAP_SIDE - 3) // 2
    x, guide = _untouched_map(MAP_CHANNELS, backend, monkeypatch), _untouched_map(1, backend, monkeypatch)
    touched = torch.tensor([step * stride + tap for step in range(3) for tap in range(kernel)], device=x.device)
    for tensor in (x, guide):
        shape = (1, tensor.shape[1], len(touched), len(touched))
        tensor[:, :, touched[:, None], touched] = torch.randn(shape).to(tensor)
    arguments = {"x": x, "guide": guide, "weight": torch.randn(4, MAP_CHANNELS, kernel, kernel).to(x)}
    skip_unless_able(backend, "pac_conv2d", {**arguments, "stride": stride})
    found = public("pac_conv2d", backend)(**arguments, stride=stride)
    for name in ("x", "guide"):
        arguments[name] = arguments[name][:, :, touched[:, None], touched]
    arguments = convert(arguments, torch.float64, "cpu")
    judge("output", found, public("pac_conv2d", "reference")(**arguments, stride=kernel))


INSTRUCTION_SETS = ("baseline", "avx2", "avx512", "avx512bf16", "amx")


def every_lesser_instruction_set():
    """Parametrises a test over what the CPU kernels do on older processors; other tests run the best of this one."""
    dtypes = (torch.float32, torch.float32, torch.bfloat16, torch.bfloat16)
    return pytest.mark.parametrize(
        ("isa", "dtype"), list(zip(INSTRUCTION_SETS, dtypes, strict=False)), ids=INSTRUCTION_SETS[:4]
    )


def check_instruction_set(sample, isa, dtype, folder):
    """Output and gradients of the CPU kernel by the judge, computed in a process that uses this instruction set."""
    arguments = arguments_for("cpu", sample, dtype)
    best = extension()[0].build_info()["cpu_isa"]
    if INSTRUCTION_SETS.index(isa) >= INSTRUCTION_SETS.index(best):
        pytest.skip(f"this processor's best is {best}")
    names = DIFFERENTIABLE[sample.operator]
    torch.save(arguments, folder / "arguments")
    script = (
        "import compare, torch; "
        f"assert compare.extension()[0].build_info()['cpu_isa'] == {isa!r}; "
        f"arguments = torch.load({str(folder / 'arguments')!r}); "
        f"results = compare.differentiate(compare.public({sample.operator!r}, 'cpu'), arguments, {names!r}); "
        f"torch.save(results, {str(folder / 'results')!r})"
    )
    path = os.pathsep.join([os.path.dirname(__file__), *sys.path])
    environment = {**os.environ, "RESTORATION_CPU_ISA": isa, "PYTHONPATH": path}
    subprocess.run([sys.executable, "-c", script], env=environment, check=True)
    reference = public(sample.operator, "reference")
    exact = differentiate(reference, convert(arguments, torch.float64, "cpu"), names)
    judge_all(torch.load(folder / "results"), exact, differentiate(reference, arguments, names))

"""How an operator reaches torch.library: one op for its forward and one for its backward, for all kernels.

An op takes tensors, options, and last the name of a backend. Its ``allocate`` makes the outputs, uninitialised: all
that torch.compile and torch.export see of it. Its ``launch`` fills them. Both come from the operator's own file.
"""

import torch
from torch.autograd import forward_ad

from . import _backend, _checks, _launch

# Registered for as long as this object lives.
_LIBRARY = torch.library.Library("restoration_kernels", "FRAGMENT")


def define(schema, allocate, launch):
    """Registers an op that changes none of its inputs, and returns it.

    Args:
        schema: name, arguments and results as torch.library writes them. The first argument is a tensor, the last is
            ``str backend``.
        allocate: function of all arguments but backend. It returns the outputs: a tuple of contiguous tensors or, where
            the schema says ``Tensor[]``, a list with None for each tensor that is not wanted.
        launch: function of backend, outputs and the other arguments, which fills the outputs. It is called with
            contiguous tensors on the current device.
    """
    name = schema.partition("(")[0]

    def run(*arguments):
        *arguments, backend = arguments
        device = arguments[0].device
        _check_usable(name, backend, device)
        _refuse_tangents(name, backend, arguments)
        outputs = allocate(*arguments)
        _launch_on(device, launch, backend, outputs, arguments, tensors)
        return _results(outputs)

    op = _register(name, schema, run, lambda *arguments: _results(allocate(*arguments[:-1])))
    tensors = _tensor_places(op)
    return op


def define_in_place(schema, launch):
    """Registers an op that writes into its first tensor, returns nothing, and has no gradients.

    Args:
        schema: as for :func:`define`; the first argument is ``Tensor(a!)``, contiguous.
        launch: function of backend, the first tensor and the other arguments.
    """
    name = schema.partition("(")[0]

    def run(output, *arguments):
        *arguments, backend = arguments
        _check_usable(name, backend, output.device)
        _checks.apart(name, (names[0], output), {names[place + 1]: arguments[place] for place in tensors})
        _launch_on(output.device, launch, backend, output, arguments, tensors)
        if not output.is_inference():
            torch.autograd.graph.increment_version(output)  # what autograd has saved of it is no more what it was

    op = _register(name, schema, run, lambda *arguments: None)
    names = [argument.name for argument in op._schema.arguments]
    tensors = [place - 1 for place in _tensor_places(op)[1:]]
    return op


def _register(name, schema, run, fake):
    """Registers an op that ``run`` computes, and of which torch.compile and torch.export see ``fake``; returns it."""
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{_LIBRARY.ns}::{name}", fake, lib=_LIBRARY)
    return getattr(getattr(torch.ops, _LIBRARY.ns), name).default


def _tensor_places(op):
    """Which of an op's arguments are tensors, or may be: known once, so that no call has to look."""
    maybe_tensor = torch._C.OptionalType(torch._C.TensorType.get())
    arguments = enumerate(op._schema.arguments)
    return [place for place, argument in arguments if argument.type.isSubtypeOf(maybe_tensor)]


def _check_usable(name, backend, device):
    """A graph that torch.export made on another machine, or that was moved since, comes here unchecked."""
    _checks.usable(name, backend, device, _backend.why_not_on(backend, device))


def _refuse_tangents(name, backend, arguments):
    """A graph compiled before forward-mode differentiation began would leave the derivatives out in silence."""
    if forward_ad._current_level < 0:
        return
    tensors = (value for value in arguments if isinstance(value, torch.Tensor))
    if any(forward_ad.unpack_dual(value).tangent is not None for value in tensors):
        raise RuntimeError(
            f"{name}: backend must be 'reference' where tensors have tangents, got {backend!r} of a graph that was "
            "compiled for tensors without: compile inside of torch.autograd.forward_ad.dual_level()"
        )


def _launch_on(device, launch, backend, outputs, arguments, tensors):
    """The tensors among the arguments, a list, whose places `tensors` tells, are replaced by contiguous ones."""
    for place in tensors:
        if arguments[place] is not None:
            arguments[place] = arguments[place].contiguous()
    with _launch.on_device(device):
        launch(backend, outputs, *arguments)


def differentiate(forward, backward, save, count, outputs=1):
    """Gives an op its gradients, of its first outputs by its first tensors, and returns a quicker way to call it.

    Args:
        forward: an op. Outputs after the first ``outputs`` are for backward alone.
        backward: the op ``(Tensor grad_output, ..., bool[] wanted, str backend) -> Tensor[]``, with as many grad_output
            as there are outputs, that returns, of the gradients to the first tensors of forward, those that are wanted.
        save: function of the arguments and the outputs of forward that returns what backward takes between grad_output
            and wanted: tensors, None, and options.
        count: how many of forward's arguments, the first ones, have gradients.
        outputs: how many of forward's outputs, the first ones, have gradients.
    """
    others = len(forward._schema.arguments) - count

    def setup_context(ctx, inputs, output):
        results = output if isinstance(output, tuple) else (output,)
        saved = save(inputs, results)
        ctx.save_for_backward(*(value if isinstance(value, torch.Tensor) else None for value in saved))
        ctx.options = [None if isinstance(value, torch.Tensor) else value for value in saved]
        ctx.backend = inputs[-1]
        # What backward takes is differentiable: through it, too, second derivatives are refused, not left out.
        ctx.mark_non_differentiable(*(result for result in results[outputs:] if all(result is not x for x in saved)))
        # Zeros where one of several outputs is not used; else they would be made for those that are for backward alone.
        ctx.set_materialize_grads(outputs > 1)

    def gradients(ctx, *grad_outputs):
        wanted = ctx.needs_input_grad[:count]
        if grad_outputs[0] is None:
            return (None,) * (count + others)
        saved = [
            option if tensor is None else tensor for tensor, option in zip(ctx.saved_tensors, ctx.options, strict=True)
        ]
        arguments = (*grad_outputs[:outputs], *saved, wanted, ctx.backend)
        found = iter(backward(*arguments) if torch.is_grad_enabled() else _below_autograd(backward, arguments))
        return (*(next(found) if wish else None for wish in wanted), *(None,) * others)

    torch.library.register_autograd(forward, gradients, setup_context=setup_context, lib=_LIBRARY)
    torch.library.register_autograd(backward, _refuse(forward), setup_context=_keep_backend, lib=_LIBRARY)
    # It returns a list, which torch has no fallback for: those of autograd's own batches, and of torch.func.vmap's.
    for key in ("Batched", "FuncTorchBatched"):
        _LIBRARY.impl(backward._schema.name, _refuse_batches(forward), key)
    return _eager(forward, gradients, setup_context)


def _eager(forward, gradients, setup_context):
    """The op by an autograd function of its own.

    That of register_autograd reads the whole schema anew for each of its arguments: half of what a small call takes.
    """

    def run(ctx, *arguments):
        output = _below_autograd(forward, arguments)
        setup_context(ctx, arguments, output)
        return output

    members = {"forward": staticmethod(run), "backward": staticmethod(gradients)}
    function = type(_operator_name(forward), (torch.autograd.Function,), members)

    def call(*arguments):
        # A compiler, and a trace that is to be saved, know the op and what was registered for it.
        if torch.compiler.is_compiling() or torch.jit.is_tracing():
            return forward(*arguments)
        return function.apply(*arguments) if _needs_graph(arguments, tensors) else _below_autograd(forward, arguments)

    tensors = _tensor_places(forward)
    return call


def _below_autograd(op, arguments):
    """Calls an op where nothing is to be differentiated: to find that out, torch.library takes two calls of Python."""
    with torch._C._AutoDispatchBelowAutograd():
        return op(*arguments)


def _needs_graph(arguments, tensors):
    return torch.is_grad_enabled() and any(
        arguments[place] is not None and arguments[place].requires_grad for place in tensors
    )


def _keep_backend(ctx, inputs, output):
    ctx.backend = inputs[-1]


def _refuse(forward):
    operator = _operator_name(forward)

    def refuse(ctx, *_):
        raise RuntimeError(
            f"{operator}: backend must be 'reference' where second derivatives are taken, got {ctx.backend!r}"
        )

    return refuse


def _refuse_batches(forward):
    operator = _operator_name(forward)

    def refuse(*arguments):
        raise RuntimeError(
            f"{operator}: backend must be 'reference' where gradients are taken in batches (is_grads_batched, "
            f"vectorize), got {arguments[-1]!r}"
        )

    return refuse


def _operator_name(forward):
    return forward._schema.name.partition("::")[2]


def _results(outputs):
    if isinstance(outputs, list):
        return [output for output in outputs if output is not None]
    return outputs[0] if len(outputs) == 1 else outputs

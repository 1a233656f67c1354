"""The contrastive loss of CCPL (InfoNCE): how well each row of an image finds its own among all others."""

import functools

import torch
from torch import Tensor

from . import _backend, _checks, _launch, _registration
from .ccpl_info_nce_reference import info_nce_reference

_OPERATOR = _backend.Operator("info_nce", info_nce_reference)


def info_nce(query: Tensor, key: Tensor, temperature: float = 0.07, *, backend: str | None = None) -> Tensor:
    """Contrastive loss of every row: how well query i finds key i among all keys of its image.

    loss[b, i] = -log(exp(q_i·k_i / τ) / sum over j of exp(q_i·k_j / τ)). Rows are taken as they are, never normalised.

    Args:
        query, key: [B, S, D] of the same floating dtype. Under torch.autocast, half precision is cast to float32.
        temperature: τ, at least 1e-30.
        backend: "cuda", "triton", "cpu" or "reference"; None leaves the choice to :func:`use_backend`.

    Returns:
        [B, S], in the dtype of query, or float32 where that is of half precision; at least 0. Products and sums are at
        least float32. Memory: keys, widened, in backward twice, and on a CPU some rows a thread (docs/ccpl.md); the
        reference holds B·S² numbers, and five times as many in backward. Gradients: query only, key is a constant; for
        rows of unit length that of loss[b, i] is no longer than 2/τ. The reference can be differentiated twice.

    Raises:
        TypeError, ValueError: an argument is not as said here.
        RuntimeError: the backend asked for cannot run this call.

    Source: Sun, Zhang, Wu (2025), doi 10.1038/s40494-025-01595-0, eq. 7, without its sum over rows.
    """
    query, key = _backend.autocast((query, key), torch.float32)
    _checks.info_nce(query, key, temperature)
    return _OPERATOR.run(backend, query=query, key=key, temperature=temperature)


# CUDA takes 65,535 blocks along the second and the third axis of a grid.
def _cuda_cannot(query, **_):
    # The third counts columns of 128 numbers; along the second, of images, kernels walk.
    return "its kernel takes at most 2^22 numbers a row" if query.shape[2] > 2**22 else None


def _triton_cannot(query, **_):
    if len(query) > 65_535:
        return "its kernel takes at most 65,535 images"
    # The third counts columns of 16 numbers or more.
    return "its kernel takes at most 2^19 numbers a row" if query.shape[2] > 2**19 else None


def _allocate_forward(query, key, temperature):
    rows = functools.partial(query.new_empty, query.shape[:2], dtype=torch.promote_types(query.dtype, torch.float32))
    return rows(), rows()


def _launch_forward(backend, outputs, query, key, temperature):
    loss, log_sum = outputs
    _launch_kernel("forward", backend, {"query": query, "key": key, "loss": loss, "log_sum": log_sum}, temperature)


def _allocate_backward(grad_loss, query, key, log_sum, temperature, wanted):
    return [query.new_empty(query.shape) if wish else None for wish in wanted]


def _launch_backward(backend, outputs, grad_loss, query, key, log_sum, temperature, wanted):
    (grad_query,) = outputs
    tensors = {"grad_loss": grad_loss, "query": query, "key": key, "log_sum": log_sum, "grad_query": grad_query}
    _launch_kernel("backward", backend, tensors, temperature)


def _launch_kernel(direction, backend, tensors, temperature):
    query = tensors["query"]
    sizes = dict(zip(("batch", "rows", "width"), query.shape, strict=True))
    if backend == "triton":
        getattr(_launch.triton("ccpl_info_nce"), direction)(**tensors, **sizes, temperature=temperature)
        return
    _launch.run(f"info_nce_{direction}", backend, tensors, {**sizes, "temperature": temperature}, query.dtype)


def _save_for_backward(inputs, outputs):
    query, key, temperature, _ = inputs
    return query, key, outputs[1], temperature


_forward = _registration.define(
    "info_nce(Tensor query, Tensor key, float temperature, str backend) -> (Tensor loss, Tensor log_sum)",
    _allocate_forward,
    _launch_forward,
)
_backward = _registration.define(
    "info_nce_backward(Tensor grad_loss, Tensor query, Tensor key, Tensor log_sum, float temperature, bool[] wanted,"
    " str backend) -> Tensor[]",
    _allocate_backward,
    _launch_backward,
)
_differentiable = _registration.differentiate(_forward, _backward, _save_for_backward, count=1)


def _run(backend, query, key, temperature):
    return _differentiable(query, key.detach(), temperature, backend)[0]


_OPERATOR.register("cuda", functools.partial(_run, "cuda"), _cuda_cannot)
_OPERATOR.register("triton", functools.partial(_run, "triton"), _triton_cannot)
_OPERATOR.register("cpu", functools.partial(_run, "cpu"), lambda query, **_: _backend.no_float16(query))

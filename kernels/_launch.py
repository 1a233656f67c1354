"""The border to the compiled kernels: addresses instead of tensors, codes instead of dtypes, an explicit stream.

Kernels know no strides: what they read and write must be contiguous. And an address keeps nothing alive: a tensor stays
bound to a name until the call that uses its address has returned.
"""

import contextlib
import functools
import importlib
import mmap
import os

import torch

from . import _backend

# The C library gives memory of this size and more back to the system, so that a new tensor's is always fresh from it.
_ALWAYS_FRESH_BYTES = 32 << 20
_LARGE_PAGE_BYTES = 2 << 20

# A fork copies only the calling thread, and a parallel region of the child would wait for OpenMP's others for ever. The
# extension minds forks once it is loaded: before the first one, as torch may have started the threads already.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_backend.extension)


def run(kernel, backend, tensors, sizes, dtype):
    """Runs the extension's function ``kernel_cpu`` or ``kernel_cuda``.

    Args:
        kernel: name of the function without its backend.
        backend: "cpu" or "cuda"; the tensors live there, on the current device.
        tensors: tensors by argument, each contiguous; None for an output that is not wanted.
        sizes: integers by argument.
        dtype: the dtype of the call.
    """
    function = getattr(_backend.extension()[0], f"{kernel}_{backend}")
    addresses = {name: address(tensor) for name, tensor in tensors.items()}
    if backend == "cpu":
        function(**addresses, **sizes, dtype=dtype_code(dtype), threads=torch.get_num_threads())
    else:
        function(**addresses, **sizes, dtype=dtype_code(dtype), stream=torch.cuda.current_stream().cuda_stream)


def triton(stem):
    """The module of an operator's Triton kernels. Importing triton takes a second: only for those who use it."""
    return importlib.import_module(f".{stem}_triton", __package__)


def image_sizes(x):
    """The sizes of x [B,C,H,W] by the names that the extension gives them."""
    return dict(zip(("batch", "channels", "height", "width"), x.shape, strict=True))


def workspace(operator, sizes, like):
    """Scratch memory for a CUDA kernel, as much as the extension's ``<operator>_workspace_cuda`` says."""
    count = getattr(_backend.extension()[0], f"{operator}_workspace_cuda")
    return torch.empty(count(**sizes, dtype=dtype_code(like.dtype)), dtype=torch.uint8, device=like.device)


def address(tensor):
    """Where a contiguous tensor's numbers start; 0 for None."""
    if tensor is None:
        return 0
    if not tensor.is_contiguous():
        raise ValueError(f"address: tensor must be contiguous, got strides {tensor.stride()} for {tuple(tensor.shape)}")
    return tensor.data_ptr()


@functools.cache
def dtype_code(dtype):
    """The number that stands for a dtype in the extension."""
    return _backend.extension()[0].DTYPES[str(dtype).removeprefix("torch.")]


def fill_with_zeros(tensor):
    """Fills a contiguous tensor, just allocated, with zeros.

    The system zeroes fresh memory itself, page by page as it is touched. A large tensor on the CPU is moved to memory
    known to be fresh, which need not be written twice, in pages of 2 MB where there are such: a fault every 4 KB would
    take longer than the zeros.
    """
    if tensor.device.type != "cpu" or tensor.nbytes < _ALWAYS_FRESH_BYTES or not hasattr(mmap, "MADV_HUGEPAGE"):
        tensor.zero_()
        return
    pages = -(-tensor.nbytes // _LARGE_PAGE_BYTES)
    try:
        memory = mmap.mmap(-1, pages * _LARGE_PAGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError:  # no room for both
        tensor.zero_()
        return
    with contextlib.suppress(OSError):  # a system built without large pages
        memory.madvise(mmap.MADV_HUGEPAGE)
    # The tensor keeps the mapping alive.
    tensor.set_(torch.frombuffer(memory, dtype=tensor.dtype, count=tensor.numel()).view(tensor.shape))


def convolves_in_tf32():
    """Whether torch's own convolutions of float32 round products to tf32, whichever of its two settings says so."""
    return torch.backends.cudnn.conv.fp32_precision == "tf32"


def on_device(device):
    """Context in which kernels start on this device, a CPU included."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()

"""The border to the compiled kernels. The CUDA kernels are reached without a GPU, through the runner of simt_build."""

import errno
import mmap
import os
import subprocess
import sys
from unittest import mock

import compare
import pytest
import torch

from restoration_kernels import _backend, _launch
from restoration_kernels._samples import DIFFERENTIABLE, convert

EXTENSION, REASON = _backend.extension()


def test_address():
    tensor = torch.zeros(3, 4)
    assert _launch.address(tensor) == tensor.data_ptr()
    assert _launch.address(tensor[1:]) == tensor.data_ptr() + 4 * tensor.element_size()
    assert _launch.address(None) == 0
    with pytest.raises(ValueError, match=r"^address: tensor must be contiguous, got strides \(1, 4\) for \(4, 3\)$"):
        _launch.address(tensor.T)


@pytest.mark.parametrize("shape", [(2, 3, 5), (2, 1450, 1450)], ids=["small", "large"])
def test_fill_with_zeros(shape):
    tensor = torch.full(shape, torch.nan, dtype=torch.float64)
    _launch.fill_with_zeros(tensor)
    assert (tensor.shape, tensor.dtype) == (shape, torch.float64)
    assert not tensor.any()
    tensor[-1, -1] = 7
    assert tensor.sum() == 7 * shape[-1]


def test_fill_with_zeros_where_no_fresh_memory_is_left(monkeypatch):
    def fail(*arguments, **options):
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    monkeypatch.setattr("mmap.mmap", fail)
    tensor = torch.full((2, 1450, 1450), torch.nan, dtype=torch.float64)
    _launch.fill_with_zeros(tensor)
    assert not tensor.any()


@pytest.mark.skipif(not hasattr(mmap, "MADV_HUGEPAGE"), reason="the system has no large pages")
def test_fill_with_zeros_where_the_system_was_built_without_large_pages(monkeypatch):
    class Memory(mmap.mmap):
        def madvise(self, *arguments):
            raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr("mmap.mmap", Memory)
    tensor = torch.full((2, 1450, 1450), torch.nan, dtype=torch.float64)
    _launch.fill_with_zeros(tensor)
    assert not tensor.any()


@pytest.mark.skipif(EXTENSION is None, reason=str(REASON))
def test_dtype_codes_are_those_of_the_extension():
    for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
        assert _launch.dtype_code(dtype) == EXTENSION.DTYPES[str(dtype)[len("torch.") :]]


@compare.every_tiny_case(*DIFFERENTIABLE, backends=("cuda",))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_cuda_backend_on_a_simulated_gpu(simulated_gpu, backend, sample, dtype):
    arguments, names = sample.arguments(dtype), DIFFERENTIABLE[sample.operator]
    reference = compare.public(sample.operator, "reference")
    ours = compare.differentiate(compare.public(sample.operator, backend), arguments, names)
    exact = compare.differentiate(reference, convert(arguments, torch.float64, "cpu"), names)
    compare.judge_all(ours, exact, compare.differentiate(reference, arguments, names))


def test_tf32_is_asked_for_by_either_setting():
    """The getter of the older one raises once the newer one was used."""
    code = """
import torch
from restoration_kernels import _launch
cudnn = torch.backends.cudnn
for allowed in (True, False):
    cudnn.allow_tf32 = allowed
    assert _launch.convolves_in_tf32() is allowed
for precision in ("tf32", "ieee"):
    cudnn.conv.fp32_precision = precision
    assert _launch.convolves_in_tf32() is (precision == "tf32")
"""
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.skipif(EXTENSION is None or not hasattr(os, "fork"), reason=str(REASON or "no fork"))
def test_child_forked_before_the_first_kernel():
    """Once torch has used its threads: they are gone in the child, whose first kernel must not wait for them."""
    code = """
import multiprocessing, torch
from restoration_kernels import pac_conv2d
torch.set_num_threads(2)
torch.randn(2000, 1000).exp()
x = torch.randn(1, 16, 64, 64)
child = multiprocessing.get_context("fork").Process(target=pac_conv2d, args=(x, x, torch.randn(1, 16, 3, 3)))
child.start()
child.join(30)
waits = child.is_alive()
child.kill()
print(waits, child.exitcode)
"""
    run = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=60)
    assert run.stdout == "False 0\n"


def test_cpu_kernels_take_as_many_threads_as_torch(monkeypatch):
    extension, x = mock.Mock(), torch.zeros(3)
    monkeypatch.setattr(_backend, "extension", lambda: (extension, None))
    monkeypatch.setattr(_launch, "dtype_code", {torch.float32: 7}.get)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 5)
    _launch.run("kernel", "cpu", {"x": x, "y": None}, {"width": 3}, torch.float32)
    extension.kernel_cpu.assert_called_once_with(x=x.data_ptr(), y=0, width=3, dtype=7, threads=5)


def shaped(*shape):
    """A tensor of any size in little memory."""
    return torch.zeros(()).expand(shape)


def plane(height, width):
    return shaped(1, 2, height, width)


TAPS = torch.zeros(1, 1, 3, 3)
STEPS = "its kernel counts the steps of a stride in 32 bits"
PADDED = "its kernel counts the pixels of a padded plane in 32 bits"
PIXELS = "its kernel takes at most 2^30 pixels of a plane"


@pytest.mark.parametrize(
    ("operator", "backends", "arguments", "reason"),
    [
        ("pac_conv2d", ("cuda", "triton"), {"x": TAPS, "weight": TAPS, "stride": 2**31}, STEPS),
        ("pac_conv2d", ("cuda", "triton"), {"x": TAPS, "weight": TAPS, "padding": 2**14}, PADDED),
        ("pac_conv2d_", ("cuda", "triton"), {"x": plane(2**15, 2**15), "weight": TAPS}, PADDED),
        ("relu_split", ("triton",), {"x": plane(2**15 + 1, 2**15), "channels": 1}, PIXELS),
        ("dual_pool_attention_pad2d", ("triton",), {"x": plane(2**15, 2**15)}, f"{PIXELS}, padding included"),
        (
            "dual_pool_attention_pad2d",
            ("cuda",),
            {"x": plane(3, 2**30)},
            "its kernel takes at most 2^30 rows or columns, padding included",
        ),
        (
            "info_nce",
            ("triton",),
            {"query": shaped(65_536, 1, 1)},
            "its kernel takes at most 65,535 images",
        ),
        ("info_nce", ("cuda",), {"query": shaped(1, 1, 2**22 + 1)}, "its kernel takes at most 2^22 numbers a row"),
        ("info_nce", ("triton",), {"query": shaped(1, 1, 2**19 + 1)}, "its kernel takes at most 2^19 numbers a row"),
        (
            "neighbor_difference",
            ("triton",),
            {"features": shaped(1, 2**21 + 1, 3, 3)},
            "its kernel takes at most 2^21 channels",
        ),
        (
            "pac_conv2d",
            ("cuda", "triton"),
            {"x": plane(3, 3), "weight": shaped(2**15, 2**15 + 1, 1, 1)},
            "its kernel takes at most 2^30 weights",
        ),
        (
            "pac_conv2d_",
            ("cuda", "triton"),
            {"x": plane(3, 3), "weight": shaped(2**15, 2**15 + 1, 1, 1)},
            "its kernel takes at most 2^30 weights",
        ),
        (
            "pac_conv2d",
            ("cuda", "triton"),
            {"x": shaped(1, 2**30 + 1, 1, 1), "weight": TAPS},
            "its kernel takes at most 2^30 channels",
        ),
        (
            "pac_conv2d",
            ("cuda", "triton"),
            {"x": plane(3, 3), "weight": TAPS, "guide": shaped(1, 2**30 + 1, 1, 1)},
            "its kernel takes at most 2^30 channels",
        ),
    ],
    ids=[
        *("stride", "padding", "plane", "relu_split", "pad2d-triton", "pad2d-cuda"),
        *("images", "row-cuda", "row-triton", "channels", "weights", "weights in place"),
        *("channels of x", "channels of guide"),
    ],
)
def test_what_32_bits_cannot_count_is_left_to_others(operator, backends, arguments, reason):
    for backend in backends:
        assert _backend.OPERATORS[operator]._predicates[backend](**arguments) == reason


@pytest.mark.parametrize(
    ("operator", "backend", "arguments"),
    [
        ("info_nce", "triton", {"query": shaped(65_535, 1, 1)}),
        ("info_nce", "cuda", {"query": shaped(1, 1, 2**22)}),
        ("info_nce", "triton", {"query": shaped(1, 1, 2**19)}),
        ("pac_conv2d", "triton", {"x": plane(3, 3), "weight": shaped(2**15, 2**15, 1, 1)}),
    ],
)
def test_what_32_bits_can_just_count_is_taken(operator, backend, arguments):
    assert _backend.OPERATORS[operator]._predicates[backend](**arguments) is None


def test_op_of_an_exported_graph_checks_its_device(monkeypatch):
    """The choice of a backend is part of the graph, where nobody can see that its tensors have moved."""
    monkeypatch.setattr(_backend, "why_not_here", lambda backend: None)
    message = "^dual_pool_attention: backend must be able to run here on cpu, got 'cuda': the tensors are on cpu, not "
    one = torch.zeros(1, 1, 1, 1)
    with pytest.raises(RuntimeError, match=message):
        torch.ops.restoration_kernels.dual_pool_attention(one, torch.zeros(1), 50, "cuda")
    geometry = ([1, 1], [0, 0], [1, 1], False)
    with pytest.raises(RuntimeError, match=message.replace("dual_pool_attention", "pac_conv2d_")):
        torch.ops.restoration_kernels.pac_conv2d_(one, one * 1, one * 1, one * 1, None, *geometry, 1.0, None, "cuda")

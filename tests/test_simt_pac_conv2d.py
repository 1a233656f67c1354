"""The CUDA kernels of the pixel-adaptive convolution on the CPU, behind the public functions, as a GPU would run them."""

import compare
import pytest
import torch
from test_simt import both_orders, needs_compiler, order  # noqa: F401

from restoration_kernels import pac_conv2d, pac_conv2d_
from restoration_kernels._samples import samples

pytestmark = [needs_compiler, pytest.mark.usefixtures("simulated_gpu")]

CASES = [pytest.param(sample, id=sample.name) for sample in samples("pac_conv2d", "tiny", "odd")]
TYPES = ["float64", "float32", "tf32", "float16", "bfloat16"]


@pytest.fixture
def tf32(request, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", request.param)
    return request.param


@both_orders
@pytest.mark.parametrize("sample", CASES)
@pytest.mark.parametrize("dtype,tf32", [(torch.float32, False)], indirect=["tf32"])
def test_values(sample, dtype, tf32, order):
    arguments = sample.arguments(dtype)
    exact = pac_conv2d(**compare.convert(arguments, torch.float64, "cpu"), backend="reference")
    compare.judge("output", pac_conv2d(**arguments, backend="cuda"), exact, pac_conv2d(**arguments, backend="reference"))

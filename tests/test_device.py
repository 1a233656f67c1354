"""Which device a command computes on, and what that sets."""

import pytest
import torch

from restoration.device import choose_device
from restoration.errors import UserError

CPU = torch.device("cpu")


def test_devices(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    assert choose_device("cpu") == CPU and not torch.backends.cudnn.allow_tf32
    with pytest.raises(UserError, match="cpu, cuda or auto, got 'tpu'"):
        choose_device("tpu")
    if not torch.cuda.is_available():
        assert choose_device("auto") == CPU
        with pytest.raises(UserError, match="no CUDA device"):
            choose_device("cuda")

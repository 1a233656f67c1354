"""The device that a command computes on."""

from __future__ import annotations

import torch

from restoration.errors import UserError


def choose_device(name: str) -> torch.device:
    """'cpu', 'cuda' or 'auto' (CUDA where there is one). float32 then means float32 in cuDNN, too, by default tf32."""
    torch.backends.cudnn.allow_tf32 = False
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name not in ("cpu", "cuda"):
        raise UserError(f"--device must be cpu, cuda or auto, got {name!r}")
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: this computer has no CUDA device that PyTorch can use; take cpu or auto")
    return torch.device(name)

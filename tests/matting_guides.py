"""Guides that tell good numerics of the Matting Laplacian from bad, and images to judge by them.

Eight-bit pictures, as all that are read from files: float32 multiples of 1/255.
"""

import pytest
import torch
import torch.nn.functional as F

# Of the GPU that the CUDA kernel chooses its arithmetic for; the fixture is in conftest.py.
both_speeds_of_float64 = pytest.mark.parametrize("float64", ["fast", "slow"], indirect=True)

PICTURES = ("photograph", "tinted_ink", "grey_one_level", "grey", "paper_one_level", "noise")
SIZE = (48, 61)
# Of aged silk under ink: the warmer channels are lighter by fixed factors.
TINT = (1.0, 0.93, 0.8)


def draw(picture, size=SIZE):
    """The guide [1, 3, H, W] of one of the PICTURES."""
    generator = torch.Generator().manual_seed(PICTURES.index(picture))
    if picture == "photograph":
        guide = _texture(3, size, generator)
    elif picture == "tinted_ink":
        guide = _texture(1, size, generator) * torch.tensor(TINT)[:, None, None]
    elif picture == "grey_one_level":
        guide = _texture(1, size, generator) + _levels(size, generator)
    elif picture == "grey":
        guide = _texture(1, size, generator).expand(3, -1, -1)
    elif picture == "paper_one_level":
        guide = 0.8 * torch.tensor(TINT)[:, None, None] + _levels(size, generator)
    else:
        guide = torch.rand(3, *size, generator=generator)
    return guide.mul(255).round().clamp(0, 255).div(255)[None]


def recolour(name, guide):
    """An image for a guide: "stylised" with colours of its own, or "affine", which the guide explains fully."""
    if name == "affine":
        return 0.7 * guide + 0.1
    generator = torch.Generator().manual_seed(len(PICTURES))
    return (0.6 * guide.roll(1, 1) + 0.4 * _texture(3, guide.shape[2:], generator)).contiguous()


def _texture(channels, size, generator):
    """Smooth shapes, finer ones fainter, in [0, 1]: [channels, H, W]."""
    total = torch.zeros(channels, *size)
    for cells in (3, 6, 12, 24, 48):
        shapes = torch.rand(1, channels, cells, cells, generator=generator) / cells
        total += F.interpolate(shapes, size, mode="bicubic", align_corners=False)[0]
    return (total - total.min()) / (total.max() - total.min())


def _levels(size, generator):
    return torch.randint(-1, 2, (3, *size), generator=generator) / 255

"""ReLU and split of a map of pixels into two of planes, in Triton: formula in relu_split.py.

A program has a tile of some pixels and channels (turned_tiles_triton.py), which may belong to both maps. Everything is
read once and written once. No atomics: the same bits on every run.
"""

import triton
import triton.language as tl

from . import turned_tiles_triton as tiles


def forward(x, rectified, rest):
    """Fills rectified and rest, planes, from x [B,H,W,C]."""
    _, H, W, C = x.shape
    relu_split_forward_kernel[tiles.grid(x.shape)](x, rectified, rest, C, rectified.shape[1], H, W, *tiles.TILE)


def backward(grad_rectified, grad_rest, rectified, grad_x):
    """Fills grad_x [B,H,W,C]."""
    _, H, W, C = grad_x.shape
    relu_split_backward_kernel[tiles.grid(grad_x.shape)](
        grad_rectified, grad_rest, rectified, grad_x, C, rectified.shape[1], H, W, *tiles.TILE
    )


@triton.jit
def _where_positive(decider, value):
    """value where decider is above zero, or NaN; else zero."""
    if decider.dtype == tl.bfloat16:  # which the interpreter would compare by their bits
        decider = decider.to(tl.float32)
    return tl.where(decider <= 0, 0, value)


@triton.jit
def relu_split_forward_kernel(
    x, rectified, rest, channels, split, height, width,
    CHANNELS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """rectified = max(x[..., :split], 0), rest = x[..., split:]."""
    image, channel, _, row, column, inside = tiles.tile_of(
        tl.program_id(0), channels, height, width, CHANNELS, ROWS, COLUMNS
    )
    pixels = tiles.pixel_offsets(image, channel, row, column, channels, height, width)
    values = tl.load(x + pixels, mask=inside, other=0)
    first = tiles.plane_offsets(image, channel, row, column, split, height, width)
    second = tiles.plane_offsets(image, channel - split, row, column, channels - split, height, width)
    tl.store(rectified + first, _where_positive(values, values), mask=inside & (channel < split))
    tl.store(rest + second, values, mask=inside & (channel >= split))


@triton.jit
def relu_split_backward_kernel(
    grad_rectified, grad_rest, rectified, grad_x, channels, split, height, width,
    CHANNELS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """grad_x = grad_rectified where rectified is above zero, else 0; then grad_rest."""
    image, channel, _, row, column, inside = tiles.tile_of(
        tl.program_id(0), channels, height, width, CHANNELS, ROWS, COLUMNS
    )
    first = tiles.plane_offsets(image, channel, row, column, split, height, width)
    in_first = inside & (channel < split)
    deciders = tl.load(rectified + first, mask=in_first, other=0)
    gradients = _where_positive(deciders, tl.load(grad_rectified + first, mask=in_first, other=0))
    second = tiles.plane_offsets(image, channel - split, row, column, channels - split, height, width)
    rest = tl.load(grad_rest + second, mask=inside & (channel >= split), other=0)
    gradients = tl.where(channel < split, gradients, rest)
    pixels = tiles.pixel_offsets(image, channel, row, column, channels, height, width)
    tl.store(grad_x + pixels, gradients, mask=inside)

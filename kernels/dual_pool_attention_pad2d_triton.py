"""Dual pooling attention into a padded map with channels last, in Triton: formula in dual_pool_attention_pad2d.py.

x lies in planes, y in pixels: a program has a tile of some pixels and channels (turned_tiles_triton.py).
Forward: mean and scale of each plane as in dual_pool_attention_triton.py -> y, mirrored pixels like all others.
Backward: sum of grad_y · x of each tile -> grad_logit and grad_mean of each plane -> grad_x; grad_weight tap by tap.
Read and written: x twice and y once; grad_y twice, x, grad_addend and grad_x once. No atomics: the same bits always.
"""

import triton
import triton.language as tl

from . import dual_pool_attention_triton as attention
from . import turned_tiles_triton as tiles


def forward(x, weight, y, mean, scale, padding, pool_size):
    """Fills y [B,H+2p,W+2p,C], and mean and scale [B,C] for backward."""
    attention.compute_scales(x, weight, mean, scale, pool_size)
    B, C, H, W = x.shape
    dual_pool_attention_pad2d_forward_kernel[tiles.grid((B, H, W, C))](x, scale, y, C, H, W, padding, *tiles.TILE)


def backward(grad_y, x, weight, mean, scale, grad_addend, grad_x, grad_weight, padding, pool_size):
    """Fills grad_x [B,C,H,W], grad_addend included, and grad_weight [k]; one that is None is not computed."""
    B, C, H, W = x.shape
    partial = mean.new_empty(B * C, tiles.plane_tiles(H, W))
    dual_pool_attention_pad2d_backward_reduce_kernel[tiles.grid((B, H, W, C))](
        grad_y, x, partial, C, H, W, padding, *tiles.TILE
    )
    grad_mean = attention.compute_grad_mean(partial, weight, mean, scale, grad_weight)
    if grad_x is not None:
        weights = attention.pooling_weights(mean, H, W, pool_size)
        dual_pool_attention_pad2d_backward_input_kernel[tiles.grid((B, H, W, C))](
            grad_y, scale, grad_mean, weights, grad_addend, grad_x, C, H, W, padding, *tiles.TILE
        )


@triton.jit
def _padded_place(place, size, padding, number):
    """Where along one axis a place lies in the padded map: its own, then before and behind; -1 where it does not."""
    before = tl.where((place >= 1) & (place <= padding), padding - place, -1)
    behind = tl.where((place <= size - 2) & (place >= size - 1 - padding), padding + 2 * (size - 1) - place, -1)
    return tl.where(number == 0, place + padding, tl.where(number == 1, before, behind))


@triton.jit
def _places(first, count, size, padding):
    """How many of those any of `count` places from the first on may have."""
    return tl.where((first <= padding) | (first + count >= size - padding), 3, 1)


@triton.jit
def _padded_offsets(image, channel, row, column, row_number, column_number, channels, height, width, padding):
    """Offsets in the padded map of the pixels of a tile, or of their mirrors of some numbers; and which exist."""
    padded_row = _padded_place(row, height, padding, row_number)
    padded_column = _padded_place(column, width, padding, column_number)
    padded_height, padded_width = height + 2 * padding, width + 2 * padding
    offsets = tiles.pixel_offsets(image, channel, padded_row, padded_column, channels, padded_height, padded_width)
    return offsets, (padded_row >= 0) & (padded_column >= 0)


@triton.jit
def _sum_of_places(
    grad_y, image, channel, tile, row, column, inside, channels, height, width, padding, dtype: tl.constexpr,
    CHANNELS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """What came to the pixels of a tile and to their mirrors."""
    first_row, first_column = tiles.corner_of(tile, width, ROWS, COLUMNS)
    gradients = tl.zeros([CHANNELS, ROWS * COLUMNS], dtype)
    for row_number in range(_places(first_row, ROWS, height, padding)):
        for column_number in range(_places(first_column, COLUMNS, width, padding)):
            offsets, exists = _padded_offsets(
                image, channel, row, column, row_number, column_number, channels, height, width, padding
            )
            gradients += tl.load(grad_y + offsets, mask=inside & exists, other=0).to(dtype)
    return gradients


@triton.jit
def dual_pool_attention_pad2d_forward_kernel(
    x, scale, y, channels, height, width, padding,
    CHANNELS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """y = x · scale, at a pixel's place and at its mirrors'."""
    image, channel, tile, row, column, inside = tiles.tile_of(
        attention.last_first(), channels, height, width, CHANNELS, ROWS, COLUMNS
    )
    factor = tl.load(scale + image * channels + channel, mask=channel < channels, other=0)
    sources = tiles.plane_offsets(image, channel, row, column, channels, height, width)
    values = tl.load(x + sources, mask=inside, other=0).to(factor.dtype) * factor
    first_row, first_column = tiles.corner_of(tile, width, ROWS, COLUMNS)
    for row_number in range(_places(first_row, ROWS, height, padding)):
        for column_number in range(_places(first_column, COLUMNS, width, padding)):
            offsets, exists = _padded_offsets(
                image, channel, row, column, row_number, column_number, channels, height, width, padding
            )
            tl.store(y + offsets, values, mask=inside & exists)


@triton.jit
def dual_pool_attention_pad2d_backward_reduce_kernel(
    grad_y, x, partial, channels, height, width, padding,
    CHANNELS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """partial[plane, tile] = sum over the tile of x · what came to a pixel and to its mirrors."""
    dtype: tl.constexpr = partial.dtype.element_ty
    image, channel, tile, row, column, inside = tiles.tile_of(
        tl.program_id(0), channels, height, width, CHANNELS, ROWS, COLUMNS
    )
    gradients = _sum_of_places(
        grad_y, image, channel, tile, row, column, inside, channels, height, width, padding, dtype,
        CHANNELS, ROWS, COLUMNS,
    )  # fmt: skip
    # Behind the loops: numbers of x that were kept through them would cost float64 more registers than there are.
    sources = tiles.plane_offsets(image, channel, row, column, channels, height, width)
    values = tl.load(x + sources, mask=inside, other=0).to(dtype)
    count = tl.cdiv(height, ROWS) * tl.cdiv(width, COLUMNS)
    total = tl.sum(gradients * values, 1, keep_dims=True)
    tl.store(partial + (image * channels + channel) * count + tile, total, mask=channel < channels)


@triton.jit
def dual_pool_attention_pad2d_backward_input_kernel(
    grad_y, scale, grad_mean, weights, grad_addend, grad_x, channels, height, width, padding,
    CHANNELS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """grad_x = scale · what came to a pixel and to its mirrors + grad_mean · rows · columns + grad_addend."""
    dtype: tl.constexpr = scale.dtype.element_ty
    image, channel, tile, row, column, inside = tiles.tile_of(
        attention.last_first(), channels, height, width, CHANNELS, ROWS, COLUMNS
    )
    gradients = _sum_of_places(
        grad_y, image, channel, tile, row, column, inside, channels, height, width, padding, dtype,
        CHANNELS, ROWS, COLUMNS,
    )  # fmt: skip
    plane = image * channels + channel
    gradients *= tl.load(scale + plane, mask=channel < channels, other=0)
    share = tl.load(weights + row, mask=row < height, other=0)
    share *= tl.load(weights + height + column, mask=column < width, other=0)
    gradients += tl.load(grad_mean + plane, mask=channel < channels, other=0) * share
    offsets = tiles.plane_offsets(image, channel, row, column, channels, height, width)
    if grad_addend is not None:
        gradients += tl.load(grad_addend + offsets, mask=inside, other=0).to(dtype)
    tl.store(grad_x + offsets, gradients, mask=inside)

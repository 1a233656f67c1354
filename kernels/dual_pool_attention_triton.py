"""Dual pooling attention in Triton: formula in dual_pool_attention.py. The template for new <op>_triton.py files.

A program owns a tile of rows and columns of one plane, which is one channel of one image.
Forward: pooling weights (rows, then columns) -> weighted sum of each tile -> mean and scale of each plane -> y.
Backward: sum of grad_y · x of each tile -> grad_logit and grad_mean of each plane -> grad_x; grad_weight tap by tap.
Read and written: x twice and y once; grad_y twice, x and grad_x once. No atomics: the same bits on every run.
"""

import torch
import triton
import triton.language as tl

# A tile: rows of whole cache lines and, with Triton's 4 warps, 16 numbers a thread. Those are enough 16-byte loads in
# flight, and few enough registers (40) for all the threads of a multiprocessor to stay.
_ROWS, _COLUMNS = 16, 128
# Numbers that a program sums at a time where there are few.
_BLOCK = 256


def forward(x, weight, y, mean, scale, pool_size):
    """Fills y [B,C,H,W], and mean and scale [B,C] for backward."""
    compute_scales(x, weight, mean, scale, pool_size)
    B, C, H, W = x.shape
    dual_pool_attention_forward_scale_kernel[(B * C * _tiles(H, W),)](x, scale, y, H, W, _ROWS, _COLUMNS)


def backward(grad_y, x, weight, mean, scale, grad_x, grad_weight, pool_size):
    """Fills grad_x [B,C,H,W] and grad_weight [k]; one that is None is not computed."""
    B, C, H, W = x.shape
    partial = mean.new_empty(B * C, _tiles(H, W))
    dual_pool_attention_backward_reduce_kernel[(partial.numel(),)](grad_y, x, partial, H, W, _ROWS, _COLUMNS)
    grad_mean = compute_grad_mean(partial, weight, mean, scale, grad_weight)
    if grad_x is not None:
        weights = pooling_weights(mean, H, W, pool_size)
        dual_pool_attention_backward_input_kernel[(partial.numel(),)](
            grad_y, scale, grad_mean, weights, grad_x, H, W, _ROWS, _COLUMNS
        )


def compute_scales(x, weight, mean, scale, pool_size):
    """Fills mean and scale [B,C] of x [B,C,H,W]."""
    B, C, H, W = x.shape
    weights = pooling_weights(mean, H, W, pool_size)
    partial = mean.new_empty(B * C, _tiles(H, W))
    dual_pool_attention_forward_reduce_kernel[(partial.numel(),)](x, weights, partial, H, W, _ROWS, _COLUMNS)
    dual_pool_attention_forward_mean_kernel[(B * C,)](
        partial, weight, mean, scale, C, len(weight), partial.shape[1], _BLOCK
    )


def compute_grad_mean(partial, weight, mean, scale, grad_weight):
    """The gradient to mean [B,C], from partial sums [B·C, tiles] of grad_y · x; fills grad_weight unless it is None."""
    planes, C = mean.numel(), mean.shape[1]
    grad_logit, grad_mean = torch.empty_like(mean), torch.empty_like(mean)
    dual_pool_attention_backward_mean_kernel[(planes,)](
        partial, weight, scale, grad_logit, grad_mean, C, len(weight), partial.shape[1], _BLOCK
    )
    if grad_weight is not None:
        dual_pool_attention_backward_weight_kernel[(len(weight),)](grad_logit, mean, grad_weight, planes, C, _BLOCK)
    return grad_mean


def _tiles(height, width):
    return triton.cdiv(height, _ROWS) * triton.cdiv(width, _COLUMNS)


def pooling_weights(like, height, width, pool_size):
    """Share of each row, then of each column, in the mean: [H + W]."""
    weights = like.new_empty(height + width)
    # A place lies in so many bins at most: in two where bins are larger than places, else in all that it touches.
    most_bins = max(triton.cdiv(pool_size, size) + 1 for size in (height, width))
    grid = (triton.cdiv(height + width, _BLOCK),)
    dual_pool_attention_weights_kernel[grid](weights, height, width, pool_size, most_bins, _BLOCK)
    return weights


@triton.jit
def dual_pool_attention_weights_kernel(weights, height, width, pool_size, most_bins, BLOCK: tl.constexpr):
    """Share of each row, then of each column, in the mean of bins, which lie as in dual_pool_attention_reference.py."""
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    size = tl.where(index < height, height, width).to(tl.int64)
    place = tl.where(index < height, index, index - height)
    first_bin = place * pool_size // size
    end_bin = tl.cdiv((place + 1) * pool_size, size)
    total = tl.zeros([BLOCK], weights.dtype.element_ty)
    for step in range(most_bins):
        bin = first_bin + step
        extent = tl.cdiv((bin + 1) * size, pool_size) - bin * size // pool_size
        total += tl.where(bin < end_bin, 1 / extent.to(total.dtype), 0)
    tl.store(weights + index, total / pool_size, mask=index < height + width)


@triton.jit
def _tile(program, height, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Plane, rows [ROWS,1], columns [1,COLUMNS] and offsets of a tile, and what of it lies inside the image."""
    column_tiles = tl.cdiv(width, COLUMNS)
    tiles = column_tiles * tl.cdiv(height, ROWS)
    plane = program // tiles
    tile = (program % tiles).to(tl.int64)
    row = tile // column_tiles * ROWS + tl.arange(0, ROWS)[:, None]
    column = tile % column_tiles * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    offsets = (plane.to(tl.int64) * height + row) * width + column
    return plane, row, column, offsets, (row < height) & (column < width)


@triton.jit
def last_first():
    """Index of this program in a second pass over the same data: what was read last is still in the L2 cache."""
    return tl.num_programs(0) - 1 - tl.program_id(0)


@triton.jit
def _pooling_weight(weights, row, column, height, width):
    """rows · columns for each pixel of a tile, zero outside the image."""
    row_weight = tl.load(weights + row, mask=row < height, other=0)
    return row_weight * tl.load(weights + height + column, mask=column < width, other=0)


@triton.jit
def dual_pool_attention_forward_reduce_kernel(
    x, weights, partial, height, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """partial[plane, tile] = sum over the tile of rows · columns · x."""
    _, row, column, offsets, inside = _tile(tl.program_id(0), height, width, ROWS, COLUMNS)
    values = tl.load(x + offsets, mask=inside, other=0).to(partial.dtype.element_ty)
    total = tl.sum(values * _pooling_weight(weights, row, column, height, width))
    tl.store(partial + tl.program_id(0), total)


@triton.jit
def dual_pool_attention_backward_reduce_kernel(
    grad_y, x, partial, height, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """partial[plane, tile] = sum over the tile of grad_y · x."""
    _, _, _, offsets, inside = _tile(tl.program_id(0), height, width, ROWS, COLUMNS)
    gradients = tl.load(grad_y + offsets, mask=inside, other=0).to(partial.dtype.element_ty)
    values = tl.load(x + offsets, mask=inside, other=0).to(partial.dtype.element_ty)
    tl.store(partial + tl.program_id(0), tl.sum(gradients * values))


@triton.jit
def _plane_sum(partial, plane, tiles, BLOCK: tl.constexpr):
    """Sum of the partial sums of a plane."""
    total = tl.zeros([BLOCK], partial.dtype.element_ty)
    for first in range(0, tiles, BLOCK):
        tile = first + tl.arange(0, BLOCK)
        total += tl.load(partial + plane.to(tl.int64) * tiles + tile, mask=tile < tiles, other=0)
    return tl.sum(total)


@triton.jit
def dual_pool_attention_forward_mean_kernel(partial, weight, mean, scale, channels, taps, tiles, BLOCK: tl.constexpr):
    """mean and scale of one plane. The means of its neighbours are summed again: a few numbers, for a launch less."""
    plane = tl.program_id(0)
    channel = plane % channels
    logit = tl.full((), 0, partial.dtype.element_ty)
    for tap in range(taps):
        step = tap - taps // 2
        if (channel + step >= 0) & (channel + step < channels):
            neighbor_mean = _plane_sum(partial, plane + step, tiles, BLOCK)
            logit += tl.load(weight + tap).to(logit.dtype) * neighbor_mean
            if step == 0:
                tl.store(mean + plane, neighbor_mean)
    tl.store(scale + plane, 1 / (1 + tl.exp(-logit)))


@triton.jit
def dual_pool_attention_backward_mean_kernel(
    partial, weight, scale, grad_logit, grad_mean, channels, taps, tiles, BLOCK: tl.constexpr
):
    """grad_logit and grad_mean of one plane: the transpose of the forward's filter over channels."""
    plane = tl.program_id(0)
    channel = plane % channels
    gradient = tl.full((), 0, partial.dtype.element_ty)
    for tap in range(taps):
        step = taps // 2 - tap
        if (channel + step >= 0) & (channel + step < channels):
            neighbor_scale = tl.load(scale + plane + step)
            neighbor_grad = _plane_sum(partial, plane + step, tiles, BLOCK) * neighbor_scale * (1 - neighbor_scale)
            gradient += tl.load(weight + tap).to(gradient.dtype) * neighbor_grad
            if step == 0:
                tl.store(grad_logit + plane, neighbor_grad)
    tl.store(grad_mean + plane, gradient)


@triton.jit
def dual_pool_attention_backward_weight_kernel(grad_logit, mean, grad_weight, planes, channels, BLOCK: tl.constexpr):
    """grad_weight[tap] = sum over planes of grad_logit · the mean of the channel that the tap reaches."""
    step = tl.program_id(0) - tl.num_programs(0) // 2
    total = tl.zeros([BLOCK], grad_logit.dtype.element_ty)
    for first in range(0, planes, BLOCK):
        plane = first + tl.arange(0, BLOCK)
        neighbor = plane % channels + step
        inside = (plane < planes) & (neighbor >= 0) & (neighbor < channels)
        gradients = tl.load(grad_logit + plane, mask=inside, other=0)
        total += gradients * tl.load(mean + plane + step, mask=inside, other=0)
    tl.store(grad_weight + tl.program_id(0), tl.sum(total))


@triton.jit
def dual_pool_attention_forward_scale_kernel(x, scale, y, height, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """y = x · scale."""
    plane, _, _, offsets, inside = _tile(last_first(), height, width, ROWS, COLUMNS)
    factor = tl.load(scale + plane)
    values = tl.load(x + offsets, mask=inside, other=0).to(factor.dtype)
    tl.store(y + offsets, values * factor, mask=inside)


@triton.jit
def dual_pool_attention_backward_input_kernel(
    grad_y, scale, grad_mean, weights, grad_x, height, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """grad_x = grad_y · scale + grad_mean · rows · columns."""
    plane, row, column, offsets, inside = _tile(last_first(), height, width, ROWS, COLUMNS)
    factor = tl.load(scale + plane)
    gradients = tl.load(grad_y + offsets, mask=inside, other=0).to(factor.dtype) * factor
    gradients += tl.load(grad_mean + plane) * _pooling_weight(weights, row, column, height, width)
    tl.store(grad_x + offsets, gradients, mask=inside)

"""Matting Laplacian in Triton: formula in matting_laplacian.py.

Fit: a program takes a block of windows; for every channel it keeps the slopes a_w and the offset b_w of the fit and
adds up the energy. Product: a program takes a block of pixels and gathers x - a_w·g - b_w over the windows that hold
each. Kept between the two: 4·C float64 numbers a window. Everything is float64. No atomics: the same bits on every run.
"""

import torch
import triton
import triton.language as tl

# Numbers of one plane that a program holds. A thread of 4 warps has 16, of four planes at a time: as many float64 as
# registers allow. At radius 1 these are one window, whose sums then stay within the thread.
_NUMBERS = 2048
# Columns of a program's windows. They are those of whole rows, counted up from the first: Triton sees that they are
# neighbours in memory and gives a warp 32 of them. Where it sees no neighbours, its version decides what the threads of
# a warp share: the numbers of a window, and a thread has one of each of many windows, more than there are registers.
_COLUMNS = 32
# Pixels of a program of the product: 4 a thread, so that the gathers of one hide the delays of another.
_PIXELS = 512


def run(image, guide, product, energy, factor, eps, radius):
    """Fills product [B,C,H,W] with factor · M image and energy [B]; one that is None is not computed."""
    B, C, H, W = image.shape
    side = 2 * radius + 1
    window_rows, window_columns = max(H - 2 * radius, 0), max(W - 2 * radius, 0)
    windows = window_rows * window_columns
    numbers = triton.next_power_of_2(side * side + 3)
    rows = _NUMBERS // numbers // _COLUMNS
    blocks = triton.cdiv(window_rows, rows) * triton.cdiv(window_columns, _COLUMNS)
    fits = image.new_empty(B, C, 4, windows, dtype=torch.float64)
    partial = image.new_empty(B, blocks, dtype=torch.float64)
    if partial.numel() > 0:
        matting_laplacian_fit_kernel[(partial.numel(),)](
            image, guide, fits, partial, C, W, H * W, windows, eps, side, numbers, rows, _COLUMNS
        )
    if energy is not None:
        energy.copy_(partial.sum(1) / (H * W))
    if product is not None and product.numel() > 0:
        grid = (B * C * triton.cdiv(H * W, _PIXELS),)
        matting_laplacian_product_kernel[grid](image, guide, fits, product, factor, C, W, H * W, windows, side, _PIXELS)


@triton.jit
def _less_component(vectors, direction):
    """The vectors [NUMBERS,WINDOWS] without their components along orthogonal, not normalised directions."""
    return vectors - direction * (tl.sum(vectors * direction, 0) / tl.sum(direction * direction, 0))[None, :]


@triton.jit
def _centred_windows(plane, offsets, of_window, pixels):
    """Values of windows less their mean, zero beyond the `pixels` of a window; and that mean."""
    values = tl.load(plane + offsets, mask=of_window, other=0).to(tl.float64)
    mean = tl.sum(values, 0) / pixels
    return tl.where(of_window, values - mean[None, :], 0), mean


@triton.jit
def matting_laplacian_fit_kernel(
    image,
    guide,
    fits,
    partial,
    channels,
    width,
    pixels,
    windows,
    eps: tl.float64,
    SIDE: tl.constexpr,
    NUMBERS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """fits [B,C,4,windows]: slopes and offset; partial [B,blocks]: energy. By modified Gram-Schmidt, as in csrc."""
    n: tl.constexpr = SIDE * SIDE
    root_eps = tl.sqrt(tl.full((), eps, tl.float64))
    window_rows, window_columns = pixels // width - SIDE + 1, width - SIDE + 1
    pixels, windows = tl.cast(pixels, tl.int64), tl.cast(windows, tl.int64)  # of which thrice as many are counted below
    program = tl.program_id(0)
    column_blocks = tl.cdiv(window_columns, COLUMNS)
    blocks = tl.cdiv(window_rows, ROWS) * column_blocks
    index, block = (program // blocks).to(tl.int64), program % blocks
    place = tl.arange(0, ROWS * COLUMNS)
    row = block // column_blocks * ROWS + place // COLUMNS
    column = block % column_blocks * COLUMNS + place % COLUMNS
    exists = (row < window_rows) & (column < window_columns)
    window = row.to(tl.int64) * window_columns + column
    number = tl.arange(0, NUMBERS)[:, None]
    of_window = (number < n) & exists[None, :]
    offsets = (row.to(tl.int64) * width + column)[None, :] + number // SIDE * width + number % SIDE

    colours = guide + index * 3 * pixels
    first, first_mean = _centred_windows(colours, offsets, of_window, n)
    second, second_mean = _centred_windows(colours + pixels, offsets, of_window, n)
    third, third_mean = _centred_windows(colours + 2 * pixels, offsets, of_window, n)
    first = tl.where(number == n, root_eps, first)
    second = _less_component(tl.where(number == n + 1, root_eps, second), first)
    third = tl.where(number == n + 2, root_eps, third)
    third = _less_component(_less_component(third, first), second)

    energy = tl.zeros([ROWS * COLUMNS], tl.float64)
    for channel in range(channels):
        plane = index * channels + channel
        values, mean = _centred_windows(image + plane * pixels, offsets, of_window, n)
        residuals = _less_component(_less_component(_less_component(values, first), second), third)
        energy += tl.sum(residuals * residuals, 0)
        # The last three residuals are those of zeros by √eps times the slopes.
        first_slope = -tl.sum(tl.where(number == n, residuals, 0), 0) / root_eps
        second_slope = -tl.sum(tl.where(number == n + 1, residuals, 0), 0) / root_eps
        third_slope = -tl.sum(tl.where(number == n + 2, residuals, 0), 0) / root_eps
        offset = mean - first_slope * first_mean - second_slope * second_mean - third_slope * third_mean
        fit = fits + plane * 4 * windows + window
        tl.store(fit, first_slope, mask=exists)
        tl.store(fit + windows, second_slope, mask=exists)
        tl.store(fit + 2 * windows, third_slope, mask=exists)
        tl.store(fit + 3 * windows, offset, mask=exists)
    tl.store(partial + program, tl.sum(tl.where(exists, energy, 0)))


@triton.jit
def matting_laplacian_product_kernel(
    image,
    guide,
    fits,
    product,
    factor: tl.float64,
    channels,
    width,
    pixels,
    windows,
    SIDE: tl.constexpr,
    PIXELS: tl.constexpr,
):
    """product = factor · sum over the windows that contain a pixel of what their fits leave of it."""
    pixels, windows = tl.cast(pixels, tl.int64), tl.cast(windows, tl.int64)  # as in the fit
    program = tl.program_id(0).to(tl.int64)
    blocks = tl.cdiv(pixels, PIXELS)
    plane = program // blocks
    pixel = program % blocks * PIXELS + tl.arange(0, PIXELS)
    inside = pixel < pixels
    row, column = pixel // width, pixel % width
    window_rows, window_columns = pixels // width - SIDE + 1, width - SIDE + 1

    value = tl.load(image + plane * pixels + pixel, mask=inside, other=0).to(tl.float64)
    colours = guide + plane // channels * 3 * pixels + pixel
    first = tl.load(colours, mask=inside, other=0).to(tl.float64)
    second = tl.load(colours + pixels, mask=inside, other=0).to(tl.float64)
    third = tl.load(colours + 2 * pixels, mask=inside, other=0).to(tl.float64)
    total = tl.zeros([PIXELS], tl.float64)
    for step in range(SIDE * SIDE):
        window_row, window_column = row - step // SIDE, column - step % SIDE
        exists = inside & (window_row >= 0) & (window_row < window_rows)
        exists = exists & (window_column >= 0) & (window_column < window_columns)
        fit = fits + plane * 4 * windows + window_row * window_columns + window_column
        fitted = tl.load(fit, mask=exists, other=0) * first
        fitted += tl.load(fit + windows, mask=exists, other=0) * second
        fitted += tl.load(fit + 2 * windows, mask=exists, other=0) * third
        fitted += tl.load(fit + 3 * windows, mask=exists, other=0)
        total += tl.where(exists, value - fitted, 0)
    tl.store(product + plane * pixels + pixel, total * factor, mask=inside)

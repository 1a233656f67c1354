"""Pixel-adaptive convolution in Triton, backward. With v = alpha · grad_y, u_t(p)[c] = sum over o of W[o,c,t] v[o](p):

  grad_x[c](q) = sum over t of k_t(q-t) u_t(q-t)[c],   m_t(p) = k_t(p) · sum over c of x[c](p+t) u_t(p)[c],
  grad_g(q) = -sum over t of (m_t(q) + m_-t(q+t)) (g(q) - g(q+t)).

m_t is k_t times its gradient; with normalize, k_t is a share of the sum and m_t loses k_t · (sum over r of m_r).
Every gradient is gathered by its owner: no atomics, the same bits on every run. One product makes u for grad_x and m.
Kept between the kernels: k and m, K² numbers each a place. grad_W is in pac_conv2d_backward_weight_triton.py.
"""

import torch
import triton
import triton.language as tl

from .pac_conv2d_backward_weight_triton import weight_gradient
from .pac_conv2d_triton import (
    COLUMNS,
    LEAST_DOT,
    SIZES,
    add_products,
    arithmetic,
    guides_at_once,
    kernel_of_tap,
    locate,
    multiplied_at_once,
    pixel_count,
    places_of_tile,
    power_of_two,
    product_form,
    start,
    steps_on,
    tile_count,
    tile_places,
    tuner,
)

# Rows of a tile where little is computed: with Triton's 4 warps a place a thread, and so many threads at a time.
_ROWS = 4
# Channels that a program of the input kernel owns, at least and at most: gradient, product and values of one take three
# registers for each place of a thread.
_CHANNELS = {"dot": (LEAST_DOT, 64), "sum": (4, 16), "filter": (4, 16)}
# (ROWS, warps, stages) of the input kernel by the channels that a program owns.
_INPUT_TILES = {
    64: ((2, 8, 2), (1, 4, 2)),
    32: ((4, 8, 2), (2, 4, 2)),
    16: ((4, 4, 1), (8, 8, 1)),
    8: ((8, 4, 1), (4, 4, 1)),
    4: ((8, 4, 1), (16, 4, 1)),
}


def backward(
    grad_y, x, guide, weight, grad_x, grad_guide, grad_weight, grad_bias, stride, padding, dilation, normalize, alpha
):
    """Fills the gradients that are not None."""
    if grad_y.numel() == 0:
        for gradient in (grad_x, grad_guide, grad_weight, grad_bias):
            if gradient is not None:
                gradient.zero_()
        return
    accumulate = torch.float64 if x.dtype == torch.float64 else torch.float32
    if grad_bias is not None:
        grad_bias.copy_(alpha * grad_y.sum((0, 2, 3), dtype=accumulate))
    if grad_x is None and grad_guide is None and grad_weight is None:
        return
    steps = steps_on(x, stride, padding, dilation)
    kernels = _kernels(guide, grad_y, steps, weight.shape[-1], normalize, accumulate)
    if product_form(x, weight, grad_y.shape[1]) == "filter":
        grad_filter = grad_weight
    else:
        grad_filter = None
        if grad_weight is not None:
            weight_gradient(grad_y, x, kernels, grad_weight, steps, alpha)
    if grad_x is not None or grad_guide is not None or grad_filter is not None:
        slopes = _input_gradient(grad_y, x, weight, kernels, grad_x, grad_guide, grad_filter, steps, alpha)
    if grad_guide is not None:
        _guide_gradient(guide, kernels, slopes, grad_guide, steps, weight.shape[-1], normalize)


def _kernels(guide, grad_y, steps, kernel_size, normalize, accumulate):
    """k [B,K²,H',W'], 0 for taps outside the image."""
    B, G, H, W = guide.shape
    out_height, out_width = grad_y.shape[2:]
    kernels = guide.new_empty(B, kernel_size**2, out_height, out_width, dtype=accumulate)
    pac_conv2d_backward_affinity_kernel[(B * tile_count(out_height, out_width, _ROWS),)](
        guide, kernels, H, W, out_height, out_width, steps, normalize, G, kernel_size, guides_at_once(G), COLUMNS, _ROWS
    )
    return kernels


def _input_gradient(grad_y, x, weight, kernels, grad_x, grad_guide, grad_filter, steps, alpha):
    """Fills grad_x and the gradient of a filter that channels share. Returns m [B,K²,H',W'] if grad_guide is wanted."""
    B, C, H, W = x.shape
    O, out_height, out_width = grad_y.shape[1:]
    form = product_form(x, weight, O)
    # Consecutive numbers along the axis that a product runs over, or, in sums, along the one that a thread keeps.
    packed = weight.permute(2, 3, 1, 0) if form == "dot" else weight.permute(2, 3, 0, 1)
    channels = power_of_two(C, *_CHANNELS[form])
    tiles = _INPUT_TILES[channels]
    # Pixels a stride apart, a phase, meet the same taps.
    phases = min(steps.row_stride, H) * min(steps.column_stride, W)
    blocks = B * triton.cdiv(C, channels) * phases
    rows, columns = triton.cdiv(H, steps.row_stride), triton.cdiv(W, steps.column_stride)
    slopes = partial = None
    if grad_guide is not None:
        slopes = kernels.new_empty(triton.cdiv(C, channels), *kernels.shape)
    if grad_filter is not None:
        most_programs = blocks * max(tile_count(rows, columns, tile[0]) for tile in tiles)
        partial = kernels.new_zeros(most_programs, weight.numel())
    # Tiles that are tried have more or fewer programs: what the others wrote must not stay.
    restored = () if partial is None else ("partial",)
    start(
        tuner(pac_conv2d_backward_input_kernel, form, ("ROWS",), tiles, restored),
        lambda meta: (blocks * tile_count(rows, columns, meta["ROWS"]),),
        grad_y,
        x,
        packed.contiguous(),
        kernels,
        grad_x,
        slopes,
        partial,
        B,
        H,
        W,
        out_height,
        out_width,
        steps,
        alpha,
        C,
        O,
        0 if grad_guide is None else grad_guide.shape[1],
        weight.shape[-1],
        form,
        *arithmetic(x),
        multiplied_at_once(x, O),
        COLUMNS,
        channels,
    )
    if grad_filter is not None:
        grad_filter.copy_(partial.sum(0).view_as(grad_filter))
    if slopes is not None:
        return slopes.sum(0) if len(slopes) > 1 else slopes[0]


def _guide_gradient(guide, kernels, slopes, grad_guide, steps, kernel_size, normalize):
    """Fills grad_guide from m."""
    B, G, H, W = guide.shape
    out_height, out_width = slopes.shape[2:]
    if normalize:
        block = _ROWS * COLUMNS
        pac_conv2d_backward_centre_kernel[(B * triton.cdiv(out_height * out_width, block),)](
            kernels, slopes, out_height, out_width, kernel_size**2, block
        )
    guides = guides_at_once(G)
    pac_conv2d_backward_guide_kernel[(B * triton.cdiv(G, guides) * tile_count(H, W, _ROWS),)](
        guide, slopes, grad_guide, H, W, out_height, out_width, steps, G, kernel_size, guides, COLUMNS, _ROWS
    )


@triton.jit(do_not_specialize=SIZES)
def pac_conv2d_backward_affinity_kernel(
    guide,
    kernels,
    height,
    width,
    out_height,
    out_width,
    steps,
    NORMALIZE: tl.constexpr,
    G: tl.constexpr,
    K: tl.constexpr,
    GUIDES: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """k of all taps at ROWS x COLUMNS places."""
    ACCUMULATE: tl.constexpr = kernels.dtype.element_ty
    image, row, column, place, exists = places_of_tile(tl.program_id(0), out_height, out_width, ROWS, COLUMNS)
    out_pixels = pixel_count(out_height, out_width)
    guide += image * G * pixel_count(height, width)
    kernels += image * K * K * out_pixels
    total = tl.zeros([ROWS * COLUMNS], ACCUMULATE)
    if NORMALIZE:
        for tap in range(K * K):
            kernel, _, _ = kernel_of_tap(
                guide, row, column, exists, tap, steps, height, width, G, K, GUIDES, ACCUMULATE
            )
            total += kernel
        total = tl.where(total == 0, 1.0, total)
    for tap in range(K * K):
        kernel, _, _ = kernel_of_tap(guide, row, column, exists, tap, steps, height, width, G, K, GUIDES, ACCUMULATE)
        if NORMALIZE:
            kernel /= total
        tl.store(kernels + tap * out_pixels + place, kernel, mask=exists)


@triton.jit(do_not_specialize=SIZES)
def pac_conv2d_backward_input_kernel(
    grad_y,
    x,
    weight,
    kernels,
    grad_x,
    slopes,
    partial,
    batch,
    height,
    width,
    out_height,
    out_width,
    steps,
    alpha: tl.float64,
    C: tl.constexpr,
    O: tl.constexpr,
    G: tl.constexpr,
    K: tl.constexpr,
    FORM: tl.constexpr,
    OPERAND: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    PRECISION: tl.constexpr,
    STEP: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHANNELS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """CHANNELS of grad_x at ROWS x COLUMNS pixels, a stride apart, and what they add to m and to a shared filter.

    weight is [K²,C,O] in the form "dot", else [K²,O,C] or [K²]; slopes is [chunks of C,B,K²,H',W'], of which only taps
    inside the image are written; partial [programs,K²] has the sums over pixels of k · v · x.
    """
    program = tl.program_id(0)
    chunks: tl.constexpr = (C + CHANNELS - 1) // CHANNELS
    channel = program % chunks * CHANNELS + tl.arange(0, CHANNELS)
    rows, columns = tl.cdiv(height, steps.row_stride), tl.cdiv(width, steps.column_stride)
    tiles = tl.cdiv(rows, ROWS) * tl.cdiv(columns, COLUMNS)
    row, column = tile_places(program // chunks % tiles, columns, ROWS, COLUMNS)
    block = program // chunks // tiles
    row_phases, column_phases = tl.minimum(steps.row_stride, height), tl.minimum(steps.column_stride, width)
    first_column = block % column_phases
    first_row = block // column_phases % row_phases
    image = (block // column_phases // row_phases).to(tl.int64)
    pixel, exists = locate(
        row * steps.row_stride + first_row, column * steps.column_stride + first_column, height, width
    )
    # Beyond the tile's end a long stride leaves 32 bits, and could come back to a pixel of the image.
    exists = exists & (row < rows) & (column < columns)
    owned = (channel < C)[:, None] & exists[None, :]
    offsets = (image * C + channel)[:, None] * pixel_count(height, width) + pixel[None, :]
    out_pixels = pixel_count(out_height, out_width)
    grad_y += image * O * out_pixels
    if slopes is not None or partial is not None:
        values = tl.load(x + offsets, mask=owned, other=0).to(ACCUMULATE)

    sums = tl.zeros([CHANNELS, ROWS * COLUMNS], ACCUMULATE)
    for tap in range(K * K):
        row_shift = first_row + steps.row_padding - tap // K * steps.row_dilation
        column_shift = first_column + steps.column_padding - tap % K * steps.column_dilation
        # Else these pixels are under this tap of no output place.
        if (row_shift % steps.row_stride == 0) & (column_shift % steps.column_stride == 0):
            place, inside = locate(
                row + row_shift // steps.row_stride, column + column_shift // steps.column_stride, out_height, out_width
            )
            inside = inside & exists
            kernel = tl.load(kernels + (image * K * K + tap) * out_pixels + place, mask=inside, other=0)
            kernel *= tl.full([], alpha, ACCUMULATE)
            if FORM == "filter":
                gradients = grad_y + channel.to(tl.int64)[:, None] * out_pixels + place[None, :]
                product = tl.load(gradients, mask=(channel < C)[:, None] & inside[None, :], other=0).to(ACCUMULATE)
                if partial is not None:
                    share = tl.sum(kernel * tl.sum(tl.where(inside[None, :], values * product, 0), 0))
                    tl.store(partial + program.to(tl.int64) * K * K + tap, share)
                product *= tl.load(weight + tap).to(ACCUMULATE)
            else:
                product = add_products(
                    tl.zeros([CHANNELS, ROWS * COLUMNS], ACCUMULATE), weight + tap * C * O, channel, grad_y, out_pixels,
                    place, inside, None, C, O, FORM, STEP, OPERAND, PRECISION,
                )  # fmt: skip
            if slopes is not None:
                slope = kernel * tl.sum(values * product, 0)
                slot = (program % chunks * batch + image) * K * K + tap
                tl.store(slopes + slot * out_pixels + place, slope, mask=inside)
            # Inf stays out where the tap has no place.
            sums = tl.where(inside[None, :], tl.fma(product, kernel[None, :], sums), sums)
    if grad_x is not None:
        tl.store(grad_x + offsets, sums, mask=owned)


@triton.jit(do_not_specialize=SIZES)
def pac_conv2d_backward_centre_kernel(kernels, slopes, out_height, out_width, TAPS: tl.constexpr, PLACES: tl.constexpr):
    """m_t -= k_t · (sum over r of m_r), at PLACES places."""
    out_pixels = pixel_count(out_height, out_width)
    blocks = tl.cdiv(out_pixels, PLACES)
    program = tl.program_id(0).to(tl.int64)
    place = program % blocks * PLACES + tl.arange(0, PLACES)
    first = program // blocks * TAPS * out_pixels + place
    total = tl.zeros([PLACES], slopes.dtype.element_ty)
    for tap in range(TAPS):
        kernel = tl.load(kernels + first + tap * out_pixels, mask=place < out_pixels, other=0)
        # Outside the image k is 0, and m was not written.
        total += tl.load(slopes + first + tap * out_pixels, mask=kernel != 0, other=0)
    for tap in range(TAPS):
        kernel = tl.load(kernels + first + tap * out_pixels, mask=place < out_pixels, other=0)
        slope = tl.load(slopes + first + tap * out_pixels, mask=kernel != 0, other=0)
        tl.store(slopes + first + tap * out_pixels, slope - kernel * total, mask=place < out_pixels)


@triton.jit
def _place_around(row, column, steps, out_height, out_width, K: tl.constexpr):
    """Offsets of the output places whose centre tap lies on pixels, and where there are such."""
    down = row + steps.row_padding - K // 2 * steps.row_dilation
    across = column + steps.column_padding - K // 2 * steps.column_dilation
    place, inside = locate(down // steps.row_stride, across // steps.column_stride, out_height, out_width)
    return place, inside & (down % steps.row_stride == 0) & (across % steps.column_stride == 0)


@triton.jit(do_not_specialize=SIZES)
def pac_conv2d_backward_guide_kernel(
    guide,
    slopes,
    grad_guide,
    height,
    width,
    out_height,
    out_width,
    steps,
    G: tl.constexpr,
    K: tl.constexpr,
    GUIDES: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """GUIDES channels of grad_guide at ROWS x COLUMNS pixels."""
    ACCUMULATE: tl.constexpr = slopes.dtype.element_ty
    program = tl.program_id(0)
    chunks: tl.constexpr = (G + GUIDES - 1) // GUIDES
    image, row, column, pixel, exists = places_of_tile(program // chunks, height, width, ROWS, COLUMNS)
    channel = program % chunks * GUIDES + tl.arange(0, GUIDES)
    planes = guide + (image * G + channel)[:, None] * pixel_count(height, width)
    out_pixels = pixel_count(out_height, out_width)
    slopes += image * K * K * out_pixels
    own_place, is_centre = _place_around(row, column, steps, out_height, out_width, K)
    own = tl.load(planes + pixel[None, :], mask=(channel < G)[:, None] & exists[None, :], other=0).to(ACCUMULATE)
    sums = tl.zeros([GUIDES, ROWS * COLUMNS], ACCUMULATE)
    for tap in range(K * K):
        other_row = row + (tap // K - K // 2) * steps.row_dilation
        other_column = column + (tap % K - K // 2) * steps.column_dilation
        other_pixel, inside = locate(other_row, other_column, height, width)
        other_place, is_other_centre = _place_around(other_row, other_column, steps, out_height, out_width, K)
        differs = exists & (tap != K * K // 2)
        reaches = is_centre & inside & differs
        is_reached = is_other_centre & differs
        slope = tl.load(slopes + tap * out_pixels + own_place, mask=reaches, other=0)
        slope += tl.load(slopes + (K * K - 1 - tap) * out_pixels + other_place, mask=is_reached, other=0)
        other = tl.load(planes + other_pixel[None, :], mask=(channel < G)[:, None] & inside[None, :], other=0)
        # Where no kernel joins the two, Inf stays out.
        sums -= tl.where((reaches | is_reached)[None, :], slope[None, :] * (own - other.to(ACCUMULATE)), 0.0)
    targets = grad_guide + (image * G + channel)[:, None] * pixel_count(height, width) + pixel[None, :]
    tl.store(targets, sums, mask=(channel < G)[:, None] & exists[None, :])

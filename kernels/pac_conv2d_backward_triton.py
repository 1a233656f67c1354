"""Pixel-adaptive convolution in Triton, backward. With v = alpha · grad_y and u_t(p)[c] = sum over o of W[o,c,t] v[o](p):

  grad_W[o,c,t] = sum over p of v[o](p) k_t(p) x[c](p+t),   grad_x[c](q) = sum over t of k_t(q-t) u_t(q-t)[c],
  m_t(p) = k_t(p) · sum over c of x[c](p+t) u_t(p)[c],      grad_g(q) = -sum over t of (m_t(q) + m_-t(q+t)) (g(q) - g(q+t)).

m_t is k_t times its gradient; with normalize, k_t is a share of the sum and m_t loses k_t · (sum over r of m_r).
Every gradient is gathered by its owner: no atomics, the same bits on every run. One product makes u for grad_x and m.
Kept between the kernels: k and m, K² numbers each a place, and partial sums of grad_W.
"""

import torch
import triton
import triton.language as tl

from .pac_conv2d_triton import (
    COLUMNS,
    arithmetic,
    guides_at_once,
    likeness,
    locate,
    multiplied_at_once,
    places,
    product_form,
    start,
    tile_places,
    tuner,
)

# Rows of a tile and warps of the kernels that only move numbers: 2 places a thread, many threads.
_ROWS, _WARPS = 8, 4
# Channels of x that a program of the input kernel owns at most: gradient and product of one take two registers for each
# of 16 places and 128 threads in float32.
_MOST_CHANNELS = {"dot": 64, "sum": 16, "filter": 16}
# (ROWS, warps, stages) of the input kernel by the channels that a program owns.
_INPUT_TILES = {
    64: ((2, 4, 2), (4, 8, 2)),
    32: ((4, 4, 2), (4, 8, 2)),
    16: ((4, 4, 2), (8, 4, 2)),
    8: ((8, 4, 1), (4, 4, 1)),
    4: ((8, 4, 1), (16, 4, 1)),
}
# Outputs and entries of the depth C·K² of one program of the weight kernel at most, and (ROWS, warps, stages).
_WEIGHT_TILE, _WEIGHT_TILES = (128, 64), ((1, 8, 2), (2, 8, 2))
# The same without tensor cores, where operands come from registers.
_WIDE_WEIGHT_TILE, _WIDE_WEIGHT_TILES = (32, 32), ((1, 4, 2), (1, 4, 1))
# Programs of the weight kernel: some for each of the 82 to 132 multiprocessors, and few partial sums to add up.
_WEIGHT_PROGRAMS = 512


def backward(
    grad_y, x, guide, weight, grad_x, grad_guide, grad_weight, grad_bias, stride, padding, dilation, normalize, alpha
):
    """Fills the gradients that are not None."""
    wanted = [gradient for gradient in (grad_x, grad_guide, grad_weight, grad_bias) if gradient is not None]
    if grad_y.numel() == 0:
        for gradient in wanted:
            gradient.zero_()
        return
    accumulate = torch.float64 if x.dtype == torch.float64 else torch.float32
    if grad_bias is not None:
        grad_bias.copy_(alpha * grad_y.sum((0, 2, 3), dtype=accumulate))
        if len(wanted) == 1:
            return
    geometry = (*x.shape[2:], *grad_y.shape[2:], *stride, *padding, *dilation)
    constants = (weight.shape[-1], guide.shape[1])
    kernels = _kernels(guide, grad_y, geometry, constants, normalize, accumulate)
    shared = weight.shape[:2] == (1, 1)
    filters = grad_weight if shared else None
    if grad_weight is not None and not shared:
        _weight_gradient(grad_y, x, kernels, grad_weight, geometry, constants, alpha)
    if grad_x is not None or grad_guide is not None or filters is not None:
        slopes = _input_gradient(
            grad_y, x, weight, kernels, grad_x, grad_guide is not None, filters, stride, geometry, constants, alpha
        )
    if grad_guide is not None:
        _guide_gradient(guide, kernels, slopes, grad_guide, geometry, constants, normalize)


def _kernels(guide, grad_y, geometry, constants, normalize, accumulate):
    """k [B,K²,H',W'], 0 for taps outside the image."""
    B, G = guide.shape[:2]
    kernels = guide.new_empty(B, constants[0] ** 2, *grad_y.shape[2:], dtype=accumulate)
    grid = (B * places({"ROWS": _ROWS, "COLUMNS": COLUMNS}, *grad_y.shape[2:]),)
    pac_conv2d_backward_kernels_kernel[grid](
        guide, kernels, *geometry, normalize, *constants, guides_at_once(G), COLUMNS, _ROWS, num_warps=_WARPS
    )
    return kernels


def _weight_gradient(grad_y, x, kernels, grad_weight, geometry, constants, alpha):
    """Fills grad_weight [O,C,K,K] with the sum over splits of the places."""
    O, C, K, _ = grad_weight.shape
    depth = C * K * K
    operand, accumulate, precision = arithmetic(x)
    on_tensor_cores = x.element_size() == 2 or (x.dtype == torch.float32 and precision == "tf32")
    most, tiles = (_WEIGHT_TILE, _WEIGHT_TILES) if on_tensor_cores else (_WIDE_WEIGHT_TILE, _WIDE_WEIGHT_TILES)
    outputs, depths = (
        min(max(triton.next_power_of_2(count), 16), limit) for count, limit in zip((O, depth), most, strict=True)
    )
    blocks = triton.cdiv(O, outputs) * triton.cdiv(depth, depths)
    rows = grad_y.shape[0] * grad_y.shape[2] * triton.cdiv(grad_y.shape[3], COLUMNS)
    splits = min(triton.cdiv(_WEIGHT_PROGRAMS, blocks), rows)
    partial = kernels.new_empty(splits, O, depth)
    start(
        tuner(pac_conv2d_backward_weight_kernel, "dot", ("ROWS",), tiles),
        lambda meta: (blocks * splits,),
        grad_y,
        x,
        kernels,
        partial,
        grad_y.shape[0],
        C,
        O,
        *geometry,
        alpha,
        splits,
        *constants,
        1 if C % depths == 0 else depths,
        operand,
        accumulate,
        precision,
        COLUMNS,
        outputs,
        depths,
    )
    grad_weight.copy_(partial.sum(0).view(O, K, K, C).permute(0, 3, 1, 2))


def _input_gradient(grad_y, x, weight, kernels, grad_x, wants_slopes, grad_filter, stride, geometry, constants, alpha):
    """Fills grad_x and the gradient of the one filter that channels share; returns m [B,K²,H',W']."""
    B, C, H, W = x.shape
    O = grad_y.shape[1]
    form = product_form(x, C, O, weight.shape[:2] == (1, 1))
    least = 16 if form == "dot" else 4
    channels = min(max(triton.next_power_of_2(C), least), _MOST_CHANNELS[form])
    outputs = multiplied_at_once(x, O)
    chunks = triton.cdiv(C, channels)
    # Rows and columns of the image that are as far from the last one that a stride reaches meet the same taps.
    steps = [triton.cdiv(size, step) for size, step in zip((H, W), stride, strict=True)]
    tiles = _INPUT_TILES[channels]
    programs = B * chunks * stride[0] * stride[1] * places({"ROWS": min(tile[0] for tile in tiles), "COLUMNS": COLUMNS}, *steps)
    slopes = kernels.new_empty(chunks, *kernels.shape) if wants_slopes else None
    partial = kernels.new_zeros(programs, constants[0] ** 2) if grad_filter is not None else None
    # Consecutive numbers along the axis that a product runs over, or, in sums, along the one that a thread keeps.
    packed = weight.permute(2, 3, 1, 0) if form == "dot" else weight.permute(2, 3, 0, 1)
    start(
        tuner(pac_conv2d_backward_input_kernel, form, ("ROWS",), tiles),
        lambda meta: (B * chunks * stride[0] * stride[1] * places(meta, *steps),),
        grad_y,
        x,
        packed.contiguous(),
        kernels,
        grad_x,
        slopes,
        partial,
        B,
        C,
        O,
        *geometry,
        alpha,
        *constants,
        form,
        outputs,
        O <= outputs,
        *arithmetic(x),
        COLUMNS,
        channels,
    )
    if grad_filter is not None:
        grad_filter.copy_(partial.sum(0).view_as(grad_filter))
    return None if slopes is None else slopes[0] if chunks == 1 else slopes.sum(0)


def _guide_gradient(guide, kernels, slopes, grad_guide, geometry, constants, normalize):
    """Fills grad_guide from m."""
    B, G, H, W = guide.shape
    guides = guides_at_once(G)
    if normalize:
        block = _ROWS * COLUMNS
        out_pixels = kernels[0, 0].numel()
        pac_conv2d_backward_center_kernel[(B * triton.cdiv(out_pixels, block),)](
            kernels, slopes, out_pixels, constants[0] ** 2, block, num_warps=_WARPS
        )
    grid = (B * triton.cdiv(G, guides) * places({"ROWS": _ROWS, "COLUMNS": COLUMNS}, H, W),)
    pac_conv2d_backward_guide_kernel[grid](
        guide, slopes, grad_guide, *geometry, *constants, guides, COLUMNS, _ROWS, num_warps=_WARPS
    )


@triton.jit
def pac_conv2d_backward_kernels_kernel(
    guide,
    kernels,
    height,
    width,
    out_height,
    out_width,
    row_stride,
    column_stride,
    row_padding,
    column_padding,
    row_dilation,
    column_dilation,
    NORMALIZE: tl.constexpr,
    KERNEL_SIZE: tl.constexpr,
    GUIDE_CHANNELS: tl.constexpr,
    GUIDES: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """k of all taps at ROWS x COLUMNS places."""
    ACCUMULATE: tl.constexpr = kernels.dtype.element_ty
    TAPS: tl.constexpr = KERNEL_SIZE * KERNEL_SIZE
    program = tl.program_id(0)
    tiles = tl.cdiv(out_height, ROWS) * tl.cdiv(out_width, COLUMNS)
    image = (program // tiles).to(tl.int64)
    row, column = tile_places(program % tiles, out_height, out_width, ROWS, COLUMNS)
    place, exists = locate(row, column, out_height, out_width)
    pixels = tl.full([], height, tl.int64) * width
    out_pixels = tl.full([], out_height, tl.int64) * out_width
    guide += image * GUIDE_CHANNELS * pixels
    kernels += image * TAPS * out_pixels
    first_row = row * row_stride - row_padding
    first_column = column * column_stride - column_padding
    centre, centre_inside = locate(
        first_row + KERNEL_SIZE // 2 * row_dilation, first_column + KERNEL_SIZE // 2 * column_dilation, height, width
    )
    total = tl.zeros([ROWS * COLUMNS], ACCUMULATE)
    # Normalised, in two turns: to sum, and to divide by the sum.
    for step in range(TAPS * (2 if NORMALIZE else 1)):
        tap = step % TAPS
        neighbor, inside = locate(
            first_row + tap // KERNEL_SIZE * row_dilation,
            first_column + tap % KERNEL_SIZE * column_dilation,
            height,
            width,
        )
        inside = inside & exists
        kernel = likeness(
            guide, pixels, centre, centre_inside & exists, neighbor, inside, GUIDE_CHANNELS, GUIDES, ACCUMULATE
        )
        kernel = tl.where(inside, tl.where(tap == TAPS // 2, 1.0, kernel), 0.0)
        if NORMALIZE and step < TAPS:
            total += kernel
        else:
            if NORMALIZE:
                kernel /= tl.where(total == 0, 1.0, total)
            tl.store(kernels + tap * out_pixels + place, kernel, mask=exists)


@triton.jit
def pac_conv2d_backward_weight_kernel(
    grad_y,
    x,
    kernels,
    partial,
    batch,
    channels,
    out_channels,
    height,
    width,
    out_height,
    out_width,
    row_stride,
    column_stride,
    row_padding,
    column_padding,
    row_dilation,
    column_dilation,
    alpha: tl.float64,
    splits,
    KERNEL_SIZE: tl.constexpr,
    GUIDE_CHANNELS: tl.constexpr,
    TAP_ENTRIES: tl.constexpr,
    OPERAND: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    PRECISION: tl.constexpr,
    COLUMNS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    DEPTH: tl.constexpr,
    ROWS: tl.constexpr,
):
    """partial [splits,O,K²·C]: sum over some places of grad_y · k · x. With TAP_ENTRIES = 1 all of DEPTH is one tap's."""
    # Programs that follow each other take the same places, which then are in the cache.
    program = tl.program_id(0)
    depth = KERNEL_SIZE * KERNEL_SIZE * channels
    depth_tiles = tl.cdiv(depth, DEPTH)
    output_tiles = tl.cdiv(out_channels, OUTPUTS)
    first_entry = program % depth_tiles * DEPTH
    output = program // depth_tiles % output_tiles * OUTPUTS + tl.arange(0, OUTPUTS)
    is_output = output < out_channels
    split = program // depth_tiles // output_tiles
    entry = first_entry + tl.arange(0, DEPTH)
    is_entry = entry < depth
    channel = entry % channels
    tap = ((first_entry + tl.arange(0, TAP_ENTRIES)) // channels)[:, None]
    is_tap = tap < KERNEL_SIZE * KERNEL_SIZE

    pixels = tl.full([], height, tl.int64) * width
    out_pixels = tl.full([], out_height, tl.int64) * out_width
    tiles = tl.cdiv(out_height, ROWS) * tl.cdiv(out_width, COLUMNS)
    share = tl.cdiv(batch * tiles, splits)
    sums = tl.zeros([OUTPUTS, DEPTH], ACCUMULATE)
    for tile in range(split * share, tl.minimum((split + 1) * share, batch * tiles)):
        image = (tile // tiles).to(tl.int64)
        row, column = tile_places(tile % tiles, out_height, out_width, ROWS, COLUMNS)
        place, exists = locate(row, column, out_height, out_width)
        gradients = tl.load(
            grad_y + (image * out_channels + output)[:, None] * out_pixels + place[None, :],
            mask=is_output[:, None] & exists[None, :],
            other=0,
        )
        neighbor, inside = locate(
            (row * row_stride - row_padding)[None, :] + tap // KERNEL_SIZE * row_dilation,
            (column * column_stride - column_padding)[None, :] + tap % KERNEL_SIZE * column_dilation,
            height,
            width,
        )
        inside = inside & exists[None, :] & is_tap
        kernel = tl.load(
            kernels + (image * KERNEL_SIZE * KERNEL_SIZE + tap) * out_pixels + place[None, :], mask=inside, other=0
        )
        values = tl.load(
            x + (image * channels + channel)[:, None] * pixels + neighbor, mask=inside & is_entry[:, None], other=0
        )
        scaled = tl.trans((values.to(ACCUMULATE) * kernel).to(OPERAND))
        sums = tl.dot(gradients.to(OPERAND), scaled, sums, input_precision=PRECISION, out_dtype=ACCUMULATE)
    sums *= tl.full([], alpha, ACCUMULATE)
    offsets = (split.to(tl.int64) * out_channels + output)[:, None] * depth + entry[None, :]
    tl.store(partial + offsets, sums, mask=is_output[:, None] & is_entry[None, :])


@triton.jit
def _add_dot(
    product,
    weight,
    grad_y,
    source,
    inside,
    channel,
    first,
    channels,
    out_channels,
    out_pixels,
    OUTPUTS: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """product [CHANNELS,PLACES] and that of the weights [C,O] of a tap with some channels of grad_y."""
    output = first + tl.arange(0, OUTPUTS)
    is_output = output < out_channels
    factors = tl.load(
        weight + channel[:, None] * out_channels + output[None, :],
        mask=(channel < channels)[:, None] & is_output[None, :],
        other=0,
    )
    gradients = tl.load(
        grad_y + output.to(tl.int64)[:, None] * out_pixels + source[None, :],
        mask=is_output[:, None] & inside[None, :],
        other=0,
    )
    return tl.dot(factors.to(OPERAND), gradients.to(OPERAND), product, input_precision=PRECISION)


# See pac_conv2d_forward_kernel.
@triton.jit(do_not_specialize_on_alignment=["width", "out_width"])
def pac_conv2d_backward_input_kernel(
    grad_y,
    x,
    weight,
    kernels,
    grad_x,
    slopes,
    partial,
    batch,
    channels,
    out_channels,
    height,
    width,
    out_height,
    out_width,
    row_stride,
    column_stride,
    row_padding,
    column_padding,
    row_dilation,
    column_dilation,
    alpha: tl.float64,
    KERNEL_SIZE: tl.constexpr,
    GUIDE_CHANNELS: tl.constexpr,
    FORM: tl.constexpr,
    OUTPUTS: tl.constexpr,
    IN_ONE_STEP: tl.constexpr,
    OPERAND: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    PRECISION: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHANNELS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """CHANNELS of grad_x at ROWS x COLUMNS pixels, a stride apart, and what they add to m and to a shared filter.

    weight is [K²,C,O] in the form "dot", else [K²,O,C] or [K²]; slopes is [chunks of C,B,K²,H',W'], of which only taps
    inside the image are written; partial [programs,K²] has the sums over pixels of k · grad_y · x.
    """
    TAPS: tl.constexpr = KERNEL_SIZE * KERNEL_SIZE
    program = tl.program_id(0)
    chunks = tl.cdiv(channels, CHANNELS)
    chunk = program % chunks
    channel = chunk * CHANNELS + tl.arange(0, CHANNELS)
    is_channel = channel < channels
    rows, columns = tl.cdiv(height, row_stride), tl.cdiv(width, column_stride)
    tiles = tl.cdiv(rows, ROWS) * tl.cdiv(columns, COLUMNS)
    phase = program // chunks // tiles % (row_stride * column_stride)
    image = (program // chunks // tiles // (row_stride * column_stride)).to(tl.int64)
    row, column = tile_places(program // chunks % tiles, rows, columns, ROWS, COLUMNS)
    row_phase, column_phase = phase // column_stride, phase % column_stride
    pixel, exists = locate(row * row_stride + row_phase, column * column_stride + column_phase, height, width)
    owned = is_channel[:, None] & exists[None, :]
    pixels = tl.full([], height, tl.int64) * width
    out_pixels = tl.full([], out_height, tl.int64) * out_width
    offsets = (image * channels + channel)[:, None] * pixels + pixel[None, :]
    grad_y += image * out_channels * out_pixels
    kernels += image * TAPS * out_pixels
    scale = tl.full([], alpha, ACCUMULATE)
    if slopes is not None or partial is not None:
        values = tl.load(x + offsets, mask=owned, other=0).to(ACCUMULATE)

    sums = tl.zeros([CHANNELS, ROWS * COLUMNS], ACCUMULATE)
    for tap in range(TAPS):
        row_shift = row_phase + row_padding - tap // KERNEL_SIZE * row_dilation
        column_shift = column_phase + column_padding - tap % KERNEL_SIZE * column_dilation
        # Else no output place has this tap on these pixels.
        if (row_shift % row_stride == 0) & (column_shift % column_stride == 0):
            source, inside = locate(
                row + row_shift // row_stride, column + column_shift // column_stride, out_height, out_width
            )
            inside = inside & exists
            kernel = scale * tl.load(kernels + tap * out_pixels + source, mask=inside, other=0)
            product = tl.zeros([CHANNELS, ROWS * COLUMNS], ACCUMULATE)
            if FORM == "filter":
                gradients = grad_y + channel.to(tl.int64)[:, None] * out_pixels + source[None, :]
                product = tl.load(gradients, mask=is_channel[:, None] & inside[None, :], other=0).to(ACCUMULATE)
                if partial is not None:
                    total = tl.sum(kernel * tl.sum(values * product, 0))
                    tl.store(partial + program.to(tl.int64) * TAPS + tap, total)
                product *= tl.load(weight + tap).to(ACCUMULATE)
            elif FORM == "sum":
                for output in range(out_channels):
                    gradients = tl.load(grad_y + output * out_pixels + source, mask=inside, other=0).to(ACCUMULATE)
                    factors = weight + (tap * out_channels + output) * channels + channel
                    factors = tl.load(factors, mask=is_channel, other=0).to(ACCUMULATE)
                    product = tl.fma(factors[:, None], gradients[None, :], product)
            elif IN_ONE_STEP:
                product = _add_dot(
                    product, weight + tap * channels * out_channels, grad_y, source, inside, channel, 0, channels,
                    out_channels, out_pixels, OUTPUTS, OPERAND, PRECISION,
                )  # fmt: skip
            else:
                for first in range(0, out_channels, OUTPUTS):
                    product = _add_dot(
                        product, weight + tap * channels * out_channels, grad_y, source, inside, channel, first,
                        channels, out_channels, out_pixels, OUTPUTS, OPERAND, PRECISION,
                    )  # fmt: skip
            if slopes is not None:
                places = slopes + ((chunk * batch + image) * TAPS + tap) * out_pixels + source
                tl.store(places, kernel * tl.sum(values * product, 0), mask=inside)
            sums = tl.fma(product, kernel[None, :], sums)
    if grad_x is not None:
        tl.store(grad_x + offsets, sums, mask=owned)


@triton.jit
def pac_conv2d_backward_center_kernel(kernels, slopes, out_pixels, TAPS: tl.constexpr, PLACES: tl.constexpr):
    """m_t -= k_t · (sum over r of m_r), at PLACES places, for the taps inside the image."""
    blocks = tl.cdiv(out_pixels, PLACES)
    program = tl.program_id(0).to(tl.int64)
    place = program % blocks * PLACES + tl.arange(0, PLACES)
    first = program // blocks * TAPS * out_pixels + place
    total = tl.zeros([PLACES], slopes.dtype.element_ty)
    for tap in range(TAPS):
        kernel = tl.load(kernels + first + tap * out_pixels, mask=place < out_pixels, other=0)
        # Outside the image k is 0 and m unwritten.
        total += tl.load(slopes + first + tap * out_pixels, mask=kernel != 0, other=0)
    for tap in range(TAPS):
        kernel = tl.load(kernels + first + tap * out_pixels, mask=place < out_pixels, other=0)
        slope = tl.load(slopes + first + tap * out_pixels, mask=kernel != 0, other=0)
        tl.store(slopes + first + tap * out_pixels, slope - kernel * total, mask=place < out_pixels)


@triton.jit
def _place_around(
    row,
    column,
    out_height,
    out_width,
    row_stride,
    column_stride,
    row_padding,
    column_padding,
    row_dilation,
    column_dilation,
    KERNEL_SIZE: tl.constexpr,
):
    """The output places whose centre tap lies on these pixels, and where there are such."""
    down = row + row_padding - KERNEL_SIZE // 2 * row_dilation
    across = column + column_padding - KERNEL_SIZE // 2 * column_dilation
    place, inside = locate(down // row_stride, across // column_stride, out_height, out_width)
    return place, inside & (down % row_stride == 0) & (across % column_stride == 0)


@triton.jit
def pac_conv2d_backward_guide_kernel(
    guide,
    slopes,
    grad_guide,
    height,
    width,
    out_height,
    out_width,
    row_stride,
    column_stride,
    row_padding,
    column_padding,
    row_dilation,
    column_dilation,
    KERNEL_SIZE: tl.constexpr,
    GUIDE_CHANNELS: tl.constexpr,
    GUIDES: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """GUIDES channels of grad_guide at ROWS x COLUMNS pixels."""
    ACCUMULATE: tl.constexpr = slopes.dtype.element_ty
    TAPS: tl.constexpr = KERNEL_SIZE * KERNEL_SIZE
    chunks: tl.constexpr = tl.cdiv(GUIDE_CHANNELS, GUIDES)
    program = tl.program_id(0)
    tile = program // chunks
    tiles = tl.cdiv(height, ROWS) * tl.cdiv(width, COLUMNS)
    image = (tile // tiles).to(tl.int64)
    row, column = tile_places(tile % tiles, height, width, ROWS, COLUMNS)
    pixel, exists = locate(row, column, height, width)
    channel = program % chunks * GUIDES + tl.arange(0, GUIDES)
    is_channel = (channel < GUIDE_CHANNELS)[:, None]
    pixels = tl.full([], height, tl.int64) * width
    out_pixels = tl.full([], out_height, tl.int64) * out_width
    planes = (image * GUIDE_CHANNELS + channel)[:, None] * pixels
    slopes += image * TAPS * out_pixels
    own_place, is_centre = _place_around(
        row, column, out_height, out_width, row_stride, column_stride, row_padding, column_padding, row_dilation,
        column_dilation, KERNEL_SIZE,
    )  # fmt: skip
    own = tl.load(guide + planes + pixel[None, :], mask=is_channel & exists[None, :], other=0).to(ACCUMULATE)
    sums = tl.zeros([GUIDES, ROWS * COLUMNS], ACCUMULATE)
    for tap in range(TAPS):
        neighbor_row = row + (tap // KERNEL_SIZE - KERNEL_SIZE // 2) * row_dilation
        neighbor_column = column + (tap % KERNEL_SIZE - KERNEL_SIZE // 2) * column_dilation
        neighbor, inside = locate(neighbor_row, neighbor_column, height, width)
        place, is_neighbors = _place_around(
            neighbor_row, neighbor_column, out_height, out_width, row_stride, column_stride, row_padding,
            column_padding, row_dilation, column_dilation, KERNEL_SIZE,
        )  # fmt: skip
        exists_and_differs = exists & (tap != TAPS // 2)
        reaches = is_centre & inside & exists_and_differs
        is_reached = is_neighbors & exists_and_differs
        slope = tl.load(slopes + tap * out_pixels + own_place, mask=reaches, other=0)
        slope += tl.load(slopes + (TAPS - 1 - tap) * out_pixels + place, mask=is_reached, other=0)
        other = tl.load(guide + planes + neighbor[None, :], mask=is_channel & inside[None, :], other=0).to(ACCUMULATE)
        # Where no kernel joins the two, Inf stays out.
        sums -= tl.where((reaches | is_reached)[None, :], slope[None, :] * (own - other), 0.0)
    tl.store(grad_guide + planes + pixel[None, :], sums, mask=is_channel & exists[None, :])

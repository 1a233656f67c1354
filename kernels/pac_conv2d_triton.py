"""Pixel-adaptive convolution in Triton, forward: formula in pac_conv2d.py. Backward: pac_conv2d_backward_triton.py.

A program owns OUTPUTS channels at ROWS x COLUMNS output places. Tap by tap it makes k_t(p) from the guide, once for all
channels, scales the values that the tap reaches and multiplies them with the weights of the tap in one of three
forms: "dot" on tensor cores, "sum" channel by channel where there are few or every digit counts, "filter" where all
channels share one filter. Read: x and guide once, and again from the caches for every tap. Written: y once.
"""

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from triton.runtime.interpreter import InterpretedFunction

from . import _launch

# Columns of a tile: a warp of 32 threads reads whole cache lines, and those of neighbouring taps are mostly the same.
COLUMNS = 32
# tl.dot multiplies no fewer channels at once, and padding fewer to as many costs more than it gains.
LEAST_DOT = 16
# Bytes of channels of a place that are multiplied in one step. With twice as many, the addresses of what is on its way
# to shared memory overflow the registers.
_STEP_BYTES = 64
# Channels of the guide that are compared at once: in a tile of 256 places and 128 threads, 32 registers for each pixel
# of the two.
_MOST_GUIDES = 16
# (OUTPUTS, ROWS, warps, stages), widest first; those no wider than the output are tried. Sums of up to 32 registers a
# thread leave room for operands, and after the last tap for a residual of float32, on all architectures. In the form
# "sum" a thread holds all outputs of 1, 2 or 4 places.
_TILES = {
    "dot": [(128, 2, 8, 2), (64, 4, 8, 2), (64, 2, 4, 2), (32, 4, 8, 2), (16, 4, 4, 2)],
    "sum": [(32, 8, 8, 1), (32, 4, 4, 1), (16, 8, 8, 1), (8, 16, 4, 1), (8, 8, 4, 1), (4, 8, 4, 1)],
    "filter": [(16, 8, 4, 1), (4, 8, 4, 1)],
}
# What the best tile depends on, beside dtypes; the size of the image hardly matters.
_KEY = ["C", "O", "G", "K"]
# Arguments of kernels in which every thread owns places. Known to be multiples of 16, they would lead Triton to lay out
# rows in threads otherwise than taps, which begin anywhere: every number would move from thread to thread.
SIZES = ["height", "width", "out_height", "out_width"]


class Steps(NamedTuple):
    """How output places and taps lie on the image."""

    row_stride: int
    column_stride: int
    row_padding: int
    column_padding: int
    row_dilation: int
    column_dilation: int


def steps_on(image, stride, padding, dilation):
    """Strides beyond the padded image [B,C,H,W] leave one place, as one of its length: programs own what it skips."""
    stride = [min(step, side + 2 * margin) for step, side, margin in zip(stride, image.shape[2:], padding, strict=True)]
    return Steps(*stride, *padding, *dilation)


def forward(x, guide, weight, bias, residual, y, stride, padding, dilation, normalize, alpha, quantum):
    """Fills y [B,O,H',W'], which may be residual."""
    B, C, H, W = x.shape
    _, O, out_height, out_width = y.shape
    G = guide.shape[1]
    if y.numel() == 0:
        return
    form = product_form(x, weight, O)
    # Consecutive numbers along the axis that a product runs over, or, in sums, along the one that a thread keeps.
    packed = weight.permute(2, 3, 0, 1) if form == "dot" else weight.permute(2, 3, 1, 0)
    start(
        tuner(pac_conv2d_forward_kernel, form, ("OUTPUTS", "ROWS"), _tiles_within(_TILES[form], O), ("y",)),
        lambda meta: (B * tile_count(out_height, out_width, meta["ROWS"]) * triton.cdiv(O, meta["OUTPUTS"]),),
        x,
        guide,
        packed.contiguous(),
        bias,
        residual,
        y,
        H,
        W,
        out_height,
        out_width,
        steps_on(x, stride, padding, dilation),
        alpha,
        quantum or 0.0,
        quantum is not None,
        normalize,
        C,
        O,
        G,
        weight.shape[-1],
        form,
        *arithmetic(x),
        guides_at_once(G),
        multiplied_at_once(x, C),
        COLUMNS,
    )


def product_form(x, weight, out_channels):
    """How a call multiplies: "dot", "sum" or "filter"."""
    if weight.shape[:2] == (1, 1):
        return "filter"
    return "dot" if on_tensor_cores(x) and min(x.shape[1], out_channels) >= LEAST_DOT else "sum"


def on_tensor_cores(x):
    """Whether products may be rounded to what tensor cores multiply."""
    return x.element_size() == 2 or (x.dtype == torch.float32 and _launch.convolves_in_tf32())


def arithmetic(x):
    """The dtypes of products' operands and of sums, and the precision of products of float32."""
    interpreted = isinstance(pac_conv2d_forward_kernel, InterpretedFunction)
    # The interpreter's product of bfloat16 numbers is wrong.
    operand = torch.float32 if interpreted and x.dtype == torch.bfloat16 else x.dtype
    precision = "tf32" if x.dtype == torch.float32 and on_tensor_cores(x) and not interpreted else "ieee"
    return getattr(tl, str(operand)[6:]), tl.float64 if x.dtype == torch.float64 else tl.float32, precision


def multiplied_at_once(x, channels):
    """The power of two of channels whose products tl.dot sums in one step."""
    return power_of_two(channels, LEAST_DOT, _STEP_BYTES // x.element_size())


def guides_at_once(channels):
    """The power of two of channels of the guide that are compared in one step."""
    return power_of_two(channels, 1, _MOST_GUIDES)


def power_of_two(count, least, most):
    """The least power of two that is not below count, within limits that are such powers."""
    return min(max(triton.next_power_of_2(count), least), most)


def tile_count(height, width, rows):
    """Tiles of a plane."""
    return triton.cdiv(height, rows) * triton.cdiv(width, COLUMNS)


def _tiles_within(tiles, width):
    """Those of the tiles that are no wider than `width` channels need; the narrowest always."""
    needed = max(triton.next_power_of_2(width), min(tile[0] for tile in tiles))
    return tuple(tile for tile in tiles if tile[0] <= needed)


@functools.cache
def tuner(kernel, form, names, tiles, restored=()):
    """The kernel, with the fastest of the tiles for each set of channel counts and dtypes found at its first call.

    Args:
        kernel: its arguments include those of _KEY.
        form: kernels of different forms are tuned apart.
        names: arguments of the kernel that a tile gives.
        tiles: (*values of names, warps, stages) each.
        restored: outputs that must be as they were before each trial.
    """
    configs = [
        triton.Config(dict(zip(names, values, strict=True)), num_warps=warps, num_stages=stages)
        for *values, warps, stages in tiles
    ]
    return triton.autotune(configs, key=_KEY, restore_value=list(restored))(kernel)


def start(tuned, grid, *arguments):
    """Launches a kernel. Where every run must give the same bits, no clock may choose: then the first tile serves."""
    if torch.are_deterministic_algorithms_enabled() or isinstance(tuned.fn, InterpretedFunction):
        tuned.fn[grid](*arguments, **tuned.configs[0].all_kwargs())
    else:
        tuned[grid](*arguments)


@triton.jit
def tile_places(tile, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Rows and columns [ROWS·COLUMNS] of a tile of a plane."""
    across = tl.cdiv(width, COLUMNS)
    index = tl.arange(0, ROWS * COLUMNS)
    return tile // across * ROWS + index // COLUMNS, tile % across * COLUMNS + index % COLUMNS


@triton.jit
def pixel_count(height, width):
    """In 64 bits, as offsets of channels are its multiples."""
    return tl.full([], height, tl.int64) * width


@triton.jit
def locate(row, column, height, width):
    """Offsets of places in a plane, and which of them lie inside it."""
    inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
    return row.to(tl.int64) * width + column, inside


@triton.jit
def places_of_tile(tile, height, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Image, rows, columns and offsets of a tile's places, and which exist; the tiles of images follow each other."""
    tiles = tl.cdiv(height, ROWS) * tl.cdiv(width, COLUMNS)
    row, column = tile_places(tile % tiles, width, ROWS, COLUMNS)
    place, exists = locate(row, column, height, width)
    return (tile // tiles).to(tl.int64), row, column, place, exists


@triton.jit
def reached(row, column, tap, steps, height, width, K: tl.constexpr):
    """Offsets of the pixels that a tap of output places reaches, and which of them lie inside the image."""
    return locate(
        row * steps.row_stride - steps.row_padding + tap // K * steps.row_dilation,
        column * steps.column_stride - steps.column_padding + tap % K * steps.column_dilation,
        height,
        width,
    )


@triton.jit
def kernel_of_tap(
    guide,
    row,
    column,
    exists,
    tap,
    steps,
    height,
    width,
    G: tl.constexpr,
    K: tl.constexpr,
    GUIDES: tl.constexpr,
    ACCUMULATE: tl.constexpr,
):
    """k_t of output places, 0 for taps outside the image; and the pixels as :func:`reached` gives them."""
    centre, centre_inside = reached(row, column, K * K // 2, steps, height, width, K)
    neighbor, inside = reached(row, column, tap, steps, height, width, K)
    centre_inside = centre_inside & exists
    inside = inside & exists
    pixels = pixel_count(height, width)
    distance = tl.zeros(row.shape, ACCUMULATE)
    for first in range(0, G, GUIDES):
        channel = first + tl.arange(0, GUIDES)[:, None]
        planes = guide + channel.to(tl.int64) * pixels
        own = tl.load(planes + centre[None, :], mask=(channel < G) & centre_inside[None, :], other=0)
        other = tl.load(planes + neighbor[None, :], mask=(channel < G) & inside[None, :], other=0)
        difference = own.to(ACCUMULATE) - other.to(ACCUMULATE)
        distance += tl.sum(difference * difference, 0)
    # The centre's is 1 by definition: computed, it would be NaN where the guide is Inf.
    kernel = tl.where(tap == K * K // 2, 1.0, tl.exp(-0.5 * distance))
    return tl.where(inside, kernel, 0.0), neighbor, inside


@triton.jit
def as_operand(values, OPERAND: tl.constexpr, PRECISION: tl.constexpr):
    """Values as tl.dot multiplies them. Of float32 tensor cores would cut bits off; rounded, products have no bias."""
    if PRECISION == "tf32":
        bits = tl.inline_asm_elementwise("cvt.rna.tf32.f32 $0, $1;", "=r,f", [values], tl.int32, is_pure=True, pack=1)
        return bits.to(tl.float32, bitcast=True)
    else:
        return values.to(OPERAND)


@triton.jit
def add_products(
    sums,
    weight,
    channel,
    planes,
    plane_size,
    place,
    inside,
    kernel,
    MADE: tl.constexpr,
    SUMMED: tl.constexpr,
    FORM: tl.constexpr,
    STEP: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """sums [channels,places] of the MADE channels, and a tap's weights times the values of SUMMED planes at places.

    weight is [MADE,SUMMED] in the form "dot", [SUMMED,MADE] in the form "sum"; kernel scales the values, or is None.
    """
    if FORM == "dot":
        for first in range(0, SUMMED, STEP):
            summed = first + tl.arange(0, STEP)
            mask = (channel < MADE)[:, None] & (summed < SUMMED)[None, :]
            factors = tl.load(weight + channel[:, None] * SUMMED + summed[None, :], mask=mask, other=0)
            offsets = summed.to(tl.int64)[:, None] * plane_size + place[None, :]
            values = tl.load(planes + offsets, mask=(summed < SUMMED)[:, None] & inside[None, :], other=0)
            if kernel is not None:
                values = values.to(sums.dtype) * kernel[None, :]
            factors, values = as_operand(factors, OPERAND, PRECISION), as_operand(values, OPERAND, PRECISION)
            sums = tl.dot(factors, values, sums, input_precision=PRECISION)
    else:
        for summed in range(SUMMED):
            factors = tl.load(weight + summed * MADE + channel, mask=channel < MADE, other=0).to(sums.dtype)
            values = tl.load(planes + summed * plane_size + place, mask=inside, other=0).to(sums.dtype)
            if kernel is not None:
                values *= kernel
            sums = tl.fma(factors[:, None], values[None, :], sums)
    return sums


@triton.jit
def _round_to_multiple(value, quantum):
    """Nearest multiple of a power of two, ties to even."""
    # With this added, of the sign of the value, there is no room for a fraction; larger numbers have none, and may be
    # too large to be scaled.
    NO_FRACTION: tl.constexpr = 2.0**52 if value.dtype == tl.float64 else 2.0**23
    scaled = value * (1 / quantum)
    rounder = tl.where(scaled < 0, -NO_FRACTION, NO_FRACTION).to(value.dtype)
    return tl.where(tl.abs(scaled) < NO_FRACTION, ((scaled + rounder) - rounder) * quantum, value)


@triton.jit(do_not_specialize=SIZES)
def pac_conv2d_forward_kernel(
    x,
    guide,
    weight,
    bias,
    residual,
    y,
    height,
    width,
    out_height,
    out_width,
    steps,
    alpha: tl.float64,
    quantum: tl.float64,
    ROUND: tl.constexpr,
    NORMALIZE: tl.constexpr,
    C: tl.constexpr,
    O: tl.constexpr,
    G: tl.constexpr,
    K: tl.constexpr,
    FORM: tl.constexpr,
    OPERAND: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    PRECISION: tl.constexpr,
    GUIDES: tl.constexpr,
    STEP: tl.constexpr,
    COLUMNS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """y of OUTPUTS channels at ROWS x COLUMNS places. weight is [K²,O,C] in the form "dot", else [K²,C,O] or [K²]."""
    # Programs that follow each other take other channels of the same places, which then are in the cache.
    program = tl.program_id(0)
    output = program % tl.cdiv(O, OUTPUTS) * OUTPUTS + tl.arange(0, OUTPUTS)
    is_output = output < O
    tile = program // tl.cdiv(O, OUTPUTS)
    image, row, column, place, exists = places_of_tile(tile, out_height, out_width, ROWS, COLUMNS)
    pixels = pixel_count(height, width)
    x += image * C * pixels
    guide += image * G * pixels

    sums = tl.zeros([OUTPUTS, ROWS * COLUMNS], ACCUMULATE)
    kernel_total = tl.zeros([ROWS * COLUMNS], ACCUMULATE)
    for tap in range(K * K):
        kernel, neighbor, inside = kernel_of_tap(
            guide, row, column, exists, tap, steps, height, width, G, K, GUIDES, ACCUMULATE
        )
        kernel_total += kernel
        if FORM == "filter":
            offsets = output.to(tl.int64)[:, None] * pixels + neighbor[None, :]
            values = tl.load(x + offsets, mask=is_output[:, None] & inside[None, :], other=0)
            sums += values.to(ACCUMULATE) * (kernel * tl.load(weight + tap).to(ACCUMULATE))[None, :]
        else:
            factors = weight + tap * C * O
            sums = add_products(
                sums, factors, output, x, pixels, neighbor, inside, kernel, O, C, FORM, STEP, OPERAND, PRECISION
            )

    if NORMALIZE:
        # A place with no tap inside has sums of 0; dividing them by 1 leaves the bias alone.
        sums /= tl.where(kernel_total == 0, 1.0, kernel_total)[None, :]
    if bias is not None:
        sums += tl.load(bias + output, mask=is_output, other=0).to(ACCUMULATE)[:, None]
    if ROUND:
        sums = _round_to_multiple(sums, tl.full([], quantum, ACCUMULATE))
    sums *= tl.full([], alpha, ACCUMULATE)
    written = is_output[:, None] & exists[None, :]
    offsets = (image * O + output)[:, None] * pixel_count(out_height, out_width) + place[None, :]
    if residual is not None:
        sums += tl.load(residual + offsets, mask=written, other=0).to(ACCUMULATE)
    tl.store(y + offsets, sums, mask=written)

"""Pixel-adaptive convolution in Triton, forward: formula in pac_conv2d.py. Backward: pac_conv2d_backward_triton.py.

A program owns OUTPUTS channels of a tile of ROWS x COLUMNS output places. Tap by tap it makes k_t(p) from the guide, once
for all channels, scales the values that the tap reaches and multiplies them with the weights of the tap, in one of three
forms: "dot" on tensor cores, "sum" channel by channel where there are few channels or every digit counts, "filter" where
all channels share one filter. Read: x and guide once, and again from the caches for every tap. Written: y once.
"""

import functools

import torch
import triton
import triton.language as tl
from triton.runtime.interpreter import InterpretedFunction

# Columns of a tile: a warp of 32 threads then reads whole cache lines, and each tap's neighbours are in the same ones.
COLUMNS = 32
# tl.dot multiplies no fewer channels at once, and padding fewer to as many costs more than it gains.
_LEAST_DOT = 16
# Bytes of channels of a place that are multiplied in one step. With twice as many, the addresses of what is on its way
# to shared memory overflow the registers.
_STEP_BYTES = 64
# Channels of the guide that are compared at once: in a tile of 256 places and 128 threads, 32 registers for each pixel
# of the two.
_MOST_GUIDES = 16
# (OUTPUTS, ROWS, warps, stages), widest first, of which those no wider than the output are tried. Sums of 64 registers
# a thread leave room for operands on all architectures; a thread of the form "sum" holds all outputs of 2 or 4 places.
_TILES = {
    "dot": [(128, 4, 8, 2), (64, 4, 4, 2), (64, 8, 8, 2), (32, 4, 4, 2), (16, 4, 4, 2), (16, 8, 4, 2)],
    "sum": [(32, 8, 4, 1), (16, 8, 4, 1), (16, 16, 4, 1), (8, 8, 4, 1), (4, 8, 4, 1), (4, 16, 4, 1)],
    "filter": [(16, 8, 4, 1), (4, 8, 4, 1)],
}
# What the best tile depends on, beside dtypes; the size of the image hardly matters.
_KEY = ["channels", "out_channels", "GUIDE_CHANNELS", "KERNEL_SIZE"]


def forward(x, guide, weight, bias, residual, y, stride, padding, dilation, normalize, alpha, quantum):
    """Fills y [B,O,H',W'], which may be residual."""
    B, C, H, W = x.shape
    _, O, out_height, out_width = y.shape
    if y.numel() == 0:
        return
    shared = weight.shape[:2] == (1, 1)
    form = product_form(x, C, O, shared)
    # Consecutive numbers along the axis that a product runs over, or, in sums, along the one that a thread keeps.
    packed = weight.permute(2, 3, 0, 1) if form == "dot" else weight.permute(2, 3, 1, 0)
    channels = multiplied_at_once(x, C)
    start(
        tuner(pac_conv2d_forward_kernel, form, ("OUTPUTS", "ROWS"), _tiles_within(_TILES[form], O), ("y",)),
        lambda meta: (B * places(meta, out_height, out_width) * triton.cdiv(O, meta["OUTPUTS"]),),
        x,
        guide,
        packed.contiguous(),
        bias,
        residual,
        y,
        C,
        O,
        H,
        W,
        out_height,
        out_width,
        *stride,
        *padding,
        *dilation,
        alpha,
        quantum or 0.0,
        quantum is not None,
        normalize,
        weight.shape[-1],
        guide.shape[1],
        guides_at_once(guide.shape[1]),
        form,
        channels,
        C <= channels,
        *arithmetic(x),
        COLUMNS,
    )


def product_form(x, channels, out_channels, shared):
    """How a call multiplies: "dot", "sum" or "filter"."""
    if shared:
        return "filter"
    on_tensor_cores = x.element_size() == 2 or (x.dtype == torch.float32 and torch.backends.cudnn.allow_tf32)
    return "dot" if on_tensor_cores and min(channels, out_channels) >= _LEAST_DOT else "sum"


def arithmetic(x):
    """The dtypes of products' operands and of sums, and the precision of products of float32."""
    operand = x.dtype
    if operand == torch.bfloat16 and isinstance(pac_conv2d_forward_kernel, InterpretedFunction):
        # The interpreter's product of bfloat16 numbers is wrong.
        operand = torch.float32
    precision = "tf32" if torch.backends.cudnn.allow_tf32 else "ieee"
    return getattr(tl, str(operand)[6:]), tl.float64 if x.dtype == torch.float64 else tl.float32, precision


def multiplied_at_once(x, channels):
    """The power of two of channels whose products tl.dot sums in one step."""
    return min(max(triton.next_power_of_2(channels), _LEAST_DOT), _STEP_BYTES // x.element_size())


def guides_at_once(count):
    """The power of two of guide channels that are compared in one step."""
    return min(triton.next_power_of_2(count), _MOST_GUIDES)


def places(meta, height, width):
    """Tiles of a plane."""
    return triton.cdiv(height, meta["ROWS"]) * triton.cdiv(width, meta["COLUMNS"])


def _tiles_within(tiles, width):
    """Those of the tiles that are no wider than `width` channels need; the narrowest always."""
    least = min(tile[0] for tile in tiles)
    return tuple(tile for tile in tiles if tile[0] <= max(triton.next_power_of_2(width), least))


@functools.cache
def tuner(kernel, form, names, tiles, restored=()):
    """The kernel, with the fastest of the tiles for each set of channel counts and dtypes found at its first call.

    Args:
        kernel: its arguments include those of _KEY.
        form: kernels of different forms are tuned apart.
        names: arguments of the kernel that a tile gives.
        tiles: (*values of names, warps, stages) each.
        restored: outputs that the kernel also reads.
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
def tile_places(tile, height, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Rows and columns [ROWS·COLUMNS] of a tile of a plane."""
    across = tl.cdiv(width, COLUMNS)
    index = tl.arange(0, ROWS * COLUMNS)
    return tile // across * ROWS + index // COLUMNS, tile % across * COLUMNS + index % COLUMNS


@triton.jit
def locate(row, column, height, width):
    """Offsets of places in a plane, and which of them lie inside it."""
    inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
    return row.to(tl.int64) * width + column, inside


@triton.jit
def likeness(
    guide,
    pixels,
    centre,
    centre_inside,
    neighbor,
    neighbor_inside,
    GUIDE_CHANNELS: tl.constexpr,
    GUIDES: tl.constexpr,
    ACCUMULATE: tl.constexpr,
):
    """exp(-1/2 |guide(centre) - guide(neighbor)|²) of offsets in an image's planes; the guide is 0 outside of them."""
    distance = tl.zeros(centre.shape, ACCUMULATE)
    for first in range(0, GUIDE_CHANNELS, GUIDES):
        channel = first + tl.arange(0, GUIDES)[:, None]
        planes = guide + channel.to(tl.int64) * pixels
        is_channel = channel < GUIDE_CHANNELS
        own = tl.load(planes + centre[None, :], mask=is_channel & centre_inside[None, :], other=0).to(ACCUMULATE)
        other = tl.load(planes + neighbor[None, :], mask=is_channel & neighbor_inside[None, :], other=0)
        difference = own - other.to(ACCUMULATE)
        distance += tl.sum(difference * difference, 0)
    return tl.exp(-0.5 * distance)


@triton.jit
def _add_dot(
    sums,
    x,
    weight,
    kernel,
    neighbor,
    inside,
    output,
    first,
    channels,
    out_channels,
    pixels,
    CHANNELS: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """sums [OUTPUTS,PLACES] and the products of some channels with the weights [O,C] of a tap."""
    channel = first + tl.arange(0, CHANNELS)
    is_channel = channel < channels
    factors = tl.load(
        weight + output[:, None] * channels + channel[None, :],
        mask=(output < out_channels)[:, None] & is_channel[None, :],
        other=0,
    )
    values = tl.load(
        x + channel.to(tl.int64)[:, None] * pixels + neighbor[None, :],
        mask=is_channel[:, None] & inside[None, :],
        other=0,
    )
    scaled = values.to(sums.dtype) * kernel[None, :]
    return tl.dot(factors.to(OPERAND), scaled.to(OPERAND), sums, input_precision=PRECISION)


@triton.jit
def _round_to_multiple(value, quantum):
    """Nearest multiple of a power of two, ties to even."""
    # With this added, of the sign of the value, there is no room for a fraction; larger numbers have none.
    NO_FRACTION: tl.constexpr = 2.0**52 if value.dtype == tl.float64 else 2.0**23
    scaled = value * (1 / quantum)
    rounder = tl.where(scaled < 0, -NO_FRACTION, NO_FRACTION).to(value.dtype)
    return tl.where(tl.abs(scaled) < NO_FRACTION, (scaled + rounder) - rounder, scaled) * quantum


# Rows that were known to be whole vectors would be laid out in threads otherwise than the taps, which are not, and every
# number would move from thread to thread.
@triton.jit(do_not_specialize_on_alignment=["width", "out_width"])
def pac_conv2d_forward_kernel(
    x,
    guide,
    weight,
    bias,
    residual,
    y,
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
    quantum: tl.float64,
    ROUND: tl.constexpr,
    NORMALIZE: tl.constexpr,
    KERNEL_SIZE: tl.constexpr,
    GUIDE_CHANNELS: tl.constexpr,
    GUIDES: tl.constexpr,
    FORM: tl.constexpr,
    CHANNELS: tl.constexpr,
    IN_ONE_STEP: tl.constexpr,
    OPERAND: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    PRECISION: tl.constexpr,
    COLUMNS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """y of OUTPUTS channels at ROWS x COLUMNS places. weight is [K²,O,C] in the form "dot", else [K²,C,O] or [K²]."""
    # Programs that follow each other take other channels of the same places, which then are in the cache.
    program = tl.program_id(0)
    output_tiles = tl.cdiv(out_channels, OUTPUTS)
    output = program % output_tiles * OUTPUTS + tl.arange(0, OUTPUTS)
    is_output = output < out_channels
    tile = program // output_tiles
    tiles = tl.cdiv(out_height, ROWS) * tl.cdiv(out_width, COLUMNS)
    image = (tile // tiles).to(tl.int64)
    row, column = tile_places(tile % tiles, out_height, out_width, ROWS, COLUMNS)
    place, exists = locate(row, column, out_height, out_width)
    pixels = tl.full([], height, tl.int64) * width
    x += image * channels * pixels
    guide += image * GUIDE_CHANNELS * pixels

    first_row = row * row_stride - row_padding
    first_column = column * column_stride - column_padding
    centre, centre_inside = locate(
        first_row + KERNEL_SIZE // 2 * row_dilation, first_column + KERNEL_SIZE // 2 * column_dilation, height, width
    )
    sums = tl.zeros([OUTPUTS, ROWS * COLUMNS], ACCUMULATE)
    kernel_total = tl.zeros([ROWS * COLUMNS], ACCUMULATE)
    for tap in range(KERNEL_SIZE * KERNEL_SIZE):
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
        kernel = tl.where(tap == KERNEL_SIZE * KERNEL_SIZE // 2, 1.0, kernel)
        kernel = tl.where(inside, kernel, 0.0)
        kernel_total += kernel
        if FORM == "filter":
            planes = x + output.to(tl.int64)[:, None] * pixels
            values = tl.load(planes + neighbor[None, :], mask=is_output[:, None] & inside[None, :], other=0)
            sums += values.to(ACCUMULATE) * (kernel * tl.load(weight + tap).to(ACCUMULATE))[None, :]
        elif FORM == "sum":
            for channel in range(channels):
                values = tl.load(x + channel * pixels + neighbor, mask=inside, other=0).to(ACCUMULATE)
                factors = tl.load(weight + channel * out_channels + output, mask=is_output, other=0).to(ACCUMULATE)
                sums = tl.fma(factors[:, None], (values * kernel)[None, :], sums)
            weight += channels * out_channels
        elif IN_ONE_STEP:
            # Without a loop inside, the loads of the next tap can begin during the products of this one.
            sums = _add_dot(
                sums, x, weight, kernel, neighbor, inside, output, 0, channels, out_channels, pixels, CHANNELS, OPERAND,
                PRECISION,
            )  # fmt: skip
            weight += channels * out_channels
        else:
            for first in range(0, channels, CHANNELS):
                sums = _add_dot(
                    sums, x, weight, kernel, neighbor, inside, output, first, channels, out_channels, pixels, CHANNELS,
                    OPERAND, PRECISION,
                )  # fmt: skip
            weight += channels * out_channels

    if NORMALIZE:
        # A place with no tap inside has sums of 0; dividing them by 1 leaves the bias alone.
        sums /= tl.where(kernel_total == 0, 1.0, kernel_total)[None, :]
    if bias is not None:
        sums += tl.load(bias + output, mask=is_output, other=0).to(ACCUMULATE)[:, None]
    if ROUND:
        sums = _round_to_multiple(sums, tl.full([], quantum, ACCUMULATE))
    sums *= tl.full([], alpha, ACCUMULATE)
    written = is_output[:, None] & exists[None, :]
    offsets = (image * out_channels + output)[:, None] * (tl.full([], out_height, tl.int64) * out_width) + place[None, :]
    if residual is not None:
        sums += tl.load(residual + offsets, mask=written, other=0).to(ACCUMULATE)
    tl.store(y + offsets, sums, mask=written)

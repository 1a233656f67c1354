"""Pixel-adaptive convolution in Triton: grad_W[o,c,t] = alpha · sum over places p of grad_y[o](p) k_t(p) x[c](p+t).

A program takes a tile of O x (K²·C) and a share of the places, and multiplies grad_y with values that it scales in
passing. Read: grad_y, x and k once for each tile, mostly from the cache, as neighbouring programs take the same places.
The shares are then added up, always in the same order.
"""

import triton
import triton.language as tl

from .pac_conv2d_triton import (
    COLUMNS,
    LEAST_DOT,
    arithmetic,
    as_operand,
    on_tensor_cores,
    pixel_count,
    places_of_tile,
    power_of_two,
    reached,
    start,
    tuner,
)

# Outputs and entries of K²·C of a program at most: sums of 32 registers a thread. Fewer where numbers are multiplied
# one by one, from registers.
_TILE, _WIDE_TILE = (128, 64), (32, 32)
# (ROWS, warps, stages): of programs whose entries belong to one tap, to several, and of those without tensor cores.
# Taps have places of their own, and thus more addresses.
_TILES, _TILES_OF_TAPS, _WIDE_TILES = ((2, 8, 2), (1, 8, 2)), ((2, 8, 1), (1, 8, 1), (1, 4, 1)), ((1, 8, 1),)
# Programs: a few for each of the 82 multiprocessors of an RTX 3090 or the 132 of an H200, so that the last ones do not
# leave most of them idle, and few shares to add up.
_PROGRAMS = 512


def weight_gradient(grad_y, x, kernels, grad_weight, steps, alpha):
    """Fills grad_weight [O,C,K,K]; kernels [B,K²,H',W'] has k, 0 for taps outside the image."""
    B, _, H, W = x.shape
    O, C, K, _ = grad_weight.shape
    out_height, out_width = grad_y.shape[2:]
    most = _TILE if on_tensor_cores(x) else _WIDE_TILE
    outputs, entries = power_of_two(O, LEAST_DOT, most[0]), power_of_two(K * K * C, LEAST_DOT, most[1])
    taps = 1 if C % entries == 0 else entries
    tiles = _WIDE_TILES if not on_tensor_cores(x) else _TILES if taps == 1 else _TILES_OF_TAPS
    blocks = triton.cdiv(O, outputs) * triton.cdiv(K * K * C, entries)
    shares = min(triton.cdiv(_PROGRAMS, blocks), B * out_height * triton.cdiv(out_width, COLUMNS))
    partial = kernels.new_empty(shares, O, K, K, C)
    start(
        tuner(pac_conv2d_backward_weight_kernel, "dot", ("ROWS",), tiles),
        lambda meta: (blocks * shares,),
        grad_y,
        x,
        kernels,
        partial,
        B,
        H,
        W,
        out_height,
        out_width,
        steps,
        alpha,
        shares,
        C,
        O,
        0,
        K,
        *arithmetic(x),
        taps,
        entries,
        outputs,
        COLUMNS,
    )
    grad_weight.copy_(partial.sum(0).permute(0, 3, 1, 2))


@triton.jit
def pac_conv2d_backward_weight_kernel(
    grad_y,
    x,
    kernels,
    partial,
    batch,
    height,
    width,
    out_height,
    out_width,
    steps,
    alpha: tl.float64,
    shares,
    C: tl.constexpr,
    O: tl.constexpr,
    G: tl.constexpr,
    K: tl.constexpr,
    OPERAND: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    PRECISION: tl.constexpr,
    TAPS: tl.constexpr,
    ENTRIES: tl.constexpr,
    OUTPUTS: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """partial [shares,O,K²·C] of OUTPUTS x ENTRIES. TAPS is 1 where all of a program's entries belong to one tap."""
    # Programs that follow each other take the same places, which then are in the cache.
    program = tl.program_id(0)
    entry_tiles = tl.cdiv(K * K * C, ENTRIES)
    output_tiles = tl.cdiv(O, OUTPUTS)
    first = program % entry_tiles * ENTRIES
    entry = first + tl.arange(0, ENTRIES)
    tap = (first + tl.arange(0, TAPS))[:, None] // C
    output = program // entry_tiles % output_tiles * OUTPUTS + tl.arange(0, OUTPUTS)
    share = program // entry_tiles // output_tiles
    pixels, out_pixels = pixel_count(height, width), pixel_count(out_height, out_width)
    tiles = tl.cdiv(out_height, ROWS) * tl.cdiv(out_width, COLUMNS)
    # 32 bits count the tiles of one share, not those of all images.
    all_tiles = tiles.to(tl.int64) * batch
    share_tiles = tl.cdiv(all_tiles, shares)
    first_tile = share * share_tiles
    first_image, first_tile_of_image = first_tile // tiles, (first_tile % tiles).to(tl.int32)
    sums = tl.zeros([OUTPUTS, ENTRIES], ACCUMULATE)
    for step in range(tl.minimum(share_tiles, all_tiles - first_tile).to(tl.int32)):
        later, row, column, place, exists = places_of_tile(
            first_tile_of_image + step, out_height, out_width, ROWS, COLUMNS
        )
        image = first_image + later
        gradients = tl.load(
            grad_y + (image * O + output)[:, None] * out_pixels + place[None, :],
            mask=(output < O)[:, None] & exists[None, :],
            other=0,
        )
        neighbor, inside = reached(row[None, :], column[None, :], tap, steps, height, width, K)
        inside = inside & exists[None, :] & (tap < K * K)
        kernel = tl.load(kernels + (image * K * K + tap) * out_pixels + place[None, :], mask=inside, other=0)
        planes = x + (image * C + entry % C)[:, None] * pixels
        values = tl.load(planes + neighbor, mask=inside & (entry < K * K * C)[:, None], other=0)
        scaled = tl.trans(as_operand(values.to(ACCUMULATE) * kernel, OPERAND, PRECISION))
        gradients = as_operand(gradients, OPERAND, PRECISION)
        sums = tl.dot(gradients, scaled, sums, input_precision=PRECISION, out_dtype=ACCUMULATE)
    sums *= tl.full([], alpha, ACCUMULATE)
    offsets = (share.to(tl.int64) * O + output)[:, None] * (K * K * C) + entry[None, :]
    tl.store(partial + offsets, sums, mask=(output < O)[:, None] & (entry < K * K * C)[None, :])

"""Maps that lie in planes [C,H,W] and maps that lie in pixels [H,W,C], how one is made of the other in Triton.

A program owns some rows, columns and channels of one image. Triton itself turns them over between numbers whose columns
are neighbours in memory and numbers whose channels are.
"""

import triton
import triton.language as tl

# A tile: whole sectors of 32 bytes in pixels, whole lines of 128 (of float32) in planes, all channels of the network's
# largest maps and, with Triton's 4 warps, 16 numbers a thread. Its columns are those of whole rows, counted up from the
# first: Triton sees that they are neighbours in memory. Where it sees none, which dimension the threads of a warp share
# depends on its version, and may be the channels of a map in planes: a sector for every number.
TILE = CHANNELS, ROWS, COLUMNS = 16, 4, 32


def plane_tiles(height, width):
    """How many tiles a plane is cut into."""
    return triton.cdiv(height, ROWS) * triton.cdiv(width, COLUMNS)


def grid(shape):
    """One program for each tile of a map whose shape in pixels is [B,H,W,C]."""
    B, H, W, C = shape
    return (B * plane_tiles(H, W) * triton.cdiv(C, CHANNELS),)


@triton.jit
def corner_of(tile, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """First row and first column of a plane's tile."""
    column_tiles = tl.cdiv(width, COLUMNS)
    return tile // column_tiles * ROWS, tile % column_tiles * COLUMNS


@triton.jit
def tile_of(program, channels, height, width, CHANNELS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Image, channels [CHANNELS,1], and number, rows and columns [1,ROWS·COLUMNS] of a tile; and what is inside.

    Channel tiles of the same pixels are neighbours: together they fill the lines of what lies in pixels.
    """
    channel_tiles = tl.cdiv(channels, CHANNELS)
    plane_tiles = tl.cdiv(height, ROWS) * tl.cdiv(width, COLUMNS)
    channel = program % channel_tiles * CHANNELS + tl.arange(0, CHANNELS)[:, None]
    tile = program // channel_tiles % plane_tiles
    image = (program // channel_tiles // plane_tiles).to(tl.int64)
    first_row, first_column = corner_of(tile, width, ROWS, COLUMNS)
    pixel = tl.arange(0, ROWS * COLUMNS)[None, :]
    row, column = first_row + pixel // COLUMNS, first_column + pixel % COLUMNS
    return image, channel, tile, row, column, (channel < channels) & (row < height) & (column < width)


@triton.jit
def plane_offsets(image, channel, row, column, channels, height, width):
    """Offsets in planes [B,C,H,W]."""
    return ((image * channels + channel) * height + row) * width + column


@triton.jit
def pixel_offsets(image, channel, row, column, channels, height, width):
    """Offsets in pixels [B,H,W,C]."""
    return ((image * height + row) * width + column) * channels + channel

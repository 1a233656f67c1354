"""Maps that lie in planes [C,H,W] and maps that lie in pixels [H,W,C], how one is made of the other in Triton.

A program owns some pixels, counted row by row, and some channels of one image. Triton itself turns them over between
numbers whose pixels are neighbours in memory and numbers whose channels are.
"""

import triton
import triton.language as tl

# A tile: whole sectors of 32 bytes in both layouts, all channels of the network's largest maps and, with Triton's 4
# warps, 16 numbers a thread.
CHANNELS, PIXELS = 16, 128


def pixel_tiles(height, width):
    """How many tiles the pixels of a plane are cut into."""
    return triton.cdiv(height * width, PIXELS)


def grid(shape):
    """One program for each tile of a map whose shape in pixels is [B,H,W,C]."""
    B, H, W, C = shape
    return (B * pixel_tiles(H, W) * triton.cdiv(C, CHANNELS),)


@triton.jit
def tile_of(program, channels, height, width, CHANNELS: tl.constexpr, PIXELS: tl.constexpr):
    """Image, channels [CHANNELS,1], and number, rows and columns [1,PIXELS] of the pixels' tile; and what is inside.

    Channel tiles of the same pixels are neighbours: together they fill the lines of what lies in pixels.
    """
    channel_tiles = tl.cdiv(channels, CHANNELS)
    plane_tiles = tl.cdiv(height * width, PIXELS)
    channel = program % channel_tiles * CHANNELS + tl.arange(0, CHANNELS)[:, None]
    tile = program // channel_tiles % plane_tiles
    pixel = tile * PIXELS + tl.arange(0, PIXELS)[None, :]
    image = (program // channel_tiles // plane_tiles).to(tl.int64)
    row, column = pixel // width, pixel % width
    return image, channel, tile, row, column, (channel < channels) & (row < height)


@triton.jit
def plane_offsets(image, channel, row, column, channels, height, width):
    """Offsets in planes [B,C,H,W]."""
    return ((image * channels + channel) * height + row) * width + column


@triton.jit
def pixel_offsets(image, channel, row, column, channels, height, width):
    """Offsets in pixels [B,H,W,C]."""
    return ((image * height + row) * width + column) * channels + channel

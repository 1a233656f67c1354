"""Differences of neighbouring features in Triton: formula in ccpl.py.

A program owns some channels of one anchor (forward) or of one entry (backward), an anchor or one of its neighbours.
Backward adds to zeros: atomically, or, with entries sorted by place, as the owner of the place.
"""

import torch
import triton
import triton.language as tl

# Channels of one program: a warp or two of 32 threads.
_CHANNELS = 64


def forward(x, places, y, batch, channels, map_places, anchors, channel_stride, place_stride):
    """Fills y [B,8N,C]."""
    grid = (batch * anchors, triton.cdiv(channels, _CHANNELS))
    if grid[0]:
        neighbor_difference_forward_kernel[grid](
            x, places, y, channels, map_places, anchors, channel_stride, place_stride, _accumulate(x), _CHANNELS
        )


def backward(grad_y, places, order, grad_x, batch, channels, map_places, anchors, channel_stride, place_stride):
    """Adds to grad_x, which is zero: atomically where order is None."""
    grid = (batch * anchors * 9, triton.cdiv(channels, _CHANNELS))
    if grid[0]:
        neighbor_difference_backward_kernel[grid](
            grad_y,
            places,
            places if order is None else order,
            grad_x,
            channels,
            map_places,
            anchors,
            channel_stride,
            place_stride,
            order is not None,
            _accumulate(grad_y),
            _CHANNELS,
            num_warps=2,
        )


def _accumulate(tensor):
    return tl.float64 if tensor.dtype == torch.float64 else tl.float32


@triton.jit
def neighbor_difference_forward_kernel(
    x,
    places,
    y,
    channels,
    map_places,
    anchors,
    channel_stride,
    place_stride,
    ACCUMULATE: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Eight rows of y, some channels of them."""
    program = tl.program_id(0).to(tl.int64)
    anchor = program % anchors
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    inside = channel < channels
    maps = x + program // anchors * channels * map_places + channel.to(tl.int64) * channel_stride
    centre = _at_place(maps, tl.load(places + anchor * 9), place_stride, map_places, inside).to(ACCUMULATE)
    for neighbor in tl.static_range(8):
        place = tl.load(places + anchor * 9 + 1 + neighbor)
        value = _at_place(maps, place, place_stride, map_places, inside).to(ACCUMULATE)
        tl.store(y + (program * 8 + neighbor) * channels + channel, centre - value, mask=inside)


@triton.jit
def _at_place(maps, place, place_stride, map_places, inside):
    """Values of channels; NaN beyond the map, as nobody has looked at the places of a compiled graph."""
    return tl.load(maps + place * place_stride, mask=_on_map(place, map_places, inside), other=float("nan"))


@triton.jit
def _on_map(place, map_places, inside):
    """Whether channels are inside, and their place on the map. Triton's interpreter takes no scalar in a mask."""
    places = tl.where(inside, place, -1)
    return (places >= 0) & (places < map_places)


@triton.jit
def _entry_gradient(grad_y, entry, channel, inside, channels, ACCUMULATE: tl.constexpr):
    """What one entry adds to its place: an anchor the sum of its eight rows, a neighbour its own row, negative."""
    slot = entry % 9
    rows = grad_y + entry // 9 * 8 * channels + channel
    total = tl.zeros(channel.shape, ACCUMULATE)
    if slot == 0:
        for neighbor in tl.static_range(8):
            total += tl.load(rows + neighbor * channels, mask=inside, other=0).to(ACCUMULATE)
    else:
        total -= tl.load(rows + (slot - 1) * channels, mask=inside, other=0).to(ACCUMULATE)
    return total


@triton.jit
def neighbor_difference_backward_kernel(
    grad_y,
    places,
    order,
    grad_x,
    channels,
    map_places,
    anchors,
    channel_stride,
    place_stride,
    SORTED: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """The gradient of one place, where SORTED has the entries of a place in a row; else that of one entry."""
    entries = anchors * 9
    program = tl.program_id(0).to(tl.int64)
    image = program // entries
    first = program % entries
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    inside = channel < channels
    place = tl.load(places + first)
    inside = _on_map(place, map_places, inside)
    grad_y += image * anchors * 8 * channels
    target = grad_x + image * channels * map_places + channel.to(tl.int64) * channel_stride + place * place_stride
    if SORTED:
        if (first == 0) or (tl.load(places + tl.maximum(first - 1, 0)) != place):
            total = tl.zeros([CHANNELS], ACCUMULATE)
            entry = first
            same = True
            while same:
                total += _entry_gradient(grad_y, tl.load(order + entry), channel, inside, channels, ACCUMULATE)
                entry += 1
                same = (entry < entries) & (tl.load(places + tl.minimum(entry, entries - 1)) == place)
            tl.store(target, total, mask=inside)
    else:
        total = _entry_gradient(grad_y, first, channel, inside, channels, ACCUMULATE)
        tl.atomic_add(target, total, mask=inside, sem="relaxed")

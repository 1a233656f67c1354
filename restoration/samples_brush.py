"""The painter's tools behind samples.py: a canvas, noise, brush strokes, and the small things drawn with them.

Lengths are canvas pixels, points are (x, y), colours are RGB in [0,1]. Small things take their height or half length
and a palette; the numbers inside their functions are their proportions, set by eye.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.random import Generator
from numpy.typing import ArrayLike, NDArray
from PIL import Image, ImageDraw
from scipy import ndimage

# Lattice cells before the noise repeats: more than one picture spans, so that no repetition is seen.
NOISE_CELLS = 64
# Texels in a lattice cell, filled in by cubic splines: from there on, sampling along straight lines shows no facets.
NOISE_TEXELS = 8
# Samples taken in the finest cell of a whole field, which is then enlarged by bicubic interpolation: smooth and quick.
FIELD_SAMPLES = 6
# Polygon masks are drawn this much larger and averaged: seventeen levels of edge coverage.
POLYGON_SUPERSAMPLING = 4


@dataclass(frozen=True)
class Palette:
    """Colours, RGB float [3] in [0,1]; a mountain goes from crest over flank to foot, then into mist."""

    silk: NDArray
    silk_edge: NDArray
    mist: NDArray
    crest: NDArray
    crest_light: NDArray
    flank: NDArray
    foot: NDArray
    outline: NDArray
    far: NDArray
    water: NDArray
    disc: NDArray
    ink: NDArray
    bark: NDArray
    foliage: NDArray
    needle: NDArray
    leaf: NDArray
    stone: NDArray
    shade: NDArray
    lacquer: NDArray
    roof: NDArray
    robe: NDArray
    seal: NDArray

    @classmethod
    def from_codes(cls, **codes: str) -> Palette:
        """From hexadecimal codes RRGGBB, one a field."""
        return cls(**{name: np.array(list(bytes.fromhex(code))) / 255 for name, code in codes.items()})


class Noise:
    """Smooth random fields, different at every call; mean 0, one octave lies within about [-1,1]."""

    def __init__(self, rng: Generator) -> None:
        self.rng = rng
        lattice = rng.uniform(-1.0, 1.0, (NOISE_CELLS, NOISE_CELLS))
        self.texture = ndimage.zoom(lattice, NOISE_TEXELS, order=3, mode="grid-wrap", grid_mode=True)

    def __call__(self, y: ArrayLike, x: ArrayLike, octaves: int = 1) -> NDArray:
        """Noise at lattice coordinates y and x, broadcast together; every octave is twice as fine and half as high."""
        y, x = np.broadcast_arrays(y, x)
        total = np.zeros(x.shape)
        for octave in range(octaves):
            offset_y, offset_x = self.rng.uniform(0.0, NOISE_CELLS, 2)
            texels = [(y * 2**octave + offset_y) * NOISE_TEXELS, (x * 2**octave + offset_x) * NOISE_TEXELS]
            total += ndimage.map_coordinates(self.texture, texels, order=1, mode="grid-wrap") / 2**octave
        return total

    def field(self, height: int, width: int, cells_y: float, cells_x: float, octaves: int = 1) -> NDArray:
        """Noise [height,width] with so many lattice cells along each side."""
        finest = FIELD_SAMPLES * 2 ** (octaves - 1)
        rows = np.linspace(0.0, cells_y, min(height, 2 + int(cells_y * finest)))
        columns = np.linspace(0.0, cells_x, min(width, 2 + int(cells_x * finest)))
        coarse = Image.fromarray(self(rows[:, None], columns[None, :], octaves).astype(np.float32))
        return np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC))


class Canvas:
    """A picture being painted: pixels, float32 [H,W,3] in [0,1], and the width brush of an ordinary line.

    brush is a 512th of the shorter side, so that a picture keeps its look at every size.
    """

    def __init__(self, height: int, width: int) -> None:
        self.height, self.width = height, width
        self.brush = min(height, width) / 512
        self.pixels = np.zeros((height, width, 3), np.float32)

    def lay(self, coverage: NDArray, colour: ArrayLike, top: int = 0, left: int = 0) -> None:
        """Lay colour (one, or one a pixel) on the box at (top, left), as opaque as coverage [h,w] in [0,1] says."""
        height, width = coverage.shape
        box = self.pixels[top : top + height, left : left + width]
        box += coverage[..., None].astype(np.float32) * (np.asarray(colour, np.float32) - box)

    def segments(
        self, starts: ArrayLike, ends: ArrayLike, widths: ArrayLike, colour: ArrayLike, opacity: float = 1.0
    ) -> None:
        """Lay straight marks from starts [N,2] to ends [N,2] as one wash; widths [N,2] (or fewer axes) at both ends."""
        starts, ends = np.asarray(starts, float), np.asarray(ends, float)
        widths = np.broadcast_to(np.asarray(widths, float), starts.shape)
        top, bottom, left, right = self._box(np.concatenate([starts, ends]), widths.max() / 2 + 1)
        if top >= bottom or left >= right:
            return
        x = np.arange(left, right)[None, None, :] - starts[:, 0, None, None]
        y = np.arange(top, bottom)[None, :, None] - starts[:, 1, None, None]
        along_x, along_y = (ends - starts).T[:, :, None, None]
        # A dot is a mark without length: this floor gives it a place on itself.
        length_squared = np.maximum(along_x**2 + along_y**2, 1e-12)
        place = np.clip((x * along_x + y * along_y) / length_squared, 0.0, 1.0)
        distance = np.hypot(x - place * along_x, y - place * along_y)
        half_width = (widths[:, 0, None, None] * (1 - place) + widths[:, 1, None, None] * place) / 2
        # A mark thinner than a pixel covers no more than its own width of it.
        coverage = np.clip(half_width - distance + 0.5, 0.0, np.minimum(1.0, 2 * half_width)).max(axis=0)
        self.lay(coverage * opacity, colour, top, left)

    def line(self, points: ArrayLike, widths: ArrayLike, colour: ArrayLike, opacity: float = 1.0) -> None:
        """Lay one brush line through points [N,2]; widths [N], or one for all."""
        points = np.asarray(points, float)
        widths = np.broadcast_to(np.asarray(widths, float), len(points))
        self.segments(points[:-1], points[1:], np.stack([widths[:-1], widths[1:]], axis=1), colour, opacity)

    def dots(self, points: ArrayLike, diameters: ArrayLike, colour: ArrayLike, opacity: float = 1.0) -> None:
        """Lay round dots at points [N,2] as one wash; diameters [N], or one for all."""
        points = np.asarray(points, float)
        diameters = np.broadcast_to(np.asarray(diameters, float), len(points))
        self.segments(points, points, np.stack([diameters, diameters], axis=1), colour, opacity)

    def polygon(self, points: ArrayLike, colour: ArrayLike, opacity: float = 1.0) -> None:
        """Lay a filled polygon with corners [N,2]."""
        points = np.asarray(points, float)
        top, bottom, left, right = self._box(points, 1)
        if top >= bottom or left >= right:
            return
        factor = POLYGON_SUPERSAMPLING
        mask = Image.new("L", ((right - left) * factor, (bottom - top) * factor))
        # Half a pixel: pixel centres lie at whole coordinates, on the canvas and on the larger mask.
        corners = (points - (left, top) + 0.5) * factor - 0.5
        ImageDraw.Draw(mask).polygon([tuple(corner) for corner in corners], fill=255)
        self.lay(np.asarray(mask.reduce(factor)) / 255 * opacity, colour, top, left)

    def _box(self, points: NDArray, margin: float) -> tuple[int, int, int, int]:
        """(top, bottom, left, right) of the canvas pixels within margin of points [N,2]; empty when off the canvas."""
        left, top = np.floor(points.min(axis=0) - margin).astype(int)
        right, bottom = np.ceil(points.max(axis=0) + margin).astype(int) + 1
        return max(top, 0), min(bottom, self.height), max(left, 0), min(right, self.width)


def curve(points: ArrayLike, count: int = 12) -> NDArray:
    """count points [count,2] on the quadratic Bezier curve with the control points [3,2]."""
    first, middle, last = np.asarray(points, float)
    t = np.linspace(0.0, 1.0, count)[:, None]
    return first * (1 - t) ** 2 + middle * 2 * t * (1 - t) + last * t**2


def paint_pine(canvas: Canvas, rng: Generator, x: float, y: float, height: float, palette: Palette) -> None:
    """A pine rooted at (x, y): a leaning trunk, and flat clusters of needle fans on alternating branches."""
    lean, sway = rng.uniform(-0.25, 0.25) * height, rng.uniform(-0.2, 0.2) * height
    trunk = curve([(x, y), (x + sway, y - 0.5 * height), (x + lean, y - height)], 16)
    width = 0.055 * height
    canvas.line(trunk, np.linspace(width, 0.25 * width, 16), palette.ink, 0.85)
    canvas.line(trunk[:12] - (0.12 * width, 0), np.linspace(0.5 * width, 0.1 * width, 12), palette.bark, 0.6)

    tiers = 8
    for tier in range(tiers):
        rise = 0.42 + 0.58 * tier / (tiers - 1)
        root = trunk[round(15 * rise)]
        reach = (0.42 * (1 - rise) + 0.1) * height * rng.uniform(0.7, 1.2) * (tier < tiers - 1)
        reach *= -1 if tier % 2 else 1
        tip = root + np.array([reach, -0.04 * height])
        sag = root + np.array([0.5 * reach, 0.03 * height])
        canvas.line(curve([root, sag, tip], 6), 0.3 * width, palette.ink, 0.8)
        cluster = 0.6 * tip + 0.4 * root
        _paint_needles(canvas, rng, cluster, 0.5 * abs(reach) + 0.09 * height, 0.06 * height, palette)


def _paint_needles(
    canvas: Canvas, rng: Generator, centre: NDArray, reach: float, size: float, palette: Palette
) -> None:
    """A flat cluster of needle fans, 2 reach wide: a green wash first, then ink needles over it."""
    count = max(5, round(2.6 * reach / size))
    across = np.linspace(-1, 1, count)
    drop = (rng.uniform(-0.5, 0.5, count) + 0.5 * across**2) * size
    places = centre + np.stack([reach * across, drop], axis=1)
    canvas.dots(places - (0, 0.25 * size), 1.25 * size, palette.foliage, 0.5)
    needle = max(0.14 * size, 0.5 * canvas.brush)
    for place in places:
        angles = np.linspace(-0.1, np.pi + 0.1, 9) + rng.uniform(-0.1, 0.1, 9)
        directions = np.stack([np.cos(angles), -0.8 * np.sin(angles)], axis=1)
        tips = place + size * rng.uniform(0.8, 1.1, (9, 1)) * directions
        canvas.segments(np.broadcast_to(place, tips.shape), tips, (needle, 0.5 * needle), palette.needle, 0.75)


def paint_leafy_tree(canvas: Canvas, rng: Generator, x: float, y: float, height: float, palette: Palette) -> None:
    """A broad-leaved tree rooted at (x, y): five boughs, each in a cloud of leaf dots, the dark ones below."""
    tips = np.array([(-0.3, -0.6), (0.28, -0.66), (-0.12, -0.78), (0.12, -0.9), (0.02, -0.6)])
    tips = (x, y) + (tips + rng.uniform(-0.06, 0.06, tips.shape)) * height
    for tip in tips:
        bough = curve([(x, y), (x + rng.uniform(-0.04, 0.04) * height, y - 0.42 * height), tip], 9)
        canvas.line(bough, np.linspace(0.05, 0.012, 9) * height, palette.ink, 0.75)
    for brightness, drop in ((0.6, 0.06), (0.8, 0.02), (1.0, -0.02), (1.2, -0.07)):
        for tip in tips:
            leaves = tip + (rng.standard_normal((26, 2)) * (0.085, 0.05) + (0, drop)) * height
            canvas.dots(leaves, rng.uniform(0.02, 0.045, 26) * height, np.clip(palette.leaf * brightness, 0, 1), 0.8)


def paint_pavilion(canvas: Canvas, x: float, y: float, size: float, palette: Palette) -> None:
    """An open pavilion whose platform, 1.3 size wide, stands on (x, y)."""

    def place(points: ArrayLike) -> NDArray:
        return (x, y) + np.asarray(points) * (size, -size)

    line = max(0.025 * size, canvas.brush)
    platform = place([(-0.65, 0), (0.65, 0), (0.62, 0.09), (-0.62, 0.09), (-0.65, 0)])
    canvas.polygon(platform, palette.stone)
    canvas.line(platform, 0.7 * line, palette.ink, 0.8)
    canvas.polygon(place([(-0.42, 0.09), (0.42, 0.09), (0.42, 0.62), (-0.42, 0.62)]), palette.shade, 0.55)
    for pillar in (-0.46, -0.2, 0.2, 0.46):
        canvas.line(place([(pillar, 0.09), (pillar, 0.62)]), 0.055 * size, palette.lacquer)
    for rail in (0.18, 0.25):
        canvas.line(place([(-0.46, rail), (0.46, rail)]), 0.6 * line, palette.lacquer, 0.9)

    right_slope = curve([(0.1, 1.06), (0.3, 0.74), (0.82, 0.66)])
    eave = curve([(0.82, 0.66), (0.0, 0.5), (-0.82, 0.66)])
    roof = place(np.concatenate([right_slope, eave, right_slope[::-1] * (-1, 1), right_slope[:1]]))
    canvas.polygon(roof, palette.roof)
    for foot, head in zip(np.linspace(-0.66, 0.66, 13), np.linspace(-0.09, 0.09, 13), strict=True):
        tiles = curve([(head, 1.02), (0.45 * foot, 0.76), (foot, 0.6)])
        canvas.line(place(tiles), 0.6 * line, palette.ink, 0.4)
    canvas.line(roof, line, palette.ink, 0.9)
    canvas.line(place([(-0.13, 1.07), (0.13, 1.07)]), 2.2 * line, palette.ink, 0.9)
    canvas.line(place([(0, 1.06), (0, 1.18)]), (2.4 * line, line), palette.lacquer)


def paint_boat(canvas: Canvas, x: float, y: float, size: float, palette: Palette) -> None:
    """A fishing boat, 2 size long, afloat at (x, y), with a mat roof and a boatman at his pole."""

    def place(points: ArrayLike) -> NDArray:
        return (x, y) + np.asarray(points) * (size, -size)

    line = max(0.03 * size, canvas.brush)
    for depth, reach in ((0.1, 0.85), (0.17, 0.6), (0.25, 0.7), (0.33, 0.35)):
        canvas.line(place([(-reach, -depth), (0, -depth), (reach, -depth)]), (0, 2 * line, 0), palette.ink, 0.3)
    canvas.line(place([(0.62, 0.95), (0.86, -0.1)]), 0.8 * line, palette.ink, 0.85)
    hull = place(
        np.concatenate([curve([(-1, 0.24), (0, -0.2), (1, 0.22)]), curve([(1, 0.22), (0, -0.02), (-1, 0.24)])])
    )
    canvas.polygon(hull, palette.bark)
    canvas.line(hull, line, palette.ink, 0.9)
    mat = place(np.concatenate([curve([(-0.55, 0.06), (-0.15, 0.82), (0.22, 0.05)]), [(-0.55, 0.06)]]))
    canvas.polygon(mat, palette.stone)
    for rib in (-0.3, -0.12, 0.06):
        canvas.line(place([(rib, 0.06), (rib - 0.04, 0.36)]), 0.5 * line, palette.ink, 0.5)
    canvas.line(mat, line, palette.ink, 0.85)
    canvas.polygon(place([(0.44, 0.06), (0.7, 0.07), (0.66, 0.42), (0.53, 0.44)]), palette.robe)
    canvas.dots(place([(0.6, 0.5)]), 0.13 * size, palette.stone)
    canvas.polygon(place([(0.45, 0.52), (0.6, 0.67), (0.76, 0.5)]), palette.ink, 0.85)


def paint_birds(canvas: Canvas, rng: Generator, x: float, y: float, size: float, palette: Palette) -> None:
    """A skein of seven birds led from (x, y); a bird is two wing strokes, together about 1.4 size wide."""
    for index in range(7):
        rank, side = (index + 1) // 2, 1 if index % 2 else -1
        bird = np.array([x + 2.1 * size * rank, y + side * 0.75 * size * rank]) + rng.uniform(-0.4, 0.4, 2) * size
        wing, lift = size * rng.uniform(0.6, 0.8), rng.uniform(0.3, 0.65)
        for side in (-wing, wing):
            bend = bird + np.array([0.45 * side, -(0.75 * lift + 0.1) * wing])
            tip = bird + np.array([side, -lift * wing])
            canvas.line(curve([bird, bend, tip], 6), np.linspace(0.2, 0.05, 6) * size, palette.ink, 0.75)


def paint_seal(canvas: Canvas, rng: Generator, x: float, y: float, size: float, palette: Palette) -> None:
    """A square red seal centred at (x, y) with four carved signs of level and upright cuts; they spell nothing."""
    corners = [(-1, -1), (0, -0.97), (1, -1), (0.97, 0), (1, 1), (0, 0.98), (-1, 0.98), (-0.98, 0)]
    canvas.polygon((x, y) + np.array(corners) * size / 2, palette.seal, 0.92)
    for column, row in ((-1, -1), (1, -1), (-1, 1), (1, 1)):
        levels = np.linspace(-0.14, 0.14, rng.integers(3, 5))
        upright = rng.choice([-0.14, 0.0, 0.14])
        starts = [(rng.choice([-0.14, -0.14, -0.02]), level) for level in levels] + [(upright, -0.14)]
        ends = [(rng.choice([0.14, 0.14, 0.02]), level) for level in levels] + [(upright, 0.14)]
        centre = np.array([x + 0.22 * column * size, y + 0.22 * row * size])
        canvas.segments(
            centre + np.array(starts) * size, centre + np.array(ends) * size, 0.055 * size, palette.silk, 0.85
        )

"""The landscape behind samples.py: silk, far ranges, mist, mountains in mineral colours, water, a near shore.

The composition is that of the blue-and-green handscrolls: a host peak off the middle, guests on both sides, the feet
lost in mist. Numbers inside the methods are proportions of such a picture, set by eye; lengths are canvas pixels.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray
from scipy import ndimage

from restoration.samples_brush import (
    Canvas,
    Noise,
    Palette,
    paint_birds,
    paint_boat,
    paint_leafy_tree,
    paint_pavilion,
    paint_pine,
    paint_seal,
)

PALETTES = {
    # Azurite crests, malachite flanks and ochre feet on honey-coloured silk, outlined in gold; a red sun.
    "blue_green": Palette.from_codes(
        silk="e8d3a2",
        silk_edge="cfae72",
        mist="f0e2bd",
        crest="1f5aa8",
        crest_light="5a9bcf",
        flank="4fa088",
        foot="d0aa70",
        outline="e9c46a",
        far="7fa9b4",
        water="9dbfa6",
        disc="c8452f",
        ink="23242c",
        bark="7a5638",
        foliage="2f7560",
        needle="173d3a",
        leaf="c65a36",
        stone="dcc8a0",
        shade="6b5a48",
        lacquer="a8321f",
        roof="3f6f93",
        robe="eee6d4",
        seal="b3261e",
    ),
    # Indigo-grey ink, light crimson and pale ochre on paper-white silk; a pale moon and red autumn leaves.
    "ochre": Palette.from_codes(
        silk="efe2c6",
        silk_edge="dcc59c",
        mist="f5ecd8",
        crest="7d8585",
        crest_light="b0aca0",
        flank="cf9a78",
        foot="e3bd8c",
        outline="e8cfa8",
        far="b9b3a6",
        water="d3d0bd",
        disc="f8f0dc",
        ink="2b2623",
        bark="80593f",
        foliage="6d7458",
        needle="2e332c",
        leaf="bd4f35",
        stone="e6d6b6",
        shade="7d6a56",
        lacquer="934030",
        roof="6e6a66",
        robe="f3ead8",
        seal="b02a20",
    ),
}

# One host peak and its guests fill a picture of this width by height; a wider one holds several such groups.
SCENE_ASPECT = 1.5
# Where the water begins to show and where the host's foot stands, as fractions of the height from the top.
HORIZON, WATERLINE = 0.60, 0.75
# Widths along a texture stroke, relative to its widest: the brush is set down, swells and is lifted.
STROKE_SWELL = np.array([0.35, 0.8, 1.0, 0.95, 0.8, 0.6, 0.4, 0.15])
# Where crest, light crest, flank, foot and mist lie between the ridge (0) and the base (1) of a mountain.
MINERAL_STOPS = np.array([0.0, 0.18, 0.38, 0.66, 0.95])
# Where pine, pavilion and maple stand on the near shore, in scene widths; each picture draws one of these.
SHORE_PLACES = np.array([(0.04, 0.15, 0.26), (0.18, 0.075, 0.27), (0.05, 0.24, 0.13)])


@dataclass(frozen=True)
class Peak:
    """One mountain: where it stands, and its look.

    left and right are its half widths; a larger roundness makes its feet flare; malachite in [0,1] takes the place of
    azurite on its crest; haze in [0,1] pales it.
    """

    centre: float
    summit: float
    base: float
    left: float
    right: float
    roundness: float
    malachite: float
    haze: float


def smoothstep(low: float, high: float, value: NDArray) -> NDArray:
    """0 below low, 1 above high, and a cubic without kinks between."""
    t = np.clip((value - low) / (high - low), 0, 1)
    return t * t * (3 - 2 * t)


def landscape(palette: Palette, rng: Generator, height: int, width: int) -> NDArray:
    """A landscape, float32 RGB [height,width,3] in [0,1]."""
    painter = Painter(Canvas(height, width), rng, Noise(rng), palette)
    painter.silk()
    painter.disc()
    painter.far_ranges()
    painter.mist(0.50, 0.08)
    painter.water()
    painter.massifs()
    painter.reflection()
    painter.shoals()
    painter.ripples()
    painter.boat_and_birds()
    painter.near_shore()
    painter.seal()
    return painter.canvas.pixels


class Painter:
    """Paints one landscape; each method lays one part over those before it."""

    def __init__(self, canvas: Canvas, rng: Generator, noise: Noise, palette: Palette) -> None:
        self.canvas, self.rng, self.noise, self.palette = canvas, rng, noise, palette
        self.height, self.width, self.brush = canvas.height, canvas.width, canvas.brush
        self.span = min(self.width, SCENE_ASPECT * self.height)
        self.rows = np.arange(self.height)[:, None] / self.height
        self.columns = np.arange(self.width)[None, :] / self.width

    def field(self, cells_y: float, cells_x: float) -> NDArray:
        """Noise over the canvas with so many cells to its height, down and across."""
        return self.noise.field(self.height, self.width, cells_y, cells_x * self.width / self.height, octaves=2)

    def silk(self) -> None:
        """The ground: darker at the edges and the top, with clouds of uneven ageing."""
        vignette = 1.5 * ((self.columns - 0.5) ** 2 + (self.rows - 0.42) ** 2) + 0.35 * smoothstep(0.3, 0, self.rows)
        self.canvas.pixels[:] = self.palette.silk
        self.canvas.lay(np.clip(vignette + 0.14 * self.field(2, 2), 0, 1), self.palette.silk_edge)

    def disc(self) -> None:
        """Sun or moon in a halo, its lower part veiled by mist."""
        radius = 0.046 * min(self.height, self.width)
        x, y = self.width * self.rng.uniform(0.17, 0.27), self.height * self.rng.uniform(0.15, 0.21)
        down = self.rows * self.height - y
        distance = np.hypot(down, self.columns * self.width - x)
        self.canvas.lay(0.6 * np.exp(-((distance / (2.6 * radius)) ** 2)), self.palette.mist)
        veil = 0.75 * smoothstep(-0.3 * radius, 1.2 * radius, down)
        self.canvas.lay(0.9 * np.clip(radius - distance + 0.5, 0, 1) * (1 - veil), self.palette.disc)

    def mist(self, level: float, thickness: float) -> None:
        """A bank of mist around a level, both fractions of the height, thicker and thinner by chance."""
        patches = np.clip(0.42 + 0.35 * self.field(7, 2.2), 0, 1)
        self.canvas.lay(patches * np.exp(-(((self.rows - level) / thickness) ** 2)), self.palette.mist)

    def far_ranges(self) -> None:
        """Three ranges in one pale wash, each nearer one lower and a little darker."""
        x = self.columns * self.width / self.height
        for step in range(3):
            rise = self.height * (0.20 - 0.03 * step)
            swell = 0.2 + 1.4 * np.abs(self.noise(0, x * (2 + step))) + 0.2 * self.noise(0, x * 7, octaves=3)
            depth = (self.rows - 0.50 - 0.06 * step) * self.height + rise * 1.2 * np.tanh(np.maximum(swell, 0) / 1.2)
            wash = np.clip(depth + 0.5, 0, 1) * (1 - smoothstep(0, 0.9 * rise, depth))
            self.canvas.lay(wash * (0.45 + 0.1 * step), self.palette.far)
            self.canvas.lay(np.clip(1 - np.abs(depth) / self.brush, 0, 1) * 0.3, self.palette.crest)

    def water(self) -> None:
        """A wash that deepens from the horizon down, in level streaks."""
        streaks = np.clip(0.8 + 0.15 * self.field(40, 1.5), 0, 1)
        self.canvas.lay(smoothstep(HORIZON, 1.0, self.rows) * streaks, self.palette.water)

    def massifs(self) -> None:
        """For each scene a host and, behind it in haze, a guest on either side."""
        rng, span = self.rng, self.span
        scenes = max(1, round(self.width / (SCENE_ASPECT * self.height)))
        for start in np.arange(scenes) * self.width / scenes:
            self.massif(start + rng.uniform(0.18, 0.34) * span, 0.15, rng.uniform(0.33, 0.42), 0.66, 5, haze=0.5)
            self.massif(start + rng.uniform(0.90, 0.98) * span, 0.16, rng.uniform(0.26, 0.36), 0.68, 6, haze=0.35)
        self.mist(0.64, 0.05)
        for start in np.arange(scenes) * self.width / scenes:
            host, spread = start + rng.uniform(0.56, 0.70) * span, rng.uniform(0.18, 0.26)
            self.massif(host, spread, rng.uniform(0.12, 0.18), WATERLINE, 14, haze=0.0)

    def massif(self, centre: float, spread: float, summit: float, base: float, count: int, haze: float) -> None:
        """A group of peaks, the highest first; each later one is lower, nearer, and to the other side.

        summit and base are fractions of the height, spread of the scene's width.
        """
        rng = self.rng
        # The foothills trail off to one side.
        trail = rng.uniform(-0.7, 0.7)
        # In an upright picture the peaks are as high, but narrower.
        slenderness = self.span / (SCENE_ASPECT * self.height)
        for index in range(count):
            near = index / (count - 1)
            side = (1 if index % 2 else -1) * rng.uniform(0.15, 1) if index else 0.0
            drop = 0.70 * near + 0.2 * abs(side) + rng.uniform(-0.07, 0.07) if index else 0.0
            foot = base - 0.09 * (1 - near) + rng.uniform(-0.015, 0.015)
            rise = max(foot - summit - (base - summit) * drop, 0.06) * self.height
            half = (0.62 + 0.35 * near) * rise * slenderness + 0.12 * spread * self.span
            self.peak(
                Peak(
                    centre=centre + (side * (0.55 + 0.6 * near) + trail * near) * spread * self.span,
                    summit=foot * self.height - rise,
                    base=foot * self.height,
                    left=half * rng.uniform(0.7, 1.3),
                    right=half * rng.uniform(0.7, 1.3),
                    roundness=rng.uniform(1.2, 2.2),
                    malachite=rng.uniform(0, 1),
                    haze=haze,
                )
            )

    def peak(self, peak: Peak) -> None:
        """One mountain: mineral colours that follow its ridge, texture strokes, a gold and an ink outline, trees."""
        rise = peak.base - peak.summit
        left, right = max(0, int(peak.centre - peak.left)), min(self.width, int(peak.centre + peak.right) + 1)
        # A ridge needs two columns to have a slope.
        if right - left < 2:
            return
        x = np.arange(left, right)
        across = np.clip((x - peak.centre) / np.where(x < peak.centre, peak.left, peak.right), -1, 1)
        lumps = np.abs(self.noise(0, 4 * across, octaves=2)) - 0.35 + 0.12 * self.noise(0, 16 * across, octaves=2)
        profile = np.cos(across * np.pi / 2) ** peak.roundness * (1 + 0.17 * np.minimum(lumps, 0.5))
        ridge = peak.base - rise * profile
        top, bottom = max(0, int(ridge.min()) - 1), min(self.height, int(peak.base) + 1)
        if bottom - top < 2:
            return

        y = np.arange(top, bottom)[:, None]
        depth, descent = y - ridge, np.clip((y - peak.summit) / rise, 0, 1)
        inward = depth / np.hypot(1, np.gradient(ridge))
        pigment = self.noise.field(*depth.shape, 8 * rise / 300, 8 * (right - left) / 300, octaves=3)
        presence = 1 - smoothstep(0.66, 0.98, descent + 0.07 * pigment)
        body = self.mineral_colours(peak, across, descent, np.clip(depth / (rise * profile + 1), 0, 1), pigment)
        self.canvas.lay(np.clip(inward + 0.5, 0, 1) * presence, body, top, left)
        self.texture_strokes(peak, x, ridge)

        gold = np.clip(1 - np.abs(inward / self.brush - 2.4), 0, 1)
        self.canvas.lay(0.65 * gold * presence * (1 - peak.haze), self.palette.outline, top, left)
        contour = self.brush * np.clip(0.9 + 0.7 * self.noise(0, 12 * across), 0.4, 2)
        ink = np.clip(contour - np.abs(inward - contour / 2) + 0.5, 0, 1)
        self.canvas.lay((0.8 - 0.5 * peak.haze) * ink * presence, self.palette.ink, top, left)
        if peak.haze == 0:
            self.ridge_trees(x, ridge, peak.base - 0.3 * rise)

    def mineral_colours(
        self, peak: Peak, across: NDArray, descent: NDArray, local: NDArray, pigment: NDArray
    ) -> NDArray:
        """RGB [h,w,3] of a mountain's body, in folds that fan out from its summit.

        across [w] goes from -1 to 1 over its width, descent [h,1] from 0 to 1 over its height, local [h,w] from 0 to 1
        between ridge and base of each column; pigment [h,w] is the noise of an uneven wash.
        """
        palette = self.palette
        fold = self.noise(descent * 1.4, across / (0.22 + descent) * 3.2, octaves=2)
        ramp = 0.60 * local + 0.40 * descent + 0.15 * fold + 0.05 * pigment - 0.12 * (1 - peak.malachite)
        colours = np.stack([palette.crest, palette.crest_light, palette.flank, palette.foot, palette.mist])
        colours[:2] += 0.75 * peak.malachite * (palette.flank - colours[:2])
        body = np.stack([np.interp(ramp, MINERAL_STOPS, channel) for channel in colours.T], axis=-1)
        # A fold is lit from the left; the gradient is taken for a peak of 100 pixels, so that size changes nothing.
        relief = np.clip(8 * np.gradient(fold, axis=1) * across.size / 100, -1, 1)
        body = np.clip(body * (1 + 0.10 * relief + 0.06 * pigment)[..., None], 0, 1)
        return body + peak.haze * (0.5 * palette.far + 0.5 * palette.mist - body)

    def texture_strokes(self, peak: Peak, x: NDArray, ridge: NDArray) -> None:
        """Hemp-fibre strokes (cun): lines that start at or below the ridge and fan out down the slope."""
        rng, brush, rise = self.rng, self.brush, peak.base - peak.summit
        count, steps = round(len(x) / (5 * brush)), len(STROKE_SWELL)
        for start in np.linspace(0.06, 0.94, count) + rng.uniform(-0.5, 0.5, count) / max(count, 1):
            column = x[0] + start * (len(x) - 1)
            first = (np.interp(column, x, ridge) - peak.summit) / rise + abs(rng.normal(0, 0.15))
            # Below lies the mist.
            if first > 0.62:
                continue
            descent = first + np.linspace(0, rng.uniform(0.07, 0.28), steps)
            places = peak.centre + (column - peak.centre) * (0.3 + descent) / (0.3 + first)
            places += np.cumsum(rng.normal(0, 0.25, steps)) * brush
            levels = np.maximum(peak.summit + descent * rise, np.interp(places, x, ridge) + 2.5 * brush)
            points, widths = np.stack([places, levels], axis=1), brush * rng.uniform(0.9, 1.7) * STROKE_SWELL
            lit = points + np.array([1.6 * brush, 0])
            self.canvas.line(lit, 2.2 * widths, self.palette.outline, 0.16 * (1 - peak.haze))
            self.canvas.line(points, widths, self.palette.ink, 0.5 * (1 - 0.7 * peak.haze))

    def ridge_trees(self, x: NDArray, ridge: NDArray, lowest: float) -> None:
        """Clumps of small trees on the parts of a ridge above the level lowest."""
        growth = self.noise(0, x / (40 * self.brush))
        for index in range(0, len(x), max(1, round(4.5 * self.brush))):
            if growth[index] < 0.12 or ridge[index] > lowest or self.rng.random() < 0.25:
                continue
            tall = self.brush * self.rng.uniform(2.5, 6.0) * min(1.3, 0.6 + growth[index])
            root = np.array([x[index], ridge[index] + 1.5 * self.brush])
            crown = root + self.rng.uniform((-0.35, -1.1), (0.35, -0.3), (4, 2)) * tall
            self.canvas.line([root, root - (0, 0.8 * tall)], 0.8 * self.brush, self.palette.ink, 0.8)
            self.canvas.dots(crown, 0.55 * tall, self.palette.needle, 0.8)

    def reflection(self) -> None:
        """The mountains upside down in the water, blurred most along their height, broken by level streaks."""
        line, depth = round(WATERLINE * self.height), round(0.22 * self.height)
        mirror = self.canvas.pixels[line - depth : line][::-1]
        mirror = ndimage.gaussian_filter(mirror, (8 * self.brush, 4 * self.brush, 0))
        streaks = self.noise.field(depth, self.width, 16, 1.5 * self.width / self.height, octaves=2)
        fading = np.linspace(1, 0, depth)[:, None]
        self.canvas.lay(np.clip((0.42 + 0.35 * streaks) * fading, 0, 1), mirror, line)

    def shoals(self) -> None:
        """Low sandbanks with groves before the foot of the mountains."""
        rng, brush, palette = self.rng, self.brush, self.palette
        t = np.linspace(-1, 1, 14)
        swell = 1 - t**2
        for _ in range(round(6 * self.width / self.span)):
            x, y = rng.uniform(0.25, 1.0) * self.width, self.height * (WATERLINE + rng.uniform(-0.015, 0.05))
            reach, thickness = brush * rng.uniform(28, 70), brush * rng.uniform(4, 7)
            bank = np.stack([x + reach * t, y + 1.2 * brush * rng.standard_normal(14)], axis=1)
            shore = bank + np.stack([0 * t, 0.5 * thickness * swell], axis=1)
            self.canvas.line(bank, thickness * swell, palette.foot, 0.9)
            self.canvas.line(bank - (0, 0.8 * brush), 0.55 * thickness * swell, palette.flank, 0.55)
            self.canvas.line(shore, 0.9 * brush, palette.ink, 0.5)
            for _ in range(rng.integers(3, 9)):
                self.shoal_tree(np.array([x + reach * rng.uniform(-0.6, 0.6), y]), brush * rng.uniform(8, 15))

    def shoal_tree(self, root: NDArray, tall: float) -> None:
        """A distant tree: a trunk and two layers of leaf dots."""
        leaves = root - (0, 0.8 * tall) + self.rng.uniform((-0.3, -0.3), (0.3, 0.25), (9, 2)) * tall
        self.canvas.line([root, root - (0, tall)], (1.3 * self.brush, 0.7 * self.brush), self.palette.ink, 0.8)
        self.canvas.dots(leaves, 0.22 * tall, self.palette.foliage, 0.75)
        self.canvas.dots(leaves[:5], 0.14 * tall, self.palette.needle, 0.7)

    def ripples(self) -> None:
        """Short wavy lines, longer and higher the nearer they are."""
        rng, t = self.rng, np.linspace(0, 1, 12)
        for _ in range(round(80 * self.width / self.span)):
            near = rng.random()
            x, y = rng.uniform(-0.05, 1) * self.width, self.height * (WATERLINE + 0.05 + 0.2 * near)
            length = self.brush * (14 + 45 * near) * rng.uniform(0.6, 1.5)
            wave = np.sin(np.pi * t * rng.integers(2, 6)) * self.brush * (0.4 + 0.9 * near)
            points = np.stack([x + t * length, y + wave], axis=1)
            self.canvas.line(points, 1.1 * self.brush * np.sin(np.pi * t), self.palette.foliage, 0.4)

    def boat_and_birds(self) -> None:
        """The living things of the open water and the open sky."""
        rng, span, height = self.rng, self.span, self.height
        boat = rng.uniform(0.50, 0.72) * span, rng.uniform(0.86, 0.92) * height
        paint_boat(self.canvas, *boat, 25 * self.brush, self.palette)
        birds = rng.uniform(0.32, 0.38) * span, rng.uniform(0.16, 0.26) * height
        paint_birds(self.canvas, rng, *birds, 8 * self.brush, self.palette)

    def near_shore(self) -> None:
        """A bank in the lower corner: the pavilion and trees stand behind its front hills, which hide their feet."""
        rng, brush, height, palette = self.rng, self.brush, self.height, self.palette
        self.bank(0.0, 0.40, rng.uniform(0.78, 0.82))
        pine, pavilion, maple = rng.choice(SHORE_PLACES) * self.span
        paint_pine(self.canvas, rng, pine, 0.90 * height, rng.uniform(175, 215) * brush, palette)
        paint_pavilion(self.canvas, pavilion, 0.885 * height, 64 * brush, palette)
        paint_pine(self.canvas, rng, pine - 24 * brush, 0.93 * height, rng.uniform(105, 150) * brush, palette)
        paint_leafy_tree(self.canvas, rng, maple, 0.91 * height, rng.uniform(75, 95) * brush, palette)
        self.bank(0.16, 0.28, 0.87)
        self.bank(-0.02, 0.22, 0.86)

    def bank(self, centre: float, half: float, summit: float) -> None:
        """A low hill of the near shore; centre and half width in scene widths, summit in heights."""
        width, malachite = half * self.span, self.rng.uniform(0.5, 1)
        # Its foot lies below the picture, so that it never fades into mist.
        hill = Peak(centre * self.span, summit * self.height, 1.1 * self.height, width, width, 0.9, malachite, 0.0)
        self.peak(hill)

    def seal(self) -> None:
        """The red seal in the corner that the near shore leaves free."""
        size = 28 * self.brush
        paint_seal(self.canvas, self.rng, self.width - 1.3 * size, self.height - 1.3 * size, size, self.palette)

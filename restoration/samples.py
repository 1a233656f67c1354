"""Sample paintings that the package draws itself: mountains-and-water landscapes, and the marks that age leaves.

Everything follows from a palette and a seed: the demo needs no picture file, and its pictures are always the same.
The amounts inside the ageing functions are set by eye, so that a strength of 1 looks like a neglected old painting.
"""

from __future__ import annotations

from numbers import Integral

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray
from scipy import ndimage

from restoration.samples_brush import Noise
from restoration.samples_landscape import PALETTES, landscape, smoothstep

# Pictures are painted this much larger and averaged: the finest texture strokes are half a pixel wide.
SUPERSAMPLING = 2
# Below this a pine is a handful of pixels and the composition cannot be read.
SMALLEST_SIDE = 64
# Seeds of the painting to be faded and of its reference: mirrored compositions, both with the crest colour well spread.
SAMPLE_SEEDS = {"blue_green": (16, 7), "ochre": (8, 3)}

# Rec. 709 weights of the brightness that is kept when colour goes.
BRIGHTNESS = np.array([0.2126, 0.7152, 0.0722])
# What an old resin varnish lets through in red, green and blue.
VARNISH = np.array([0.89, 0.81, 0.67])
# The brown of mould spots and of the edges that water leaves.
STAIN = np.array([0.46, 0.33, 0.20])


def draw_painting(palette: str, seed: int, height: int = 512, width: int = 768) -> NDArray[np.uint8]:
    """Draw a mountains-and-water painting on silk.

    Args:
        palette: "blue_green" (azurite and malachite mountains, honey-coloured silk) or "ochre" (ink, light crimson and
            pale ochre on paper-white silk).
        seed: not negative; it decides composition, brushwork and silk: same palette, seed and size, same bytes.
        height: pixels, at least 64.
        width: pixels, at least 64; from 2.25 times the height on, more mountains are added.

    Returns:
        uint8 RGB [height,width,3].

    Raises:
        ValueError: an unknown palette, a seed or side that is not a whole number or is too small.
    """
    _check_palette(palette)
    _check_whole_number("seed", seed, 0)
    _check_whole_number("height", height, SMALLEST_SIDE)
    _check_whole_number("width", width, SMALLEST_SIDE)

    rng = np.random.default_rng([list(PALETTES).index(palette), seed])
    mirrored = rng.random() < 0.5
    pixels = landscape(PALETTES[palette], rng, SUPERSAMPLING * height, SUPERSAMPLING * width)
    pixels = pixels.reshape(height, SUPERSAMPLING, width, SUPERSAMPLING, 3).mean(axis=(1, 3))
    pixels = pixels[:, ::-1] if mirrored else pixels
    return _to_bytes(pixels * _weave(rng, height, width)[..., None])


def fade(painting: NDArray[np.uint8], seed: int, strength: float = 1.0) -> NDArray[np.uint8]:
    """Age a painting: lost chroma (most in blue and green), a veil of dust, yellowed varnish, stains, worn silk.

    Args:
        painting: uint8 RGB [H,W,3], of any size.
        seed: not negative; it decides where varnish, stains and wear lie.
        strength: 0 changes nothing, 1 is a badly faded painting; all marks grow in step.

    Returns:
        uint8 RGB [H,W,3].

    Raises:
        ValueError: another dtype or shape, an empty painting, a bad seed, a strength outside [0,1].
    """
    painting = np.asarray(painting)
    if painting.dtype != np.uint8 or painting.ndim != 3 or painting.shape[2] != 3 or painting.size == 0:
        raise ValueError(f"painting must be uint8 [H,W,3] and not empty, got {painting.dtype} {list(painting.shape)}")
    _check_whole_number("seed", seed, 0)
    if not 0 <= strength <= 1:
        raise ValueError(f"strength must lie in [0,1], got {strength}")

    rng = np.random.default_rng(seed)
    noise = Noise(rng)
    pixels = _lose_chroma(painting / 255, strength)
    pixels = _gather_dust(pixels, noise, strength)
    pixels = _yellow(pixels, noise, strength)
    pixels = _stain(pixels, rng, noise, strength)
    return _to_bytes(_wear(pixels, rng, noise, strength))


def sample_pair(
    palette: str = "blue_green", height: int = 512, width: int = 768
) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """The demo's faded painting and, of another composition in the same colours, its well-kept reference.

    Sizes and errors are those of draw_painting.
    """
    _check_palette(palette)
    faded_seed, reference_seed = SAMPLE_SEEDS[palette]
    painting = draw_painting(palette, faded_seed, height, width)
    return fade(painting, faded_seed), draw_painting(palette, reference_seed, height, width)


def _check_palette(palette: str) -> None:
    if palette not in PALETTES:
        raise ValueError(f"palette must be one of {', '.join(PALETTES)}, got {palette!r}")


def _check_whole_number(name: str, value: int, least: int) -> None:
    if not isinstance(value, Integral) or value < least:
        raise ValueError(f"{name} must be a whole number of at least {least}, got {value!r}")


def _to_bytes(pixels: NDArray) -> NDArray[np.uint8]:
    return np.rint(np.clip(pixels, 0, 1) * 255).astype(np.uint8)


def _weave(rng: Generator, height: int, width: int) -> NDArray:
    """Brightness [height,width], near 1, of silk threads of uneven thickness both ways, and of pigment grain."""
    weave = np.ones((height, width))
    for amount, spread in ((0.008, (14, 0.4)), (0.008, (0.4, 14)), (0.010, (0.6, 0.6))):
        threads = ndimage.gaussian_filter(rng.standard_normal((height, width)), spread)
        weave += amount * threads / threads.std()
    return weave


def _lose_chroma(pixels: NDArray, strength: float) -> NDArray:
    """Bleach: azurite and malachite, which are blue or green rather than red, lose most."""
    coolness = np.clip((pixels[..., 1:].max(axis=-1) - pixels[..., 0]) / 0.25, 0, 1)
    lost = strength * (0.52 + 0.22 * coolness)
    grey = pixels @ BRIGHTNESS
    return pixels + lost[..., None] * (grey[..., None] - pixels)


def _gather_dust(pixels: NDArray, noise: Noise, strength: float) -> NDArray:
    """Lower the contrast by a veil in the picture's own middle tone, thicker in places."""
    height, width = pixels.shape[:2]
    veil = 0.42 + 0.10 * noise.field(height, width, 3, 3 * width / height, octaves=2)
    return pixels + strength * veil[..., None] * (np.median(pixels, axis=(0, 1)) - pixels)


def _yellow(pixels: NDArray, noise: Noise, strength: float) -> NDArray:
    """Look through varnish: brushed on upright, so it lies in upright streaks, and thicker towards the edges."""
    height, width = pixels.shape[:2]
    y, x = np.linspace(-1, 1, height)[:, None], np.linspace(-1, 1, width)
    clouds = noise.field(height, width, 2, 2 * width / height, octaves=3)
    streaks = noise.field(height, width, 1.5, 30 * width / height)
    thickness = np.clip(0.8 + 0.18 * clouds + 0.06 * streaks + 0.12 * (x**2 + y**2), 0, None)
    return pixels * VARNISH ** (strength * thickness[..., None])


def _stain(pixels: NDArray, rng: Generator, noise: Noise, strength: float) -> NDArray:
    """Mould spots (foxing), and one spill of water that dried with a darker edge."""
    height, width = pixels.shape[:2]
    y, x = np.arange(height)[:, None], np.arange(width)
    unit = min(height, width)
    stain = np.zeros((height, width))
    for _ in range(36):
        spot = np.hypot(y - rng.uniform(0, height), x - rng.uniform(0, width)) / (unit * rng.uniform(0.002, 0.012))
        stain = np.maximum(stain, rng.uniform(0.1, 0.4) * np.exp(-(spot**2)))

    spill = np.hypot(y - rng.choice([0.05, 0.95]) * height, x - rng.uniform(0.2, 0.8) * width) / (0.24 * unit)
    spill += 0.18 * noise.field(height, width, 5, 5 * width / height, octaves=3)
    # What the water carried settled just inside the edge where it stopped.
    inside = smoothstep(0.0, 0.012, 1 - spill)
    tide = inside * (0.04 + 0.15 * np.exp(-np.abs(1 - spill) / 0.035))
    return pixels + strength * np.maximum(stain, tide)[..., None] * (STAIN - pixels)


def _wear(pixels: NDArray, rng: Generator, noise: Noise, strength: float) -> NDArray:
    """Threads that lost their paint, in patches, and upright creases from rolling, soiled and cracked in places."""
    height, width = pixels.shape[:2]
    ground = np.percentile(pixels, 80, axis=(0, 1))
    patches = smoothstep(0.0, 0.8, noise.field(height, width, 4, 4 * width / height, octaves=2))
    threads = ndimage.gaussian_filter(rng.standard_normal((height, width)), (0.4, 5))
    lost = 0.45 * patches * smoothstep(1.5, 2.4, threads / max(threads.std(), 1e-12))
    pixels = pixels + strength * lost[..., None] * (ground - pixels)

    x = np.arange(width)
    for place in rng.uniform(0.05, 0.95, 5) * width:
        wander = 0.003 * width * noise(np.linspace(0, 3, height), 0.0, octaves=3)
        distance = np.abs(x - place - wander[:, None])
        gaps = smoothstep(-0.3, 0.3, noise(np.linspace(0, 9, height), 0.0))[:, None]
        crease = 0.34 * gaps * np.clip(1.1 - distance, 0, 1) + 0.06 * np.exp(-((distance / (0.012 * width)) ** 2))
        pixels = pixels + strength * crease[..., None] * (STAIN - pixels)
    return pixels

"""From the colours of a picture's file to sRGB: by its ICC profile, or by what its EXIF says where it holds none."""

from __future__ import annotations

import functools
import io
import logging
import struct
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageCms

from restoration.errors import UserError, reason
from restoration.matrix_profile import MatrixProfile, OtherProfileError, matrix_profile

logger = logging.getLogger(__name__)

# Of Adobe RGB (1998): the curve's power, and the primaries' XYZ, adapted to D50 as ICC profiles want them.
_ADOBE_POWER = 563 / 256
_ADOBE_PRIMARIES = {
    b"r": (0.60974, 0.31111, 0.01947),
    b"g": (0.20528, 0.62567, 0.06087),
    b"b": (0.14919, 0.06322, 0.74457),
}
_D50 = (0.9642, 1.0, 0.8249)

# Of files whose pixels are RGB, by a palette or by a formula of their own, once they are read.
_MODES_OF_RGB = ("RGB", "RGBA", "P", "PA", "YCbCr")


def assume_declared_profile(image: Image.Image, path: Path) -> None:
    """Gives a picture without a profile that of Adobe RGB where its EXIF data names it. While its file is open."""
    if image.mode in _MODES_OF_RGB and not image.info.get("icc_profile") and _says_adobe_rgb(image):
        logger.warning("%s: holds no profile; its colours are taken for Adobe RGB, as its EXIF data says", path)
        image.info["icc_profile"] = _adobe_rgb()


def to_srgb(image: Image.Image, path: Path) -> tuple[Image.Image, bytes | None]:
    """The picture (of a mode without alpha or palette) in RGB, and the sRGB profile to write with it, or None."""
    profile = image.info.get("icc_profile")
    if not profile:
        if image.mode == "CMYK":
            logger.warning("%s: is in CMYK, but holds no profile; its colours are a guess", path)
        return _to_rgb(image, path), None
    try:
        transform = _transform_to_srgb(profile, image.mode)
        if transform is None:
            return image, profile
        return _applied(transform, image), _srgb().tobytes()
    # OSError: not a profile; PyCMSError: one for another kind of picture, such as grey within an RGB file.
    except (OSError, ImageCms.PyCMSError) as error:
        logger.warning("%s: its colour profile is ignored (%s)", path, reason(error))
        return _to_rgb(image, path), None


def deep_to_srgb(values: np.ndarray, image: Image.Image) -> np.ndarray | None:
    """`to_srgb` of the same picture with 16 bits a channel, uint16 [H, W, 1 or 3]: [H, W, 3].

    None where its profile has tables, or a black that is not dark: with those littlecms, which knows how, takes 8 bits.
    """
    profile = image.info.get("icc_profile")
    if profile:
        with suppress(OSError, ImageCms.PyCMSError):  # of those `to_srgb` has told
            if _transform_to_srgb(profile, image.mode) is not None:
                curves = _deep_profile(profile, image.mode)
                return None if curves is None else curves.to_srgb(values)
    return np.broadcast_to(values, (*values.shape[:2], 3))


def _applied(transform: ImageCms.ImageCmsTransform, image: Image.Image) -> Image.Image:
    if image.mode != "L":
        return ImageCms.applyTransform(image, transform)
    # Of all shades once: the same in a fraction of the time.
    shades = ImageCms.applyTransform(Image.fromarray(np.arange(256, dtype=np.uint8)[None]), transform)
    return Image.merge("RGB", [image.point(list(channel.tobytes())) for channel in shades.split()])


def _to_rgb(image: Image.Image, path: Path) -> Image.Image:
    if image.mode == "LAB":
        return _applied(_transform_to_srgb(_lab(), image.mode), image)
    try:
        return image.convert("RGB")
    except ValueError:
        raise UserError(f"{path}: colour mode {image.mode} cannot be read; save it as RGB") from None


def _says_adobe_rgb(image: Image.Image) -> bool:
    """As cameras do that embed no profile: those that keep to DCF 2.0 by R03, others by 2."""
    with suppress(Exception):  # damaged EXIF data raises nearly anything, and is warned of where it is kept
        exif = image.getexif()
        if exif.get_ifd(ExifTags.IFD.Exif).get(ExifTags.Base.ColorSpace) == 2:
            return True
        # Last: Pillow before 13 raises KeyError where a file has no such directory.
        return exif.get_ifd(ExifTags.IFD.Interop).get(ExifTags.Interop.InteropIndex) == "R03"
    return False


@functools.cache
def _srgb() -> ImageCms.ImageCmsProfile:
    return ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))


@functools.cache
def _lab() -> bytes:
    return ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()


@functools.cache
def _adobe_rgb() -> bytes:
    """An ICC profile of version 2.4: a header of 128 bytes, the table of its tags, and these one after the other."""
    tags = {name + b"XYZ": _xyz_tag(values) for name, values in _ADOBE_PRIMARIES.items()}
    # One number, of 8 bits before the point and 8 after it, is a power; two bytes more align what follows.
    curve = struct.pack(">4s4xIH2x", b"curv", 1, round(_ADOBE_POWER * 256))
    tags |= {b"wtpt": _xyz_tag(_D50)} | {name + b"TRC": curve for name in _ADOBE_PRIMARIES}

    table, content = struct.pack(">I", len(tags)), b""
    for name, tag in tags.items():
        table += struct.pack(">4sII", name, 128 + 4 + 12 * len(tags) + len(content), len(tag))
        content += tag
    size = 128 + len(table) + len(content)
    kind = struct.pack(">I4xI4s4s4s12x4s", size, 0x02400000, b"mntr", b"RGB ", b"XYZ ", b"acsp")
    return (kind + bytes(28) + _fixed(_D50)).ljust(128, b"\0") + table + content


def _xyz_tag(values: Sequence[float]) -> bytes:
    return b"XYZ \0\0\0\0" + _fixed(values)


def _fixed(values: Sequence[float]) -> bytes:
    """Numbers with 16 bits after the point."""
    return struct.pack(f">{len(values)}i", *(round(value * 65_536) for value in values))


@functools.lru_cache(maxsize=16)  # pictures of a collection share their profile, and crops are read again and again
def _transform_to_srgb(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """None where pixels are in sRGB already, and stay as they are to the last bit.

    That is where no colour moves by more than a step of 8 bits: names tell little, some of linear light say sRGB, too.
    """
    source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    # Left to itself littlecms puts a coarse table in place of Lab, CMYK, grey and a profile's own table: Lab is then up
    # to 40 steps wrong, a wide RGB 20. What it does to RGB by curves and primaries is right to a step, and takes a
    # tenth of the time.
    by_curves = mode == "RGB" and source.profile.is_matrix_shaper and not _has_table(source)
    flags = ImageCms.Flags.NONE if by_curves else ImageCms.Flags.NOOPTIMIZE
    transform = ImageCms.buildTransform(source, _srgb(), mode, "RGB", flags=flags)
    if mode != "RGB":
        return transform
    colours = _sampled_colours()
    moved = np.asarray(ImageCms.applyTransform(Image.fromarray(colours), transform))
    return None if np.abs(moved.astype(int) - colours).max() <= 1 else transform


def _has_table(profile: ImageCms.ImageCmsProfile) -> bool:
    """Whether littlecms would read colours by one, curves and primaries or not."""
    as_source, *_ = profile.profile.clut[ImageCms.Intent.PERCEPTUAL]
    return as_source


def _sampled_colours() -> np.ndarray:
    """Of all over RGB, uint8 [H, W, 3]."""
    steps = np.linspace(0, 255, 18).round().astype(np.uint8)
    return np.stack(np.meshgrid(steps, steps, steps), axis=-1).reshape(-1, len(steps), 3)


@functools.lru_cache(maxsize=4)  # of 768 KB each
def _deep_profile(profile: bytes, mode: str) -> MatrixProfile | None:
    """None where the profile has tables, or littlecms, which makes a grey black dark, differs by more than a step."""
    try:
        curves = matrix_profile(profile)
    except OtherProfileError:
        return None
    colours = _sampled_colours() if mode == "RGB" else np.arange(256, dtype=np.uint8)[None]
    expected = np.asarray(_applied(_transform_to_srgb(profile, mode), Image.fromarray(colours)))
    deep = colours.astype(np.uint16).reshape(*colours.shape[:2], -1) * 257
    found = curves.to_srgb(deep) / 257
    return curves if np.abs(found - expected).max() <= 1.5 else None

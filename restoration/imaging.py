"""Reading and writing pictures: files on one side, float tensors [3, H, W] in [0, 1] on the other.

Every picture is upright and in sRGB once it is read. Where its file has 16 bits a channel, so has what is written in a
format that can hold them.
"""

from __future__ import annotations

import io
import logging
import math
import os
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import ExifTags, Image, PngImagePlugin

from restoration.decoding import decode, reading
from restoration.deep import DEEP_FORMATS, encode_deep
from restoration.errors import UnwritableError, UserError, reason
from restoration.files import check_replaceable, write_whole
from restoration.metadata import COMMENT, JPEG_BYTES_BESIDE_IPTC, descriptive_exif, jpeg_with_iptc

logger = logging.getLogger(__name__)

_WRITABLE_FORMATS = {
    ".png": "PNG",
    ".jpg": "JPEG",
    ".jpeg": "JPEG",
    ".tif": "TIFF",
    ".tiff": "TIFF",
    ".webp": "WEBP",
}
# Lossless where the format can be; TIFF uncompressed, since Pillow fails to put EXIF data beside libtiff's compression.
# JPEG 95 without chroma subsampling: colour is what this program is about.
_SAVE_OPTIONS = {
    "PNG": {},
    "JPEG": {"quality": 95, "subsampling": "4:4:4"},
    "TIFF": {},
    "WEBP": {"lossless": True, "exact": True},
}
# The formats' own limits (libjpeg's JPEG_MAX_DIMENSION, WebP's 14-bit sizes): a long handscroll exceeds them.
_LONGEST_SIDE = {"JPEG": 65_500, "WEBP": 16_383}
_FORMATS_WITH_IPTC = ("JPEG", "TIFF")
# JPEG has whole dots an inch in 16 bits, PNG whole dots a metre in 31, TIFF fractions of numbers of 32 bits, WebP none.
_DPI_LIMITS = {
    "JPEG": (1, 65_535),
    "PNG": (0.1, 2**31 * 0.025),
    "TIFF": (1e-3, 2**32 - 1),
    "WEBP": (math.inf, math.inf),
}
# Bytes of notes in a JPEG: a marker's 16-bit length counts itself, and what XMP and IPTC begin with.
_LONGEST_JPEG_NOTES = {
    "exif": 65_533,
    "xmp": 65_533 - len(b"http://ns.adobe.com/xap/1.0/\0"),
    "iptc": 65_533 - JPEG_BYTES_BESIDE_IPTC,
    "comment": 65_533,
}
_FORMATS_OF_LONG_NOTES = {"iptc": ".tif", "comment": ".png"}  # of the others all


@dataclass(frozen=True)
class Picture:
    """An upright picture and what its file said about it.

    ``rgb`` is float32 [3, H, W] in [0, 1], sRGB; a wholly transparent pixel has the colour of the nearest that is not.
    ``alpha`` is uint8 [H, W] or None; ``exif`` and ``xmp`` hold what describes the painting and its photograph,
    without orientation and sizes; ``iptc`` the datasets of IPTC-IIM, which JPEG and TIFF files may have; ``texts`` what
    a PNG says by keywords, and as "Comment" what a JPEG does; ``icc_profile`` is None or an sRGB profile; ``dpi`` is
    dots an inch (x, y); ``bits`` are those of a channel, 8 or 16.
    """

    rgb: torch.Tensor
    alpha: torch.Tensor | None = None
    exif: bytes | None = None
    xmp: bytes | None = None
    iptc: bytes | None = None
    texts: dict[str, str] | None = None
    icc_profile: bytes | None = None
    dpi: tuple[float, float] | None = None
    bits: int = 8

    @property
    def visible(self) -> torch.Tensor | None:
        """Bool [H, W]: pixels that can be seen at all; None where that is every one of them, or none."""
        seen = None if self.alpha is None else self.alpha > 0
        return seen if seen is not None and seen.any() and not seen.all() else None

    @property
    def comment(self) -> bytes | None:
        """Of the texts the one that JPEG has a place for."""
        text = (self.texts or {}).get(COMMENT)
        return None if text is None else text.encode()


def read_image(path: str | os.PathLike, *, deep: bool = True) -> Picture:
    """Read a PNG, JPEG, TIFF, WebP or BMP file; of several pages the first, and a warning.

    Grey, palette and CMYK pictures become RGB, an embedded ICC profile is applied, the EXIF orientation too. Without
    ``deep``, 16 bits a channel are read as 8, as by ``read_rgb``.
    Raises UserError, naming the file, where it is missing, a folder, empty, not an image, damaged, truncated, has
    float or 32-bit pixels, does not fit the memory, or has more pixels than Pillow's guard against decompression bombs
    lets through.
    """
    path = Path(path)
    with reading(path):
        decoded = decode(path, deep=deep)
        return Picture(
            rgb=from_pillow(decoded.rgb) if decoded.deep is None else _shares(decoded.deep),
            alpha=None if decoded.alpha is None else torch.from_numpy(np.array(decoded.alpha)),
            exif=decoded.exif,
            xmp=decoded.xmp,
            iptc=decoded.iptc,
            texts=decoded.texts,
            icc_profile=decoded.icc_profile,
            dpi=decoded.dpi,
            bits=8 if decoded.deep is None else 16,
        )


def read_rgb(path: str | os.PathLike) -> Image.Image:
    """The pixels of ``read_image`` alone, in 8 bits, as a Pillow picture of a third of the memory; the same errors.

    Of colour with 16 bits a channel Pillow keeps the high byte; grey is rounded.
    """
    path = Path(path)
    with reading(path):
        return decode(path).rgb


def check_writable(path: str | os.PathLike, *, force: bool = False, like: Picture | None = None) -> None:
    """Raise the UserError that ``write_image`` would raise, to be called before hours of work rather than after.

    ``like``, where it is known already, is the picture whose size, alpha and notes the written one will have.
    """
    path = Path(path)
    if path.suffix.lower() not in _WRITABLE_FORMATS:
        raise UserError(f"{path}: output must end in one of {', '.join(_WRITABLE_FORMATS)}, got '{path.suffix}'")
    if not path.parent.is_dir():
        raise UnwritableError(f"{path}: its folder {path.parent} does not exist")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise UnwritableError(f"{path}: its folder {path.parent} is not writable")
    check_replaceable(path, replace=force)
    if like is not None:
        check_format_holds(path, like.rgb.shape[-2:], like)


def write_image(
    path: str | os.PathLike, rgb: torch.Tensor, like: Picture | None = None, *, force: bool = False
) -> None:
    """Write ``rgb`` (float [3, H, W], clamped to [0, 1], rounded to 8 or 16 bits) in the format of the path's suffix.

    Alpha, EXIF, XMP, IPTC, texts, ICC profile and resolution are those of ``like``. PNG and TIFF hold 16 bits a channel
    where ``like`` has them. WebP has no place for the resolution, JPEG none for more than 65,535 dots an inch; IPTC
    needs JPEG or TIFF, texts need PNG, but for JPEG's comment: a warning names what is left out. The file appears whole
    or not at all, and replaces another only with ``force``. PNG, TIFF and WebP are lossless.
    Raises UnwritableError where the file cannot be written, UserError where another is there, or where JPEG would lose
    transparency or notes; ValueError where rgb has another shape than [3, H, W], another size than the alpha of
    ``like``, or a value that is not finite.
    """
    path = Path(path)
    _check_pixels(rgb, like)
    alpha = None if like is None else like.alpha
    check_writable(path, force=force)
    check_format_holds(path, rgb.shape[-2:], like)

    image_format = _WRITABLE_FORMATS[path.suffix.lower()]
    options = dict(_SAVE_OPTIONS[image_format])
    if like is not None:
        options |= _notes_options(like, image_format)
        _warn_of_lost_notes(path, image_format, like)

    try:
        # By way of memory: Pillow does not notice where the disk takes only a part of what its libraries write.
        pixels = _pixels(rgb, None if image_format == "JPEG" else alpha, _bits_in(image_format, like))
        if pixels.dtype == np.uint16:
            content = encode_deep(pixels, image_format, options)
        else:
            encoded = io.BytesIO()
            Image.fromarray(pixels).save(encoded, format=image_format, **options)
            content = encoded.getbuffer()
            if image_format == "JPEG" and like is not None and like.iptc is not None:
                content = jpeg_with_iptc(encoded.getvalue(), like.iptc)
    except (OSError, ValueError, RuntimeError, OverflowError, struct.error) as error:
        raise UnwritableError(f"{path}: cannot be written ({reason(error)})") from error
    write_whole(path, content, replace=force)


def _bits_in(image_format: str, like: Picture | None) -> int:
    return 16 if like is not None and like.bits == 16 and image_format in DEEP_FORMATS else 8


def _pixels(rgb: torch.Tensor, alpha: torch.Tensor | None, bits: int) -> np.ndarray:
    """What a file of 8 or 16 bits holds of float [3, H, W] and uint8 [H, W]: [H, W, 3 or 4]."""
    largest, depth = 2**bits - 1, np.uint8 if bits == 8 else np.uint16
    steps = rgb.detach().clamp(0, 1).mul(largest).round()
    pixels = steps.permute(1, 2, 0).cpu().numpy().astype(depth, order="C")
    if alpha is None:
        return pixels
    return np.concatenate([pixels, alpha.cpu().numpy()[..., None].astype(depth) * depth(largest // 255)], axis=2)


def _warn_of_lost_notes(path: Path, image_format: str, picture: Picture) -> None:
    if _bits_in(image_format, picture) < picture.bits:
        logger.warning("%s: %s holds 8 bits a channel; .png and .tif would keep the picture's 16", path, image_format)
    if picture.iptc is not None and image_format not in _FORMATS_WITH_IPTC:
        logger.warning("%s: %s has no place for IPTC data, which .jpg and .tif would keep", path, image_format)
    if _dpi_in(image_format, picture) != picture.dpi:
        logger.warning("%s: %s has no place for a resolution of %g x %g dots an inch", path, image_format, *picture.dpi)
    kept = {"PNG": picture.texts, "JPEG": (COMMENT,)}.get(image_format, ())
    if lost := [keyword for keyword in picture.texts or () if keyword not in kept]:
        logger.warning("%s: %s has no place for %s, which .png would keep", path, image_format, ", ".join(lost))


def _dpi_in(image_format: str, picture: Picture) -> tuple[float, float] | None:
    """The picture's resolution where the format can hold it, else None."""
    least, largest = _DPI_LIMITS[image_format]
    fits = picture.dpi is not None and all(least <= value <= largest for value in picture.dpi)
    return picture.dpi if fits else None


def _notes_options(picture: Picture, image_format: str) -> dict[str, object]:
    """What Pillow's save takes to put the picture's notes into a file of that format."""
    names = ("exif", "xmp", "icc_profile")
    notes = {name: getattr(picture, name) for name in names} | {"dpi": _dpi_in(image_format, picture)}
    options = {name: value for name, value in notes.items() if value is not None}
    if image_format == "PNG":
        options["pnginfo"] = PngImagePlugin.PngInfo()
        if "xmp" in options:
            options["pnginfo"].add_itxt("XML:com.adobe.xmp", options.pop("xmp").decode())
        for keyword, text in (picture.texts or {}).items():
            options["pnginfo"].add_text(keyword, text)
    if image_format == "JPEG" and picture.comment is not None:
        options["comment"] = picture.comment
    if image_format == "TIFF":
        tags = {}
        if "exif" in options:
            # Given as bytes, Pillow would read the text once more, and write it as it does.
            exif = Image.Exif()
            exif.load(options.pop("exif"))
            tags |= descriptive_exif(exif)
        if "xmp" in options:
            tags[ExifTags.Base.XMLPacket] = options.pop("xmp")
        if picture.iptc is not None:
            tags[ExifTags.Base.IPTCNAA] = picture.iptc
        options["tiffinfo"] = tags
    return options


def to_pillow(rgb: torch.Tensor) -> Image.Image:
    """Float [3, H, W] in [0, 1] (clamped), on any device, as an RGB picture of the nearest of 256 steps."""
    return Image.fromarray(_pixels(rgb, None, bits=8))


def from_pillow(image: Image.Image) -> torch.Tensor:
    """An RGB picture as float32 [3, H, W] in [0, 1]."""
    return _shares(np.asarray(image))


def _shares(pixels: np.ndarray) -> torch.Tensor:
    """uint8 or uint16 [H, W, 3] as float32 [3, H, W] in [0, 1]."""
    # In NumPy, not torch: loader processes must not start a team of threads for every small crop.
    values = pixels.transpose(2, 0, 1).astype(np.float32, order="C")
    return torch.from_numpy(np.divide(values, np.iinfo(pixels.dtype).max, out=values))


def _check_pixels(rgb: torch.Tensor, like: Picture | None) -> None:
    if rgb.ndim != 3 or rgb.shape[0] != 3 or not rgb.is_floating_point() or rgb.numel() == 0:
        raise ValueError(f"rgb must be a float tensor [3, H, W], got {rgb.dtype} {list(rgb.shape)}")
    if not torch.isfinite(rgb).all():
        raise ValueError("rgb must be finite, got NaN or Inf")
    if like is not None and like.alpha is not None and like.alpha.shape != rgb.shape[-2:]:
        raise ValueError(f"rgb must have the size of like.alpha, {list(like.alpha.shape)}, got {list(rgb.shape[-2:])}")


def check_format_holds(path: Path, size: Sequence[int], like: Picture | None) -> None:
    """Raise the UserError that ``write_image`` would raise where the suffix's format cannot hold such a picture."""
    image_format = _WRITABLE_FORMATS[path.suffix.lower()]
    longest = _LONGEST_SIDE.get(image_format, math.inf)
    if max(size) > longest:
        raise UserError(
            f"{path}: {image_format} holds at most {longest} pixels a side, got {max(size)}; use .png or .tif"
        )
    if image_format != "JPEG" or like is None:
        return
    if like.alpha is not None and bool((like.alpha < 255).any()):
        raise UserError(f"{path}: JPEG would lose the picture's transparency; use .png, .tif or .webp")
    for name, longest in _LONGEST_JPEG_NOTES.items():
        length = len(getattr(like, name) or b"")
        if length > longest:
            raise UserError(
                f"{path}: JPEG holds at most {longest} bytes of {name.upper()} data, got {length}; use "
                + _FORMATS_OF_LONG_NOTES.get(name, ".png, .tif or .webp")
            )

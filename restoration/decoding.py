"""From a picture's file to upright pixels in sRGB, by Pillow, and to what the file says beside them."""

from __future__ import annotations

import logging
import math
import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import ExifTags, Image, ImageOps, PngImagePlugin, UnidentifiedImageError
from scipy.ndimage import distance_transform_edt

from restoration.colour import assume_declared_profile, deep_to_srgb, to_srgb
from restoration.deep import DEEP, DEEP_FORMATS, PLANES_APART, low_bytes, raw_modes
from restoration.errors import UserError, reason
from restoration.metadata import descriptive_exif, descriptive_xmp, has_extended_xmp, iptc, iptc_is_cut, texts

logger = logging.getLogger(__name__)

READABLE_SUFFIXES = (".png", ".jpg", ".jpeg", ".jfif", ".tif", ".tiff", ".webp", ".bmp")
# Pillow also opens formats that run outside programs (EPS); only these are let in.
_READABLE_FORMATS = ("PNG", "JPEG", "TIFF", "WEBP", "BMP")
# A JPEG that holds several has one photograph, and previews or depths of it.
_FORMATS_OF_PAGES = ("PNG", "TIFF", "WEBP")

# Profiles with tables, and reports on a painting's condition, exceed the 1 MB that Pillow lets a chunk of a PNG have.
# Against what unpacks without end it has a limit for all of them together, too.
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY

# Values of TIFF's tags, and the name under which a picture carries what they say of its grey.
_NOT_COMPRESSED, _WHITE_IS_ZERO, _SIGNED, _COPY_OR_MASK = 1, 0, 2, 0b101
_TIFF_RANGE = "range of a TIFF file's grey"
_HAS_16_BITS = "has 16 bits a channel"
_IS_GREY = "is grey, whatever its mode"
_TIFF_NOTES = {
    "dpi": ExifTags.Base.XResolution,
    "icc_profile": ExifTags.Base.InterColorProfile,
    "xmp": ExifTags.Base.XMLPacket,
}
_BIG_ENDIAN_BIGTIFF = b"MM\0+"
_TIFF_BEGINNINGS = (b"II*\0", b"MM\0*", b"II+\0", _BIG_ENDIAN_BIGTIFF)

# What Pillow tells of a picture in bytes and numbers.
_NEVER_TEXTS = ("dpi", "icc_profile", "photoshop", "transparency", "xmp")

# Of 8 bits, by Pillow's name of a PNG's grey of fewer.
_STEP_OF_GREY = {"L;2": 85, "L;4": 17}

# As Pillow names a JPEG file of one picture, and one of several.
_JPEG_FORMATS = ("JPEG", "MPO")

# Units of a resolution: those of a JPEG's header, and EXIF's in dots an inch.
_JFIF_UNITS, _DOTS_AN_INCH = (1, 2), {2: 1.0, 3: 2.54}
_TURNED_ON_ITS_SIDE = (5, 6, 7, 8)  # of EXIF's orientations


@dataclass(frozen=True)
class Decoded:
    """An upright picture: RGB in sRGB, alpha of mode L, and notes as `imaging.Picture` has them.

    Pixels that nobody sees, of alpha 0, have the colour of the nearest that can be seen. ``deep`` is uint16 [H, W, 3],
    the same in 16 bits a channel, where they were asked for and the file has them.
    """

    rgb: Image.Image
    deep: np.ndarray | None
    alpha: Image.Image | None
    exif: bytes | None
    xmp: bytes | None
    iptc: bytes | None
    texts: dict[str, str] | None
    icc_profile: bytes | None
    dpi: tuple[float, float] | None


def decode(path: Path, *, deep: bool = False) -> Decoded:
    """To be called within `reading`; with it, raises UserError as `imaging.read_image` says."""
    image = _open(path)
    upright, exif = _upright(image, path)
    colours, alpha = _without_alpha(upright, path)
    rgb, icc_profile = to_srgb(colours, path)
    deep_rgb = _deep_rgb(image, upright, colours, path) if deep else None
    if alpha is not None and (places := _nearest_seen(alpha)) is not None:
        rgb = Image.fromarray(np.asarray(rgb)[places])
        deep_rgb = None if deep_rgb is None else deep_rgb[places]
    return Decoded(
        rgb,
        deep_rgb,
        alpha,
        exif,
        xmp=_xmp(image, path),
        iptc=_iptc(image, path),
        texts=texts(image),
        icc_profile=icc_profile,
        dpi=_resolution(upright),
    )


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """What the system refuses becomes a UserError that names the file."""
    try:
        yield
    except IsADirectoryError:
        raise UserError(f"{path}: is a folder, not an image") from None
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({reason(error)})") from error
    except MemoryError as error:
        raise UserError(f"{path}: does not fit this computer's memory; reduce it") from error


def _open(path: Path) -> Image.Image:
    """The fully decoded picture, in the mode and the orientation of its file."""
    status = os.stat(path)
    if not (stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode)):  # opened, a pipe would wait for a writer
        raise UserError(f"{path}: is a pipe or a device, must be a file")
    with open(path, "rb") as file:
        if status.st_size == 0:
            raise UserError(f"{path}: is an empty file (0 bytes)")
        with _named_damage(file, path):
            image = Image.open(file, formats=_READABLE_FORMATS)
            pages = _pages(image, path)
            _load(image, pages, path)
    if len(pages) > 1:
        logger.warning("%s: holds %d pictures, of which only the first is read", path, len(pages))
    elif not pages and _is_copy_or_mask(image):
        logger.warning("%s: is read as the reduced copy that it says it is; no other picture is found in it", path)
    return image


@contextmanager
def _named_damage(file: BinaryIO, path: Path) -> Iterator[None]:
    """What Pillow makes of a file that it cannot read becomes a UserError."""
    try:
        yield
    except UnidentifiedImageError:
        raise UserError(f"{path}: {_unidentified(file)}") from None
    except Image.DecompressionBombError as error:
        raise UserError(f"{path}: has too many pixels to be read safely ({reason(error)})") from None
    except (UserError, MemoryError):
        raise
    # Pillow's decoders answer damaged bytes with nearly any exception: OSError, SyntaxError, struct.error and more.
    except Exception as error:
        raise UserError(f"{path}: is damaged or truncated ({reason(error)})") from error


def _load(image: Image.Image, pages: Sequence[int], path: Path) -> None:
    """Decodes the first of the pages, with what its format would have Pillow get wrong put right."""
    if image.format == "TIFF":
        if pages:
            image.seek(pages[0])
        _check_tiff(image, path)
    if image.format == "PNG":
        _drop_texts_named_like_notes(image)
        _fit_transparent_colour(image)
    image.info[_HAS_16_BITS] = image.format in DEEP_FORMATS and any(DEEP in mode for mode in raw_modes(image))
    image.info[_IS_GREY] = "LA;16B" in raw_modes(image)  # which Pillow opens as RGBA
    image.load()
    _drop_texts_named_like_notes(image)  # those that a PNG has behind its pixels
    if image.format in _JPEG_FORMATS:
        _take_declared_resolution(image)
    assume_declared_profile(image, path)


def _pages(image: Image.Image, path: Path) -> Sequence[int]:
    """Which pictures a file holds, up to one that is damaged; without reduced copies and masks, which are TIFF's."""
    if image.format not in _FORMATS_OF_PAGES:
        return [0]
    if image.format != "TIFF":
        return range(getattr(image, "n_frames", 1))  # no list: a damaged file may claim any number
    numbers = []
    with suppress(Exception), Image.open(path, formats=("TIFF",)) as pages:  # this one stays where it is
        for number in range(pages.n_frames):
            pages.seek(number)
            if not _is_copy_or_mask(pages):
                numbers.append(number)
    return numbers


def _is_copy_or_mask(page: Image.Image) -> bool:
    return bool(page.tag_v2.get(ExifTags.Base.NewSubfileType, 0) & _COPY_OR_MASK)


def _drop_texts_named_like_notes(image: Image.Image) -> None:
    """From what Pillow tells of a picture: it puts a PNG's texts there by their keywords; `texts` has them still."""
    for name in _NEVER_TEXTS:
        if isinstance(image.info.get(name), str):
            del image.info[name]


def _fit_transparent_colour(image: Image.Image) -> None:
    """Brings the colour that a PNG declares transparent to the depth that its pixels will have."""
    colour, depth = image.info.get("transparency"), image.tile[0].args
    if isinstance(colour, int) and depth in _STEP_OF_GREY:
        image.info["transparency"] = colour * _STEP_OF_GREY[depth]
    elif isinstance(colour, tuple) and depth == "RGB;16B":
        image.info["transparency"] = tuple(value >> 8 for value in colour)


def _unidentified(file: BinaryIO) -> str:
    file.seek(0)
    beginning = file.read(16)
    if beginning[:4] in _TIFF_BEGINNINGS:
        # A number says where the tags stand, which many programs write last.
        place = beginning[8:16] if b"+" in beginning[2:4] else beginning[4:8]
        if int.from_bytes(place, "little" if beginning[:1] == b"I" else "big") >= file.seek(0, os.SEEK_END):
            return "is damaged or truncated (its tags are missing)"
        if beginning[:4] == _BIG_ENDIAN_BIGTIFF:
            return "is a big-endian BigTIFF file, which cannot be read; save it little-endian, or as classic TIFF"
        return (
            "is a TIFF file of a kind that cannot be read; save it as RGB, or grey without alpha, with 8 or 16 bits a "
            "channel"
        )
    return "is not a readable PNG, JPEG, TIFF, WebP or BMP image"


def _check_tiff(image: Image.Image, path: Path) -> None:
    """Refuses what Pillow would read wrongly, and notes what it would not heed.

    Of deep grey that is the largest value that a pixel can have, and whether that is black.
    """
    tags = image.tag_v2
    bits_of_channels = tags.get(ExifTags.Base.BitsPerSample, (1,))
    bits = max(bits_of_channels)
    if bits > 16:
        raise UserError(f"{path}: float and 32-bit pixels cannot be read; save it with 8 or 16 bits a channel")
    planes_apart = len(bits_of_channels) > 1 and tags.get(ExifTags.Base.PlanarConfiguration) == PLANES_APART
    if bits > 8 and planes_apart and tags.get(ExifTags.Base.Compression) == _NOT_COMPRESSED:
        raise UserError(
            f"{path}: holds its channels of 16 bits one after the other, uncompressed, which cannot be read; save it "
            "compressed, or with the channels of a pixel together"
        )
    kind, *_ = tags.get(ExifTags.Base.SampleFormat, (1,))
    if kind == _SIGNED and bits <= 8:
        raise UserError(f"{path}: signed pixels of {bits} bits cannot be read; save it with unsigned ones")
    largest = 2 ** (bits - (kind == _SIGNED)) - 1
    image.info[_TIFF_RANGE] = largest, tags.get(ExifTags.Base.PhotometricInterpretation) == _WHITE_IS_ZERO
    # Pillow takes a missing resolution for one dot an inch, and keeps what it has read of another page.
    for name, tag in _TIFF_NOTES.items():
        if tag not in tags:
            image.info.pop(name, None)
    if tags.get(ExifTags.Base.ResolutionUnit, 2) not in _DOTS_AN_INCH:
        image.info.pop("dpi", None)
    _turn_resolution(image, tags.get(ExifTags.Base.Orientation))  # while it loads a TIFF file, Pillow turns the pixels


def _take_declared_resolution(image: Image.Image) -> None:
    """Of a JPEG where its own header has none: that of its EXIF data, for lack of which Pillow says 72 dots an inch."""
    if image.info.get("jfif_unit") in _JFIF_UNITS:
        return
    image.info.pop("dpi", None)
    with suppress(Exception):  # damaged EXIF data raises nearly anything, and is warned of where it is kept
        exif = image.getexif()
        unit = _DOTS_AN_INCH[exif.get(ExifTags.Base.ResolutionUnit, 2)]
        sides = exif[ExifTags.Base.XResolution], exif[ExifTags.Base.YResolution]
        image.info["dpi"] = tuple(float(side) * unit for side in sides)


def _turn_resolution(image: Image.Image, orientation: int | None) -> None:
    if orientation in _TURNED_ON_ITS_SIDE and "dpi" in image.info:
        image.info["dpi"] = image.info["dpi"][::-1]


@contextmanager
def _left_out_where_damaged(notes: str, path: Path) -> Iterator[None]:
    """Notes that cannot be read are warned of: a picture with damaged notes is still a picture."""
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:  # they raise nearly anything
        logger.warning("%s: its %s data cannot be read and is left out (%s)", path, notes, reason(error))


def _upright(image: Image.Image, path: Path) -> tuple[Image.Image, bytes | None]:
    """The picture turned as its EXIF orientation says, and its descriptive EXIF."""
    upright, exif = image, None
    with _left_out_where_damaged("EXIF", path):
        # What is wrong getexif tells once alone, and whoever asked first may have passed it over.
        Image.Exif().load(image.info.get("exif") or b"")
        orientation = image.getexif().get(ExifTags.Base.Orientation)
        upright = ImageOps.exif_transpose(image)
        _turn_resolution(upright, orientation)
        kept = descriptive_exif(image.getexif())
        exif = kept.tobytes() if len(kept) else None
    return upright, exif


def _xmp(image: Image.Image, path: Path) -> bytes | None:
    packet = image.info.get("xmp")
    if has_extended_xmp(image):
        logger.warning("%s: of its XMP data, what goes beyond 64 KB is left out", path)
    if not packet:
        return None
    with _left_out_where_damaged("XMP", path):
        return descriptive_xmp(packet)
    return None


def _iptc(image: Image.Image, path: Path) -> bytes | None:
    if iptc_is_cut(image):
        logger.warning("%s: of its IPTC data, what goes beyond 64 KB is left out", path)
    with _left_out_where_damaged("IPTC", path):
        return iptc(image)
    return None


def _without_alpha(image: Image.Image, path: Path) -> tuple[Image.Image, Image.Image | None]:
    """The colours, of 8 bits and in a mode that profiles know, and the alpha or None."""
    alpha = None
    if image.mode == "F" or image.mode.startswith("I"):
        if (hidden := image.info.pop("transparency", None)) is not None:
            alpha = Image.fromarray(np.where(np.asarray(image) == hidden, 0, 255).astype(np.uint8))
        grey = Image.fromarray(_grey(image, path, np.uint8))
        grey.info, image = dict(image.info), grey
    if image.mode == "La":  # Pillow turns this one, of multiplied colours, into nothing else
        image = image.convert("LA")
    if image.has_transparency_data:
        with_alpha = image.convert("RGBA")
        alpha = with_alpha.getchannel("A")
        # Grey stays grey for its profile.
        grey = image.mode in ("L", "LA") or image.info[_IS_GREY]
        image = image.convert("L") if grey else with_alpha.convert("RGB")
    elif image.mode in ("P", "1", "YCbCr"):
        image = image.convert("RGB")
    return image, alpha


def _nearest_seen(alpha: Image.Image) -> tuple[np.ndarray, np.ndarray] | None:
    """For each pixel row and column of the nearest that is not wholly transparent; None where that is all or none.

    What programs leave in the others, black or white or an old background, is no colour of the painting.
    """
    hidden = np.asarray(alpha) == 0
    if not hidden.any() or hidden.all():
        return None
    return tuple(distance_transform_edt(hidden, return_distances=False, return_indices=True))


def _deep_rgb(image: Image.Image, upright: Image.Image, colours: Image.Image, path: Path) -> np.ndarray | None:
    """`Decoded.deep` of a picture as it was opened, then turned, then without alpha in 8 bits."""
    if upright.mode.startswith("I"):
        values = _grey(upright, path, np.uint16)[..., None]
    elif not image.info[_HAS_16_BITS]:
        return None
    elif (low := low_bytes(path, image.tell())) is None:
        logger.warning("%s: is read with 8 of its 16 bits a channel; RGB and grey keep all", path)
        return None
    else:
        if upright is not image:
            low = ImageOps.exif_transpose(low)
        values = np.asarray(colours).astype(np.uint16) << 8 | np.asarray(low)[..., :3]
    if (rgb := deep_to_srgb(values, colours)) is None:
        logger.warning("%s: is read with 8 of its 16 bits a channel; its colour profile is applied to no more", path)
    return rgb


def _grey(image: Image.Image, path: Path, depth: type[np.unsignedinteger]) -> np.ndarray:
    """Grey of more than 8 bits, rounded to that depth."""
    values = np.asarray(image)
    white, black_is_largest = image.info.get(_TIFF_RANGE, (65_535, False))
    if image.mode == "F" or values.min() < 0:
        raise UserError(f"{path}: float and negative pixels cannot be read; save it with 8 or 16 bits a channel")
    largest = np.iinfo(depth).max
    shades = np.rint(values * (largest / white)).astype(depth)
    return largest - shades if black_is_largest else shades


def _resolution(image: Image.Image) -> tuple[float, float] | None:
    try:
        x, y = (float(value) for value in image.info["dpi"])
    except (KeyError, TypeError, ValueError, ZeroDivisionError):
        return None
    return (x, y) if all(math.isfinite(value) and value > 0 for value in (x, y)) else None

"""Sixteen bits a channel, which Pillow's colour pictures do not hold: read and written as two bytes by its codecs."""

from __future__ import annotations

import io
import struct
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image

DEEP_FORMATS = ("PNG", "TIFF")
DEEP = ";16"  # in Pillow's names of how a file holds its pixels
PLANES_APART = 2  # of TIFF's planar configurations

# Pillow keeps the high byte of a deep channel. Told that the file has the other order of bytes it keeps the low one.
_ORDERS = {"L": "B", "B": "L", "N": "B" if sys.byteorder == "little" else "L"}
_LOW_BYTES = {f"{mode};16{order}": f"{mode};16{other}" for mode in ("RGB", "RGBA") for order, other in _ORDERS.items()}

_MODES = {3: "RGB", 4: "RGBA"}
_PNG_KINDS = {"RGB": 2, "RGBA": 6}


def raw_modes(image: Image.Image) -> set[str]:
    """How the file of a picture that has not been loaded yet holds its pixels, in Pillow's words."""
    return {tile.args if isinstance(tile.args, str) else tile.args[0] for tile in image.tile}


def low_bytes(path: Path, page: int) -> Image.Image | None:
    """Of a page with 16 bits a channel, in colour, the low bytes as a picture; None where they cannot be told apart."""
    with Image.open(path, formats=DEEP_FORMATS) as image:
        if image.format == "TIFF":
            image.seek(page)
            if (
                image.tag_v2.get(ExifTags.Base.PlanarConfiguration) == PLANES_APART
            ):  # then libtiff's decoder asks no order
                return None
        if not raw_modes(image) <= _LOW_BYTES.keys():
            return None
        image.tile = [tile._replace(args=_with_low_bytes(tile.args)) for tile in image.tile]
        image.load()
        return image


def _with_low_bytes(args: str | tuple[object, ...]) -> str | tuple[object, ...]:
    return _LOW_BYTES[args] if isinstance(args, str) else (_LOW_BYTES[args[0]], *args[1:])


def encode_deep(pixels: np.ndarray, image_format: str, options: dict[str, object]) -> bytes | bytearray:
    """A PNG or TIFF file of uint16 [H, W, 3 or 4], RGB or RGBA. options: what Pillow's save takes of notes."""
    return {"PNG": _png, "TIFF": _tiff}[image_format](pixels, _MODES[pixels.shape[2]], options)


def _saved(image: Image.Image, image_format: str, options: dict[str, object]) -> bytearray:
    file = io.BytesIO()
    image.save(file, format=image_format, **options)
    return bytearray(file.getbuffer())


def _tiff(pixels: np.ndarray, mode: str, options: dict[str, object]) -> bytearray:
    """The bytes of a deep picture are those of one of 8 bits that is twice as wide: two tags tell them apart."""
    height, width, _ = pixels.shape
    content = _saved(Image.frombytes(mode, (2 * width, height), pixels.astype("<u2").tobytes()), "TIFF", options)
    (directory,) = struct.unpack_from("<I", content, 4)
    (count,) = struct.unpack_from("<H", content, directory)
    for entry in range(directory + 2, directory + 2 + 12 * count, 12):
        tag, _, values, place = struct.unpack_from("<HHII", content, entry)
        if tag == ExifTags.Base.ImageWidth:
            struct.pack_into("<HHII", content, entry, tag, 4, 1, width)  # 4: a number of 32 bits
        if tag == ExifTags.Base.BitsPerSample:
            struct.pack_into(f"<{values}H", content, place, *[16] * values)
    return content


def _png(pixels: np.ndarray, mode: str, options: dict[str, object]) -> bytes:
    """A picture of one pixel carries the notes; its header and pixels are replaced."""
    height, width, _ = pixels.shape
    carrier = _saved(Image.new(mode, (1, 1)), "PNG", options)
    replaced = {
        b"IHDR": struct.pack(">IIBBBBB", width, height, 16, _PNG_KINDS[mode], 0, 0, 0),
        b"IDAT": zlib.compress(_differences(pixels)),
    }
    content = [carrier[:8]]
    for name, data in _png_chunks(carrier):
        data = replaced.get(name, data)
        content += [struct.pack(">I", len(data)), name, data, struct.pack(">I", zlib.crc32(data, zlib.crc32(name)))]
    return b"".join(content)


def _png_chunks(content: bytearray) -> Iterator[tuple[bytes, bytes]]:
    place = 8
    while place < len(content):
        length, name = struct.unpack_from(">I4s", content, place)
        yield name, bytes(content[place + 8 : place + 8 + length])
        place += length + 12


def _differences(pixels: np.ndarray) -> np.ndarray:
    """PNG's filter 1, named before each row: every byte less that of the pixel on its left."""
    height, width, channels = pixels.shape
    values = pixels.astype(">u2").view(np.uint8).reshape(height, width, 2 * channels)
    rows = np.ones((height, 1 + values[0].size), np.uint8)
    filtered = rows[:, 1:].reshape(height, width, 2 * channels)
    filtered[:, 0] = values[:, 0]
    np.subtract(values[:, 1:], values[:, :-1], out=filtered[:, 1:])
    return rows

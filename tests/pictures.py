"""Pictures to read and write in tests, and what is asked of them."""

import csv
import errno
import functools
import os
import struct
import zlib

import numpy as np
import PIL
import pytest
from PIL import ExifTags, Image, ImageCms, PngImagePlugin, TiffImagePlugin, TiffTags

from restoration import files
from restoration.errors import UserError
from restoration.imaging import to_pillow
from restoration.metadata import jpeg_with_iptc

LOSSLESS = ("png", "tif", "webp")
FORMATS = (*LOSSLESS, "jpg")

PAINTINGS = os.environ.get("RESTORATION_PAINTINGS")
needs_paintings = pytest.mark.skipif(not PAINTINGS, reason="RESTORATION_PAINTINGS names no folder of paintings")

# Before, it read neither YCbCr nor associated alpha of grey from TIFF, and wrote no notes as long as JPEG holds.
needs_pillow_13 = pytest.mark.skipif(int(PIL.__version__.partition(".")[0]) < 13, reason="needs Pillow 13")


def random_pixels(height=9, width=13, channels=3, seed=0):
    shape = (height, width, channels) if channels > 1 else (height, width)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def paint(path, size=(40, 30), seed=0):
    """A picture of random pixels, (width, height) = size."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


def write_table(path, columns, *lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows([columns, *lines])


def as_bytes(rgb):
    return np.asarray(to_pillow(rgb))


@functools.cache  # it holds the second in which it was made
def srgb_profile():
    return ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def exchanged_profile():
    """An RGB profile whose red primary is sRGB's blue and the other way round."""
    profile = srgb_profile().replace("sRGB built-in".encode("utf-16-be"), "other colours".encode("utf-16-be"))
    return profile.replace(b"rXYZ", b"....").replace(b"bXYZ", b"rXYZ").replace(b"....", b"bXYZ")


def grey_profile(*points):
    """A header, and a tone curve of these points as the only tag; without any, grey values are linear in light."""
    curve = struct.pack(f">4s4xI{len(points)}H", b"curv", len(points), *points)
    size = 128 + 4 + 12 + len(curve)
    header = struct.pack(">I4xI4s4s4s12x4s", size, 0x02400000, b"scnr", b"GRAY", b"XYZ ", b"acsp")
    illuminant = struct.pack(">28x3I", 0xF6D6, 0x10000, 0xD32D)
    return (header + illuminant).ljust(128, b"\0") + struct.pack(">I4sII", 1, b"kTRC", 144, len(curve)) + curve


def linear_profile():
    """Of sRGB's primaries and white, and its name, but linear in light."""
    curve = struct.pack(">4s4xHH", b"para", 3, 0)  # of sRGB's shape, to be followed by its five numbers
    straight = struct.pack(">4s4xHHI", b"para", 0, 0, 0x10000)  # a power of one
    profile = srgb_profile()
    places = [place for place in range(len(profile)) if profile.startswith(curve, place)]
    for place in places:
        profile = profile[:place] + straight + profile[place + len(straight) :]
    return profile


def save_with_xmp(path, packet, **options):
    image = Image.fromarray(random_pixels())
    if path.suffix == ".png":
        options["pnginfo"] = PngImagePlugin.PngInfo()
        options["pnginfo"].add(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + packet)
    elif path.suffix == ".tif":
        options["tiffinfo"] = {700: packet}
    else:
        options["xmp"] = packet
    image.save(path, **options)


def save_with_iptc(path, datasets, declared=TiffTags.UNDEFINED):
    """In a TIFF file, as bytes, or as numbers of 32 bits, which is how Photoshop declares them."""
    image = Image.fromarray(random_pixels())
    if path.suffix == ".jpg":
        image.save(path)
        path.write_bytes(jpeg_with_iptc(path.read_bytes(), datasets))
        return
    datasets += b"\0" * (-len(datasets) % 4)
    tags = TiffImagePlugin.ImageFileDirectory_v2()
    tags.tagtype[ExifTags.Base.IPTCNAA] = TiffTags.UNDEFINED
    tags[ExifTags.Base.IPTCNAA] = datasets
    image.save(path, tiffinfo=tags)
    size = 4 if declared == TiffTags.LONG else 1
    entries = [
        struct.pack("<HHI", ExifTags.Base.IPTCNAA, *kind_and_count)
        for kind_and_count in ((TiffTags.UNDEFINED, len(datasets)), (declared, len(datasets) // size))
    ]
    assert path.read_bytes().count(entries[0]) == 1
    path.write_bytes(path.read_bytes().replace(*entries))


def png_of_16_bits(values, transparent=None):
    """A PNG of 16 bits, which Pillow reads but cannot write; values are uint16 [H, W, 2, 3 or 4] or [H, W] of grey."""
    rows = [row.astype(">u2").tobytes() for row in values]
    kind = {2: 4, 3: 2, 4: 6}[values.shape[2]] if values.ndim == 3 else 0
    return raw_png(values.shape[1], rows, 16, kind, transparent=transparent)


def raw_png(width, rows, bits, kind, transparent=None):
    """rows: bytes of each; kind: 0 for grey, 2 for RGB, 4 and 6 with alpha; transparent: a colour's numbers."""

    def chunk(name, content):
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", width, len(rows), bits, kind, 0, 0, 0)
    colour = b"" if transparent is None else chunk(b"tRNS", struct.pack(f">{len(transparent)}H", *transparent))
    pixels = zlib.compress(b"".join(b"\0" + row for row in rows))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + colour + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def write_tiff(path, tags, strips):
    """tags: lists of 16-bit numbers, those of the strips excepted."""
    content, offsets = b"II*\0    ", []
    for strip in strips:
        offsets.append(len(content))
        content += strip
    tags = {**tags, 273: offsets, 279: [len(strip) for strip in strips]}
    entries = b""
    for tag, values in sorted(tags.items()):
        packed = struct.pack(f"<{len(values)}H", *values)
        if len(packed) > 4:
            content, packed = content + packed, struct.pack("<I", len(content))
        entries += struct.pack("<HHI4s", tag, 3, len(values), packed)
    directory = struct.pack("<H", len(tags)) + entries + b"\0" * 4
    path.write_bytes(content[:4] + struct.pack("<I", len(content)) + content[8:] + directory)


def fill_the_disk(monkeypatch):
    """It then takes the first bytes of a file."""

    def write_a_part(file, content):
        file.write(content[:10])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files, "write_through", write_a_part)


def assert_refuses(function, *arguments, saying, **options):
    with pytest.raises(UserError) as caught:
        function(*arguments, **options)
    assert saying in str(caught.value)
    assert "\n" not in str(caught.value)

"""What a picture's file says beside its pixels: the parts of EXIF and XMP that are true of the recoloured one, too."""

from __future__ import annotations

import re

from PIL import ExifTags, Image

# EXIF tags that describe the painting or its photograph. The others describe how the old file stored its pixels
# (orientation, size, strips, thumbnail) and would be stale in a new one.
_KEPT_TAGS = (
    ExifTags.Base.ImageDescription,
    ExifTags.Base.Make,
    ExifTags.Base.Model,
    ExifTags.Base.Software,
    ExifTags.Base.DateTime,
    ExifTags.Base.Artist,
    ExifTags.Base.Copyright,
)
_STALE_PHOTOGRAPH_TAGS = (
    ExifTags.Base.ColorSpace,
    ExifTags.Base.ExifImageWidth,
    ExifTags.Base.ExifImageHeight,
    ExifTags.Base.ExifInteroperabilityOffset,
)

# XMP has no end of descriptions; what is stale of it are these properties, which a packet holds as attributes or as
# elements. XMP specification part 2, sections on the namespaces tiff, exif, photoshop, xmp and dc.
_STALE_PROPERTIES = (
    r"(?:tiff:(?:Orientation|ImageWidth|ImageLength|BitsPerSample|Compression|PhotometricInterpretation"
    r"|SamplesPerPixel|PlanarConfiguration|YCbCrSubSampling|YCbCrPositioning|NativeDigest)"
    r"|exif:(?:ColorSpace|PixelXDimension|PixelYDimension|NativeDigest)"
    r"|photoshop:(?:ColorMode|ICCProfile)|xmp:Thumbnails|dc:format)"
)
_STALE_XMP = re.compile(
    rf"""\s+{_STALE_PROPERTIES}\s*=\s*(?:"[^"]*"|'[^']*')"""
    rf"""|<(?P<name>{_STALE_PROPERTIES})(?:\s[^>]*?)?(?:/>|>.*?</(?P=name)\s*>)""",
    re.DOTALL,
)


def descriptive_exif(source: Image.Exif) -> Image.Exif:
    """The tags that describe the painting or its photograph."""
    kept = Image.Exif()
    for tag in _KEPT_TAGS:
        if tag in source:
            kept[tag] = _as_it_was(source[tag])
    for directory, stale in ((ExifTags.IFD.Exif, _STALE_PHOTOGRAPH_TAGS), (ExifTags.IFD.GPSInfo, ())):
        values = {tag: _as_it_was(value) for tag, value in source.get_ifd(directory).items() if tag not in stale}
        if values:
            kept[directory] = values
    return kept


def descriptive_xmp(packet: bytes) -> bytes:
    """The packet without what it says about the old file's pixels. UnicodeDecodeError where it is not UTF-8."""
    return _STALE_XMP.sub("", packet.rstrip(b"\0").decode()).encode()


def _as_it_was(value: object) -> object:
    """Text of any encoding as its bytes: Pillow reads it as Latin-1, and would write question marks."""
    return value.encode("latin-1") if isinstance(value, str) and not value.isascii() else value

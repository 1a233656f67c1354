"""What a file says beside its pixels that is true of the recoloured picture, too: of all but IPTC a part."""

from __future__ import annotations

import re
import struct
from itertools import pairwise

from PIL import ExifTags, Image, IptcImagePlugin, JpegImagePlugin

# EXIF tags that describe the painting or its photograph. The others describe how the old file stored its pixels
# (orientation, size, strips, thumbnail) and would be stale in a new one.
_KEPT_TAGS = (
    ExifTags.Base.ImageDescription,
    ExifTags.Base.Make,
    ExifTags.Base.Model,
    ExifTags.Base.Software,
    ExifTags.Base.DateTime,
    ExifTags.Base.Artist,
    ExifTags.Base.HostComputer,
    ExifTags.Base.Copyright,
    ExifTags.Base.DocumentName,
    ExifTags.Base.PageName,
    ExifTags.Base.XPTitle,
    ExifTags.Base.XPComment,
    ExifTags.Base.XPAuthor,
    ExifTags.Base.XPKeywords,
    ExifTags.Base.XPSubject,
    ExifTags.Base.Rating,
    ExifTags.Base.RatingPercent,
    ExifTags.Base.ImageHistory,
    ExifTags.Base.CameraSerialNumber,
    # Of TIFF/EP and DNG, which have them here and not among the photograph's.
    ExifTags.Base.DateTimeOriginal,
    ExifTags.Base.ImageNumber,
    ExifTags.Base.ImageID,
    ExifTags.Base.UniqueCameraModel,
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
    r"|photoshop:(?:ColorMode|ICCProfile)|xmp:Thumbnails|dc:format|xmpNote:HasExtendedXMP)"
)
_STALE_XMP = re.compile(
    rf"""(?<!\s)\s+{_STALE_PROPERTIES}\s*=\s*(?:"[^"]*"|'[^']*')"""
    rf"""|<(?P<name>{_STALE_PROPERTIES})(?:\s[^>]*?)?(?:/>|>.*?</(?P=name)\s*>)""",
    re.DOTALL,
)

# Begins a segment of a JPEG: XMP specification part 3, section 1.1.3.1.
_EXTENDED_XMP = b"http://ns.adobe.com/xmp/extension/\0"

# The keyword of a PNG's comment: PNG specification, section 11.3.3.1. A JPEG's comments go by it as well.
COMMENT = "Comment"
# XMP's packet, ImageMagick's copies of other notes and of the old file's dates ("exif:Orientation", "date:modify").
_NOT_A_TEXT = re.compile(r"Raw profile type |XML:com\.adobe\.xmp|(?:8bim|date|exif|icc|iptc|jpeg|png|tiff|xmp):")

# A JPEG has IPTC's notes as one of Photoshop's resources, of this number, in a segment of this marker. Adobe Photoshop
# File Formats Specification, section Image Resource Blocks.
_IPTC_RESOURCE = 0x0404
_PHOTOSHOP_MARKER = b"\xff\xed"
_PHOTOSHOP_NAME = b"Photoshop 3.0\0"
_UNNAMED_RESOURCE = struct.Struct(">4sH2xI")  # signature, number, a name of no letters, length
JPEG_BYTES_BESIDE_IPTC = len(_PHOTOSHOP_NAME) + _UNNAMED_RESOURCE.size + 1  # which makes a length even


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


def iptc(image: Image.Image) -> bytes | None:
    """The datasets of IPTC-IIM that a JPEG or TIFF file has; nearly any exception where they are damaged."""
    found = IptcImagePlugin.getiptcinfo(image) or {}
    datasets = []
    for (record, number), values in found.items():
        for value in values if isinstance(values, list) else [values]:
            datasets.append(_dataset(record, number, value or b""))
    return b"".join(datasets) or None


def iptc_is_cut(image: Image.Image) -> bool:
    """Whether a JPEG has more of IPTC's data than Pillow reads, for which they end with the segment they begin in."""
    parts = [content for _, content in _segments(image) if content.startswith(_PHOTOSHOP_NAME)]
    read = image.info.get("photoshop", {}).get(_IPTC_RESOURCE)
    return bool(read) and any(
        part.endswith(read) and not following.startswith(_PHOTOSHOP_NAME + b"8BIM")
        for part, following in pairwise(parts)
    )


def has_extended_xmp(image: Image.Image) -> bool:
    """Whether a JPEG has XMP beyond the packet of its first segment."""
    return any(content.startswith(_EXTENDED_XMP) for _, content in _segments(image))


def _segments(image: Image.Image) -> list[tuple[str, bytes]]:
    """A JPEG's notes, each with the name of its marker; of other files none."""
    return image.applist if isinstance(image, JpegImagePlugin.JpegImageFile) else []


def texts(image: Image.Image) -> dict[str, str] | None:
    """What a PNG says by keywords (Title, Author, Copyright), and a JPEG's comments, a line each."""
    found = dict(getattr(image, "text", {}))
    if comments := [content for marker, content in _segments(image) if marker == "COM" and content]:
        found[COMMENT] = "\n".join(_decoded(comment.rstrip(b"\0")) for comment in comments)
    return {keyword: text for keyword, text in found.items() if not _NOT_A_TEXT.match(keyword)} or None


def _decoded(text: bytes) -> str:
    try:
        return text.decode()
    except UnicodeDecodeError:
        return text.decode("latin-1")


def _dataset(record: int, number: int, value: bytes) -> bytes:
    """IPTC-IIM 4.1, chapter 1.5. Longer values, whose length is written in another way, Pillow does not read."""
    return struct.pack(">BBBh", 0x1C, record, number, len(value)) + value


def jpeg_with_iptc(jpeg: bytes, datasets: bytes) -> bytes:
    """The JPEG file with IPTC's datasets, of at most 65,533 - JPEG_BYTES_BESIDE_IPTC bytes, after its other notes."""
    resource = _UNNAMED_RESOURCE.pack(b"8BIM", _IPTC_RESOURCE, len(datasets)) + datasets + b"\0" * (len(datasets) % 2)
    content = _PHOTOSHOP_NAME + resource
    end = 2  # of the marker that begins a file
    while b"\xff\xe0" <= jpeg[end : end + 2] <= b"\xff\xef":
        end += 2 + int.from_bytes(jpeg[end + 2 : end + 4], "big")
    segment = _PHOTOSHOP_MARKER + struct.pack(">H", 2 + len(content)) + content
    return jpeg[:end] + segment + jpeg[end:]


def _as_it_was(value: object) -> object:
    """Text of any encoding as its bytes: Pillow reads it as Latin-1, and would write question marks."""
    return value.encode("latin-1") if isinstance(value, str) and not value.isascii() else value

"""Pictures on disk: read upright and in sRGB, written whole, with nothing lost or overwritten silently."""

import os
import struct
import subprocess
import sys

import numpy as np
import pytest
import torch
from pictures import (
    FORMATS,
    LOSSLESS,
    as_bytes,
    assert_refuses,
    needs_pillow_13,
    random_pixels,
    save_with_iptc,
    save_with_xmp,
    srgb_profile,
)
from PIL import ExifTags, Image, PngImagePlugin, TiffTags

from restoration.imaging import (
    Picture,
    check_writable,
    from_pillow,
    read_image,
    read_rgb,
    to_pillow,
    write_image,
)

DESCRIPTIONS = {
    ExifTags.Base.ImageDescription: "A scroll",
    ExifTags.Base.Make: "Phase One",
    ExifTags.Base.Model: "IQ4",
    ExifTags.Base.Software: "Capture One",
    ExifTags.Base.DateTime: "2020:01:01 00:00:00",
    ExifTags.Base.Artist: "Wang Ximeng",
    ExifTags.Base.Copyright: "Palace Museum",
    ExifTags.Base.DocumentName: "Inv. 1234",
    ExifTags.Base.PageName: "recto",
    ExifTags.Base.HostComputer: "studio",
    ExifTags.Base.ImageHistory: "rephotographed",
    ExifTags.Base.CameraSerialNumber: "IQ4-0001",
    ExifTags.Base.DateTimeOriginal: "1113:01:01 00:00:00",
    ExifTags.Base.ImageNumber: 7,
    ExifTags.Base.ImageID: "scroll-7",
    ExifTags.Base.UniqueCameraModel: "Phase One IQ4",
    ExifTags.Base.Rating: 5,
    ExifTags.Base.RatingPercent: 99,
} | {
    ExifTags.Base[f"XP{name}"]: f"{name}\0".encode("utf-16-le")
    for name in ("Title", "Comment", "Author", "Keywords", "Subject")
}


def notes(orientation):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    exif.update(DESCRIPTIONS)
    exif[ExifTags.IFD.Exif] = {
        ExifTags.Base.DateTimeOriginal: "1113:01:01 00:00:00",
        ExifTags.Base.ExifImageWidth: 13,
        ExifTags.Base.ExifImageHeight: 9,
        ExifTags.Base.ColorSpace: 65_535,
        ExifTags.Base.ExifInteroperabilityOffset: 999,
    }
    exif[ExifTags.IFD.GPSInfo] = {ExifTags.GPS.GPSLatitudeRef: "N"}
    return exif.tobytes()


# Attributes and elements, of which those of the second half describe the old file.
XMP = """<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>
<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">
<rdf:Description rdf:about="" photoshop:Credit="Palace Museum" tiff:Make="Phase One"{}>
<dc:title><rdf:Alt><rdf:li xml:lang="zh">千里江山圖</rdf:li></rdf:Alt></dc:title>{}
</rdf:Description></rdf:RDF></x:xmpmeta>
<?xpacket end="w"?>"""
KEPT_XMP = XMP.format("", "").encode()
STALE_XMP = XMP.format(
    """ tiff:Orientation="6"\n photoshop:ICCProfile='Adobe RGB' exif:PixelXDimension = "13" dc:format="image/tiff"
    xmpNote:HasExtendedXMP="0123456789ABCDEF"
    photoshop:ColorMode="3" exif:PixelYDimension="9" exif:NativeDigest="1" tiff:NativeDigest="1" tiff:ImageLength="9"
    tiff:Compression="1" tiff:PhotometricInterpretation="2" tiff:SamplesPerPixel="3" tiff:PlanarConfiguration="1"
    tiff:YCbCrSubSampling="1" tiff:YCbCrPositioning="1\"""",
    """<exif:ColorSpace>65535</exif:ColorSpace><tiff:ImageWidth/><xmp:Thumbnails><rdf:Alt><rdf:li
    xmpGImg:image="/9j/4AAQ"/></rdf:Alt></xmp:Thumbnails><tiff:BitsPerSample a="/"><rdf:Seq/></tiff:BitsPerSample>""",
).encode()


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_applied_once(tmp_path, suffix, orientation):
    upright = Image.fromarray(random_pixels(16, 24)).resize((96, 64), Image.Resampling.BICUBIC)
    # How a camera stores an upright scene under each orientation tag (EXIF 2.3, table of tag 274): the inverse.
    stored = {
        1: None,
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }[orientation]
    path = tmp_path / f"camera.{suffix}"
    (upright if stored is None else upright.transpose(stored)).save(path, exif=notes(orientation))
    picture = read_image(path)
    write_image(tmp_path / "saved.png", picture.rgb, picture)
    with Image.open(tmp_path / "saved.png") as saved:
        assert saved.size == upright.size
        assert ExifTags.Base.Orientation not in saved.getexif()
        # JPEG and WebP are lossy here; a wrong turn is off by far more than 20 of 255.
        assert np.abs(np.asarray(saved, dtype=float) - np.asarray(upright)).mean() < 20
    assert np.array_equal(np.asarray(read_rgb(path)), as_bytes(picture.rgb))


@pytest.mark.parametrize("target", FORMATS)
@pytest.mark.parametrize("source", FORMATS)
def test_descriptive_notes_survive(tmp_path, source, target):
    Image.fromarray(random_pixels()).save(tmp_path / f"old.{source}", exif=notes(6), icc_profile=srgb_profile())
    picture = read_image(tmp_path / f"old.{source}")
    write_image(tmp_path / f"new.{target}", picture.rgb, picture)
    with Image.open(tmp_path / f"new.{target}") as image:
        exif = image.getexif()
        assert {tag: type(told)(exif[tag]) for tag, told in DESCRIPTIONS.items()} == DESCRIPTIONS
        assert exif.get_ifd(ExifTags.IFD.Exif) == {ExifTags.Base.DateTimeOriginal: "1113:01:01 00:00:00"}
        assert exif.get_ifd(ExifTags.IFD.GPSInfo) == {ExifTags.GPS.GPSLatitudeRef: "N"}
        assert ExifTags.Base.Orientation not in exif
        assert image.info["icc_profile"] == srgb_profile()
        assert image.size == (9, 13)


def add_segments(jpeg, *segments):
    """Puts notes, each of a marker and a content, before those that the file has."""
    added = b"".join(marker + struct.pack(">H", 2 + len(content)) + content for marker, content in segments)
    written = jpeg.read_bytes()
    jpeg.write_bytes(written[:2] + added + written[2:])


def test_xmp_beyond_one_segment_of_a_jpeg_is_told_of(tmp_path, caplog):
    save_with_xmp(tmp_path / "old.jpg", STALE_XMP)
    add_segments(
        tmp_path / "old.jpg", (b"\xff\xe1", b"http://ns.adobe.com/xmp/extension/\0" + b"0" * 40 + b"<report/>")
    )
    assert read_image(tmp_path / "old.jpg").xmp == KEPT_XMP
    assert "old.jpg: of its XMP data, what goes beyond 64 KB is left out" in caplog.text


@pytest.mark.parametrize("following", ["more", "another", "cut"])
def test_iptc_beyond_one_segment_of_a_jpeg_is_told_of(tmp_path, caplog, following):
    """Not so where it ends before another resource of Photoshop, which may be cut itself."""
    Image.fromarray(random_pixels()).save(tmp_path / "old.jpg")
    dataset = b"\x1c\x02\x05\0\x05River"

    def resource(number, length):
        return struct.pack(">4sH2xI", b"8BIM", number, length)

    parts = {
        "more": [resource(0x0404, len(dataset) + 9) + dataset, b"x" * 9],
        "another": [resource(0x0404, len(dataset)) + dataset, resource(0x03F3, 2) + b"xx"],
        "cut": [resource(0x0404, len(dataset)) + dataset + resource(0x03F3, 4) + b"xx", b"xx"],
    }[following]
    add_segments(tmp_path / "old.jpg", *((b"\xff\xed", b"Photoshop 3.0\0" + part) for part in parts))
    assert read_image(tmp_path / "old.jpg").iptc == dataset
    told = "old.jpg: of its IPTC data, what goes beyond 64 KB is left out" in caplog.text
    assert told == (following == "more")


@pytest.mark.parametrize("target", FORMATS)
@pytest.mark.parametrize("source", FORMATS)
def test_xmp_survives_without_what_it_says_of_the_old_pixels(tmp_path, source, target):
    save_with_xmp(tmp_path / f"old.{source}", STALE_XMP)
    picture = read_image(tmp_path / f"old.{source}")
    assert picture.rgb.shape[1:] == (13, 9)  # its orientation, which EXIF does not tell, was heeded
    write_image(tmp_path / f"new.{target}", picture.rgb, picture)
    with Image.open(tmp_path / f"new.{target}") as image:
        assert image.info["xmp"] == KEPT_XMP
    assert read_image(tmp_path / f"new.{target}").xmp == KEPT_XMP


# Of the second record the object's name, two keywords, of which one is empty, and a long caption.
IPTC = b"\x1c\x02\x05\x00\x05River\x1c\x02\x19\x00\x03ink\x1c\x02\x19\x00\x00"
IPTC += b"\x1c\x02\x78\x7f\xff" + b"x" * 32_767


@pytest.mark.parametrize("target", FORMATS)
@pytest.mark.parametrize(
    ("source", "declared"), [("jpg", None), ("tif", TiffTags.UNDEFINED), ("tif", TiffTags.BYTE), ("tif", TiffTags.LONG)]
)
def test_iptc_survives_where_the_format_has_a_place_for_it(tmp_path, caplog, source, declared, target):
    save_with_iptc(tmp_path / f"old.{source}", IPTC, declared)
    picture = read_image(tmp_path / f"old.{source}")
    assert picture.iptc == IPTC
    write_image(tmp_path / f"new.{target}", picture.rgb, picture)
    again = read_image(tmp_path / f"new.{target}")
    assert again.rgb.shape == picture.rgb.shape
    if target in ("jpg", "tif"):
        assert again.iptc == IPTC
        assert not caplog.records
    else:
        assert again.iptc is None
        assert f"new.{target}: {target.upper()} has no place for IPTC data" in caplog.text


@pytest.mark.parametrize("unread", [b"no datasets", b"\x1c\x02\x78\x80\x04\x00\x00\x9c\x40" + b"x" * 40_000])
@pytest.mark.parametrize("source", ["jpg", "tif"])
def test_iptc_that_cannot_be_read_is_left_out(tmp_path, caplog, source, unread):
    save_with_iptc(tmp_path / f"old.{source}", unread)
    assert read_image(tmp_path / f"old.{source}").iptc is None
    assert f"old.{source}: its IPTC data cannot be read and is left out" in caplog.text


# Keywords of the PNG specification; in Latin-1, beyond it, and of a language.
TEXTS = {
    "Title": "Müller",
    "Author": "王希孟",
    "Comment": "of a scroll\n" * 9,
    "Source": PngImagePlugin.iTXt("絹", "zh", "來源"),
    "Inventory: no": "7",
    "museum:inv": "77",
}


@pytest.mark.parametrize(("target", "kept"), [("png", [*TEXTS]), ("jpg", ["Comment"]), ("tif", []), ("webp", [])])
def test_texts_survive_where_the_format_has_a_place_for_them(tmp_path, caplog, target, kept):
    chunks = PngImagePlugin.PngInfo()
    for keyword, text in {**TEXTS, "date:modify": "now", "Raw profile type iptc": "\niptc\n 0\n"}.items():
        chunks.add_text(keyword, text)
    Image.fromarray(random_pixels()).save(tmp_path / "old.png", pnginfo=chunks)
    picture = read_image(tmp_path / "old.png")
    assert picture.texts == TEXTS
    write_image(tmp_path / f"new.{target}", picture.rgb, picture)
    again = read_image(tmp_path / f"new.{target}").texts
    assert again == ({keyword: TEXTS[keyword] for keyword in kept} or None)
    lost = [keyword for keyword in TEXTS if keyword not in kept]
    assert len(caplog.records) == bool(lost)
    assert all(f"no place for {', '.join(lost)}, which" in record.message for record in caplog.records)
    if target == "png":
        assert (again["Source"].lang, again["Source"].tkey) == ("zh", "來源")


@pytest.mark.parametrize("encoding", ["utf-8", "latin-1"])
@pytest.mark.parametrize("target", ["png", "jpg"])
def test_a_comment_of_jpeg_is_a_text_of_png(tmp_path, caplog, target, encoding):
    Image.fromarray(random_pixels()).save(tmp_path / "old.jpg", comment="© Müller".encode(encoding) + b"\0")
    picture = read_image(tmp_path / "old.jpg")
    assert picture.texts == {"Comment": "© Müller"}
    write_image(tmp_path / f"new.{target}", picture.rgb, picture)
    assert read_image(tmp_path / f"new.{target}").texts == picture.texts
    assert not caplog.records


def test_comments_of_a_jpeg_become_lines_of_one(tmp_path):
    Image.fromarray(random_pixels()).save(tmp_path / "old.jpg", comment="of Müller".encode("latin-1"))
    add_segments(tmp_path / "old.jpg", (b"\xff\xfe", "© 千里".encode() + b"\0"), (b"\xff\xfe", b""))
    assert read_image(tmp_path / "old.jpg").texts == {"Comment": "© 千里\nof Müller"}


def test_other_notes_of_a_jpeg_stand_before_iptc(tmp_path):
    rgb = torch.zeros(3, 2, 2)
    write_image(tmp_path / "new.jpg", rgb, Picture(rgb, exif=notes(1), xmp=KEPT_XMP, iptc=IPTC))
    written = (tmp_path / "new.jpg").read_bytes()
    places = [written.index(name) for name in (b"JFIF", b"Exif", b"ns.adobe.com/xap", b"Photoshop 3.0", b"\xff\xdb")]
    assert places == sorted(places)
    assert int.from_bytes(written[places[3] - 2 : places[3]], "big") % 2 == 0  # as Photoshop's resources have it
    again = read_image(tmp_path / "new.jpg")
    assert (again.xmp, again.iptc) == (KEPT_XMP, IPTC) and again.exif is not None


@pytest.mark.parametrize("target", FORMATS)
@pytest.mark.parametrize("text", ["千里江山圖".encode(), "© Müller".encode("latin-1")], ids=["utf-8", "latin-1"])
def test_notes_in_any_encoding_keep_their_bytes(tmp_path, target, text):
    exif = Image.Exif()
    exif[ExifTags.Base.ImageDescription] = text
    Image.fromarray(random_pixels()).save(tmp_path / "old.jpg", exif=exif.tobytes())
    picture = read_image(tmp_path / "old.jpg")
    write_image(tmp_path / f"new.{target}", picture.rgb, picture)
    with Image.open(tmp_path / f"new.{target}") as image:
        assert image.getexif()[ExifTags.Base.ImageDescription].encode("latin-1") == text


@pytest.mark.parametrize("target", FORMATS)
def test_a_disk_that_takes_a_part_of_a_picture_leaves_the_old_one(tmp_path, target):
    path = tmp_path / f"old.{target}"
    write_image(path, torch.from_numpy(random_pixels(40, 50)).permute(2, 0, 1) / 255)
    before = path.read_bytes()
    # The write that crosses the limit is cut short, as on a disk that fills up.
    code = f"""
import resource, signal, torch
from restoration.imaging import write_image
rgb = torch.rand(3, 40, 50, generator=torch.Generator().manual_seed(0))
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, ({len(before)} - 100, resource.RLIM_INFINITY))
write_image({str(path)!r}, rgb, force=True)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "cannot be written" in done.stderr and done.returncode == 1
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("suffix", ["png", "tif", "jpg"])
def test_resolution_survives(tmp_path, suffix):
    Image.fromarray(random_pixels()).save(tmp_path / f"old.{suffix}", dpi=(600, 300))
    picture = read_image(tmp_path / f"old.{suffix}")
    write_image(tmp_path / f"new.{suffix}", picture.rgb, picture)
    with Image.open(tmp_path / f"new.{suffix}") as image:
        assert [float(value) for value in image.info["dpi"]] == pytest.approx([600, 300], rel=1e-3)


def test_a_long_padding_of_xmp_is_read_at_once(tmp_path):
    """A million spaces: to look for the end of them from each one would take days."""
    packet = KEPT_XMP + b" " * 1_000_000
    save_with_xmp(tmp_path / "old.png", packet)
    assert read_image(tmp_path / "old.png").xmp == packet


@pytest.mark.parametrize(
    ("suffix", "dpi", "kept"),
    [
        ("jpg", (100_000.0, 300.0), False),
        ("jpg", (300.0, 100_000.0), False),
        ("jpg", (0.3, 300.0), False),
        ("png", (100_000.0, 300.0), True),
        ("png", (2e8, 300.0), False),
        ("tif", (2e8, 300.0), True),
        ("tif", (0.3, 300.0), True),
        ("tif", (1e12, 300.0), False),
        ("webp", (300.0, 300.0), False),
    ],
)
def test_a_resolution_that_the_format_cannot_hold_is_left_out(tmp_path, caplog, suffix, dpi, kept):
    rgb = torch.zeros(3, 2, 2)
    write_image(tmp_path / f"new.{suffix}", rgb, Picture(rgb, dpi=dpi))
    again = read_image(tmp_path / f"new.{suffix}").dpi
    assert again == (pytest.approx(dpi, rel=1e-3) if kept else None)
    assert ("has no place for a resolution" in caplog.text) == (not kept)


@pytest.mark.parametrize("suffix", LOSSLESS)
@pytest.mark.parametrize("alpha", [False, True])
def test_lossless_formats_give_back_every_byte(tmp_path, suffix, alpha):
    pixels = random_pixels(channels=4)
    transparency = torch.from_numpy(pixels[..., 3].copy()).clamp_min(1) if alpha else None
    rgb = from_pillow(Image.fromarray(pixels[..., :3].copy()))
    write_image(tmp_path / f"new.{suffix}", rgb, Picture(rgb, transparency))
    again = read_image(tmp_path / f"new.{suffix}")
    assert torch.equal(again.rgb, rgb)
    assert (again.alpha is None) if transparency is None else torch.equal(again.alpha, transparency)


@pytest.mark.parametrize("suffix", LOSSLESS)
def test_lossless_formats_keep_the_colours_of_what_nobody_sees(tmp_path, suffix):
    pixels = random_pixels()
    rgb = from_pillow(Image.fromarray(pixels))
    write_image(tmp_path / f"new.{suffix}", rgb, Picture(rgb, torch.zeros(rgb.shape[1:], dtype=torch.uint8)))
    with Image.open(tmp_path / f"new.{suffix}") as image:
        assert np.array_equal(np.asarray(image)[..., :3], pixels)


def test_jpeg_keeps_colour_at_full_resolution(tmp_path):
    rgb = torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(0))
    write_image(tmp_path / "new.jpg", rgb)
    with Image.open(tmp_path / "new.jpg") as image:
        assert image.layer == [(1, 1, 1, 0), (2, 1, 1, 1), (3, 1, 1, 1)]  # component, its sampling x, y, table
    assert (read_image(tmp_path / "new.jpg").rgb - rgb).abs().mean() < 0.02


def test_jpeg_refuses_transparency_but_not_opaque_alpha(tmp_path):
    rgb = torch.zeros(3, 2, 2)
    opaque = Picture(rgb, torch.full((2, 2), 255, dtype=torch.uint8))
    write_image(tmp_path / "opaque.jpg", rgb, opaque)
    clear = Picture(rgb, torch.full((2, 2), 254, dtype=torch.uint8))
    for function in (write_image, lambda path, rgb, like: check_writable(path, like=like)):
        assert_refuses(function, tmp_path / "clear.jpg", rgb, clear, saying="clear.jpg: JPEG would lose")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["opaque.jpg"]


@pytest.mark.parametrize(("suffix", "longest"), [("jpg", 65_500), ("webp", 16_383)])
def test_formats_refuse_longer_sides_than_they_hold(tmp_path, suffix, longest):
    write_image(tmp_path / f"fits.{suffix}", torch.zeros(3, 1, longest))
    assert_refuses(write_image, tmp_path / f"long.{suffix}", torch.zeros(3, 1, longest + 1), saying=f"{longest} pixels")
    assert not (tmp_path / f"long.{suffix}").exists()


@needs_pillow_13
def test_jpeg_refuses_more_notes_than_it_holds_before_any_work(tmp_path):
    def assert_refuses_beyond(longest, name, save):
        for length, refused in ((longest - 500, False), (longest + 500, True)):
            save(tmp_path / "old.png", length)
            picture = read_image(tmp_path / "old.png")
            if refused:
                saying = f"new.jpg: JPEG holds at most {longest} bytes of {name} data, got 6"
                assert_refuses(check_writable, tmp_path / "new.jpg", force=True, like=picture, saying=saying)
                assert_refuses(write_image, tmp_path / "new.jpg", picture.rgb, picture, force=True, saying=saying)
            else:
                write_image(tmp_path / "new.jpg", picture.rgb, picture, force=True)

    def save_exif(path, length):
        exif = Image.Exif()
        exif[ExifTags.Base.ImageDescription] = "x" * length
        Image.fromarray(random_pixels()).save(path, exif=exif)

    assert_refuses_beyond(65_533, "EXIF", save_exif)
    assert_refuses_beyond(65_504, "XMP", lambda path, length: save_with_xmp(path, b"x" * length))

    rgb = torch.zeros(3, 2, 2)
    for length in (65_505, 65_506):
        write_image(tmp_path / "new.jpg", rgb, Picture(rgb, iptc=b"x" * length), force=True)
        with Image.open(tmp_path / "new.jpg") as image:
            assert image.info["photoshop"][0x0404] == b"x" * length
    write_image(tmp_path / "new.jpg", rgb, Picture(rgb, texts={"Comment": "x" * 65_533}), force=True)
    assert read_image(tmp_path / "new.jpg").texts == {"Comment": "x" * 65_533}
    long = Picture(rgb, texts={"Comment": "ü" * 32_767})
    saying = "new.jpg: JPEG holds at most 65533 bytes of COMMENT data, got 65534"
    assert_refuses(check_writable, tmp_path / "new.jpg", force=True, like=long, saying=saying)
    long, saying = Picture(rgb, iptc=b"x" * 65_507), "new.jpg: JPEG holds at most 65506 bytes of IPTC data, got 65507"
    assert_refuses(check_writable, tmp_path / "new.jpg", force=True, like=long, saying=saying)


def test_one_pixel(tmp_path):
    for suffix in FORMATS:
        write_image(tmp_path / f"one.{suffix}", torch.full((3, 1, 1), 0.5))
        assert read_image(tmp_path / f"one.{suffix}").rgb.shape == (3, 1, 1)


def test_rounding_is_to_the_nearest_of_256_after_clamping():
    values = torch.tensor([-1.0, 0.0, 0.49 / 255, 0.51 / 255, 127.4 / 255, 127.6 / 255, 1.0, 7.0])
    assert as_bytes(values.expand(3, 1, -1))[0, :, 0].tolist() == [0, 0, 0, 1, 127, 128, 255, 255]
    steps = torch.arange(256).expand(3, 1, -1) / 255
    assert torch.equal(from_pillow(to_pillow(steps)), steps)
    rgb = torch.rand(3, 4, 5)
    assert torch.equal(from_pillow(to_pillow(rgb.requires_grad_())), (rgb * 255).round() / 255)


def refusals(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "old.png").write_bytes(b"old")
    (tmp_path / "folder.png").mkdir()
    return {
        tmp_path / "new.gif": "new.gif: output must end in one of .png, .jpg",
        tmp_path / "new": "new: output must end in one of .png",
        tmp_path / "missing" / "new.png": "missing does not exist",
        tmp_path / "file" / "new.png": "file does not exist",
        tmp_path / "folder.png": "folder.png: is a folder",
        tmp_path / "old.png": "old.png: exists already (--force overwrites)",
    }


def test_rejects_unwritable_outputs_before_and_at_writing(tmp_path):
    expected = refusals(tmp_path)
    before = sorted(tmp_path.iterdir())
    for path, saying in expected.items():
        assert_refuses(check_writable, path, saying=saying)
        assert_refuses(write_image, path, torch.zeros(3, 2, 2), saying=saying)
    assert sorted(tmp_path.iterdir()) == before
    assert (tmp_path / "old.png").read_bytes() == b"old"


def test_force_replaces(tmp_path):
    (tmp_path / "old.png").write_bytes(b"old")
    check_writable(tmp_path / "old.png", force=True)
    write_image(tmp_path / "old.png", torch.zeros(3, 2, 2), force=True)
    assert read_image(tmp_path / "old.png").rgb.shape == (3, 2, 2)
    assert list(tmp_path.iterdir()) == [tmp_path / "old.png"]


def refuse_links(monkeypatch):
    def link(source, target):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", link)


@pytest.mark.parametrize("links", [True, False])
def test_never_overwrites_a_file_that_appears_meanwhile(tmp_path, monkeypatch, links):
    path, link = tmp_path / "new.png", os.link

    def link_after_another_has_written(source, target):
        path.write_bytes(b"theirs")
        if not links:
            raise PermissionError(1, "Operation not permitted")
        link(source, target)

    monkeypatch.setattr(os, "link", link_after_another_has_written)
    assert_refuses(write_image, path, torch.zeros(3, 2, 2), saying="exists already")
    assert path.read_bytes() == b"theirs"
    assert list(tmp_path.iterdir()) == [path]


def test_writes_on_file_systems_without_links(tmp_path, monkeypatch):
    refuse_links(monkeypatch)
    write_image(tmp_path / "new.png", torch.zeros(3, 2, 2))
    assert read_image(tmp_path / "new.png").rgb.shape == (3, 2, 2)
    assert list(tmp_path.iterdir()) == [tmp_path / "new.png"]


@pytest.mark.parametrize("force", [False, True])
def test_failed_write_leaves_nothing_behind(tmp_path, monkeypatch, force):
    (tmp_path / "new.png").write_bytes(b"old") if force else None

    def fill_the_disk(self, file, **options):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", fill_the_disk)
    saying = "new.png: cannot be written (No space left on device)"
    assert_refuses(write_image, tmp_path / "new.png", torch.zeros(3, 2, 2), force=force, saying=saying)
    assert [path.read_bytes() for path in tmp_path.iterdir()] == ([b"old"] if force else [])


@pytest.mark.parametrize(
    "rgb",
    [
        torch.zeros(2, 2),
        torch.zeros(1, 2, 2),
        torch.zeros(3, 0, 2),
        torch.zeros(3, 2, 2, dtype=torch.uint8),
        torch.full((3, 2, 2), float("nan")),
        torch.zeros(3, 2, 3),
    ],
)
def test_rejects_wrong_tensors(tmp_path, rgb):
    like = Picture(torch.zeros(3, 2, 2), torch.zeros(2, 2, dtype=torch.uint8))
    with pytest.raises(ValueError, match="rgb must"):
        write_image(tmp_path / "new.png", rgb, like)
    assert not any(tmp_path.iterdir())

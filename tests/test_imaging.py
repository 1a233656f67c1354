"""Pictures on disk: read upright and in sRGB, written whole, with nothing lost or overwritten silently."""

import functools
import io
import os
import struct
import subprocess
import sys
import zlib

import numpy as np
import PIL
import pytest
import torch
from PIL import ExifTags, Image, ImageCms, PngImagePlugin

from restoration.errors import UserError
from restoration.imaging import (
    Picture,
    check_writable,
    from_pillow,
    read_image,
    read_rgb,
    to_pillow,
    to_uint8,
    write_image,
)

LOSSLESS = ("png", "tif", "webp")
FORMATS = (*LOSSLESS, "jpg")


def random_pixels(height=9, width=13, channels=3, seed=0):
    shape = (height, width, channels) if channels > 1 else (height, width)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def as_bytes(rgb):
    return to_uint8(rgb).permute(1, 2, 0).numpy()


@functools.cache  # it holds the second in which it was made
def srgb_profile():
    return ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def exchanged_profile():
    """An RGB profile whose red primary is sRGB's blue and the other way round."""
    profile = srgb_profile().replace("sRGB built-in".encode("utf-16-be"), "other colours".encode("utf-16-be"))
    return profile.replace(b"rXYZ", b"....").replace(b"bXYZ", b"rXYZ").replace(b"....", b"bXYZ")


def grey_profile():
    """Of a scanner whose grey values are linear in light: a header, and a tone curve as the only tag."""
    curve = struct.pack(">4s4xI", b"curv", 0)
    size = 128 + 4 + 12 + len(curve)
    header = struct.pack(">I4xI4s4s4s12x4s", size, 0x02400000, b"scnr", b"GRAY", b"XYZ ", b"acsp")
    illuminant = struct.pack(">28x3I", 0xF6D6, 0x10000, 0xD32D)
    return (header + illuminant).ljust(128, b"\0") + struct.pack(">I4sII", 1, b"kTRC", 144, len(curve)) + curve


def notes(orientation):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    exif[ExifTags.Base.Artist] = "Wang Ximeng"
    exif[ExifTags.IFD.Exif] = {
        ExifTags.Base.DateTimeOriginal: "1113:01:01 00:00:00",
        ExifTags.Base.ExifImageWidth: 13,
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
    """ tiff:Orientation="6"\n photoshop:ICCProfile='Adobe RGB' exif:PixelXDimension = "13" dc:format="image/tiff\"""",
    """<exif:ColorSpace>65535</exif:ColorSpace><tiff:ImageWidth/><xmp:Thumbnails><rdf:Alt><rdf:li
    xmpGImg:image="/9j/4AAQ"/></rdf:Alt></xmp:Thumbnails><tiff:BitsPerSample a="/"><rdf:Seq/></tiff:BitsPerSample>""",
).encode()


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


def png_of_16_bits(values):
    """A 16-bit RGB PNG, which Pillow reads but cannot write; values are uint16 [H, W, 3]."""
    height, width, _ = values.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)

    def chunk(name, content):
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


@pytest.mark.parametrize(("tags", "white", "black"), [({}, 65_535, 0), ({262: 0}, 0, 65_535)], ids=["usual", "turned"])
@pytest.mark.parametrize("orientation", [1, 3])
def test_deep_grey_of_either_direction(tmp_path, tags, white, black, orientation):
    values = np.array([[white, black, 30_000], [white, black, 30_000]], np.uint16)
    Image.fromarray(values).save(tmp_path / "grey.tif", tiffinfo={**tags, 274: orientation})
    middle = 30_000 / 65_535 if white else 1 - 30_000 / 65_535
    row = [1.0, 0.0, middle] if orientation == 1 else [middle, 0.0, 1.0]
    found = read_rgb(tmp_path / "grey.tif")
    assert np.abs(np.asarray(found)[..., 0] / 255 - row).max() <= 0.5 / 255 + 1e-6


def test_grey_of_12_bits_reaches_white(tmp_path):
    packed = bytes([0xFF, 0xF0, 0x00, 0x80, 0x00, 0x00])  # 4095, 0, 2048, 0
    entries = {256: 4, 257: 1, 258: 12, 259: 1, 262: 1, 273: 8, 277: 1, 278: 1, 279: len(packed)}
    directory = b"".join(struct.pack("<HHIHH", tag, 3, 1, value, 0) for tag, value in entries.items())
    header = b"II*\0" + struct.pack("<I", 8 + len(packed))
    (tmp_path / "grey.tif").write_bytes(header + packed + struct.pack("<H", len(entries)) + directory + b"\0" * 4)
    assert np.asarray(read_rgb(tmp_path / "grey.tif"))[0, :, 0].tolist() == [255, 0, 128, 0]


def assert_refuses(function, *arguments, saying, **options):
    with pytest.raises(UserError) as caught:
        function(*arguments, **options)
    assert saying in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("suffix", [*LOSSLESS, "bmp", "tiff", "PNG"])
def test_reads_every_pixel(tmp_path, suffix):
    pixels = random_pixels()
    path = tmp_path / f"picture.{suffix}"
    Image.fromarray(pixels).save(path, **({"lossless": True} if suffix == "webp" else {}))
    picture = read_image(path)
    assert picture.rgb.dtype == torch.float32
    assert picture.rgb.is_contiguous()
    torch.testing.assert_close(picture.rgb, torch.from_numpy(pixels).permute(2, 0, 1) / 255, rtol=0, atol=0)
    assert picture.alpha is None
    assert np.array_equal(np.asarray(read_rgb(path)), pixels)


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "YCbCr"])
def test_other_modes_become_rgb(tmp_path, mode):
    if mode == "YCbCr" and int(PIL.__version__.partition(".")[0]) < 13:
        pytest.skip("Pillow before 13 does not read the YCbCr TIFF files that it writes")
    image = Image.fromarray(random_pixels()).convert(mode)
    path = tmp_path / "picture.tif"
    image.save(path)
    assert np.array_equal(as_bytes(read_image(path).rgb), np.asarray(image.convert("RGB")))


@pytest.mark.parametrize("mode", ["LA", "RGBA"])
def test_alpha_is_read(tmp_path, mode):
    image = Image.fromarray(random_pixels(channels=4)).convert(mode)
    image.save(tmp_path / "picture.png")
    picture = read_image(tmp_path / "picture.png")
    assert np.array_equal(picture.alpha.numpy(), np.asarray(image.getchannel("A")))
    assert np.array_equal(as_bytes(picture.rgb), np.asarray(image.convert("RGBA"))[..., :3])


def test_palette_transparency_becomes_alpha(tmp_path):
    image = Image.fromarray(random_pixels(channels=1) % 4).convert("P")
    image.save(tmp_path / "picture.png", transparency=2)
    alpha = read_image(tmp_path / "picture.png").alpha.numpy()
    assert np.array_equal(alpha == 0, np.asarray(image) == 2)


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_grey_of_16_bits_is_rounded(tmp_path, suffix):
    values = np.array([[0, 128, 129, 385, 386, 65_535]], dtype=np.uint16)  # 257 apart; 128 and 385 lie just below half
    Image.fromarray(values).save(tmp_path / f"grey.{suffix}")
    rgb = as_bytes(read_image(tmp_path / f"grey.{suffix}").rgb)
    assert rgb[0, :, 0].tolist() == [0, 0, 1, 1, 2, 255]
    assert (rgb == rgb[..., :1]).all()


def test_colour_of_16_bits_keeps_the_high_byte(tmp_path):
    values = np.random.default_rng(0).integers(0, 65_536, (5, 7, 3), dtype=np.uint16)
    (tmp_path / "colour.png").write_bytes(png_of_16_bits(values))
    assert np.array_equal(as_bytes(read_image(tmp_path / "colour.png").rgb), (values >> 8).astype(np.uint8))


@pytest.mark.parametrize("values", [np.zeros((2, 2), np.float32), np.full((2, 2), 70_000, np.int32)])
def test_rejects_float_and_32_bit_pixels(tmp_path, values):
    Image.fromarray(values).save(tmp_path / "wide.tif")
    assert_refuses(read_image, tmp_path / "wide.tif", saying="wide.tif: float and 32-bit pixels")


def test_rejects_modes_that_pillow_cannot_convert(tmp_path, monkeypatch):
    Image.new("LAB", (2, 2)).save(tmp_path / "lab.tif")

    def convert(self, mode):  # as every Pillow before 13 answers
        raise ValueError(f"conversion from {self.mode} to {mode} not supported")

    monkeypatch.setattr(Image.Image, "convert", convert)
    assert_refuses(read_image, tmp_path / "lab.tif", saying="lab.tif: colour mode LAB cannot be read")


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
        assert exif[ExifTags.Base.Artist] == "Wang Ximeng"
        assert exif.get_ifd(ExifTags.IFD.Exif) == {ExifTags.Base.DateTimeOriginal: "1113:01:01 00:00:00"}
        assert exif.get_ifd(ExifTags.IFD.GPSInfo) == {ExifTags.GPS.GPSLatitudeRef: "N"}
        assert ExifTags.Base.Orientation not in exif
        assert image.info["icc_profile"] == srgb_profile()
        assert image.size == (9, 13)


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


def test_damaged_notes_do_not_cost_the_picture(tmp_path, caplog):
    pixels = random_pixels()
    Image.fromarray(pixels).save(tmp_path / "old.png", exif=b"Exif\0\0no notes", icc_profile=b"no profile")
    picture = read_image(tmp_path / "old.png")
    assert np.array_equal(as_bytes(picture.rgb), pixels)
    assert (picture.icc_profile, picture.exif) == (None, None)
    assert "old.png: its EXIF data cannot be read and is left out" in caplog.text
    assert "old.png: its colour profile is ignored" in caplog.text


@pytest.mark.parametrize("source", FORMATS)
def test_xmp_that_is_not_utf8_is_left_out(tmp_path, caplog, source):
    save_with_xmp(tmp_path / f"old.{source}", "<x/>".encode("utf-16"))
    assert read_image(tmp_path / f"old.{source}").xmp is None
    assert f"old.{source}: its XMP data cannot be read and is left out" in caplog.text


def test_srgb_profile_leaves_pixels_alone(tmp_path):
    pixels = random_pixels()
    Image.fromarray(pixels).save(tmp_path / "old.png", icc_profile=srgb_profile())
    assert np.array_equal(as_bytes(read_image(tmp_path / "old.png").rgb), pixels)


@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
def test_other_profiles_are_converted_to_srgb(tmp_path, mode):
    image = Image.new(mode, (4, 4), (200, 90, 30, 77)[: len(mode)])
    image.save(tmp_path / "old.png", icc_profile=exchanged_profile())
    picture = read_image(tmp_path / "old.png")
    # Red and blue change places, up to rounding of the 8-bit conversion.
    expected = torch.tensor([30, 90, 200])
    assert (to_uint8(picture.rgb[:, 0, 0]).int() - expected).abs().max() <= 2
    assert ImageCms.getProfileDescription(io.BytesIO(picture.icc_profile)).startswith("sRGB")
    assert (picture.alpha is None) if mode == "RGB" else bool((picture.alpha == 77).all())


@pytest.mark.parametrize("mode", ["LA", "L with a transparent grey"])
def test_grey_keeps_its_profile_beside_alpha(tmp_path, mode):
    path, values = tmp_path / "old.png", np.arange(64, dtype=np.uint8).reshape(8, 8) * 4
    grey = Image.fromarray(values)
    grey.save(tmp_path / "opaque.png", icc_profile=grey_profile())
    if mode == "LA":
        grey.putalpha(Image.new("L", (8, 8), 77))
        grey.save(path, icc_profile=grey_profile())
    else:
        grey.save(path, icc_profile=grey_profile(), transparency=200)
    picture, opaque = read_image(path), read_image(tmp_path / "opaque.png")
    assert not np.array_equal(as_bytes(opaque.rgb)[..., 0], values)
    assert torch.equal(picture.rgb, opaque.rgb)
    assert np.array_equal(picture.alpha, np.full((8, 8), 77) if mode == "LA" else np.where(values == 200, 0, 255))


def test_profile_of_another_colour_space_is_ignored(tmp_path, caplog):
    pixels = random_pixels(channels=1)
    Image.fromarray(pixels).save(tmp_path / "grey.png", icc_profile=exchanged_profile())
    assert np.array_equal(as_bytes(read_image(tmp_path / "grey.png").rgb)[..., 1], pixels)
    assert "grey.png: its colour profile is ignored" in caplog.text


def test_rejects_what_is_no_image(tmp_path):
    assert_refuses(read_image, tmp_path / "none.png", saying="none.png: no such file")
    assert_refuses(read_image, tmp_path, saying=f"{tmp_path}: is a folder, not an image")
    (tmp_path / "empty.png").touch()
    assert_refuses(read_image, tmp_path / "empty.png", saying="empty.png: is an empty file (0 bytes)")
    (tmp_path / "text.png").write_text("not an image\n" * 100)
    assert_refuses(read_image, tmp_path / "text.png", saying="text.png: is not a readable PNG")
    (tmp_path / "program.jpg").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n")
    assert_refuses(read_image, tmp_path / "program.jpg", saying="program.jpg: is not a readable PNG")
    (tmp_path / "flat.png").write_bytes(png_of_16_bits(np.zeros((0, 4, 3), np.uint16)))
    assert_refuses(read_image, tmp_path / "flat.png", saying="flat.png: is ")
    assert_refuses(
        read_image, tmp_path / "text.png" / "inside.png", saying="inside.png: cannot be read (Not a directory)"
    )


@pytest.mark.parametrize("suffix", [*FORMATS, "bmp"])
@pytest.mark.parametrize("share", [0.02, 0.3, 0.6, 0.95])
@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's own, on the cut TIFF directory
def test_rejects_truncated_images(tmp_path, suffix, share):
    path = tmp_path / f"cut.{suffix}"
    Image.fromarray(random_pixels(40, 60)).save(path)
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    assert_refuses(read_image, path, saying=f"cut.{suffix}: is ")
    assert_refuses(read_rgb, path, saying=f"cut.{suffix}: is ")


def test_rejects_decompression_bombs(tmp_path, monkeypatch):
    Image.fromarray(random_pixels(20, 20)).save(tmp_path / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    assert_refuses(read_image, tmp_path / "bomb.png", saying="bomb.png: has too many pixels")


@pytest.mark.parametrize("suffix", LOSSLESS)
@pytest.mark.parametrize("alpha", [False, True])
def test_lossless_formats_give_back_every_byte(tmp_path, suffix, alpha):
    pixels = random_pixels(channels=4)
    transparency = torch.from_numpy(pixels[..., 3].copy()) if alpha else None
    rgb = from_pillow(Image.fromarray(pixels[..., :3].copy()))
    write_image(tmp_path / f"new.{suffix}", rgb, Picture(rgb, transparency))
    again = read_image(tmp_path / f"new.{suffix}")
    assert torch.equal(again.rgb, rgb)
    assert (again.alpha is None) if transparency is None else torch.equal(again.alpha, transparency)


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


def test_one_pixel(tmp_path):
    for suffix in FORMATS:
        write_image(tmp_path / f"one.{suffix}", torch.full((3, 1, 1), 0.5))
        assert read_image(tmp_path / f"one.{suffix}").rgb.shape == (3, 1, 1)


def test_rounding_is_to_the_nearest_of_256_after_clamping():
    values = torch.tensor([-1.0, 0.0, 0.49 / 255, 0.51 / 255, 127.4 / 255, 127.6 / 255, 1.0, 7.0])
    assert to_uint8(values).tolist() == [0, 0, 0, 1, 127, 128, 255, 255]
    steps = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_uint8(steps.float() / 255), steps)
    rgb = torch.rand(3, 4, 5)
    assert torch.equal(from_pillow(to_pillow(rgb.requires_grad_())), to_uint8(rgb) / 255)


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
    path = tmp_path / "new.png"
    if not links:
        refuse_links(monkeypatch)
    save = Image.Image.save

    def save_while_another_writes(*arguments, **options):
        path.write_bytes(b"theirs")
        save(*arguments, **options)

    monkeypatch.setattr(Image.Image, "save", save_while_another_writes)
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

"""Pictures of 16 bits a channel: all of them are read, brought to sRGB and written."""

import io
import struct
import zlib

import numpy as np
import pytest
import tifffile
import torch
from pictures import exchanged_profile, grey_profile, linear_profile, png_of_16_bits, srgb_profile, write_tiff
from PIL import ExifTags, Image, ImageCms

from restoration.colour import _adobe_rgb as adobe_profile
from restoration.colour import deep_to_srgb
from restoration.decoding import decode
from restoration.imaging import Picture, from_pillow, read_image, read_rgb, write_image
from restoration.matrix_profile import SRGB_PRIMARIES, OtherProfileError, matrix_profile


def deep_pixels(height=9, width=13, channels=3, seed=0):
    return np.random.default_rng(seed).integers(0, 65_536, (height, width, channels), dtype=np.uint16)


def seen(values):
    values[..., 3:] |= 0x100  # alpha
    return values


def in_16_bits(picture):
    return np.rint(picture.rgb.numpy().transpose(1, 2, 0).astype(np.float64) * 65_535).astype(np.uint16)


def assert_holds(path, values):
    picture = read_image(path)
    assert picture.bits == 16 and np.array_equal(in_16_bits(picture), values)
    return picture


@pytest.mark.parametrize("channels", [3, 4])
def test_a_png_is_read_to_the_last_bit(tmp_path, channels):
    values = seen(deep_pixels(channels=channels))
    (tmp_path / "scan.png").write_bytes(png_of_16_bits(values))
    picture = assert_holds(tmp_path / "scan.png", values[..., :3])
    if channels == 4:
        assert np.array_equal(picture.alpha, values[..., 3] >> 8)
    shallow = read_image(tmp_path / "scan.png", deep=False)
    assert shallow.bits == 8 and torch.equal(shallow.rgb, from_pillow(read_rgb(tmp_path / "scan.png")))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"byteorder": ">"},
        {"bigtiff": True},
        {"rowsperstrip": 2},
        {"tile": (16, 16)},
        {"compression": "zlib"},
        {"compression": "zlib", "byteorder": ">"},
        {"compression": "zlib", "predictor": True, "tile": (16, 16)},
    ],
    ids=str,
)
@pytest.mark.parametrize("channels", [3, 4])
def test_a_tiff_is_read_to_the_last_bit(tmp_path, channels, options):
    values = seen(deep_pixels(20, 37, channels))
    extra = {"extrasamples": ["unassalpha"]} if channels == 4 else {}
    tifffile.imwrite(tmp_path / "scan.tif", values, photometric="rgb", **extra, **options)
    assert_holds(tmp_path / "scan.tif", values[..., :3])


def test_the_first_page_is_read_not_its_reduced_copy(tmp_path):
    values = deep_pixels()
    with tifffile.TiffWriter(tmp_path / "scan.tif") as file:
        file.write(values[::2, ::2] // 2, photometric="rgb", subfiletype=1)
        file.write(values, photometric="rgb")
    assert_holds(tmp_path / "scan.tif", values)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_the_low_bytes_turn_with_the_high_ones(tmp_path, suffix, orientation):
    values, path = deep_pixels(), tmp_path / f"scan.{suffix}"
    if suffix == "tif":
        tifffile.imwrite(path, values, photometric="rgb", extratags=[(274, 3, 1, orientation, True)])
    else:
        exif = Image.Exif()
        exif[ExifTags.Base.Orientation] = orientation
        path.write_bytes(with_exif(png_of_16_bits(values), exif.tobytes().removeprefix(b"Exif\0\0")))
    high = np.asarray(decode(path).rgb)
    assert high.shape[:2] == ((9, 13) if orientation < 5 else (13, 9))
    picture = read_image(path)
    assert picture.bits == 16 and np.array_equal(in_16_bits(picture) >> 8, high)
    assert sorted(map(tuple, in_16_bits(picture).reshape(-1, 3))) == sorted(map(tuple, values.reshape(-1, 3)))


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_grey_is_read_to_the_last_bit(tmp_path, suffix):
    values = deep_pixels(channels=1)[..., 0]
    Image.fromarray(values).save(tmp_path / f"scan.{suffix}")
    assert_holds(tmp_path / f"scan.{suffix}", np.stack([values] * 3, axis=2))


def test_grey_of_12_bits_reaches_white(tmp_path):
    packed = bytes([0xFF, 0xF0, 0x00, 0x80, 0x10, 0x00])  # 4095, 0, 2049, 0
    write_tiff(tmp_path / "grey.tif", {256: [4], 257: [1], 258: [12], 259: [1], 262: [1], 277: [1], 278: [1]}, [packed])
    row = [65_535, 0, round(2049 * 65_535 / 4095), 0]
    assert_holds(tmp_path / "grey.tif", np.array(row, np.uint16)[None, :, None].repeat(3, axis=2))


def test_pixels_that_nobody_sees_take_all_bits_of_the_nearest(tmp_path):
    values = deep_pixels(1, 4, 4)
    values[..., 3] = [0, 65_535, 65_535, 0]
    (tmp_path / "scan.png").write_bytes(png_of_16_bits(values))
    assert_holds(tmp_path / "scan.png", values[:, [1, 1, 2, 2], :3])


@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ((9, 13, 4), {"photometric": "separated"}),
        ((9, 13, 4), {"photometric": "rgb", "extrasamples": ["assocalpha"]}),
        ((3, 9, 13), {"photometric": "rgb", "planarconfig": "separate", "compression": "zlib"}),
    ],
    ids=["CMYK", "multiplied by alpha", "planes"],
)
def test_other_kinds_are_read_with_8_bits_and_a_warning(tmp_path, caplog, shape, options):
    tifffile.imwrite(tmp_path / "scan.tif", np.full(shape, 52_428, np.uint16), **options)
    picture = read_image(tmp_path / "scan.tif")
    assert picture.bits == 8 and torch.equal(picture.rgb, (picture.rgb * 255).round() / 255)
    assert "scan.tif: is read with 8 of its 16 bits a channel" in caplog.text


def with_exif(png, notes):
    return with_chunk(png, b"eXIf" + notes)


def with_chunk(png, chunk):
    """The same PNG with a chunk of this name and content before its pixels."""
    return png[:33] + struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk)) + png[33:]


def test_damaged_exif_leaves_all_bits(tmp_path, caplog):
    values = deep_pixels()
    (tmp_path / "scan.png").write_bytes(with_exif(png_of_16_bits(values), b"no notes"))
    assert_holds(tmp_path / "scan.png", values)
    assert "its EXIF data cannot be read" in caplog.text


def test_16_bits_a_pixel_are_not_a_channel(tmp_path):
    header = struct.pack("<2sI4xI", b"BM", 66 + 8, 66)
    header += struct.pack("<IiiHHII16x3I", 40, 2, 2, 1, 16, 3, 8, 0xF800, 0x07E0, 0x001F)
    (tmp_path / "scan.bmp").write_bytes(header + struct.pack("<4H", 0xF800, 0x07E0, 0x001F, 0xFFFF))
    picture = read_image(tmp_path / "scan.bmp")
    assert picture.bits == 8 and picture.rgb[:, 0].T.tolist() == [[0, 0, 1], [1, 1, 1]]


@pytest.mark.parametrize("suffix", ["png", "tif", "jpg", "webp", "bmp"])
def test_8_bits_stay_8_bits(tmp_path, caplog, suffix):
    Image.new("RGB", (4, 4), (1, 2, 3)).save(tmp_path / f"scan.{suffix}")
    assert read_image(tmp_path / f"scan.{suffix}").bits == 8 and caplog.text == ""


def in_profile(profile, mode="RGB"):
    image = Image.new(mode, (1, 1))
    image.info["icc_profile"] = profile
    return image


def table_profile():
    """A curve of 1,024 points that is a gamma of 1.8, in sRGB's primaries."""
    points = np.rint(np.linspace(0, 1, 1024) ** 1.8 * 65_535).astype(int)
    return with_curve(struct.pack(">4s4xI1024H", b"curv", 1024, *points))


def with_curve(curve):
    """sRGB's profile with another curve, at its end."""
    profile = srgb_profile()
    for channel in (b"rTRC", b"gTRC", b"bTRC"):
        entry = profile.index(channel)
        profile = profile[: entry + 4] + struct.pack(">II", len(srgb_profile()), len(curve)) + profile[entry + 12 :]
    profile += curve
    return struct.pack(">I", len(profile)) + profile[4:]


def parametric(number, *parameters):
    return with_curve(
        struct.pack(f">4s4xHH{len(parameters)}i", b"para", number, 0, *(round(p * 65_536) for p in parameters))
    )


PROFILES = {
    "adobe": adobe_profile,  # of colours that sRGB cannot hold
    "exchanged": exchanged_profile,
    "linear": linear_profile,
    "table": table_profile,
    "power": lambda: with_curve(struct.pack(">4s4xIH2x", b"curv", 1, 256 * 2 + 77)),
    "parametric 0": lambda: parametric(0, 1.8),
    "parametric 1": lambda: parametric(1, 2.2, 1.1, -0.1),
    "parametric 2": lambda: parametric(2, 2.2, 1.05, -0.1, 0),
    "parametric 3": lambda: parametric(3, 2.4, 1 / 1.055, 0.055 / 1.055, 1 / 14, 0.04),
    "parametric 4": lambda: parametric(4, 2.4, 0.96, 0.04, 0.1, 0.04, 0, 0),
}
# Their black is not dark, and littlecms makes it so.
GREY_BLACKS = {
    "parametric 2": lambda: parametric(2, 2.2, 1.05, -0.1, 0.02),
    "parametric 4": lambda: parametric(4, 2.4, 0.93, 0.04, 0.1, 0.04, 0.01, 0.005),
}


@pytest.mark.parametrize("name", PROFILES)
def test_a_profile_means_what_it_means_to_littlecms(name):
    """Which Pillow offers for 8 bits: there the results meet within a step, and 16 bits fill what lies between."""
    profile = PROFILES[name]()
    colours = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    transform = ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), "RGB", "RGB")
    expected = np.asarray(ImageCms.applyTransform(Image.fromarray(colours), transform))
    found = deep_to_srgb(colours.astype(np.uint16) * 257, in_profile(profile))
    assert np.abs(found / 257 - expected).max() <= 1
    ramp = np.arange(30_000, 40_000, dtype=np.uint16)[:, None, None].repeat(3, axis=2)
    assert len(np.unique(deep_to_srgb(ramp, in_profile(profile))[..., 1])) > 4_000


def in_shades_of_srgb(light):
    return np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055) * 65_535


def test_a_profile_in_closed_form():
    """Linear light in sRGB's primaries: sRGB's curve alone is left."""
    values = deep_pixels(300, 2)  # of more rows than are converted at once
    expected = in_shades_of_srgb(values / 65_535)
    found = deep_to_srgb(values, in_profile(linear_profile()))
    assert np.abs(found - expected).max() <= 0.6  # 0.5 of rounding, and primaries of 16 bits


def test_primaries_of_srgb():
    assert np.array_equal(matrix_profile(srgb_profile()).primaries, SRGB_PRIMARIES)


def test_a_grey_profile_in_closed_form():
    values = deep_pixels(channels=1)
    expected = in_shades_of_srgb((values / 65_535) ** (460 / 256))
    found = deep_to_srgb(values, in_profile(grey_profile(460), "L"))  # one point is a power, of 8 bits after the point
    assert np.abs(found - expected).max() <= 0.6


def test_a_grey_profile(tmp_path):
    values = np.arange(0, 65_536, 257, dtype=np.uint16)[None]
    for name, pixels in (("deep", values), ("flat", (values // 257).astype(np.uint8))):
        Image.fromarray(pixels).save(tmp_path / f"{name}.tif", icc_profile=grey_profile())
    deep, flat = (read_image(tmp_path / f"{name}.tif") for name in ("deep", "flat"))
    assert deep.bits == 16 and deep.icc_profile == flat.icc_profile
    assert (deep.rgb - flat.rgb).abs().max() <= 1 / 255
    assert (deep.rgb * 255 - (deep.rgb * 255).round()).abs().max() > 0.4


def test_a_grey_profile_beside_an_alpha(tmp_path, caplog):
    """Of a kind that Pillow opens as RGBA, for which a grey profile would be of no use."""
    shades = np.arange(256, dtype=np.uint8)[None]
    flat = np.stack([shades, np.full_like(shades, 255)], -1)
    Image.fromarray(flat, "LA").save(tmp_path / "flat.png", icc_profile=grey_profile())
    chunk = b"iCCPgrey\0\0" + zlib.compress(grey_profile())
    (tmp_path / "deep.png").write_bytes(with_chunk(png_of_16_bits(flat.astype(np.uint16) * 257), chunk))
    deep, expected = (read_image(tmp_path / name) for name in ("deep.png", "flat.png"))
    assert torch.equal(deep.rgb, expected.rgb) and deep.icc_profile == expected.icc_profile
    assert caplog.messages == [
        f"{tmp_path / 'deep.png'}: is read with 8 of its 16 bits a channel; RGB and grey keep all"
    ]


def test_srgb_and_unknown_profiles_change_nothing(tmp_path):
    values = deep_pixels()
    for profile in (None, srgb_profile(), b"no profile", grey_profile()):
        assert np.array_equal(deep_to_srgb(values, in_profile(profile)), values)


def test_curves_in_closed_form():
    x = np.linspace(0, 1, 65_536)
    expected = {
        "parametric 2": np.where(x >= 0.1 / 1.05, np.maximum(1.05 * x - 0.1, 0) ** 2.2, 0) + 0.02,
        "parametric 4": np.where(x >= 2621 / 65_536, (0.93 * x + 0.04) ** 2.4 + 0.01, 0.1 * x + 0.005),
    }
    for name, curve in expected.items():
        assert np.abs(matrix_profile(GREY_BLACKS[name]()).curves - curve).max() < 1e-4
    assert matrix_profile(parametric(1, 2.2, 1.2, -0.1)).curves.max() == 1  # as all light


def test_profiles_that_are_no_curves_and_primaries():
    profile = exchanged_profile()
    lab = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    unknown, unnumbered = (
        profile.replace(b"para" + bytes(5) + b"\3", other) for other in (b"mAB ", b"para" + bytes(5) + b"\7")
    )
    for broken in (lab, unknown, unnumbered, b"", profile[:140], profile[:200]):
        with pytest.raises(OtherProfileError):
            matrix_profile(broken)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("profile", [*GREY_BLACKS.values(), lambda: parametric(0, -1)], ids=[*GREY_BLACKS, "damaged"])
def test_other_profiles_leave_8_bits_and_a_warning(tmp_path, caplog, profile):
    values = deep_pixels()
    for name, used in (("scan", exchanged_profile()), ("other", profile())):
        tifffile.imwrite(tmp_path / f"{name}.tif", values, photometric="rgb", iccprofile=used)
    assert read_image(tmp_path / "scan.tif").bits == 16 and caplog.text == ""
    assert read_image(tmp_path / "other.tif").bits == 8
    assert "other.tif: is read with 8 of its 16 bits a channel" in caplog.text


def full_picture(**others):
    exif = Image.Exif()
    exif[ExifTags.Base.Artist] = "Wang Ximeng"
    return Picture(
        rgb=torch.zeros(3, 9, 13),
        exif=exif.tobytes(),
        xmp=b"<x:xmpmeta xmlns:x='adobe:ns:meta/'/>",
        icc_profile=srgb_profile(),
        dpi=(300.0, 300.0),
        bits=16,
        **others,
    )


@pytest.mark.parametrize("with_alpha", [False, True])
@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_what_is_written_is_read_again_by_others_too(tmp_path, caplog, suffix, with_alpha):
    values, path = deep_pixels(), tmp_path / f"result.{suffix}"
    alpha = torch.arange(117, dtype=torch.uint8).reshape(9, 13) + 1 if with_alpha else None
    said = {"texts": {"Title": "River"}} if suffix == "png" else {"iptc": b"\x1c\x02\x05\0\x05River"}
    like = full_picture(alpha=alpha, **said)
    write_image(path, torch.from_numpy(values.astype(np.float32).transpose(2, 0, 1) / 65_535), like)
    again = assert_holds(path, values)
    assert caplog.text == ""
    for name in ("xmp", "icc_profile", "texts", "iptc"):
        assert getattr(again, name) == getattr(like, name), name
    assert again.dpi == pytest.approx(like.dpi, rel=1e-4)
    assert (again.alpha is None) if alpha is None else torch.equal(again.alpha, alpha)
    with Image.open(path) as image:
        assert image.getexif()[ExifTags.Base.Artist] == "Wang Ximeng"
        assert image.size == (13, 9) and np.array_equal(np.asarray(image)[..., :3], values >> 8)
    if suffix == "tif":
        written = tifffile.imread(path)
        assert np.array_equal(written[..., :3], values)
        assert not with_alpha or np.array_equal(written[..., 3], alpha.numpy().astype(np.uint16) * 257)


@pytest.mark.parametrize("suffix", ["jpg", "webp"])
def test_formats_of_8_bits_say_what_they_lose(tmp_path, caplog, suffix):
    write_image(tmp_path / f"result.{suffix}", torch.rand(3, 4, 4), Picture(torch.zeros(3, 4, 4), bits=16))
    assert f"result.{suffix}: " in caplog.text and "holds 8 bits a channel; .png and .tif would keep" in caplog.text
    assert read_image(tmp_path / f"result.{suffix}").bits == 8


def test_a_shade_between_two_of_8_bits_is_written(tmp_path):
    like = Picture(torch.zeros(3, 1, 1), bits=16)
    for suffix in ("png", "tif"):
        write_image(tmp_path / f"result.{suffix}", torch.full((3, 1, 1), 100.5 / 65_535), like)
        assert in_16_bits(read_image(tmp_path / f"result.{suffix}")).ravel()[0] in (100, 101)

"""From files to upright pixels in sRGB: every kind that can be read, and a line for those that cannot."""

import io
import os
import struct
import zlib

import numpy as np
import pytest
import torch
from pictures import (
    FORMATS,
    LOSSLESS,
    as_bytes,
    assert_refuses,
    exchanged_profile,
    grey_profile,
    linear_profile,
    needs_pillow_13,
    png_of_16_bits,
    random_pixels,
    raw_png,
    save_with_xmp,
    srgb_profile,
    write_tiff,
)
from PIL import ExifTags, Image, ImageCms, PngImagePlugin, TiffImagePlugin

from restoration.imaging import read_image, read_rgb


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
    write_tiff(tmp_path / "grey.tif", {256: [4], 257: [1], 258: [12], 259: [1], 262: [1], 277: [1], 278: [1]}, [packed])
    assert np.asarray(read_rgb(tmp_path / "grey.tif"))[0, :, 0].tolist() == [255, 0, 128, 0]


def test_signed_grey_of_16_bits_reaches_white(tmp_path):
    values = np.array([32_767, 0, 16_384], "<i2").tobytes()
    tags = {256: [3], 257: [1], 258: [16], 259: [1], 262: [1], 277: [1], 278: [1], 339: [2]}
    write_tiff(tmp_path / "grey.tif", tags, [values])
    assert np.asarray(read_rgb(tmp_path / "grey.tif"))[0, :, 0].tolist() == [255, 0, 128]


def test_planes_of_8_bits(tmp_path):
    values = random_pixels().transpose(2, 0, 1)
    tags = {256: [13], 257: [9], 258: [8] * 3, 259: [1], 262: [2], 277: [3], 278: [9], 284: [2]}
    write_tiff(tmp_path / "planes.tif", tags, [plane.tobytes() for plane in values])
    assert np.array_equal(np.asarray(read_rgb(tmp_path / "planes.tif")), random_pixels())


@pytest.mark.parametrize(("compression", "pack"), [(1, bytes), (8, zlib.compress)], ids=["raw", "deflate"])
def test_planes_of_16_bits_are_read_right_or_not_at_all(tmp_path, compression, pack):
    values = np.random.default_rng(0).integers(0, 65_536, (3, 5, 7), dtype=np.uint16)
    tags = {256: [7], 257: [5], 258: [16] * 3, 259: [compression], 262: [2], 277: [3], 278: [5], 284: [2]}
    write_tiff(tmp_path / "planes.tif", tags, [pack(plane.astype("<u2").tobytes()) for plane in values])
    if compression == 1:
        assert_refuses(read_rgb, tmp_path / "planes.tif", saying="planes.tif: holds its channels of 16 bits one after")
    else:
        assert np.array_equal(np.asarray(read_rgb(tmp_path / "planes.tif")), (values >> 8).transpose(1, 2, 0))


@pytest.mark.parametrize("suffix", ["tif", "jpg", "png"])
def test_resolution_turns_with_the_picture(tmp_path, suffix):
    exif = Image.Exif()
    for orientation in range(1, 9):
        exif[274] = orientation
        path = tmp_path / f"turned.{suffix}"
        Image.new("L", (2, 2)).save(path, dpi=(300, 150), exif=exif)
        assert read_image(path).dpi == pytest.approx((300, 150) if orientation < 5 else (150, 300), rel=1e-3)


@pytest.mark.parametrize(
    ("said", "dpi"),
    [({271: "camera"}, None), ({282: 300.0, 283: 150.0}, (300, 150)), ({282: 100.0, 283: 50.0, 296: 3}, (254, 127))],
    ids=["none", "inches", "centimetres"],
)
def test_resolution_of_a_jpeg_that_exif_alone_tells(tmp_path, said, dpi):
    exif = Image.Exif()
    exif.update(said)
    Image.new("L", (2, 2)).save(tmp_path / "camera.jpg", exif=exif)
    assert read_image(tmp_path / "camera.jpg").dpi == (dpi and pytest.approx(dpi))


def test_resolution_of_a_jpeg_of_several_pictures_is_its_own(tmp_path):
    exif = Image.Exif()
    exif.update({282: 300.0, 283: 150.0})
    for said, dpi in (({}, None), ({"exif": exif}, (300, 150))):
        pages = [Image.new("RGB", (2, 2))]
        Image.new("RGB", (2, 2)).save(tmp_path / "phone.jpg", format="MPO", save_all=True, append_images=pages, **said)
        assert read_image(tmp_path / "phone.jpg").dpi == (dpi and pytest.approx(dpi))


def test_resolution_without_a_unit_is_none_whatever_another_page_says(tmp_path):
    with TiffImagePlugin.AppendingTiffWriter(tmp_path / "scan.tif", new=True) as file:
        Image.new("L", (2, 2)).save(file, format="TIFF", dpi=(10, 10), tiffinfo={254: 1})
        file.newFrame()
        Image.new("L", (4, 4)).save(file, format="TIFF", tiffinfo={282: 1.0, 283: 1.0, 296: 1})
    picture = read_image(tmp_path / "scan.tif")
    assert picture.rgb.shape == (3, 4, 4) and picture.dpi is None


def test_no_resolution_is_none(tmp_path):
    tags = {256: [2], 257: [1], 258: [8], 259: [1], 262: [1], 277: [1], 278: [1]}
    write_tiff(tmp_path / "none.tif", tags, [b"ab"])
    assert read_image(tmp_path / "none.tif").dpi is None
    Image.new("L", (2, 2)).save(tmp_path / "zero.png", dpi=(0, 0))
    assert read_image(tmp_path / "zero.png").dpi is None


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


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", pytest.param("YCbCr", marks=needs_pillow_13)])
def test_other_modes_become_rgb(tmp_path, mode):
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
    seen = picture.alpha.numpy() > 0
    assert np.array_equal(as_bytes(picture.rgb)[seen], np.asarray(image.convert("RGBA"))[..., :3][seen])


@needs_pillow_13
def test_multiplied_grey_is_divided(tmp_path):
    """Grey with associated alpha: 100 at half of all is 199."""
    tags = {256: [2], 257: [1], 258: [8, 8], 259: [1], 262: [1], 277: [2], 278: [1], 338: [1]}
    write_tiff(tmp_path / "half.tif", tags, [bytes([100, 128, 7, 255])])
    picture = read_image(tmp_path / "half.tif")
    assert picture.alpha.tolist() == [[128, 255]]
    assert as_bytes(picture.rgb).tolist() == [[[199] * 3, [7] * 3]]


def test_what_nobody_sees_has_the_colour_of_the_nearest_that_is_seen(tmp_path):
    values = random_pixels(channels=4)
    values[..., 3] = 0
    values[2:4, 3, 3], values[2:4, 5, 3] = 1, 255
    Image.fromarray(values).save(tmp_path / "cut.png")
    rgb, seen = as_bytes(read_image(tmp_path / "cut.png").rgb), values[..., :3]
    assert np.array_equal(rgb[2:4, 3:6:2], seen[2:4, 3:6:2])
    assert np.array_equal(rgb[0, :4], np.broadcast_to(seen[2, 3], (4, 3))) and np.array_equal(rgb[-1, -1], seen[3, 5])
    assert np.array_equal(np.asarray(read_rgb(tmp_path / "cut.png")), rgb)
    values[..., 3] = 0
    Image.fromarray(values).save(tmp_path / "nothing.png")
    assert np.array_equal(as_bytes(read_image(tmp_path / "nothing.png").rgb), values[..., :3])


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_a_transparent_grey_of_any_depth(tmp_path, bits):
    shades = np.tile(np.arange(2**bits, dtype=np.uint8), (3, 8))
    packed = [np.packbits(np.unpackbits(row[:, None], axis=1)[:, 8 - bits :]).tobytes() for row in shades]
    chosen = 2**bits - 1
    (tmp_path / "grey.png").write_bytes(raw_png(shades.shape[1], packed, bits, kind=0, transparent=[chosen]))
    assert np.array_equal(read_image(tmp_path / "grey.png").alpha, np.where(shades == chosen, 0, 255))


@pytest.mark.parametrize("colours", [(), (3,)], ids=["grey", "RGB"])
def test_a_transparent_colour_of_16_bits(tmp_path, colours):
    values = np.full((4, 6, *colours), 44 * 257, np.uint16)
    values[1] = 300  # whose lower byte is 44
    (tmp_path / "deep.png").write_bytes(png_of_16_bits(values, transparent=[300] * max(1, *colours, 0)))
    assert np.array_equal(read_image(tmp_path / "deep.png").alpha[:, 0], [255, 0, 255, 255])


@pytest.mark.parametrize("suffix", LOSSLESS)
def test_further_pages_are_told_of(tmp_path, caplog, suffix):
    pages = [Image.fromarray(random_pixels(seed=seed)) for seed in range(3)]
    pages[0].save(tmp_path / f"album.{suffix}", save_all=True, append_images=pages[1:], lossless=True)
    assert np.array_equal(as_bytes(read_image(tmp_path / f"album.{suffix}").rgb), np.asarray(pages[0]))
    assert f"album.{suffix}: holds 3 pictures, of which only the first is read" in caplog.text


def test_a_preview_within_a_jpeg_is_no_page(tmp_path, caplog):
    photograph, preview = (Image.fromarray(random_pixels(*size)) for size in ((9, 13), (3, 4)))
    photograph.save(tmp_path / "photograph.jpg", format="MPO", save_all=True, append_images=[preview])
    assert read_image(tmp_path / "photograph.jpg").rgb.shape == (3, 9, 13)
    assert not caplog.records


@pytest.mark.parametrize("kind", [1, 4], ids=["reduced", "mask"])
@pytest.mark.parametrize("order", [(0, 1), (1, 0), (1, 2, 0)], ids=str)
def test_reduced_copies_and_masks_are_no_pages(tmp_path, caplog, order, kind):
    pages = [Image.fromarray(random_pixels(*size)) for size in ((9, 13), (3, 4), (5, 7))]
    for number, page in enumerate(pages):
        page.encoderinfo = {"tiffinfo": {254: kind * min(number, 1), 282: 100.0 + number, 283: 100.0 + number, 296: 2}}
    first, *others = (pages[number] for number in order)
    first.save(tmp_path / "scan.tif", save_all=True, append_images=others, **first.encoderinfo)
    with Image.open(tmp_path / "scan.tif") as image:
        assert image.n_frames == len(order)
        image.seek(order.index(1))
        assert image.tag_v2[254] == kind
    picture = read_image(tmp_path / "scan.tif")
    assert np.array_equal(as_bytes(picture.rgb), random_pixels(9, 13)) and picture.dpi == (100, 100)
    assert not caplog.records


def test_the_profile_of_a_reduced_copy_is_of_no_other_page(tmp_path):
    copy, page = Image.fromarray(random_pixels(3, 4)), Image.fromarray(random_pixels())
    copy.encoderinfo = {"tiffinfo": {254: 1}, "icc_profile": exchanged_profile()}
    page.encoderinfo = {"tiffinfo": {254: 0}, "icc_profile": None}
    copy.save(tmp_path / "scan.tif", save_all=True, append_images=[page], **copy.encoderinfo)
    with Image.open(tmp_path / "scan.tif") as image:
        assert 34675 in image.tag_v2
        image.seek(1)
        assert 34675 not in image.tag_v2
    picture = read_image(tmp_path / "scan.tif")
    assert np.array_equal(as_bytes(picture.rgb), random_pixels()) and picture.icc_profile is None


def test_a_file_may_claim_any_number_of_frames(tmp_path, caplog):
    Image.fromarray(random_pixels()).save(tmp_path / "one.png")
    content = (tmp_path / "one.png").read_bytes()
    claim = b"acTL" + struct.pack(">II", 2**31 - 1, 0)
    chunk = struct.pack(">I", 8) + claim + struct.pack(">I", zlib.crc32(claim))
    (tmp_path / "many.png").write_bytes(content[:33] + chunk + content[33:])
    assert np.array_equal(as_bytes(read_image(tmp_path / "many.png").rgb), random_pixels())
    assert "holds 2147483648 pictures, of which only the first is read" in caplog.text


def test_a_reduced_copy_alone_is_told_of(tmp_path, caplog):
    Image.fromarray(random_pixels()).save(tmp_path / "scan.tif", tiffinfo={254: 1})
    assert np.array_equal(as_bytes(read_image(tmp_path / "scan.tif").rgb), random_pixels())
    assert "scan.tif: is read as the reduced copy that it says it is" in caplog.text


def test_cmyk_without_a_profile_is_told_of(tmp_path, caplog):
    Image.fromarray(random_pixels(channels=4), "CMYK").save(tmp_path / "press.tif")
    assert read_image(tmp_path / "press.tif").rgb.shape == (3, 9, 13)
    assert "press.tif: is in CMYK, but holds no profile; its colours are a guess" in caplog.text


@pytest.mark.parametrize("with_profile", [False, True])
def test_lab_is_right_at_the_edge_of_srgb(tmp_path, with_profile):
    """To a step or two, those of 8 bits of Lab. By the table that stands for the formula red would be 32."""
    lab = ImageCms.createProfile("LAB")
    image = Image.new("RGB", (4, 4), (0, 160, 222))
    image = ImageCms.profileToProfile(image, ImageCms.createProfile("sRGB"), lab, outputMode="LAB")
    # Without it, Pillow would write the profile that the transform has given the picture.
    image.save(tmp_path / "lab.tif", icc_profile=ImageCms.ImageCmsProfile(lab).tobytes() if with_profile else None)
    with Image.open(tmp_path / "lab.tif") as written:
        assert ("icc_profile" in written.info) == with_profile
    found = as_bytes(read_image(tmp_path / "lab.tif").rgb).astype(int)
    assert np.abs(found - (0, 160, 222)).max() <= 2


def test_grey_linear_in_light_is_right_in_every_shade(tmp_path):
    """By the table that stands for the formula dark shades would be up to 10 steps wrong."""
    shades = np.arange(256)
    Image.fromarray(shades.astype(np.uint8)[None]).save(tmp_path / "grey.tif", icc_profile=grey_profile())
    light = shades / 255
    expected = np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055) * 255
    assert np.array_equal(as_bytes(read_image(tmp_path / "grey.tif").rgb)[0, :, 0], expected.round())


@pytest.mark.parametrize("mode", ["CMYK", "RGB"])
def test_tables_are_right_beside_a_jump(tmp_path, mode):
    """By a coarser table in place of the profile's own, shades near the jump would be grey."""
    inks = Image.fromarray(np.arange(256, dtype=np.uint8)[None])
    none = Image.new("L", inks.size)
    image = Image.merge(mode, (*[none] * (len(mode) - 1), inks))
    image.save(tmp_path / "press.tif", icc_profile=_profile_of_black_or_white(mode))
    found = as_bytes(read_image(tmp_path / "press.tif").rgb)
    assert (found[0, :128] >= 254).all() and (found[0, 128:] <= 1).all()


def _profile_of_black_or_white(mode):
    """Of a press on whose paper less than half of the last ink shows as none, and more as all; others do nothing."""
    same, jump, neutral = bytes(range(256)), bytes(128) + b"\xff" * 128, b"\x80" * 256
    corners = bytes((255, 128, 128, 0, 128, 128)) * 2 ** (len(mode) - 1)  # in Lab, without that ink and with it
    unity = struct.pack(">9i", *np.eye(3, dtype=int).ravel() * 65_536)
    table = (
        struct.pack(">4s4x4B", b"mft1", len(mode), 3, 2, 0) + unity + same * len(mode) + corners + jump + neutral * 2
    )
    size = 128 + 4 + 12 + len(table)
    header = struct.pack(">I4xI4s4s4s12x4s", size, 0x02400000, b"prtr", mode.encode().ljust(4), b"Lab ", b"acsp")
    illuminant = struct.pack(">28x3I", 0xF6D6, 0x10000, 0xD32D)
    return (header + illuminant).ljust(128, b"\0") + struct.pack(">I4sII", 1, b"A2B0", 144, len(table)) + table


@pytest.mark.parametrize("large", [False, True], ids=["TIFF", "BigTIFF"])
def test_a_tiff_file_whose_end_is_missing_is_called_truncated(tmp_path, large):
    path = tmp_path / "cut.tif"
    Image.fromarray(random_pixels(40, 60)).save(path, big_tiff=large)
    content = path.read_bytes()
    place = 8 if large else 4
    tags = len(content) - 100
    # As programs write it that do not know how long the picture will be: with the tags last.
    path.write_bytes(content[:place] + tags.to_bytes(place, "little") + content[2 * place : 3_000])
    assert_refuses(read_image, path, saying="cut.tif: is damaged or truncated (its tags are missing)")


def test_signed_pixels_of_8_bits_are_refused(tmp_path):
    write_tiff(tmp_path / "signed.tif", {256: [4], 257: [4], 258: [8], 262: [1], 277: [1], 339: [2]}, [bytes(16)])
    assert_refuses(read_image, tmp_path / "signed.tif", saying="signed.tif: signed pixels of 8 bits cannot be read")


@pytest.mark.parametrize("suffix", ["jpg", "png", "tif", "webp"])
@pytest.mark.parametrize("declared", [{1: "R03"}, 2])
def test_colours_are_of_adobe_rgb_where_exif_alone_says_so(tmp_path, caplog, declared, suffix):
    exif, options = Image.Exif(), {"quality": 100, "subsampling": "4:4:4", "lossless": True}
    exif[ExifTags.Base.Make] = "a camera"  # Pillow leaves out EXIF data without a tag of its own
    photograph = {0xA005: declared, 0xA001: 65_535} if declared != 2 else {0xA001: 2}
    exif.get_ifd(ExifTags.IFD.Exif).update(photograph)
    options["tiffinfo"] = {ExifTags.IFD.Exif: photograph}
    camera, with_profile = tmp_path / f"camera.{suffix}", tmp_path / f"profile.{suffix}"
    colours = np.repeat(random_pixels(), 8, axis=0).repeat(8, axis=1)  # which JPEG keeps to a step or two
    Image.fromarray(colours).save(camera, exif=exif, **options)
    picture = read_image(camera)
    expected = _srgb_of_adobe_rgb(np.asarray(Image.open(camera)) / 255).clip(0, 1)
    assert np.abs(picture.rgb.permute(1, 2, 0).numpy() - expected).max() < 2 / 255
    assert ImageCms.getProfileDescription(io.BytesIO(picture.icc_profile)).startswith("sRGB")
    assert f"camera.{suffix}: holds no profile; its colours are taken for Adobe RGB" in caplog.text
    caplog.clear()
    Image.fromarray(colours).save(with_profile, exif=exif, icc_profile=srgb_profile(), **options)
    assert np.array_equal(as_bytes(read_image(with_profile).rgb), np.asarray(Image.open(with_profile)))
    assert not caplog.records


@pytest.mark.parametrize(("mode", "suffix"), [("P", "png"), pytest.param("YCbCr", "tif", marks=needs_pillow_13)])
def test_colours_of_other_modes_are_of_adobe_rgb_too(tmp_path, caplog, mode, suffix):
    exif = Image.Exif()
    exif[ExifTags.Base.Make] = "a camera"
    exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.ColorSpace] = 2
    options = {"exif": exif, "tiffinfo": {ExifTags.IFD.Exif: {ExifTags.Base.ColorSpace: 2}}}
    image = Image.new("RGB", (16, 16), (60, 180, 90))
    image.save(tmp_path / f"plain.{suffix}", **options)
    (image.quantize(2) if mode == "P" else image.convert(mode)).save(tmp_path / f"other.{suffix}", **options)
    plain, other = (read_image(tmp_path / f"{name}.{suffix}").rgb for name in ("plain", "other"))
    assert (plain - other).abs().max() <= 4 / 255
    assert f"other.{suffix}: holds no profile; its colours are taken for Adobe RGB" in caplog.text


def _srgb_of_adobe_rgb(values):
    """By the definitions of both, whose white points are the same; [..., 3]."""
    matrix = [[1.39836, -0.39836, 0.0], [0.0, 1.0, 0.0], [0.0, -0.04293, 1.04293]]
    linear = (values ** (563 / 256)) @ np.array(matrix).T
    return np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * np.abs(linear) ** (1 / 2.4) - 0.055)


@pytest.mark.parametrize("behind", [False, True], ids=["before the pixels", "behind them"])
def test_a_png_text_may_have_the_name_of_other_notes(tmp_path, caplog, behind):
    told = dict.fromkeys(("comment", "dpi", "icc_profile", "photoshop", "transparency", "xmp"), "as before")
    chunks = PngImagePlugin.PngInfo()
    for name, text in told.items():
        chunks.add(b"tEXt", name.encode() + b"\0" + text.encode(), after_idat=behind)
    Image.fromarray(random_pixels()).save(tmp_path / "named.png", pnginfo=chunks)
    picture = read_image(tmp_path / "named.png")
    assert np.array_equal(as_bytes(picture.rgb), random_pixels())
    assert picture.texts == told and picture.alpha is None and picture.dpi is None and picture.exif is None
    assert not caplog.records


def test_a_png_may_hold_long_notes(tmp_path):
    texts = PngImagePlugin.PngInfo()
    texts.add_text("Condition report", "as before\n" * 200_000, zip=True)
    Image.fromarray(random_pixels()).save(tmp_path / "long.png", pnginfo=texts)
    assert len(read_image(tmp_path / "long.png").texts["Condition report"]) == 2_000_000


def test_palette_transparency_becomes_alpha(tmp_path):
    image = Image.fromarray(random_pixels(channels=1) % 4).convert("P")
    image.save(tmp_path / "picture.png", transparency=2)
    alpha = read_image(tmp_path / "picture.png").alpha.numpy()
    assert np.array_equal(alpha == 0, np.asarray(image) == 2)


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_grey_of_16_bits_is_rounded(tmp_path, suffix):
    values = np.array([[0, 128, 129, 385, 386, 65_535]], dtype=np.uint16)  # 257 apart; 128 and 385 lie just below half
    Image.fromarray(values).save(tmp_path / f"grey.{suffix}")
    rgb = np.asarray(read_rgb(tmp_path / f"grey.{suffix}"))
    assert rgb[0, :, 0].tolist() == [0, 0, 1, 1, 2, 255]
    assert (rgb == rgb[..., :1]).all()


def test_colour_of_16_bits_keeps_the_high_byte(tmp_path):
    values = np.random.default_rng(0).integers(0, 65_536, (5, 7, 3), dtype=np.uint16)
    (tmp_path / "colour.png").write_bytes(png_of_16_bits(values))
    assert np.array_equal(np.asarray(read_rgb(tmp_path / "colour.png")), (values >> 8).astype(np.uint8))


@pytest.mark.parametrize("values", [np.zeros((2, 2), np.float32), np.full((2, 2), 200, np.int32)])
def test_rejects_float_and_32_bit_pixels(tmp_path, values):
    Image.fromarray(values).save(tmp_path / "wide.tif")
    assert_refuses(read_image, tmp_path / "wide.tif", saying="wide.tif: float and 32-bit pixels")


def test_rejects_modes_that_pillow_cannot_convert(tmp_path, monkeypatch):
    Image.new("L", (2, 2)).save(tmp_path / "grey.tif")

    def convert(self, mode):  # as Pillow answers for a mode that it knows no way from
        raise ValueError(f"conversion from {self.mode} to {mode} not supported")

    monkeypatch.setattr(Image.Image, "convert", convert)
    assert_refuses(read_image, tmp_path / "grey.tif", saying="grey.tif: colour mode L cannot be read")


@pytest.mark.parametrize("profile", [None, b"no profile"])
@pytest.mark.parametrize("suffix", ["png", "jpg", "webp"])
def test_damaged_notes_do_not_cost_the_picture(tmp_path, caplog, suffix, profile):
    """Whether or not others have looked at them before: for a profile, or for a resolution."""
    path = tmp_path / f"old.{suffix}"
    Image.fromarray(random_pixels()).save(path, exif=b"Exif\0\0no notes", icc_profile=profile)
    picture = read_image(path)
    assert np.array_equal(as_bytes(picture.rgb), random_pixels()) or suffix != "png"
    assert (picture.icc_profile, picture.exif) == (None, None)
    assert f"{path}: its EXIF data cannot be read and is left out" in caplog.text
    assert (f"{path}: its colour profile is ignored" in caplog.text) == (profile is not None)


def test_a_resolution_that_is_no_number_does_not_cost_the_picture(tmp_path):
    tags = b"".join(struct.pack("<HHI4s", tag, 2, 4, b"abc") for tag in (282, 283))
    exif = b"Exif\0\0II*\0" + struct.pack("<IH", 8, 2) + tags + bytes(4)
    Image.fromarray(random_pixels()).save(tmp_path / "old.jpg", exif=exif)
    with Image.open(tmp_path / "old.jpg") as image:
        assert image.getexif()[282] == "abc"
    picture = read_image(tmp_path / "old.jpg")
    assert picture.dpi is None and picture.rgb.shape == (3, 9, 13)


def test_dots_a_centimetre(tmp_path):
    Image.fromarray(random_pixels()).save(tmp_path / "old.jpg", dpi=(100, 50))
    content = bytearray((tmp_path / "old.jpg").read_bytes())
    assert content[6:10] == b"JFIF"
    content[13] = 2
    (tmp_path / "old.jpg").write_bytes(content)
    assert read_image(tmp_path / "old.jpg").dpi == pytest.approx((254, 127))


@pytest.mark.parametrize("source", FORMATS)
def test_xmp_that_is_not_utf8_is_left_out(tmp_path, caplog, source):
    save_with_xmp(tmp_path / f"old.{source}", "<x/>".encode("utf-16"))
    assert read_image(tmp_path / f"old.{source}").xmp is None
    assert f"old.{source}: its XMP data cannot be read and is left out" in caplog.text


def test_srgb_profile_leaves_pixels_alone(tmp_path):
    pixels = random_pixels()
    Image.fromarray(pixels).save(tmp_path / "old.png", icc_profile=srgb_profile())
    assert np.array_equal(as_bytes(read_image(tmp_path / "old.png").rgb), pixels)


def test_a_profile_is_srgb_by_its_numbers_not_by_its_name(tmp_path):
    assert ImageCms.getProfileDescription(io.BytesIO(linear_profile())).startswith("sRGB")
    Image.new("RGB", (2, 2), (55, 55, 55)).save(tmp_path / "linear.png", icc_profile=linear_profile())
    found = as_bytes(read_image(tmp_path / "linear.png").rgb)
    assert np.abs(found - 128.0).max() <= 1  # 255 (55 / 255)^(1 / 2.2)
    steeper = srgb_profile().replace(struct.pack(">I", round(2.4 * 2**16)), struct.pack(">I", round(2.45 * 2**16)))
    Image.new("RGB", (2, 2), (128, 128, 128)).save(tmp_path / "near.png", icc_profile=steeper)
    assert (as_bytes(read_image(tmp_path / "near.png").rgb) == 126).all()


@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
def test_other_profiles_are_converted_to_srgb(tmp_path, mode):
    image = Image.new(mode, (4, 4), (200, 90, 30, 77)[: len(mode)])
    image.save(tmp_path / "old.png", icc_profile=exchanged_profile())
    picture = read_image(tmp_path / "old.png")
    # Red and blue change places, up to rounding of the 8-bit conversion.
    assert np.abs(as_bytes(picture.rgb)[0, 0] - np.array([30.0, 90, 200])).max() <= 2
    assert ImageCms.getProfileDescription(io.BytesIO(picture.icc_profile)).startswith("sRGB")
    assert (picture.alpha is None) if mode == "RGB" else bool((picture.alpha == 77).all())


def test_grey_of_16_bits_keeps_its_profile(tmp_path):
    for name, values in (("deep", np.full((4, 4), 60 * 257, np.uint16)), ("flat", np.full((4, 4), 60, np.uint8))):
        Image.fromarray(values).save(tmp_path / f"{name}.tif", icc_profile=grey_profile())
    deep, flat = (np.asarray(read_rgb(tmp_path / f"{name}.tif")) for name in ("deep", "flat"))
    assert np.array_equal(deep, flat) and (flat != 60).all()


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
    seen = picture.alpha > 0
    assert torch.equal(picture.rgb[:, seen], opaque.rgb[:, seen])
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
    os.mkfifo(tmp_path / "pipe.png")
    assert_refuses(read_image, tmp_path / "pipe.png", saying="pipe.png: is a pipe or a device, must be a file")
    (tmp_path / "text.png").write_text("not an image\n" * 100)
    assert_refuses(read_image, tmp_path / "text.png", saying="text.png: is not a readable PNG")
    (tmp_path / "program.jpg").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n")
    assert_refuses(read_image, tmp_path / "program.jpg", saying="program.jpg: is not a readable PNG")
    (tmp_path / "big.tif").write_bytes(b"MM\0+\0\x08\0\0" + bytes(64))
    assert_refuses(read_image, tmp_path / "big.tif", saying="big.tif: is a big-endian BigTIFF file, which cannot be")
    (tmp_path / "odd.tif").write_bytes(b"II*\0\x08\0\0\0" + bytes(64))
    assert_refuses(read_image, tmp_path / "odd.tif", saying="odd.tif: is a TIFF file of a kind that cannot be read")
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


def test_a_palette_with_transparency_is_read_without_a_warning(tmp_path, recwarn):
    Image.new("P", (20, 20)).save(tmp_path / "palette.png", transparency=bytes([255, 0, 128]))
    read_image(tmp_path / "palette.png")
    assert not recwarn


@pytest.mark.parametrize("place", ["PIL.ImageFile.ImageFile.load", "PIL.ImageOps.exif_transpose", "numpy.divide"])
def test_a_picture_beyond_the_memory_is_told_in_one_line(tmp_path, monkeypatch, place):
    Image.fromarray(random_pixels()).save(tmp_path / "large.bmp")

    def exceed(*arguments, **options):
        raise MemoryError

    monkeypatch.setattr(place, exceed)
    assert_refuses(read_image, tmp_path / "large.bmp", saying="large.bmp: does not fit this computer's memory")

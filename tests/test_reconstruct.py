"""Recolouring of files: what is kept, what is refused before any work, folders."""

import os
import shutil

import numpy as np
import pytest
import torch
from pictures import fill_the_disk
from PIL import Image

from restoration import reconstruct
from restoration.checkpoints import save_network
from restoration.errors import UnwritableError, UserError
from restoration.flow import Architecture, ReversibleNetwork
from restoration.imaging import Picture, read_image, write_image
from restoration.progress import PictureProgress
from restoration.reconstruct import FORMATS, Recolourer, plan

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "small.safetensors"
    save_network(path, ReversibleNetwork(Architecture(4, 1, 1)), {})
    return path


def save_picture(path, height, width, seed=0, mode="RGB", **options):
    channels = len(mode)
    values = np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)
    Image.fromarray(values, mode if channels > 1 else None).save(path, **options)
    return path


def run(degraded, reference, output, checkpoint, force=False, **options):
    jobs = plan(degraded, reference, output, force=force)
    return list(Recolourer(CPU, checkpoint=checkpoint, **options).recolour_files(jobs, force=force))


def test_one_file(tmp_path, checkpoint):
    degraded = save_picture(tmp_path / "faded.png", 21, 34)
    reference = save_picture(tmp_path / "kept.jpg", 50, 18, seed=1)
    (report,) = run(degraded, reference, tmp_path / "out.png", checkpoint)
    assert Image.open(tmp_path / "out.png").size == (34, 21)
    assert 0 < report.metrics.ssim <= 1 and report.seconds > 0


def test_a_scan_of_16_bits_keeps_them(tmp_path, checkpoint):
    ramp = torch.linspace(0.3, 0.4, 40 * 60).reshape(40, 60) * torch.tensor([1, 0.9, 0.7])[:, None, None]
    deep, flat = tmp_path / "deep.tif", tmp_path / "flat.png"
    write_image(deep, ramp, Picture(ramp, bits=16))
    write_image(flat, ramp)
    reference = save_picture(tmp_path / "kept.png", 30, 50, seed=1)

    def recoloured(degraded, name, **options):
        run(degraded, reference, tmp_path / name, checkpoint, **options)
        return read_image(tmp_path / name)

    tif, png, of_flat = recoloured(deep, "1.tif"), recoloured(deep, "2.png"), recoloured(flat, "3.png")
    assert (tif.bits, png.bits, of_flat.bits) == (16, 16, 8) and torch.equal(tif.rgb, png.rgb)
    # Of a narrow range stretched wide, 8 bits leave bands.
    assert len(tif.rgb[0].unique()) > 1_000 > 5 * len(of_flat.rgb[0].unique())
    unchanged = recoloured(deep, "4.tif", strength=0.0)
    assert (unchanged.rgb - read_image(deep).rgb).abs().max() <= 1.01 / 65_535


def test_what_nobody_sees_decides_nothing(tmp_path, checkpoint):
    kept = save_picture(tmp_path / "kept.png", 24, 30, seed=1)
    degraded = save_picture(tmp_path / "faded.png", 20, 30)
    plain = np.asarray(Image.open(kept))
    results = {}
    (alone,) = run(degraded, kept, tmp_path / "alone.png", checkpoint)
    for name, background in (("black", 0), ("white", 255)):
        for path in (kept, degraded):
            framed = Image.new("RGBA", (130, 120), (background,) * 3 + (0,))
            framed.paste(Image.open(path), (50, 50))
            framed.save(tmp_path / f"{name}_{path.name}")
        paths = (tmp_path / f"{name}_{path.name}" for path in (degraded, kept))
        (report,) = run(*paths, tmp_path / f"{name}.png", checkpoint)
        assert report.metrics.ssim == pytest.approx(alone.metrics.ssim, rel=0.02)
        assert report.metrics.relative_gram == pytest.approx(alone.metrics.relative_gram, rel=0.02)
        results[name] = np.asarray(Image.open(tmp_path / f"{name}.png"))[50:70, 50:80, :3]
    assert np.array_equal(results["black"], results["white"])
    # Colours carried on from the edges would count eight times as much as the painting's.
    assert np.abs(results["black"].mean((0, 1)) - plain.mean((0, 1))).max() < 12


def test_alpha_and_orientation_are_kept(tmp_path, checkpoint):
    degraded = save_picture(tmp_path / "faded.png", 20, 30, mode="RGBA")
    rotated = tmp_path / "rotated.jpg"
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: upright, the picture is 20 wide and 30 high
    save_picture(rotated, 20, 30, exif=exif)
    run(degraded, rotated, tmp_path / "a.png", checkpoint)
    run(rotated, degraded, tmp_path / "b.png", checkpoint)
    alpha = np.asarray(Image.open(tmp_path / "a.png"))[..., 3]
    assert np.array_equal(alpha, np.asarray(Image.open(degraded))[..., 3])
    assert Image.open(tmp_path / "b.png").size == (20, 30)
    assert Image.open(tmp_path / "b.png").getexif().get(0x0112, 1) == 1


def test_one_pixel_and_the_same_file_twice(tmp_path, checkpoint):
    pixel = save_picture(tmp_path / "pixel.png", 1, 1)
    picture = save_picture(tmp_path / "picture.png", 30, 30)
    run(pixel, picture, tmp_path / "a.png", checkpoint)
    assert Image.open(tmp_path / "a.png").size == (1, 1)
    run(picture, pixel, tmp_path / "b.png", checkpoint)
    run(picture, picture, tmp_path / "c.png", checkpoint)
    difference = (read_image(tmp_path / "c.png").rgb - read_image(picture).rgb).abs().max()
    assert difference <= 1.001 / 255


def test_strength_zero_changes_nothing(tmp_path, checkpoint):
    degraded, reference = save_picture(tmp_path / "a.png", 20, 20), save_picture(tmp_path / "b.png", 20, 20, seed=1)
    run(degraded, reference, tmp_path / "out.png", checkpoint, strength=0.0)
    assert torch.equal(read_image(tmp_path / "out.png").rgb, read_image(degraded).rgb)


def test_folders_pair_by_name(tmp_path, checkpoint):
    for folder, suffix in (("faded", "png"), ("kept", "jpg")):
        (tmp_path / folder).mkdir()
        for name in ("one", "two"):
            save_picture(tmp_path / folder / f"{name}.{suffix}", 16, 16)
    reports = run(tmp_path / "faded", tmp_path / "kept", tmp_path / "out", checkpoint)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["one.png", "two.png"]
    assert len(reports) == 2


def folders_of(tmp_path, **names):
    for folder, files in names.items():
        (tmp_path / folder).mkdir()
        for name in files:
            save_picture(tmp_path / folder / name, 20, 20)
    return [tmp_path / folder for folder in names]


@pytest.mark.parametrize("image_format", FORMATS)
def test_results_of_a_folder_have_the_format_asked_for(tmp_path, checkpoint, image_format):
    """What it cannot hold is told of before any work, where the folder is still to be made, too."""
    faded, kept = folders_of(tmp_path, faded=["a.png", "b.png"], kept=["a.png", "b.png"])
    save_picture(faded / "b.png", 20, 20, mode="RGBA")
    failures = []
    jobs = plan(faded, kept, tmp_path / "out", image_format=image_format, on_failure=failures.append)
    list(Recolourer(CPU, checkpoint=checkpoint).recolour_files(jobs))
    told = [] if image_format != "jpg" else [f"{tmp_path}/out/b.jpg: JPEG would lose the picture's transparency"]
    assert [str(error).partition(";")[0] for error in failures] == told
    names = ["a", "b"] if image_format != "jpg" else ["a"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [f"{name}.{image_format}" for name in names]
    (faded / "b.png").unlink()
    assert plan(faded, kept, tmp_path / "out", image_format=image_format, skip_existing=True) == []


def test_formats_that_do_nothing_are_refused(tmp_path):
    faded, kept = folders_of(tmp_path, faded=["a.png"], kept=["a.png"])
    with pytest.raises(UserError, match="--format must be one of png, tif, jpg, webp, got 'gif'"):
        plan(faded, kept, tmp_path / "out", image_format="gif")
    with pytest.raises(UserError, match="--format tif is of a folder's results; a file's own name tells its format"):
        plan(faded / "a.png", kept / "a.png", tmp_path / "out.png", image_format="tif")


def test_what_a_system_leaves_in_folders_is_passed_over(tmp_path, checkpoint, caplog):
    faded, kept = folders_of(tmp_path, faded=["a.png"], kept=["a.png"])
    (faded / "._a.png").write_bytes(b"of macOS")
    (faded / ".thumbnails").mkdir()
    assert [report.job.degraded.name for report in run(faded, kept, tmp_path / "out", checkpoint)] == ["a.png"]
    assert not caplog.text


def test_what_else_a_folder_holds_is_named(tmp_path, caplog):
    faded, kept = folders_of(tmp_path, faded=["a.png", "b.jfif"], kept=["a.png", "b.png"])
    (faded / "more.png").mkdir()
    for name in ("c.jp2", "notes.txt"):
        (faded / name).touch()
        (kept / name).touch()
    assert [job.degraded.name for job in plan(faded, kept, tmp_path / "out")] == ["a.png", "b.jfif"]
    (message,) = (record.getMessage() for record in caplog.records)
    assert message.startswith(f"{faded}: passed over") and message.endswith(": c.jp2, more.png/, notes.txt")


def test_results_inside_of_the_folder_of_faded_pictures_are_not_named(tmp_path, caplog):
    faded, kept = folders_of(tmp_path, faded=["a.png"], kept=["a.png"])
    (faded / "out").mkdir()
    assert len(plan(faded, kept, faded / "out")) == 1
    assert not caplog.text


def test_a_broken_link_is_named_and_the_others_recoloured(tmp_path, checkpoint):
    faded, kept = folders_of(tmp_path, faded=["a.png"], kept=["a.png", "b.png"])
    (faded / "b.png").symlink_to("gone.png")
    failures = []
    jobs = [job.degraded.name for job in plan(faded, kept, tmp_path / "out", on_failure=failures.append)]
    assert jobs == ["a.png"] and [str(failure) for failure in failures] == [f"{faded / 'b.png'}: no such file"]


def test_results_do_not_lie_among_the_pictures_to_read(tmp_path):
    faded, kept = folders_of(tmp_path, faded=["a.jpg"], kept=["a.jpg"])
    for out in (faded, kept, faded / ".." / "kept"):
        with pytest.raises(UserError, match=f"^{out}: must be another folder than those of the pictures to read$"):
            plan(faded, kept, out)


@pytest.mark.parametrize("same_as", ["faded.png", "kept.png"])
def test_a_result_is_none_of_the_pictures_to_read(tmp_path, same_as):
    for name in ("faded.png", "kept.png"):
        Image.new("RGB", (20, 20)).save(tmp_path / name)
    (tmp_path / "link.png").symlink_to(same_as)
    for out in (tmp_path / same_as, tmp_path / "link.png"):
        with pytest.raises(UserError, match=f"^{out}: must be another file than the pictures to read$"):
            plan(tmp_path / "faded.png", tmp_path / "kept.png", out, force=True)


def test_names_are_equal_however_their_letters_are_encoded(tmp_path):
    faded, kept = folders_of(tmp_path, faded=["e\u0301.png"], kept=["\u00e9.png"])
    (job,) = plan(faded, kept, tmp_path / "out")
    assert job.reference.name == "\u00e9.png" and job.output.name == "e\u0301.png"


def test_two_references_of_one_name_are_refused(tmp_path):
    faded, kept = folders_of(tmp_path, faded=["a.png"], kept=["a.png", "a.jpg"])
    with pytest.raises(UserError, match=r"holds two references of one name, a\.jpg, a\.png"):
        plan(faded, kept, tmp_path / "out")


def test_a_folder_that_cannot_be_made_is_found_before_any_work(tmp_path, checkpoint, monkeypatch):
    faded, kept = folders_of(tmp_path, faded=["a.png"], kept=["a.png"])
    jobs = plan(faded, kept, tmp_path / "out")
    (tmp_path / "out").touch()
    monkeypatch.delattr("restoration.reconstruct.recolour")
    with pytest.raises(UserError, match="out: cannot be made"):
        next(Recolourer(CPU, checkpoint=checkpoint).recolour_files(jobs))


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (MemoryError(), "a picture of 0.0 megapixels does not fit this computer's memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "does not fit this computer's memory"),
        (OverflowError("values reach 521"), "values reach 521"),
    ],
)
def test_a_picture_that_cannot_be_treated_is_named(tmp_path, checkpoint, monkeypatch, error, message):
    def fail(*_):
        raise error

    picture = save_picture(tmp_path / "faded.png", 20, 20)
    monkeypatch.setattr(ReversibleNetwork, "encode_halves", fail)
    with pytest.raises(UserError, match=f"faded.png: .*{message}"):
        run(picture, picture, tmp_path / "out.png", checkpoint)


def test_a_picture_whose_output_appears_meanwhile_is_named_and_the_others_recoloured(tmp_path, checkpoint):
    faded, kept, out = folders_of(tmp_path, faded=["a.png", "b.png"], kept=["a.png", "b.png"], out=[])
    jobs, failures = plan(faded, kept, out), []
    (out / "a.png").write_bytes(b"theirs")
    reports = list(Recolourer(CPU, checkpoint=checkpoint).recolour_files(jobs, on_failure=failures.append))
    assert [report.job.degraded.name for report in reports] == ["b.png"]
    assert [str(failure) for failure in failures] == [f"{out / 'a.png'}: exists already (--force overwrites)"]
    assert (out / "a.png").read_bytes() == b"theirs"


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("write_image", "memory does not suffice to write it"),
        ("measure", "is written, but memory does not suffice to measure it"),
    ],
)
def test_a_picture_at_whose_end_memory_ends_is_named_and_the_others_recoloured(
    tmp_path, checkpoint, monkeypatch, function, message
):
    faded, kept = folders_of(tmp_path, faded=["a.png", "b.png"], kept=["a.png", "b.png"])
    real, troubles, failures = getattr(reconstruct, function), [RuntimeError("DefaultCPUAllocator: no memory")], []

    def fail_once(*arguments, **options):
        if troubles:
            raise troubles.pop()
        return real(*arguments, **options)

    monkeypatch.setattr(reconstruct, function, fail_once)
    jobs = plan(faded, kept, tmp_path / "out")
    reports = list(Recolourer(CPU, checkpoint=checkpoint).recolour_files(jobs, on_failure=failures.append))
    assert [report.job.degraded.name for report in reports] == ["b.png"]
    assert [str(failure) for failure in failures] == [f"{tmp_path / 'out' / 'a.png'}: {message}"]


def close_to_writers(monkeypatch, folder):
    monkeypatch.setattr(os, "access", lambda path, mode: path != folder)


def fail_to_encode(monkeypatch, folder):
    def fail(*arguments, **options):
        raise OSError("encoder error")

    monkeypatch.setattr(Image.Image, "save", fail)


@pytest.mark.parametrize(
    "trouble",
    [
        lambda monkeypatch, folder: fill_the_disk(monkeypatch),
        lambda monkeypatch, folder: shutil.rmtree(folder),
        close_to_writers,
        fail_to_encode,
    ],
    ids=["full disk", "folder gone", "folder closed", "encoder"],
)
def test_what_keeps_files_from_being_written_ends_a_folder(tmp_path, checkpoint, monkeypatch, trouble):
    faded, kept, out = folders_of(tmp_path, faded=["a.png", "b.png"], kept=["a.png", "b.png"], out=[])
    jobs = plan(faded, kept, out)
    recolourer = Recolourer(
        CPU, checkpoint=checkpoint, on_progress=lambda job, share: share or trouble(monkeypatch, out)
    )
    reports = recolourer.recolour_files(jobs, on_failure=lambda error: pytest.fail(f"went on after {error}"))
    with pytest.raises(UnwritableError, match=r"a\.png: "):
        list(reports)


def test_an_empty_output_is_not_there(tmp_path, checkpoint):
    """A crash leaves it on a file system without hard links; what fills it meanwhile stays."""
    faded, kept, out = folders_of(tmp_path, faded=["a.png", "b.png"], kept=["a.png", "b.png"], out=["b.png"])
    (out / "a.png").touch()
    with pytest.raises(UserError, match=r"a\.png: exists already"):
        plan(faded, kept, out)
    jobs = plan(faded, kept, out, skip_existing=True)
    assert [job.output.name for job in jobs] == ["a.png"]
    recolourer = Recolourer(CPU, checkpoint=checkpoint)
    (out / "a.png").write_bytes(b"theirs")
    with pytest.raises(UserError, match=r"a\.png: exists already"):
        list(recolourer.recolour_files(jobs))
    (out / "a.png").write_bytes(b"")
    list(recolourer.recolour_files(jobs))
    assert Image.open(out / "a.png").size == (20, 20)


def test_a_line_that_nobody_reads_leaves_no_file_open():
    progress = PictureProgress(shown=False)
    lowest, writing = os.pipe()
    os.close(lowest)
    with open(writing, "w") as pipe:
        progress.say("nobody reads this", pipe)
        following = os.open(os.devnull, os.O_RDONLY)
        os.close(following)
    assert following == lowest


def test_nothing_is_overwritten_without_force(tmp_path, checkpoint):
    picture = save_picture(tmp_path / "a.png", 16, 16)
    output = save_picture(tmp_path / "out.png", 5, 5)
    before = output.read_bytes()
    with pytest.raises(UserError, match="exists already"):
        plan(picture, picture, output)
    assert output.read_bytes() == before
    run(picture, picture, output, checkpoint, force=True)
    assert Image.open(output).size == (16, 16)


def test_refusals_come_before_any_work(tmp_path):
    picture = save_picture(tmp_path / "a.png", 16, 16)
    (tmp_path / "text.png").write_text("not a picture")
    (tmp_path / "empty.png").touch()
    (tmp_path / "cut.png").write_bytes(picture.read_bytes()[:100])
    save_picture(tmp_path / "clear.png", 16, 16, mode="RGBA")
    for name in ("faded", "kept", "hollow", "done"):
        (tmp_path / name).mkdir()
    for name in ("faded", "done"):
        save_picture(tmp_path / name / "one.png", 8, 8)
    before = sorted(tmp_path.rglob("*"))
    for degraded, reference, output, message in (
        ("missing.png", "a.png", "out.png", "missing.png"),
        ("a.png", "missing.png", "out.png", "missing.png"),
        ("text.png", "a.png", "out.png", "text.png"),
        ("empty.png", "a.png", "out.png", "empty.png"),
        ("a.png", "cut.png", "out.png", "cut.png"),
        ("a.png", "a.png", "nowhere/out.png", "does not exist"),
        ("a.png", "a.png", "out.docx", "must end in"),
        ("clear.png", "a.png", "out.jpg", "JPEG would lose"),
        ("faded", "a.png", "out", "two files or two folders"),
        ("faded", "kept", "out", "no reference named one"),
        ("faded", "missing", "out", "missing"),
        ("hollow", "kept", "out", "holds no pictures"),
        ("faded", "faded", "a.png", "must be a folder"),
        ("faded", "faded", "nowhere/out", "does not exist"),
        ("faded", "faded", "done", "one.png: exists already"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            plan(tmp_path / degraded, tmp_path / reference, tmp_path / output)
        assert "\n" not in str(caught.value)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_progress_of_each_picture_is_told(tmp_path, checkpoint, precision):
    names, told = ("a", "b"), []
    faded, kept = (tmp_path / name for name in ("faded", "kept"))
    for folder, side in ((faded, 12), (kept, 40)):
        folder.mkdir()
        for name in names:
            save_picture(folder / f"{name}.png", side, side)
    options = {"precision": precision, "on_progress": lambda job, share: told.append((job.degraded.stem, share))}
    assert len(run(faded, kept, tmp_path / "out", checkpoint, **options)) == 2
    for name in names:
        shares = [share for told_name, share in told if told_name == name]
        assert shares[0] == 0 and shares[-1] == 1 and shares == sorted(set(shares))


def test_bfloat16_gives_hardly_another_picture(tmp_path):
    """The residual functions of the shipped network add little to a nearly linear change of colours."""
    faded, kept = (save_picture(tmp_path / f"{seed}.png", 40, 50, seed) for seed in (0, 1))
    results = []
    for precision in ("fp32", "bf16"):
        run(faded, kept, tmp_path / f"{precision}.png", None, precision=precision)
        results.append(read_image(tmp_path / f"{precision}.png").rgb)
    assert 0 < (results[0] - results[1]).abs().max() * 255 < 1.5
    with pytest.raises(UserError, match="--precision must be one of fp32, bf16, got 'fp16'"):
        run(faded, kept, tmp_path / "fp16.png", None, precision="fp16")

"""Recolouring of files: what is kept, what is refused before any work, folders."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from restoration.blocks import STREAM_LIMIT
from restoration.checkpoints import load_network, save_network
from restoration.errors import UserError
from restoration.flow import Architecture, ReversibleNetwork
from restoration.imaging import read_image
from restoration.metrics import newly_clipped
from restoration.reconstruct import FORMATS, KNEE, MARGIN, Recolourer, choose_device, fit_range, plan, recolour

CPU = torch.device("cpu")


def small_network(scale=1.0):
    torch.manual_seed(0)
    network = ReversibleNetwork(Architecture(4, 1, 1))
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(scale)
    return network


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "small.safetensors"
    save_network(path, small_network(), {})
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


def test_only_visible_pixels_count(monkeypatch):
    """With a frame of another colour, that of the picture alone, but for what convolutions see past its edge."""
    torch.manual_seed(0)
    network, degraded, inner = small_network(), torch.rand(3, 24, 24), 0.5 + 0.1 * torch.rand(3, 40, 40)
    framed, seen = torch.zeros(3, 80, 80), torch.zeros(80, 80, dtype=torch.bool)
    framed[0], framed[:, 20:60, 20:60] = 1.0, inner
    seen[20:60, 20:60] = True
    alone, masked, all_of_it = (
        recolour(network, degraded, reference, CPU, visible=(None, visible))[0].mean((1, 2))
        for reference, visible in ((inner, None), (framed, seen), (framed, None))
    )
    assert (masked - alone).abs().max() < 0.02 < 0.1 < (all_of_it - alone).abs().max()


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


@pytest.mark.parametrize("size", [(1, 1), (3, 3), (1, 32)])
def test_pictures_with_fewer_pixels_than_channels(size):
    """Their covariance alone would not tell what their margin holds, which then left the shipped network's range."""
    generator = torch.Generator().manual_seed(0)
    small, large = (torch.rand(3, *sides, generator=generator) for sides in (size, (40, 50)))
    network = load_network()
    assert recolour(network, small, large, CPU)[0].shape == small.shape
    assert recolour(network, large, small, CPU)[0].shape == large.shape


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


def test_an_error_of_another_kind_comes_out_as_it_is(monkeypatch):
    def fail(*_):
        raise RuntimeError("bug")

    monkeypatch.setattr(ReversibleNetwork, "encode_halves", fail)
    with pytest.raises(RuntimeError, match=r"^bug$"):
        recolour(small_network(), *torch.rand(2, 3, 16, 16), CPU)


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


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_progress_of_each_picture_is_told(tmp_path, checkpoint, precision):
    names, told = ("a", "b"), []
    for name in names:
        save_picture(tmp_path / f"{name}.png", 12, 12)
    options = {"precision": precision, "on_progress": lambda job, share: told.append((job.degraded.stem, share))}
    assert len(run(tmp_path, tmp_path, tmp_path / "out", checkpoint, **options)) == 2
    for name in names:
        shares = [share for told_name, share in told if told_name == name]
        assert shares[0] == 0 and shares[-1] == 1 and shares == sorted(set(shares))


def test_results_are_fitted_into_the_range(monkeypatch):
    monkeypatch.setattr("restoration.reconstruct.fit_range", lambda image: torch.full_like(image, 0.25))
    result, _ = recolour(small_network(), *torch.rand(2, 3, 16, 16), CPU)
    assert (result == 0.25).all()


@pytest.mark.parametrize(("contrast", "deviation"), [(0.002, 0.1), (0.05, 3.7), (0.2, None)])
def test_contrast_raised_out_of_noise_is_noted(tmp_path, contrast, deviation):
    drawing, reference = torch.rand(2, 3, 40, 40)
    _, notes = recolour(load_network(), 0.5 + contrast * (drawing - 0.5), reference, CPU)
    expected = f"hardly any drawing: values deviate by {deviation} of 255"
    assert any(expected in note for note in notes) is (deviation is not None)


@pytest.mark.parametrize(("ridges", "notes"), [((1, 0), ["0.0001"]), ((0, 2), ["0.01"]), ((0, 0), [])])
def test_a_larger_ridge_is_noted(monkeypatch, ridges, notes):
    monkeypatch.setattr("restoration.reconstruct.transfer_parts_", lambda *_: torch.tensor(ridges))
    _, found = recolour(small_network(), *torch.rand(2, 3, 16, 16), CPU)
    assert list(found) == [
        f"colours nearly flat: statistics were regularised with {note} in place of 1e-06" for note in notes
    ]


def test_the_margin_has_no_part_in_the_statistics():
    """A network that does nothing gives the picture the very mean of the reference."""
    network, pictures = small_network(0.0), 0.4 + 0.2 * torch.rand(2, 3, 24, 24)
    pictures[0, :, 0], pictures[1, :, :, -1] = 0.3, 0.7
    result, _ = recolour(network, *pictures, CPU)
    assert torch.allclose(result.mean((1, 2)), pictures[1].mean((1, 2)), atol=1e-4)


def test_devices(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    assert choose_device("cpu") == CPU and not torch.backends.cudnn.allow_tf32
    with pytest.raises(UserError, match="cpu, cuda or auto, got 'tpu'"):
        choose_device("tpu")
    if not torch.cuda.is_available():
        assert choose_device("auto") == CPU
        with pytest.raises(UserError, match="no CUDA device"):
            choose_device("cuda")


def test_weights_that_overflow_are_named():
    with pytest.raises(UserError, match="these weights do not suit"):
        recolour(small_network(1e4), *torch.rand(2, 3, 16, 16), CPU)


@pytest.mark.parametrize("half", [0, 1])
def test_values_past_the_range_in_either_half_are_named(monkeypatch, half):
    def overflow(code, *_):
        code[half][0, 0, 0, 0] = STREAM_LIMIT
        return torch.zeros(2, 1)

    monkeypatch.setattr("restoration.reconstruct.transfer_parts_", overflow)
    with pytest.raises(UserError, match="values reach 256, past"):
        recolour(small_network(), *torch.rand(2, 3, 16, 16), CPU)


def test_a_result_that_is_not_finite_is_named(monkeypatch):
    monkeypatch.setattr(ReversibleNetwork, "decode_halves", lambda *_: torch.full((1, 3, 64, 64), torch.nan))
    with pytest.raises(UserError, match="values that are not finite"):
        recolour(small_network(), *torch.rand(2, 3, 16, 16), CPU)


class LiveBytes(TorchDispatchMode):
    """The most bytes that the results of operators held at a time."""

    def __init__(self):
        super().__init__()
        self._storages, self.most = {}, 0

    def __torch_dispatch__(self, operator, types, arguments=(), options=None):
        results = operator(*arguments, **(options or {}))
        for result in results if isinstance(results, (tuple, list)) else [results]:
            if isinstance(result, torch.Tensor):
                storage = result.untyped_storage()
                self._storages[storage.data_ptr()] = StorageWeakRef(storage), storage.nbytes()
        alive = {place: kept for place, kept in self._storages.items() if not kept[0].expired()}
        self._storages, self.most = alive, max(self.most, sum(size for _, size in alive.values()))
        return results


def test_memory_is_the_streams_and_less_than_as_much_again(monkeypatch):
    """Streams of one picture at a time, 128 bytes a pixel; no map of theirs waits for a later one."""
    monkeypatch.setattr("restoration.whitening.CHUNK", 1024)
    network, side = ReversibleNetwork(), 352
    degraded, reference = torch.rand(2, 3, side, side)
    with LiveBytes() as live:
        recolour(network, degraded, reference, CPU)
    padded = (side + 2 * MARGIN) ** 2
    streams, maps_between, pictures = 2 * 64, 64 + 48, 40  # padded and convolved; both as read, one with its margin
    assert streams * padded < live.most < (streams + maps_between + pictures) * padded


def ramp(low, high, count=1001):
    """Red runs from low to high; green and blue stay inside."""
    image = torch.full((3, 1, count), 0.5)
    image[0, 0] = torch.linspace(low, high, count)
    image[1, 0] = torch.linspace(0, 1, count)
    return image


@pytest.mark.parametrize("low, high", [(-0.3, 1.2), (-0.001, 1.0), (0.0, 1.5), (-2.0, 3.0)])
def test_shades_out_of_range_are_compressed_not_cut(low, high):
    image = ramp(low, high)
    red = image[0, 0]
    result = fit_range(image)[0, 0]
    assert result.min() >= 0 and result.max() <= 1
    inner = (red >= KNEE) & (red <= 1 - KNEE)
    assert torch.equal(result[inner], red[inner])
    inside = (red >= 0) & (red <= 1)
    assert (result - red)[inside].abs().max() <= KNEE / 2 + 1e-6
    assert (result.diff() > 0).all()  # no two shades become one


def test_channels_within_range_stay_to_the_bit():
    image = ramp(-0.3, 1.2)
    assert torch.equal(fit_range(image)[1:], image[1:])
    inside = ramp(0, 1)
    assert torch.equal(fit_range(inside), inside)


def test_compression_clips_fewer_pixels_than_cutting():
    image = ramp(-0.3, 1.2)
    degraded = torch.full_like(image, 0.5)
    image[1] = 0.5
    assert newly_clipped(degraded, image.clamp(0, 1)) > 0.3
    assert newly_clipped(degraded, fit_range(image)) < 0.1


def test_edges_are_coloured_like_the_inside(monkeypatch):
    """A plain border must not turn into a frame where convolutions meet the edge."""
    network = small_network(2)
    degraded = torch.full((3, 120, 120), 0.4)
    degraded[:, 56:64, 56:64] = torch.rand(3, 8, 8)
    reference = torch.rand(3, 40, 40)

    def frame():
        result, _ = recolour(network, degraded, reference, CPU)
        return (result[:, 0] - result[:, 24]).abs().mean()

    shown = frame()
    monkeypatch.setattr("restoration.reconstruct.MARGIN", 0)
    assert shown < 0.1 * frame()

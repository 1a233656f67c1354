"""Cutting crops: every pixel once, uniform paper out, works on one side of the split, a data set whole or absent."""

import csv
import os
from pathlib import Path

import numpy as np
import pytest
from pictures import PAINTINGS, assert_refuses, needs_paintings, write_table
from PIL import Image, ImageDraw
from skimage.color import lab2rgb

from restoration.collection import Painting, evaluation_pairs, find_paintings
from restoration.data import PairDataset
from restoration.dataset import INDEX_COLUMNS, _held_out, build_dataset, is_uniform, windows
from restoration.errors import UserError


def paint(path, size=(32, 32), seed=0):
    """A picture of random blocks of 4 x 4 pixels, far from uniform; (width, height) = size."""
    path.parent.mkdir(parents=True, exist_ok=True)
    blocks = np.random.default_rng(seed).integers(0, 256, (-(-size[1] // 4), -(-size[0] // 4), 3), dtype=np.uint8)
    Image.fromarray(blocks.repeat(4, 0).repeat(4, 1)[: size[1], : size[0]].copy()).save(path)


def build(source, out, **options):
    return build_dataset(source, out, **({"crop": 32, "stride": 32} | options))


def index(out):
    with open(out / "index.csv", newline="") as file:
        return list(csv.DictReader(file))


def files(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


@pytest.fixture
def source(tmp_path):
    """Ten ink paintings and two blue ones, each of the size of one crop."""
    for number in range(10):
        paint(tmp_path / f"source/ink/{number}.png", seed=number)
    for number in range(2):
        paint(tmp_path / f"source/blue/{number}.png", seed=20 + number)
    return tmp_path / "source"


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


@pytest.mark.parametrize(
    ("size", "crop", "stride", "expected"),
    [
        ((8, 8), 8, 8, [(0, 0)]),
        ((16, 8), 8, 8, [(0, 0), (8, 0)]),
        ((9, 8), 8, 8, [(0, 0), (1, 0)]),
        ((20, 17), 8, 8, [(x, y) for y in (0, 8, 9) for x in (0, 8, 12)]),
        ((16, 8), 8, 4, [(0, 0), (4, 0), (8, 0)]),
        ((30, 8), 8, 11, [(0, 0), (11, 0), (22, 0)]),
    ],
)
def test_windows(size, crop, stride, expected):
    assert windows(*size, crop, stride) == expected


def test_crops_are_pixels_of_the_box_in_the_index(source, out):
    paint(source / "ink/0.png", (70, 50))
    report = build(source, out, styles=["ink"])
    with Image.open(source / "ink/0.png") as image:
        painting = np.asarray(image)
    covered = np.zeros((50, 70), dtype=int)
    for line in index(out):
        if line["source"] == "ink/0.png":
            left, top, width, height = (int(line[name]) for name in ("left", "top", "width", "height"))
            assert (width, height, float(line["scale"])) == (32, 32, 1)
            assert line["file"] == f"{line['split']}/ink/0_{left}_{top}.png"
            with Image.open(out / line["file"]) as crop:
                assert np.array_equal(np.asarray(crop), painting[top : top + 32, left : left + 32])
            covered[top : top + 32, left : left + 32] += 1
    assert covered.min() == 1
    assert report.crops.total() == 6 + 9


def test_index_lists_every_crop_and_feeds_training(source, out):
    report = build(source, out)
    lines = index(out)
    assert tuple(lines[0]) == INDEX_COLUMNS
    assert files(out) == ["index.csv", *sorted(line["file"] for line in lines)]
    assert report.crops == {("train", "ink"): 9, ("test", "ink"): 1, ("train", "blue"): 1, ("test", "blue"): 1}
    assert {line["painting_id"] for line in lines} == {line["source"] for line in lines}
    assert len(find_paintings(out, split="train")) == 10
    assert len(evaluation_pairs(out)) == 2
    assert PairDataset(find_paintings(out, split="train"), 32)[0]["degraded"].shape == (3, 32, 32)


def test_building_twice_gives_the_same(source, tmp_path):
    build(source, tmp_path / "one")
    build(source, tmp_path / "two")
    assert files(tmp_path / "one") == files(tmp_path / "two")
    for file in files(tmp_path / "one"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


def held_out(out):
    return {line["source"] for line in index(out) if line["split"] == "test"}


def test_split_by_hash_is_stable(source, out, tmp_path):
    build(source, out, test_share=0.3)
    assert len([name for name in held_out(out) if name.startswith("ink/")]) == 3
    # Which works are held out is the same on every machine: it follows from their names alone.
    build(source, tmp_path / "fewer", test_share=0.1)
    assert held_out(tmp_path / "fewer") == {"blue/1.png", "ink/7.png"}
    assert held_out(tmp_path / "fewer") <= held_out(out)
    build(source, tmp_path / "none", test_share=0)
    assert held_out(tmp_path / "none") == set()


def test_split_keeps_a_work_for_training(source, out):
    paint(source / "lone/1.png")
    report = build(source, out, test_share=0.99)
    assert report.crops["train", "ink"] == report.crops["train", "blue"] == report.crops["train", "lone"] == 1
    assert report.crops["test", "lone"] == 0


def test_split_follows_the_tables(source, out):
    works = [[f"ink/{number}.png", f"p{number // 2}"] for number in range(10)]
    write_table(source / "MANIFEST.csv", ["file", "painting_id"], *works)
    write_table(source / "SPLIT.csv", ["painting_id", "split"], ["p0", "train"], ["p1", "validation"], ["p2", "test"])
    build(source, out)
    assert held_out(out) == {f"ink/{number}.png" for number in (2, 3, 4, 5)}
    assert {line["painting_id"] for line in index(out) if line["split"] == "test"} == {"p1", "p2"}


def test_split_by_hash_keeps_works_together_also_across_styles(source, out):
    works = [[f"ink/{number}.png", f"p{number // 5}"] for number in range(10)] + [["blue/0.png", "p0"]]
    write_table(source / "MANIFEST.csv", ["file", "painting_id"], *works)
    build(source, out)
    sides = {}
    for line in index(out):
        sides.setdefault(line["painting_id"], set()).add(line["split"])
    assert all(len(side) == 1 for side in sides.values())
    assert len(held_out(out) & {f"ink/{number}.png" for number in range(10)}) == 5


@pytest.mark.parametrize("shared", range(6))
def test_a_work_in_two_styles_leaves_both_with_one_for_training(shared):
    """Its hash may come before that of the other work of its first style, of its second, of both or of neither."""
    styles = {"blue": {f"shared {shared}", "blue"}, "ink": {f"shared {shared}", "ink"}, "lone": {"ink"}}
    paintings = [Painting(Path(style, work), style, work, None) for style, works in styles.items() for work in works]
    held_out = _held_out(paintings, 0.5)
    assert held_out and all(works - held_out for works in styles.values())


def test_held_out_places_go_to_usable_paintings(source, out):
    paint(source / "blue/2.png", seed=30)
    build(source, out)
    (chosen,) = (name for name in held_out(out) if name.startswith("blue/"))
    (source / chosen).write_text("no image")
    report = build(source, out, force=True)
    assert report.crops["test", "blue"] == report.crops["train", "blue"] == 1


def paper(size=64, grain=4, seed=0):
    """Bare paper: grain of some CIELAB units a pixel, a stain, and light that falls off by six units to one side."""
    generator = np.random.default_rng(seed)
    colours = np.full((size, size, 3), (78.0, 4.0, 20.0))
    colours[..., 0] += np.linspace(-3, 3, size) + generator.normal(0, grain, (size, size))
    colours[size // 4 : size // 2, size // 4 : size // 2] += (-3, 1, 2)
    return Image.fromarray(np.rint(lab2rgb(colours) * 255).astype(np.uint8))


def test_uniform_paper_is_told_from_thin_ink():
    assert is_uniform(Image.new("RGB", (64, 64), (40, 80, 30)))
    assert is_uniform(paper())
    drawn = paper()
    ImageDraw.Draw(drawn).line([(4, 60), (30, 10), (60, 40)], fill=(90, 80, 70), width=1)
    assert not is_uniform(drawn)
    washed = paper()
    ImageDraw.Draw(washed).rectangle((20, 20, 31, 31), fill=(160, 150, 130))
    assert not is_uniform(washed)
    coloured = Image.new("RGB", (64, 64), (90, 130, 110))
    coloured.paste((160, 110, 110), (0, 0, 64, 6))  # as light as the rest
    assert not is_uniform(coloured)
    assert is_uniform(washed, share=0.5)
    assert not is_uniform(paper(), share=0)


@pytest.mark.parametrize(("distance", "uniform"), [(7, True), (9, False)])
def test_a_stain_is_nearer_to_the_paper_than_a_pale_wash(distance, uniform):
    colours = np.full((64, 64, 3), (78.0, 4.0, 20.0))
    colours[:8, :, 0] -= distance
    assert is_uniform(Image.fromarray(np.rint(lab2rgb(colours) * 255).astype(np.uint8))) is uniform


def test_uniform_crops_are_dropped_and_counted(source, out, tmp_path):
    sheet = Image.new("RGB", (64, 32), (200, 190, 170))
    with Image.open(source / "ink/0.png") as image:
        sheet.paste(image, (32, 0))
    sheet.save(source / "ink/0.png")
    report = build(source, out, styles=["ink"])
    assert report.uniform == 1
    kept = [line["left"] for line in index(out) if line["source"] == "ink/0.png"]
    assert kept == ["32"]
    assert len(files(out)) == 1 + 10
    assert build(source, tmp_path / "all", uniform_share=0).uniform == 0


@pytest.mark.parametrize("size", [(20, 16), (16, 20)])
def test_small_images_are_enlarged(source, out, size):
    paint(source / "ink/0.png", size)
    report = build(source, out)
    assert report.enlarged == 1
    lines = [line for line in index(out) if line["source"] == "ink/0.png"]
    assert {float(line["scale"]) for line in lines} == {2.0}
    assert {(float(line["width"]), float(line["height"])) for line in lines} == {(16, 16)}
    corners = {(float(line["left"]), float(line["top"])) for line in lines}
    assert corners == ({(0, 0), (4, 0)} if size[0] > size[1] else {(0, 0), (0, 4)})
    for line in lines:
        with Image.open(out / line["file"]) as crop:
            assert crop.size == (32, 32)


def test_small_images_are_left_out_on_demand(source, out):
    paint(source / "ink/0.png", (31, 64))
    report = build(source, out, small="skip")
    assert report.small == [source / "ink/0.png"]
    assert report.enlarged == 0
    assert "ink/0.png" not in {line["source"] for line in index(out)}


def test_damaged_files_are_named_and_left_out(source, out, caplog):
    (source / "ink/0.png").write_bytes((source / "ink/0.png").read_bytes()[:60])
    (source / "ink/1.png").write_bytes(b"")
    report = build(source, out)
    assert [message.split(": ")[0] for message in report.damaged] == [str(source / f"ink/{n}.png") for n in (0, 1)]
    assert f"left out: {source / 'ink/1.png'}: is an empty file" in caplog.text
    assert report.crops.total() == 10
    assert "10 crops of 12 images (0 enlarged)" in report.summary()
    assert "2 damaged" in report.summary()
    assert str(source / "ink/0.png") in report.summary()


def test_equal_names_are_kept_apart(source, out):
    paint(source / "ink/album/0.png", seed=40)
    paint(source / "ink/album-0.png", seed=41)
    paint(source / "ink/0.tif", seed=42)
    for number, name in enumerate(("Ab", "aB")):
        paint(source / f"ink/{name}.png", seed=43 + number)
    build(source, out, styles=["ink"])
    assert len(index(out)) == len({line["file"].lower() for line in index(out)}) == len(files(out)) - 1 == 15


def test_images_directly_in_the_source_are_one_style(source, out):
    report = build(source / "ink", out)
    assert set(report.crops) == {("train", "ink"), ("test", "ink")}
    assert {line["source"] for line in index(out)} == {f"{number}.png" for number in range(10)}


def test_progress_is_told_after_each_image(source, out):
    steps = []
    build(source, out, progress=lambda done, total: steps.append((done, total)))
    assert steps == [(done, 12) for done in range(1, 13)]


@pytest.mark.parametrize(
    "make", [Path.touch, Path.mkdir, lambda path: path.symlink_to(path.parents[2])], ids=["file", "folder", "link"]
)
def test_force_deletes_nothing_of_somebody_else(source, out, make):
    build(source, out)
    own = out / "train" / "run"
    make(own)
    assert_refuses(build, source, out, force=True, saying=f"{own}: was not made with the data set")
    assert own.exists()


def test_force_replaces_a_former_data_set_only(source, out):
    build(source, out)
    (source / "ink/0.png").unlink()
    assert_refuses(build, source, out, saying=f"{out}: holds a data set already (--force replaces it)")
    build(source, out, force=True)
    assert len(index(out)) == len(files(out)) - 1 == 11
    assert sorted(os.listdir(out.parent)) == ["out", "source"]


def test_an_empty_folder_is_taken(source, out):
    out.mkdir()
    build(source, out)
    assert len(index(out)) == 12


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("interruption", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_interrupted_build_leaves_no_half_data_set(source, out, force, interruption):
    if force:
        build(source, out)
    before = files(source.parent)

    def interrupt(done, total):
        if done == 5:
            raise interruption

    with pytest.raises(KeyboardInterrupt if interruption is KeyboardInterrupt else UserError):
        build(source, out, force=force, progress=interrupt)
    assert files(source.parent) == before
    assert sorted(os.listdir(source.parent)) == (["out", "source"] if force else ["source"])


@pytest.mark.parametrize(
    ("force", "saying"), [(False, "is no longer empty; must be a new or empty folder"), (True, "was not made with the")]
)
def test_what_comes_into_out_during_the_work_stays(source, out, force, saying):
    if force:
        build(source, out)
    out.mkdir(exist_ok=True)

    def put_a_file(done, total):
        (out / "notes.txt").write_text("mine")

    before = files(out)
    assert_refuses(build, source, out, force=force, progress=put_a_file, saying=saying)
    assert files(out) == sorted([*before, "notes.txt"])
    assert sorted(os.listdir(source.parent)) == ["out", "source"]


def test_an_interruption_between_the_two_renames_gives_the_former_data_set_back(source, out, monkeypatch):
    build(source, out)
    before, rename = files(out), Path.rename

    def interrupt(path, target):
        if path.name == "dataset":
            raise KeyboardInterrupt
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", interrupt)
    with pytest.raises(KeyboardInterrupt):
        build(source, out, force=True)
    assert files(out) == before


def test_a_mount_point_is_refused_before_any_work(source, out, monkeypatch):
    mounted = out.with_name("mounted")
    mounted.mkdir()
    out.symlink_to(mounted)
    monkeypatch.setattr(os.path, "ismount", lambda path: path == mounted)
    saying = f"{out}: is a mount point"
    assert_refuses(build, source, out, progress=lambda *_: pytest.fail("paintings were cut"), saying=saying)


def test_a_name_that_the_index_cannot_hold_is_refused_before_any_work(source, out):
    (source / "ink/1.png").rename(source / "ink" / os.fsdecode(b"a\xe9.png"))
    saying = "ink/a\\xe9.png: must have a name in UTF-8, as index.csv is; rename it"
    assert_refuses(build, source, out, progress=lambda *_: pytest.fail("paintings were cut"), saying=saying)


def test_a_source_below_a_folder_of_any_name(source, out):
    place = source.parent / os.fsdecode(b"caf\xe9")
    place.mkdir()
    assert build(source.rename(place / "source"), out).crops


def test_a_painting_that_memory_cannot_enlarge_is_named(source, out, monkeypatch):
    def refuse(*_):
        raise MemoryError

    monkeypatch.setattr(Image.Image, "resize", refuse)
    assert_refuses(
        build, source, out, crop=500, saying="for --crop 500 it does not fit this computer's memory; take a smaller"
    )
    assert not out.exists()


def test_rejects_folders(source, out, tmp_path):
    assert_refuses(build, tmp_path / "missing", out, saying="missing: is not a folder of paintings")
    assert_refuses(build, source, out, styles=["oil"], saying="unknown style 'oil'; known styles: blue, ink")
    assert_refuses(build, source, source, saying="must not lie within one another")
    assert_refuses(build, source, source / "crops", saying="must not lie within one another")
    assert_refuses(build, source, tmp_path, force=True, saying="must not lie within one another")
    assert_refuses(build, source, tmp_path / "a/b", saying=f"its folder {tmp_path / 'a'} does not exist")
    (tmp_path / "file").touch()
    assert_refuses(build, source, tmp_path / "file", saying="file: is a file")
    assert_refuses(build, source, tmp_path / "file/out", saying="file does not exist")
    for name, content in (("other/a.txt", "mine"), ("index/index.csv", "name,price\na,1\n")):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text(content)
    assert_refuses(build, source, tmp_path / "other", force=True, saying="other: holds other files")
    assert_refuses(build, source, tmp_path / "index", force=True, saying="index.csv: needs the columns file, style")
    assert (tmp_path / "other/a.txt").read_text() == "mine"
    build(source, out)
    assert_refuses(build, out, tmp_path / "again", saying=f"{out}: is a built data set already")
    assert not (tmp_path / "again").exists()


@pytest.mark.parametrize(
    ("options", "saying"),
    [
        ({"crop": 0}, "--crop must be from 1 to 16384 pixels, got 0"),
        ({"crop": 40_000}, "--crop must be from 1 to 16384 pixels, got 40000"),
        ({"stride": 0}, "--stride must be 1 pixel or more, got 0"),
        ({"small": "drop"}, "--small must be 'enlarge' or 'skip', got 'drop'"),
        ({"uniform_share": 1.5}, "--uniform-share must be between 0 and 1, got 1.5"),
        ({"test_share": 1.0}, "--test-share must be at least 0 and below 1, got 1.0"),
    ],
)
def test_rejects_options(source, out, options, saying):
    assert_refuses(build, source, out, **options, saying=saying)
    assert not out.exists()


def test_rejects_a_share_beside_a_split(source, out):
    write_table(source / "MANIFEST.csv", ["file", "painting_id"], ["ink/1.png", "p0"])
    write_table(source / "SPLIT.csv", ["painting_id", "split"], ["p0", "test"])
    assert_refuses(build, source, out, test_share=0.3, saying="SPLIT.csv says which works are held out")


def test_rejects_when_nothing_is_left(tmp_path, out):
    (tmp_path / "source/ink").mkdir(parents=True)
    (tmp_path / "source/ink/1.png").touch()
    Image.new("RGB", (32, 32), (200, 190, 170)).save(tmp_path / "source/ink/2.png")
    paint(tmp_path / "source/ink/3.png", (16, 16))
    saying = "source: no crop is left (1 too uniform; 1 images too small, 1 damaged)"
    assert_refuses(build, tmp_path / "source", out, small="skip", saying=saying)
    assert not out.exists()


@needs_paintings
def test_real_paintings_keep_works_on_one_side(out):
    report = build(PAINTINGS, out, crop=64, stride=2000, styles=["blue_green"])
    assert report.damaged == []
    sides = {}
    for line in index(out):
        sides.setdefault(line["painting_id"], set()).add(line["split"])
    assert all(len(side) == 1 for side in sides.values())
    assert {"train"} in sides.values() and {"test"} in sides.values()

"""What training and evaluation read: which paintings, which pairs, and the same samples at every resumption."""

import csv
import errno
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from restoration.data import (
    DESCRIBED_SIDE,
    Painting,
    PairDataset,
    evaluation_pairs,
    find_paintings,
    read_table,
    small_picture,
)
from restoration.errors import UserError
from restoration.imaging import read_image

PAINTINGS = os.environ.get("RESTORATION_PAINTINGS")
needs_paintings = pytest.mark.skipif(not PAINTINGS, reason="RESTORATION_PAINTINGS names no folder of paintings")


def paint(path, size=(40, 30), seed=0):
    """A picture of random pixels, (width, height) = size."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


def write_table(path, columns, *lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows([columns, *lines])


@pytest.fixture
def folders(tmp_path):
    """Two styles without tables: blue 1..2, ink 1..4."""
    for number in (1, 2):
        paint(tmp_path / f"blue/{number}.png", seed=number)
    for number in (1, 2, 3, 4):
        paint(tmp_path / f"ink/{number}.png", seed=10 + number)
    return tmp_path


def test_a_folder_that_cannot_be_read_is_an_error(folders, monkeypatch):
    scan = os.scandir

    def refuse(path):
        if Path(path).name == "ink":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(UserError, match=r"ink: cannot be read \(Permission denied\)"):
        find_paintings(folders)


@pytest.fixture
def split_folders(folders):
    """The same with tables: ink 1 and 2 show one work, held out with blue 2; ink 4 stands in no table."""
    works = [["blue/1.png", "p1"], ["blue/2.png", "p2"], ["ink/1.png", "p3"], ["ink/2.png", "p3"], ["ink/3.png", "p4"]]
    write_table(folders / "MANIFEST.csv", ["file", "painting_id"], *works)
    splits = [["p1", "train"], ["p2", "validation"], ["p3", "test"], ["p4", "train"]]
    write_table(folders / "SPLIT.csv", ["painting_id", "split"], *splits)
    return folders


def names(root, paintings):
    return [painting.path.relative_to(root).as_posix() for painting in paintings]


def assert_refuses(function, *arguments, saying, **options):
    with pytest.raises(UserError) as caught:
        function(*arguments, **options)
    assert saying in str(caught.value)
    assert "\n" not in str(caught.value)


class TestFindPaintings:
    def test_plain_folders_serve_both_sides(self, folders):
        everything = find_paintings(folders)
        assert names(folders, everything) == ["blue/1.png", "blue/2.png", *(f"ink/{number}.png" for number in "1234")]
        assert {painting.split for painting in everything} == {None}
        assert len({painting.painting_id for painting in everything}) == 6
        assert find_paintings(folders, split="train") == find_paintings(folders, split="test") == everything

    def test_folders_at_any_depth_and_no_others(self, folders, caplog):
        paint(folders / "ink/album/5.PNG")
        paint(folders / "ink/.hidden/6.png")
        paint(folders / ".hidden/7.png")
        paint(folders / "loose.png")
        (folders / "ink/notes.txt").touch()
        (folders / "ink/8.png").mkdir()
        (folders / "empty").mkdir()
        found = find_paintings(folders)
        assert len(found) == 7
        assert Painting(folders / "ink/album/5.PNG", "ink", "ink/album/5.PNG", None) in found
        assert "1 images outside the style folders" in caplog.text

    def test_a_folder_of_images_is_one_style(self, folders):
        assert {painting.style for painting in find_paintings(folders / "ink")} == {"ink"}

    def test_tables_tell_works_and_splits(self, split_folders):
        train = find_paintings(split_folders, split="train")
        assert names(split_folders, train) == ["blue/1.png", "ink/3.png", "ink/4.png"]
        test = find_paintings(split_folders, split="test")
        assert names(split_folders, test) == ["blue/2.png", "ink/1.png", "ink/2.png"]
        assert [painting.painting_id for painting in test] == ["p2", "p3", "p3"]

    def test_manifest_alone_tells_works(self, split_folders):
        (split_folders / "SPLIT.csv").unlink()
        found = find_paintings(split_folders)
        assert {painting.split for painting in found} == {None}
        assert [painting.painting_id for painting in found] == ["p1", "p2", "p3", "p3", "p4", "ink/4.png"]
        write_table(split_folders / "MANIFEST.csv", ["name", "price"], ["a", "1"])
        assert find_paintings(split_folders)[0].painting_id == "blue/1.png"

    def test_index_is_believed(self, folders):
        columns = ["file", "style", "split", "painting_id"]
        write_table(folders / "index.csv", columns, ["ink/1.png", "wash", "test", "p1"])
        assert find_paintings(folders) == [Painting(folders / "ink/1.png", "wash", "p1", "test")]

    def test_styles_choose(self, folders):
        assert names(folders, find_paintings(folders, styles=["blue"])) == ["blue/1.png", "blue/2.png"]

    def test_tables_that_would_let_held_out_works_in_are_refused(self, split_folders, caplog):
        manifest, split = (split_folders / name for name in ("MANIFEST.csv", "SPLIT.csv"))
        as_it_was = split.read_text()
        split.write_text(f"{as_it_was}p7,test\n")
        assert_refuses(find_paintings, split_folders, saying=f"SPLIT.csv: holds out 'p7', of which {manifest} names no")
        split.write_text(f"{as_it_was}p2,train\n")
        saying = "SPLIT.csv: gives 'p2' two values of split, 'validation' and 'train'"
        assert_refuses(find_paintings, split_folders, saying=saying)
        split.write_text(f"{as_it_was}p2,validation\np9,train\n")
        assert len(find_paintings(split_folders)) == 6 and caplog.text == ""

        tables = manifest.read_text()
        for spelling in ("ink\\1.png", "Ink/1.PNG", "ink/1.tif"):
            manifest.write_text(tables.replace("ink/1.png", spelling))
            saying = f"MANIFEST.csv: names '{spelling}', which is not there, in the place of 'ink/1.png', it seems"
            assert_refuses(find_paintings, split_folders, saying=saying)
        for spelling in (str(split_folders / "ink/1.png"), "ink/../ink/1.png"):
            manifest.write_text(tables.replace("ink/1.png", spelling))
            saying = f"MANIFEST.csv: paths must be relative to {split_folders} and within it, got '{spelling}'"
            assert_refuses(find_paintings, split_folders, saying=saying)
        manifest.write_text(tables.replace("ink/1.png", "./ink//1.png"))
        assert "ink/1.png" in names(split_folders, find_paintings(split_folders, split="test"))
        manifest.write_text(f"{tables}ink/9.png,p9\n")
        find_paintings(split_folders)
        assert "MANIFEST.csv: 1 files are not there, such as 'ink/9.png'" in caplog.text
        split.unlink()
        manifest.write_text(f"{manifest.read_text()}ink/2.png,p1\n")
        saying = "MANIFEST.csv: gives 'ink/2.png' two values of painting_id, 'p3' and 'p1'"
        assert_refuses(find_paintings, split_folders, saying=saying)

    def test_rejects(self, folders, split_folders):
        missing = folders / "missing"
        assert_refuses(find_paintings, missing, saying=f"{missing}: is not a folder of paintings")
        (folders / "empty").mkdir()
        assert_refuses(find_paintings, folders / "empty", saying="empty: holds no images (.png, .jpg")
        saying = f"{folders}: unknown style 'oil'; known styles: blue, ink"
        assert_refuses(find_paintings, folders, styles=["ink", "oil"], saying=saying)
        write_table(split_folders / "SPLIT.csv", ["painting_id", "split"], ["p1", "train"])
        assert_refuses(find_paintings, split_folders, split="test", saying="holds no test images of blue, ink")
        write_table(split_folders / "SPLIT.csv", ["painting_id", "split"], ["p1", "holdout"])
        saying = "SPLIT.csv: split must be one of train, validation, test, got 'holdout'"
        assert_refuses(find_paintings, split_folders, saying=saying)
        (split_folders / "MANIFEST.csv").unlink()
        assert_refuses(find_paintings, split_folders, saying="MANIFEST.csv: no such file")
        write_table(folders / "index.csv", ["file", "style", "split", "painting_id"], ["../a.png", "a", "test", "p1"])
        assert_refuses(find_paintings, folders, saying="within it, got '../a.png'")


class TestReadTable:
    def test_byte_order_mark_is_no_part_of_a_name(self, tmp_path):
        (tmp_path / "table.csv").write_bytes(b"\xef\xbb\xbffile,style\r\na.png,ink\r\n")
        assert read_table(tmp_path / "table.csv", ["file"]) == [{"file": "a.png", "style": "ink"}]

    def test_rejects(self, tmp_path):
        table = tmp_path / "table.csv"
        assert_refuses(read_table, table, ["file"], saying="table.csv: no such file")
        assert_refuses(read_table, tmp_path, ["file"], saying=f"{tmp_path}: cannot be read as a CSV table")
        table.write_bytes(b"\xff\xfe\x00")
        assert_refuses(read_table, table, ["file"], saying="table.csv: cannot be read as a CSV table")
        table.write_text("")
        assert_refuses(read_table, table, ["file"], saying="needs the columns file; missing: file")
        write_table(table, ["file"], ["a.png"])
        assert_refuses(read_table, table, ["file", "style"], saying="needs the columns file, style; missing: style")
        write_table(table, ["file", "style"], ["a.png", "ink"], ["b.png"])
        assert_refuses(read_table, table, ["file", "style"], saying="table.csv: line 3 has an empty field")


class TestEvaluationPairs:
    def test_listed_pairs(self, folders):
        table = folders / "pairs.csv"
        paint(folders / "ink/album/5.png")
        lines = [["ink/2.png", "ink/1.png"], ["blue/1.png", "ink/3.png"], ["ink/album/5.png", "ink/3.png"]]
        write_table(table, ["degraded", "reference"], *lines)
        expected = [
            (folders / "blue/1.png", folders / "ink/3.png", "blue"),
            (folders / "ink/2.png", folders / "ink/1.png", "ink"),
            (folders / "ink/album/5.png", folders / "ink/3.png", "ink"),
        ]
        assert evaluation_pairs(folders, table) == expected
        assert evaluation_pairs(folders, table, count=1) == expected[:2]

    def test_own_pairs_are_of_held_out_works_and_always_the_same(self, split_folders):
        pairs = evaluation_pairs(split_folders)
        assert pairs == evaluation_pairs(split_folders)
        assert [(pair.degraded.name, pair.reference.name, pair.style) for pair in pairs] == [
            ("2.png", "2.png", "blue"),  # the style's only held-out file
            ("1.png", "2.png", "ink"),  # the style's only held-out work
            ("2.png", "1.png", "ink"),
        ]

    def test_own_pairs_join_different_works(self, folders):
        works = [["ink/1.png", "p1"], ["ink/2.png", "p1"], ["ink/3.png", "p1"], ["ink/4.png", "p2"]]
        write_table(folders / "MANIFEST.csv", ["file", "painting_id"], *works)
        references = {
            pair.degraded.name: pair.reference.name for pair in evaluation_pairs(folders) if pair.style == "ink"
        }
        assert [references[f"{number}.png"] for number in (1, 2, 3)] == ["4.png"] * 3
        assert references["4.png"] != "4.png"

    def test_own_pairs_take_each_work_as_reference(self, folders):
        assert len({pair.reference for pair in evaluation_pairs(folders)}) == 6

    def test_count_is_spread_over_each_style(self, folders):
        pairs = evaluation_pairs(folders, count=2)
        degraded = [pair.degraded.relative_to(folders).as_posix() for pair in pairs]
        assert degraded == ["blue/1.png", "blue/2.png", "ink/1.png", "ink/3.png"]
        assert all(pair.degraded != pair.reference for pair in pairs)

    def test_rejects(self, folders):
        table = folders / "pairs.csv"
        assert_refuses(evaluation_pairs, folders, table, saying="pairs.csv: no such file")
        write_table(table, ["degraded", "target"], ["ink/1.png", "ink/2.png"])
        assert_refuses(evaluation_pairs, folders, table, saying="missing: reference")
        write_table(table, ["degraded", "reference"])
        assert_refuses(evaluation_pairs, folders, table, saying="pairs.csv: lists no pairs")
        write_table(table, ["degraded", "reference"], ["ink/1.png", "ink/9.png"])
        assert_refuses(evaluation_pairs, folders, table, saying=f"lists {folders / 'ink/9.png'}, which does not exist")
        for outside in ("../pairs.csv", str(folders / "ink/1.png")):
            write_table(table, ["degraded", "reference"], ["ink/1.png", outside])
            assert_refuses(evaluation_pairs, folders, table, saying=f"within it, got '{outside}'")
        assert_refuses(evaluation_pairs, folders, count=0, saying="--count must be 1 or more, got 0")


def same_samples(one, other):
    return all(torch.equal(one[key], other[key]) for key in ("degraded", "reference")) and all(
        one[key] == other[key] for key in ("degraded_file", "reference_file")
    )


class TestPairDataset:
    def test_samples(self, folders):
        dataset = PairDataset(find_paintings(folders), 16)
        for index in range(40):
            sample = dataset[index]
            for side in ("degraded", "reference"):
                assert sample[side].shape == (3, 16, 16)
                assert sample[side].dtype == torch.float32
                assert 0 <= sample[side].min() <= sample[side].max() <= 1
            degraded, reference = Path(sample["degraded_file"]), Path(sample["reference_file"])
            assert degraded.parent == reference.parent
            assert degraded != reference

    def test_a_sample_depends_on_seed_and_index_alone(self, folders):
        paintings = find_paintings(folders)
        dataset = PairDataset(paintings, 16, seed=3, cache_bytes=2**20)  # all of them
        in_order = [dataset[index] for index in range(12)]
        fresh = PairDataset(paintings[::-1], 16, seed=3, cache_bytes=5_000, verify=False)  # one painting and no more
        for index in (11, 4, 4, 0):
            assert same_samples(fresh[index], in_order[index])
        other = PairDataset(paintings, 16, seed=4)
        assert not any(same_samples(other[index], in_order[index]) for index in range(12))
        assert not any(same_samples(in_order[0], in_order[index]) for index in range(1, 12))

    def test_styles_are_drawn_evenly_and_images_within(self, folders):
        dataset = PairDataset(find_paintings(folders), 4)
        drawn = [dataset[index]["degraded_file"] for index in range(600)]
        # 300 expected of each style, 75 of each ink painting: both bounds lie beyond four standard deviations.
        assert abs(sum("/ink/" in file for file in drawn) - 300) < 50
        assert all(45 < drawn.count(str(folders / f"ink/{number}.png")) < 110 for number in (1, 2, 3, 4))

    def test_reference_is_another_work(self, folders):
        write_table(
            folders / "MANIFEST.csv", ["file", "painting_id"], *([f"ink/{number}.png", "p1"] for number in (1, 2, 3))
        )
        dataset = PairDataset(find_paintings(folders, styles=["ink"]), 4)
        samples = [dataset[index] for index in range(60)]
        for sample in samples:
            assert ("4.png" in sample["degraded_file"]) != ("4.png" in sample["reference_file"])
        assert {Path(sample["reference_file"]).name for sample in samples} == {
            f"{number}.png" for number in (1, 2, 3, 4)
        }

    def test_reference_within_one_work_is_another_file(self, folders):
        paintings = [Painting(folders / f"ink/{number}.png", "ink", "p1", None) for number in (1, 2)]
        dataset = PairDataset(paintings, 4)
        for index in range(20):
            assert dataset[index]["degraded_file"] != dataset[index]["reference_file"]

    def test_reference_of_a_single_file_is_another_crop_of_it(self, folders):
        dataset = PairDataset(find_paintings(folders)[:1], 16)
        samples = [dataset[index] for index in range(10)]
        assert all(sample["degraded_file"] == sample["reference_file"] for sample in samples)
        assert not any(torch.equal(sample["degraded"], sample["reference"]) for sample in samples)

    def test_crops_of_scale_one_are_pixels_of_the_painting_at_every_place(self, tmp_path):
        paint(tmp_path / "ink/1.png", (11, 10))
        dataset = PairDataset(find_paintings(tmp_path), 8, scale_range=(1.0, 1.0))
        windows = read_image(tmp_path / "ink/1.png").rgb.unfold(1, 8, 1).unfold(2, 8, 1).permute(1, 2, 0, 3, 4)
        drawn = []
        for index in range(80):
            crop = dataset[index]["degraded"]
            drawn.append(torch.stack([(windows == image).flatten(2).all(2) for image in (crop, crop.flip(-1))]))
            assert drawn[-1].sum() == 1
        times = sum(drawn)
        assert times.sum(0).all()
        assert 20 <= times[1].sum() <= 60

    def test_scale_range_sets_the_size_of_the_box(self, tmp_path):
        # A ramp of one level a column: a crop's own step between columns is the scale at which it was drawn.
        ramp = np.broadcast_to(np.arange(200, dtype=np.uint8)[None, :, None], (200, 200, 3))
        (tmp_path / "ink").mkdir()
        Image.fromarray(np.ascontiguousarray(ramp)).save(tmp_path / "ink/1.png")
        dataset = PairDataset(find_paintings(tmp_path), 32, scale_range=(1.5, 3.0))
        scales = []
        for index in range(40):
            row = dataset[index]["degraded"][0, 16] * 255
            scales.append(float((row[24] - row[8]).abs()) / 16)
        assert 1.4 < min(scales) < 1.8
        assert 2.7 < max(scales) < 3.1

    @pytest.mark.parametrize("size", [(1, 1), (5, 40), (40, 5)])
    def test_smaller_images_are_enlarged(self, tmp_path, size):
        paint(tmp_path / "ink/1.png", size)
        sample = PairDataset(find_paintings(tmp_path), 16)[0]
        assert sample["degraded"].shape == sample["reference"].shape == (3, 16, 16)

    def test_damaged_files_are_named_and_left_out(self, folders, caplog):
        (folders / "ink/2.png").write_bytes((folders / "ink/2.png").read_bytes()[:200])
        (folders / "ink/3.png").write_text("no image")
        dataset = PairDataset(find_paintings(folders, styles=["ink"]), 4)
        assert dataset.skipped == [folders / "ink/2.png", folders / "ink/3.png"]
        assert f"left out: {folders / 'ink/2.png'}: is damaged or truncated" in caplog.text
        assert f"left out: {folders / 'ink/3.png'}: is not a readable" in caplog.text
        drawn = {dataset[index]["degraded_file"] for index in range(20)}
        assert drawn == {str(folders / "ink/1.png"), str(folders / "ink/4.png")}

    def test_rejects_when_nothing_is_left(self, folders):
        for path in (folders / "blue").iterdir():
            path.write_bytes(b"no image")
        paintings = find_paintings(folders, styles=["blue"])
        assert_refuses(PairDataset, paintings, 4, saying="no painting is left to train on (2 damaged)")
        unverified = PairDataset(paintings, 4, verify=False)
        assert_refuses(unverified.__getitem__, 0, saying="is not a readable")

    @pytest.mark.parametrize(
        ("options", "saying"),
        [
            ({"crop": 0}, "crop must be 1 pixel or more, got 0"),
            ({"seed": -1}, "seed must be 0 or more, got -1"),
            ({"pairing": "best"}, "pairing must be 'random' or 'nearest', got 'best'"),
            ({"scale_range": (3.0, 1.0)}, "scale_range must be two factors above 0, the smaller first, got (3.0, 1.0)"),
            ({"neighbors": 0}, "neighbors must be 1 or more, got 0"),
        ],
    )
    def test_rejects_options(self, folders, options, saying):
        assert_refuses(PairDataset, find_paintings(folders), **({"crop": 4} | options), saying=saying)

    def test_nearest_needs_a_description(self, folders):
        with pytest.raises(ValueError, match="describe must be given"):
            PairDataset(find_paintings(folders), 4, pairing="nearest")

    def test_nearest_draws_among_the_nearest_of_other_works(self, tmp_path):
        greys = {"1": 0, "2": 10, "3": 30, "4": 60, "5": 200, "6": 210}
        (tmp_path / "ink").mkdir()
        for name, grey in greys.items():
            Image.new("RGB", (12, 12), (grey, grey, grey)).save(tmp_path / f"ink/{name}.png")
        write_table(tmp_path / "MANIFEST.csv", ["file", "painting_id"], ["ink/5.png", "p"], ["ink/6.png", "p"])
        dataset = PairDataset(
            find_paintings(tmp_path), 4, pairing="nearest", neighbors=2, describe=lambda rgb: rgb.mean(dim=(1, 2))
        )
        met = {}
        for index in range(150):
            sample = dataset[index]
            met.setdefault(Path(sample["degraded_file"]).stem, set()).add(Path(sample["reference_file"]).stem)
        assert met == {
            "1": {"2", "3"},
            "2": {"1", "3"},
            "3": {"2", "1"},  # 2 is 20 away; 1 and 4 both 30: the first in order
            "4": {"3", "2"},
            "5": {"4", "3"},
            "6": {"4", "3"},
        }

    def test_small_picture_is_shrunk_but_never_enlarged(self, tmp_path):
        paint(tmp_path / "wide.png", (2 * DESCRIBED_SIDE, 100))
        paint(tmp_path / "small.png", (20, 10))
        assert small_picture(tmp_path / "wide.png").shape == (3, 50, DESCRIBED_SIDE)
        assert small_picture(tmp_path / "small.png").shape == (3, 10, 20)


@needs_paintings
def test_real_validation_works_are_never_trained_on():
    train, test = (find_paintings(PAINTINGS, split=split) for split in ("train", "test"))
    assert not {painting.painting_id for painting in train} & {painting.painting_id for painting in test}
    held_out = {painting.path for painting in test}
    pairs = evaluation_pairs(PAINTINGS, Path(PAINTINGS) / "VALIDATION_PAIRS.csv")
    assert all(pair.degraded in held_out and pair.reference in held_out for pair in pairs)


@needs_paintings
def test_real_pairs():
    dataset = PairDataset(find_paintings(PAINTINGS, split="train"), 64, verify=False)
    for index in range(8):
        assert dataset[index]["degraded"].std() > 0

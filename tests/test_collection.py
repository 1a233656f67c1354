"""Which paintings a folder holds: folders and tables, works that are held out, pairs to evaluate on."""

import errno
import os
from pathlib import Path

import pytest
from pictures import PAINTINGS, assert_refuses, needs_paintings, paint, write_table

from restoration.collection import Painting, evaluation_pairs, find_paintings, read_table
from restoration.errors import UserError


def test_a_folder_that_cannot_be_read_is_an_error(folders, monkeypatch):
    scan = os.scandir

    def refuse(path):
        if Path(path).name in ("ink", ".trash"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scan(path)

    (folders / "blue/.trash").mkdir()
    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(UserError, match=r"ink: cannot be read \(Permission denied\)"):
        find_paintings(folders)


def test_links_that_lead_to_no_picture_are_told_of(folders, tmp_path, caplog):
    (tmp_path / "elsewhere").mkdir()
    (folders / "ink/again.png").symlink_to("1.png")
    (folders / "ink/.hidden").symlink_to(tmp_path / "elsewhere")
    assert folders / "ink/again.png" in [painting.path for painting in find_paintings(folders)]
    assert not caplog.records
    (folders / "ink/lost.png").symlink_to("nowhere.png")
    (folders / "ink/linked").symlink_to(tmp_path / "elsewhere")
    before = find_paintings(folders)
    assert f"{folders / 'ink/lost.png'}: is a link to what is not there; it is left out" in caplog.messages
    assert f"{folders / 'ink/linked'}: is a link to a folder, which is not followed" in caplog.messages
    (folders / "ink/lost.png").unlink()
    assert find_paintings(folders) == before


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
        rows = [[f"ink/{number}.png", "wash", split, "p1"] for number, split in ((1, "test"), (2, "train"))]
        write_table(folders / "index.csv", columns, *rows)
        saying = "index.csv: gives 'p1' two values of split, 'test' and 'train'"
        assert_refuses(find_paintings, folders, saying=saying)

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
        for spelling in ("ink\\1.png", "Ink/1.PNG", "ink/1.tif", " ink/1.png"):
            manifest.write_text(tables.replace("ink/1.png", spelling))
            saying = f"MANIFEST.csv: names '{spelling}', which is not there, in the place of 'ink/1.png', it seems"
            assert_refuses(find_paintings, split_folders, saying=saying)
        for spelling in (str(split_folders / "ink/1.png"), "ink/../ink/1.png"):
            manifest.write_text(tables.replace("ink/1.png", spelling))
            saying = f"MANIFEST.csv: paths must be relative to {split_folders} and within it, got '{spelling}'"
            assert_refuses(find_paintings, split_folders, saying=saying)
        manifest.write_text(tables.replace("ink/1.png", "./ink//1.png"))
        assert "ink/1.png" in names(split_folders, find_paintings(split_folders, split="test"))
        manifest.write_text(tables.replace("ink/", "scans/ink/"))
        saying = (
            "names 'scans/ink/1.png', of a work that is held out, which is not there, and does not name 'ink/1.png'"
        )
        assert_refuses(find_paintings, split_folders, saying=saying)
        manifest.write_text(f"{tables}ink/9.png,p9\n")
        find_paintings(split_folders)
        assert "MANIFEST.csv: 1 files are not there, such as 'ink/9.png'" in caplog.text
        split.rename(split_folders / "Split.csv")
        assert_refuses(find_paintings, split_folders, saying="Split.csv: must be named SPLIT.csv, if it says which")
        (split_folders / "Split.csv").unlink()
        split.symlink_to("not fetched")
        assert_refuses(find_paintings, split_folders, saying="SPLIT.csv: no such file")
        split.unlink()
        manifest.write_text(f"{manifest.read_text()}ink/2.png,p1\n")
        saying = "MANIFEST.csv: gives 'ink/2.png' two values of painting_id, 'p3' and 'p1'"
        assert_refuses(find_paintings, split_folders, saying=saying)

    def test_what_is_held_out_may_be_left_out_where_the_manifest_names_all_others(self, split_folders, caplog):
        for number in (1, 4):
            (split_folders / f"ink/{number}.png").unlink()
        assert names(split_folders, find_paintings(split_folders, split="test")) == ["blue/2.png", "ink/2.png"]
        assert "MANIFEST.csv: 1 files are not there, such as 'ink/1.png'" in caplog.text

    def test_an_accent_of_its_own_is_another_spelling(self, split_folders):
        """As macOS writes names."""
        manifest = split_folders / "MANIFEST.csv"
        (split_folders / "ink/1.png").rename(split_folders / "ink/\N{LATIN SMALL LETTER E WITH ACUTE}.png")
        manifest.write_text(manifest.read_text().replace("ink/1.png", "ink/e\N{COMBINING ACUTE ACCENT}.png"))
        saying = "in the place of 'ink/\N{LATIN SMALL LETTER E WITH ACUTE}.png', it seems"
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

    def test_a_style_is_not_named_as_all_of_them(self, folders):
        (folders / "blue").rename(folders / "all")
        saying = f"{folders}: rename the style 'all', whose name the means over all styles have"
        assert_refuses(evaluation_pairs, folders, saying=saying)
        write_table(folders / "pairs.csv", ["degraded", "reference"], ["ink/1.png", "ink/2.png"])
        assert len(evaluation_pairs(folders, folders / "pairs.csv")) == 1
        assert {pair.style for pair in evaluation_pairs(folders / "all")} == {"all"}  # whose means are those of all

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


@needs_paintings
def test_real_validation_works_are_never_trained_on():
    train, test = (find_paintings(PAINTINGS, split=split) for split in ("train", "test"))
    assert not {painting.painting_id for painting in train} & {painting.painting_id for painting in test}
    held_out = {painting.path for painting in test}
    pairs = evaluation_pairs(PAINTINGS, Path(PAINTINGS) / "VALIDATION_PAIRS.csv")
    assert all(pair.degraded in held_out and pair.reference in held_out for pair in pairs)

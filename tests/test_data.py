"""What training reads: crops of two works of a style, and the same samples at every resumption."""

import inspect
import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from pictures import PAINTINGS, assert_refuses, needs_paintings, paint, write_table
from PIL import Image

from restoration.collection import Painting, find_paintings
from restoration.data import DESCRIBED_SIDE, PairDataset, small_picture
from restoration.imaging import from_pillow, read_image


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
        others = [other[index] for index in range(12)]
        assert not any(same_samples(*pair) for pair in itertools.product(others, in_order))
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
        for index in range(400):
            crop = dataset[index]["degraded"]
            drawn.append(torch.stack([(windows == image).flatten(2).all(2) for image in (crop, crop.flip(-1))]))
            assert drawn[-1].sum() == 1
        times = sum(drawn)
        assert times.sum(0).all()
        assert 160 <= times[1].sum() <= 240  # four standard deviations

    def test_crops_are_reduced_by_lanczos(self, tmp_path):
        paint(tmp_path / "ink/1.png", (48, 48))
        crop = PairDataset(find_paintings(tmp_path), 8, scale_range=(6.0, 6.0))[0]["degraded"]
        with Image.open(tmp_path / "ink/1.png") as whole:
            reduced = from_pillow(whole.resize((8, 8), Image.Resampling.LANCZOS))
        assert torch.equal(crop, reduced) or torch.equal(crop, reduced.flip(-1))

    def test_defaults(self):
        defaults = {name: option.default for name, option in inspect.signature(PairDataset).parameters.items()}
        assert (defaults["pairing"], defaults["scale_range"], defaults["neighbors"]) == ("random", (1.0, 3.0), 3)

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
        with Image.open(tmp_path / "wide.png") as wide:
            shrunk = from_pillow(wide.resize((DESCRIBED_SIDE, 50), Image.Resampling.LANCZOS, reducing_gap=2.0))
        assert torch.equal(small_picture(tmp_path / "wide.png"), shrunk)  # reducing_gap is a thumbnail's
        assert small_picture(tmp_path / "small.png").shape == (3, 10, 20)


@needs_paintings
def test_real_pairs():
    dataset = PairDataset(find_paintings(PAINTINGS, split="train"), 64, verify=False)
    for index in range(8):
        assert dataset[index]["degraded"].std() > 0

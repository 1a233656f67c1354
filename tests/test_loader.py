"""Batches on their way to the device: the same with any workers and any cache, and plain errors."""

import multiprocessing
import subprocess

import pytest
import torch
from PIL import Image

from restoration.collection import find_paintings
from restoration.data import PairDataset
from restoration.errors import UserError
from restoration.loader import PictureCache, load_batches

CPU = torch.device("cpu")


def test_resuming_with_other_workers_gives_the_same_batches(folders):
    dataset = PairDataset(find_paintings(folders), 8, cache_bytes=2**20)
    numbers = [range(start, start + 2) for start in range(0, 12, 2)]
    whole = list(load_batches(dataset, numbers, 0, CPU))
    resumed = list(load_batches(dataset, numbers[3:], 2, CPU))
    assert len(whole) == 6
    for expected, batch in zip(whole[3:], resumed, strict=True):
        assert torch.equal(batch["degraded"], expected["degraded"])
        assert batch["reference_file"] == expected["reference_file"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_batches_arrive_whole_on_a_gpu(folders):
    dataset = PairDataset(find_paintings(folders), 256)
    numbers = [range(start, start + 4) for start in range(0, 40, 4)]
    for expected, batch in zip(
        load_batches(dataset, numbers, 0, CPU), load_batches(dataset, numbers, 1, torch.device("cuda")), strict=True
    ):
        torch.cuda._sleep(10_000_000)  # the batch is used much later than the next one is copied
        found = batch["degraded"] + 0
        assert torch.equal(found.cpu(), expected["degraded"])


def test_a_signal_to_all_processes_leaves_workers_at_work(folders):
    dataset = PairDataset(find_paintings(folders), 8)
    batches = load_batches(dataset, [range(1)] * 20, 1, CPU)
    next(batches)
    (worker,) = multiprocessing.active_children()
    subprocess.run(f"for name in INT HUP TERM; do kill -$name {worker.pid}; done", shell=True, check=True)
    assert len([next(batches) for _ in range(18)]) == 18
    # As Python ends a process whose batches were not all taken.
    worker.terminate()
    worker.join(10)
    assert worker.exitcode == 0


@pytest.mark.parametrize("workers", [0, 1])
def test_a_file_that_is_lost_while_training_is_named(folders, workers):
    style = (folders / "blue").rename(folders / "dark\nblue")
    dataset = PairDataset(find_paintings(folders, styles=[style.name]), 4)
    for path in style.iterdir():
        path.unlink()
    with pytest.raises(UserError) as caught:
        list(load_batches(dataset, [range(1)], workers, CPU))
    assert str(caught.value) in [f"{style}/{number}.png: no such file" for number in (1, 2, 3)]


def test_cache_forgets_the_least_recently_used(folders, monkeypatch):
    read = []
    monkeypatch.setattr("restoration.loader.read_rgb", lambda path: read.append(path.name) or Image.new("RGB", (8, 8)))
    paintings = find_paintings(folders, styles=["ink"])
    dataset = PairDataset(paintings, 4, verify=False, cache_bytes=3 * 4 * 8 * 8 - 1)  # too few for three
    for number in (1, 2, 1, 3, 1, 2, 3):
        dataset._pictures.read(folders / f"ink/{number}.png")
    assert read == ["1.png", "2.png", "3.png", "2.png", "3.png"]


def test_a_picture_beyond_the_limit_leaves_the_others_in_the_cache(monkeypatch):
    read, sides = [], {"small": 4, "large": 16}
    monkeypatch.setattr(
        "restoration.loader.read_rgb", lambda name: read.append(name) or Image.new("RGB", (sides[name],) * 2)
    )
    cache = PictureCache(4 * 16**2 - 1)
    assert [cache.read(name).width for name in ("small", "large", "small", "large")] == [4, 16, 4, 16]
    assert read == ["small", "large", "large"]


def test_cache_counts_pictures_of_every_size(monkeypatch):
    sides = {"small": 4, "middle": 8, "large": 16}
    monkeypatch.setattr("restoration.loader.read_rgb", lambda name: Image.new("RGB", (sides[name], sides[name])))
    cache = PictureCache(4 * (16**2 + 8**2))  # the large one and another
    for name in ("middle", "large", "small", "middle", "large", "small", "large", "middle", "small"):
        cache.read(name)
        assert cache._held == sum(4 * sides[kept] ** 2 for kept in cache._pictures) <= cache._limit

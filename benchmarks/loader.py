"""``python -m benchmarks.loader FOLDER``: training pairs a second from the loader, with and without its cache.

A step of batch B that takes t seconds needs B / t pairs a second. Told are the pairs a second as they came, which on a
busy computer says little, and the processor time of a pair, whose inverse is what a worker gives on a free core.
"""

import argparse
import time
from pathlib import Path

import torch

from restoration.collection import find_paintings
from restoration.data import PairDataset
from restoration.loader import load_batches

BATCH = 2  # the paper's
CACHES_MB = (0, 2048)


def main():
    parser = argparse.ArgumentParser(description="Training pairs a second, as Markdown.")
    parser.add_argument("folder", type=Path, help="paintings, as restoration train takes them")
    parser.add_argument("--crop", type=int, default=512)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--batches", type=int, default=100)
    options = parser.parse_args()

    paintings = find_paintings(options.folder, split="train")
    print("| cache, MiB | pairs/s | processor time of a pair, ms |\n|--:|--:|--:|")
    for cache in CACHES_MB:
        dataset = PairDataset(paintings, options.crop, verify=False, cache_bytes=cache * 2**20)
        rate, pair = _rate(dataset, options.workers, options.batches), _processor_seconds(dataset, options.batches)
        print(f"| {cache} | {rate:.1f} | {1e3 * pair:.1f} |", flush=True)


def _rate(dataset, workers, count):
    """Pairs a second of the second half of some batches: the first half fills the cache, and starts the workers."""
    numbers = [range(start, start + BATCH) for start in range(0, 2 * count * BATCH, BATCH)]
    moments = [time.perf_counter() for _ in load_batches(dataset, numbers, workers, torch.device("cpu"))]
    return count * BATCH / (moments[-1] - moments[count - 1])


def _processor_seconds(dataset, count):
    """Of a pair, in this process."""
    for index in range(count * BATCH):
        dataset[index]
    began = time.process_time()
    for index in range(count * BATCH, 2 * count * BATCH):
        dataset[index]
    return (time.process_time() - began) / (count * BATCH)


if __name__ == "__main__":
    main()

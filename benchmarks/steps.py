"""``python -m benchmarks.steps``: training steps of every kind of bench_restoration.py, in turns.

pytest times one kind after the other. On a computer that others use, too, minutes change more than there is between two
kinds; here they take turns step by step, and what is told of a kind beside its time is the median, over the rounds, of
its time divided by that of ours in the same round.
"""

import argparse
import statistics
import time

import torch

from benchmarks.bench_restoration import CONTESTS, StepEntry


def main():
    parser = argparse.ArgumentParser(description="Seconds of a training step by kind, as Markdown.")
    parser.add_argument("--crop", type=int, default=256)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--blocks", type=int, default=10, help="of a stage (default: the paper's %(default)s)")
    parser.add_argument("--rounds", type=int, default=7, help="after a first one, which is not counted")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()

    kinds = CONTESTS[0].kinds
    calls = []
    for kind in kinds:
        entry = StepEntry(kind, options.crop, options.batch, options.blocks, options.device)
        calls.append(entry.call(kind.prepare(entry.arguments())))
    rounds = [[_seconds(call) for call in calls] for _ in range(options.rounds + 1)][1:]
    print(f"Threads: {torch.get_num_threads()}\n\n| kind | seconds, median | least | of ours |\n|:--|--:|--:|--:|")
    for kind, times in zip(kinds, zip(*rounds, strict=True), strict=True):
        ratio = statistics.median(seconds / ours for seconds, (ours, *_) in zip(times, rounds, strict=True))
        print(f"| {kind.name} | {statistics.median(times):.2f} | {min(times):.2f} | {ratio:.2f} |")


def _seconds(call):
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


if __name__ == "__main__":
    main()

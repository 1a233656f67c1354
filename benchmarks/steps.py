"""``python -m benchmarks.steps``: training steps of every kind of bench_restoration.py, in turns.

pytest times one kind after the other. On a computer that others use, too, minutes change more than there is between two
kinds; here they take turns step by step, and what is told of a kind beside its time is the median, over the rounds, of
its time divided by that of ours in the same round. Each has a process of its own, as in training: what one of them
leaves in the memory of a process slows the others down.
"""

import argparse
import multiprocessing
import statistics
import time

import torch

from benchmarks.bench_restoration import CONTESTS, StepEntry
from restoration.graph import WARM_UP
from restoration.process import prefer_large_pages


def main():
    parser = argparse.ArgumentParser(description="Seconds of a training step by kind, as Markdown.")
    parser.add_argument("--crop", type=int, default=256)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--blocks", type=int, default=10, help="of a stage (default: the paper's %(default)s)")
    parser.add_argument("--rounds", type=int, default=7, help="after those that warm up")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()

    prefer_large_pages()  # in the processes of the kinds, as in training
    kinds = CONTESTS[0].kinds
    settings = (options.crop, options.batch, options.blocks, options.device)
    turns = [_start(number, settings) for number in range(len(kinds))]
    # Where steps are captured, after that they are replayed.
    first = 1 + (WARM_UP if options.device == "cuda" else 0)
    rounds = [[_seconds(turn) for turn in turns] for _ in range(first + options.rounds)][first:]
    for turn in turns:
        turn.send(False)
    print(f"Threads: {torch.get_num_threads()}\n\n| kind | seconds, median | least | of ours |\n|:--|--:|--:|--:|")
    for kind, times in zip(kinds, zip(*rounds, strict=True), strict=True):
        ratio = statistics.median(seconds / ours for seconds, (ours, *_) in zip(times, rounds, strict=True))
        print(f"| {kind.name} | {statistics.median(times):.2f} | {min(times):.2f} | {ratio:.2f} |")


def _start(number, settings):
    """A connection to a new process that makes steps of a kind."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    context.Process(target=_make_steps, args=(theirs, number, settings), daemon=True).start()
    theirs.close()  # else nobody would notice here that the process has died
    return ours


def _make_steps(connection, number, settings):
    """Answers every True with the seconds that a step took."""
    kind = CONTESTS[0].kinds[number]
    entry = StepEntry(kind, *settings)
    call = entry.call(kind.prepare(entry.arguments()))
    while connection.recv():
        began = time.perf_counter()
        call()
        connection.send(time.perf_counter() - began)


def _seconds(connection):
    """Lets the process behind a connection make one step."""
    connection.send(True)
    return connection.recv()


if __name__ == "__main__":
    main()

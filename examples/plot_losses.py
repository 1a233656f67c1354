"""Draws the losses of a training run on a logarithmic scale: as logged, and smoothed.

    python examples/plot_losses.py RUN curve.png

RUN is the folder that `restoration train --out` names. Losses jump tenfold from batch to batch: only the smoothed line,
the geometric mean over a window of steps, tells whether they fall. Needs matplotlib.
"""

import argparse
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

PREFIX = "loss/"
WINDOW = 0.1  # of the run, the smoothed line's; shorter near both ends


def read_losses(run):
    """name -> (steps, values), of all events in the folder; where a run was resumed, the later ones count."""
    events = EventAccumulator(str(run), size_guidance={"scalars": 0})
    events.Reload()
    losses = {}
    for tag in events.Tags()["scalars"]:
        if tag.startswith(PREFIX):
            values = {event.step: event.value for event in events.Scalars(tag)}
            steps = sorted(values)
            losses[tag.removeprefix(PREFIX)] = np.array(steps), np.array([values[step] for step in steps])
    return losses


def smooth(steps, values):
    """Geometric mean of the values within half a WINDOW of each step."""
    half = WINDOW / 2 * (steps[-1] - steps[0])
    logarithms = np.log(np.maximum(values, np.finfo(float).tiny))
    return np.exp([logarithms[np.abs(steps - step) <= half].mean() for step in steps])


def draw(losses):
    """A figure with one panel for each loss."""
    figure = Figure(figsize=(10, 2.2 * len(losses)), layout="constrained")
    panels = figure.subplots(len(losses), sharex=True, squeeze=False)[:, 0]
    for panel, (name, (steps, values)) in zip(panels, losses.items(), strict=True):
        panel.plot(steps, values, color="C0", alpha=0.35, linewidth=0.8, label="logged")
        panel.plot(steps, smooth(steps, values), color="C0", label="smoothed")
        panel.set(yscale="log", ylabel=name)
        panel.grid(alpha=0.3)
    panels[0].legend(loc="upper right")
    panels[-1].set_xlabel("step")
    return figure


def main():
    """The command line."""
    parser = argparse.ArgumentParser(description="Draws the losses of a training run.")
    parser.add_argument("run", type=Path)
    parser.add_argument("picture", type=Path)
    parser.add_argument("--force", action="store_true", help="overwrite the picture")
    arguments = parser.parse_args()
    if not arguments.run.is_dir():
        parser.error(f"{arguments.run}: no such folder")
    if not arguments.picture.suffix:
        parser.error(f"{arguments.picture}: must end in .png, .pdf or .svg")
    if arguments.picture.exists() and not arguments.force:
        parser.error(f"{arguments.picture}: exists already (--force overwrites)")
    losses = read_losses(arguments.run)
    if not losses:
        parser.error(f"{arguments.run}: holds no losses that `restoration train` has logged")
    try:
        draw(losses).savefig(arguments.picture, dpi=100)
    except (OSError, ValueError) as error:  # of a folder that is not there, of an ending that is no picture's
        parser.error(f"{arguments.picture}: {error}")


if __name__ == "__main__":
    main()

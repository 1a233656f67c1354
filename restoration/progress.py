"""What a person at a terminal sees while pictures are recoloured."""

from __future__ import annotations

import os
import sys
from types import TracebackType
from typing import IO, TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn


class LastingConsole(Console):
    """Where nobody reads on, nothing more is printed, and work goes on; rich's own ends the program."""

    def on_broken_pipe(self) -> None:
        self.quiet = True
        _print_to_nobody(self.file)


class PictureProgress:
    """How far the picture at hand is: a bar on standard error, where that is a terminal, gone when others print.

    Use it as a context, which clears the bar in the end.
    """

    def __init__(self, shown: bool = True) -> None:
        console = Console(stderr=True)
        self._bar = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TaskProgressColumn(),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            # What is printed shall go where it was sent to, not to the bar's terminal.
            redirect_stdout=False,
            redirect_stderr=False,
            disable=not (shown and console.is_terminal),
        )
        self._task = self._bar.add_task("", total=1.0)

    def __enter__(self) -> PictureProgress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._bar.stop()

    def show(self, name: str, share: float) -> None:
        """share: of the work on the picture of that name, 0 to 1; 0 begins another picture."""
        if share == 0:
            self._bar.reset(self._task, description=name)
        self._bar.update(self._task, completed=share)
        self._bar.start()

    def say(self, text: str, file: TextIO | None = None) -> None:
        """Prints a line in place of the bar, to standard output or file; `show` brings the bar back.

        Where nobody reads on, nothing more is printed, and work goes on: its results are files.
        """
        self._bar.stop()
        file = file or sys.stdout
        try:
            # Flushed line by line: several processes may write here.
            print(text, file=file, flush=True)
        except BrokenPipeError:
            _print_to_nobody(file)


def _print_to_nobody(file: IO[str]) -> None:
    # What is left in the buffer fails once more at the end, unless it has a place to go.
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), file.fileno())

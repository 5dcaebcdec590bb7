"""How a run tells a person how far it is: a bar in a terminal, a few plain lines anywhere else."""

from __future__ import annotations

import sys
import time
from typing import Any, Protocol, TextIO

__all__ = ["Progress", "open_progress"]


class Progress(Protocol):
    """Something that shows how far a run is."""

    def show(self, done: int, loss: float) -> None:
        """Show that ``done`` steps are over and the latest loss."""

    def close(self) -> None:
        """Leave the last state on the screen."""


def open_progress(steps: int, start: int, stream: TextIO | None = None) -> Progress:
    """Give the progress display that suits where the output goes.

    Args:
        steps: length of the run.
        start: steps done before, for a resumed run.
        stream: where to write; default: standard error.

    Returns:
        A bar in a terminal; otherwise plain lines, one at each tenth of the run.
    """
    stream = stream or sys.stderr
    return _TerminalBar(steps, start, stream) if stream.isatty() else _PlainLines(steps, start, stream)


class _TerminalBar:
    """A bar with the steps done, the loss and the time left."""

    def __init__(self, steps: int, start: int, stream: TextIO) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar

        columns: tuple[Any, ...] = (
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]}"),
            TimeRemainingColumn(),
        )
        self.bar = Bar(*columns, console=Console(file=stream))
        self.task = self.bar.add_task("training", total=steps, completed=start, loss="…")
        self.bar.start()

    def show(self, done: int, loss: float) -> None:
        self.bar.update(self.task, completed=done, loss=f"{loss:.4g}")

    def close(self) -> None:
        self.bar.stop()


class _PlainLines:
    """One line at each tenth of the run, for log files and pipes."""

    def __init__(self, steps: int, start: int, stream: TextIO) -> None:
        self.steps, self.start, self.stream = steps, start, stream
        self.began = time.monotonic()
        self.shown = 10 * start // steps

    def show(self, done: int, loss: float) -> None:
        tenth = 10 * done // self.steps
        if tenth == self.shown:
            return
        self.shown = tenth
        left = (time.monotonic() - self.began) / max(1, done - self.start) * (self.steps - done)
        clock = f"{int(left) // 3600}:{int(left) // 60 % 60:02}:{int(left) % 60:02}"
        print(f"step {done}/{self.steps}  loss {loss:.4g}  {clock} left", file=self.stream, flush=True)

    def close(self) -> None:
        """Every line is out already."""

"""What a run shows while it works: a bar with the time left on a terminal, one line per cell elsewhere."""

from __future__ import annotations

import time
from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol, Self

from headgate.claims.cells import Cell, CellRecord
from headgate.claims.evidence import FailedCell

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["ConsoleProgress", "Progress", "Silent", "format_seconds"]


class Progress(Protocol):
    """What the engine tells while it works."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def begin(self, cells: Sequence[Cell], jobs: int) -> None:
        """The grid is laid out."""

    def finished(self, record: CellRecord, fresh: bool) -> None:
        """A cell is done; not ``fresh``: it was taken over from an earlier run."""

    def failed(self, cell: Cell, failure: FailedCell) -> None:
        """A cell raised."""

    def warn(self, message: str) -> None:
        """Something the user should know."""


class Silent:
    """Shows nothing."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def begin(self, cells: Sequence[Cell], jobs: int) -> None:
        """Show nothing."""

    def finished(self, record: CellRecord, fresh: bool) -> None:
        """Show nothing."""

    def failed(self, cell: Cell, failure: FailedCell) -> None:
        """Show nothing."""

    def warn(self, message: str) -> None:
        """Show nothing."""


class TimeLeft:
    """Estimates the wall time left: the mean time of an arm's finished cells stands for its open ones."""

    def __init__(self, cells: Sequence[Cell], jobs: int) -> None:
        self.open = list(cells)
        self.jobs = jobs
        self.times: dict[tuple[str, str], list[float]] = {}

    def done(self, cell: Cell, seconds: float | None) -> None:
        """Count ``cell`` as done; ``seconds`` is ``None`` where it tells nothing."""
        self.open.remove(cell)
        if seconds is not None:
            self.times.setdefault((cell.slug, cell.arm), []).append(seconds)

    def seconds(self) -> float | None:
        """The estimate, or ``None`` while nothing is known."""
        known = [value for values in self.times.values() for value in values]
        if not known:
            return None
        overall = sum(known) / len(known)
        total = 0.0
        for cell in self.open:
            values = self.times.get((cell.slug, cell.arm))
            total += sum(values) / len(values) if values else overall
        return total / max(1, min(self.jobs, len(self.open)))


def format_seconds(seconds: float | None) -> str:
    """``75.2`` → ``"1:15"``; ``None`` → ``"?"``."""
    if seconds is None:
        return "?"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


class ConsoleProgress:
    """A rich progress bar, or plain lines where the output is no terminal."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.bar: Any = None
        self.task: Any = None
        self.left: TimeLeft | None = None
        self.total = self.count = self.taken_over = 0
        self.start = time.monotonic()

    def __enter__(self) -> Self:
        if self.console.is_terminal:
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
            from rich.progress import Progress as RichProgress

            self.bar = RichProgress(
                TextColumn("[bold]{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("{task.fields[left]}"),
                console=self.console,
            )
            self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.stop()

    def begin(self, cells: Sequence[Cell], jobs: int) -> None:
        """Show the empty bar."""
        self.left, self.total = TimeLeft(cells, jobs), len(cells)
        if self.bar is not None:
            self.task = self.bar.add_task("measuring", total=len(cells), left="")
        else:
            self.console.print(f"{len(cells)} cells to measure, {jobs} at a time", highlight=False)

    def finished(self, record: CellRecord, fresh: bool) -> None:
        """Move the bar."""
        if not fresh:
            self.taken_over += 1
        self._step(
            record.cell, record.seconds, f"{record.seconds:.1f} s" if fresh else "already measured", quiet=not fresh
        )

    def failed(self, cell: Cell, failure: FailedCell) -> None:
        """Show the failure in one line; the traceback goes into the evidence."""
        self._step(cell, None, f"[red]failed[/]: {_escape(failure.error)}", quiet=False)

    def warn(self, message: str) -> None:
        """Show ``message``."""
        self.console.print(f"[yellow]note:[/] {_escape(message)}", highlight=False, soft_wrap=True)

    def _step(self, cell: Cell, seconds: float | None, text: str, quiet: bool) -> None:
        assert self.left is not None
        self.left.done(cell, seconds)
        self.count += 1
        left = f"about {format_seconds(self.left.seconds())} left" if self.left.open else ""
        if not quiet:
            tail = f"  ({left})" if left and self.bar is None else ""
            self.console.print(
                f"[dim]{self.count:>3}/{self.total}[/] {_escape(str(cell))}: {text}[dim]{tail}[/]",
                highlight=False,
                soft_wrap=True,
            )
        if self.bar is not None:
            self.bar.update(self.task, advance=1, left=left)


def _escape(text: str) -> str:
    from rich.markup import escape

    return escape(text)

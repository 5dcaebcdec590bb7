"""A benchmark on the terminal: its tables, and the progress of its run."""

from __future__ import annotations

import time
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from rich.console import Console
from rich.markup import escape
from rich.table import Table as RichTable
from rich.text import Text

from headgate.claims.progress import format_seconds
from headgate.report.bench_tables import Table, floors_table, machine_line, missing_lines, task_table

if TYPE_CHECKING:
    from headgate.report.bench import BenchReport

__all__ = ["BenchProgress", "print_bench"]

_MARKS = {"✔": "bold green", "✘": "bold red", "–": "dim"}


def print_bench(console: Console, report: BenchReport) -> None:
    """Print the tables of ``report``, and what could not be measured, with the tracebacks of what failed."""
    console.print(Text.assemble((f"{report.slug}  ", "bold cyan"), (report.title, "bold")))
    for task in report.results.tasks.values():
        _print_table(console, task_table(task, report.results.sgemm))
    console.print("")
    console.print(machine_line(report.results), markup=False, highlight=False)
    for note in report.notes:
        console.print(note, markup=False, highlight=False)
    for line in missing_lines(report.results):
        console.print(f"[yellow]note:[/] {escape(line)}", highlight=False)
    if report.floors:
        _print_table(console, floors_table(report.floors))
    if report.quick:
        console.print("\nquick run: the code ran; how fast it is is for a full run to say", style="yellow")
    gaps = [gap for task in report.results.tasks.values() for gap in task.missing]
    for trace in dict.fromkeys(gap.trace.rstrip() for gap in gaps if gap.trace):
        console.print(Text(trace, style="dim"))


def _print_table(console: Console, table: Table) -> None:
    drawn = RichTable(box=None, pad_edge=False, header_style="bold", title=table.title, title_justify="left")
    for number, heading in enumerate(table.head):
        left = number < table.left
        drawn.add_column(escape(heading), justify="left" if left else "right", no_wrap=left and table.left > 1)
    for number, row in enumerate(table.rows):
        cells: list[Text | str] = [Text(cell, style=_MARKS.get(cell, "")) for cell in row]
        drawn.add_row(*cells, end_section=number in table.sections)
        if number in table.sections and number + 1 < len(table.rows):
            drawn.add_row()
    console.print("", drawn)


class BenchProgress:
    """A bar on a terminal, one line per step elsewhere."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.bar: Any = None
        self.task: Any = None
        self.steps = self.count = 0
        self.began = time.monotonic()

    def __enter__(self) -> Self:
        if self.console.is_terminal:
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

            self.bar = Progress(
                BarColumn(bar_width=30),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("{task.description}"),
                console=self.console,
            )
            self.bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.bar is not None:
            self.bar.stop()

    def begin(self, steps: int) -> None:
        """Show the empty bar."""
        self.steps = steps
        if self.bar is not None:
            self.task = self.bar.add_task("", total=steps)
        else:
            self.console.print(f"{steps} steps", highlight=False)

    def working(self, text: str) -> None:
        """Show what is being measured."""
        if self.bar is not None:
            self.bar.update(self.task, description=escape(text))

    def done(self, text: str) -> None:
        """Move the bar."""
        self.count += 1
        since = format_seconds(time.monotonic() - self.began)
        self.console.print(
            f"[dim]{self.count:>3}/{self.steps} {since}[/] {escape(text)}", highlight=False, soft_wrap=True
        )
        if self.bar is not None:
            self.bar.update(self.task, advance=1)

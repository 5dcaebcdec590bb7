"""A benchmark as a page of Markdown."""

from __future__ import annotations

from typing import TYPE_CHECKING

from headgate.report.bench_tables import Table, floors_table, machine_line, missing_lines, task_table

if TYPE_CHECKING:
    from headgate.report.bench import BenchReport

__all__ = ["bench_page"]


def bench_page(report: BenchReport) -> str:
    """The page of one run: tables, what could not be measured, floors, and what it ran on."""
    settings = ", ".join(f"{name} = {_setting(value)}" for name, value in report.settings.items())
    parts = [f"# {report.title}", f"Measured by `headgate bench {report.slug}`: {settings}."]
    if report.quick:
        parts.append("**A quick run: it shows that the code runs, not how fast it is.**")
    if report.floors:
        parts += ["## Floors", _markdown(floors_table(report.floors))]
    for task in report.results.tasks.values():
        table = task_table(task, report.results.sgemm)
        parts += [f"## {table.title[:1].upper()}{table.title[1:]}", _markdown(table)]
    if any(task.drawn for task in report.results.tasks.values()):
        parts.append(f"![Time and memory over size]({report.name}.png)")
    parts += ["## How it was measured", machine_line(report.results), _method(report)]
    parts += report.notes
    missing = missing_lines(report.results)
    if missing:
        parts.append("\n".join(f"- {_cell(line)}" for line in missing))
    return "\n\n".join(parts) + "\n"


def _method(report: BenchReport) -> str:
    effort, hardware = report.effort, report.hardware
    return (
        f"Contenders of one size run side by side: {effort.rounds} rounds (slow ones at least {effort.fewest_rounds}), each "
        f"sample at least {1000 * effort.sample_seconds:g} ms, after a warm-up; medians and quartiles; a ratio is the "
        f"median of the rounds' ratios. Peak memory is that of one call in a fresh process, above what was there before "
        f"its inputs. On {hardware.get('processor')} ({report.results.threads} of {hardware.get('cores')} cores), "
        f"torch {report.versions.get('torch')}, {report.finished}, {report.seconds / 60:.1f} minutes."
    )


def _setting(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, (tuple, list)) else str(value)


def _markdown(table: Table) -> str:
    lines = [
        f"| {' | '.join(_cell(heading) for heading in table.head)} |",
        f"|{'|'.join('---' if number < table.left else '---:' for number in range(len(table.head)))}|",
    ]
    lines += [f"| {' | '.join(_cell(cell) for cell in row)} |" for row in table.rows]
    return "\n".join(lines)


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")

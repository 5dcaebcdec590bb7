"""What a benchmark's tables say, as texts: the terminal and the Markdown page show the same."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from headgate.timing import Floor, Results, TaskResults

__all__ = [
    "Table",
    "bytes_text",
    "floors_table",
    "machine_line",
    "missing_lines",
    "seconds_text",
    "task_table",
]

MET = {True: "✔", False: "✘", None: "–"}


@dataclass(frozen=True)
class Table:
    """A table of texts.

    Attributes:
        title: above it.
        head: the headings.
        rows: the cells.
        sections: numbers of the rows after which a new section begins.
        left: how many columns, from the left, are words and not numbers.
    """

    title: str
    head: tuple[str, ...]
    rows: list[tuple[str, ...]]
    sections: frozenset[int] = frozenset()
    left: int = 2


def task_table(task: TaskResults, sgemm: float) -> Table:
    """Size by size: the contenders that were measured, side by side."""
    head = [
        task.size_label,
        "contender",
        "time, median",
        "quartiles",
        f"time / {task.contenders.get(task.ours, task.ours)}",
    ]
    if task.work:
        head.append(f"{task.work_unit}/s")
    if task.arithmetic:
        head.append("of the machine's limit")
    head += list(task.columns)
    if task.peaks:
        head += ["peak memory", "over inputs and results"]
    rows: list[tuple[str, ...]] = []
    sections = set()
    for size in task.sizes:
        for name, label in task.contenders.items():
            times, peak = task.timing(name, size), task.peak(name, size)
            if times is None:
                continue
            summary = times.summary
            ratio = task.ratio((name, size), (task.ours, size))
            row = [
                f"{size}",
                label,
                seconds_text(summary.median),
                f"{seconds_text(summary.lower)} – {seconds_text(summary.upper)}",
                _ratio_text(ratio.median) if ratio else "–",
            ]
            if task.work:
                row.append(_count_text(task.work[size] / summary.median))
            if task.arithmetic:
                row.append(f"{100 * task.arithmetic[size] / sgemm / summary.median:.1f} %")
            row += [column[name][size] for column in task.columns.values()]
            if task.peaks:
                row += [bytes_text(peak.peak_bytes), f"{peak.ratio:.2f}"] if peak else ["–", "–"]
            rows.append(tuple(row))
        sections.add(len(rows) - 1)
    return Table(task.label, tuple(head), rows, frozenset(sections))


def floors_table(floors: Sequence[Floor]) -> Table:
    """Every floor: what is asked for, what was measured, whether it is met."""
    rows: list[tuple[str, ...]] = []
    for floor in floors:
        unit = f" {floor.unit}".rstrip()
        value = "not measured" if floor.value is None else f"{floor.value:.3g}{unit}"
        statement = floor.statement + (f" ({floor.reason})" if floor.reason else "")
        rows.append((statement, f"{floor.relation} {floor.limit:g}{unit}", value, MET[floor.met]))
    return Table("floors", ("what", "asked", "measured", "met"), rows, left=1)


def machine_line(results: Results) -> str:
    """The machine's own rate."""
    threads = f"{results.threads} thread{'s' * (results.threads != 1)}"
    return (
        f"The machine's own limit: float32 matrix products (sgemm) at {results.sgemm / 1e9:.1f} GFLOP/s, "
        f"the best of this run, {threads}."
    )


def missing_lines(results: Results) -> list[str]:
    """One line for each reason for which something was not measured, with the sizes that it concerns."""
    sizes: dict[tuple[str, ...], list[int]] = {}
    for task in results.tasks.values():
        for gap in task.missing:
            label = task.contenders.get(gap.contender, gap.contender)
            measure = "" if gap.measure == "time" else f" ({gap.measure})"
            found = sizes.setdefault((task.label, task.size_label, label + measure, gap.what, gap.reason), [])
            if gap.size is not None:
                found.append(gap.size)
    return [
        f"{place}: {who} {what}{f' at {size_label} {_list(at)}' if at else ''}: {reason}"
        for (place, size_label, who, what, reason), at in sizes.items()
    ]


def _list(sizes: Sequence[int]) -> str:
    return ", ".join(map(str, sorted(sizes)))


def seconds_text(seconds: float) -> str:
    """``0.00712`` → ``"7.12 ms"``."""
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if seconds >= 0.9995 * size:  # what rounds to one
            return f"{_three(seconds / size)} {unit}"
    return f"{_three(seconds / 1e-9)} ns"


def bytes_text(count: float) -> str:
    """``12345678`` → ``"11.8 MiB"``."""
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if abs(count) >= size:
            return f"{_three(count / size)} {unit}"
    return f"{count:.0f} B"


def _count_text(count: float) -> str:
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= size:
            return f"{_three(count / size)} {unit}"
    return _three(count)


def _ratio_text(ratio: float) -> str:
    return f"{_three(ratio)} ×"


def _three(value: float) -> str:
    """Three digits, without an exponent."""
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"

"""A benchmark as a figure: time and peak memory over size, both axes logarithmic, so that a slope is an exponent."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from headgate.files import atomic_path
from headgate.report.figure import PALETTE, STYLE
from headgate.timing import TaskResults, growth_exponent

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from headgate.report.bench import BenchReport

__all__ = ["draw_bench"]

_MARKERS = "osD^vPX*"


def draw_bench(report: BenchReport, path: Path) -> Path | None:
    """Draw ``report`` into ``path`` (PNG, SVG or PDF by its ending), whole or not at all.

    Returns:
        ``path``, or ``None`` where no task that is drawn has times at two sizes.
    """
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    tasks = [task for task in report.results.tasks.values() if task.drawn and len({t.size for t in task.times}) > 1]
    if not tasks:
        return None
    with_memory = [task for task in tasks if len({size for _, size, _ in task.peaks}) > 1]
    rows = 1 + bool(with_memory)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(6.8 * len(tasks), 5.9 * rows + 0.6), layout="constrained")
        FigureCanvasAgg(figure)
        figure.suptitle(report.title, fontsize=13, fontweight="bold", x=0.01, ha="left")
        axes: Any = figure.subplots(rows, len(tasks), squeeze=False)
        colours = _colours(tasks)
        for column, task in enumerate(tasks):
            _draw_times(axes[0][column], task, report.results.sgemm, colours)
            if rows > 1 and task in with_memory:
                _draw_peaks(axes[1][column], task, colours)
            elif rows > 1:
                axes[1][column].remove()
        with atomic_path(path) as temporary:
            figure.savefig(temporary, dpi=130, metadata={"Date": None} if path.suffix == ".svg" else None)
    return path


def _colours(tasks: list[TaskResults]) -> dict[str, tuple[str, str]]:
    """Label → colour and marker, the same in every panel."""
    labels = dict.fromkeys(label for task in tasks for label in task.contenders.values())
    return {label: (PALETTE[i % len(PALETTE)], _MARKERS[i % len(_MARKERS)]) for i, label in enumerate(labels)}


def _draw_times(axis: Axes, task: TaskResults, sgemm: float, colours: dict[str, tuple[str, str]]) -> None:
    """Medians with their quartiles, and the time that the work takes at the machine's own rate."""
    for name, label in task.contenders.items():
        times = sorted((t for t in task.times if t.contender == name), key=lambda t: t.size)
        if not times:
            continue
        sizes, summaries = [t.size for t in times], [t.summary for t in times]
        medians = [summary.median for summary in summaries]
        _line(axis, sizes, medians, label, task.size_label, *colours[label], bold=name == task.ours)
        lower, upper = [summary.lower for summary in summaries], [summary.upper for summary in summaries]
        axis.fill_between(sizes, lower, upper, color=colours[label][0], alpha=0.18, lw=0)
    if task.arithmetic:
        limit = [task.arithmetic[size] / sgemm for size in task.sizes]
        axis.plot(task.sizes, limit, color="#777777", lw=1.3, ls=(0, (5, 2)), label="the machine's limit (sgemm rate)")
    _seconds_axis(axis)
    _frame(axis, task, min(t.summary.median for t in task.times), f"{_title(task)}: time of a call")


def _draw_peaks(axis: Axes, task: TaskResults, colours: dict[str, tuple[str, str]]) -> None:
    """Peak memory above what was there before the inputs."""
    for name, label in task.contenders.items():
        peaks = sorted((size, float(peak.peak_bytes)) for who, size, peak in task.peaks if who == name)
        if peaks:
            sizes, values = [size for size, _ in peaks], [max(value, 1.0) for _, value in peaks]
            _line(axis, sizes, values, label, task.size_label, *colours[label], bold=name == task.ours)
    _bytes_axis(axis)
    lowest = min(max(1.0, float(peak.peak_bytes)) for _, _, peak in task.peaks)
    _frame(axis, task, lowest, f"{_title(task)}: peak memory of a call")


def _title(task: TaskResults) -> str:
    return task.label[:1].upper() + task.label[1:]


def _line(
    axis: Axes,
    sizes: list[int],
    values: list[float],
    label: str,
    size_label: str,
    colour: str,
    marker: str,
    *,
    bold: bool,
) -> None:
    """One contender; the exponent in its label is that of its three largest sizes."""
    if len(sizes) > 1:
        label = f"{label}  (∝ {size_label}^{growth_exponent(sizes[-3:], values[-3:]):.2f})"
    axis.plot(
        sizes, values, color=colour, marker=marker, ms=6 if bold else 4.5, lw=2.4 if bold else 1.5, label=label,
        zorder=4 if bold else 3,
    )  # fmt: skip


def _frame(axis: Axes, task: TaskResults, lowest: float, title: str) -> None:
    """Logarithmic axes with the sizes as ticks, and thin lines of slope one and two from ``lowest`` to compare with."""
    from matplotlib.ticker import NullLocator

    axis.set_xscale("log", base=2)
    axis.set_xticks(task.sizes, [_size_text(size) for size in task.sizes])
    axis.xaxis.set_minor_locator(NullLocator())
    axis.set_xlabel(task.size_label)
    axis.set_title(title)
    axis.grid(True, which="major")
    low, high = axis.get_ylim()
    first, last = task.sizes[0], task.sizes[-1]
    for power in (1, 2):
        end = min(last, first * (high / lowest) ** (1 / power))
        top = lowest * (end / first) ** power
        axis.plot((first, end), (lowest, top), color="#aaaaaa", lw=0.9, ls=":", zorder=1)
        axis.annotate(
            f"slope {power}", (end, top), xytext=(-4, -10), textcoords="offset points", fontsize=7.5, color="#888888",
            ha="right",
        )  # fmt: skip
    axis.set_ylim(low, high)
    axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=2, fontsize=8, frameon=False)


def _seconds_axis(axis: Axes) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.set_yscale("log")
    low, high = axis.get_ylim()
    axis.yaxis.set_major_locator(LogLocator(10, subs=(1.0,) if high > 100 * low else (1.0, 2.0, 5.0)))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _seconds_tick(value)))
    axis.yaxis.set_minor_formatter(NullFormatter())


def _bytes_axis(axis: Axes) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.set_yscale("log", base=2)
    axis.yaxis.set_major_locator(LogLocator(2, numticks=9))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _bytes_tick(value)))
    axis.yaxis.set_minor_formatter(NullFormatter())


def _seconds_tick(seconds: float) -> str:
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= 0.9995 * size:
            return f"{seconds / size:g} {unit}"
    return f"{seconds / 1e-6:g} µs"


def _bytes_tick(count: float) -> str:
    for unit, size in (("GiB", 2**30), ("MiB", 2**20)):
        if count >= size:
            return f"{count / size:g} {unit}"
    return f"{count / 2**10:g} KiB"


def _size_text(size: int) -> str:
    return f"{size // 1024}k" if size >= 1024 and size % 1024 == 0 else str(size)

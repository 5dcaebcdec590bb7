"""One figure per claim: the arms' measurements, the criteria as intervals over their margins, and the arms' curves."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from headgate.catalog import Claim, Method
from headgate.claims.evidence import Evidence
from headgate.claims.statistics import mean_interval
from headgate.files import atomic_path

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["PALETTE", "STYLE", "draw_figure"]

# Colours that people with colour-blindness can tell apart (Okabe and Ito), darkened where thin lines need it.
PALETTE = (
    "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#B8860B", "#4C9ED9",
    "#444444", "#8B5A2B", "#6A3D9A", "#8DB600", "#17A2A2", "#A6A6A6",
)  # fmt: skip
_VERDICT_COLOURS = {
    "reproduced": "#1a7f37",
    "explained by a control": "#8250df",
    "inconclusive": "#b08800",
    "contradicted": "#cf222e",
}
_LINES = {"method": "-", "baseline": "--", "ablation": ":", "control": "-."}
STYLE: Any = {
    "font.size": 9.5,
    "font.family": "DejaVu Sans",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.7,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "svg.hashsalt": "headgate",
}


def draw_figure(method: Method, evidence: Evidence, path: Path) -> Path:
    """Draw ``evidence`` into ``path`` (PNG, SVG or PDF by its ending), whole or not at all, and return ``path``."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    claim = method.claim
    names = _curve_names(evidence)
    across = min(3, len(names)) or 1
    below = -(-len(names) // across)
    with matplotlib.rc_context(STYLE):
        arms = len(claim.arms_at(evidence.scale))
        tallest = max(3.0, 0.45 * arms + 1.0, 0.62 * len(evidence.criteria) + 0.9)
        lines = textwrap.wrap(claim.statement, 150)
        heights = [0.55 + 0.19 * len(lines), tallest] + [3.3 * below + 0.3] * bool(names)
        figure = Figure(figsize=(13.5, sum(heights)), layout="constrained")
        FigureCanvasAgg(figure)
        parts: Any = figure.subfigures(len(heights), 1, height_ratios=heights)
        head, top, *rest = parts
        title = f"{method.title}  ·  {evidence.scale} scale  ·  {evidence.verdict}"
        colour = _VERDICT_COLOURS[evidence.verdict]
        head.text(0.01, 0.95, title, va="top", fontsize=13, fontweight="bold", color=colour)
        statement = "\n".join(lines)
        head.text(0.01, 1 - 0.38 / heights[0], statement, va="top", fontsize=9.5, style="italic", color="#444444")
        left, right = top.subplots(1, 2)
        _draw_arms(left, claim, evidence)
        _draw_criteria(right, claim, evidence)
        if names:
            axes = rest[0].subplots(below, across, squeeze=False).ravel()
            for place, axis in enumerate(axes):
                if place < len(names):
                    _draw_curves(axis, claim, evidence, names[place])
                else:
                    axis.remove()
            handles = {
                label: line for axis in axes for line, label in zip(*axis.get_legend_handles_labels(), strict=True)
            }
            rest[0].legend(
                list(handles.values()), list(handles), loc="outside lower center", ncols=8, fontsize=8, frameon=False,
                title="lines: mean over seeds; shades: their range", title_fontsize=8,
            )  # fmt: skip
        with atomic_path(path) as temporary:
            figure.savefig(temporary, dpi=130, metadata={"Date": None} if path.suffix == ".svg" else None)
    return path


def _curve_names(evidence: Evidence) -> list[str]:
    names: dict[str, None] = {}
    for record in evidence.cells:
        names.update(dict.fromkeys(record.curves))
    return list(names)


def _colours(claim: Claim, scale: str) -> dict[str, str]:
    return {arm.name: PALETTE[i % len(PALETTE)] for i, arm in enumerate(claim.arms_at(scale))}


def _draw_arms(axis: Axes, claim: Claim, evidence: Evidence) -> None:
    """The primary metric, or the first one that this scale measures: a dot per seed, the mean with its 95% interval."""
    measured = {name for record in evidence.cells for name in record.metrics}
    shown = next((name for name in (claim.primary, *claim.metrics) if name in measured), claim.primary)
    metric = claim.metrics[shown]
    factor = 100 if metric.unit == "%" else 1
    arms = claim.arms_at(evidence.scale)
    colours = _colours(claim, evidence.scale)
    for row, arm in enumerate(arms):
        values = [factor * value for value in evidence.values(arm.name, shown)]
        if not values:
            axis.text(0.02, row, "not measured", va="center", color="#888888", transform=axis.get_yaxis_transform())
            continue
        interval = mean_interval(values)
        if interval.low is not None and interval.high is not None:
            axis.plot(
                [interval.low, interval.high],
                [row, row],
                color=colours[arm.name],
                lw=5,
                alpha=0.28,
                solid_capstyle="butt",
            )
        offsets = np.linspace(-0.16, 0.16, len(values)) if len(values) > 1 else np.zeros(1)
        axis.scatter(values, row + offsets, s=15, color=colours[arm.name], alpha=0.65, linewidths=0, zorder=3)
        axis.plot([interval.mean], [row], marker="|", ms=17, mew=2.4, color=colours[arm.name], zorder=4)
        axis.annotate(
            f"{interval.mean:.1f}" if factor == 100 else f"{interval.mean:.3g}",
            (interval.mean, row), xytext=(0, 13), textcoords="offset points", ha="center", fontsize=8, color=colours[arm.name],
        )  # fmt: skip
    axis.set_yticks(range(len(arms)), [f"{_wrap(arm.label, 24)}\n({arm.role})" for arm in arms], fontsize=8.5)
    axis.set_ylim(len(arms) - 0.5, -0.6)
    axis.set_xlabel(_axis_label(metric.label, metric.unit))
    axis.margins(x=0.08)
    if metric.unit == "%":
        low, high = axis.get_xlim()
        axis.set_xlim(max(low, -2), min(high, 102))
    axis.set_title("What each arm reaches (dots: seeds; bar: 95% interval)")


def _draw_criteria(axis: Axes, claim: Claim, evidence: Evidence) -> None:
    """Each criterion's effect with its interval, over the margin that it must pass."""
    criteria = claim.criteria_at(evidence.scale)
    percent = all(claim.metrics[criterion.metric].unit == "%" for criterion in criteria)
    factor = 100 if percent else 1
    for row, result in enumerate(evidence.criteria):
        colour = _VERDICT_COLOURS[result.verdict]
        margin = factor * result.margin
        axis.plot([margin, margin], [row - 0.36, row + 0.36], color="#222222", lw=1.6, zorder=2)
        if result.interval is None:
            continue
        low, high = result.interval.low, result.interval.high
        if low is not None and high is not None:
            axis.plot([factor * low, factor * high], [row, row], color=colour, lw=2.4, zorder=3)
        axis.plot([factor * result.interval.mean], [row], marker="o", ms=6, color=colour, zorder=4)
    labels = [f"{_wrap(result.statement, 44)}\n→ {result.verdict}" for result in evidence.criteria]
    axis.set_yticks(range(len(labels)), labels, fontsize=7.8)
    for label, result in zip(axis.get_yticklabels(), evidence.criteria, strict=True):
        label.set_color(_VERDICT_COLOURS[result.verdict])
    axis.axvline(0, color="#999999", lw=0.8, zorder=1)
    axis.set_ylim(len(labels) - 0.4, -0.6)
    axis.set_xlabel("effect, percentage points" if percent else "effect")
    axis.set_title("Effects against their margins (black ticks)")


def _draw_curves(axis: Axes, claim: Claim, evidence: Evidence, name: str) -> None:
    """One panel: every arm's curve, averaged over seeds, with the range of the seeds."""
    colours = _colours(claim, evidence.scale)
    first: Any = None
    for arm in claim.arms_at(evidence.scale):
        curves = evidence.curves(arm.name, name)
        if not curves:
            continue
        first = first or curves[0]
        style: Any = {"color": colours[arm.name], "lw": 1.7, "ms": 3.5, "marker": "o" if len(first.x) <= 12 else None}
        if all(list(curve.x) == list(curves[0].x) for curve in curves):
            rows = [
                [value for value in column if value is not None] for column in zip(*(c.y for c in curves), strict=True)
            ]
            kept = [(x, row) for x, row in zip(curves[0].x, rows, strict=True) if row]
            line = [x for x, _ in kept]
            axis.plot(line, [float(np.mean(row)) for _, row in kept], _LINES[arm.role], label=arm.label, **style)
            low, high = [min(row) for _, row in kept], [max(row) for _, row in kept]
            axis.fill_between(line, low, high, color=colours[arm.name], alpha=0.12, lw=0)
        else:
            for number, curve in enumerate(curves):
                label = arm.label if number == 0 else None
                axis.plot(curve.x, curve.y, _LINES[arm.role], label=label, alpha=0.6, **{**style, "lw": 1.1})
    if first.log_x:
        from matplotlib.ticker import NullLocator

        axis.set_xscale("log", base=2)
        ticks = sorted({x for record in evidence.cells if name in record.curves for x in record.curves[name].x})
        if len(ticks) <= 12:
            axis.set_xticks(ticks, [f"{x:g}" for x in ticks])
            axis.xaxis.set_minor_locator(NullLocator())
    axis.set_xlabel(first.x_label)
    axis.set_ylabel(first.y_label)
    axis.set_title(_wrap(f"{name[:1].upper()}{name[1:]}", 40))


def _axis_label(label: str, unit: str) -> str:
    return f"{label} ({unit})" if unit else label


def _wrap(text: str, width: int) -> str:
    return "\n".join(textwrap.wrap(text, width))

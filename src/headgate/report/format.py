"""Numbers as people read them."""

from __future__ import annotations

from headgate.catalog import Claim, Criterion, Metric
from headgate.claims.statistics import Interval, mean_interval
from headgate.claims.verdict import CriterionResult

__all__ = ["VERDICT_MARKS", "criterion_rule", "effect_text", "interval_text", "mean_text", "number_text"]

VERDICT_MARKS = {
    "reproduced": "✔",
    "explained by a control": "≈",
    "inconclusive": "?",
    "contradicted": "✘",
    "stale": "…",
    "not measured": "–",
}


def number_text(value: float, metric: Metric, signed: bool = False) -> str:
    """``value`` in the metric's unit: percent with one decimal, otherwise three significant digits."""
    sign = "+" if signed else ""
    if metric.unit == "%":
        return f"{100 * value:{sign}.1f}"
    return f"{value:{sign}.3g}" if abs(value) < 1000 else f"{value:{sign},.0f}"


def mean_text(values: list[float], metric: Metric) -> str:
    """Mean ± sample standard deviation over the seeds."""
    if not values:
        return "–"
    interval = mean_interval(values)
    mean = number_text(interval.mean, metric)
    return mean if interval.std is None else f"{mean} ± {number_text(interval.std, metric)}"


def interval_text(interval: Interval | None, metric: Metric) -> str:
    """``+12.3 [+10.1, +14.5]``."""
    if interval is None:
        return "–"
    mean = number_text(interval.mean, metric, signed=True)
    if interval.low is None or interval.high is None:
        return mean
    return (
        f"{mean} [{number_text(interval.low, metric, signed=True)}, {number_text(interval.high, metric, signed=True)}]"
    )


def effect_text(result: CriterionResult, metric: Metric) -> str:
    """Effect with interval, and the margin that it must pass."""
    return f"{interval_text(result.interval, metric)} > {number_text(result.margin, metric, signed=True)}"


def criterion_rule(criterion: Criterion, claim: Claim) -> str:
    """The criterion as an inequality, e.g. ``accuracy(lookups) > accuracy(base_conv) + 25.0 %``."""
    metric = claim.metrics[criterion.metric]
    ours = f"{criterion.metric}({criterion.arm})"
    symbol, sign = (">", 1.0) if criterion.relation == "above" else ("<", -1.0)
    unit = f" {metric.unit}" if metric.unit else ""
    if criterion.against is None:
        assert criterion.value is not None
        return f"{ours} {symbol} {number_text(criterion.value + sign * criterion.margin, metric)}{unit}"
    theirs = f"{criterion.against_metric or criterion.metric}({criterion.against})"
    if criterion.margin == 0:
        return f"{ours} {symbol} {theirs}"
    shift = sign * criterion.margin
    return f"{ours} {symbol} {theirs} {'+' if shift > 0 else '−'} {number_text(abs(shift), metric)}{unit}"

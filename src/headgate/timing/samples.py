"""What a handful of timings says: medians, quartiles, ratios of paired rounds, exponents of growth."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["Summary", "growth_exponent", "paired_ratios", "summarize"]


@dataclass(frozen=True)
class Summary:
    """Median and quartiles of ``count`` values."""

    median: float
    lower: float
    upper: float
    count: int


def summarize(values: Sequence[float | None]) -> Summary:
    """Median and quartiles (by linear interpolation) of the values that are there.

    Raises:
        ValueError: there are none.
    """
    kept = [value for value in values if value is not None]
    if not kept:
        raise ValueError("values must hold at least one number")
    if len(kept) == 1:
        return Summary(kept[0], kept[0], kept[0], 1)
    lower, median, upper = statistics.quantiles(kept, n=4, method="inclusive")
    return Summary(median, lower, upper, len(kept))


def paired_ratios(numerator: Sequence[float | None], denominator: Sequence[float | None]) -> tuple[float, ...]:
    """Ratio by ratio of the rounds in which both were measured.

    Both halves of a ratio then saw the same moods of the machine, so its median holds still where those of the two
    times wander.
    """
    pairs = zip(numerator, denominator, strict=False)
    return tuple(a / b for a, b in pairs if a is not None and b is not None)


def growth_exponent(sizes: Sequence[float], values: Sequence[float]) -> float:
    """The p of the least-squares fit of ``values ∝ sizes^p``: the slope in a plot with two logarithmic axes.

    Args:
        sizes: at least two distinct positive numbers.
        values: as many positive numbers.

    Raises:
        ValueError: fewer than two distinct sizes, or another number of values.
    """
    if len(sizes) != len(values) or len(set(sizes)) < 2:
        raise ValueError(f"sizes must hold two distinct numbers or more, and values as many, got {sizes} and {values}")
    x, y = [math.log(size) for size in sizes], [math.log(value) for value in values]
    return statistics.linear_regression(x, y).slope

r"""Paired effects and their 95% intervals.

Arms share their seeds, so an effect is a difference of two measurements with the same seed,
:math:`d_s = a_s - b_s,\ s = 1 … n`. The interval is Student's for the mean of the differences,

.. math:: \bar d \pm t_{0.975,\,n-1}\; s_d / \sqrt n, \qquad s_d^2 = \tfrac1{n-1}\sum_s (d_s - \bar d)^2 .

It assumes that seeds are independent draws and that the differences are about normal; with three seeds the factor
:math:`t` is 4.30, so that only effects far larger than the noise pass. It says how sure we are of the mean over seeds on
this data, not how the effect would vary over data sets. With one seed there is no interval.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["Interval", "mean_interval"]

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Interval:
    """A mean over seeds with its 95% interval; ``low`` and ``high`` are ``None`` with one seed.

    Attributes:
        mean: the mean of the values.
        low: lower end.
        high: upper end.
        std: sample standard deviation (``None`` with one seed).
        n: number of values.
    """

    mean: float
    low: float | None
    high: float | None
    std: float | None
    n: int


def mean_interval(values: Sequence[float]) -> Interval:
    """Mean and 95% Student interval of ``values``, one per seed.

    Raises:
        ValueError: no values, or one that is not finite.
    """
    n = len(values)
    if n == 0 or not all(math.isfinite(value) for value in values):
        raise ValueError(f"values must be finite and at least one, got {list(values)}")
    mean = math.fsum(values) / n
    if n == 1:
        return Interval(mean, None, None, None, 1)
    from scipy.stats import t

    std = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (n - 1))
    half = float(t.ppf((1 + CONFIDENCE) / 2, n - 1)) * std / math.sqrt(n)
    return Interval(mean, mean - half, mean + half, std, n)

"""Summaries over seeds, and bootstrap intervals over test items.

Two questions are kept apart: how much a number moves when the training is repeated (:func:`summarize`, one value per
seed), and how much the difference of two arms moves when the test items are drawn anew (:func:`paired_bootstrap`, one
value per item and arm).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from scipy import stats

from headgate.evaluate.checks import Array, as_scores, as_seed, check_count, to_numpy

__all__ = ["MIN_SEEDS", "Effect", "Interval", "Summary", "bootstrap_interval", "paired_bootstrap", "summarize"]

MIN_SEEDS = 3
"""Seeds that a claim needs at least."""

_BLOCK = 1 << 22


@dataclass(frozen=True)
class Summary:
    """Mean and spread of one metric over seeds.

    Attributes:
        mean: the mean.
        std: sample standard deviation (divisor n - 1); nan for one value.
        n: number of values.
        low: lower end of the Student-t interval of the mean; nan for one value.
        high: upper end.
    """

    mean: float
    std: float
    n: int
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:.4g} ± {self.std:.2g} (n={self.n})"


class Interval(NamedTuple):
    """A mean and its bootstrap interval."""

    mean: float
    low: float
    high: float


class Effect(NamedTuple):
    """The difference of two arms on the same test items.

    Attributes:
        mean: mean of ``arm - baseline``.
        low: lower end of the bootstrap interval.
        high: upper end.
        p_value: share of resamples in which the arm is not better, ``(1 + count) / (1 + resamples)``; one-sided.
        n: number of test items.
    """

    mean: float
    low: float
    high: float
    p_value: float
    n: int


def summarize(values: Iterable[float], *, level: float = 0.95) -> Summary:
    """Return mean, sample standard deviation and Student-t interval of one value per seed.

    Args:
        values: at least one finite number.
        level: coverage of the interval, in (0, 1).

    Raises:
        ValueError: no value, or one that is not finite.
    """
    _check_level(level)
    array = np.asarray(list(values), dtype=np.float64)
    if array.ndim != 1 or len(array) == 0:
        raise ValueError(f"values must be at least one number, got shape {array.shape}")
    if not np.isfinite(array).all():
        raise ValueError(f"values must be finite, got {array.tolist()}")
    n, mean = len(array), float(array.mean())
    if n == 1:
        return Summary(mean, math.nan, 1, math.nan, math.nan)
    std = float(array.std(ddof=1))
    half = float(stats.t.ppf(0.5 + level / 2, n - 1)) * std / math.sqrt(n)
    return Summary(mean, std, n, mean - half, mean + half)


def bootstrap_interval(
    values: Float[Array, "*seeds n"] | Sequence[float], *, level: float = 0.95, resamples: int = 10_000, seed: int = 0
) -> Interval:
    """Return the mean over test items and its percentile bootstrap interval.

    Args:
        values: ``(N,)``, one value per test item (0 or 1 for accuracy), or ``(S, N)`` from S seeds, averaged first.
        level: coverage of the interval, in (0, 1).
        resamples: number of resamples of the N items.
        seed: of the resampling.

    Raises:
        ValueError: bad shape or value.
    """
    items = _per_item("values", values)
    means = _resampled_means(items, resamples, seed)
    low, high = _percentiles(means, level)
    return Interval(float(items.mean()), low, high)


def paired_bootstrap(
    arm: Float[Array, "*seeds n"] | Sequence[float],
    baseline: Float[Array, "*seeds n"] | Sequence[float],
    *,
    level: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> Effect:
    """Compare two arms on the same test items: mean difference, percentile bootstrap interval and p-value.

    Args:
        arm: ``(N,)``, one value per test item, or ``(S, N)`` from S seeds, averaged per item first.
        baseline: the other arm's values for the same items, in the same order; its own number of seeds.
        level: coverage of the interval, in (0, 1).
        resamples: number of resamples of the N items.
        seed: of the resampling.

    Raises:
        ValueError: bad shape or value, or different numbers of items.
    """
    left, right = _per_item("arm", arm), _per_item("baseline", baseline)
    if len(left) != len(right):
        raise ValueError(f"arm and baseline must hold the same test items, got {len(left)} and {len(right)}")
    differences = left - right
    means = _resampled_means(differences, resamples, seed)
    low, high = _percentiles(means, level)
    p_value = (1 + int((means <= 0).sum())) / (1 + resamples)
    return Effect(float(differences.mean()), low, high, p_value, len(differences))


def _per_item(name: str, values: Array | Sequence[float]) -> Float[np.ndarray, " n"]:
    array = to_numpy(name, np.asarray(values) if isinstance(values, Sequence) else values)
    if array.ndim == 2:
        return as_scores(name, array, shape=(None, None), axes="seed, item").mean(axis=0)
    return as_scores(name, array, shape=(None,), axes="item")


def _resampled_means(items: Float[np.ndarray, " n"], resamples: int, seed: int) -> Float[np.ndarray, " resamples"]:
    resamples = check_count("resamples", resamples)
    generator = np.random.default_rng(as_seed("seed", seed))
    n = len(items)
    step = max(1, _BLOCK // n)
    blocks = [
        items[generator.integers(0, n, size=(min(step, resamples - start), n))].mean(axis=1)
        for start in range(0, resamples, step)
    ]
    return np.concatenate(blocks)


def _percentiles(means: Float[np.ndarray, " resamples"], level: float) -> tuple[float, float]:
    _check_level(level)
    low, high = np.quantile(means, [0.5 - level / 2, 0.5 + level / 2])
    return float(low), float(high)


def _check_level(level: float) -> None:
    if not 0 < level < 1:
        raise ValueError(f"level must lie in (0, 1), got {level}")

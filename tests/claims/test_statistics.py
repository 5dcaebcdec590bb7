from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from headgate.claims.statistics import mean_interval


def test_the_interval_is_students():
    values = [0.3, 0.5, 0.1, 0.4]
    interval = mean_interval(values)
    low, high = stats.t.interval(0.95, 3, loc=np.mean(values), scale=stats.sem(values))
    assert interval.mean == pytest.approx(0.325)
    assert (interval.low, interval.high) == (pytest.approx(low), pytest.approx(high))
    assert interval.std == pytest.approx(np.std(values, ddof=1))
    assert interval.n == 4


def test_three_seeds_by_hand():
    interval = mean_interval([1.0, 2.0, 3.0])
    assert interval.mean == 2.0
    assert interval.high == pytest.approx(2.0 + 4.302652729911275 / math.sqrt(3))


def test_one_seed_gives_no_interval():
    interval = mean_interval([0.7])
    assert (interval.mean, interval.low, interval.high, interval.std) == (0.7, None, None, None)


def test_equal_values_give_an_interval_of_no_width():
    interval = mean_interval([0.5, 0.5, 0.5])
    assert (interval.low, interval.high) == (0.5, 0.5)


def test_the_interval_covers_the_mean_in_95_of_100_normal_samples():
    generator = np.random.default_rng(0)
    hits = 0
    for _ in range(2000):
        interval = mean_interval(list(generator.normal(1.0, 2.0, size=5)))
        hits += interval.low <= 1.0 <= interval.high
    assert 0.935 < hits / 2000 < 0.965


@pytest.mark.parametrize("values", [[], [1.0, math.nan], [math.inf]])
def test_no_values_or_undefined_ones_are_refused(values):
    with pytest.raises(ValueError, match="values must be finite"):
        mean_interval(values)

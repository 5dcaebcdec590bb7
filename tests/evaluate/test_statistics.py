from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats

from headgate.evaluate import statistics
from headgate.evaluate.statistics import bootstrap_interval, paired_bootstrap, summarize


def test_a_summary_holds_mean_sample_deviation_and_students_interval() -> None:
    summary = summarize([1.0, 2.0, 3.0])
    assert (summary.mean, summary.std, summary.n) == (2.0, 1.0, 3)
    low, high = stats.t.interval(0.95, 2, loc=2.0, scale=1 / math.sqrt(3))
    assert summary.low == pytest.approx(low)
    assert summary.high == pytest.approx(high)
    assert str(summary) == "2 ± 1 (n=3)"


def test_one_value_has_a_mean_and_no_spread() -> None:
    summary = summarize([0.5])
    assert summary.mean == 0.5
    assert all(math.isnan(value) for value in (summary.std, summary.low, summary.high))


@pytest.mark.parametrize("values", [[], [1.0, math.nan], [math.inf]])
def test_a_summary_of_nothing_or_of_what_is_not_finite_is_refused(values: list[float]) -> None:
    with pytest.raises(ValueError, match="values must be"):
        summarize(values)


def test_the_paired_interval_is_that_of_the_normal_approximation_for_many_items() -> None:
    generator = np.random.default_rng(0)
    baseline = generator.normal(size=2000)
    arm = baseline + 0.1 + 0.5 * generator.normal(size=2000)
    effect = paired_bootstrap(arm, baseline)
    difference = arm - baseline
    error = difference.std() / math.sqrt(2000)
    assert effect.mean == pytest.approx(difference.mean())
    assert effect.low == pytest.approx(difference.mean() - 1.96 * error, abs=0.1 * error)
    assert effect.high == pytest.approx(difference.mean() + 1.96 * error, abs=0.1 * error)
    assert effect.n == 2000
    assert effect.p_value == 1 / 10_001


def test_pairing_sees_what_two_separate_intervals_cannot() -> None:
    generator = np.random.default_rng(1)
    difficulty = generator.normal(size=300) * 10
    arm, baseline = difficulty + 0.1, difficulty
    assert paired_bootstrap(arm, baseline).low > 0.09
    assert bootstrap_interval(arm).low < bootstrap_interval(baseline).mean


def test_equal_arms_have_no_effect_and_a_p_value_of_one() -> None:
    scores = np.array([0.0, 1.0, 1.0, 0.0])
    assert paired_bootstrap(scores, scores) == (0.0, 0.0, 0.0, 1.0, 4)


def test_the_p_value_is_about_uniform_where_there_is_no_effect() -> None:
    generator = np.random.default_rng(2)
    p_values = [
        paired_bootstrap(generator.normal(size=60), generator.normal(size=60), resamples=400, seed=trial).p_value
        for trial in range(200)
    ]
    assert stats.kstest(p_values, "uniform").pvalue > 0.01


def test_the_same_seed_gives_the_same_interval_whatever_the_block(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(3).normal(size=37)
    whole = bootstrap_interval(values, resamples=500, seed=7)
    monkeypatch.setattr(statistics, "_BLOCK", 100)
    assert bootstrap_interval(values, resamples=500, seed=7) == whole
    assert bootstrap_interval(values, resamples=500, seed=8) != whole


def test_several_seeds_are_averaged_per_item_first() -> None:
    per_seed = np.array([[0.0, 1.0, 1.0], [1.0, 1.0, 0.0]])
    merged = per_seed.mean(axis=0)
    assert bootstrap_interval(per_seed, resamples=50) == bootstrap_interval(merged, resamples=50)
    assert paired_bootstrap(torch.from_numpy(per_seed), merged, resamples=50).mean == 0.0


def test_arms_with_different_items_or_bad_values_are_refused() -> None:
    with pytest.raises(ValueError, match="same test items, got 3 and 2"):
        paired_bootstrap(np.zeros(3), np.zeros(2))
    with pytest.raises(ValueError, match="arm must be finite, got NaN in row 1"):
        paired_bootstrap(np.array([0.0, np.nan]), np.zeros(2))
    with pytest.raises(ValueError, match="level must lie"):
        bootstrap_interval(np.zeros(3), level=1.0)
    with pytest.raises(ValueError, match="resamples must be at least 1"):
        bootstrap_interval(np.zeros(3), resamples=0)


def test_the_global_random_state_is_left_alone() -> None:
    before = np.random.get_state()[1].copy()  # noqa: NPY002
    paired_bootstrap(np.arange(5.0), np.zeros(5), resamples=10)
    assert (np.random.get_state()[1] == before).all()  # noqa: NPY002

"""The synthetic hourly series has the parts that it says, and the same bytes for the same seed."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest

from headgate.data import hourly_series


def test_without_noise_and_trend_every_week_is_the_same_and_days_differ_by_a_factor() -> None:
    values = hourly_series(3 * 168, 4, noise=0.0, trend=0.0).values[:, 0]
    weeks = values.reshape(3, 7, 24)
    assert np.array_equal(weeks[0], weeks[1])
    profile = hourly_series(24, 4, noise=0.0, trend=0.0, weekly=0.0).values[:, 0]
    assert profile.mean() == pytest.approx(0, abs=1e-12)
    assert profile.std() == pytest.approx(0.7)
    factors = weeks[0] @ profile / (profile @ profile)
    np.testing.assert_allclose(weeks[0], factors[:, None] * profile, atol=1e-12)
    assert factors.std() > 0.05


def test_the_trend_moves_by_its_size_over_the_whole_series_up_or_down() -> None:
    directions = set()
    for seed in range(6):
        trend = hourly_series(1000, seed, amplitude=0.0, noise=0.0, trend=0.5).values[:, 0]
        np.testing.assert_allclose(np.abs(trend), 0.5 * np.arange(1000) / 1000)
        directions.add(np.sign(trend[-1]))
    assert directions == {-1.0, 1.0}


def test_the_noise_has_the_stated_deviation_and_memory() -> None:
    noise = hourly_series(40_000, 1, amplitude=0.0, trend=0.0, noise=0.3, memory=0.7).values[:, 0]
    assert noise.std() == pytest.approx(0.3, rel=0.05)
    for lag in (1, 3):
        correlation = (noise[lag:] * noise[:-lag]).mean() / noise.var()
        assert correlation == pytest.approx(0.7**lag, abs=0.05)


def test_hours_go_on_from_a_monday() -> None:
    series = hourly_series(30, 0)
    assert series.columns == ("value",)
    assert str(series.timestamps[0]) == "2020-01-06T00:00:00"
    assert (np.diff(series.timestamps) == np.timedelta64(3600, "s")).all()


def test_a_seed_gives_the_same_bytes_everywhere_and_a_longer_series_begins_alike() -> None:
    series = hourly_series(500, 7)
    assert np.array_equal(series.values, hourly_series(500, 7).values)
    assert not np.array_equal(series.values, hourly_series(500, 8).values)
    assert np.array_equal(hourly_series(200, 7, trend=0.0).values, hourly_series(500, 7, trend=0.0).values[:200])
    assert hashlib.sha256(series.values.tobytes()).hexdigest()[:16] == "e1243f52a0021154"


def test_sizes_out_of_range_are_refused() -> None:
    with pytest.raises(ValueError, match="length must be positive"):
        hourly_series(0, 0)
    with pytest.raises(ValueError, match="noise must not be negative"):
        hourly_series(10, 0, noise=-1.0)
    with pytest.raises(ValueError, match=r"memory must lie in \[0, 1\)"):
        hourly_series(10, 0, memory=1.0)

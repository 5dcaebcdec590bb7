"""Fréchet distance, precision and recall."""

from __future__ import annotations

import numpy as np
import pytest

from headgate.evaluate import frechet_distance, precision_recall, standardize_by


def test_the_distance_of_equal_samples_is_zero_and_of_shifted_ones_the_shift():
    x = np.random.default_rng(0).normal(size=(500, 4))
    assert frechet_distance(x, x) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(x, x + np.array([3.0, 0, 0, 4.0])) == pytest.approx(25, rel=1e-6)


def test_the_distance_of_scaled_gaussians_is_that_of_their_deviations():
    x = np.random.default_rng(0).normal(size=(2000, 3))
    deviation = x.std(axis=0, ddof=1)
    x0 = x - x.mean(axis=0)
    # C2 = 4 C1: the root of the product is 2 C1, so the distance is tr(C1 + 4 C1 - 4 C1) = tr C1.
    assert frechet_distance(x0, 2 * x0, ridge=0.0) == pytest.approx(float((deviation**2).sum()), rel=1e-6)


def test_precision_and_recall_see_missing_and_foreign_modes():
    generator = np.random.default_rng(0)
    left, right = generator.normal(size=(100, 2)), generator.normal(size=(100, 2)) + 50
    both = np.concatenate([left, right])
    half = precision_recall(both, left + 0.001)
    assert half.precision == pytest.approx(1.0, abs=0.02)
    assert half.recall == pytest.approx(0.5, abs=0.02)
    foreign = precision_recall(left, both)
    assert foreign.precision == pytest.approx(0.5, abs=0.02)
    assert precision_recall(left, left) == (1.0, 1.0)


def test_features_are_standardised_by_the_real_ones():
    real = np.array([[0.0, 5.0], [2.0, 5.0]])
    first, second = standardize_by(real, real + 1)
    np.testing.assert_allclose(first, [[-1, 0], [1, 0]])
    np.testing.assert_allclose(second, [[0, 1], [2, 1]])


def test_bad_features_are_refused():
    x = np.zeros((5, 2))
    with pytest.raises(ValueError, match="columns of real"):
        frechet_distance(x, np.zeros((5, 3)))
    with pytest.raises(ValueError, match="at least 4"):
        precision_recall(x[:3], x)

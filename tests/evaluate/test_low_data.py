from __future__ import annotations

import math

import numpy as np
import pytest
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from headgate.evaluate import Split, few_shot, sample_efficiency

DIGITS, LABELS = load_digits(return_X_y=True)
X, Y = DIGITS[:600], LABELS[:600]
SPLIT = Split.random(Y, seed=0)


def test_more_shots_are_better_and_every_number_is_a_mean_over_draws() -> None:
    result = few_shot(X, Y, SPLIT, (1, 5, 20), 6, C=(0.01, 1.0))
    assert result.accuracies.shape == (3, 6)
    means = [result.summary[shots].mean for shots in (1, 5, 20)]
    assert means == sorted(means)
    assert means[0] > 0.3
    assert means[2] > 0.85
    assert result.summary[5].mean == pytest.approx(result.accuracies[1].mean())
    assert result.summary[5].std == pytest.approx(result.accuracies[1].std(ddof=1))
    assert result.summary[5].n == 6


def test_draws_are_balanced_nested_and_decided_by_the_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    from headgate.evaluate import low_data

    seen = []
    original = low_data.fit_logistic

    def spy(features: np.ndarray, labels: np.ndarray, *args: float, **options: float) -> object:
        seen.append(sorted(labels.tolist()))
        return original(features, labels, *args, **options)

    monkeypatch.setattr(low_data, "fit_logistic", spy)
    first = few_shot(X, Y, SPLIT, (1, 3), 2, C=(1.0,), seed=5)
    assert seen == [sorted(list(range(10)) * shots) for shots in (1, 3, 1, 3)]
    members = [np.flatnonzero((label == Y) & np.isin(np.arange(600), SPLIT.train)) for label in range(10)]
    small, large = (low_data._draw(members, size, 5, 0) for size in (3, 3))
    assert (small == large).all()
    assert (few_shot(X, Y, SPLIT, (1, 3), 2, C=(1.0,), seed=5).accuracies == first.accuracies).all()
    assert (few_shot(X, Y, SPLIT, (1, 3), 2, C=(1.0,), seed=6).accuracies != first.accuracies).any()
    # The draws of the smaller number of shots do not depend on the larger one being asked for.
    assert (few_shot(X, Y, SPLIT, (3, 1), 2, C=(1.0,), seed=5).accuracies[::-1] == first.accuracies).all()


def test_one_draw_is_a_standardised_logistic_regression() -> None:
    from headgate.evaluate.low_data import _draw

    result = few_shot(X, Y, SPLIT, (4,), 1, C=(0.5,), seed=3)
    members = [np.sort(SPLIT.train[Y[SPLIT.train] == label]) for label in range(10)]
    rows = _draw(members, 4, 3, 0).ravel()
    scaler = StandardScaler().fit(X[rows])
    model = LogisticRegression(C=0.5, max_iter=1000, tol=1e-6).fit(scaler.transform(X[rows]), Y[rows])
    assert result.accuracies[0, 0] == model.score(scaler.transform(X[SPLIT.test]), Y[SPLIT.test])


def test_the_regularisation_comes_from_the_validation_rows_at_the_largest_number_of_shots() -> None:
    result = few_shot(X, Y, SPLIT, (1, 10), 3, C=(1e-4, 0.1))
    on_validation = Split(SPLIT.train, np.zeros(0, int), SPLIT.val)
    accuracy = {C: few_shot(X, Y, on_validation, (10,), 3, C=(C,)).accuracies.mean() for C in (1e-4, 0.1)}
    assert max(accuracy, key=accuracy.__getitem__) == result.C
    flipped = Y.copy()
    flipped[SPLIT.test] = 9 - flipped[SPLIT.test]
    assert few_shot(X, flipped, SPLIT, (1, 10), 3, C=(1e-4, 0.1)).C == result.C


def test_random_features_give_chance() -> None:
    noise, labels = np.random.default_rng(0).normal(size=(900, 10)), np.arange(900) % 3
    split = Split.random(labels, seed=0)
    result = few_shot(noise, labels, split, (10,), 8, C=(0.1,))
    assert abs(result.summary[10].mean - 1 / 3) < 0.05


def test_shots_that_a_class_cannot_give_and_other_bad_arguments_are_refused() -> None:
    thin = Split(np.delete(SPLIT.train, np.flatnonzero(Y[SPLIT.train] == 7)[2:]), SPLIT.val, SPLIT.test)
    with pytest.raises(ValueError, match="must not exceed the smallest class, got 5 > 2 of class 7"):
        few_shot(X, Y, thin, (1, 5))
    with pytest.raises(ValueError, match="shots must hold different numbers"):
        few_shot(X, Y, SPLIT, (5, 5))
    with pytest.raises(ValueError, match="shots must be at least 1"):
        few_shot(X, Y, SPLIT, (0,))
    with pytest.raises(ValueError, match="validation rows to choose C on"):
        few_shot(X, Y, Split(SPLIT.train, np.zeros(0, int), SPLIT.test), (1,))
    with pytest.raises(ValueError, match="C must be positive"):
        few_shot(X, Y, SPLIT, (1,), C=(0.0,))


def test_an_absent_class_counts_as_an_error() -> None:
    split = Split(SPLIT.train[Y[SPLIT.train] != 0], SPLIT.val, SPLIT.test)
    with pytest.warns(UserWarning, match=r"\[0\] are absent"):
        result = few_shot(X, Y, split, (5,), 2, C=(0.1,))
    assert result.absent == (0,)
    assert result.accuracies.max() <= 1 - (Y[SPLIT.test] == 0).mean()


def test_the_samples_that_a_score_needs_are_interpolated_on_a_logarithmic_axis() -> None:
    samples, scores = np.array([1, 10, 100, 1000]), np.array([0.2, 0.4, 0.8, 0.7])
    assert sample_efficiency(samples, scores, 0.4) == pytest.approx(10)
    assert sample_efficiency(samples, scores, 0.6) == pytest.approx(10 * math.sqrt(10))
    assert sample_efficiency(samples, scores, 0.3) == pytest.approx(math.sqrt(10))
    assert sample_efficiency(samples, scores, 0.1) == 1
    assert sample_efficiency(samples, scores, 0.81) == math.inf
    assert sample_efficiency(samples, np.array([0.2, 0.2, 0.2, 0.5]), 0.2) == 1


@pytest.mark.parametrize(
    ("samples", "scores", "target", "match"),
    [
        ([1, 1], [0.1, 0.2], 0.1, "samples must be positive and rise"),
        ([0, 1], [0.1, 0.2], 0.1, "samples must be positive and rise"),
        ([1, 2], [0.1], 0.1, "scores must have shape"),
        ([1, 2], [0.1, np.nan], 0.1, "scores must be finite"),
        ([1, 2], [0.1, 0.2], np.nan, "target must be finite"),
    ],
)
def test_curves_that_are_none_are_refused(samples: list, scores: list, target: float, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        sample_efficiency(np.array(samples), np.array(scores), target)

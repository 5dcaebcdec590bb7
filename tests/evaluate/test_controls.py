from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from headgate.evaluate import Split, knn_probe, linear_probe, probe_controls, worst_group
from headgate.evaluate.probe_data import ProbeResult

DIGITS, LABELS = load_digits(return_X_y=True)
X, Y = DIGITS[:500], LABELS[:500]
SPLIT = Split.random(Y, seed=0)
PROBE = functools.partial(linear_probe, C=0.1)


def test_every_arm_is_the_same_probe_on_its_own_features() -> None:
    random_init = np.tanh(X @ np.random.default_rng(0).normal(size=(64, 30)) / 50)
    report = probe_controls(X, Y, SPLIT, probe=PROBE, raw=X[:, :8], random_init=random_init)
    assert report.features.accuracy == PROBE(X, Y, SPLIT).accuracy
    assert report.raw is not None
    assert report.raw.accuracy == PROBE(X[:, :8], Y, SPLIT).accuracy
    assert report.random_init is not None
    assert report.random_init.accuracy == PROBE(random_init, Y, SPLIT).accuracy
    assert report.features.accuracy > report.raw.accuracy
    without = probe_controls(X, Y, SPLIT, probe=PROBE, shuffles=1)
    assert without.raw is None
    assert without.random_init is None


@pytest.mark.parametrize("probe", [PROBE, functools.partial(knn_probe, k=5)])
def test_shuffled_labels_are_at_chance(probe: object) -> None:
    report = probe_controls(X, Y, SPLIT, probe=probe, shuffles=5)
    assert report.shuffled_at_chance
    assert abs(report.chance - 0.1) < 0.02
    assert report.shuffled < 0.2
    assert report.features.accuracy > 0.85
    assert probe_controls(X, Y, SPLIT, probe=probe, shuffles=5).shuffled == report.shuffled
    assert probe_controls(X, Y, SPLIT, probe=probe, shuffles=5, seed=1).shuffled != report.shuffled


def test_a_probe_that_looks_at_the_test_labels_is_found_out() -> None:
    def cheat(features: np.ndarray, labels: np.ndarray, split: Split) -> ProbeResult:
        truth = Y[split.test]
        return ProbeResult(1.0, 1.0, truth, np.arange(10), np.zeros((len(truth), 10)))

    report = probe_controls(X, Y, SPLIT, probe=cheat)
    assert not report.shuffled_at_chance
    assert report.shuffled == 1.0


def test_chance_follows_the_frequencies_of_unbalanced_classes() -> None:
    labels = (np.arange(500) % 10 == 0).astype(int)
    report = probe_controls(np.random.default_rng(0).normal(size=(500, 3)), labels, Split.random(labels), probe=PROBE)
    # A probe that always answers 0 is right nine times in ten without knowing anything.
    assert report.chance == pytest.approx(0.9)
    assert report.shuffled_at_chance


def test_the_worst_group_of_a_hand_made_case() -> None:
    truth = np.array([0, 0, 1, 1, 1, 0])
    found = np.array([0, 1, 1, 1, 0, 0])
    group = torch.tensor([4, 4, 9, 9, 9, 2])
    result = worst_group(truth, found, group)
    assert result.accuracies == {2: 1.0, 4: 0.5, 9: pytest.approx(2 / 3)}
    assert (result.worst, result.group) == (0.5, 4)
    assert result.average == pytest.approx(4 / 6)
    assert result.counts == {2: 1, 4: 2, 9: 3}
    assert result.small == (2, 4, 9)
    assert worst_group(truth, found, group, min_count=3).small == (2, 4)


def test_groups_of_ten_are_large_enough() -> None:
    labels = np.zeros(21, int)
    result = worst_group(labels, labels, np.repeat([0, 1], [10, 11]))
    assert result.small == ()
    assert worst_group(labels, labels, np.repeat([0, 1], [9, 12])).small == (0,)


def test_groups_may_be_booleans_and_their_order_does_not_matter() -> None:
    generator = np.random.default_rng(0)
    truth, found, group = generator.integers(0, 2, 50), generator.integers(0, 2, 50), generator.random(50) < 0.3
    order = generator.permutation(50)
    assert worst_group(truth, found, group) == worst_group(truth[order], found[order], group[order])


def test_bad_groups_are_refused() -> None:
    labels = np.zeros(3, int)
    with pytest.raises(ValueError, match="y_true and y_pred and group must have the same length"):
        worst_group(labels, labels, np.zeros(2, int))
    with pytest.raises(TypeError, match="group must hold integers"):
        worst_group(labels, labels, np.zeros(3))
    with pytest.raises(TypeError, match="y_pred must hold integers"):
        worst_group(labels, np.zeros(3), labels)

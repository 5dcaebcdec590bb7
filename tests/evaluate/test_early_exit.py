from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from headgate.evaluate import (
    CostCurve,
    accuracy_at_cost,
    cascade,
    early_exit_score,
    exits_at_cost,
    expected_calibration_error,
    random_exits,
)

COST = np.array([0.25, 0.5, 1.0])


def network(items: int = 500, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Class probabilities at three exits of rising skill, and the truth."""
    generator = np.random.default_rng(seed)
    target = generator.integers(4, size=items)
    logits = generator.normal(size=(3, items, 4))
    logits[:, np.arange(items), target] += np.array([0.5, 1.0, 2.0])[:, None]
    p = np.exp(logits)
    return p / p.sum(axis=2, keepdims=True), target


def test_a_score_is_the_loop_over_items() -> None:
    p, target = network()
    left = np.random.default_rng(1).integers(2, size=500) * 2  # nobody leaves in the middle
    score = early_exit_score(torch.tensor(p), torch.tensor(left), target, COST)
    right = np.array([p[left[i], i].argmax() == target[i] for i in range(500)])
    confidence = np.array([p[left[i], i].max() for i in range(500)])
    assert score.accuracy == pytest.approx(right.mean())
    assert score.cost == pytest.approx(np.mean([COST[exit] for exit in left]))
    assert score.calibration_error == expected_calibration_error(confidence, right)
    assert score.exit_fractions.tolist() == pytest.approx([(left == exit).mean() for exit in range(3)])
    assert score.exit_accuracy[[0, 2]].tolist() == pytest.approx([right[left == 0].mean(), right[left == 2].mean()])
    assert math.isnan(score.exit_accuracy[1])
    assert early_exit_score(p, left, target, COST, bins=1).calibration_error == pytest.approx(
        abs(confidence.mean() - right.mean())
    )


@pytest.mark.parametrize("budget", [0.25, 0.3, 0.5, 0.71, 0.99, 1.0])
def test_exits_meet_a_mean_cost_and_are_those_of_the_threshold(budget: float) -> None:
    p, target = network()
    confidence = p.max(axis=2)
    left, threshold = exits_at_cost(confidence, COST, budget)
    assert COST[left].mean() == pytest.approx(budget, abs=0.75 / 500)
    correct = p.argmax(axis=2) == target
    run = cascade(correct, confidence, COST, np.full(2, threshold))
    assert (run.stage == left).all()


def test_no_threshold_comes_closer() -> None:
    generator = np.random.default_rng(4)
    confidence = generator.integers(0, 6, size=(3, 40)) / 5  # with ties
    for budget in (0.26, 0.4, 0.6, 0.8, 0.97):
        left, _ = exits_at_cost(confidence, COST, budget)
        distances = []
        for threshold in [-np.inf, *np.unique(confidence)]:
            takes = np.vstack([confidence[:-1] > threshold, np.ones((1, 40), dtype=bool)])
            distances.append(abs(COST[takes.argmax(axis=0)].mean() - budget))
        assert abs(COST[left].mean() - budget) == pytest.approx(min(distances))


def test_random_exits_keep_their_numbers_and_forget_their_items() -> None:
    left = np.repeat([0, 1, 2], [300, 150, 50])
    dealt = random_exits(left, np.random.default_rng(0))
    assert np.bincount(dealt).tolist() == [300, 150, 50]
    assert (dealt == left).mean() < 0.6
    assert (random_exits(left, np.random.default_rng(0)) == dealt).all()


def test_a_curve_is_read_along_lines_and_at_its_best() -> None:
    curve = CostCurve(accuracy=np.array([0.9, 0.5, 0.7, 0.6]), cost=np.array([1.0, 0.2, 0.6, 0.6]))
    assert accuracy_at_cost(curve, 0.4) == pytest.approx(0.6)
    read = accuracy_at_cost(curve, np.array([0.2, 0.6, 0.8, 1.0]))
    assert np.asarray(read).tolist() == pytest.approx([0.5, 0.7, 0.8, 0.9])


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda p, y: early_exit_score(p, np.full(500, 3), y, COST), ValueError, r"exit_index must lie in \[0, 3\)"),
        (lambda p, y: early_exit_score(p, np.zeros(9, int), y, COST), ValueError, "expected 500, got 9"),
        (lambda p, y: early_exit_score(p, np.zeros(500, int), y, COST[:2]), ValueError, "cost must have shape"),
        (lambda p, y: early_exit_score(p * 3, np.zeros(500, int), y, COST), ValueError, r"lie in \[0, 1\]"),
        (lambda p, y: exits_at_cost(p.max(2), COST, 0.1), ValueError, r"budget must lie in \[0.25, 1\]"),
        (lambda p, y: exits_at_cost(p.max(2), COST[::-1], 0.5), ValueError, "cost must not fall"),
        (lambda p, y: exits_at_cost(p.max(2)[:1], COST[:1], 0.25), ValueError, "at least 2 exits"),
        (lambda p, y: random_exits(np.zeros(3), np.random.default_rng(0)), TypeError, "must hold integers"),
        (
            lambda p, y: accuracy_at_cost(CostCurve(np.ones(2), np.array([0.2, 1.0])), 0.1),
            ValueError,
            r"cost must lie in \[0.2, 1\]",
        ),
        (lambda p, y: accuracy_at_cost(CostCurve(np.ones(0), np.ones(0)), 0.1), ValueError, "at least one point"),
    ],
)
def test_bad_input_is_refused(call: Any, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        call(*network())

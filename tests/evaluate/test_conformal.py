from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from headgate.evaluate import ExitConformal, conformal_quantile, conformal_score, conformal_sets


def table(seed: int, items: int, exits: int = 3, classes: int = 4) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Probabilities (E, N, C) that grow sharper from exit to exit, exits and classes."""
    generator = np.random.default_rng(seed)
    target = generator.integers(classes, size=items)
    logits = generator.normal(size=(exits, items, classes))
    logits[:, np.arange(items), target] += np.arange(1, exits + 1)[:, None]
    p = np.exp(logits) / np.exp(logits).sum(axis=2, keepdims=True)
    return p, generator.integers(exits, size=items), target


@settings(max_examples=80, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=40), st.floats(0.01, 0.99))
def test_the_quantile_is_the_next_score_above_its_level(scores: list[float], alpha: float) -> None:
    n = len(scores)
    level = math.ceil((n + 1) * (1 - alpha) - 1e-9) / n
    found = conformal_quantile(np.array(scores), alpha)
    if level > 1:
        assert found == math.inf
        assert conformal_quantile(np.array(scores), alpha, capped=True) == max(scores)
        return
    # "higher": the smallest score whose rank, counted from 0, is at least (n − 1) · level.
    assert found == sorted(scores)[math.ceil((n - 1) * level - 1e-9)]
    assert conformal_quantile(np.array(scores), alpha, capped=True) == found


def test_a_quantile_by_hand() -> None:
    scores = torch.tensor([0.4, 0.1, 0.3, 0.2, 0.5, 0.6, 0.7, 0.8, 0.9])
    # ⌈10 · 0.8⌉/9 = 8/9; rank ⌈8 · 8/9⌉ = 8, the greatest.
    assert conformal_quantile(scores, 0.2) == pytest.approx(0.9)
    # ⌈10 · 0.5⌉/9 = 5/9; rank ⌈40/9⌉ = 5, the sixth.
    assert conformal_quantile(scores, 0.5) == pytest.approx(0.6)
    assert conformal_quantile(scores, 0.05) == math.inf


def test_new_items_are_covered_as_often_as_promised() -> None:
    covered = []
    for seed in range(40):
        p, _, target = table(seed, 400)
        scores = 1 - p[0, np.arange(400), target]
        sets = conformal_sets(p[0, 200:], conformal_quantile(scores[:200], 0.1))
        covered.append(conformal_score(sets, target[200:]).coverage)
    # The rule "higher" is one rank above the exact 1 − α ≤ coverage ≤ 1 − α + 1/(n + 1).
    assert 0.895 < np.mean(covered) < 0.92


def test_sets_hold_the_classes_that_are_not_stranger_than_the_quantile() -> None:
    p = np.array([[0.5, 0.3, 0.2], [0.9, 0.06, 0.04]])
    assert conformal_sets(p, 0.75).tolist() == [[True, True, False], [True, False, False]]
    assert conformal_sets(p, np.array([0.4, 0.95])).tolist() == [[False, False, False], [True, True, False]]
    assert conformal_sets(p, math.inf).all()
    sets = conformal_sets(torch.tensor(p), 0.75)
    score = conformal_score(sets, torch.tensor([1, 1]))
    assert score == (0.5, 1.5)


def test_each_exit_has_the_quantile_of_those_who_left_there() -> None:
    p, left, target = table(0, 300)
    fitted = ExitConformal(0.1).calibrate(p, left, target)
    for exit in range(3):
        gone = left == exit
        assert fitted.quantiles[exit] == conformal_quantile(1 - p[exit, gone, target[gone]], 0.1)
    sets = fitted.predict_sets(p[left, np.arange(300)], left)
    for item in range(300):
        expected = p[left[item], item] >= 1 - fitted.quantiles[left[item]]
        assert sets[item].tolist() == expected.tolist()


def test_an_exit_that_few_take_is_calibrated_on_everybody_as_it_sees_them() -> None:
    p, _, target = table(1, 200)
    left = np.repeat([0, 1, 2], [180, 20, 0])
    fitted = ExitConformal(0.1).calibrate(p, left, target)
    rows = np.arange(200)
    assert fitted.quantiles[1] == conformal_quantile(1 - p[1, rows, target], 0.1)
    assert fitted.quantiles[2] == conformal_quantile(1 - p[2, rows, target], 0.1)
    twenty = ExitConformal(0.1, min_items=19).calibrate(p, left, target)
    assert twenty.quantiles[1] == conformal_quantile(1 - p[1, rows[180:], target[180:]], 0.1)


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: conformal_quantile(np.zeros(0), 0.1), ValueError, "none of them 0"),
        (lambda: conformal_quantile(np.zeros(3), 0.0), ValueError, r"alpha must lie in \(0, 1\)"),
        (lambda: conformal_quantile(np.array([0.1, math.nan]), 0.1), ValueError, "scores must be finite"),
        (lambda: conformal_sets(np.ones((2, 3)) / 3, np.zeros(3)), ValueError, "one for each of 2 items"),
        (lambda: conformal_sets(2 * np.ones((2, 3)), 0.1), ValueError, r"lie in \[0, 1\]"),
        (lambda: conformal_score(np.ones((2, 3)), np.zeros(2, int)), TypeError, "sets must hold booleans"),
        (lambda: conformal_score(np.ones((2, 3), bool), np.array([0, 3])), ValueError, r"target must lie in \[0, 3\)"),
        (lambda: ExitConformal(1.0), ValueError, "alpha"),
        (lambda: ExitConformal(0.1, min_items=-1), ValueError, "min_items must be at least 0"),
        (lambda: ExitConformal(0.1).predict_sets(np.ones((1, 2)), np.zeros(1, int)), RuntimeError, "calibrate"),
        (
            lambda: ExitConformal(0.1).calibrate(np.ones((2, 3, 2)) / 2, np.array([0, 1, 2]), np.zeros(3, int)),
            ValueError,
            r"exit_index must lie in \[0, 2\), got 0 to 2",
        ),
        (
            lambda: ExitConformal(0.1).calibrate(np.ones((2, 0, 2)), np.zeros(0, int), np.zeros(0, int)),
            ValueError,
            "probabilities must have shape",
        ),
    ],
)
def test_bad_input_is_refused(call: Any, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        call()

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from headgate.evaluate import (
    CostCurve,
    area_under_curve,
    brier_score,
    cascade,
    cascade_thresholds,
    expected_calibration_error,
    operating_curve,
    oracle_curve,
    random_exit_curve,
)
from headgate.evaluate.adaptive_reference import (
    calibration_reference,
    cascade_reference,
    oracle_reference,
    thresholds_reference,
)

COST = np.array([1.0, 2.0, 4.0])


def stages(items: int = 400, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Three stages of rising accuracy whose confidence tells something about being right."""
    generator = np.random.default_rng(seed)
    difficulty = generator.random(items)
    skill = np.array([[0.4], [0.6], [0.9]])
    correct = difficulty + 0.1 * generator.normal(size=(3, items)) < skill
    confidence = np.clip(1 - difficulty + 0.1 * generator.normal(size=(3, items)), 0, 1)
    return correct, confidence


def test_the_threshold_of_a_hand_made_pair_is_the_smallest_of_the_best() -> None:
    # Item by item: the cheap stage is right where it is sure.
    confidence = np.array([[0.9, 0.6, 0.3], [1.0, 1.0, 1.0]])
    correct = np.array([[True, False, False], [False, True, True]])
    # Any threshold in [0.6, 0.9) sends items 1 and 2 on and keeps item 0.
    assert cascade_thresholds(confidence, correct, np.array([0.1, 0.6, 0.7, 0.95])).tolist() == [0.6]
    # Confidence must exceed the threshold: at 0.6 the item with 0.6 goes on, below it stays.
    assert cascade_thresholds(confidence, correct, np.array([0.1, 0.59, 0.7])).tolist() == [0.7]


def test_the_default_grid_has_a_hundred_values_from_a_tenth_to_one() -> None:
    correct, confidence = stages()
    explicit = cascade_thresholds(confidence, correct, np.linspace(0.1, 1, 100))
    assert (cascade_thresholds(confidence, correct) == explicit).all()


@settings(max_examples=80, deadline=None)
@given(seed=st.integers(0, 10_000), items=st.integers(1, 30), count=st.integers(2, 4))
def test_thresholds_and_cascade_equal_their_definitions(seed: int, items: int, count: int) -> None:
    generator = np.random.default_rng(seed)
    confidence = generator.integers(0, 11, (count, items)) / 10
    correct = generator.random((count, items)) < 0.5
    grid = np.linspace(0, 1, 11)
    thresholds = cascade_thresholds(confidence, correct, grid)
    assert thresholds.tolist() == thresholds_reference(confidence.tolist(), correct.tolist(), grid.tolist())
    cost = np.sort(generator.random(count)) + 0.1
    result = cascade(correct, confidence, cost, thresholds)
    accuracy, spent = cascade_reference(correct.tolist(), confidence.tolist(), cost.tolist(), thresholds.tolist())
    assert result.accuracy == pytest.approx(accuracy)
    assert result.cost == pytest.approx(spent)
    assert result.exit_fractions.sum() == pytest.approx(1)
    curve = oracle_curve(correct, cost)
    for last in range(count):
        assert (curve.accuracy[last], curve.cost[last]) == pytest.approx(
            oracle_reference(correct.tolist(), cost.tolist(), last)
        )


def test_a_cascade_stops_where_the_definition_says() -> None:
    correct = np.array([[1, 1, 0, 0], [1, 0, 1, 0], [0, 0, 0, 1]])
    confidence = torch.tensor([[0.9, 0.5, 0.5, 0.1], [0.0, 0.8, 0.8, 0.2], [0.0, 0.0, 0.0, 0.0]])
    result = cascade(correct, confidence, COST, np.array([0.6, 0.7]))
    assert result.stage.tolist() == [0, 1, 1, 2]
    assert result.accuracy == 0.75
    assert result.cost == (1 + 2 + 2 + 4) / 4
    assert result.exit_fractions.tolist() == [0.25, 0.5, 0.25]


def test_the_curve_runs_from_the_first_stage_to_the_last() -> None:
    correct, confidence = stages()
    curve = operating_curve(correct, confidence, COST)
    assert (curve.cost[0], curve.accuracy[0]) == (1.0, pytest.approx(correct[0].mean()))
    assert (curve.cost[-1], curve.accuracy[-1]) == (4.0, pytest.approx(correct[2].mean()))
    assert (np.diff(curve.cost) >= 0).all()
    assert np.allclose(curve.exit_fractions.sum(axis=1), 1)
    np.testing.assert_allclose(curve.exit_fractions @ COST, curve.cost)


def test_the_curve_takes_thresholds_that_all_stages_share_or_one_per_stage() -> None:
    correct, confidence = stages()
    shared = operating_curve(correct, confidence, COST, np.array([0.7, 0.3]))
    single = operating_curve(correct, confidence, COST, np.array([[0.3, 0.3], [0.7, 0.7]]))
    assert (shared.accuracy == single.accuracy).all()
    for point in range(2):
        at = cascade(correct, confidence, COST, shared.thresholds[point])
        assert (at.accuracy, at.cost) == (shared.accuracy[point], shared.cost[point])


def test_the_curve_does_not_depend_on_the_scale_of_the_confidence_or_the_order_of_the_items() -> None:
    correct, confidence = stages()
    curve = operating_curve(correct, confidence, COST)
    order = np.random.default_rng(0).permutation(400)
    for other in (
        operating_curve(correct[:, order], confidence[:, order], COST),
        operating_curve(correct, np.exp(5 * confidence) - 90, COST),
    ):
        assert (other.accuracy == curve.accuracy).all()
        np.testing.assert_allclose(other.cost, curve.cost)


def test_the_oracle_lies_above_the_cascade_and_random_exit_below_at_equal_cost() -> None:
    correct, confidence = stages(4000)
    curve = operating_curve(correct, confidence, COST)
    oracle, by_chance = oracle_curve(correct, COST), random_exit_curve(correct, curve)
    assert (by_chance.cost == curve.cost).all()
    above = np.interp(curve.cost, oracle.cost, oracle.accuracy)
    assert (above >= curve.accuracy - 1e-12).all()
    # At the cheap end the least sure items, which no stage can solve, go on first, and chance does better.
    middle = slice(30, 80)
    assert (curve.accuracy[middle] > by_chance.accuracy[middle] + 0.02).all()
    assert area_under_curve(oracle, 4) > area_under_curve(curve, 4) > area_under_curve(by_chance, 4)


def test_no_choice_of_stages_beats_the_oracle_at_its_cost() -> None:
    generator = np.random.default_rng(1)
    correct = generator.random((3, 7)) < 0.5
    oracle = oracle_curve(correct, COST)
    for _ in range(500):
        stage = generator.integers(0, 3, 7)
        accuracy, cost = correct[stage, np.arange(7)].mean(), COST[stage].mean()
        assert accuracy <= np.interp(cost, oracle.cost, oracle.accuracy) + 1e-12


def test_confidence_that_knows_nothing_is_no_better_than_random_exit() -> None:
    correct, _ = stages(20_000)
    blind = np.random.default_rng(3).random((3, 20_000))
    curve = operating_curve(correct, blind, COST)
    assert np.abs(curve.accuracy - random_exit_curve(correct, curve).accuracy).max() < 4 * 0.5 / np.sqrt(20_000)


def test_random_exit_is_the_expectation_over_random_stages() -> None:
    correct, confidence = stages()
    curve = operating_curve(correct, confidence, COST, np.array([0.5]))
    expected = curve.exit_fractions[0] @ correct.mean(axis=1)
    assert random_exit_curve(correct, curve).accuracy[0] == pytest.approx(expected)
    draws = np.random.default_rng(0).choice(3, (2000, 400), p=curve.exit_fractions[0])
    assert correct[draws, np.arange(400)].mean() == pytest.approx(expected, abs=0.003)


def test_the_area_is_that_of_trapezoids_and_level_after_the_last_point() -> None:
    curve = CostCurve(accuracy=np.array([0.8, 0.4]), cost=np.array([2.0, 1.0]))
    assert area_under_curve(curve, 4) == pytest.approx(0.25 * 0.6 + 0.5 * 0.8)
    assert area_under_curve(CostCurve(np.array([1.0]), np.array([0.0])), 4) == pytest.approx(1.0)
    with pytest.raises(ValueError, match="max_cost must be positive and no point dearer"):
        area_under_curve(curve, 1.5)
    with pytest.raises(ValueError, match="at least one point"):
        area_under_curve(CostCurve(np.zeros(0), np.zeros(0)), 1)


@pytest.mark.parametrize("bins", [1, 4, 15, 100])
def test_calibration_error_and_brier_score_equal_their_definitions(bins: int) -> None:
    generator = np.random.default_rng(0)
    confidence = generator.random(97)
    correct = generator.random(97) < confidence**2
    error, brier = calibration_reference(confidence.tolist(), correct.tolist(), bins)
    assert expected_calibration_error(confidence, correct, bins) == pytest.approx(error)
    assert brier_score(confidence, correct) == pytest.approx(brier)


def test_calibration_error_of_a_hand_made_case() -> None:
    confidence = np.array([0.2, 0.4, 0.6, 0.8])
    correct = np.array([0, 1, 1, 1])
    # Two bins: mean confidence 0.3 and 0.7, accuracy 0.5 and 1.
    assert expected_calibration_error(confidence, correct, bins=2) == pytest.approx((0.2 + 0.3) / 2)
    assert brier_score(confidence, correct) == pytest.approx((0.04 + 0.36 + 0.16 + 0.04) / 4)


def test_a_calibrated_model_has_no_error_and_a_boastful_one_has_its_excess() -> None:
    generator = np.random.default_rng(0)
    confidence = generator.random(200_000)
    correct = generator.random(200_000) < confidence
    assert expected_calibration_error(confidence, correct) < 0.01
    assert expected_calibration_error(np.ones(1000), np.arange(1000) < 700) == pytest.approx(0.3)


def test_the_order_of_equal_confidences_does_not_change_the_error() -> None:
    confidence = np.repeat([0.3, 0.7], 50)
    correct = np.tile([1, 1, 0, 0, 0], 20)
    values = {
        round(expected_calibration_error(confidence[order], correct[order]), 12)
        for order in (np.random.default_rng(seed).permutation(100) for seed in range(20))
    }
    assert len(values) == 1
    assert expected_calibration_error(confidence, correct, bins=2) == pytest.approx((0.1 + 0.3) / 2)


@pytest.mark.parametrize(
    ("changes", "error", "match"),
    [
        ({"correct": np.full((3, 4), 0.5)}, ValueError, "booleans, or 0 and 1 only"),
        ({"correct": np.ones((3, 5))}, ValueError, r"correct must have the shape of confidence, \(3, 4\)"),
        ({"confidence": np.full((3, 4), np.nan)}, ValueError, "confidence must be finite, got NaN in row 0"),
        ({"confidence": np.ones((1, 4)), "correct": np.ones((1, 4))}, ValueError, "at least 2 stages"),
        ({"confidence": np.ones((3, 0)), "correct": np.ones((3, 0))}, ValueError, "none of them 0"),
        ({"cost": np.array([1.0, 3.0, 2.0])}, ValueError, "must not fall from stage to stage"),
        ({"cost": np.array([-1.0, 3.0, 4.0])}, ValueError, "cost must not be negative"),
        ({"cost": np.array([1.0, 2.0])}, ValueError, r"cost must have shape \(stage\)"),
        ({"thresholds": np.array([0.5, 0.5, 0.5])}, ValueError, "thresholds must hold 2 numbers"),
        ({"thresholds": np.array([0.5, np.nan])}, ValueError, "thresholds must hold 2 numbers"),
        ({"thresholds": [0.5, 0.5]}, TypeError, "thresholds must be a NumPy array"),
    ],
)
def test_bad_stages_are_refused(changes: dict, error: type[Exception], match: str) -> None:
    arguments = {
        "correct": np.ones((3, 4)),
        "confidence": np.ones((3, 4)),
        "cost": COST,
        "thresholds": np.array([0.5, 0.5]),
    }
    with pytest.raises(error, match=match):
        cascade(**{**arguments, **changes})


def test_other_bad_arguments_are_refused() -> None:
    correct, confidence = stages()
    with pytest.raises(ValueError, match="grid must rise"):
        cascade_thresholds(confidence, correct, np.array([0.5, 0.5]))
    with pytest.raises(ValueError, match=r"thresholds must be numbers of shape \(t,\) or \(t, 2\)"):
        operating_curve(correct, confidence, COST, np.ones((4, 3)))
    with pytest.raises(ValueError, match="resolution must be at least 2"):
        operating_curve(correct, confidence, COST, resolution=1)
    with pytest.raises(ValueError, match="the curve's 3 stages, got 2"):
        random_exit_curve(correct[:2], operating_curve(correct, confidence, COST))
    with pytest.raises(ValueError, match="expected 3, got 2"):
        oracle_curve(correct, COST[:2])
    with pytest.raises(ValueError, match=r"correct must have shape \(stage, item\)"):
        oracle_curve(correct[0], COST)
    with pytest.raises(ValueError, match=r"confidence must lie in \[0, 1\]"):
        expected_calibration_error(np.array([1.5]), np.array([True]))
    with pytest.raises(ValueError, match="bins must be at least 1"):
        expected_calibration_error(np.array([0.5]), np.array([True]), bins=0)

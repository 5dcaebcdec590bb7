"""Adaptive computation: how much accuracy a cascade, an early exit or a router buys for how much cost.

G stages of rising cost answer the same N items; stage g says how confident it is. An item stops at the first stage
whose confidence exceeds that stage's threshold, and at the last stage otherwise. The curve of accuracy over expected
cost stands between two others: the oracle (the cheapest stage that is right) and random exit at equal cost.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from headgate.evaluate.checks import Array, as_probabilities, as_scores, check_count, to_numpy

__all__ = [
    "Cascade",
    "CostCurve",
    "OperatingCurve",
    "area_under_curve",
    "brier_score",
    "cascade",
    "cascade_thresholds",
    "expected_calibration_error",
    "operating_curve",
    "oracle_curve",
    "random_exit_curve",
]


class Cascade(NamedTuple):
    """A cascade at one setting of its thresholds.

    Attributes:
        accuracy: share of items that are right at the stage where they stop.
        cost: mean cost of those stages.
        stage: ``(N,)`` where each item stops.
        exit_fractions: ``(G,)`` share of items that stop at each stage.
    """

    accuracy: float
    cost: float
    stage: Int[np.ndarray, " n"]
    exit_fractions: Float[np.ndarray, " g"]


class OperatingCurve(NamedTuple):
    """Accuracy over expected cost, one point per setting of the thresholds.

    Attributes:
        accuracy: ``(T,)``.
        cost: ``(T,)`` expected cost.
        thresholds: ``(T, G - 1)`` of the stages before the last.
        exit_fractions: ``(T, G)`` share of items that stop at each stage.
    """

    accuracy: Float[np.ndarray, " t"]
    cost: Float[np.ndarray, " t"]
    thresholds: Float[np.ndarray, "t stages"]
    exit_fractions: Float[np.ndarray, "t g"]


class CostCurve(NamedTuple):
    """Accuracy over expected cost."""

    accuracy: Float[np.ndarray, " t"]
    cost: Float[np.ndarray, " t"]


def cascade_thresholds(
    confidence: Float[Array, "g n"], correct: Bool[Array, "g n"], grid: Float[Array, " t"] | None = None
) -> Float[np.ndarray, " stages"]:
    """Calibrate the thresholds of a cascade, each pair of neighbouring stages by itself.

    For the pair (g, g + 1) and a threshold t, an item uses stage g where its confidence exceeds t and stage g + 1
    elsewhere; chosen is the smallest t of the grid with the greatest accuracy. The greedy rule of "Matryoshka
    Representation Learning" (Kusupati et al., NeurIPS 2022, adaptive classification).

    Args:
        confidence: ``(G, N)`` on held-out items, e.g. the greatest softmax probability; G at least 2.
        correct: ``(G, N)`` booleans (or 0 and 1): is the stage's answer right?
        grid: ``(T,)`` rising thresholds; default ``linspace(0.1, 1, 100)``.

    Returns:
        ``(G - 1,)`` thresholds.

    Raises:
        TypeError: not arrays of real numbers.
        ValueError: bad shapes or values, or a grid that does not rise.
    """
    scores = as_scores("confidence", confidence, shape=(None, None), axes="stage, item")
    right = _as_correct(correct, scores.shape)
    _check_stages(len(scores))
    candidates = np.linspace(0.1, 1, 100) if grid is None else as_scores("grid", grid, shape=(None,), axes="threshold")
    if (candidates[1:] <= candidates[:-1]).any():
        raise ValueError(f"grid must rise, got {candidates.tolist()}")
    chosen = np.empty(len(scores) - 1)
    for stage in range(len(chosen)):
        hits = [int(np.where(scores[stage] > t, right[stage], right[stage + 1]).sum()) for t in candidates]
        chosen[stage] = candidates[int(np.argmax(hits))]
    return chosen


def cascade(
    correct: Bool[Array, "g n"],
    confidence: Float[Array, "g n"],
    cost: Float[Array, " g"],
    thresholds: Float[Array, " stages"],
) -> Cascade:
    """Run a cascade: every item stops at the first stage whose confidence exceeds its threshold, or at the last.

    Args:
        correct: ``(G, N)`` booleans (or 0 and 1).
        confidence: ``(G, N)``; the last stage's is not looked at.
        cost: ``(G,)`` cost of an item that stops at each stage, never falling, the last positive.
        thresholds: ``(G - 1,)``, infinities allowed.

    Raises:
        TypeError: not arrays of real numbers.
        ValueError: bad shapes or values.
    """
    right, scores, costs = _as_stages(correct, confidence, cost)
    limits = to_numpy("thresholds", thresholds).astype(np.float64)
    if limits.shape != (len(costs) - 1,) or np.isnan(limits).any():
        raise ValueError(f"thresholds must hold {len(costs) - 1} numbers, got {limits.tolist()}")
    return _run(right, scores, costs, limits)


def operating_curve(
    correct: Bool[Array, "g n"],
    confidence: Float[Array, "g n"],
    cost: Float[Array, " g"],
    thresholds: Float[Array, t * stages] | None = None,
    *,
    resolution: int = 101,
) -> OperatingCurve:
    """Return accuracy and expected cost over thresholds.

    Args:
        correct: ``(G, N)`` booleans (or 0 and 1); G at least 2.
        confidence: ``(G, N)`` of any scale.
        cost: ``(G,)`` cost of an item that stops at each stage, never falling, the last positive.
        thresholds: ``(T,)``, each shared by all stages, or ``(T, G - 1)``, one per stage. Default: ``resolution``
            quantiles of the confidences before the last stage, between minus infinity (all stop at the first stage)
            and infinity (all go to the last).
        resolution: number of quantiles.

    Returns:
        T points, by rising cost.

    Raises:
        TypeError: not arrays of real numbers.
        ValueError: bad shapes or values.
    """
    right, scores, costs = _as_stages(correct, confidence, cost)
    if thresholds is None:
        resolution = check_count("resolution", resolution, low=2)
        quantiles = np.quantile(scores[:-1], np.linspace(0, 1, resolution), method="lower")
        limits = np.unique(np.concatenate([[-np.inf], quantiles, [np.inf]]))
    else:
        limits = to_numpy("thresholds", thresholds).astype(np.float64)
    if limits.ndim == 1:
        limits = np.repeat(limits[:, None], len(costs) - 1, axis=1)
    if limits.ndim != 2 or limits.shape[0] == 0 or limits.shape[1] != len(costs) - 1 or np.isnan(limits).any():
        raise ValueError(f"thresholds must be numbers of shape (t,) or (t, {len(costs) - 1}), got {limits.shape}")
    points = [_run(right, scores, costs, row) for row in limits]
    order = np.argsort([point.cost for point in points], kind="stable")
    return OperatingCurve(
        accuracy=np.array([points[i].accuracy for i in order]),
        cost=np.array([points[i].cost for i in order]),
        thresholds=limits[order],
        exit_fractions=np.array([points[i].exit_fractions for i in order]),
    )


def oracle_curve(correct: Bool[Array, "g n"], cost: Float[Array, " g"]) -> CostCurve:
    """Return the upper bound: every item stops at the cheapest stage that is right, or at the first if none is.

    Point g allows the stages up to g; no rule that picks a stage per item lies above the lines between the points.

    Args:
        correct: ``(G, N)`` booleans (or 0 and 1).
        cost: ``(G,)``, never falling, the last positive.

    Returns:
        G points, by rising cost.

    Raises:
        TypeError: not arrays of real numbers.
        ValueError: bad shapes or values.
    """
    right, costs = _as_correct(correct, None), _as_cost(cost, None)
    if len(right) != len(costs):
        raise ValueError(f"cost must have one entry per stage: expected {len(right)}, got {len(costs)}")
    solved = np.logical_or.accumulate(right, axis=0)
    first = right.argmax(axis=0)
    spent = np.where(solved & (first <= np.arange(len(costs))[:, None]), costs[first], costs[0])
    return CostCurve(solved.mean(axis=1), spent.mean(axis=1))


def random_exit_curve(correct: Bool[Array, "g n"], curve: OperatingCurve) -> CostCurve:
    """Return the lower control: items stop at random, with the same share per stage as on ``curve``.

    The cost of every point is therefore equal, and its accuracy is an exact expectation, not a draw:
    ``Σ_g P(stop at g) · accuracy of stage g``.

    Args:
        correct: ``(G, N)`` booleans (or 0 and 1), those of the curve.
        curve: from :func:`operating_curve`.

    Raises:
        TypeError: not an array of real numbers.
        ValueError: bad shapes or values.
    """
    right = _as_correct(correct, None)
    if len(right) != curve.exit_fractions.shape[1]:
        raise ValueError(f"correct must have the curve's {curve.exit_fractions.shape[1]} stages, got {len(right)}")
    return CostCurve(curve.exit_fractions @ right.mean(axis=1), curve.cost.copy())


def area_under_curve(curve: OperatingCurve | CostCurve, max_cost: float) -> float:
    """Return the area under accuracy over cost, by trapezoids, with the cost divided by the dearest stage's.

    Left of its first point a curve has no accuracy to offer and adds no area, so one whose cheapest stage costs a
    quarter of the dearest can reach at most 0.75; right of its last point it stays level, since more budget need not
    be spent. Compare curves over the same stages only.

    Args:
        curve: points in any order.
        max_cost: cost of the dearest stage.

    Raises:
        ValueError: no point, or a cost above ``max_cost`` or below 0.
    """
    if len(curve.cost) == 0:
        raise ValueError("curve must have at least one point, got none")
    if not max_cost > 0 or curve.cost.min() < 0 or curve.cost.max() > max_cost * (1 + 1e-9):
        raise ValueError(f"max_cost must be positive and no point dearer, got {max_cost} for {curve.cost.max()}")
    order = np.argsort(curve.cost, kind="stable")
    accuracy = np.append(curve.accuracy[order], curve.accuracy[order[-1]])
    return float(np.trapezoid(accuracy, np.append(curve.cost[order], max_cost) / max_cost))


def expected_calibration_error(confidence: Float[Array, " n"], correct: Bool[Array, " n"], bins: int = 15) -> float:
    """Return the mean gap between confidence and accuracy over bins of equal mass.

    The items are sorted by confidence and cut into ``bins`` parts of equal count (up to one);
    ``ECE = Σ_b n_b/N · |accuracy_b - confidence_b|``. Items of one confidence that a cut separates share their mean
    correctness, so that the order in which they came does not count.

    Args:
        confidence: ``(N,)`` in [0, 1].
        correct: ``(N,)`` booleans (or 0 and 1).
        bins: number of bins.

    Raises:
        TypeError: not arrays of real numbers.
        ValueError: bad shapes or values.
    """
    scores = as_probabilities("confidence", confidence, shape=(None,), axes="item")
    right = _as_correct(correct, scores.shape)
    values, group, counts = np.unique(scores, return_inverse=True, return_counts=True)
    shared = np.repeat(np.bincount(group, weights=right) / counts, counts)
    gaps = np.repeat(values, counts) - shared
    parts = np.array_split(gaps, min(check_count("bins", bins), len(gaps)))
    return float(sum(abs(part.sum()) for part in parts) / len(gaps))


def brier_score(confidence: Float[Array, " n"], correct: Bool[Array, " n"]) -> float:
    """Return the mean squared gap between the confidence in an answer and its being right, ``mean (s - 1[right])²``.

    Args:
        confidence: ``(N,)`` in [0, 1].
        correct: ``(N,)`` booleans (or 0 and 1).

    Raises:
        TypeError: not arrays of real numbers.
        ValueError: bad shapes or values.
    """
    scores = as_probabilities("confidence", confidence, shape=(None,), axes="item")
    return float(np.square(scores - _as_correct(correct, scores.shape)).mean())


def _run(
    right: Bool[np.ndarray, "g n"],
    scores: Float[np.ndarray, "g n"],
    costs: Float[np.ndarray, " g"],
    limits: Float[np.ndarray, " stages"],
) -> Cascade:
    stops = np.concatenate([scores[:-1] > limits[:, None], np.ones((1, scores.shape[1]), dtype=bool)])
    stage = stops.argmax(axis=0)
    fractions = np.bincount(stage, minlength=len(costs)) / len(stage)
    hits = right[stage, np.arange(len(stage))]
    return Cascade(float(hits.mean()), float(fractions @ costs), stage, fractions)


def _as_stages(
    correct: Array, confidence: Array, cost: Array
) -> tuple[Bool[np.ndarray, "g n"], Float[np.ndarray, "g n"], Float[np.ndarray, " g"]]:
    scores = as_scores("confidence", confidence, shape=(None, None), axes="stage, item")
    _check_stages(len(scores))
    return _as_correct(correct, scores.shape), scores, _as_cost(cost, len(scores))


def _check_stages(count: int) -> None:
    if count < 2:
        raise ValueError(f"confidence must have at least 2 stages, got {count}")


def _as_correct(correct: Array, shape: tuple[int, ...] | None) -> Bool[np.ndarray, "*shape"]:
    array = to_numpy("correct", correct)
    if shape is None and (array.ndim != 2 or 0 in array.shape):
        raise ValueError(f"correct must have shape (stage, item), none of them 0, got {array.shape}")
    if shape is not None and array.shape != shape:
        raise ValueError(f"correct must have the shape of confidence, {shape}, got {array.shape}")
    if array.dtype != np.bool_ and not np.isin(array, (0, 1)).all():
        raise ValueError("correct must hold booleans, or 0 and 1 only, got other values")
    return array.astype(bool)


def _as_cost(cost: Array, stages: int | None) -> Float[np.ndarray, " g"]:
    costs = as_scores("cost", cost, shape=(stages,), axes="stage")
    if costs[0] < 0 or costs[-1] <= 0 or (costs[1:] < costs[:-1]).any():
        raise ValueError(f"cost must not be negative and must not fall from stage to stage, got {costs.tolist()}")
    return costs

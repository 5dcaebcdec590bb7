"""Judge a network that answers at several exits: accuracy, cost and calibration of the answers it gives, at equal cost.

The curves over thresholds stand in :mod:`headgate.evaluate.adaptive`, sets of classes in :mod:`headgate.evaluate.conformal`.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from headgate.evaluate.adaptive import CostCurve, OperatingCurve, expected_calibration_error
from headgate.evaluate.checks import Array, as_labels, as_probabilities, as_scores
from headgate.evaluate.conformal import as_exits

__all__ = ["EarlyExitScore", "accuracy_at_cost", "early_exit_score", "exits_at_cost", "random_exits"]


class EarlyExitScore(NamedTuple):
    """The answers that a network with exits gives.

    Attributes:
        accuracy: share of items that are right at the exit where they left.
        cost: mean cost of those exits.
        calibration_error: of the greatest probability at that exit, over 15 bins of equal count.
        exit_fractions: ``(E,)`` share of items that left at each exit.
        exit_accuracy: ``(E,)`` accuracy on the items that left there; nan where none did.
    """

    accuracy: float
    cost: float
    calibration_error: float
    exit_fractions: Float[np.ndarray, " e"]
    exit_accuracy: Float[np.ndarray, " e"]


def early_exit_score(
    probabilities: Float[Array, "e n c"],
    exit_index: Int[Array, " n"],
    target: Int[Array, " n"],
    cost: Float[Array, " e"],
    *,
    bins: int = 15,
) -> EarlyExitScore:
    """Judge the answers at the exits where the items left.

    Args:
        probabilities: ``(E, N, C)`` class probabilities at every exit.
        exit_index: ``(N,)`` the exit at which each item left, in [0, E).
        target: ``(N,)`` true classes.
        cost: ``(E,)`` cost of leaving at each exit.
        bins: of the calibration error.

    Raises:
        TypeError: not arrays of numbers.
        ValueError: bad shapes or values.
    """
    table = as_probabilities("probabilities", probabilities, shape=(None, None, None), axes="exit, item, class")
    exits, items, _ = table.shape
    left = as_exits(exit_index, items, exits)
    truth = as_labels("target", target, length=items)
    costs = as_scores("cost", cost, shape=(exits,), axes="exit")
    answers = table[left, np.arange(items)]
    right = answers.argmax(axis=1) == truth
    counts = np.bincount(left, minlength=exits)
    hits = np.bincount(left, weights=right, minlength=exits)
    return EarlyExitScore(
        accuracy=float(right.mean()),
        cost=float(costs[left].mean()),
        calibration_error=expected_calibration_error(answers.max(axis=1), right, bins),
        exit_fractions=counts / items,
        exit_accuracy=np.where(counts > 0, hits / np.maximum(counts, 1), np.nan),
    )


def exits_at_cost(
    confidence: Float[Array, "e n"], cost: Float[Array, " e"], budget: float
) -> tuple[Int[np.ndarray, " n"], float]:
    """Where items leave under the shared threshold that comes closest to a mean cost.

    An item leaves at the first exit whose confidence exceeds the threshold, and at the last otherwise; the mean cost rises
    with the threshold, from the first exit's to the last's. Labels are not looked at.

    Args:
        confidence: ``(E, N)`` of any scale; the last exit's is not looked at. E at least 2.
        cost: ``(E,)``, never falling.
        budget: the mean cost to meet.

    Returns:
        ``(N,)`` exits, and the threshold (infinities where all items leave at one end); of two equally close ones the
        cheaper.

    Raises:
        TypeError: not arrays of real numbers.
        ValueError: bad shapes or values, or a budget outside the range of the costs.
    """
    scores = as_scores("confidence", confidence, shape=(None, None), axes="exit, item")
    if len(scores) < 2:
        raise ValueError(f"confidence must have at least 2 exits, got {len(scores)}")
    costs = as_scores("cost", cost, shape=(len(scores),), axes="exit")
    if (costs[1:] < costs[:-1]).any():
        raise ValueError(f"cost must not fall from exit to exit, got {costs.tolist()}")
    if not costs[0] - 1e-9 <= budget <= costs[-1] + 1e-9:
        raise ValueError(f"budget must lie in [{costs[0]:g}, {costs[-1]:g}], got {budget}")
    thresholds = np.concatenate([[-np.inf], np.unique(scores[:-1])])

    def leave(threshold: float) -> Int[np.ndarray, " n"]:
        takes = np.concatenate([scores[:-1] > threshold, np.ones((1, scores.shape[1]), dtype=bool)])
        return np.asarray(takes.argmax(axis=0))

    low, high = 0, len(thresholds) - 1
    while high - low > 1:
        middle = (low + high) // 2
        if costs[leave(thresholds[middle])].mean() <= budget:
            low = middle
        else:
            high = middle
    found = [(leave(thresholds[place]), float(thresholds[place])) for place in (low, high)]
    return min(found, key=lambda pair: abs(float(costs[pair[0]].mean()) - budget))


def random_exits(exit_index: Int[Array, " n"], generator: np.random.Generator) -> Int[np.ndarray, " n"]:
    """The same exits, dealt out to items at random: what a rule is worth that does not look at its items.

    Args:
        exit_index: ``(N,)``.
        generator: deals.

    Raises:
        TypeError: not integers.
        ValueError: no item.
    """
    return generator.permutation(as_labels("exit_index", exit_index))


def accuracy_at_cost(
    curve: OperatingCurve | CostCurve, cost: Float[Array, " t"] | float
) -> Float[np.ndarray, " t"] | float:
    """Read a curve of accuracy over cost between its points, along straight lines.

    A mixture of two settings reaches every point on the line between them. Points of equal cost count as their best.

    Args:
        curve: points in any order.
        cost: where to read it, within the range of its points.

    Returns:
        A number for a number, an array for an array.

    Raises:
        ValueError: no point, or a cost outside the range.
    """
    if len(curve.cost) == 0:
        raise ValueError("curve must have at least one point, got none")
    costs, group = np.unique(curve.cost, return_inverse=True)
    best = np.full(len(costs), -np.inf)
    np.maximum.at(best, group, curve.accuracy)
    asked = np.asarray(cost, dtype=np.float64)
    if asked.size == 0 or not (asked.min() >= costs[0] - 1e-9 and asked.max() <= costs[-1] + 1e-9):
        raise ValueError(f"cost must lie in [{costs[0]:g}, {costs[-1]:g}], where the curve has points, got {cost}")
    read = np.interp(asked, costs, best)
    return float(read) if asked.ndim == 0 else read

"""The definitions behind the probes, one item at a time; slow, for tests and reading."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int

__all__ = ["knn_reference", "logistic_objective_reference", "mean_iou_reference"]


def knn_reference(
    train: Float[np.ndarray, "n dim"],
    labels: Int[np.ndarray, " n"],
    query: Float[np.ndarray, " dim"],
    k: int,
    temperature: float | None,
) -> int:
    """Label of one query by the cosine; votes weigh ``exp(cosine / temperature)``, or one where that is None."""
    cosines = [
        sum(a * b for a, b in zip(row, query, strict=True)) / (math.hypot(*row) * math.hypot(*query)) for row in train
    ]
    nearest = sorted(range(len(train)), key=lambda row: (-cosines[row], row))[:k]
    votes: dict[int, float] = {}
    for row in nearest:
        weight = 1.0 if temperature is None else math.exp(cosines[row] / temperature)
        votes[int(labels[row])] = votes.get(int(labels[row]), 0.0) + weight
    return min(votes, key=lambda label: (-votes[label], label))


def logistic_objective_reference(
    X: Float[np.ndarray, "n dim"],
    y: Int[np.ndarray, " n"],
    weights: Float[np.ndarray, "classes dim"],
    bias: Float[np.ndarray, " classes"],
    C: float,
) -> float:
    """``C Σ_i CE(W x_i + b, y_i) + ½‖W‖²`` for labels 0 … K - 1."""
    total = 0.5 * float(np.square(weights).sum())
    for row, label in zip(X, y, strict=True):
        logits = weights @ row + bias
        total += C * (math.log(sum(math.exp(value - logits.max()) for value in logits)) + logits.max() - logits[label])
    return total


def mean_iou_reference(truth: Sequence[int], found: Sequence[int]) -> float:
    """Mean overlap over the classes in the truth or the prediction."""
    overlaps = []
    for label in sorted({*truth, *found}):
        both = sum(a == label and b == label for a, b in zip(truth, found, strict=True))
        either = sum(a == label or b == label for a, b in zip(truth, found, strict=True))
        overlaps.append(both / either)
    return sum(overlaps) / len(overlaps)

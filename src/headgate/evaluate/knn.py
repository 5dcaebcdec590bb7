"""The nearest-neighbour probe: is the information locally there?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
from jaxtyping import Float, Int

from headgate.evaluate.checks import Array, ZeroPolicy, check_choice, check_count
from headgate.evaluate.features import Split
from headgate.evaluate.probe_data import ProbeResult, as_probe_data, choose, score_predictions
from headgate.evaluate.search import DistanceMetric, search

__all__ = ["knn_probe"]

_QUERIES = 4096


def knn_probe(
    X: Float[Array, "n dim"],
    y: Int[Array, " n"],
    split: Split,
    k: int | Sequence[int] = 20,
    metric: DistanceMetric = "cosine",
    weights: Literal["exp", "uniform"] | None = None,
    temperature: float = 0.07,
    *,
    chunk: int = 2048,
    zero: ZeroPolicy = "error",
) -> ProbeResult:
    """Let the ``k`` nearest training rows vote on every test row.

    With ``k=1`` the accuracy is the top-1 accuracy of retrieval by class. Equal votes go to the smallest label.

    Args:
        X: ``(N, d)``, finite.
        y: ``(N,)`` integer labels.
        split: rows that vote, rows to choose ``k`` on, and rows to test on.
        k: number of neighbours, at most the number of training rows; from several, the one with the best accuracy on
            ``split.val`` is chosen, the smallest of equals.
        metric: ``"cosine"``, ``"l2"`` or ``"ip"``.
        weights: ``"exp"`` weighs a vote by ``exp(cosine / temperature)`` and needs the cosine; ``"uniform"`` counts.
            Default ``"exp"`` for the cosine, ``"uniform"`` for the others.
        temperature: of the exponential weights, positive.
        chunk: rows per block of the search; the result does not depend on it.
        zero: as in :func:`headgate.evaluate.search`.

    Raises:
        TypeError: labels are not integers.
        ValueError: bad shapes or values, ``k`` above the number of training rows, exponential weights without the
            cosine, or several ``k`` without validation rows.
    """
    features, labels = as_probe_data(X, y, split)
    if weights is None:
        weights = "exp" if metric == "cosine" else "uniform"
    check_choice("weights", weights, ("exp", "uniform"))
    if weights == "exp" and metric != "cosine":
        raise ValueError(f"weights='exp' needs metric='cosine', got metric={metric!r}")
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    sizes = [k] if isinstance(k, int | np.integer) else sorted(k)
    sizes = [check_count("k", size, high=len(split.train)) for size in sizes]
    if len(sizes) > 1 and len(split.val) == 0:
        raise ValueError(f"split must have validation rows to choose k on, got none for k={sizes}")
    # In the order of the row numbers, so that equal distances are settled by them.
    train = np.sort(split.train)
    classes, votes_for = np.unique(labels[train], return_inverse=True)

    def scores_of(rows: Int[np.ndarray, " q"], size: int) -> Float[np.ndarray, "q classes"]:
        ids, cosines = search(features[rows], features[train], size, metric=metric, chunk=chunk, zero=zero)
        weight = np.exp((cosines - cosines[:, :1]) / temperature) if weights == "exp" else np.ones_like(cosines)
        parts = []
        for start in range(0, len(ids), _QUERIES):
            block = slice(start, start + _QUERIES)
            cells = np.arange(len(ids[block]))[:, None] * len(classes) + votes_for[ids[block]]
            votes = np.bincount(cells.ravel(), weight[block].ravel(), minlength=len(ids[block]) * len(classes))
            parts.append(votes.reshape(-1, len(classes)))
        return np.concatenate(parts)

    chosen, selection = sizes[0], float("nan")
    if len(sizes) > 1:
        best, selection = choose(
            sizes, lambda size: float((_winners(scores_of(split.val, int(size)), classes) == labels[split.val]).mean())
        )
        chosen = int(best)
    scores = scores_of(split.test, chosen)
    predictions = _winners(scores, classes)
    accuracy, mean_per_class, absent = score_predictions(labels[split.test], predictions, classes)
    return ProbeResult(
        accuracy, mean_per_class, predictions, classes, scores, {"k": float(chosen)}, selection, absent=absent
    )


def _winners(votes: Float[np.ndarray, "q classes"], classes: Int[np.ndarray, " classes"]) -> Int[np.ndarray, " q"]:
    """The label with the most votes; sums that differ by rounding alone are equal, and the smallest label wins."""
    best = votes.max(axis=1, keepdims=True)
    return classes[(votes >= best * (1 - 1e-12)).argmax(axis=1)]

"""The definitions behind :mod:`headgate.evaluate.clustering`, as loops; slow, for tests and reading."""

from __future__ import annotations

import math
from collections import Counter
from itertools import combinations, permutations

import numpy as np
from jaxtyping import Float, Int

__all__ = [
    "ari_reference",
    "clustering_accuracy_reference",
    "mean_best_overlap_reference",
    "nmi_reference",
    "silhouette_reference",
]


def nmi_reference(y: Int[np.ndarray, " n"], clusters: Int[np.ndarray, " n"]) -> float:
    """``2 I / (H(y) + H(clusters))``."""
    n = len(y)
    a, b = Counter(y.tolist()), Counter(clusters.tolist())
    joint = Counter(zip(y.tolist(), clusters.tolist(), strict=True))
    information = sum(count / n * math.log(count * n / (a[i] * b[j])) for (i, j), count in joint.items())
    entropies = [-sum(count / n * math.log(count / n) for count in side.values()) for side in (a, b)]
    return 2 * information / sum(entropies) if sum(entropies) > 0 else 1.0


def ari_reference(y: Int[np.ndarray, " n"], clusters: Int[np.ndarray, " n"]) -> float:
    """Pairs of items that both sides put together, against the number expected by chance."""
    pairs = list(combinations(range(len(y)), 2))
    together = sum(y[i] == y[j] and clusters[i] == clusters[j] for i, j in pairs)
    of_y = sum(y[i] == y[j] for i, j in pairs)
    of_clusters = sum(clusters[i] == clusters[j] for i, j in pairs)
    expected = of_y * of_clusters / len(pairs) if pairs else 0.0
    most = (of_y + of_clusters) / 2
    return float((together - expected) / (most - expected)) if most != expected else 1.0


def clustering_accuracy_reference(y: Int[np.ndarray, " n"], clusters: Int[np.ndarray, " n"]) -> float:
    """The best accuracy over all ways to name the clusters; those without a class are always wrong."""
    labels, ids = sorted(set(y.tolist())), sorted(set(clusters.tolist()))
    names = [*labels, *([None] * max(0, len(ids) - len(labels)))]
    best = 0
    for naming in permutations(names, len(ids)):
        name_of = dict(zip(ids, naming, strict=True))
        best = max(best, sum(name_of[c] == label for c, label in zip(clusters.tolist(), y.tolist(), strict=True)))
    return best / len(y)


def silhouette_reference(Z: Float[np.ndarray, "n dim"], clusters: Int[np.ndarray, " n"]) -> float:
    """Mean of ``(b - a) / max(a, b)`` with Euclidean distances, item by item."""
    scores = []
    for i, own in enumerate(clusters):
        distance = [float(np.linalg.norm(Z[i] - z)) for z in Z]
        peers = [distance[j] for j in range(len(Z)) if clusters[j] == own and j != i]
        if not peers:
            scores.append(0.0)
            continue
        a = float(np.mean(peers))
        b = min(float(np.mean([distance[j] for j in np.flatnonzero(clusters == c)])) for c in set(clusters) - {own})
        scores.append((b - a) / max(a, b))
    return float(np.mean(scores))


def mean_best_overlap_reference(
    masks: Int[np.ndarray, " pixel"], predicted: Int[np.ndarray, " pixel"], background: int = 0
) -> float:
    """Mean over the true objects of one scene of the best IoU, with boolean masks."""
    best = []
    for label in sorted(set(masks.tolist()) - {background}):
        overlaps = []
        for segment in set(predicted.tolist()):
            both = ((masks == label) & (predicted == segment)).sum()
            either = ((masks == label) | (predicted == segment)).sum()
            overlaps.append(both / either)
        best.append(max(overlaps))
    return float(np.mean(best))

"""The definition behind :mod:`headgate.evaluate.search`, one pair at a time; slow, for tests and reading."""

from __future__ import annotations

import math

import numpy as np
from jaxtyping import Float

__all__ = ["search_reference", "spatial_reference"]


def search_reference(
    queries: Float[np.ndarray, "q dim"], gallery: Float[np.ndarray, "n dim"], k: int, metric: str
) -> tuple[list[list[int]], list[list[float]]]:
    """Rank all gallery rows by score, equal scores by row, and keep the first ``k``."""
    ids, scores = [], []
    for query in queries.astype(np.float64):
        values = [_score(query, row, metric) for row in gallery.astype(np.float64)]
        order = sorted(range(len(gallery)), key=lambda row: (-values[row], row))[:k]
        ids.append(order)
        scores.append([values[row] for row in order])
    return ids, scores


def spatial_reference(
    query_patches: Float[np.ndarray, "q patches dim"], gallery_patches: Float[np.ndarray, "r patches dim"]
) -> list[list[float]]:
    """``D(q, r) = mean_p min_s ‖q_p - r_s‖``, patch by patch."""
    return [
        [sum(min(math.dist(p, s) for s in reference) for p in query) / len(query) for reference in gallery_patches]
        for query in query_patches
    ]


def _score(query: Float[np.ndarray, " dim"], row: Float[np.ndarray, " dim"], metric: str) -> float:
    if metric == "l2":
        return -math.dist(query, row)
    product = math.fsum(a * b for a, b in zip(query, row, strict=True))
    return product if metric == "ip" else product / (math.hypot(*query) * math.hypot(*row))

"""The definitions behind :mod:`headgate.evaluate.retrieval_metrics`, one query at a time; slow, for tests and reading.

``relevance`` lists the 0s and 1s of a whole ranking, the best rank first.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

__all__ = ["retrieval_metrics_reference", "voc11_reference"]


def retrieval_metrics_reference(relevance: Sequence[int], k: int) -> dict[str, float]:
    """Every metric of one whole ranking, cut at ``k`` where it has a cut."""
    total = sum(relevance)
    hits, precision_sum, trapezoids, precision_sum_at_k = 0, 0.0, 0.0, 0.0
    for rank, relevant in enumerate(relevance, start=1):
        before = hits / (rank - 1) if rank > 1 else 1.0
        hits += relevant
        if relevant:
            precision_sum += hits / rank
            trapezoids += (before + hits / rank) / 2
            precision_sum_at_k += hits / rank if rank <= k else 0.0
    hits_at_k = sum(relevance[:k])
    first = next((rank for rank, relevant in enumerate(relevance, start=1) if relevant), math.inf)
    gain = sum(relevant / math.log2(rank + 1) for rank, relevant in enumerate(relevance[:k], start=1))
    ideal = sum(1 / math.log2(rank + 1) for rank in range(1, min(k, total) + 1))
    return {
        "map_full": precision_sum / total,
        "map_at_k_min": precision_sum_at_k / min(k, total),
        "map_at_k_k": precision_sum_at_k / k,
        "map_at_k_hits": precision_sum_at_k / hits_at_k if hits_at_k else 0.0,
        "map_trapezoid": trapezoids / total,
        "voc11": voc11_reference(relevance),
        "cmc_at_k": float(hits_at_k > 0),
        "recall_at_k": hits_at_k / total,
        "precision_at_k": hits_at_k / k,
        "r_precision": sum(relevance[:total]) / total,
        "mrr": 1 / first if first <= k else 0.0,
        "ndcg_at_k": gain / ideal,
    }


def voc11_reference(relevance: Sequence[int]) -> float:
    """Mean over eleven recalls of the greatest precision at any rank with that recall or more."""
    total = sum(relevance)
    value = 0.0
    for tenth in range(11):
        value += max(
            (
                sum(relevance[:rank]) / rank
                for rank in range(1, len(relevance) + 1)
                if 10 * sum(relevance[:rank]) >= tenth * total
            ),
            default=0.0,
        )
    return value / 11

"""Retrieval metrics over judged rankings.

Notation: rel_r ∈ {0, 1} is the relevance of the item at rank r (from 1), P_r the precision of the first r items, and R
the number of relevant items in the whole gallery, found or not. Every metric averages over queries:
``map_full(ranking)`` is a float, ``map_full.per_query(ranking)`` the values that it averages. The definitions as loops
are in :mod:`headgate.evaluate.retrieval_metrics_reference`.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import Concatenate, Generic, Literal, NamedTuple, ParamSpec

import numpy as np
from jaxtyping import Bool, Float, Int

from headgate.evaluate.checks import check_choice, check_count
from headgate.evaluate.ranking import Ranking

__all__ = [
    "RetrievalMetric",
    "TorchmetricsInputs",
    "cmc_at_k",
    "map_at_k",
    "map_full",
    "map_trapezoid",
    "metric_by_name",
    "mrr",
    "ndcg_at_k",
    "precision_at_k",
    "r_precision",
    "recall_at_k",
    "torchmetrics_inputs",
    "voc11",
]

P = ParamSpec("P")


class RetrievalMetric(Generic[P]):
    """A retrieval metric: called, it gives the mean over queries; ``per_query`` gives one value per query."""

    def __init__(self, per_query: Callable[Concatenate[Ranking, P], Float[np.ndarray, " q"]]) -> None:
        self.per_query = per_query
        functools.update_wrapper(self, per_query)

    def __call__(self, ranking: Ranking, *args: P.args, **kwargs: P.kwargs) -> float:
        """Return the mean over the ranking's queries.

        Raises:
            ValueError: no query has a relevant item.
        """
        if len(ranking.query_rows) == 0:
            raise ValueError(f"at least one query must have a relevant item, got none of {ranking.dropped}")
        return float(self.per_query(ranking, *args, **kwargs).mean())


@RetrievalMetric
def map_full(ranking: Ranking) -> Float[np.ndarray, " q"]:
    """Mean average precision over the whole gallery, ``(1/R) Σ_r P_r rel_r``.

    Without ties this is scikit-learn's ``average_precision_score``.

    Raises:
        ValueError: the ranking does not hold the whole gallery.
    """
    _check_complete(ranking)
    return (_precisions(ranking.relevance) * ranking.relevance).sum(axis=1) / ranking.num_relevant


@RetrievalMetric
def map_at_k(ranking: Ranking, k: int, norm: Literal["min", "k", "hits"] = "min") -> Float[np.ndarray, " q"]:
    """Mean average precision of the first ``k`` ranks, ``Σ_{r≤k} P_r rel_r`` divided by one of three norms.

    Args:
        ranking: at least ``k`` ranks.
        k: the cut.
        norm: ``"min"`` divides by min(R, k), so that a perfect ranking scores 1; ``"k"`` by k (Matryoshka
            Representation Learning); ``"hits"`` by the relevant items among the first k (torchmetrics), for
            comparison only: it rewards rankings that find little.

    Raises:
        ValueError: an unknown norm, or a ranking that is too short.
    """
    check_choice("norm", norm, ("min", "k", "hits"))
    relevance = _first(ranking, k)
    divisor = {
        "min": np.minimum(ranking.num_relevant, k),
        "k": np.full(len(relevance), k),
        "hits": np.maximum(relevance.sum(axis=1), 1),
    }
    return (_precisions(relevance) * relevance).sum(axis=1) / divisor[norm]


@RetrievalMetric
def map_trapezoid(ranking: Ranking) -> Float[np.ndarray, " q"]:
    """Mean average precision by trapezoids, ``Σ over positives of (P_before + P_after)/2 / R``.

    As in the scripts of Oxford5k and Paris6k: at a positive of rank r, ``P_before`` is the precision of the first
    r - 1 items (1 for r = 1) and ``P_after`` that of the first r.

    Raises:
        ValueError: the ranking does not hold the whole gallery.
    """
    _check_complete(ranking)
    after = _precisions(ranking.relevance)
    before = np.concatenate([np.ones((len(after), 1)), after[:, :-1]], axis=1)
    return ((before + after) / 2 * ranking.relevance).sum(axis=1) / ranking.num_relevant


@RetrievalMetric
def voc11(ranking: Ranking) -> Float[np.ndarray, " q"]:
    """Eleven-point interpolated average precision of VOC 2007.

    The mean, over the recalls 0, 0.1, …, 1, of the greatest precision at any rank with at least that recall.

    Raises:
        ValueError: the ranking does not hold the whole gallery.
    """
    _check_complete(ranking)
    hits = ranking.relevance.cumsum(axis=1)
    # The greatest precision at this rank or any later one; recall never falls along a ranking.
    best = np.maximum.accumulate(_precisions(ranking.relevance)[:, ::-1], axis=1)[:, ::-1]
    total: Float[np.ndarray, " q"] = np.zeros(len(hits))
    for tenth in range(11):
        reached = hits * 10 >= tenth * ranking.num_relevant[:, None]  # in integers, so that 3 of 10 reaches 0.3
        at_first = best[np.arange(len(hits)), reached.argmax(axis=1)]
        total += np.where(reached.any(axis=1), at_first, 0.0)
    return total / 11


@RetrievalMetric
def cmc_at_k(ranking: Ranking, k: int) -> Float[np.ndarray, " q"]:
    """Share of queries with at least one relevant item among the first ``k`` (cumulative match, hit rate).

    Raises:
        ValueError: a ranking that is too short.
    """
    return np.asarray(_first(ranking, k).any(axis=1), dtype=np.float64)


@RetrievalMetric
def recall_at_k(ranking: Ranking, k: int, denominator: float | None = None) -> Float[np.ndarray, " q"]:
    """Relevant items among the first ``k``, divided by R.

    Args:
        ranking: at least ``k`` ranks.
        k: the cut.
        denominator: divide by this constant instead; the code of Matryoshka Representation Learning uses 1300, the
            greatest number of training images in a class of ImageNet.

    Raises:
        ValueError: a ranking that is too short, or a denominator that is not positive.
    """
    if denominator is not None and not denominator > 0:
        raise ValueError(f"denominator must be positive, got {denominator}")
    return _first(ranking, k).sum(axis=1) / (ranking.num_relevant if denominator is None else denominator)


@RetrievalMetric
def precision_at_k(ranking: Ranking, k: int) -> Float[np.ndarray, " q"]:
    """Relevant items among the first ``k``, divided by ``k`` (also where fewer than ``k`` exist).

    Raises:
        ValueError: a ranking that is too short.
    """
    return _first(ranking, k).sum(axis=1) / k


@RetrievalMetric
def r_precision(ranking: Ranking) -> Float[np.ndarray, " q"]:
    """Precision among the first R items.

    Raises:
        ValueError: a ranking that is shorter than R.
    """
    relevance = _first(ranking, int(ranking.num_relevant.max()))
    inside = np.arange(relevance.shape[1]) < ranking.num_relevant[:, None]
    return (relevance & inside).sum(axis=1) / ranking.num_relevant


@RetrievalMetric
def mrr(ranking: Ranking, k: int | None = None) -> Float[np.ndarray, " q"]:
    """Mean reciprocal rank: 1 / rank of the first relevant item, 0 if it stands beyond ``k``.

    Args:
        ranking: at least ``k`` ranks.
        k: the cut; ``None`` is the ranking's own length.

    Raises:
        ValueError: a ranking that is too short.
    """
    relevance = ranking.relevance if k is None else _first(ranking, k)
    return np.where(relevance.any(axis=1), 1 / (relevance.argmax(axis=1) + 1.0), 0.0)


@RetrievalMetric
def ndcg_at_k(
    ranking: Ranking, k: int | None = None, gain: Literal["linear", "exponential"] = "linear"
) -> Float[np.ndarray, " q"]:
    """Normalised discounted cumulative gain, ``Σ_{r≤k} g_r / log2(r + 1)`` over that of the best possible ranking.

    Args:
        ranking: at least ``k`` ranks; its gains are 1 or grades.
        k: the cut; ``None`` is the whole gallery.
        gain: ``"linear"`` takes the grade itself (as scikit-learn does), ``"exponential"`` takes ``2^grade - 1``.

    Raises:
        ValueError: an unknown gain, or a ranking that is too short.
    """
    check_choice("gain", gain, ("linear", "exponential"))
    if k is None:
        _check_complete(ranking)
        k = max(1, ranking.gains.shape[1])
    _first(ranking, k)
    if ranking.ideal_gains is None:
        ideal = (np.arange(k) < ranking.num_relevant[:, None]).astype(np.float64)
    else:
        ideal = ranking.ideal_gains[:, :k]
    return _discounted(ranking.gains[:, :k], gain) / _discounted(ideal, gain)


def metric_by_name(name: str) -> Callable[[Ranking], Float[np.ndarray, " q"]]:
    """Return a metric's per-query function by its short name.

    Args:
        name: ``"map_full"``, ``"map_trapezoid"``, ``"voc11"``, ``"r_precision"``, ``"mrr"``, ``"ndcg"``; or, cut at
            rank k, ``"map@k"``, ``"cmc@k"``, ``"recall@k"``, ``"precision@k"``, ``"mrr@k"``, ``"ndcg@k"``.

    Raises:
        ValueError: an unknown name; the message lists those above.
    """
    match = re.fullmatch(r"([a-z0-9_]+?)(?:@([1-9]\d*))?", name) if isinstance(name, str) else None
    if match and match[2] is None and match[1] in _WHOLE:
        return _WHOLE[match[1]].per_query
    if match and match[2] is not None and match[1] in _CUT:
        return functools.partial(_CUT[match[1]].per_query, k=int(match[2]))
    known = [*_WHOLE, *(f"{cut}@k" for cut in _CUT)]
    raise ValueError(f"metric must be one of {', '.join(known)}, got {name!r}")


class TorchmetricsInputs(NamedTuple):
    """What torchmetrics' retrieval metrics take: one entry per ranked item."""

    preds: Float[np.ndarray, " items"]
    target: Bool[np.ndarray, " items"]
    indexes: Int[np.ndarray, " items"]


def torchmetrics_inputs(ranking: Ranking) -> TorchmetricsInputs:
    """Return a ranking as the flat inputs of torchmetrics' retrieval metrics.

    torchmetrics takes every item with a score of at most 0 for irrelevant, so raw cosines silently lose positives;
    ``preds`` are reciprocal ranks, which are positive and fall along the ranking. Its average precision at k divides
    by the hits in the first k: compare with ``map_at_k(ranking, k, norm="hits")``.
    """
    rows, ranks = np.nonzero(np.arange(ranking.gains.shape[1]) < ranking.num_ranked[:, None])
    return TorchmetricsInputs(1.0 / (ranks + 1.0), ranking.relevance[rows, ranks], rows)


def _precisions(relevance: Bool[np.ndarray, "q k"]) -> Float[np.ndarray, "q k"]:
    return relevance.cumsum(axis=1) / np.arange(1, relevance.shape[1] + 1)


def _check_complete(ranking: Ranking) -> None:
    short = ranking.num_ranked != ranking.num_candidates
    if short.any():
        row = int(short.argmax())
        raise ValueError(
            f"ranking must hold the whole gallery for this metric, got {ranking.num_ranked[row]} of "
            f"{ranking.num_candidates[row]} items for query {ranking.query_rows[row]}"
        )


def _first(ranking: Ranking, k: int) -> Bool[np.ndarray, "q k"]:
    k = check_count("k", k)
    short = ranking.num_ranked < np.minimum(k, ranking.num_candidates)
    if short.any():
        row = int(short.argmax())
        raise ValueError(
            f"ranking must reach rank k={k}, got {ranking.num_ranked[row]} items for query {ranking.query_rows[row]}"
        )
    return ranking.relevance[:, :k]


def _discounted(gains: Float[np.ndarray, "q k"], gain: str) -> Float[np.ndarray, " q"]:
    values = np.exp2(gains) - 1 if gain == "exponential" else gains
    return (values / np.log2(np.arange(2, gains.shape[1] + 2))).sum(axis=1)


_WHOLE: dict[str, RetrievalMetric] = {
    "map_full": map_full,
    "map_trapezoid": map_trapezoid,
    "voc11": voc11,
    "r_precision": r_precision,
    "mrr": mrr,
    "ndcg": ndcg_at_k,
}
_CUT: dict[str, RetrievalMetric] = {
    "map": map_at_k,
    "cmc": cmc_at_k,
    "recall": recall_at_k,
    "precision": precision_at_k,
    "mrr": mrr,
    "ndcg": ndcg_at_k,
}

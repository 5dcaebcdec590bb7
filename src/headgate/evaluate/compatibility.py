"""Backward compatibility of embedding models: can new queries search an old gallery?

M(a→b) is a retrieval metric with the queries of model a and the gallery of model b. Across versions, embeddings are
compared on their first ``compatible_dim`` coordinates. The criterion of backward-compatible training (BCT) is
``M(new→old) > M(old→old)``; with an independently trained new model as the upper bound,

``P_comp = (M(new→old) - M(old→old)) / (M(ind→ind) - M(old→old))`` and ``P_up = (M(new→new) - M(ind→ind)) / M(ind→ind)``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from headgate.evaluate.checks import (
    Array,
    ZeroPolicy,
    as_labels,
    as_tensor,
    check_choice,
    check_count,
    check_matrix,
    check_same_length,
    normalize_rows,
)
from headgate.evaluate.ranking import Ranking
from headgate.evaluate.retrieval import Exclude, RetrievalReport, retrieval_report
from headgate.evaluate.search import DistanceMetric
from headgate.evaluate.statistics import Effect, paired_bootstrap
from headgate.evaluate.undefined import undefined

__all__ = [
    "CompatibilityMatrix",
    "CompatibilityReport",
    "CompatibilityScore",
    "PairwiseCompatibility",
    "compatibility_matrix",
    "compatibility_report",
    "pairwise_compatibility",
]


@dataclass(frozen=True)
class CompatibilityScore:
    """Compatibility by one retrieval metric.

    Attributes:
        old_old: M(old→old).
        new_old: M(new→old), across versions.
        new_new: M(new→new).
        independent: M(ind→ind).
        compatible: the criterion M(new→old) > M(old→old).
        gain: M(new→old) - M(old→old) with its paired bootstrap interval over queries and one-sided p-value.
        p_comp: share of the possible gain that old galleries already get; nan where M(ind→ind) ≤ M(old→old).
        p_up: relative loss (below 0) or gain of the new model against the independent one; nan where M(ind→ind) = 0.
        reasons: why ``p_comp`` or ``p_up`` is nan.
    """

    old_old: float
    new_old: float
    new_new: float
    independent: float
    compatible: bool
    gain: Effect
    p_comp: float
    p_up: float
    reasons: tuple[str, ...]


@dataclass(frozen=True)
class CompatibilityReport:
    """Compatibility of a new model with an old one.

    Attributes:
        scores: retrieval metric → its figures.
        compatible_dim: coordinates that were compared across versions.
        dropped: queries without a relevant item.
    """

    scores: dict[str, CompatibilityScore]
    compatible_dim: int
    dropped: int


class CompatibilityMatrix(NamedTuple):
    """Compatibility over a sequence of versions.

    Attributes:
        values: ``(V, V)``; entry (i, j) is M(i→j) for j ≤ i, nan above the diagonal.
        share: share of the pairs j < i with M(i→j) > M(j→j).
    """

    values: Float[np.ndarray, "v v"]
    share: float


class PairwiseCompatibility(NamedTuple):
    """How many pairs of items i ≠ j keep the order that compatibility asks for; nan where there is no such pair.

    Attributes:
        same_class: share of same-class pairs with d(new_i, old_j) ≤ d(old_i, old_j).
        different_class: share of different-class pairs with d(new_i, old_j) ≥ d(old_i, old_j).
    """

    same_class: float
    different_class: float


def compatibility_report(
    q_new: Float[Array, "q d_new"],
    g_new: Float[Array, "n d_new"],
    q_old: Float[Array, "q d_old"],
    g_old: Float[Array, "n d_old"],
    q_independent: Float[Array, "q d_ind"],
    g_independent: Float[Array, "n d_ind"],
    query_labels: Int[Array, " q"],
    gallery_labels: Int[Array, " n"] | None = None,
    *,
    compatible_dim: int | None = None,
    metrics: Sequence[str] | Mapping[str, Callable[[Ranking], Float[np.ndarray, " q"]]] = ("cmc@1", "map_full"),
    metric: DistanceMetric = "cosine",
    exclude: Exclude = "none",
    resamples: int = 10_000,
    seed: int = 0,
    **retrieval: Any,
) -> CompatibilityReport:
    """Judge a new model against the old one and an independent one, on one query set and one gallery.

    Args:
        q_new: ``(Q, d_new)`` queries of the new model.
        g_new: ``(N, d_new)`` gallery of the new model.
        q_old: ``(Q, d_old)``.
        g_old: ``(N, d_old)``.
        q_independent: ``(Q, d)`` of the new model trained without regard to the old one.
        g_independent: ``(N, d)``.
        query_labels: ``(Q,)`` integers.
        gallery_labels: ``(N,)`` integers; ``None`` where the gallery is the query set.
        compatible_dim: coordinates to compare across versions, taken from the front; default d_old, which a new model
            that is narrower cannot offer.
        metrics: as in :func:`retrieval_report`.
        metric: how vectors are compared; published inner products of unnormalised embeddings need ``"ip"``.
        exclude: as in :func:`retrieval_report`; with ``"self"`` pass ``query_ids`` and ``gallery_ids`` too.
        resamples: of the queries, for the paired bootstrap.
        seed: of the bootstrap.
        **retrieval: further keywords of :func:`retrieval_report` (``query_ids``, ``gallery_ids``, ``mask``, ``k``,
            ``chunk``, ``zero``).

    Raises:
        TypeError: labels or ids are not integers.
        ValueError: bad shapes or values, or no known compatible dimension.
    """
    check_same_length(q_new=q_new, q_old=q_old, q_independent=q_independent)
    check_same_length(g_new=g_new, g_old=g_old, g_independent=g_independent)
    dim = _compatible_dim(check_matrix("q_new", q_new)[1], check_matrix("g_old", g_old)[1], compatible_dim)
    gallery_labels = query_labels if gallery_labels is None else gallery_labels

    def measure(queries: Array, gallery: Array) -> RetrievalReport:
        return retrieval_report(
            queries, gallery, query_labels, gallery_labels, metrics, metric=metric, exclude=exclude, **retrieval
        )

    old, cross = measure(q_old, g_old), measure(q_new[:, :dim], g_old[:, :dim])
    new, independent = measure(q_new, g_new), measure(q_independent, g_independent)
    scores = {}
    for name in old.values:
        gain = paired_bootstrap(cross.per_query[name], old.per_query[name], resamples=resamples, seed=seed)
        scores[name] = _score(old.values[name], cross.values[name], new.values[name], independent.values[name], gain)
    return CompatibilityReport(scores, dim, old.dropped)


def compatibility_matrix(
    versions: Sequence[tuple[Float[Array, "q dim"], Float[Array, "n dim"]]],
    query_labels: Int[Array, " q"],
    gallery_labels: Int[Array, " n"] | None = None,
    *,
    compatible_dim: int | None = None,
    score: str | Callable[[Ranking], Float[np.ndarray, " q"]] = "cmc@1",
    metric: DistanceMetric = "cosine",
    exclude: Exclude = "none",
    **retrieval: Any,
) -> CompatibilityMatrix:
    """Measure every version's queries against its own and every earlier version's gallery.

    Args:
        versions: at least two pairs ``(queries (Q, d_i), gallery (N, d_i))``, oldest first.
        query_labels: ``(Q,)`` integers.
        gallery_labels: ``(N,)`` integers; ``None`` where the gallery is the query set.
        compatible_dim: coordinates to compare across versions; default the older version's width.
        score: a retrieval metric, as in :func:`retrieval_report`.
        metric: how vectors are compared.
        exclude: as in :func:`retrieval_report`.
        **retrieval: further keywords of :func:`retrieval_report`.

    Raises:
        ValueError: fewer than two versions, bad shapes or values, or no known compatible dimension.
    """
    if len(versions) < 2:
        raise ValueError(f"versions must hold at least two models, got {len(versions)}")
    gallery_labels = query_labels if gallery_labels is None else gallery_labels
    metrics = (score,) if isinstance(score, str) else {"score": score}
    values = np.full((len(versions), len(versions)), np.nan)
    for i, (queries, own_gallery) in enumerate(versions):
        for j, (_, gallery) in enumerate(versions[: i + 1]):
            left, right = queries, own_gallery
            if j < i:
                dim = _compatible_dim(
                    check_matrix(f"versions[{i}]", queries)[1],
                    check_matrix(f"versions[{j}]", gallery)[1],
                    compatible_dim,
                )
                left, right = queries[:, :dim], gallery[:, :dim]
            report = retrieval_report(
                left, right, query_labels, gallery_labels, metrics, metric=metric, exclude=exclude, **retrieval
            )
            values[i, j] = next(iter(report.values.values()))
    later, earlier = np.tril_indices(len(versions), -1)
    return CompatibilityMatrix(values, float((values[later, earlier] > values[earlier, earlier]).mean()))


def pairwise_compatibility(
    new: Float[Array, "n d_new"],
    old: Float[Array, "n d_old"],
    labels: Int[Array, " n"],
    *,
    compatible_dim: int | None = None,
    metric: DistanceMetric = "l2",
    chunk: int = 2048,
    zero: ZeroPolicy = "error",
) -> PairwiseCompatibility:
    """Return the share of pairs of items that fulfil the pairwise definition of backward compatibility.

    A diagnostic, far stricter than the criterion: same-class pairs must not move apart and different-class pairs must
    not move closer when item i is embedded anew and item j stays old.

    Args:
        new: ``(N, d_new)``.
        old: ``(N, d_old)`` of the same items.
        labels: ``(N,)`` integers.
        compatible_dim: coordinates to compare, taken from the front; default d_old.
        metric: ``"l2"``, or minus the ``"cosine"`` or inner product ``"ip"`` as the distance.
        chunk: rows per block; the result does not depend on it.
        zero: as in :func:`headgate.evaluate.search`.

    Raises:
        TypeError: labels are not integers.
        ValueError: bad shapes or values, or no known compatible dimension.
    """
    check_choice("metric", metric, ("cosine", "l2", "ip"))
    chunk = check_count("chunk", chunk)
    dim = _compatible_dim(check_matrix("new", new)[1], check_matrix("old", old)[1], compatible_dim)
    num_items = check_same_length(new=new, old=old)
    classes = torch.from_numpy(as_labels("labels", labels, length=num_items))
    left = _prepare("new", new, dim, metric, zero)
    right = _prepare("old", old, dim, metric, zero)
    kept = {True: 0, False: 0}
    count = {True: 0, False: 0}
    for start in range(0, num_items, chunk):
        rows = slice(start, min(start + chunk, num_items))
        for begin in range(0, num_items, chunk):
            columns = slice(begin, min(begin + chunk, num_items))
            # One item and one operation on both sides, so that an unchanged item has exactly equal distances.
            across = _distances(left[rows], right[columns], metric)
            within = _distances(right[rows], right[columns], metric)
            same = classes[rows, None] == classes[columns]
            other = torch.arange(rows.start, rows.stop)[:, None] != torch.arange(columns.start, columns.stop)
            kept[True] += int((same & other & (across <= within)).sum())
            count[True] += int((same & other).sum())
            kept[False] += int((~same & (across >= within)).sum())
            count[False] += int((~same).sum())
    share = {
        same: kept[same] / count[same]
        if count[same]
        else undefined("pairwise_compatibility", f"no {'same' if same else 'different'}-class pair")
        for same in (True, False)
    }
    return PairwiseCompatibility(share[True], share[False])


def _score(old: float, cross: float, new: float, independent: float, gain: Effect) -> CompatibilityScore:
    p_comp = p_up = math.nan
    reasons = []
    if independent - old > 0:
        p_comp = (cross - old) / (independent - old)
    else:
        reasons.append(f"p_comp: the independent model ({independent:.4g}) is not above the old one ({old:.4g})")
    if independent != 0:
        p_up = (new - independent) / independent
    else:
        reasons.append("p_up: the independent model scores 0")
    return CompatibilityScore(old, cross, new, independent, cross > old, gain, p_comp, p_up, tuple(reasons))


def _compatible_dim(new_dim: int, old_dim: int, wanted: int | None) -> int:
    if wanted is not None:
        return check_count("compatible_dim", wanted, high=min(new_dim, old_dim))
    if new_dim < old_dim:
        raise ValueError(
            f"compatible_dim must be given where the new embedding is narrower than the old one, got {new_dim} < {old_dim}"
        )
    return old_dim


def _prepare(name: str, values: Array, dim: int, metric: str, zero: ZeroPolicy) -> Float[Tensor, "n dim"]:
    rows = as_tensor(name, values, dtype=torch.float64)[:, :dim].cpu().contiguous()
    return normalize_rows(name, rows, zero=zero) if metric == "cosine" else rows


def _distances(left: Float[Tensor, "a d"], right: Float[Tensor, "b d"], metric: str) -> Float[Tensor, "a b"]:
    if metric == "l2":
        return torch.cdist(left, right, compute_mode="donot_use_mm_for_euclid_dist")
    return -(left @ right.T)

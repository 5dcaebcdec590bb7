"""Rankings of a gallery, judged: what stands at every rank, and what there was to find.

An item is relevant to a query because it carries the same label (:func:`rank_by_label`), because it stands in the
query's list of positives (:func:`rank_by_positives`, with junk that counts as neither right nor wrong), or because a
table says so (:func:`rank_scores`). Queries without a relevant item have no precision: they are dropped and counted.
The metrics are in :mod:`headgate.evaluate.retrieval_metrics`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int, Shaped

from headgate.evaluate.checks import Array, as_labels, as_scores, check_count, to_numpy

__all__ = ["Ranking", "rank_by_label", "rank_by_positives", "rank_scores"]


@dataclass(frozen=True)
class Ranking:
    """What stands at every rank, and what there was to find.

    Attributes:
        gains: ``(Q, K)``; above 0 where the item at that rank is relevant (1, or a grade), 0 elsewhere and in padding.
        num_ranked: ``(Q,)`` items in each row before the padding.
        num_relevant: ``(Q,)`` R, all positive.
        num_candidates: ``(Q,)`` gallery items that could have been ranked (without the query itself, junk, excluded).
        ideal_gains: ``(Q, M)`` grades of the relevant items, largest first, padded with 0; ``None`` if every gain is 1.
        query_rows: ``(Q,)`` which of the original queries these are.
        dropped: number of original queries without a relevant item.
    """

    gains: Float[np.ndarray, "q k"] | Bool[np.ndarray, "q k"]
    num_ranked: Int[np.ndarray, " q"]
    num_relevant: Int[np.ndarray, " q"]
    num_candidates: Int[np.ndarray, " q"]
    ideal_gains: Float[np.ndarray, "q m"] | None
    query_rows: Int[np.ndarray, " q"]
    dropped: int

    @property
    def relevance(self) -> Bool[np.ndarray, "q k"]:
        """Which ranks hold a relevant item."""
        return self.gains > 0


def rank_by_label(
    ids: Int[Array, "q k"],
    query_labels: Int[Array, " q"],
    gallery_labels: Int[Array, " n"],
    *,
    gallery_ids: Int[Array, " n"] | None = None,
    query_ids: Int[Array, " q"] | None = None,
    excluded: Bool[Array, "q n"] | None = None,
) -> Ranking:
    """Judge rankings by class: a gallery item is relevant if its label is the query's.

    Args:
        ids: ``(Q, K)`` gallery ids in rank order, -1 for missing.
        query_labels: ``(Q,)`` integers.
        gallery_labels: ``(N,)`` integers.
        gallery_ids: ``(N,)`` unique ids of the gallery items; default 0 … N - 1.
        query_ids: ``(Q,)`` ids of the queries, where each query itself was left out of its ranking: it is then no
            relevant item either.
        excluded: ``(Q, N)`` booleans, gallery items that were left out of each ranking.

    Raises:
        TypeError: labels or ids are not integers.
        ValueError: bad shapes, an id that the gallery lacks or that stands twice in a ranking, or an excluded item
            in a ranking.
    """
    labels = as_labels("gallery_labels", gallery_labels)
    wanted = as_labels("query_labels", query_labels)
    table = _ranked_ids(ids, len(wanted))
    names = np.arange(len(labels)) if gallery_ids is None else as_labels("gallery_ids", gallery_ids, length=len(labels))
    places = _places(names, table)
    present = table >= 0
    _refuse(present & (places < 0), table, "ids must be ids of the gallery")
    classes, counts = np.unique(labels, return_counts=True)
    nearest = np.minimum(np.searchsorted(classes, wanted), len(classes) - 1)
    num_relevant = np.where(classes[nearest] == wanted, counts[nearest], 0)
    num_candidates = np.full(len(wanted), len(labels))
    left_out = np.zeros(table.shape, dtype=bool)
    banned = None if excluded is None else _as_mask("excluded", excluded, (len(wanted), len(labels)))
    if banned is not None:
        same = labels == wanted[:, None]
        num_relevant = num_relevant - (banned & same).sum(axis=1)
        num_candidates = num_candidates - banned.sum(axis=1)
        left_out |= present & np.take_along_axis(banned, np.maximum(places, 0), axis=1)
    if query_ids is not None:
        own = _places(names, as_labels("query_ids", query_ids, length=len(wanted)))
        left_out |= present & (places == own[:, None])
        counted = own >= 0
        if banned is not None:
            counted &= ~banned[np.arange(len(own)), np.maximum(own, 0)]
        num_relevant = num_relevant - (counted & (labels[np.maximum(own, 0)] == wanted))
        num_candidates = num_candidates - counted
    _refuse(left_out, table, "ids must not hold items that are left out")
    relevance = present & (labels[np.maximum(places, 0)] == wanted[:, None])
    return _judged(relevance, present, num_relevant, num_candidates, None)


def rank_by_positives(
    ids: Int[Array, "q k"],
    positives: Sequence[Int[Array, " positives"]],
    gallery_size: int,
    *,
    junk: Sequence[Int[Array, " junk"]] | None = None,
    grades: Sequence[Float[Array, " positives"]] | None = None,
) -> Ranking:
    """Judge rankings by a list of relevant items per query, as Oxford5k and Paris6k do.

    Args:
        ids: ``(Q, K)`` gallery ids in rank order, -1 for missing.
        positives: Q vectors of ids.
        gallery_size: N, the number of items that were ranked, junk included.
        junk: Q vectors of ids that are removed before ranks are counted: neither right nor wrong.
        grades: Q vectors of positive gains, one for each positive; default 1.

    Raises:
        TypeError: ids are not integers.
        ValueError: bad shapes, an id twice in a ranking or list, or a positive that is junk.
    """
    gallery_size = check_count("gallery_size", gallery_size)
    table = _ranked_ids(ids, len(positives))
    good = [_id_list("positives", row, entry) for row, entry in enumerate(positives)]
    bad = [np.zeros(0, dtype=np.int64)] * len(good)
    if junk is not None:
        bad = [_id_list("junk", row, entry) for row, entry in enumerate(junk)]
    values = [np.ones(len(entry)) for entry in good]
    if grades is not None:
        values = [to_numpy("grades", entry).astype(np.float64) for entry in grades]
    for name, lists in (("junk", bad), ("grades", values)):
        if len(lists) != len(good):
            raise ValueError(f"{name} must have one entry per query: expected {len(good)}, got {len(lists)}")
    gains = np.zeros(table.shape)
    present = np.zeros(table.shape, dtype=bool)
    ideal = np.zeros((len(good), max(map(len, good), default=0)))
    for row, (right, ignored, grade) in enumerate(zip(good, bad, values, strict=True)):
        if np.isin(right, ignored).any():
            raise ValueError(f"positives and junk must not share items, got a shared id for query {row}")
        if grade.shape != right.shape or not np.isfinite(grade).all() or (grade <= 0).any():
            raise ValueError(f"grades must hold one positive gain per positive, got {grade.tolist()} for query {row}")
        kept = table[row][(table[row] >= 0) & ~np.isin(table[row], ignored)]
        order = np.argsort(right)
        place = np.minimum(np.searchsorted(right[order], kept), max(0, len(right) - 1))
        present[row, : len(kept)] = True
        if len(right):
            found = right[order][place] == kept
            gains[row, : len(kept)] = np.where(found, grade[order][place], 0.0)
        ideal[row, : len(right)] = np.sort(grade)[::-1]
    counts = np.array([len(entry) for entry in good])
    candidates = gallery_size - np.array([len(entry) for entry in bad])
    if (candidates < counts).any() or (present.sum(axis=1) > candidates).any():
        raise ValueError(f"gallery_size must count every item that can be ranked, got {gallery_size}")
    return _judged(gains, present, counts, candidates, None if grades is None else ideal)


def rank_scores(
    scores: Float[Array, "q n"], gains: Shaped[Array, "q n"], *, junk: Bool[Array, "q n"] | None = None
) -> Ranking:
    """Rank all items by score, equal scores by their position, and judge them.

    Args:
        scores: ``(Q, N)``, finite; higher comes first.
        gains: ``(Q, N)``; booleans, or grades of at least 0 where 0 is irrelevant.
        junk: ``(Q, N)`` booleans, items that are removed before ranks are counted.

    Raises:
        TypeError: not arrays of real numbers.
        ValueError: bad shapes or values, or an item both relevant and junk.
    """
    values = as_scores("scores", scores, shape=(None, None), axes="query, item")
    graded = as_scores("gains", gains, shape=values.shape, axes="query, item")
    if (graded < 0).any():
        raise ValueError(f"gains must be at least 0, got {graded.min()}")
    ignored = np.zeros(values.shape, dtype=bool)
    if junk is not None:
        ignored = _as_mask("junk", junk, values.shape)
        if ((graded > 0) & ignored).any():
            raise ValueError("gains and junk must not mark the same items, got an item that is relevant and junk")
    order = np.argsort(-values, axis=1, kind="stable")
    behind = np.take_along_axis(ignored, order, axis=1)
    order = np.take_along_axis(order, np.argsort(behind, axis=1, kind="stable"), axis=1)
    present = ~np.take_along_axis(ignored, order, axis=1)
    binary = bool(np.isin(graded, (0, 1)).all())
    ideal = None if binary else -np.sort(-graded, axis=1)
    ranked = np.take_along_axis(graded, order, axis=1)
    return _judged(ranked, present, (graded > 0).sum(axis=1), present.sum(axis=1), ideal)


def _judged(
    gains: np.ndarray,
    present: Bool[np.ndarray, "q k"],
    num_relevant: Int[np.ndarray, " q"],
    num_candidates: Int[np.ndarray, " q"],
    ideal_gains: Float[np.ndarray, "q m"] | None,
) -> Ranking:
    kept = np.flatnonzero(num_relevant > 0)
    return Ranking(
        gains=gains[kept],
        num_ranked=present.sum(axis=1)[kept],
        num_relevant=num_relevant[kept],
        num_candidates=num_candidates[kept],
        ideal_gains=None if ideal_gains is None else ideal_gains[kept],
        query_rows=kept,
        dropped=len(num_relevant) - len(kept),
    )


def _ranked_ids(ids: Array, num_queries: int) -> Int[np.ndarray, "q k"]:
    table = to_numpy("ids", ids)
    if table.dtype.kind not in "iu":
        raise TypeError(f"ids must hold integers, got dtype {table.dtype}")
    if table.ndim != 2 or table.shape[0] != num_queries or table.shape[1] == 0:
        raise ValueError(f"ids must have shape (q, k) with q={num_queries} and k > 0, got {table.shape}")
    table = table.astype(np.int64, copy=False)
    missing = table < 0
    if (missing[:, :-1] & ~missing[:, 1:]).any():
        raise ValueError("ids must hold missing items (-1) at the end of a row only, got one before another id")
    in_order = np.sort(table, axis=1)
    twice = ((in_order[:, 1:] == in_order[:, :-1]) & (in_order[:, 1:] >= 0)).any(axis=1)
    if twice.any():
        raise ValueError(f"ids must not repeat within a ranking, got a repeated id in row {int(twice.argmax())}")
    return table


def _places(names: Int[np.ndarray, " n"], wanted: Int[np.ndarray, "*shape"]) -> Int[np.ndarray, "*shape"]:
    """Row of each wanted id in the gallery, -1 where the gallery lacks it."""
    order = np.argsort(names, kind="stable")
    ordered = names[order]
    if (ordered[1:] == ordered[:-1]).any():
        raise ValueError(f"gallery_ids must be unique, got {ordered[1:][ordered[1:] == ordered[:-1]][0]} twice")
    nearest = np.minimum(np.searchsorted(ordered, wanted), len(ordered) - 1)
    return np.where(ordered[nearest] == wanted, order[nearest], -1)


def _refuse(wrong: Bool[np.ndarray, "q k"], table: Int[np.ndarray, "q k"], rule: str) -> None:
    if wrong.any():
        row, rank = np.argwhere(wrong)[0]
        raise ValueError(f"{rule}, got {table[row, rank]} in row {row}")


def _as_mask(name: str, values: Array, shape: tuple[int, ...]) -> Bool[np.ndarray, "*shape"]:
    mask = to_numpy(name, values)
    if mask.dtype != np.bool_ or mask.shape != shape:
        raise ValueError(f"{name} must be booleans of shape {shape}, got {mask.dtype} {mask.shape}")
    return mask


def _id_list(name: str, row: int, entry: Array) -> Int[np.ndarray, " n"]:
    array = to_numpy(name, entry)
    if array.size == 0:
        return np.zeros(0, dtype=np.int64)
    array = as_labels(name, array)
    if len(np.unique(array)) != len(array):
        raise ValueError(f"{name} must not repeat an item, got a repeated id for query {row}")
    return array

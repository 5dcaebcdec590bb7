"""Retrieval: rank a gallery for every query, and report accuracy together with its cost."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from headgate.evaluate.checks import (
    Array,
    ZeroPolicy,
    as_labels,
    check_choice,
    check_count,
    check_matrix,
    to_numpy,
)
from headgate.evaluate.ranking import Ranking, rank_by_label
from headgate.evaluate.retrieval_metrics import metric_by_name
from headgate.evaluate.search import DistanceMetric, Exclusion, Neighbors, build_index, search_excluding

__all__ = ["Exclude", "RetrievalReport", "SearchCost", "retrieval_report", "retrieve"]

Exclude: TypeAlias = Literal["none", "self", "mask"]


@dataclass(frozen=True)
class SearchCost:
    """What a search costs.

    Attributes:
        bytes_per_item: memory of one gallery item in the index.
        flops_per_query: multiplications and additions per query: ``2 d N`` for an exact search; for another index the
            model ``2 d log2 N`` of a graph search (its true number depends on the data).
        seconds: wall time of the search and the metrics; the only number here that differs from run to run.
        threads: threads of torch during the search.
    """

    bytes_per_item: float
    flops_per_query: float
    seconds: float
    threads: int


@dataclass(frozen=True)
class RetrievalReport:
    """Retrieval accuracy and its cost.

    Attributes:
        values: metric → mean over the queries that have a relevant item.
        per_query: metric → ``(Q',)`` the values that were averaged, for a paired bootstrap.
        query_rows: ``(Q',)`` which queries these are.
        dropped: number of queries without a relevant item.
        cost: memory, operations and time.
    """

    values: dict[str, float]
    per_query: dict[str, Float[np.ndarray, " q"]]
    query_rows: Int[np.ndarray, " q"]
    dropped: int
    cost: SearchCost


def retrieve(
    queries: Float[Array, "q dim"],
    gallery: Float[Array, "n dim"],
    k: int | None = None,
    metric: DistanceMetric = "cosine",
    index: Any = "flat",
    exclude: Exclude = "none",
    *,
    query_ids: Int[Array, " q"] | None = None,
    gallery_ids: Int[Array, " n"] | None = None,
    mask: Bool[Array, "q n"] | None = None,
    chunk: int = 2048,
    zero: ZeroPolicy = "error",
) -> Neighbors:
    """Rank the gallery for every query; equal scores stand in the order of the gallery ids.

    Args:
        queries: ``(Q, d)``, finite.
        gallery: ``(N, d)``, finite.
        k: ranks to return, in [1, N]; ``None`` ranks the whole gallery.
        metric: ``"cosine"``, ``"l2"`` or ``"ip"``.
        index: ``"flat"`` (exact), ``"hnsw"`` or a faiss index over the gallery; see :func:`headgate.evaluate.search`.
        exclude: ``"self"`` leaves out the gallery item that has the query's own id (give ``query_ids``), ``"mask"``
            those that ``mask`` marks.
        query_ids: ``(Q,)`` integers.
        gallery_ids: ``(N,)`` unique integers; default 0 … N - 1.
        mask: ``(Q, N)`` booleans, True for what to leave out.
        chunk: rows per block; the result does not depend on it.
        zero: ``"error"`` refuses zero vectors under the cosine, ``"ignore"`` gives them cosine 0.

    Returns:
        ids ``(Q, k)`` of the gallery and scores ``(Q, k)``; -1 and minus infinity where fewer than ``k`` remain.

    Raises:
        TypeError: ids are not integers.
        ValueError: bad shapes or values, repeated gallery ids, or ``exclude`` without what it needs.
    """
    check_choice("exclude", exclude, ("none", "self", "mask"))
    num_queries, _ = check_matrix("queries", queries)
    num_rows, _ = check_matrix("gallery", gallery)
    names = _gallery_ids(gallery_ids, num_rows)
    exclusion = _exclusion(exclude, names, query_ids, mask, (num_queries, num_rows))
    k = num_rows if k is None else k
    order = _order_of_ids(names, index)
    if order is None:
        rows = search_excluding(queries, gallery, k, exclusion, metric=metric, index=index, chunk=chunk, zero=zero)
        return Neighbors(np.where(rows.ids < 0, -1, names[rows.ids]), rows.scores)
    # The search breaks ties by row, so the rows are put in the order of their ids.
    gallery, names, inverse = _take(gallery, order), names[order], np.argsort(order)
    exclusion = Exclusion(
        own=None if exclusion.own is None else np.where(exclusion.own < 0, -1, inverse[exclusion.own]),
        mask=None if exclusion.mask is None else exclusion.mask[:, order],
    )
    rows = search_excluding(queries, gallery, k, exclusion, metric=metric, index=index, chunk=chunk, zero=zero)
    return Neighbors(np.where(rows.ids < 0, -1, names[rows.ids]), rows.scores)


def retrieval_report(
    queries: Float[Array, "q dim"],
    gallery: Float[Array, "n dim"],
    query_labels: Int[Array, " q"],
    gallery_labels: Int[Array, " n"],
    metrics: Sequence[str] | Mapping[str, Callable[[Ranking], Float[np.ndarray, " q"]]] = ("map_full", "cmc@1"),
    k: int | None = None,
    metric: DistanceMetric = "cosine",
    index: Any = "flat",
    exclude: Exclude = "none",
    *,
    query_ids: Int[Array, " q"] | None = None,
    gallery_ids: Int[Array, " n"] | None = None,
    mask: Bool[Array, "q n"] | None = None,
    chunk: int = 2048,
    zero: ZeroPolicy = "error",
) -> RetrievalReport:
    """Retrieve by class and measure, in blocks of queries, so that no full distance matrix is ever held.

    Args:
        queries: ``(Q, d)``, finite.
        gallery: ``(N, d)``, finite.
        query_labels: ``(Q,)`` integers.
        gallery_labels: ``(N,)`` integers.
        metrics: names for :func:`metric_by_name`, or name → function from a :class:`Ranking` to one value per query,
            such as ``functools.partial(map_at_k.per_query, k=10, norm="k")``.
        k: ranks to look at; ``None`` is the whole gallery, which ``map_full`` needs.
        metric: as in :func:`retrieve`.
        index: as in :func:`retrieve`.
        exclude: as in :func:`retrieve`; what is left out counts as no relevant item either.
        query_ids: as in :func:`retrieve`.
        gallery_ids: as in :func:`retrieve`.
        mask: as in :func:`retrieve`.
        chunk: as in :func:`retrieve`.
        zero: as in :func:`retrieve`.

    Raises:
        TypeError: labels or ids are not integers.
        ValueError: bad shapes or values, an unknown metric, or no query with a relevant item.
    """
    functions = dict(metrics) if isinstance(metrics, Mapping) else {name: metric_by_name(name) for name in metrics}
    num_queries, _ = check_matrix("queries", queries)
    num_rows, dim = check_matrix("gallery", gallery)
    wanted = as_labels("query_labels", query_labels, length=num_queries)
    labels = as_labels("gallery_labels", gallery_labels, length=num_rows)
    names = _gallery_ids(gallery_ids, num_rows)
    banned = _exclusion(exclude, names, query_ids, mask, (num_queries, num_rows)).mask
    own_ids = None
    if exclude == "self" and query_ids is not None:
        own_ids = as_labels("query_ids", query_ids, length=num_queries)
    k = num_rows if k is None else check_count("k", k, high=num_rows)
    started = time.perf_counter()
    order = _order_of_ids(names, index)
    if order is not None:
        gallery, names, labels = _take(gallery, order), names[order], labels[order]
        banned = None if banned is None else banned[:, order]
    if isinstance(index, str) and index == "hnsw":
        index = build_index(gallery, kind="hnsw", metric=metric, ef_search=max(64, k), zero=zero)
    parts: dict[str, list[np.ndarray]] = {name: [] for name in functions}
    kept = []
    step = max(1, check_count("chunk", chunk) ** 2 // k)
    for start in range(0, num_queries, step):
        rows = slice(start, start + step)
        left_out = None if banned is None else banned[rows]
        own = None if own_ids is None else own_ids[rows]
        ids, _ = retrieve(
            queries[rows], gallery, k, metric, index, exclude,
            query_ids=own, gallery_ids=names, mask=left_out, chunk=chunk, zero=zero,
        )  # fmt: skip
        ranking = rank_by_label(ids, wanted[rows], labels, gallery_ids=names, query_ids=own, excluded=left_out)
        if len(ranking.query_rows):
            kept.append(ranking.query_rows + start)
            for name, function in functions.items():
                parts[name].append(np.asarray(function(ranking), dtype=np.float64))
    if not kept:
        raise ValueError(f"at least one query must have a relevant item, got none of {num_queries}")
    seconds = time.perf_counter() - started
    query_rows = np.concatenate(kept)
    per_query = {name: np.concatenate(values) for name, values in parts.items()}
    return RetrievalReport(
        values={name: float(values.mean()) for name, values in per_query.items()},
        per_query=per_query,
        query_rows=query_rows,
        dropped=num_queries - len(query_rows),
        cost=SearchCost(
            bytes_per_item=_bytes_per_item(gallery, index),
            flops_per_query=2.0 * dim * (num_rows if isinstance(index, str) else math.log2(max(2, num_rows))),
            seconds=seconds,
            threads=torch.get_num_threads(),
        ),
    )


def _order_of_ids(names: Int[np.ndarray, " n"], index: Any) -> Int[np.ndarray, " n"] | None:
    """The order that sorts the gallery by id, or None where it is sorted already."""
    if (names[1:] > names[:-1]).all():
        return None
    if not isinstance(index, str):
        raise ValueError("gallery_ids must be rising where index is a faiss index, so that ties keep their order")
    return np.argsort(names, kind="stable")


def _take(gallery: Array, order: Int[np.ndarray, " n"]) -> Array:
    return gallery[torch.from_numpy(order).to(gallery.device)] if isinstance(gallery, Tensor) else gallery[order]


def _gallery_ids(gallery_ids: Array | None, num_rows: int) -> Int[np.ndarray, " n"]:
    if gallery_ids is None:
        return np.arange(num_rows)
    names = as_labels("gallery_ids", gallery_ids, length=num_rows)
    values, counts = np.unique(names, return_counts=True)
    if (counts > 1).any():
        raise ValueError(f"gallery_ids must be unique, got {values[counts > 1][0]} {counts.max()} times")
    if values[0] < 0:
        raise ValueError(f"gallery_ids must be at least 0, got {values[0]}")
    return names


def _exclusion(
    exclude: str,
    names: Int[np.ndarray, " n"],
    query_ids: Array | None,
    mask: Array | None,
    shape: tuple[int, int],
) -> Exclusion:
    if (exclude == "mask") != (mask is not None):
        raise ValueError(f"mask and exclude='mask' must be given together, got exclude={exclude!r}")
    if exclude == "mask":
        banned: Bool[np.ndarray, "q n"] = to_numpy("mask", mask) if mask is not None else np.zeros(shape, bool)
        if banned.dtype != np.bool_ or banned.shape != shape:
            raise ValueError(f"mask must be booleans of shape {shape}, got {banned.dtype} {banned.shape}")
        return Exclusion(mask=banned)
    if exclude == "none":
        return Exclusion()
    if query_ids is None:
        raise ValueError("query_ids must be given with exclude='self': items are left out by id, not by position")
    wanted = as_labels("query_ids", query_ids, length=shape[0])
    order = np.argsort(names, kind="stable")
    nearest = np.minimum(np.searchsorted(names[order], wanted), len(names) - 1)
    return Exclusion(own=np.where(names[order][nearest] == wanted, order[nearest], -1))


def _bytes_per_item(gallery: Array, index: Any) -> float:
    if isinstance(index, str):
        return float(gallery.nbytes / gallery.shape[0])
    import faiss

    return float(faiss.serialize_index(index).nbytes / index.ntotal)

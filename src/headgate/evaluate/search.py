"""Nearest-neighbour search: exact and blockwise in torch, or through faiss.

The exact search computes all scores block by block in float64, so that memory is bounded by ``chunk`` and not by the
size of the gallery. A matrix product rounds differently for every block shape; scores that lie within that rounding of
each other are computed anew, pair by pair and in one fixed order, and equal ones are ranked by position in the gallery.
The ranking is therefore the same for every ``chunk``, and two equal gallery rows always tie. The definition as a loop
is :func:`headgate.evaluate.search_reference.search_reference`.

Scores never increase along a ranking: the cosine, the inner product, or *minus* the Euclidean distance.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from headgate.errors import MissingExtraError
from headgate.evaluate.checks import (
    Array,
    ZeroPolicy,
    as_tensor,
    check_choice,
    check_count,
    check_finite,
    check_matrix,
    check_same_width,
    normalize_rows,
)

__all__ = ["DistanceMetric", "Exclusion", "Neighbors", "build_index", "index_recall", "search", "search_excluding"]

DistanceMetric: TypeAlias = Literal["cosine", "l2", "ip"]
METRICS = ("cosine", "l2", "ip")

_SLACK = 16
_UNIT_ROUNDOFF = 2.0**-53


class Neighbors(NamedTuple):
    """A ranking of gallery items for every query.

    Attributes:
        ids: ``(Q, k)`` int64; -1 where fewer than ``k`` items could be found.
        scores: ``(Q, k)`` float64, never increasing along a row; minus infinity where ``ids`` is -1.
    """

    ids: Int[np.ndarray, "q k"]
    scores: Float[np.ndarray, "q k"]


@dataclass(frozen=True)
class Exclusion:
    """Gallery items that must not be found for a query.

    Attributes:
        own: ``(Q,)`` the one gallery position left out of each query's ranking, -1 for none.
        mask: ``(Q, N)`` True for gallery items left out.
    """

    own: Int[np.ndarray, " q"] | None = None
    mask: Bool[np.ndarray, "q n"] | None = None

    def count(self, num_queries: int) -> Int[np.ndarray, " q"]:
        """Return how many gallery items each query leaves out."""
        counts = np.zeros(num_queries, dtype=np.int64)
        if self.mask is not None:
            counts += self.mask.sum(axis=1)
        if self.own is not None:
            inside = self.own >= 0
            counts += inside
            if self.mask is not None:
                counts[inside] -= self.mask[np.flatnonzero(inside), self.own[inside]]
        return counts

    def block(self, rows: Int[np.ndarray, " b"], start: int, stop: int) -> Bool[np.ndarray, "b w"]:
        """Return which of the gallery positions ``start`` to ``stop`` the queries ``rows`` leave out."""
        banned = np.zeros((len(rows), stop - start), dtype=bool)
        if self.mask is not None:
            banned |= self.mask[rows, start:stop]
        if self.own is not None:
            inside = np.flatnonzero((self.own[rows] >= start) & (self.own[rows] < stop))
            banned[inside, self.own[rows][inside] - start] = True
        return banned


def search(
    queries: Float[Array, "q dim"],
    gallery: Float[Array, "n dim"] | None,
    k: int,
    *,
    metric: DistanceMetric = "cosine",
    index: Any = "flat",
    chunk: int = 2048,
    zero: ZeroPolicy = "error",
) -> Neighbors:
    """Find the ``k`` nearest gallery rows of every query.

    Args:
        queries: ``(Q, d)``, finite.
        gallery: ``(N, d)``, finite; may be memory-mapped (it is read in blocks) or half precision. ``None`` only with
            a faiss index that already holds it.
        k: how many neighbours, in [1, N].
        metric: ``"cosine"``, ``"l2"`` or ``"ip"`` (inner product).
        index: ``"flat"`` is exact; ``"hnsw"`` builds a faiss graph index over the gallery and is approximate (report
            :func:`index_recall`); anything else must be a faiss index that holds the gallery, row by row, and whose
            metric fits (for ``"cosine"``: unit rows under the inner product, as :func:`build_index` makes it).
        chunk: rows per block; memory is a small multiple of ``chunk²`` (or of ``k``) float64 values. The result does
            not depend on it.
        zero: ``"error"`` refuses zero vectors under the cosine, ``"ignore"`` gives them cosine 0 with everything.

    Returns:
        ids (row numbers of the gallery) and scores; equal scores stand in the order of the row numbers. A faiss index
        compares in float32 and may lose one of several equal items at the last rank.

    Raises:
        ValueError: bad shapes or values, ``k`` outside [1, N], an unknown metric or index.
        MissingExtraError: ``index="hnsw"`` without faiss.
    """
    return search_excluding(queries, gallery, k, Exclusion(), metric=metric, index=index, chunk=chunk, zero=zero)


def search_excluding(
    queries: Float[Array, "q dim"],
    gallery: Float[Array, "n dim"] | None,
    k: int,
    exclusion: Exclusion,
    *,
    metric: DistanceMetric = "cosine",
    index: Any = "flat",
    chunk: int = 2048,
    zero: ZeroPolicy = "error",
) -> Neighbors:
    """Like :func:`search`, but leave the items of ``exclusion`` out of the rankings.

    Args:
        queries: ``(Q, d)``.
        gallery: ``(N, d)``, or ``None`` with a faiss index.
        k: how many neighbours, in [1, N]; where fewer remain, the ranking ends in ids of -1.
        exclusion: what to leave out.
        metric: as in :func:`search`.
        index: as in :func:`search`.
        chunk: as in :func:`search`.
        zero: as in :func:`search`.
    """
    check_choice("metric", metric, METRICS)
    chunk = check_count("chunk", chunk)
    check_matrix("queries", queries)
    if isinstance(index, str):
        check_choice("index", index, ("flat", "hnsw"))
        if gallery is None:
            raise ValueError(f"gallery must be given with index={index!r}, got None")
    if gallery is not None:
        check_matrix("gallery", gallery)
        check_same_width(queries=queries, gallery=gallery)
    if isinstance(index, str) and index == "flat":
        assert gallery is not None
        k = check_count("k", k, high=int(gallery.shape[0]))
        return _search_exact(queries, gallery, k, exclusion, metric, chunk, zero)
    if isinstance(index, str):
        assert gallery is not None
        index = build_index(gallery, kind="hnsw", metric=metric, ef_search=max(64, k), zero=zero)
    return _search_faiss(queries, gallery, k, exclusion, metric, index, chunk, zero)


def build_index(
    gallery: Float[Array, "n dim"],
    *,
    kind: Literal["flat", "hnsw"] = "hnsw",
    metric: DistanceMetric = "cosine",
    neighbors: int = 32,
    ef_construction: int = 40,
    ef_search: int = 64,
    threads: int = 1,
    chunk: int = 65536,
    zero: ZeroPolicy = "error",
) -> Any:
    """Build a faiss index over the gallery, to be handed to :func:`search` as ``index=`` as often as needed.

    Args:
        gallery: ``(N, d)``, finite; added in blocks of ``chunk`` rows.
        kind: ``"flat"`` (exact) or ``"hnsw"`` (a navigable small-world graph, approximate).
        metric: as in :func:`search`; for the cosine the index holds unit rows.
        neighbors: links per node of the graph.
        ef_construction: candidates looked at when a row is added.
        ef_search: candidates looked at in a search; at least ``k`` to find ``k`` items.
        threads: threads that add rows; with more than one the graph differs from run to run.
        chunk: rows per block.
        zero: as in :func:`search`.

    Raises:
        ValueError: bad shapes or values.
        MissingExtraError: faiss is not installed.
    """
    check_choice("kind", kind, ("flat", "hnsw"))
    check_choice("metric", metric, METRICS)
    for name, value in (("neighbors", neighbors), ("ef_construction", ef_construction), ("ef_search", ef_search)):
        check_count(name, value)
    chunk, threads = check_count("chunk", chunk), check_count("threads", threads)
    num_rows, dim = check_matrix("gallery", gallery)
    faiss = _import_faiss()
    faiss_metric = faiss.METRIC_L2 if metric == "l2" else faiss.METRIC_INNER_PRODUCT
    if kind == "flat":
        index = faiss.IndexFlat(dim, faiss_metric)
    else:
        index = faiss.IndexHNSWFlat(dim, neighbors, faiss_metric)
        index.hnsw.efConstruction = ef_construction
        index.hnsw.efSearch = ef_search
    rows = _Rows("gallery", gallery, unit=metric == "cosine", zero=zero)
    with _faiss_threads(faiss, threads):
        for start in range(0, num_rows, chunk):
            index.add(rows.block(start, min(start + chunk, num_rows)).float().cpu().numpy())
    return index


def index_recall(ids: Int[np.ndarray, "q k"], exact_ids: Int[np.ndarray, "q k"]) -> float:
    """Return the share of the exact neighbours that an approximate search found.

    Args:
        ids: ``(Q, k)`` of the approximate search; -1 counts as not found.
        exact_ids: ``(Q, k)`` of the exact one; -1 (fewer than ``k`` exist) is not asked for.

    Raises:
        ValueError: the shapes differ.
    """
    if ids.ndim != 2 or ids.shape != exact_ids.shape:
        raise ValueError(f"ids and exact_ids must have one shape (q, k), got {ids.shape} and {exact_ids.shape}")
    found = sum(
        int(np.isin(exact[exact >= 0], row, assume_unique=True).sum())
        for row, exact in zip(ids, exact_ids, strict=True)
    )
    return found / max(1, int((exact_ids >= 0).sum()))


class _Rows:
    """Rows of a matrix, handed out in float64 and, for the cosine, at unit length; checked as they are read."""

    def __init__(self, name: str, values: Array, *, unit: bool, zero: ZeroPolicy) -> None:
        if isinstance(values, Tensor) and values.device.type == "mps":
            values = values.cpu()  # that device knows no float64
        self.name, self.values, self.unit, self.zero = name, values, unit, zero
        self.largest_norm = 0.0

    def __len__(self) -> int:
        return int(self.values.shape[0])

    def block(self, start: int, stop: int) -> Float[Tensor, "b d"]:
        block = self._convert(self.values[start:stop], start)
        self.largest_norm = max(self.largest_norm, float(block.norm(dim=1).max()))
        return block

    def take(self, positions: Int[Tensor, " p"]) -> Float[Tensor, "p d"]:
        if isinstance(self.values, Tensor):
            return self._convert(self.values[positions.to(self.values.device)], 0)
        return self._convert(self.values[positions.cpu().numpy()], 0)

    def _convert(self, block: Array, first_row: int) -> Float[Tensor, "b d"]:
        try:
            tensor = as_tensor(self.name, block, dtype=torch.float64)
        except ValueError:
            check_finite(self.name, self.values)  # names the row in the whole matrix, not in the block
            raise
        # One memory layout, so that a row is summed in the same order wherever it stands.
        tensor = tensor.contiguous()
        return normalize_rows(self.name, tensor, zero=self.zero, first_row=first_row) if self.unit else tensor


def _search_exact(
    queries: Array, gallery: Array, k: int, exclusion: Exclusion, metric: str, chunk: int, zero: ZeroPolicy
) -> Neighbors:
    query_rows = _Rows("queries", queries, unit=metric == "cosine", zero=zero)
    gallery_rows = _Rows("gallery", gallery, unit=metric == "cosine", zero=zero)
    num_queries, num_rows = len(query_rows), len(gallery_rows)
    ids = np.empty((num_queries, k), dtype=np.int64)
    scores = np.empty((num_queries, k), dtype=np.float64)
    fetch = min(num_rows, k + _SLACK)
    blocks = [(np.arange(start, stop), fetch) for start, stop in _spans(num_queries, _queries_per_block(chunk, fetch))]
    while blocks:
        rows, fetch = blocks.pop()
        block = query_rows.block(int(rows[0]), int(rows[-1]) + 1)[torch.from_numpy(rows - rows[0])]
        ranker = _Ranker(block, rows, gallery_rows, exclusion, metric, chunk)
        ids[rows], scores[rows], settled = ranker.rank(k, fetch)
        # Where more items tie with rank k than were fetched, only the whole row can tell which come first.
        open_rows = rows[~settled]
        blocks += [(open_rows[a:b], num_rows) for a, b in _spans(len(open_rows), _queries_per_block(chunk, num_rows))]
    return Neighbors(ids, scores)


def _queries_per_block(chunk: int, width: int) -> int:
    return max(1, min(chunk, chunk * chunk // (chunk + width)))


def _spans(length: int, step: int) -> list[tuple[int, int]]:
    return [(start, min(start + step, length)) for start in range(0, length, step)]


class _Ranker:
    """Ranks the gallery for one block of queries."""

    def __init__(
        self,
        queries: Float[Tensor, "b d"],
        rows: Int[np.ndarray, " b"],
        gallery: _Rows,
        exclusion: Exclusion,
        metric: str,
        chunk: int,
    ) -> None:
        self.queries, self.rows, self.gallery = queries, rows, gallery
        self.exclusion, self.metric, self.chunk = exclusion, metric, chunk

    def rank(
        self, k: int, fetch: int
    ) -> tuple[Int[np.ndarray, "b k"], Float[np.ndarray, "b k"], Bool[np.ndarray, " b"]]:
        scores, positions = self._candidates(fetch)
        scores, positions = _sort_stably(scores, positions)
        tolerance = self._tolerance()
        kth, last = scores[:, k - 1 : k], scores[:, -1:]
        complete = fetch == len(self.gallery)
        settled = torch.isinf(last) | (kth - last > tolerance) | torch.full_like(last, complete, dtype=torch.bool)
        # Neighbours in the ranking whose scores differ by less than the rounding of a product are settled exactly.
        gap_is_small = scores[:, :-1] - scores[:, 1:] <= tolerance
        near = torch.zeros_like(scores, dtype=torch.bool)
        near[:, :-1] |= gap_is_small
        near[:, 1:] |= gap_is_small
        if self.metric == "l2":
            near |= scores >= -(2.0**20) * tolerance  # cancellation has eaten the digits of a tiny distance
        near &= (scores >= kth - tolerance) & torch.isfinite(scores)
        if bool(near.any()):
            queries, ranks = torch.nonzero(near, as_tuple=True)
            scores[near] = self._pair_scores(queries, positions[queries, ranks])
            scores, positions = _sort_stably(scores, positions)
        scores, positions = scores[:, :k], positions[:, :k]
        positions = positions.masked_fill(torch.isinf(scores), -1)
        if self.metric == "l2":
            scores = 0.0 - (-scores).clamp_min(0).sqrt()
        return positions.cpu().numpy(), scores.cpu().numpy(), settled.squeeze(1).cpu().numpy()

    def _candidates(self, fetch: int) -> tuple[Float[Tensor, "b f"], Int[Tensor, "b f"]]:
        kept: list[tuple[Tensor, Tensor]] = []
        width = 0
        for start, stop in _spans(len(self.gallery), self.chunk):
            block = self._block_scores(self.gallery.block(start, stop).to(self.queries.device))
            banned = self.exclusion.block(self.rows, start, stop)
            if banned.any():
                block = block.masked_fill(torch.from_numpy(banned).to(block.device), -torch.inf)
            kept.append((block, torch.arange(start, stop, device=block.device).expand(len(self.rows), -1)))
            width += stop - start
            if width > fetch:
                scores, positions = (torch.cat(parts, dim=1) for parts in zip(*kept, strict=True))
                scores, order = scores.topk(fetch, dim=1, sorted=False)
                kept, width = [(scores, positions.gather(1, order))], fetch
        scores, positions = (torch.cat(parts, dim=1) for parts in zip(*kept, strict=True))
        return scores, positions

    def _block_scores(self, block: Float[Tensor, "w d"]) -> Float[Tensor, "b w"]:
        products = self.queries @ block.T
        if self.metric != "l2":
            return products
        squares = self.queries.square().sum(dim=1, keepdim=True) + block.square().sum(dim=1)
        return 2 * products - squares

    def _tolerance(self) -> Float[Tensor, "b 1"]:
        """Twice the greatest difference between a score from a product and the same score from one pair."""
        norms = self.queries.norm(dim=1, keepdim=True)
        dim = self.queries.shape[1]
        if self.metric == "l2":
            return 4 * (dim + 8) * _UNIT_ROUNDOFF * (norms + self.gallery.largest_norm).square()
        return 4 * (dim + 8) * _UNIT_ROUNDOFF * norms * self.gallery.largest_norm

    def _pair_scores(self, queries: Int[Tensor, " p"], positions: Int[Tensor, " p"]) -> Float[Tensor, " p"]:
        """Scores of single pairs, each summed in one fixed order."""
        parts = []
        for start, stop in _spans(len(queries), max(1, self.chunk * self.chunk // self.queries.shape[1])):
            left = self.queries[queries[start:stop]]
            right = self.gallery.take(positions[start:stop]).to(left.device)
            parts.append(-(left - right).square().sum(dim=1) if self.metric == "l2" else (left * right).sum(dim=1))
        return torch.cat(parts)


def _sort_stably(
    scores: Float[Tensor, "b f"], positions: Int[Tensor, "b f"]
) -> tuple[Float[Tensor, "b f"], Int[Tensor, "b f"]]:
    """Sort by falling score, equal scores by rising position."""
    positions, order = positions.sort(dim=1)
    scores, order = scores.gather(1, order).sort(dim=1, descending=True, stable=True)
    return scores, positions.gather(1, order)


def _search_faiss(
    queries: Array,
    gallery: Array | None,
    k: int,
    exclusion: Exclusion,
    metric: str,
    index: Any,
    chunk: int,
    zero: ZeroPolicy,
) -> Neighbors:
    faiss = _import_faiss()
    if not isinstance(index, faiss.Index):
        raise TypeError(f"index must be 'flat', 'hnsw' or a faiss index, got {type(index).__name__}")
    wanted = faiss.METRIC_L2 if metric == "l2" else faiss.METRIC_INNER_PRODUCT
    if index.metric_type != wanted:
        raise ValueError(f"index must compare by metric={metric!r}, got a faiss index of metric {index.metric_type}")
    if index.d != queries.shape[1]:
        raise ValueError(f"index must have the queries' dim={queries.shape[1]}, got {index.d}")
    if gallery is not None and index.ntotal != gallery.shape[0]:
        raise ValueError(f"index must hold the gallery's {gallery.shape[0]} rows, got {index.ntotal}")
    k = check_count("k", k, high=index.ntotal)
    rows = _Rows("queries", queries, unit=metric == "cosine", zero=zero)
    excluded = exclusion.count(len(rows))
    all_ids, all_scores = [], []
    for start, stop in _spans(len(rows), chunk):
        fetch = min(index.ntotal, k + int(excluded[start:stop].max()))
        values, ids = index.search(rows.block(start, stop).float().cpu().numpy(), fetch)
        scores = (0.0 - np.sqrt(np.maximum(values, 0)) if metric == "l2" else values).astype(np.float64)
        missing = ids < 0
        for row in range(stop - start):
            if excluded[start + row]:
                banned = exclusion.block(np.array([start + row]), 0, index.ntotal)[0]
                missing[row] |= banned[np.maximum(ids[row], 0)]
        ids, scores = np.where(missing, -1, ids), np.where(missing, -np.inf, scores)
        order = np.lexsort((ids, -scores), axis=1)[:, :k]
        all_ids.append(np.take_along_axis(ids, order, axis=1))
        all_scores.append(np.take_along_axis(scores, order, axis=1))
    return Neighbors(np.concatenate(all_ids).astype(np.int64), np.concatenate(all_scores))


def _import_faiss() -> Any:
    try:
        import faiss
    except ImportError as error:
        raise MissingExtraError("faiss", "retrieval", "an approximate index") from error
    return faiss


@contextmanager
def _faiss_threads(faiss: Any, threads: int) -> Iterator[None]:
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(threads)
    try:
        yield
    finally:
        faiss.omp_set_num_threads(before)

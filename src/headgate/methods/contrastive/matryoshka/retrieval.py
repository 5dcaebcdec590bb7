"""Search with a short prefix, decide with longer ones (paper, Section 4.3: adaptive and funnel retrieval).

Adaptive retrieval takes K candidates by the cosine of the first D_s coordinates and reorders them by the first D_r::

    cost per query = D_s · N + K · D_r   multiply-adds (exact)        D_s · log2 N + K · D_r   (graph index)

Funnel retrieval reorders again and again, while the size d_i grows and the shortlist k_i shrinks. Every slice is
normalised by itself; the cosine of slices orders as the Euclidean distance of normalised slices does. Equal scores
stand in the order of the database ids.

The full vectors stay where they are, e.g. in a memory-mapped file; only the first D_s columns are copied.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Self, TypeAlias

import numpy as np
from jaxtyping import Float, Int

from headgate.errors import MissingExtraError
from headgate.evaluate.checks import (
    Array,
    ZeroPolicy,
    as_features,
    as_tensor,
    check_choice,
    check_count,
    check_matrix,
    normalize_rows,
    to_numpy,
)
from headgate.evaluate.funnel import rerank
from headgate.evaluate.search import Neighbors, build_index, search

__all__ = ["AdaptiveRetriever", "FunnelRetriever", "RetrievalCost", "Retrieved"]

IndexKind: TypeAlias = Literal["flat", "faiss", "hnsw"]

_ROWS_PER_BLOCK = 65536


@dataclass(frozen=True)
class RetrievalCost:
    """What a search costs, beside a single-shot search at the last size.

    Attributes:
        multiply_adds: per query, ``D_s N + Σ k_i d_i``; ``D_s log2 N`` in the first term for a graph or another index,
            whose true number depends on the data.
        full_multiply_adds: per query, of an exact search with all coordinates of the last size, ``d N``.
        index_bytes: memory of one database item in the first search.
        vector_bytes: of one full vector, where the database keeps it.
    """

    multiply_adds: float
    full_multiply_adds: float
    index_bytes: int
    vector_bytes: int


class Retrieved(NamedTuple):
    """A ranking for every query.

    Attributes:
        ids: ``(Q, k)`` int64, rows of the database; -1 where an approximate index found fewer.
        scores: ``(Q, k)`` float64, the cosine at the last size, never increasing along a row.
        cost: of one query.
    """

    ids: Int[np.ndarray, "q k"]
    scores: Float[np.ndarray, "q k"]
    cost: RetrievalCost


class FunnelRetriever:
    """Shortlist with the first size, then reorder shrinking shortlists with growing sizes.

    Args:
        dims: D_s, then the size d_i of each reordering; never decreasing.
        shortlist: k_i, how many of the current order each reordering takes; never increasing.
        index: of the first search. ``"flat"`` is exact and needs nothing else; ``"faiss"`` is faiss's exact index in
            float32, which may order near ties differently; ``"hnsw"`` is faiss's graph index, approximate. Or a faiss index of
            size D_s over unit vectors (inner product or L2): an empty one is trained and filled by :meth:`fit`.
        chunk: rows per block; memory is a small multiple of ``chunk²`` float64 values, results do not depend on it.
        zero: what a slice of zeros leads to, whose cosine is undefined: ``"error"``, or ``"ignore"``, which gives it
            cosine 0 with everything.

    Raises:
        TypeError: ``dims`` or ``shortlist`` holds no integers.
        ValueError: ``dims`` falls, ``shortlist`` rises, or their lengths do not go together.
    """

    def __init__(
        self,
        dims: Sequence[int],
        shortlist: Sequence[int],
        *,
        index: IndexKind | Any = "flat",
        chunk: int = 2048,
        zero: ZeroPolicy = "error",
    ) -> None:
        self.dims = tuple(check_count("dims", size) for size in dims)
        self.shortlist = tuple(check_count("shortlist", count) for count in shortlist)
        if len(self.dims) != len(self.shortlist) + 1:
            raise ValueError(
                "dims must hold one size for the first search and one for each entry of shortlist, got "
                f"{len(self.dims)} dims and {len(self.shortlist)} entries"
            )
        if any(later < earlier for earlier, later in itertools.pairwise(self.dims)):
            raise ValueError(f"dims must not fall, got {list(self.dims)}")
        if not self.shortlist:
            raise ValueError("shortlist must hold at least one length, got none")
        if any(later > earlier for earlier, later in itertools.pairwise(self.shortlist)):
            raise ValueError(f"shortlist must not increase, got {list(self.shortlist)}")
        if isinstance(index, str) and index not in ("flat", "faiss", "hnsw"):
            raise ValueError(f"index must be 'flat', 'faiss', 'hnsw' or a faiss index, got {index!r}")
        self.index = index
        self.chunk = check_count("chunk", chunk)
        check_choice("zero", zero, ("error", "ignore"))
        self.zero = zero

    def fit(self, database: Array) -> Self:
        """Take up a database.

        Args:
            database: ``(N, d)``, a tensor or an array, e.g. ``np.load(path, mmap_mode="r")``; at least as wide as the
                last size. It is kept by reference; the first D_s columns are copied to memory and checked now, the
                others are read and checked row by row when they are needed.

        Returns:
            The retriever.

        Raises:
            ValueError: too narrow, shorter than the first shortlist, NaN or infinite, or a slice of zeros.
            MissingExtraError: the index needs faiss, which is not installed.
        """
        num_rows, width = check_matrix("database", database)
        if width < self.dims[-1]:
            raise ValueError(f"database must have at least {self.dims[-1]} columns, got shape {tuple(database.shape)}")
        if self.shortlist[0] > num_rows:
            raise ValueError(f"shortlist must not exceed the database's {num_rows} rows, got {self.shortlist[0]}")
        self.database = database
        self.coarse = _copy_columns(database, self.dims[0])
        if self.zero == "error":
            normalize_rows("database", as_tensor("database", self.coarse))
        self._searcher = self._build(self.coarse)
        return self

    def search(self, queries: Array, k: int | None = None) -> Retrieved:
        """Rank the database for every query.

        Args:
            queries: ``(Q, d)``, at least as wide as the last size.
            k: how many items to return, at most the last shortlist; ``None`` returns all of it.

        Returns:
            Ids, scores and cost.

        Raises:
            RuntimeError: :meth:`fit` was not called.
            ValueError: bad queries, or ``k`` above the last shortlist.
        """
        last = self.shortlist[-1]
        k = last if k is None else check_count("k", k)
        if k > last:
            raise ValueError(f"k must not exceed the last shortlist, {last}, got {k}")
        ids, scores = self.stages(queries)[-1]
        return Retrieved(ids[:, :k], scores[:, :k], self.cost)

    def stages(self, queries: Array) -> tuple[Neighbors, ...]:
        """The ranking after the first search and after each reordering.

        Args:
            queries: as in :meth:`search`.

        Returns:
            ``(Q, k_1)`` ids and scores of the first search, then ``(Q, k_i)`` of each reordering.

        Raises:
            RuntimeError: :meth:`fit` was not called.
            ValueError: bad queries.
        """
        if not hasattr(self, "database"):
            raise RuntimeError("fit must be called before search")
        _, width = check_matrix("queries", queries)
        if width < self.dims[-1]:
            raise ValueError(f"queries must have at least {self.dims[-1]} columns, got shape {tuple(queries.shape)}")
        found = [self._shortlist(queries[:, : self.dims[0]])]
        for size, count in zip(self.dims[1:], self.shortlist, strict=True):
            ids = found[-1].ids[:, :count]
            found.append(rerank(queries[:, :size], self.database[:, :size], ids, chunk=self.chunk, zero=self.zero))
        return tuple(found)

    @property
    def cost(self) -> RetrievalCost:
        """What one query costs with the fitted database."""
        num_rows, width = self.database.shape
        exact = self._searcher == "flat" or isinstance(self._searcher, _faiss().IndexFlat)
        looked_at = num_rows if exact else math.log2(max(2, num_rows))
        reordering = sum(size * count for size, count in zip(self.dims[1:], self.shortlist, strict=True))
        return RetrievalCost(
            multiply_adds=self.dims[0] * looked_at + reordering,
            full_multiply_adds=self.dims[-1] * num_rows,
            index_bytes=self.coarse.itemsize * self.dims[0],
            vector_bytes=self.database.itemsize * width,
        )

    def _build(self, coarse: Float[np.ndarray, "n dim"]) -> Any:
        if self.index == "flat":
            return "flat"
        if self.index == "faiss":
            return build_index(coarse, kind="flat", zero=self.zero)
        if self.index == "hnsw":
            return build_index(coarse, kind="hnsw", ef_search=max(64, 2 * self.shortlist[0]), zero=self.zero)
        return _fill(self.index, coarse, self.zero)

    def _shortlist(self, queries: Array) -> Neighbors:
        index, count = self._searcher, self.shortlist[0]
        if not isinstance(index, str) and index.metric_type == _faiss().METRIC_L2:
            unit = normalize_rows("queries", as_tensor("queries", queries), zero=self.zero)
            return search(unit, None, count, metric="l2", index=index, chunk=self.chunk)
        return search(queries, self.coarse, count, index=index, chunk=self.chunk, zero=self.zero)


class AdaptiveRetriever(FunnelRetriever):
    """Shortlist with a short prefix, reorder once with a long one.

    Args:
        shortlist_dim: D_s.
        rerank_dim: D_r, at least D_s.
        k: length K of the shortlist.
        index: as in :class:`FunnelRetriever`.
        chunk: as there.
        zero: as there.

    Raises:
        ValueError: ``rerank_dim`` is below ``shortlist_dim``, or a number is not positive.
    """

    def __init__(
        self,
        shortlist_dim: int = 16,
        rerank_dim: int = 2048,
        k: int = 200,
        *,
        index: IndexKind | Any = "flat",
        chunk: int = 2048,
        zero: ZeroPolicy = "error",
    ) -> None:
        if rerank_dim < shortlist_dim:
            raise ValueError(f"rerank_dim must be at least shortlist_dim, got {rerank_dim} and {shortlist_dim}")
        super().__init__((shortlist_dim, rerank_dim), (k,), index=index, chunk=chunk, zero=zero)

    def search(self, queries: Array, k: int | None = 10) -> Retrieved:
        """Rank the database for every query; see :meth:`FunnelRetriever.search`. By default the first ten."""
        return super().search(queries, k)

    def to_faiss(self, k: int = 10) -> Any:
        """The fitted retriever as one ``faiss.IndexRefineFlat``, which ``faiss.write_index`` can store.

        Search it with queries of ``rerank_dim`` columns. It holds all vectors at that size in memory, in float32.

        Args:
            k: neighbours that will be asked for; sets its ``k_factor`` to K / k.

        Raises:
            RuntimeError: :meth:`fit` was not called.
            MissingExtraError: faiss is not installed.
        """
        if not hasattr(self, "database"):
            raise RuntimeError("fit must be called before to_faiss")
        faiss = _faiss()
        short, long = self.dims
        base = faiss.IndexPreTransform(faiss.IndexFlatIP(short))
        base.prepend_transform(faiss.NormalizationTransform(short))
        base.prepend_transform(faiss.RemapDimensionsTransform(long, short, False))
        refined = faiss.IndexRefineFlat(base)
        refined.k_factor = self.shortlist[0] / check_count("k", k, high=self.shortlist[0])
        for start in range(0, len(self.database), _ROWS_PER_BLOCK):
            rows = as_tensor("database", self.database[start : start + _ROWS_PER_BLOCK, :long])
            refined.add(normalize_rows("database", rows, zero=self.zero, first_row=start).float().cpu().numpy())
        return refined


def _copy_columns(database: Array, dim: int) -> Float[np.ndarray, "n dim"]:
    """The first ``dim`` columns as one contiguous block, checked for NaN and infinity."""
    starts = range(0, database.shape[0], _ROWS_PER_BLOCK)
    blocks = [to_numpy("database", database[start : start + _ROWS_PER_BLOCK, :dim]) for start in starts]
    coarse = as_features("database", np.concatenate(blocks))
    return np.ascontiguousarray(coarse)


def _fill(index: Any, coarse: Float[np.ndarray, "n dim"], zero: ZeroPolicy) -> Any:
    """A user's faiss index, trained and filled with the unit prefixes where it is empty."""
    faiss = _faiss()
    if not isinstance(index, faiss.Index):
        raise TypeError(f"index must be 'flat', 'faiss', 'hnsw' or a faiss index, got {type(index).__name__}")
    if index.d != coarse.shape[1]:
        raise ValueError(f"index must have size {coarse.shape[1]}, that of the first search, got {index.d}")
    if index.metric_type not in (faiss.METRIC_L2, faiss.METRIC_INNER_PRODUCT):
        raise ValueError(f"index must compare by inner product or L2, got a faiss index of metric {index.metric_type}")
    if index.ntotal == 0:
        unit = normalize_rows("database", as_tensor("database", coarse), zero=zero).float().numpy()
        if not index.is_trained:
            index.train(unit)
        index.add(unit)
    if index.ntotal != len(coarse):
        raise ValueError(f"index must be empty or hold the database's {len(coarse)} rows, got {index.ntotal}")
    return index


def _faiss() -> Any:
    try:
        import faiss
    except ImportError as error:
        raise MissingExtraError("faiss", "retrieval", "this index") from error
    return faiss

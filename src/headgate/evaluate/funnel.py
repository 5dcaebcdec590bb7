"""Cheap search first, dear search on what is left.

:func:`funnel` shortlists with the first coordinates of an embedding and reorders the shortlist with more and more of
them (adaptive and funnel retrieval of "Matryoshka Representation Learning", Kusupati et al., NeurIPS 2022).
:func:`spatial_search` compares sets of patch features (Sharif Razavian et al., CVPR Workshops 2014).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

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
    to_numpy,
)
from headgate.evaluate.search import DistanceMetric, Neighbors, search

__all__ = ["Funnel", "funnel", "rerank", "spatial_search"]


@dataclass(frozen=True)
class Funnel:
    """The rankings after every stage of a funnel, and its cost.

    Attributes:
        stages: the shortlist, then one ranking per reordering; ``stages[-1]`` is the result.
        cost: multiply-adds per query, ``d_s N + Σ k_i d_i`` (``d_s log2 N`` for a graph index).
    """

    stages: tuple[Neighbors, ...]
    cost: float


def funnel(
    queries: Float[Array, "q dim"],
    gallery: Float[Array, "n dim"],
    *,
    start_dim: int,
    dims: Sequence[int],
    shortlist: Sequence[int],
    metric: DistanceMetric = "cosine",
    index: Any = "flat",
    chunk: int = 2048,
    zero: ZeroPolicy = "error",
) -> Funnel:
    """Shortlist with ``start_dim`` coordinates, then reorder shrinking shortlists with growing ``dims``.

    One stage, ``dims=(2048,), shortlist=(200,)``, is the paper's adaptive retrieval. Every prefix is normalised anew
    for the cosine.

    Args:
        queries: ``(Q, d)``.
        gallery: ``(N, d)``.
        start_dim: coordinates of the first search, D_s.
        dims: coordinates of each reordering, never falling, the first at least ``start_dim``, the last at most d.
        shortlist: how many of the current order each reordering takes, never rising, the first at most N.
        metric: as in :func:`headgate.evaluate.search`.
        index: of the first search, over the first ``start_dim`` coordinates of the gallery.
        chunk: rows per block.
        zero: as in :func:`headgate.evaluate.search`.

    Raises:
        ValueError: bad shapes or values, falling dims, rising shortlists.
    """
    num_rows, dim = check_matrix("gallery", gallery)
    check_matrix("queries", queries)
    check_same_width(queries=queries, gallery=gallery)
    start_dim = check_count("start_dim", start_dim, high=dim)
    if len(dims) == 0 or len(dims) != len(shortlist):
        raise ValueError(f"dims and shortlist must have one equal, positive length, got {len(dims)}, {len(shortlist)}")
    sizes = [check_count("dims", size, high=dim) for size in dims]
    counts = [check_count("shortlist", count, high=num_rows) for count in shortlist]
    if any(after < before for before, after in zip([start_dim, *sizes], sizes, strict=False)):
        raise ValueError(f"dims must not fall from start_dim on, got start_dim={start_dim}, dims={sizes}")
    if any(after > before for before, after in pairwise(counts)):
        raise ValueError(f"shortlist must not rise, got {counts}")
    first = search(
        queries[:, :start_dim], gallery[:, :start_dim], counts[0], metric=metric, index=index, chunk=chunk, zero=zero
    )
    stages = [first]
    for size, count in zip(sizes, counts, strict=True):
        ids = stages[-1].ids[:, :count]
        stages.append(rerank(queries, gallery, ids, dim=size, metric=metric, chunk=chunk, zero=zero))
    exact = isinstance(index, str) and index == "flat"
    first_cost = start_dim * (num_rows if exact else math.log2(max(2, num_rows)))
    return Funnel(tuple(stages), first_cost + sum(map(math.prod, zip(counts, sizes, strict=True))))


def rerank(
    queries: Float[Array, "q dim"],
    gallery: Float[Array, "n dim"],
    ids: Int[np.ndarray, "q k"],
    *,
    dim: int | None = None,
    metric: DistanceMetric = "cosine",
    chunk: int = 2048,
    zero: ZeroPolicy = "error",
) -> Neighbors:
    """Reorder every query's candidates by the first ``dim`` coordinates; equal scores by gallery row.

    Args:
        queries: ``(Q, d)``.
        gallery: ``(N, d)``; only the candidates' rows are read.
        ids: ``(Q, K)`` rows of the gallery, -1 for missing (these stay at the end).
        dim: coordinates to compare; ``None`` is all of them.
        metric: as in :func:`headgate.evaluate.search`.
        chunk: memory is a small multiple of ``chunk²`` float64 values; the result does not depend on it.
        zero: as in :func:`headgate.evaluate.search`.

    Returns:
        ids ``(Q, K)`` and scores ``(Q, K)``; the array ``ids`` that came in is left as it is.

    Raises:
        TypeError: ids are not integers.
        ValueError: bad shapes or values, or an id that the gallery lacks.
    """
    check_choice("metric", metric, ("cosine", "l2", "ip"))
    num_queries, width = check_matrix("queries", queries)
    num_rows, _ = check_matrix("gallery", gallery)
    check_same_width(queries=queries, gallery=gallery)
    dim = width if dim is None else check_count("dim", dim, high=width)
    table = to_numpy("ids", ids)
    if table.dtype.kind not in "iu":
        raise TypeError(f"ids must hold integers, got dtype {table.dtype}")
    if table.ndim != 2 or table.shape[0] != num_queries or table.shape[1] == 0:
        raise ValueError(f"ids must have shape (q, k) with q={num_queries} and k > 0, got {table.shape}")
    if table.min() < -1 or table.max() >= num_rows:
        raise ValueError(f"ids must lie in [-1, {num_rows - 1}], got {table.min()} to {table.max()}")
    left = as_tensor("queries", queries[:, :dim], dtype=torch.float64).cpu()
    if metric == "cosine":
        left = normalize_rows("queries", left, zero=zero)
    scores = np.full(table.shape, -np.inf)
    rows, ranks = np.nonzero(table >= 0)
    step = max(1, check_count("chunk", chunk) ** 2 // dim)
    for start in range(0, len(rows), step):
        part = slice(start, start + step)
        positions = table[rows[part], ranks[part]]
        right = _candidates(gallery, positions, dim, metric, zero)
        query = left[torch.from_numpy(rows[part])]
        pairs = -(query - right).square().sum(dim=1) if metric == "l2" else (query * right).sum(dim=1)
        scores[rows[part], ranks[part]] = pairs.numpy()
    order = np.lexsort((table, -scores), axis=1)
    scores = np.take_along_axis(scores, order, axis=1)
    reordered = np.take_along_axis(table, order, axis=1).astype(np.int64, copy=False)
    return Neighbors(reordered, 0.0 - np.sqrt(-scores) if metric == "l2" else scores)


def spatial_search(
    query_patches: Float[Array, "q patches dim"], gallery_patches: Float[Array, "r patches dim"], *, chunk: int = 2048
) -> Float[np.ndarray, "queries references"]:
    """Compare every query with every reference by their patches, ``D(q, r) = mean_p min_s ‖q_p - r_s‖``.

    Args:
        query_patches: ``(Q, P, d)`` features of P patches per query.
        gallery_patches: ``(R, S, d)`` features of S patches per reference.
        chunk: memory is a small multiple of ``chunk²`` float64 values; the result does not depend on it.

    Returns:
        ``(Q, R)`` distances; rank by the smallest. Not symmetric: every patch of the query must find its like.

    Raises:
        ValueError: bad shapes or values.
    """
    queries = _patches("query_patches", query_patches)
    references = _patches("gallery_patches", gallery_patches)
    if queries.shape[2] != references.shape[2]:
        raise ValueError(
            f"query_patches and gallery_patches must have the same dim, got {queries.shape[2]}, {references.shape[2]}"
        )
    step = max(1, check_count("chunk", chunk) ** 2 // (queries.shape[1] * references.shape[1] * queries.shape[2]))
    distances = np.empty((queries.shape[0], references.shape[0]))
    for row, query in enumerate(queries):
        query_tensor = torch.from_numpy(query.astype(np.float64))
        for start in range(0, references.shape[0], step):
            block = torch.from_numpy(references[start : start + step].astype(np.float64))
            # Differences, not products: a patch that is found exactly has distance 0.
            pairs = torch.cdist(query_tensor, block, compute_mode="donot_use_mm_for_euclid_dist")
            distances[row, start : start + step] = pairs.amin(dim=2).mean(dim=1).numpy()
    return distances


def _candidates(
    gallery: Array, positions: Int[np.ndarray, " p"], dim: int, metric: str, zero: ZeroPolicy
) -> Float[Tensor, "p dim"]:
    if isinstance(gallery, Tensor):
        chosen = gallery[torch.from_numpy(positions).to(gallery.device), :dim].detach().cpu().double()
    else:
        chosen = torch.from_numpy(to_numpy("gallery", gallery[positions, :dim]).astype(np.float64))
    bad = ~torch.isfinite(chosen).all(dim=1)
    if bool(bad.any()):
        raise ValueError(f"gallery must be finite, got a NaN or infinity in row {positions[int(bad.int().argmax())]}")
    return normalize_rows("gallery", chosen.contiguous(), zero=zero) if metric == "cosine" else chosen.contiguous()


def _patches(name: str, values: Array) -> np.ndarray:
    array = to_numpy(name, values)
    if array.ndim != 3 or 0 in array.shape:
        raise ValueError(f"{name} must have shape (items, patches, dim), none of them 0, got {array.shape}")
    check_finite(name, array)
    return array

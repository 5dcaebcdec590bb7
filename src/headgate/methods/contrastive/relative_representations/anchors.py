"""Which items serve as anchors, and whether two models were given the same ones.

``uniform`` is the paper's choice for frozen encoders; ``stratified`` (each class in turn) for end-to-end training;
``fps`` (farthest point sampling) and ``kmeans`` (the items nearest to the centres of clusters) are those of the anchor
analysis in its appendix.
"""

from __future__ import annotations

from collections.abc import Sequence, Sized
from typing import Any, Literal, get_args

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from headgate.data import stream_generator
from headgate.evaluate.checks import Array, as_labels, as_seed, as_tensor, check_count
from headgate.methods.contrastive.relative_representations.similarity import unit_vectors

__all__ = ["Strategy", "check_same_anchors", "select_anchors"]

Strategy = Literal["uniform", "stratified", "fps", "kmeans"]


def select_anchors(
    X: Array | Sized,
    y: Array | None = None,
    k: int = 500,
    strategy: Strategy = "uniform",
    seed: int = 0,
    *,
    metric: Literal["cosine", "euclidean"] = "cosine",
) -> Int[np.ndarray, " anchors"] | Int[Tensor, " anchors"]:
    """Choose the items that serve as anchors; the same seed gives the same items.

    Args:
        X: the N items: embeddings ``(N, d)`` for ``"fps"`` and ``"kmeans"``, anything with a length for the others.
        y: ``(N,)`` classes, for ``"stratified"``.
        k: number of anchors, at most N.
        strategy: ``"uniform"``; ``"stratified"``: in turn one of each class, classes in order, until there are k (a class
            that is used up is passed over); ``"fps"``: each anchor is the item farthest from those before it, the first
            is drawn; ``"kmeans"``: for each of k clusters the item nearest to its centre.
        seed: of the draw.
        metric: of ``"fps"`` and ``"kmeans"``: ``"cosine"`` looks at directions, as the relative representation does.

    Returns:
        k different indices: a tensor where ``X`` is one, else NumPy.

    Raises:
        TypeError: ``k`` or ``seed`` is no integer, or ``X`` or ``y`` no array where one is needed.
        ValueError: k out of range, ``y`` missing, or an unknown strategy or metric.
    """
    count = len(X)
    k = _check_number(k, count)
    seed = as_seed("seed", seed)
    if strategy not in get_args(Strategy):
        raise ValueError(f"strategy must be one of {', '.join(get_args(Strategy))}, got {strategy!r}")
    if metric not in ("cosine", "euclidean"):
        raise ValueError(f"metric must be 'cosine' or 'euclidean', got {metric!r}")
    generator = stream_generator(seed, "anchors")
    if strategy == "uniform":
        chosen = torch.randperm(count, generator=generator)[:k].numpy()
    elif strategy == "stratified":
        if y is None:
            raise ValueError("y must hold the items' classes for strategy='stratified', got None")
        chosen = _in_turn(as_labels("y", y, length=count), k, generator)
    else:
        if not isinstance(X, np.ndarray | Tensor):
            raise TypeError(f"X must be an array of embeddings for strategy={strategy!r}, got {type(X).__name__}")
        rows = as_tensor("X", X, dtype=torch.float64).cpu()
        rows = unit_vectors(rows) if metric == "cosine" else rows
        first = int(torch.randint(count, (1,), generator=generator))
        chosen = _farthest(rows, k, first) if strategy == "fps" else _nearest_to_centres(rows, k, seed)
    return torch.from_numpy(chosen.copy()).to(X.device) if isinstance(X, Tensor) else chosen


def check_same_anchors(*models: Any) -> None:
    """Check that models speak of the same anchors in the same order, by the ids that they keep.

    Args:
        *models: at least two with a buffer ``anchor_ids``: :class:`RelativeProjection`, :class:`RelativeEncoder`,
            :class:`RelativeAutoencoder`.

    Raises:
        TypeError: a model keeps no ids.
        ValueError: fewer than two models, or their ids differ in number, item or order.
    """
    if len(models) < 2:
        raise ValueError(f"models must be at least two, got {len(models)}")
    lists: list[Sequence[int]] = []
    for model in models:
        ids = getattr(model, "anchor_ids", None)
        if not isinstance(ids, Tensor):
            raise TypeError(f"models must keep anchor_ids (after fit), got a {type(model).__name__} without")
        # On the meta device ids have no values, so that their number alone can be compared.
        lists.append([0] * len(ids) if ids.is_meta else ids.tolist())
    for number, ids in enumerate(lists[1:], start=1):
        if len(ids) != len(lists[0]):
            raise ValueError(f"models must share their anchors, got {len(lists[0])} in model 0, {len(ids)} in {number}")
        wrong = [place for place, (a, b) in enumerate(zip(lists[0], ids, strict=True)) if a != b]
        if wrong:
            place = wrong[0]
            order = "in another order" if sorted(ids) == sorted(lists[0]) else "other items"
            raise ValueError(
                f"models must share their anchors, got {order}: anchor {place} is item {lists[0][place]} in model 0 and "
                f"item {ids[place]} in model {number}; {len(wrong)} anchors differ"
            )


def _check_number(k: int, count: int) -> int:
    check_count("k", k)
    if k > count:
        raise ValueError(f"k must be at most n_samples = {count}, got {k}")
    return int(k)


def _in_turn(labels: Int[np.ndarray, " n"], k: int, generator: torch.Generator) -> Int[np.ndarray, " anchors"]:
    """One item of each class in turn, items in a drawn order."""
    order = torch.randperm(len(labels), generator=generator).numpy()
    queues = [order[labels[order] == label] for label in np.unique(labels)]
    turns = [queue[turn] for turn in range(max(map(len, queues))) for queue in queues if turn < len(queue)]
    return np.array(turns[:k], dtype=np.int64)


def _farthest(rows: Float[Tensor, "n dim"], k: int, first: int) -> Int[np.ndarray, " anchors"]:
    chosen = [first]
    nearest = torch.full((len(rows),), float("inf"), dtype=rows.dtype)
    for _ in range(k - 1):
        nearest = torch.minimum(nearest, (rows - rows[chosen[-1]]).square().sum(dim=1))
        # An item that is chosen already must not come again where all others coincide with anchors, too.
        nearest[chosen[-1]] = -1.0
        chosen.append(int(nearest.argmax()))
    return np.array(chosen, dtype=np.int64)


def _nearest_to_centres(rows: Float[Tensor, "n dim"], k: int, seed: int) -> Int[np.ndarray, " anchors"]:
    """The nearest item to each centre that no centre before it has taken."""
    import warnings

    from sklearn.cluster import KMeans
    from sklearn.exceptions import ConvergenceWarning

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # fewer distinct items than clusters: the rest is filled up
        fitted = KMeans(k, n_init=1, random_state=seed % (1 << 32)).fit(rows.numpy())
    distances = torch.cdist(torch.from_numpy(fitted.cluster_centers_), rows)
    chosen: list[int] = []
    for row in distances:
        row[chosen] = float("inf")
        chosen.append(int(row.argmin()))
    return np.array(chosen, dtype=np.int64)

"""Does unsupervised structure agree with the labels? Scores of clusterings and of discovered objects.

NMI, ARI and the silhouette are those of scikit-learn; clustering accuracy assigns clusters to classes by the Hungarian
method. For object discovery, foreground ARI looks only at pixels of true objects, so it ignores boundaries and forgives
under-segmentation; always report mean best overlap (mBO) beside it.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Float, Int
from scipy.optimize import linear_sum_assignment

from headgate.evaluate.blocks import unit_rows
from headgate.evaluate.checks import (
    Array,
    ZeroPolicy,
    as_features,
    as_labels,
    as_seed,
    check_choice,
    check_count,
    to_numpy,
)
from headgate.evaluate.undefined import undefined
from headgate.validate import check_positive

__all__ = [
    "SceneScores",
    "ari",
    "clustering_accuracy",
    "foreground_ari",
    "mean_best_overlap",
    "nmi",
    "silhouette",
]


class SceneScores(NamedTuple):
    """A score per scene and its mean.

    Attributes:
        mean: over the scenes that hold an object; nan, with a warning, if none does.
        per_scene: ``(B,)``; nan for scenes without an object.
        skipped: number of scenes without an object.
    """

    mean: float
    per_scene: Float[np.ndarray, " scene"]
    skipped: int


def nmi(y: Int[Array, " n"], clusters: Int[Array, " n"]) -> float:
    """Normalised mutual information, ``I / ((H(y) + H(clusters)) / 2)``.

    Args:
        y: ``(N,)`` integer labels.
        clusters: ``(N,)`` integer cluster ids.

    Returns:
        In [0, 1]; 1 if both sides are one single cluster. The ids themselves do not matter.

    Raises:
        TypeError: not integers.
        ValueError: different N, or N is 0.
    """
    from sklearn.metrics import normalized_mutual_info_score

    return float(normalized_mutual_info_score(*_labellings(y, clusters)))


def ari(y: Int[Array, " n"], clusters: Int[Array, " n"]) -> float:
    """Adjusted Rand index: agreement on pairs of items, corrected for chance.

    ``(Σ C2(n_ij) - E) / (½(Σ C2(a_i) + Σ C2(b_j)) - E)`` with ``E = Σ C2(a_i) Σ C2(b_j) / C2(N)``.

    Args:
        y: ``(N,)`` integer labels.
        clusters: ``(N,)`` integer cluster ids.

    Returns:
        1 for equal partitions, 0 on average for random ones, down to -0.5; 1 if both sides are one single cluster.

    Raises:
        TypeError: not integers.
        ValueError: different N, or N is 0.
    """
    from sklearn.metrics import adjusted_rand_score

    return float(adjusted_rand_score(*_labellings(y, clusters)))


def clustering_accuracy(y: Int[Array, " n"], clusters: Int[Array, " n"]) -> float:
    """Accuracy under the best one-to-one assignment of clusters to classes (Hungarian method).

    Args:
        y: ``(N,)`` integer labels.
        clusters: ``(N,)`` integer cluster ids; if there are more clusters than classes, the items of those left over
            count as errors.

    Returns:
        In (0, 1].

    Raises:
        TypeError: not integers.
        ValueError: different N, or N is 0.
    """
    labels, ids = _labellings(y, clusters)
    table = _contingency(labels, ids)
    return float(table[linear_sum_assignment(table, maximize=True)].sum()) / len(labels)


def silhouette(
    Z: Float[Array, "n dim"],
    clusters: Int[Array, " n"],
    metric: Literal["l2", "cosine"] = "l2",
    *,
    max_items: int | None = None,
    seed: int = 0,
    memory_mib: float = 256,
    zero: ZeroPolicy = "error",
) -> float:
    """Mean over items of ``(b - a) / max(a, b)``: a to the own cluster, b to the nearest other one, mean distances.

    Args:
        Z: ``(N, d)`` features.
        clusters: ``(N,)`` integer cluster ids, of at least 2 and at most N - 1 clusters. An item alone in its cluster
            counts 0.
        metric: ``"l2"`` or ``"cosine"`` distance.
        max_items: of more items than this, a random sample of this size is used.
        seed: of that sample.
        memory_mib: bound on the memory of one block of distances; the value does not depend on it.
        zero: what a zero row leads to under ``"cosine"``: an error, or a distance of 1 to every row.

    Returns:
        In [-1, 1].

    Raises:
        TypeError: Z is no array of real numbers, or clusters not of integers.
        ValueError: NaN or infinity, different N, another number of clusters (in the sample), an unknown metric, or a
            zero row with ``zero="error"``.
    """
    from sklearn import config_context
    from sklearn.metrics import silhouette_score

    check_choice("metric", metric, ("l2", "cosine"))
    check_positive(memory_mib=memory_mib)
    rows = as_features("Z", Z, dtype=np.float64)
    ids = as_labels("clusters", clusters, length=len(rows))
    if max_items is not None and len(rows) > check_count("max_items", max_items, low=3):
        sample = np.random.default_rng(as_seed("seed", seed)).choice(len(rows), max_items, replace=False)
        rows, ids = rows[sample], ids[sample]
    found = len(np.unique(ids))
    if not 2 <= found <= len(rows) - 1:
        raise ValueError(f"clusters must be 2 to N - 1 in number, got {found} for N={len(rows)}")
    if metric == "cosine":
        unit_rows("Z", rows, zero)
    with config_context(working_memory=memory_mib):
        return float(silhouette_score(rows, ids, metric="cosine" if metric == "cosine" else "euclidean"))


def foreground_ari(
    masks: Int[Array, "scene ..."], predicted: Int[Array, "scene ..."], background: int = 0
) -> SceneScores:
    """Adjusted Rand index over the pixels of true objects, per scene.

    Args:
        masks: ``(B, …)`` true object id of every pixel.
        predicted: ``(B, …)`` predicted segment id of every pixel, e.g. ``slot_masks.argmax(1)``.
        background: the true id whose pixels are left out.

    Returns:
        Scores as :func:`ari`; scenes without a foreground pixel are skipped and counted.

    Raises:
        TypeError: not integers.
        ValueError: different shapes, or no scene or pixel.
    """
    true, found = _scenes(masks, predicted)
    scores = np.full(len(true), np.nan)
    for i, (scene, segments) in enumerate(zip(true, found, strict=True)):
        objects = scene != background
        if objects.any():
            scores[i] = ari(scene[objects], segments[objects])
    return _over_scenes("foreground_ari", scores)


def mean_best_overlap(
    masks: Int[Array, "scene ..."], predicted: Int[Array, "scene ..."], background: int = 0
) -> SceneScores:
    """mBO: for every true object the largest IoU with any predicted segment, averaged over the objects of a scene.

    The background is no object to be found, but its pixels count in the union: a segment that spills over the
    boundary loses overlap.

    Args:
        masks: ``(B, …)`` true object id of every pixel.
        predicted: ``(B, …)`` predicted segment id of every pixel.
        background: the true id that is no object.

    Returns:
        Scores in (0, 1]; scenes without an object are skipped and counted.

    Raises:
        TypeError: not integers.
        ValueError: different shapes, or no scene or pixel.
    """
    true, found = _scenes(masks, predicted)
    scores = np.full(len(true), np.nan)
    for i, (scene, segments) in enumerate(zip(true, found, strict=True)):
        is_object = np.unique(scene) != background
        if is_object.any():
            shared = _contingency(scene, segments)
            union = shared.sum(axis=1, keepdims=True) + shared.sum(axis=0) - shared
            scores[i] = (shared / union)[is_object].max(axis=1).mean()
    return _over_scenes("mean_best_overlap", scores)


def _labellings(y: Array, clusters: Array) -> tuple[np.ndarray, np.ndarray]:
    labels = as_labels("y", y)
    return labels, as_labels("clusters", clusters, length=len(labels))


def _contingency(a: Int[np.ndarray, " n"], b: Int[np.ndarray, " n"]) -> Int[np.ndarray, "of_a of_b"]:
    """How often each pair of values occurs; rows and columns in ascending order of the values."""
    of_a, of_b = (np.unique(values, return_inverse=True) for values in (a, b))
    flat = np.bincount(of_a[1] * len(of_b[0]) + of_b[1], minlength=len(of_a[0]) * len(of_b[0]))
    return flat.reshape(len(of_a[0]), len(of_b[0]))


def _scenes(masks: Array, predicted: Array) -> tuple[Int[np.ndarray, "scene pixel"], Int[np.ndarray, "scene pixel"]]:
    arrays = {"masks": to_numpy("masks", masks), "predicted": to_numpy("predicted", predicted)}
    for name, array in arrays.items():
        if array.dtype.kind not in "iu":
            raise TypeError(f"{name} must hold integer ids, got dtype {array.dtype}")
    true, found = arrays.values()
    if true.shape != found.shape or true.ndim < 2 or 0 in true.shape:
        raise ValueError(
            f"masks and predicted must have one shape (scene, …), none of its sizes 0, got {true.shape} and {found.shape}"
        )
    return true.reshape(len(true), -1), found.reshape(len(found), -1)


def _over_scenes(measure: str, scores: Float[np.ndarray, " scene"]) -> SceneScores:
    seen = scores[~np.isnan(scores)]
    mean = float(seen.mean()) if len(seen) else undefined(measure, "no scene holds an object")
    return SceneScores(mean, scores, len(scores) - len(seen))

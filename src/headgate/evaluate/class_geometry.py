"""Geometry of labelled classes: neural collapse, and which classes lie close to which.

*Neural collapse* (Papyan, Han and Donoho 2020, arXiv 2008.08186): late in training, features of a class shrink to
their mean (NC1, ``tr(Σ_W Σ_B⁺) / K → 0``), and the centred class means become equally long and equally far apart, with
cosines ``-1/(K - 1)`` (NC2). *Class relations*: the cosines between class centroids, or between any vectors that stand
for classes such as a gate per class, compared with a known hierarchy by rank correlation.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int
from scipy.stats import rankdata

from headgate.evaluate.blocks import as_rows, blocks, class_sums, is_negligible, unit_rows
from headgate.evaluate.checks import (
    Array,
    ZeroPolicy,
    as_labels,
    as_scores,
    to_numpy,
)
from headgate.evaluate.undefined import undefined

__all__ = [
    "ClassRelations",
    "NeuralCollapse",
    "centroid_cosine",
    "class_relations",
    "hierarchy_similarity",
    "neural_collapse",
]

_CHUNK = 4096


@dataclass(frozen=True)
class NeuralCollapse:
    """How far features have collapsed onto their class means.

    Attributes:
        within_between: NC1, ``tr(Σ_W Σ_B⁺) / K``; 0 when every feature is its class mean.
        classes: ``(K,)`` the labels that occur, ascending.
        cosines: ``(K, K)`` between the class means minus the global mean.
        angles: ``(K, K)`` the same in degrees.
        mean_angle: mean over pairs of different classes, in degrees; ``arccos(-1/(K - 1))`` for a simplex.
        cosine_std: NC2, standard deviation of the cosines over pairs of different classes; 0 when equiangular.
        simplex_gap: NC2, mean of ``|cosine + 1/(K - 1)|`` over those pairs; 0 for a simplex.
        norm_variation: NC2, standard deviation over mean of the lengths of the centred class means; 0 when equal.
    """

    within_between: float
    classes: Int[np.ndarray, " classes"]
    cosines: Float[np.ndarray, "classes classes"]
    angles: Float[np.ndarray, "classes classes"]
    mean_angle: float
    cosine_std: float
    simplex_gap: float
    norm_variation: float


@dataclass(frozen=True)
class ClassRelations:
    """Which classes are alike, and whether a reference agrees.

    Attributes:
        classes: ``(K,)`` the labels that occur, ascending; the order of the matrix.
        matrix: ``(K, K)`` cosines between class centroids.
        spearman: rank correlation of the matrix with the reference over pairs of different classes.
    """

    classes: Int[np.ndarray, " classes"]
    matrix: Float[np.ndarray, "classes classes"]
    spearman: float


def neural_collapse(Z: Float[Array, "n dim"], y: Int[Array, " n"], *, chunk: int = _CHUNK) -> NeuralCollapse:
    """Measure NC1 and NC2 of labelled features.

    ``Σ_W`` is the mean over items of ``(z - μ_y)(z - μ_y)ᵀ`` and ``Σ_B`` the mean over classes of
    ``(μ_c - μ)(μ_c - μ)ᵀ``, with μ the mean over items. Variation orthogonal to all class means does not count.

    Args:
        Z: ``(N, d)`` features.
        y: ``(N,)`` integer labels of at least two classes.
        chunk: rows per block; the values do not depend on it.

    Returns:
        The measures. A class mean that coincides with the global mean has no direction: its cosines are nan, and so
        are all measures, with a warning, if every class mean does.

    Raises:
        TypeError: Z is no array of real numbers, or y not of integers.
        ValueError: NaN or infinity, another number of labels, or fewer than two classes.
    """
    rows = as_rows("Z", Z)
    labels = as_labels("y", y, length=len(rows))
    classes, members, counts = np.unique(labels, return_inverse=True, return_counts=True)
    num_classes = len(classes)
    if num_classes < 2:
        raise ValueError(f"y must hold at least 2 classes, got {num_classes}")
    means = _class_means(rows, members, counts, chunk)
    global_mean = counts @ means / len(rows)
    centred_means = means - global_mean
    norms = np.linalg.norm(centred_means, axis=1)
    # Means are as precise as the numbers that they average.
    scale = max(float(np.linalg.norm(global_mean)), float(np.linalg.norm(means, axis=1).max()))
    present = ~np.array([is_negligible(float(norm), 100 * scale) for norm in norms])
    if not present.any():
        nothing = undefined("neural_collapse", "all class means coincide")
        blank = np.full((num_classes, num_classes), nothing)
        return NeuralCollapse(nothing, classes, blank, blank.copy(), nothing, nothing, nothing, nothing)
    centred_means[~present] = 0.0
    unit = centred_means / np.where(present, norms, np.nan)[:, None]
    cosines = (unit @ unit.T).clip(-1, 1)
    pairs = cosines[np.triu_indices(num_classes, 1)]
    pairs = pairs[np.isfinite(pairs)]
    angles = np.degrees(np.arccos(cosines))
    if len(pairs):
        mean_angle = float(np.degrees(np.arccos(pairs)).mean())
        cosine_std, simplex_gap = float(pairs.std()), float(np.abs(pairs + 1 / (num_classes - 1)).mean())
    else:
        mean_angle = cosine_std = simplex_gap = undefined(
            "the angle between class means in neural_collapse", "all but one of them lie on the global mean"
        )
    return NeuralCollapse(
        within_between=_within_between(rows, members, means, centred_means, chunk),
        classes=classes,
        cosines=cosines,
        angles=angles,
        mean_angle=mean_angle,
        cosine_std=cosine_std,
        simplex_gap=simplex_gap,
        norm_variation=float(norms.std() / norms.mean()),
    )


def centroid_cosine(
    Z: Float[Array, "n dim"],
    y: Int[Array, " n"],
    center: bool = True,
    *,
    zero: ZeroPolicy = "error",
    chunk: int = _CHUNK,
) -> Float[np.ndarray, "classes classes"]:
    """Cosine between the mean features of every two classes.

    Args:
        Z: ``(N, d)`` features, or vectors that stand for classes, such as one gate per class.
        y: ``(N,)`` integer labels.
        center: subtract the mean of the class centroids first, so that what all classes share does not count.
        zero: what a centroid of zero, which has no direction, leads to: an error, or cosines of 0.
        chunk: rows per block; the values do not depend on it.

    Returns:
        ``(K, K)`` in ascending order of the labels that occur.

    Raises:
        TypeError: Z is no array of real numbers, or y not of integers.
        ValueError: NaN or infinity, another number of labels, or a zero centroid with ``zero="error"``.
    """
    rows = as_rows("Z", Z)
    labels = as_labels("y", y, length=len(rows))
    _, members, counts = np.unique(labels, return_inverse=True, return_counts=True)
    centroids = _class_means(rows, members, counts, chunk)
    if center:
        scale = np.linalg.norm(centroids, axis=1).max()
        centroids = centroids - centroids.mean(axis=0)
        centroids[np.linalg.norm(centroids, axis=1) <= 1e-12 * scale] = 0.0
    unit = unit_rows("centroids of the classes", centroids, zero)
    return (unit @ unit.T).clip(-1, 1)


def class_relations(
    Z: Float[Array, "n dim"],
    y: Int[Array, " n"],
    reference: Float[Array, "classes classes"],
    center: bool = True,
    *,
    zero: ZeroPolicy = "error",
    chunk: int = _CHUNK,
) -> ClassRelations:
    """Compare the similarity of classes in feature space with a reference.

    Args:
        Z: ``(N, d)`` features, or vectors that stand for classes, such as one gate per class with ``y = arange(K)``.
        y: ``(N,)`` integer labels of K classes.
        reference: ``(K, K)`` symmetric similarities in ascending order of the labels, e.g. shared attributes or
            :func:`hierarchy_similarity`; give distances with a minus sign. Its diagonal is not looked at.
        center: as in :func:`centroid_cosine`.
        zero: as in :func:`centroid_cosine`.
        chunk: rows per block; the values do not depend on it.

    Returns:
        The matrix and Spearman's correlation with the reference over all pairs of different classes, tied values
        sharing their mean rank; nan, with a warning, if either side is the same for all pairs.

    Raises:
        TypeError: Z or the reference is no array of real numbers, or y not of integers.
        ValueError: as :func:`centroid_cosine`, or a reference of another size or not symmetric.
    """
    rows = as_rows("Z", Z)
    classes = np.unique(as_labels("y", y, length=len(rows)))
    wanted = as_scores("reference", reference, shape=(len(classes), len(classes)), axes="class, class")
    if not np.allclose(wanted, wanted.T, rtol=1e-6, atol=1e-12):
        raise ValueError("reference must be symmetric, got a matrix that differs from its transpose")
    matrix = centroid_cosine(rows, y, center, zero=zero, chunk=chunk)
    upper = np.triu_indices(len(classes), 1)
    ranks = []
    for name, values in (("the matrix of cosines", matrix[upper]), ("the reference", wanted[upper])):
        if len(values) == 0 or np.ptp(values) <= 1e-12:
            return ClassRelations(
                classes, matrix, undefined("class_relations", f"{name} is the same for all pairs of classes")
            )
        # Cosines that differ by rounding alone are ties.
        rank = rankdata(np.round(values, 12))
        ranks.append(rank - rank.mean())
    a, b = ranks
    return ClassRelations(classes, matrix, float(a @ b / np.sqrt((a @ a) * (b @ b))))


def hierarchy_similarity(levels: Int[Array, "classes level"]) -> Float[np.ndarray, "classes classes"]:
    """Similarity of classes in a tree: at how many levels two classes have the same ancestor.

    Args:
        levels: ``(K, L)`` integer ids of the ancestors of every class, from the coarsest level to the finest; for one
            level of super-classes, ``(K, 1)``.

    Returns:
        ``(K, K)``: 0 (apart from the root on) to L. Levels are counted from the coarsest to the first that differs.

    Raises:
        TypeError: ``levels`` does not hold integers.
        ValueError: another rank, or K or L is 0.
    """
    ancestors = to_numpy("levels", levels)
    if ancestors.dtype.kind not in "iu":
        raise TypeError(f"levels must hold integers, got dtype {ancestors.dtype}")
    if ancestors.ndim != 2 or 0 in ancestors.shape:
        raise ValueError(f"levels must have shape (classes, level), none of them 0, got {ancestors.shape}")
    same = ancestors[:, None, :] == ancestors[None, :, :]
    return np.cumprod(same, axis=2).sum(axis=2).astype(np.float64)


def _class_means(rows: np.ndarray, members: np.ndarray, counts: np.ndarray, chunk: int) -> np.ndarray:
    """Means of the classes; the second pass removes the rounding of the first."""
    means = class_sums(rows, members, len(counts), chunk) / counts[:, None]
    correction = np.zeros_like(means)
    for start, block in blocks(rows, chunk):
        part = members[start : start + len(block)]
        correction += class_sums(block - means[part], part, len(counts), len(block))
    return means + correction / counts[:, None]


def _within_between(
    rows: np.ndarray, members: np.ndarray, means: np.ndarray, centred_means: np.ndarray, chunk: int
) -> float:
    """``tr(Σ_W Σ_B⁺) / K``.

    With the singular values s_k and right singular vectors v_k of the centred means, ``Σ_B = Σ_k v_k s_k² v_kᵀ / K``,
    so the trace is ``K Σ_k v_kᵀ Σ_W v_k / s_k²`` and no d × d matrix is needed.
    """
    _, singular, directions = np.linalg.svd(centred_means, full_matrices=False)
    kept = singular > max(centred_means.shape) * np.finfo(np.float64).eps * singular[0]
    scaled = directions[kept].T / singular[kept]
    total = 0.0
    for start, block in blocks(rows, chunk):
        deviations = block - means[members[start : start + len(block)]]
        total += float(((deviations @ scaled) ** 2).sum())
    return total / len(rows)

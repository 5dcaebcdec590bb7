"""How near generated samples come to real ones, in the features of a fixed network.

The Fréchet distance between Gaussians fitted to both (Heusel et al., arXiv 1706.08500, equation 6), and precision and recall
by nearest-neighbour manifolds (Kynkäänniemi et al., arXiv 1904.06991, equation 1). Features of unequal scale should be
standardised by the real ones' statistics first (:func:`standardize_by`), or unused directions decide the distance.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from scipy.spatial.distance import cdist

from headgate.evaluate.blocks import as_rows
from headgate.evaluate.checks import Array, check_count

__all__ = ["PrecisionRecall", "frechet_distance", "precision_recall", "standardize_by"]


class PrecisionRecall(NamedTuple):
    """Two shares.

    Attributes:
        precision: of the generated samples that lie within the manifold of the real ones.
        recall: of the real samples that lie within the manifold of the generated ones.
    """

    precision: float
    recall: float


def frechet_distance(real: Float[Array, "n dim"], generated: Float[Array, "m dim"], *, ridge: float = 1e-6) -> float:
    r"""‖μ₁ - μ₂‖² + tr(C₁ + C₂ - 2 (C₁^½ C₂ C₁^½)^½), in float64.

    Args:
        real: features ``(n, d)``; 500 rows or more, and several times d.
        generated: features ``(m, d)``.
        ridge: added to the diagonals of the covariances.

    Returns:
        The squared distance, at least 0. That of two halves of the real set is the floor at their size.

    Raises:
        ValueError: fewer than two rows, or other widths.
    """
    first, second = _pair(real, generated, 2)
    identity = ridge * np.eye(first.shape[1])
    c1 = np.atleast_2d(np.cov(first, rowvar=False)) + identity
    c2 = np.atleast_2d(np.cov(second, rowvar=False)) + identity
    values, vectors = np.linalg.eigh(c1)
    root = (vectors * np.sqrt(np.clip(values, 0, None))) @ vectors.T
    shared = np.sqrt(np.clip(np.linalg.eigvalsh(root @ c2 @ root), 0, None)).sum()
    gap = first.mean(axis=0) - second.mean(axis=0)
    return max(0.0, float(gap @ gap + np.trace(c1) + np.trace(c2) - 2 * shared))


def precision_recall(real: Float[Array, "n dim"], generated: Float[Array, "m dim"], k: int = 3) -> PrecisionRecall:
    """Shares of samples within the other set's manifold: the balls that reach to each member's k-th neighbour.

    Args:
        real: features ``(n, d)``, n > k.
        generated: features ``(m, d)``, m > k.
        k: neighbours; a sample on a ball's edge counts as inside.

    Raises:
        ValueError: too few rows, or other widths.
    """
    k = check_count("k", k)
    first, second = _pair(real, generated, k + 1)
    between = cdist(first, second)
    reach_first = np.sort(cdist(first, first), axis=1)[:, k]
    reach_second = np.sort(cdist(second, second), axis=1)[:, k]
    precision = (between <= reach_first[:, None]).any(axis=0).mean()
    recall = (between <= reach_second[None, :]).any(axis=1).mean()
    return PrecisionRecall(float(precision), float(recall))


def standardize_by(
    real: Float[Array, "n dim"], *features: Float[Array, "m dim"]
) -> tuple[Float[np.ndarray, "m dim"], ...]:
    """``real`` and further features with the mean and deviation of ``real`` taken out; constant columns are centred.

    Raises:
        ValueError: other widths.
    """
    rows = as_rows("real", real).astype(np.float64)
    mean, deviation = rows.mean(axis=0), rows.std(axis=0)
    deviation = np.where(deviation > 0, deviation, 1.0)
    return tuple((_pair(rows, each, 1)[1] - mean) / deviation for each in (rows, *features))


def _pair(real: Array, generated: Array, least: int) -> tuple[np.ndarray, np.ndarray]:
    first = as_rows("real", real, min_rows=least).astype(np.float64)
    second = as_rows("generated", generated, min_rows=least).astype(np.float64)
    if first.shape[1] != second.shape[1]:
        raise ValueError(f"generated must have the {first.shape[1]} columns of real, got shape {second.shape}")
    return first, second

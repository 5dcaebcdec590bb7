"""The definitions behind :mod:`headgate.evaluate.class_geometry`, as written down; slow, for tests and reading."""

from __future__ import annotations

import math
from itertools import combinations

import numpy as np
from jaxtyping import Float, Int
from scipy.stats import spearmanr

__all__ = ["centroid_cosine_reference", "class_relations_reference", "neural_collapse_reference"]


def neural_collapse_reference(Z: Float[np.ndarray, "n dim"], y: Int[np.ndarray, " n"]) -> dict[str, float]:
    """NC1 from the d × d covariance matrices and a pseudo-inverse, NC2 pair by pair."""
    labels = sorted(set(y.tolist()))
    count = len(labels)
    mean = Z.mean(axis=0)
    means = {label: Z[y == label].mean(axis=0) for label in labels}
    within = sum(np.outer(z - means[label], z - means[label]) for z, label in zip(Z, y.tolist(), strict=True)) / len(Z)
    between = sum(np.outer(means[label] - mean, means[label] - mean) for label in labels) / count
    cosines = [_cosine(means[a] - mean, means[b] - mean) for a, b in combinations(labels, 2)]
    norms = [float(np.linalg.norm(means[label] - mean)) for label in labels]
    return {
        "within_between": float(np.trace(within @ np.linalg.pinv(between, rcond=1e-10))) / count,
        "mean_angle": float(np.mean([math.degrees(math.acos(cosine)) for cosine in cosines])),
        "cosine_std": float(np.std(cosines)),
        "simplex_gap": float(np.mean([abs(cosine + 1 / (count - 1)) for cosine in cosines])),
        "norm_variation": float(np.std(norms) / np.mean(norms)),
    }


def centroid_cosine_reference(
    Z: Float[np.ndarray, "n dim"], y: Int[np.ndarray, " n"], center: bool = True
) -> Float[np.ndarray, "classes classes"]:
    """Cosine of every two class means."""
    means = np.array([Z[y == label].mean(axis=0) for label in sorted(set(y.tolist()))])
    if center:
        means = means - means.mean(axis=0)
    return np.array([[_cosine(a, b) for b in means] for a in means])


def class_relations_reference(
    Z: Float[np.ndarray, "n dim"], y: Int[np.ndarray, " n"], reference: Float[np.ndarray, "classes classes"]
) -> float:
    """Spearman correlation over pairs of different classes."""
    matrix = centroid_cosine_reference(Z, y)
    pairs = list(combinations(range(len(matrix)), 2))
    return float(spearmanr([matrix[i, j] for i, j in pairs], [reference[i, j] for i, j in pairs]).statistic)


def _cosine(a: Float[np.ndarray, " dim"], b: Float[np.ndarray, " dim"]) -> float:
    return max(-1.0, min(1.0, float(a @ b) / float(np.linalg.norm(a) * np.linalg.norm(b))))

"""The definitions behind :mod:`headgate.evaluate.geometry`, as they are written down; slow, for tests and reading."""

from __future__ import annotations

import math

import numpy as np
from jaxtyping import Float, Int

__all__ = [
    "alignment_reference",
    "coding_rate_reference",
    "feature_std_reference",
    "rate_reduction_reference",
    "uniformity_reference",
]


def feature_std_reference(Z: Float[np.ndarray, "n dim"]) -> Float[np.ndarray, " dim"]:
    """Standard deviation of every column of the L2-normalised features."""
    return np.array([row / np.linalg.norm(row) for row in Z]).std(axis=0)


def coding_rate_reference(Z: Float[np.ndarray, "n dim"], eps: float) -> float:
    """``½ logdet(I_d + d/(N ε²) ZᵀZ)`` from the eigenvalues of ``ZᵀZ``."""
    n, dim = Z.shape
    return 0.5 * sum(math.log1p(dim / (n * eps**2) * max(float(value), 0.0)) for value in np.linalg.eigvalsh(Z.T @ Z))


def rate_reduction_reference(Z: Float[np.ndarray, "n dim"], y: Int[np.ndarray, " n"], eps: float) -> float:
    """``ΔR = R(Z) - Σ_c tr(Π_c)/(2N) logdet(I + d/(tr(Π_c) ε²) Zᵀ Π_c Z)`` with diagonal membership matrices Π_c."""
    n, dim = Z.shape
    within = 0.0
    for label in set(y.tolist()):
        membership = np.diag((y == label).astype(np.float64))
        count = np.trace(membership)
        product = np.eye(dim) + dim / (count * eps**2) * Z.T @ membership @ Z
        within += count / (2 * n) * float(np.linalg.slogdet(product).logabsdet)
    return coding_rate_reference(Z, eps) - within


def alignment_reference(X: Float[np.ndarray, "n dim"], Y: Float[np.ndarray, "n dim"]) -> float:
    """Mean of ``‖x/‖x‖ - y/‖y‖‖²``."""
    gaps = [x / np.linalg.norm(x) - y / np.linalg.norm(y) for x, y in zip(X, Y, strict=True)]
    return float(np.mean([gap @ gap for gap in gaps]))


def uniformity_reference(Z: Float[np.ndarray, "n dim"], t: float = 2.0) -> float:
    """``log`` of the mean of ``exp(-t ‖x - y‖²)`` over ordered pairs of different items."""
    unit = [row / np.linalg.norm(row) for row in Z]
    terms = [math.exp(-t * float((a - b) @ (a - b))) for i, a in enumerate(unit) for j, b in enumerate(unit) if i != j]
    return math.log(sum(terms) / len(terms))

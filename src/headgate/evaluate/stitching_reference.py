"""The definitions behind :mod:`headgate.evaluate.stitching`, as they are written down; slow, for tests and reading."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float

__all__ = ["affine_reference", "latent_communication_reference", "procrustes_residual_reference"]


def latent_communication_reference(
    Z1: Float[np.ndarray, "n dim"], Z2: Float[np.ndarray, "n dim"], k: int = 10
) -> dict[str, float]:
    """Jaccard, MRR, cosine and L2, one item after the other."""
    jaccard, reciprocal, cosine, distance = [], [], [], []
    for i, (first, second) in enumerate(zip(Z1, Z2, strict=True)):
        found, reference = _ranking(first, Z2)[:k], _ranking(second, Z2)[:k]
        jaccard.append(len(set(found) & set(reference)) / len(set(found) | set(reference)))
        reciprocal.append(1 / (found.index(i) + 1) if i in found else 0.0)
        cosine.append(_cosine(first, second))
        distance.append(float(np.linalg.norm(first - second)))
    return {
        "jaccard": float(np.mean(jaccard)),
        "mrr": float(np.mean(reciprocal)),
        "cosine": float(np.mean(cosine)),
        "l2": float(np.mean(distance)),
    }


def procrustes_residual_reference(X: Float[np.ndarray, "n dim"], Y: Float[np.ndarray, "n dim"]) -> float:
    """The least ``‖XQ - Y‖² / ‖Y‖²`` over orthogonal Q, from the nuclear norm: ``‖X‖² + ‖Y‖² - 2 Σ s_i(XᵀY)``."""
    X, Y = X - X.mean(axis=0), Y - Y.mean(axis=0)
    nuclear = float(np.linalg.svd(X.T @ Y, compute_uv=False).sum())
    return float(((X**2).sum() + (Y**2).sum() - 2 * nuclear) / (Y**2).sum())


def affine_reference(
    X: Float[np.ndarray, "n dim_x"], Y: Float[np.ndarray, "n dim_y"], ridge: float
) -> Float[np.ndarray, "dim_x dim_y"]:
    """The ridge map from its normal equations, with the penalty in units of the mean eigenvalue of ``XᵀX``."""
    X, Y = X - X.mean(axis=0), Y - Y.mean(axis=0)
    penalty = ridge * np.trace(X.T @ X) / X.shape[1]
    return np.linalg.solve(X.T @ X + penalty * np.eye(X.shape[1]), X.T @ Y)


def _ranking(query: Float[np.ndarray, " dim"], gallery: Float[np.ndarray, "n dim"]) -> list[int]:
    return sorted(range(len(gallery)), key=lambda j: -_cosine(query, gallery[j]))


def _cosine(a: Float[np.ndarray, " dim"], b: Float[np.ndarray, " dim"]) -> float:
    return float(a @ b) / float(np.linalg.norm(a) * np.linalg.norm(b))

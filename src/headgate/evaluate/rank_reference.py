"""The definitions behind :mod:`headgate.evaluate.rank`, one singular value at a time; slow, for tests and reading."""

from __future__ import annotations

import math

import numpy as np
from jaxtyping import Float

__all__ = ["rank_reference"]


def rank_reference(Z: Float[np.ndarray, "n dim"], center: bool = True, delta: float = 0.01) -> dict[str, float]:
    """Every measure of rank of one float64 matrix, which must not be all zero after centring."""
    if center:
        Z = Z - Z.mean(axis=0)
    sigma = [float(value) for value in np.linalg.svd(Z, compute_uv=False)]
    total = sum(sigma)
    entropy, entropy_of_rankme = 0.0, 0.0
    for value in sigma:
        p = value / total
        entropy -= p * math.log(p) if p > 0 else 0.0
        entropy_of_rankme -= (p + 1e-7) * math.log(p + 1e-7)
    kept, partial = 0, 0.0
    while partial < (1 - delta) * total:
        partial += sigma[kept]
        kept += 1
    tolerance = max(Z.shape) * float(np.finfo(np.float64).eps) * sigma[0]
    return {
        "effective_rank": math.exp(entropy),
        "rankme": math.exp(entropy_of_rankme),
        "participation_ratio": sum(value**2 for value in sigma) ** 2 / sum(value**4 for value in sigma),
        "stable_rank": sum(value**2 for value in sigma) / sigma[0] ** 2,
        "srank": kept,
        "numerical_rank": sum(value > tolerance for value in sigma),
    }

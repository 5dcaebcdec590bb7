"""The definitions behind :mod:`headgate.evaluate.token_rates`, as they are written down; slow, for tests and reading."""

from __future__ import annotations

import math

import numpy as np
from jaxtyping import Float

__all__ = ["sparse_rate_reduction_reference", "subspace_coding_rate_reference", "token_coding_rate_reference"]


def token_coding_rate_reference(z: Float[np.ndarray, "tokens dim"], eps2: float, normalize: bool) -> float:
    """``½ Σ log(1 + d/(N ε²) λ)`` over the eigenvalues λ of ``Z Zᵀ``."""
    count, dim = z.shape
    if normalize:
        z = np.array([token / np.linalg.norm(token) if token.any() else token for token in z])
    return 0.5 * sum(math.log1p(dim / (count * eps2) * max(float(value), 0)) for value in np.linalg.eigvalsh(z @ z.T))


def subspace_coding_rate_reference(
    z: Float[np.ndarray, "tokens dim"], bases: Float[np.ndarray, "heads dim head_dim"], eps2: float, normalize: bool
) -> float:
    """The rates of ``Z U_k`` added up."""
    return sum(token_coding_rate_reference(z @ basis, eps2, normalize) for basis in bases)


def sparse_rate_reduction_reference(
    z: Float[np.ndarray, "tokens dim"], bases: Float[np.ndarray, "heads dim head_dim"], eps2: float, lambd: float
) -> float:
    """``R(Z) - Rᶜ(Z; U) - λ‖Z‖₀``."""
    whole = token_coding_rate_reference(z, eps2, normalize=False)
    return whole - subspace_coding_rate_reference(z, bases, eps2, normalize=False) - lambd * int((z != 0).sum())

"""How many dimensions does a representation use? Measures of rank and the spectrum, without labels.

All are functions of the singular values σ of the feature matrix Z ``(N, d)``, or of λ = σ²:

- effective rank (Roy and Vetterli 2007) ``exp(-Σ p log p)``, ``p = σ / Σσ``; RankMe (Garrido et al. 2023, arXiv
  2210.02885) is the same of the uncentred Z with ``p + 1e-7``;
- participation ratio ``(Σλ)² / Σλ²``; stable rank ``‖Z‖²_F / σ_1²``;
- srank (Kumar et al. 2021, arXiv 2010.14498), the least k with ``Σ_{i≤k} σ_i ≥ (1 - δ) Σσ``; numerical rank.

Features are centred by default: an offset common to all items is no dimension that tells them apart. Pass
``center=False`` for published figures of RankMe and of value networks. No measure exceeds min(N, d), and all are
biased low by few items: N ≥ 4d is asked for, and a warning says so where there are fewer. An all-zero Z (after
centring, where asked for) has rank 0 by every measure.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float

from headgate.evaluate.blocks import as_rows, column_means, is_negligible, singular_values
from headgate.evaluate.checks import Array
from headgate.evaluate.undefined import undefined

__all__ = [
    "RankReport",
    "Spectrum",
    "effective_rank",
    "numerical_rank",
    "participation_ratio",
    "rank_report",
    "rankme",
    "spectrum",
    "srank",
    "stable_rank",
]

_CHUNK = 4096


@dataclass(frozen=True)
class RankReport:
    """Every measure of rank of one matrix, from one decomposition.

    Attributes:
        n: number of items.
        dim: width of the features.
        capped: there are fewer than 4d items, so that the values are limited by N.
        effective_rank: of the centred features.
        rankme: of the uncentred features.
        participation_ratio: of the centred features.
        stable_rank: of the centred features.
        srank: of the centred features, δ = 0.01.
        numerical_rank: of the centred features.
    """

    n: int
    dim: int
    capped: bool
    effective_rank: float
    rankme: float
    participation_ratio: float
    stable_rank: float
    srank: int
    numerical_rank: int


@dataclass(frozen=True)
class Spectrum:
    """The eigenvalues of ``ZᵀZ``.

    Attributes:
        log_eigenvalues: ``(min(N, d),)`` natural logarithms of λ = σ², largest first; -inf for those that are 0 but for
            rounding.
        decay_slope: slope of log λ_i over log i, fitted by least squares to the finite ones: -α of a power law.
    """

    log_eigenvalues: Float[np.ndarray, " rank"]
    decay_slope: float


def effective_rank(Z: Float[Array, "n dim"], center: bool = True, *, chunk: int = _CHUNK) -> float:
    """Exponential of the entropy of the normalised singular values.

    Args:
        Z: ``(N, d)`` features.
        center: subtract the mean feature first.
        chunk: rows per block; the value does not depend on it.

    Returns:
        From 1 (one direction) to min(N, d) (all equally strong); 0 for all-zero features.

    Raises:
        TypeError: Z is no array of real numbers.
        ValueError: NaN or infinity, or N or d is 0.
    """
    return _effective_rank(_singular_values("effective_rank", Z, center, chunk))


def rankme(Z: Float[Array, "n dim"], center: bool = False, *, chunk: int = _CHUNK) -> float:
    """RankMe: ``exp(-Σ p log p)`` with ``p = σ / Σσ + 1e-7`` of the uncentred features.

    Args:
        Z: ``(N, d)`` features; the paper takes 25,600 items.
        center: subtract the mean feature first; the published figures do not.
        chunk: rows per block; the value does not depend on it.

    Returns:
        From 1 to min(N, d); 0 for all-zero features.

    Raises:
        TypeError: Z is no array of real numbers.
        ValueError: NaN or infinity, or N or d is 0.
    """
    return _rankme(_singular_values("rankme", Z, center, chunk))


def participation_ratio(Z: Float[Array, "n dim"], center: bool = True, *, chunk: int = _CHUNK) -> float:
    """``(Σλ)² / Σλ²`` of the eigenvalues λ = σ².

    Args:
        Z: ``(N, d)`` features.
        center: subtract the mean feature first.
        chunk: rows per block; the value does not depend on it.

    Returns:
        From 1 to min(N, d); 0 for all-zero features.

    Raises:
        TypeError: Z is no array of real numbers.
        ValueError: NaN or infinity, or N or d is 0.
    """
    return _participation_ratio(_singular_values("participation_ratio", Z, center, chunk))


def stable_rank(Z: Float[Array, "n dim"], center: bool = True, *, chunk: int = _CHUNK) -> float:
    """``‖Z‖²_F / σ_1²``.

    Args:
        Z: ``(N, d)`` features.
        center: subtract the mean feature first.
        chunk: rows per block; the value does not depend on it.

    Returns:
        From 1 to min(N, d); 0 for all-zero features.

    Raises:
        TypeError: Z is no array of real numbers.
        ValueError: NaN or infinity, or N or d is 0.
    """
    return _stable_rank(_singular_values("stable_rank", Z, center, chunk))


def srank(Z: Float[Array, "n dim"], delta: float = 0.01, center: bool = True, *, chunk: int = _CHUNK) -> int:
    """Least k with ``Σ_{i≤k} σ_i ≥ (1 - δ) Σσ``.

    Args:
        Z: ``(N, d)`` features.
        delta: share δ of the sum of singular values that may be left out, in (0, 1).
        center: subtract the mean feature first; value-network papers do not.
        chunk: rows per block; the value does not depend on it.

    Returns:
        From 1 to min(N, d); 0 for all-zero features.

    Raises:
        TypeError: Z is no array of real numbers.
        ValueError: NaN or infinity, N or d is 0, or ``delta`` out of range.
    """
    if not 0 < delta < 1:
        raise ValueError(f"delta must lie in (0, 1), got delta={delta}")
    return _srank(_singular_values("srank", Z, center, chunk), delta)


def numerical_rank(
    Z: Float[Array, "n dim"], center: bool = True, *, tolerance: float | None = None, chunk: int = _CHUNK
) -> int:
    """Number of singular values above a tolerance.

    Args:
        Z: ``(N, d)`` features.
        center: subtract the mean feature first.
        tolerance: on σ itself, at least 0; ``None`` stands for ``max(N, d) · eps · σ_1`` with the eps of float32 for
            float32 features, whose rounding would count as rank otherwise (and for half precision, where its own eps
            times N would exceed 1), and that of float64 for all others.
        chunk: rows per block; the value does not depend on it.

    Returns:
        From 0 to min(N, d).

    Raises:
        TypeError: Z is no array of real numbers.
        ValueError: NaN or infinity, N or d is 0, or ``tolerance`` negative.
    """
    if tolerance is not None and not tolerance >= 0:
        raise ValueError(f"tolerance must be at least 0, got tolerance={tolerance}")
    sigma = _singular_values("numerical_rank", Z, center, chunk)
    return int((sigma > (_tolerance(Z, sigma) if tolerance is None else tolerance)).sum())


def rank_report(Z: Float[Array, "n dim"], *, chunk: int = _CHUNK) -> RankReport:
    """All measures of rank with their defaults, with N, d and whether N limits them.

    Args:
        Z: ``(N, d)`` features.
        chunk: rows per block; no value depends on it.

    Raises:
        TypeError: Z is no array of real numbers.
        ValueError: NaN or infinity, or N or d is 0.
    """
    rows = as_rows("Z", Z)
    n, dim = rows.shape
    sigma, uncentred = _decompose(rows, True, chunk), _decompose(rows, False, chunk)
    return RankReport(
        n=n,
        dim=dim,
        capped=n < 4 * dim,
        effective_rank=_effective_rank(sigma),
        rankme=_rankme(uncentred),
        participation_ratio=_participation_ratio(sigma),
        stable_rank=_stable_rank(sigma),
        srank=_srank(sigma, 0.01),
        numerical_rank=int((sigma > _tolerance(Z, sigma)).sum()),
    )


def spectrum(Z: Float[Array, "n dim"], center: bool = True, *, chunk: int = _CHUNK) -> Spectrum:
    """The sorted log eigenvalues of ``ZᵀZ`` and how fast they decay.

    Args:
        Z: ``(N, d)`` features.
        center: subtract the mean feature first.
        chunk: rows per block; the values do not depend on it.

    Returns:
        The spectrum; its slope is nan, with a warning, if fewer than two eigenvalues are above 0.

    Raises:
        TypeError: Z is no array of real numbers.
        ValueError: NaN or infinity, or N or d is 0.
    """
    sigma = _singular_values("spectrum", Z, center, chunk)
    positive = sigma[sigma > _tolerance(Z, sigma)]
    log_eigenvalues = np.full(len(sigma), -np.inf)
    log_eigenvalues[: len(positive)] = 2 * np.log(positive)
    if len(positive) < 2:
        slope = undefined("the decay slope of spectrum", f"{len(positive)} of the eigenvalues of Z are above 0")
    else:
        log_index = np.log(np.arange(1, len(positive) + 1))
        log_index -= log_index.mean()
        slope = float(log_index @ log_eigenvalues[: len(positive)] / (log_index @ log_index))
    return Spectrum(log_eigenvalues, slope)


def _singular_values(measure: str, Z: Array, center: bool, chunk: int) -> Float[np.ndarray, " rank"]:
    """The singular values, all exactly 0 where only rounding error is left; warns if N limits the measure."""
    rows = as_rows("Z", Z)
    n, dim = rows.shape
    if n < 4 * dim:
        warnings.warn(
            f"{measure} is capped by N: N={n} items for d={dim} dimensions, at least 4d={4 * dim} are asked for",
            UserWarning,
            stacklevel=3,
        )
    return _decompose(rows, center, chunk)


def _decompose(rows: np.ndarray, center: bool, chunk: int) -> Float[np.ndarray, " rank"]:
    if not center:
        return singular_values(rows, chunk)
    mean = column_means(rows, chunk)
    sigma = singular_values(rows, chunk, mean)
    # ‖Z‖² = ‖Z - mean‖² + N ‖mean‖²
    whole = float(np.hypot(np.linalg.norm(sigma), np.sqrt(len(rows)) * np.linalg.norm(mean)))
    return np.zeros_like(sigma) if is_negligible(float(np.linalg.norm(sigma)), whole) else sigma


def _tolerance(Z: Array, sigma: Float[np.ndarray, " rank"]) -> float:
    """``max(N, d) · eps · σ_1`` with the eps of float32 for features of that precision or below, else of float64."""
    if isinstance(Z, torch.Tensor):
        is_single = Z.is_floating_point() and Z.dtype != torch.float64
    else:
        is_single = Z.dtype.kind == "f" and Z.dtype.itemsize <= 4
    return float(max(Z.shape) * np.finfo(np.float32 if is_single else np.float64).eps * sigma[0])


def _effective_rank(sigma: Float[np.ndarray, " rank"]) -> float:
    if sigma[0] == 0:
        return 0.0
    p = sigma[sigma > 0] / sigma.sum()
    return float(np.exp(-(p * np.log(p)).sum()))


def _rankme(sigma: Float[np.ndarray, " rank"]) -> float:
    if sigma[0] == 0:
        return 0.0
    p = sigma / sigma.sum() + 1e-7
    return float(np.exp(-(p * np.log(p)).sum()))


def _participation_ratio(sigma: Float[np.ndarray, " rank"]) -> float:
    if sigma[0] == 0:
        return 0.0
    eigenvalues = (sigma / sigma[0]) ** 2
    return float(eigenvalues.sum() ** 2 / (eigenvalues**2).sum())


def _stable_rank(sigma: Float[np.ndarray, " rank"]) -> float:
    return 0.0 if sigma[0] == 0 else float(((sigma / sigma[0]) ** 2).sum())


def _srank(sigma: Float[np.ndarray, " rank"], delta: float) -> int:
    if sigma[0] == 0:
        return 0
    share = np.cumsum(sigma) / sigma.sum()
    # The slack keeps an exact tie, such as 99 of 100 equal values, from being decided by rounding.
    return int(np.argmax(share >= (1 - delta) * (1 - 1e-12))) + 1

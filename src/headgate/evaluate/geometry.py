"""The shape of a cloud of features: spread, dead units, volume, and how pairs lie on the sphere.

- feature std and dead units: collapse seen dimension by dimension;
- coding rate ``R(Z, ε) = ½ logdet(I + d/(N ε²) ZᵀZ)`` and its reduction ΔR by classes (Yu et al. 2020, arXiv
  2006.08558): the nats needed to code the features up to distortion ε, and how many fewer once the class is known;
- alignment and uniformity on the unit sphere (Wang and Isola 2020, arXiv 2005.10242).

Ranks stand in :mod:`headgate.evaluate.rank`, geometry of labelled classes in :mod:`headgate.evaluate.class_geometry`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from headgate.evaluate.blocks import as_rows, blocks, column_means, unit_rows
from headgate.evaluate.checks import (
    Array,
    ZeroPolicy,
    as_labels,
    as_seed,
    check_count,
    check_same_length,
    check_same_width,
)
from headgate.validate import check_positive

__all__ = ["RateReduction", "alignment", "coding_rate", "dead_units", "feature_std", "rate_reduction", "uniformity"]

_CHUNK = 4096


@dataclass(frozen=True)
class RateReduction:
    """Coding rates of features with and without their classes, in nats.

    Attributes:
        reduction: ΔR = ``whole - within``, at least 0.
        whole: ``R(Z, ε)``.
        within: ``Σ_c (N_c / N) R(Z_c, ε)``.
        classes: ``(K,)`` the labels that occur, ascending.
        class_rates: ``(K,)`` ``R(Z_c, ε)`` of each class by itself.
    """

    reduction: float
    whole: float
    within: float
    classes: Int[np.ndarray, " classes"]
    class_rates: Float[np.ndarray, " classes"]


def feature_std(
    Z: Float[Array, "n dim"], *, zero: ZeroPolicy = "error", chunk: int = _CHUNK
) -> Float[np.ndarray, " dim"]:
    """Standard deviation of every dimension of the L2-normalised features.

    Around ``1/√d`` for features that fill the sphere, 0 for collapsed ones (Chen and He 2021, arXiv 2011.10566).

    Args:
        Z: ``(N, d)`` features.
        zero: what a zero row, which has no direction, leads to: an error, or it stays zero.
        chunk: rows per block; the values do not depend on it.

    Returns:
        ``(d,)``, with N in the denominator.

    Raises:
        TypeError: Z is no array of real numbers.
        ValueError: NaN or infinity, N or d is 0, or a zero row with ``zero="error"``.
    """
    rows = as_rows("Z", Z)
    mean = np.zeros(rows.shape[1])
    for _, block in _unit_blocks("Z", rows, zero, chunk):
        mean += block.sum(axis=0) / len(rows)
    squares = np.zeros(rows.shape[1])
    for _, block in _unit_blocks("Z", rows, zero, chunk):
        squares += ((block - mean) ** 2).sum(axis=0)
    return np.sqrt(squares / len(rows))


def dead_units(Z: Float[Array, "n dim"], threshold: float = 1e-6, *, chunk: int = _CHUNK) -> float:
    """Share of dimensions whose standard deviation over the items is below ``threshold``.

    Args:
        Z: ``(N, d)`` features, taken as they are.
        threshold: positive, in units of the features.
        chunk: rows per block; the value does not depend on it.

    Returns:
        In [0, 1].

    Raises:
        TypeError: Z is no array of real numbers.
        ValueError: NaN or infinity, N or d is 0, or ``threshold`` not positive.
    """
    check_positive(threshold=threshold)
    rows = as_rows("Z", Z)
    mean = column_means(rows, chunk)
    squares = np.zeros(rows.shape[1])
    for _, block in blocks(rows, chunk):
        squares += ((block - mean) ** 2).sum(axis=0)
    return float((np.sqrt(squares / len(rows)) < threshold).mean())


def coding_rate(
    Z: Float[Array, "n dim"],
    eps: float = 0.1,
    *,
    normalize: bool = False,
    zero: ZeroPolicy = "error",
    chunk: int = _CHUNK,
) -> float:
    """``½ logdet(I + d/(N ε²) ZᵀZ)``: the volume that the features fill at resolution ε, in nats.

    Args:
        Z: ``(N, d)`` features, uncentred as in the formula.
        eps: distortion ε (not its square), positive.
        normalize: divide every row by its L2 norm first, as the measurements of white-box transformers do.
        zero: what a zero row leads to when normalising: an error, or it stays zero.
        chunk: rows per block; the value does not depend on it.

    Returns:
        At least 0; 0 for all-zero features.

    Raises:
        TypeError: Z is no array of real numbers.
        ValueError: NaN or infinity, N or d is 0, ``eps`` not positive, or a zero row with ``zero="error"``.
    """
    check_positive(eps=eps)
    return _rate(as_rows("Z", Z), eps, chunk, zero if normalize else None)


def rate_reduction(
    Z: Float[Array, "n dim"],
    y: Int[Array, " n"],
    eps: float = 0.1,
    *,
    normalize: bool = False,
    zero: ZeroPolicy = "error",
    chunk: int = _CHUNK,
) -> RateReduction:
    """How many nats the class labels save: ``ΔR = R(Z, ε) - Σ_c (N_c / N) R(Z_c, ε)``.

    Args:
        Z: ``(N, d)`` features.
        y: ``(N,)`` integer labels.
        eps: distortion ε (not its square), positive.
        normalize: divide every row by its L2 norm first.
        zero: what a zero row leads to when normalising: an error, or it stays zero.
        chunk: rows per block; the values do not depend on it.

    Raises:
        TypeError: Z is no array of real numbers, or y not of integers.
        ValueError: NaN or infinity, N or d is 0, another number of labels, ``eps`` not positive, or a zero row with
            ``zero="error"``.
    """
    check_positive(eps=eps)
    rows = as_rows("Z", Z)
    labels = as_labels("y", y, length=len(rows))
    unit = zero if normalize else None
    classes, counts = np.unique(labels, return_counts=True)
    whole = _rate(rows, eps, chunk, unit)
    class_rates = np.array([_rate(rows[labels == label], eps, chunk, unit) for label in classes])
    within = float(counts @ class_rates) / len(rows)
    return RateReduction(whole - within, whole, within, classes, class_rates)


def alignment(
    X: Float[Array, "n dim"], Y: Float[Array, "n dim"], *, zero: ZeroPolicy = "error", chunk: int = _CHUNK
) -> float:
    """Mean squared distance of positive pairs on the unit sphere, ``E ‖f(x) - f(x⁺)‖²``.

    Args:
        X: ``(N, d)`` features of one view of every item.
        Y: ``(N, d)`` features of the other view, same order.
        zero: what a zero row, which has no direction, leads to: an error, or it stays zero.
        chunk: rows per block; the value does not depend on it.

    Returns:
        From 0 (the views coincide) to 4 (they are opposite).

    Raises:
        TypeError: X or Y is no array of real numbers.
        ValueError: NaN or infinity, different N or d, or a zero row with ``zero="error"``.
    """
    x, y = as_rows("X", X), as_rows("Y", Y)
    n = check_same_length(X=x, Y=y)
    check_same_width(X=x, Y=y)
    pairs = zip(_unit_blocks("X", x, zero, chunk), _unit_blocks("Y", y, zero, chunk), strict=True)
    return sum(float(((one - other) ** 2).sum()) for (_, one), (_, other) in pairs) / n


def uniformity(
    Z: Float[Array, "n dim"],
    t: float = 2.0,
    *,
    max_items: int = 10_000,
    seed: int = 0,
    zero: ZeroPolicy = "error",
    chunk: int = 1024,
) -> float:
    """``log E exp(-t ‖f(x) - f(y)‖²)`` over all pairs of different items, on the unit sphere.

    Args:
        Z: ``(N, d)`` features, N at least 2.
        t: sharpness, positive; 2 in the paper.
        max_items: of more items than this, a random sample of this size is used.
        seed: of that sample.
        zero: what a zero row, which has no direction, leads to: an error, or it stays zero.
        chunk: rows per block; memory is ``chunk`` times the number of items, and the value does not depend on it.

    Returns:
        From ``-4t`` (two opposite points) to 0 (all items in one point); lower is more uniform.

    Raises:
        TypeError: Z is no array of real numbers.
        ValueError: NaN or infinity, N or ``max_items`` below 2, ``t`` not positive, or a zero row with
            ``zero="error"``.
    """
    check_positive(t=t)
    check_count("max_items", max_items, low=2)
    rows = as_rows("Z", Z, min_rows=2)
    if len(rows) > max_items:
        rows = rows[np.sort(np.random.default_rng(as_seed("seed", seed)).choice(len(rows), max_items, replace=False))]
    unit = unit_rows("Z", rows.astype(np.float64), zero)
    n = len(unit)
    squares = (unit**2).sum(axis=1)
    largest, total = -np.inf, 0.0
    for start in range(0, n, check_count("chunk", chunk)):
        stop = min(start + chunk, n)
        exponent = -t * (squares[start:stop, None] + squares - 2 * unit[start:stop] @ unit.T).clip(min=0)
        exponent[np.arange(stop - start), np.arange(start, stop)] = -np.inf
        # Running log-sum-exp, so that a large t cannot underflow.
        peak = max(largest, float(exponent.max()))
        total = total * np.exp(largest - peak) + float(np.exp(exponent - peak).sum())
        largest = peak
    return float(largest + np.log(total / (n * (n - 1))))


def _unit_blocks(
    name: str, rows: np.ndarray, zero: ZeroPolicy, chunk: int
) -> Iterator[tuple[int, Float[np.ndarray, "block dim"]]]:
    for start, block in blocks(rows, chunk):
        yield start, unit_rows(name, block, zero, first_row=start)


def _rate(rows: np.ndarray, eps: float, chunk: int, unit: ZeroPolicy | None) -> float:
    """``½ logdet(I + d/(N ε²) ZᵀZ)`` on the smaller side of Z, of unit rows where ``unit`` says what a zero row does."""
    n, dim = rows.shape
    size = max(chunk, n) if n < dim else chunk
    source = blocks(rows, size) if unit is None else _unit_blocks("Z", rows, unit, size)
    product = np.zeros((min(n, dim), min(n, dim)))
    for _, block in source:
        product += block @ block.T if n < dim else block.T @ block
    factor = np.linalg.cholesky(np.eye(len(product)) + dim / (n * eps**2) * product)
    return float(np.log(np.diag(factor)).sum())

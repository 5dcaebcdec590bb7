"""Sums over the rows of a feature matrix, one block of float64 at a time.

The matrix may be a memory map in half precision: it is checked and read block by block and never copied whole, so
that memory is bounded by ``chunk`` rows and a few ``(d, d)`` matrices.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from jaxtyping import Float, Int, Shaped
from scipy.sparse import csr_array

from headgate.evaluate.checks import (
    Array,
    ZeroPolicy,
    check_count,
    check_finite,
    check_matrix,
    normalize_rows,
    to_numpy,
)

__all__ = [
    "as_rows",
    "blocks",
    "centred",
    "class_sums",
    "column_means",
    "is_negligible",
    "singular_values",
    "unit_rows",
]


def as_rows(name: str, values: Array, *, min_rows: int = 1) -> Shaped[np.ndarray, "n dim"]:
    """Check a feature matrix and hand it on as NumPy in its own dtype, not copied.

    Args:
        name: the argument's name in the message.
        values: ``(N, d)``, N and d positive, every value finite.
        min_rows: least number of rows that the caller's formula needs.

    Raises:
        TypeError: not an array of real numbers.
        ValueError: another rank, N or d is 0, fewer than ``min_rows`` rows, or a NaN or infinity (its row is named).
    """
    check_matrix(name, values)
    array = to_numpy(name, values)
    if array.shape[0] < min_rows:
        raise ValueError(f"{name} must have at least {min_rows} rows, got shape {array.shape}")
    check_finite(name, array)
    return array


def blocks(rows: Shaped[np.ndarray, "n dim"], chunk: int) -> Iterator[tuple[int, Float[np.ndarray, "block dim"]]]:
    """Go through ``rows`` in float64 blocks of ``chunk``, each with the number of its first row.

    Raises:
        TypeError: ``chunk`` is no integer.
        ValueError: ``chunk`` is below 1.
    """
    chunk = check_count("chunk", chunk)
    for start in range(0, rows.shape[0], chunk):
        yield start, rows[start : start + chunk].astype(np.float64)


def column_means(rows: Shaped[np.ndarray, "n dim"], chunk: int) -> Float[np.ndarray, " dim"]:
    """Mean of every column; a second pass removes the rounding of the first, so a constant column centres to 0."""
    mean = np.zeros(rows.shape[1])
    for _ in range(2):
        total = np.zeros(rows.shape[1])
        for _, block in blocks(rows, chunk):
            total += (block - mean).sum(axis=0)
        mean = mean + total / rows.shape[0]
    return mean


def singular_values(
    rows: Shaped[np.ndarray, "n dim"], chunk: int, mean: Float[np.ndarray, " dim"] | float = 0.0
) -> Float[np.ndarray, " rank"]:
    """The min(N, d) singular values of the rows minus ``mean``, largest first.

    A tall matrix is reduced to the triangle of its QR factorisation block by block: like the covariance it takes
    ``(d, d)`` memory, but it does not square the numbers, so small singular values keep their digits.
    """
    n, dim = rows.shape
    if n <= dim:
        return np.linalg.svd(rows.astype(np.float64) - mean, compute_uv=False)
    triangle = np.zeros((0, dim))
    for _, block in blocks(rows, max(check_count("chunk", chunk), dim)):
        triangle = np.asarray(np.linalg.qr(np.concatenate([triangle, block - mean]), mode="r"))
    return np.linalg.svd(triangle, compute_uv=False)


def class_sums(
    rows: Shaped[np.ndarray, "n dim"], classes: Int[np.ndarray, " n"], num_classes: int, chunk: int
) -> Float[np.ndarray, "classes dim"]:
    """Sum of the rows of each class, for classes numbered 0..K-1."""
    total = np.zeros((num_classes, rows.shape[1]))
    for start, block in blocks(rows, chunk):
        members = classes[start : start + len(block)]
        ones = csr_array((np.ones(len(block)), (members, np.arange(len(block)))), shape=(num_classes, len(block)))
        total += ones @ block
    return total


def centred(rows: Float[np.ndarray, "n dim"]) -> tuple[Float[np.ndarray, "n dim"], Float[np.ndarray, " dim"]]:
    """A float64 matrix minus its column means, and the means; all zeros where only rounding error is left."""
    mean = column_means(rows, len(rows))
    deviations = rows - mean
    if is_negligible(float(np.abs(deviations).max()), float(np.abs(rows).max())):
        deviations = np.zeros_like(deviations)
    return deviations, mean


def unit_rows(
    name: str, rows: Float[np.ndarray, "n dim"], zero: ZeroPolicy, *, first_row: int = 0
) -> Float[np.ndarray, "n dim"]:
    """Divide every row of a float64 matrix by its L2 norm; ``zero`` and ``first_row`` as in :func:`normalize_rows`."""
    return normalize_rows(name, torch.from_numpy(rows), zero=zero, first_row=first_row).numpy()


def is_negligible(part: float, whole: float) -> bool:
    """Whether the size ``part`` is no more than the rounding error of numbers of size ``whole``."""
    return part <= 1e-14 * whole

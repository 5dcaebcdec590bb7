"""How alike are two representations of the same N items? CKA, SVCCA, PWCCA, RSA and shared neighbours.

- CKA (Kornblith et al. 2019, arXiv 1905.00414): ``HSIC(K, L) / sqrt(HSIC(K, K) HSIC(L, L))`` of two kernel matrices;
  the debiased form takes the unbiased HSIC (Song et al. 2012), so that independent features score 0 and not, as with
  few items and many dimensions, close to 1. Over mini-batches the three terms are averaged first (Nguyen et al. 2021).
- SVCCA (Raghu et al. 2017, arXiv 1706.05806) and PWCCA (Morcos et al. 2018, arXiv 1806.05759): canonical correlations.
- RSA (Kriegeskorte et al. 2008): rank correlation of the two vectors of pairwise distances.
- mutual k-NN (Huh et al. 2024, arXiv 2405.07987): share of neighbours that both spaces agree on.

All is computed in float64. A value that the formula leaves undefined is nan, with the reason as a ``RuntimeWarning``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Float, Int
from scipy.stats import rankdata

from headgate.evaluate.blocks import blocks, centred, unit_rows
from headgate.evaluate.checks import (
    Array,
    ZeroPolicy,
    as_features,
    check_choice,
    check_count,
    check_same_length,
)
from headgate.evaluate.search import DistanceMetric, Exclusion, search_excluding
from headgate.evaluate.undefined import undefined
from headgate.validate import check_positive

__all__ = ["Kernel", "cka", "cka_minibatch", "mutual_knn", "neighbour_overlap", "pwcca", "rsa", "svcca"]

Kernel = Literal["linear", "rbf"]


class _HSIC(NamedTuple):
    """HSIC of X with Y, X with X and Y with Y; a self-term that is only rounding error is exactly 0."""

    xy: float
    xx: float
    yy: float


def cka(
    X: Float[Array, "n dim_x"],
    Y: Float[Array, "n dim_y"],
    kernel: Kernel = "linear",
    debiased: bool = True,
    *,
    bandwidth: float = 1.0,
    chunk: int = 1024,
) -> float:
    """Centred kernel alignment of two representations: 1 for equal geometry, 0 for independence.

    Unchanged by a rotation, an isotropic scale or an offset of either representation. The biased form is for
    comparison with published numbers: independent Gaussians with n = 50 and d = 400 score 0.88 there, 0.03 debiased.

    Args:
        X: ``(N, d_x)`` features.
        Y: ``(N, d_y)`` features of the same items in the same order.
        kernel: ``"linear"``, or ``"rbf"``: ``exp(-‖x - x'‖² / 2σ²)``.
        debiased: unbiased HSIC (the default; can be slightly negative), or the biased one, in [0, 1].
        bandwidth: σ of the RBF kernel in units of its default, whose square is the median of the non-zero squared
            distances. The median needs all N(N - 1)/2 distances in memory.
        chunk: rows per block; memory is ``chunk · N`` numbers for kernels, and the value does not depend on it.

    Returns:
        The similarity; nan, with a warning, if either representation has no variation that the kernel can see.

    Raises:
        TypeError: X or Y is no array of real numbers.
        ValueError: NaN or infinity, different N, N < 4 (debiased) or N < 2 (biased), or an unknown kernel.
    """
    named = [_centred(name, values) for name, values in (("X", X), ("Y", Y))]
    # Scaling changes no CKA, and keeps the fourth powers of very small or large features within range.
    x, y = ((name, rows / (np.abs(rows).max() or 1.0)) for name, rows in named)
    return _alignment("cka", _hsic(x, y, kernel, debiased, bandwidth, chunk))


def cka_minibatch(
    batches: Iterable[tuple[Float[Array, "n dim_x"], Float[Array, "n dim_y"]]],
    kernel: Kernel = "linear",
    debiased: bool = True,
    *,
    bandwidth: float = 1.0,
    chunk: int = 1024,
) -> float:
    """CKA over mini-batches: the three HSIC terms are averaged over the batches, then divided.

    With ``debiased=True`` the three averages are unbiased for any batch size, so that the value converges to that of
    all items at once as batches are added; batches count alike, whatever their size.

    Args:
        batches: pairs ``(X, Y)`` of ``(n, d_x)`` and ``(n, d_y)``; taken one after the other.
        kernel: as in :func:`cka`.
        debiased: as in :func:`cka`.
        bandwidth: as in :func:`cka`; the median is that of each batch.
        chunk: as in :func:`cka`.

    Returns:
        The similarity; nan, with a warning, if a representation is constant within every batch.

    Raises:
        TypeError: as :func:`cka`.
        ValueError: as :func:`cka` (the batch is named), or no batch.
    """
    terms = [
        _hsic(_centred(f"X of batch {i}", X), _centred(f"Y of batch {i}", Y), kernel, debiased, bandwidth, chunk)
        for i, (X, Y) in enumerate(batches)
    ]
    if not terms:
        raise ValueError("batches must hold at least one pair (X, Y), got none")
    return _alignment("cka_minibatch", _HSIC(*(float(mean) for mean in np.mean(terms, axis=0))))


def svcca(X: Float[Array, "n dim_x"], Y: Float[Array, "n dim_y"], variance: float = 0.99) -> float:
    """Mean canonical correlation of the principal components that keep ``variance`` of each representation.

    Unchanged by a rotation, an isotropic scale or an offset of either representation.

    Args:
        X: ``(N, d_x)`` features.
        Y: ``(N, d_y)`` features of the same items in the same order.
        variance: share of the variance that the kept components explain, in (0, 1].

    Returns:
        The mean over the smaller number of kept components, in [0, 1]; nan, with a warning, for constant features.

    Raises:
        TypeError: X or Y is no array of real numbers.
        ValueError: NaN or infinity, different N, or N not above 5 times the kept components of either: with fewer
            items canonical correlations are high for any two representations.
    """
    return _canonical("svcca", X, Y, variance).mean


def pwcca(X: Float[Array, "n dim_x"], Y: Float[Array, "n dim_y"], variance: float = 0.99) -> float:
    """Canonical correlations weighted by how much of X each canonical direction accounts for.

    ``Σ α_i ρ_i / Σ α_i`` with ``α_i = Σ_j |⟨h_i, x_j⟩|``, ``h_i`` the canonical variates of X and ``x_j`` its centred
    columns. Not symmetric, and the weights depend on the basis of X; unchanged by a rotation of Y, and by an isotropic
    scale or an offset of either.

    Args:
        X: ``(N, d_x)`` features, whose directions are weighted.
        Y: ``(N, d_y)`` features of the same items in the same order.
        variance: share of the variance that the kept components explain, in (0, 1].

    Returns:
        The weighted mean, in [0, 1]; nan, with a warning, for constant features.

    Raises:
        TypeError: X or Y is no array of real numbers.
        ValueError: as :func:`svcca`.
    """
    return _canonical("pwcca", X, Y, variance).weighted


def rsa(
    X: Float[Array, "n dim_x"],
    Y: Float[Array, "n dim_y"],
    metric: Literal["euclidean", "cosine", "correlation"] = "euclidean",
    *,
    zero: ZeroPolicy = "error",
    chunk: int = 1024,
) -> float:
    """Representational similarity: Spearman correlation of the pairwise distances in the two spaces.

    Args:
        X: ``(N, d_x)`` features, N at least 3.
        Y: ``(N, d_y)`` features of the same items in the same order.
        metric: distance inside each space; ``"correlation"`` is 1 minus Pearson's correlation of two rows. With
            ``"euclidean"`` the value is unchanged by a rotation, an isotropic scale or an offset of either space.
        zero: what a zero row (a constant row for ``"correlation"``) leads to, as its cosine is undefined: an error, or
            a distance of 1 to every row.
        chunk: rows per block; the value does not depend on it. The ranks of all N(N - 1)/2 pairs are held in memory.

    Returns:
        Correlation in [-1, 1], tied distances sharing their mean rank; nan, with a warning, if all distances of a
        space are equal.

    Raises:
        TypeError: X or Y is no array of real numbers.
        ValueError: NaN or infinity, different N, N < 3, an unknown metric, or a zero row with ``zero="error"``.
    """
    check_choice("metric", metric, ("euclidean", "cosine", "correlation"))
    x = as_features("X", X, dtype=np.float64, min_rows=3)
    y = as_features("Y", Y, dtype=np.float64, min_rows=3)
    check_same_length(X=x, Y=y)
    ranks = [_distance_ranks(name, rows, metric, zero, chunk) for name, rows in (("X", x), ("Y", y))]
    for name, rank in zip("XY", ranks, strict=True):
        if rank.min() == rank.max():
            return undefined("rsa", f"all pairwise distances of {name} are equal")
    a, b = (rank - rank.mean() for rank in ranks)
    return float(a @ b / np.sqrt((a @ a) * (b @ b)))


def mutual_knn(
    X: Float[Array, "n dim_x"],
    Y: Float[Array, "n dim_y"],
    k: int = 10,
    metric: DistanceMetric = "cosine",
    *,
    zero: ZeroPolicy = "error",
    chunk: int = 1024,
) -> float:
    """Mean share of the ``k`` nearest neighbours of an item that are its neighbours in both spaces.

    Args:
        X: ``(N, d_x)`` features.
        Y: ``(N, d_y)`` features of the same items in the same order.
        k: neighbours per item, at most N - 1; an item is no neighbour of itself. Independent spaces score
            ``k / (N - 1)`` on average.
        metric: ``"cosine"``, ``"l2"`` or ``"ip"``; with ``"l2"`` an offset does not matter.
        zero: what a zero row leads to under ``"cosine"``: an error, or a similarity of 0 to every row.
        chunk: rows per block of the search; the value does not depend on it.

    Returns:
        Overlap in [0, 1]. Ties go to the item that comes first.

    Raises:
        TypeError: X or Y is no array of real numbers.
        ValueError: NaN or infinity, different N, k out of range, or a zero row with ``zero="error"``.
    """
    x = as_features("X", X, dtype=np.float64, min_rows=2)
    y = as_features("Y", Y, dtype=np.float64, min_rows=2)
    k = check_count("k", k, high=check_same_length(X=x, Y=y) - 1)
    if metric == "cosine":
        x, y, metric = unit_rows("X", x, zero), unit_rows("Y", y, zero), "ip"
    own = Exclusion(own=np.arange(len(x)))
    in_x, in_y = (search_excluding(rows, rows, k, own, metric=metric, chunk=chunk).ids for rows in (x, y))
    return float(neighbour_overlap(in_x, in_y).mean()) / k


def neighbour_overlap(first: Int[np.ndarray, "n k"], second: Int[np.ndarray, "n k"]) -> Int[np.ndarray, " n"]:
    """How many ids two lists of neighbours share, row by row.

    Args:
        first: ``(N, k)`` ids, none twice in a row.
        second: ``(N, k)`` likewise.

    Returns:
        ``(N,)`` from 0 to k.
    """
    both = np.sort(np.concatenate([first, second], axis=1), axis=1)
    return (both[:, 1:] == both[:, :-1]).sum(axis=1)


def _centred(name: str, values: Array) -> tuple[str, Float[np.ndarray, "n dim"]]:
    return name, centred(as_features(name, values, dtype=np.float64))[0]


def _alignment(measure: str, terms: _HSIC) -> float:
    for name, self_term in (("X", terms.xx), ("Y", terms.yy)):
        if self_term <= 0:
            return undefined(measure, f"{name} is constant, or all its items are equally similar to each other")
    return terms.xy / float(np.sqrt(terms.xx) * np.sqrt(terms.yy))


def _hsic(
    X: tuple[str, Float[np.ndarray, "n dim_x"]],
    Y: tuple[str, Float[np.ndarray, "n dim_y"]],
    kernel: Kernel,
    debiased: bool,
    bandwidth: float,
    chunk: int,
) -> _HSIC:
    """The three HSIC terms of two centred representations, by whichever form of the formula is cheaper."""
    check_choice("kernel", kernel, ("linear", "rbf"))
    check_positive(bandwidth=bandwidth)
    (name_x, x), (name_y, y) = X, Y
    n = check_same_length(**{name_x: x, name_y: y})
    needed = 4 if debiased else 2
    if n < needed:
        form = "debiased" if debiased else "biased"
        raise ValueError(f"{name_x} and {name_y} must have at least {needed} rows for the {form} CKA, got {n}")
    if kernel == "linear" and max(x.shape[1], y.shape[1]) < n:
        return _hsic_from_features(x, y, debiased, chunk)
    scales: list[float | None] = [None, None]
    if kernel == "rbf":
        scales = [_two_sigma_squared(rows, bandwidth, chunk) for rows in (x, y)]
    return _hsic_from_kernels(x, y, scales, debiased, chunk)


def _hsic_from_features(
    x: Float[np.ndarray, "n dim_x"], y: Float[np.ndarray, "n dim_y"], debiased: bool, chunk: int
) -> _HSIC:
    """HSIC of linear kernels without the kernels: ``Σ_ij K_ij L_ij = ‖XᵀY‖²_F``, and centred K has rows of sum 0."""
    n = len(x)
    products = [np.zeros((left.shape[1], right.shape[1])) for left, right in ((x, y), (x, x), (y, y))]
    norms = np.zeros((3, 3))  # Σ_i a_i b_i for a, b out of ‖x_i‖², ‖y_i‖² and 1
    for start, block in blocks(x, chunk):
        other = y[start : start + len(block)]
        for total, (left, right) in zip(products, ((block, other), (block, block), (other, other)), strict=True):
            total += left.T @ right
        squares = np.stack([(block**2).sum(axis=1), (other**2).sum(axis=1), np.ones(len(block))])
        norms += squares @ squares.T
    terms = []
    for total, (a, b) in zip(products, ((0, 1), (0, 0), (1, 1)), strict=True):
        full = float((total**2).sum())
        if debiased:
            # Without its diagonal a centred linear kernel has row sums -‖x_i‖².
            terms.append(_unbiased(n, full - norms[a, b], norms[a, b], norms[a, 2] * norms[b, 2]))
        else:
            terms.append(full / (n - 1) ** 2)
    return _HSIC(*terms)


def _hsic_from_kernels(
    x: Float[np.ndarray, "n dim_x"],
    y: Float[np.ndarray, "n dim_y"],
    scales: list[float | None],
    debiased: bool,
    chunk: int,
) -> _HSIC:
    """HSIC from blocks of rows of the two kernel matrices, which are never held whole."""
    n = len(x)
    products = np.zeros((2, 2))  # Σ_ij K_ij L_ij for all pairs of kernels
    row_sums = np.zeros((2, n))
    for start in range(0, n, check_count("chunk", chunk)):
        rows = slice(start, min(start + chunk, n))
        pair = [_kernel_rows(features, rows, scale) for features, scale in zip((x, y), scales, strict=True)]
        if debiased:
            for block in pair:
                block[np.arange(rows.stop - rows.start), np.arange(rows.start, rows.stop)] = 0.0
        row_sums[:, rows] = [block.sum(axis=1) for block in pair]
        flat = [block.reshape(-1) for block in pair]
        products += [[a @ b for b in flat] for a in flat]
    terms = []
    for a, b in ((0, 1), (0, 0), (1, 1)):
        of_rows = float(row_sums[a] @ row_sums[b])
        of_totals = float(row_sums[a].sum() * row_sums[b].sum())
        if debiased:
            terms.append(_unbiased(n, float(products[a, b]), of_rows, of_totals))
        else:
            # ⟨HKH, HLH⟩ written out
            value = float(products[a, b]) - 2 * of_rows / n + of_totals / n**2
            terms.append(0.0 if abs(value) <= 1e-13 * abs(products[a, b]) else value / (n - 1) ** 2)
    return _HSIC(*terms)


def _unbiased(n: int, of_entries: float, of_rows: float, of_totals: float) -> float:
    """Unbiased HSIC of kernels without diagonal (Song et al. 2012, eq. 5), 0 where only rounding error is left.

    Args:
        n: number of items.
        of_entries: ``Σ_ij K_ij L_ij``.
        of_rows: ``Σ_i (K1)_i (L1)_i``.
        of_totals: ``(1ᵀK1)(1ᵀL1)``.
    """
    value = of_entries + of_totals / ((n - 1) * (n - 2)) - 2 * of_rows / (n - 2)
    if abs(value) <= 1e-13 * (abs(of_entries) + abs(of_rows)):
        return 0.0
    return value / (n * (n - 3))


def _kernel_rows(
    features: Float[np.ndarray, "n dim"], rows: slice, two_sigma_squared: float | None
) -> Float[np.ndarray, "rows n"]:
    """Some rows of the linear kernel, or of the RBF kernel minus 1: HSIC is blind to the constant."""
    if two_sigma_squared is None:
        return features[rows] @ features.T
    return np.expm1(-_squared_distances(features, rows) / two_sigma_squared)


def _squared_distances(features: Float[np.ndarray, "n dim"], rows: slice) -> Float[np.ndarray, "rows n"]:
    """Squared distances of some rows to all rows; 0 where only rounding error separates two."""
    squares = np.einsum("nd,nd->n", features, features)
    sums = squares[rows, None] + squares
    distances = sums - 2 * features[rows] @ features.T
    distances[distances <= 1e-13 * sums] = 0.0
    return distances


def _two_sigma_squared(features: Float[np.ndarray, "n dim"], bandwidth: float, chunk: int) -> float:
    """``2σ²`` with σ² the median of the non-zero squared distances, times ``bandwidth²``."""
    distances = _pairs(len(features), lambda rows: _squared_distances(features, rows), chunk)
    distances = distances[distances > 0]
    return 2 * bandwidth**2 * float(np.median(distances, overwrite_input=True)) if len(distances) else 1.0


def _pairs(n: int, values: Callable[[slice], Float[np.ndarray, "rows n"]], chunk: int) -> Float[np.ndarray, " pairs"]:
    """The entries above the diagonal of an (n, n) matrix, row by row, from a function that gives some of its rows."""
    found = np.empty(n * (n - 1) // 2)
    filled = 0
    for start in range(0, n, check_count("chunk", chunk)):
        rows = slice(start, min(start + chunk, n))
        above = values(rows)[np.arange(n) > np.arange(rows.start, rows.stop)[:, None]]
        found[filled : filled + len(above)] = above
        filled += len(above)
    return found


class _Canonical(NamedTuple):
    mean: float
    weighted: float


def _canonical(measure: str, X: Array, Y: Array, variance: float) -> _Canonical:
    if not 0 < variance <= 1:
        raise ValueError(f"variance must lie in (0, 1], got variance={variance}")
    (_, x), (_, y) = _centred("X", X), _centred("Y", Y)
    n = check_same_length(X=x, Y=y)
    kept = []
    for name, rows in (("X", x), ("Y", y)):
        left, singular, right = np.linalg.svd(rows, full_matrices=False)
        if singular[0] == 0:
            value = undefined(measure, f"{name} is constant")
            return _Canonical(value, value)
        share = np.cumsum(singular**2) / (singular**2).sum()
        components = int(np.argmax(share >= variance * (1 - 1e-12))) + 1
        components = min(components, int((singular > max(rows.shape) * np.finfo(np.float64).eps * singular[0]).sum()))
        if n <= 5 * components:
            raise ValueError(
                f"{measure} needs more than 5 items per dimension, got N={n} for the {components} components that keep "
                f"{variance:g} of the variance of {name}; give more items or lower variance"
            )
        kept.append((left[:, :components], singular[:components, None] * right[:components]))
    (basis_x, loadings_x), (basis_y, _) = kept
    left, correlation, _ = np.linalg.svd(basis_x.T @ basis_y, full_matrices=False)
    correlation = correlation.clip(0, 1)
    # h_i = basis_x @ left[:, i], and the centred columns of X are basis_x @ loadings_x.
    alpha = np.abs(left.T @ loadings_x).sum(axis=1)
    return _Canonical(float(correlation.mean()), float(alpha @ correlation / alpha.sum()))


def _distance_ranks(
    name: str, rows: Float[np.ndarray, "n dim"], metric: str, zero: ZeroPolicy, chunk: int
) -> Float[np.ndarray, " pairs"]:
    """Ranks of the distances of all pairs; those that agree to 1e-12 of the largest tie, whatever their rounding."""
    if metric == "euclidean":
        features, _ = centred(rows)
        features = features / (np.abs(features).max() or 1.0)
        distances = _pairs(len(rows), lambda some: _squared_distances(features, some), chunk)
    else:
        if metric == "correlation":
            deviations = rows - rows.mean(axis=1, keepdims=True)
            deviations[np.linalg.norm(deviations, axis=1) <= 1e-14 * np.linalg.norm(rows, axis=1)] = 0.0
            rows = deviations
        unit = unit_rows(name, rows, zero)
        distances = _pairs(len(rows), lambda some: 1 - unit[some] @ unit.T, chunk)
    return rankdata(np.rint(distances / (1e-12 * (distances.max() or 1.0))))

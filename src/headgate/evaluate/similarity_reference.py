"""The definitions behind :mod:`headgate.evaluate.similarity`, as they are written down; slow, for tests and reading."""

from __future__ import annotations

from itertools import combinations

import numpy as np
from jaxtyping import Float
from scipy.linalg import fractional_matrix_power
from scipy.stats import spearmanr

__all__ = ["cka_reference", "mutual_knn_reference", "pwcca_reference", "rsa_reference", "svcca_reference"]


def cka_reference(
    X: Float[np.ndarray, "n dim_x"], Y: Float[np.ndarray, "n dim_y"], kernel: str = "linear", debiased: bool = True
) -> float:
    """``HSIC(K, L) / sqrt(HSIC(K, K) HSIC(L, L))`` from the whole kernel matrices."""
    K, L = _kernel(X, kernel), _kernel(Y, kernel)
    hsic = _unbiased_hsic if debiased else _biased_hsic
    return hsic(K, L) / float(np.sqrt(hsic(K, K) * hsic(L, L)))


def svcca_reference(X: Float[np.ndarray, "n dim_x"], Y: Float[np.ndarray, "n dim_y"], variance: float = 0.99) -> float:
    """Mean canonical correlation of principal components, from covariance matrices."""
    correlations, _ = _cca(_principal(X, variance), _principal(Y, variance))
    return float(correlations.mean())


def pwcca_reference(X: Float[np.ndarray, "n dim_x"], Y: Float[np.ndarray, "n dim_y"], variance: float = 0.99) -> float:
    """Canonical correlations weighted by ``α_i = Σ_j |⟨h_i, x_j⟩|``, h_i of unit length."""
    components = _principal(X, variance)
    correlations, directions = _cca(components, _principal(Y, variance))
    columns = (X - X.mean(axis=0)).T
    alpha = []
    for direction in directions.T:
        h = components @ direction
        alpha.append(sum(abs(float(h @ x)) for x in columns) / float(np.linalg.norm(h)))
    return float(np.average(correlations, weights=alpha))


def rsa_reference(X: Float[np.ndarray, "n dim_x"], Y: Float[np.ndarray, "n dim_y"]) -> float:
    """Spearman correlation of the Euclidean distances of all pairs of items."""
    pairs = list(combinations(range(len(X)), 2))
    of_x = [float(np.linalg.norm(X[i] - X[j])) for i, j in pairs]
    of_y = [float(np.linalg.norm(Y[i] - Y[j])) for i, j in pairs]
    return float(spearmanr(of_x, of_y).statistic)


def mutual_knn_reference(
    X: Float[np.ndarray, "n dim_x"], Y: Float[np.ndarray, "n dim_y"], k: int = 10, metric: str = "cosine"
) -> float:
    """Mean of ``|N_k(i in X) ∩ N_k(i in Y)| / k``."""
    return float(np.mean([len(_nearest(X, i, k, metric) & _nearest(Y, i, k, metric)) / k for i in range(len(X))]))


def _kernel(X: Float[np.ndarray, "n dim"], kernel: str) -> Float[np.ndarray, "n n"]:
    if kernel == "linear":
        return X @ X.T
    squares = np.array([[float(((a - b) ** 2).sum()) for b in X] for a in X])
    return np.exp(-squares / (2 * np.median(squares[squares > 0])))


def _biased_hsic(K: Float[np.ndarray, "n n"], L: Float[np.ndarray, "n n"]) -> float:
    n = len(K)
    H = np.eye(n) - 1 / n
    return float(((H @ K @ H) * (H @ L @ H)).sum()) / (n - 1) ** 2


def _unbiased_hsic(K: Float[np.ndarray, "n n"], L: Float[np.ndarray, "n n"]) -> float:
    """Song et al. (2012), eq. 5, with the diagonals removed."""
    n = len(K)
    K, L = K - np.diag(np.diag(K)), L - np.diag(np.diag(L))
    one = np.ones(n)
    trace = np.trace(K @ L)
    totals = (one @ K @ one) * (one @ L @ one) / ((n - 1) * (n - 2))
    return float((trace + totals - 2 / (n - 2) * (one @ K @ L @ one)) / (n * (n - 3)))


def _principal(X: Float[np.ndarray, "n dim"], variance: float) -> Float[np.ndarray, "n kept"]:
    centred = X - X.mean(axis=0)
    eigenvalues, eigenvectors = np.linalg.eigh(centred.T @ centred)
    order = np.argsort(-eigenvalues)
    kept = 0
    while eigenvalues[order[:kept]].sum() < variance * eigenvalues.sum() * (1 - 1e-12):
        kept += 1
    return centred @ eigenvectors[:, order[:kept]]


def _cca(
    A: Float[np.ndarray, "n a"], B: Float[np.ndarray, "n b"]
) -> tuple[Float[np.ndarray, " pairs"], Float[np.ndarray, "a pairs"]]:
    """Canonical correlations and the directions of A: SVD of ``C_aa^(-1/2) C_ab C_bb^(-1/2)``."""
    whiten_a = fractional_matrix_power(A.T @ A, -0.5)
    whiten_b = fractional_matrix_power(B.T @ B, -0.5)
    left, correlations, _ = np.linalg.svd(whiten_a @ (A.T @ B) @ whiten_b, full_matrices=False)
    return correlations, whiten_a @ left


def _nearest(X: Float[np.ndarray, "n dim"], i: int, k: int, metric: str) -> set[int]:
    def distance(j: int) -> float:
        if metric == "l2":
            return float(np.linalg.norm(X[i] - X[j]))
        product = float(X[i] @ X[j])
        return -product if metric == "ip" else -product / float(np.linalg.norm(X[i]) * np.linalg.norm(X[j]))

    return set(sorted((j for j in range(len(X)) if j != i), key=distance)[:k])

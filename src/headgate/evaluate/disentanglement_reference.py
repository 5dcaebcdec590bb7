"""The definitions behind :mod:`headgate.evaluate.disentanglement`, as written down; slow, for tests and reading."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
from jaxtyping import Float, Int

__all__ = ["knn_information_reference", "modularity_reference", "plugin_information_reference"]


def plugin_information_reference(a: Int[np.ndarray, " n"], b: Int[np.ndarray, " n"]) -> float:
    """Mutual information of two discrete variables from counts, in nats."""
    n = len(a)
    of_a, of_b = Counter(a.tolist()), Counter(b.tolist())
    joint = Counter(zip(a.tolist(), b.tolist(), strict=True))
    return sum(count / n * math.log(count * n / (of_a[i] * of_b[j])) for (i, j), count in joint.items())


def knn_information_reference(
    labels: Int[np.ndarray, " n"], column: Float[np.ndarray, " n"], neighbours: int = 10
) -> float:
    """Ross (2014), eq. 1, by sorting all distances of every point; a point alone in its class is left out."""
    size = Counter(labels.tolist())
    points = [(label, x) for label, x in zip(labels.tolist(), column.tolist(), strict=True) if size[label] > 1]
    terms = []
    for i, (label, x) in enumerate(points):
        peers = sorted(abs(x - other) for j, (of, other) in enumerate(points) if of == label and j != i)
        k = min(neighbours, len(peers))
        m = sum(abs(x - other) < peers[k - 1] for _, other in points)
        terms.append(_digamma(k) - _digamma(size[label]) - _digamma(m))
    return max(0.0, _digamma(len(points)) + float(np.mean(terms)))


def modularity_reference(nmi: Float[np.ndarray, "source latent"]) -> tuple[float, float]:
    """InfoM and InfoC of a matrix of the kept latents, latent by latent and source by source."""
    num_sources, num_latents = nmi.shape
    of_latents = [max(nmi[:, j]) / sum(nmi[:, j]) for j in range(num_latents)]
    of_sources = [max(nmi[i]) / sum(nmi[i]) for i in range(num_sources)]
    infom = (np.mean(of_latents) - 1 / num_sources) / (1 - 1 / num_sources)
    infoc = (np.mean(of_sources) - 1 / num_latents) / (1 - 1 / num_latents)
    return float(infom), float(infoc)


def _digamma(n: int) -> float:
    """``ψ(n) = -γ + Σ_{k<n} 1/k`` for a positive integer."""
    return -float(np.euler_gamma) + sum(1 / k for k in range(1, n))

"""The definitions behind :mod:`headgate.evaluate.attention`, as loops over one map; slow, for tests and reading."""

from __future__ import annotations

import math

import numpy as np
from jaxtyping import Float

__all__ = ["attention_distance_reference", "attention_entropy_reference", "attention_nmi_reference"]


def attention_distance_reference(attention: Float[np.ndarray, "n n"], grid: tuple[int, int]) -> float:
    """``mean_q Σ_k A_qk ‖pos_q - pos_k‖`` of one image and head, in patches."""
    positions = [(row, column) for row in range(grid[0]) for column in range(grid[1])]
    total = 0.0
    for q, at in enumerate(positions):
        for k, to in enumerate(positions):
            total += float(attention[q, k]) * math.dist(at, to)
    return total / len(positions)


def attention_nmi_reference(attention: Float[np.ndarray, "n n"]) -> float:
    """``Σ p(q, k) log(A_qk / p(k)) / sqrt(H(q) H(k))`` of one image and head; 0 where an entropy is 0."""
    n = len(attention)
    p_key = [sum(float(attention[q, k]) for q in range(n)) / n for k in range(n)]
    information = 0.0
    for q in range(n):
        for k in range(n):
            weight = float(attention[q, k])
            if weight > 0:
                information += weight / n * math.log(weight / p_key[k])
    key_entropy = -sum(p * math.log(p) for p in p_key if p > 0)
    scale = math.sqrt(max(key_entropy, 0.0) * math.log(n))
    return information / scale if scale > 0 else 0.0


def attention_entropy_reference(attention: Float[np.ndarray, "n n"]) -> float:
    """``mean_q -Σ_k A_qk log A_qk`` of one image and head."""
    return float(np.mean([-sum(float(a) * math.log(a) for a in row if a > 0) for row in attention]))

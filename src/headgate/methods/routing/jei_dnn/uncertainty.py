"""How unsure a prediction is, in four numbers: what a gate of JEI-DNN reads (paper, Section 4.2).

With p = softmax(f) and q = p² / Σ p²::

    u = (max p,  −Σ p ln p,  p₍₁₎ − p₍₂₎,  −Σ q ln q)

The order is that of the official checkpoints.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from headgate.validate import check_floating, check_shape

__all__ = ["NUM_UNCERTAINTIES", "check_finite_logits", "uncertainty_features"]

NUM_UNCERTAINTIES = 4


def uncertainty_features(logits: Float[Tensor, "batch classes"]) -> Float[Tensor, "batch 4"]:
    """Compute the statistics of a prediction, detached from the graph.

    Args:
        logits: ``(batch, classes)``, two classes or more (the margin needs two), finite.

    Returns:
        ``(batch, 4)`` of the dtype of ``logits``: greatest probability in (0, 1], entropy in nats, margin between the
        two greatest probabilities in [0, 1], entropy of the normalised squared probabilities in nats.

    Raises:
        TypeError: not floating point.
        ValueError: another rank, fewer than two classes, or a value that is not finite (not looked at while a graph is
            captured).
    """
    check_shape("logits", logits, (None, None), "batch, classes")
    check_floating("logits", logits)
    if logits.shape[1] < 2:
        raise ValueError(f"logits must have at least two classes, got {tuple(logits.shape)}")
    check_finite_logits("logits", logits)
    wide = torch.promote_types(logits.dtype, torch.float32)
    p = logits.detach().to(wide).softmax(dim=1)
    top = p.topk(2, dim=1).values
    squared = p.square()
    # The greatest square is at least 1/C², so the sum cannot vanish.
    q = squared / squared.sum(dim=1, keepdim=True)
    features = torch.stack([top[:, 0], _entropy(p), top[:, 0] - top[:, 1], _entropy(q)], dim=1)
    return features.to(logits.dtype)


def check_finite_logits(name: str, logits: Tensor) -> None:
    """Refuse NaN and infinity, where values can be looked at: not on the meta device, nor while a graph is captured.

    Raises:
        ValueError: a value is not finite; the number of such values is named.
    """
    if torch.compiler.is_compiling() or logits.is_meta:
        return
    finite = torch.isfinite(logits)
    if not bool(finite.all()):
        raise ValueError(f"{name} must be finite, got {int((~finite).sum())} of {logits.numel()} values that are not")


def _entropy(p: Float[Tensor, "batch classes"]) -> Float[Tensor, " batch"]:
    return -torch.special.xlogy(p, p).sum(dim=1)

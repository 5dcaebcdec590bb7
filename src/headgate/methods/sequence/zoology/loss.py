"""The loss and the score of a recall task: over labelled positions only."""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from headgate.data.recall import IGNORED
from headgate.validate import check_floating, check_integer, check_shape

__all__ = ["RecallLoss", "recall_accuracy"]


class RecallLoss(nn.Module):
    """Cross-entropy over the positions whose label is not -100; zero where there is none.

    Args:
        reduction: ``"mean"`` over the labelled positions, ``"sum"``, or ``"none"`` for one value per position.
    """

    def __init__(self, reduction: Literal["mean", "sum", "none"] = "mean") -> None:
        super().__init__()
        if reduction not in ("mean", "sum", "none"):
            raise ValueError(f"reduction must be 'mean', 'sum' or 'none', got {reduction!r}")
        self.reduction = reduction

    def forward(
        self, logits: Float[Tensor, "batch length vocab"], labels: Int[Tensor, "batch length"]
    ) -> Float[Tensor, ""] | Float[Tensor, "batch length"]:
        """Score ``logits`` ``(batch, length, vocab)`` against ``labels`` ``(batch, length)``.

        Returns:
            A scalar; with the reduction ``"none"`` ``(batch, length)`` with zeros where there is no label.

        Raises:
            TypeError: ``logits`` are not floating, or ``labels`` no integers.
            ValueError: wrong shape.
        """
        check_shape("logits", logits, (None, None, None), "batch, length, vocab")
        check_floating("logits", logits)
        check_shape("labels", labels, tuple(logits.shape[:2]), "batch, length")
        check_integer("labels", labels)
        flat = labels.long().flatten()
        losses = F.cross_entropy(logits.flatten(0, 1), flat, ignore_index=IGNORED, reduction="none")
        if self.reduction == "none":
            return losses.view_as(labels)
        total = losses.sum()
        if self.reduction == "sum":
            return total
        return total / (flat != IGNORED).sum().clamp(min=1)


def recall_accuracy(logits: Float[Tensor, "batch length vocab"], labels: Int[Tensor, "batch length"]) -> float:
    """Share of the labelled positions whose highest logit is the label.

    Args:
        logits: ``(batch, length, vocab)``.
        labels: ``(batch, length)``, -100 where nothing is scored.

    Returns:
        A number in [0, 1]; nan where nothing is labelled.
    """
    scored = labels != IGNORED
    hits = (logits.argmax(-1) == labels)[scored]
    return float(hits.double().mean()) if hits.numel() else float("nan")

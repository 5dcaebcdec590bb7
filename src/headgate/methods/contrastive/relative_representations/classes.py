"""What the classes of the anchors are used for: averages over the anchors of a class, and anchors drawn anew per class.

The j-th anchor of a class (in the order of the anchors) belongs to its group ``j mod groups``; group g of class c stands
at position ``c + classes · g``. All is written as products with 0/1 matrices of fixed shape, so that nothing depends on
how many anchors a class has.
"""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from headgate.validate import check_integer, check_shape

__all__ = ["RESAMPLINGS", "Resampling", "check_anchor_labels", "class_means", "draw_anchors"]

Resampling = Literal["stratified", "gaussian"]
RESAMPLINGS = ("stratified", "gaussian")


def check_anchor_labels(
    labels: Int[Tensor, " anchors"], num_anchors: int, num_classes: int, *, every_class: bool = False
) -> None:
    """Check the classes of the anchors: one each, in [0, num_classes). Reads values, so not for a compiled forward.

    Args:
        labels: ``(K,)``.
        num_anchors: K.
        num_classes: C.
        every_class: each class must have an anchor.

    Raises:
        TypeError: no integers.
        ValueError: another shape, a class out of range, or one without an anchor.
    """
    check_shape("anchor_labels", labels, (num_anchors,), "anchors")
    check_integer("anchor_labels", labels)
    if labels.is_meta:
        return
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= num_classes:
        raise ValueError(f"anchor_labels must lie in [0, {num_classes}), got values from {low} to {high}")
    empty = [] if not every_class else (~_membership(labels, num_classes).any(dim=0)).nonzero().flatten().tolist()
    if empty:
        raise ValueError(f"anchor_labels must hold every class to draw anchors of each, got none of {empty}")


def class_means(
    similarities: Float[Tensor, "items anchors"], labels: Int[Tensor, " anchors"], num_classes: int, groups: int
) -> Float[Tensor, "items class_groups"]:
    """Mean similarity to the anchors of each group of each class.

    Args:
        similarities: ``(N, K)``.
        labels: ``(K,)`` classes of the anchors.
        num_classes: C.
        groups: groups per class.

    Returns:
        ``(N, C · groups)``, column ``class + C · group``; zeros for a group without anchors.
    """
    member = _membership(labels, num_classes)
    place = ((member.long().cumsum(dim=0) - 1) * member).sum(dim=1)
    column = labels + num_classes * (place % groups)
    chosen = _membership(column, num_classes * groups).to(similarities.dtype)
    return similarities @ (chosen / chosen.sum(dim=0).clamp_min(1))


def draw_anchors(
    anchors: Float[Tensor, "anchors dim"],
    labels: Int[Tensor, " anchors"],
    num_classes: int,
    per_class: int,
    mode: str,
    *,
    random: bool,
) -> tuple[Float[Tensor, "drawn dim"], Int[Tensor, " drawn"]]:
    """Anchors drawn anew, ``per_class`` of every class, classes in order.

    Args:
        anchors: ``(K, d)``.
        labels: ``(K,)``; every class has an anchor.
        num_classes: C.
        per_class: how many to draw.
        mode: ``"stratified"`` draws a class's anchors with replacement; ``"gaussian"`` draws from a normal distribution
            with the mean and the standard deviation of each coordinate over the class's anchors.
        random: draw, from PyTorch's global generator; without it the class's anchors are taken in turn, or its mean.

    Returns:
        ``(C · per_class, d)`` anchors and ``(C · per_class,)`` classes.
    """
    member = _membership(labels, num_classes).mT
    classes = torch.arange(num_classes, device=labels.device).repeat_interleave(per_class)
    if mode == "stratified":
        if random:
            chosen = torch.multinomial(member.float(), per_class, replacement=True)
        else:
            # Members first, in their order; then each takes its turn.
            order = torch.argsort((~member).to(torch.uint8), dim=1, stable=True)
            turn = torch.arange(per_class, device=labels.device) % member.sum(dim=1, keepdim=True).clamp_min(1)
            chosen = order.gather(1, turn)
        return anchors[chosen.flatten()], classes
    weight = member.to(anchors.dtype)
    count = weight.sum(dim=1, keepdim=True)
    mean = weight @ anchors / count.clamp_min(1)
    if not random:
        return mean.repeat_interleave(per_class, dim=0), classes
    variance = weight @ (anchors - mean[labels]).square() / (count - 1).clamp_min(1)
    # A class of one anchor has no spread, and the root of zero no finite gradient.
    deviation = variance.masked_fill(variance == 0, 1).sqrt().masked_fill(variance == 0, 0)
    noise = torch.randn(num_classes, per_class, anchors.shape[1], dtype=anchors.dtype, device=anchors.device)
    return (mean[:, None] + deviation[:, None] * noise).flatten(0, 1), classes


def _membership(labels: Int[Tensor, " anchors"], num_classes: int) -> Bool[Tensor, "anchors classes"]:
    return labels[:, None] == torch.arange(num_classes, device=labels.device)

"""Parts of a training set, for experiments on how much data a method needs."""

from __future__ import annotations

import torch
from jaxtyping import Int64
from torch import Tensor

from headgate.validate import check_integer, check_shape

__all__ = ["first_of_each_class"]


def first_of_each_class(labels: Int64[Tensor, " count"], share: float) -> Int64[Tensor, " kept"]:
    """Keep the first examples of every class (the data-efficiency protocol of d'Ascoli et al., arXiv 2103.10697).

    A smaller part lies within every larger one.

    Args:
        labels: the class of every example, in the order of the set; for images in folders the order of their names.
        share: in (0, 1]; of a class of n examples ⌊share · n⌋ are kept.

    Returns:
        Their places, rising.

    Raises:
        TypeError: labels are no integers.
        ValueError: wrong rank, a share outside (0, 1], or one that leaves a class without an example.
    """
    check_shape("labels", labels, (None,), "count")
    check_integer("labels", labels)
    if not 0 < share <= 1:
        raise ValueError(f"share must lie in (0, 1], got {share}")
    kept = []
    for label in labels.unique().tolist():
        places = (labels == label).nonzero().flatten()
        # Shares such as 0.3 lie a little below what they stand for.
        count = int(share * len(places) + 1e-9)
        if count == 0:
            raise ValueError(f"share={share} leaves class {label} without one of its {len(places)} examples")
        kept.append(places[:count])
    return torch.cat(kept).sort().values

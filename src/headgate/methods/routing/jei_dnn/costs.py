"""What an exit costs: multiply-adds up to and including its head and gate, as a share of the whole (paper, Section 3).

A gate is counted as the official code does: C comparisons for the maximum, C + 1 for the margin, 2C and 5C operations
for the two entropies, 5 for its linear layer: 9C + 6.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor

__all__ = ["ExitCosts", "check_costs", "gate_multiply_adds"]


class ExitCosts(NamedTuple):
    """The cost of leaving at each exit.

    Attributes:
        multiply_adds: ``(G + 1,)`` float64 for one input, heads and gates on the way included.
        normalized: ``(G + 1,)`` float32, divided by the last.
    """

    multiply_adds: Float[Tensor, " exits"]
    normalized: Float[Tensor, " exits"]


def check_costs(costs: Sequence[float] | Tensor, exits: int) -> tuple[float, ...]:
    """Check a vector of costs and hand it on with 1 as its last entry.

    Args:
        costs: one per exit, the final one included; positive and rising.
        exits: G + 1.

    Raises:
        ValueError: another length, or costs that are not positive, finite and rising.
    """
    # Plain numbers, so that a model can be built on the meta device.
    values = [float(cost) for cost in (costs.tolist() if isinstance(costs, Tensor) else costs)]
    if len(values) != exits:
        raise ValueError(f"costs must hold one number for each of the {exits} exits, got {len(values)}")
    rises = all(before < after for before, after in pairwise(values))
    if not rises or not values[0] > 0 or not math.isfinite(values[-1]):
        raise ValueError(f"costs must be positive, finite and rise from exit to exit, got {values}")
    if abs(values[-1] - 1) > 1e-6:
        warnings.warn(
            f"costs are divided by the last, {values[-1]:g}, so that the full computation costs 1", stacklevel=3
        )
    return tuple(value / values[-1] for value in values)


def gate_multiply_adds(num_classes: int) -> int:
    """Operations of one uncertainty gate, 9C + 6."""
    return 9 * num_classes + 6

"""Reversible normalisation of windows of a time series: standardise on the way in, undo it on the way out.

A forecaster that sees windows of mean 0 and deviation 1 and gets the level back afterwards does not mind when the level
of the series moves (Kim et al., "Reversible Instance Normalization for Accurate Time-Series Forecasting against
Distribution Shift", ICLR 2022, without its learned scale and shift).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from headgate.validate import check_floating, check_positive, check_shape

__all__ = ["WindowStatistics", "window_statistics"]


class WindowStatistics(NamedTuple):
    """Mean and deviation of every window and channel, in float32 or wider.

    Attributes:
        mean: ``(batch, 1, channel)``.
        std: ``(batch, 1, channel)``, positive.
    """

    mean: Float[Tensor, "batch 1 channel"]
    std: Float[Tensor, "batch 1 channel"]

    def normalize(self, x: Float[Tensor, "batch length channel"]) -> Float[Tensor, "batch length channel"]:
        """Give ``(x - mean) / std`` in the dtype of ``x``."""
        return ((x - self.mean) / self.std).to(x.dtype)

    def restore(self, y: Float[Tensor, "batch horizon channel"]) -> Float[Tensor, "batch horizon channel"]:
        """Give ``y · std + mean`` in the dtype of ``y``; its length need not be that of the window."""
        return (y * self.std + self.mean).to(y.dtype)


def window_statistics(x: Float[Tensor, "batch length channel"], eps: float = 1e-5) -> WindowStatistics:
    """Measure every window: its mean, and ``sqrt(variance + eps)`` with the biased variance.

    Gradients flow through both.

    Args:
        x: windows ``(batch, length, channel)``, of at least one step.
        eps: added to the variance, > 0, so that a constant window becomes zeros.

    Raises:
        TypeError: ``x`` is no floating tensor.
        ValueError: another rank, no steps, or ``eps`` that is not positive.
    """
    check_shape("x", x, (None, None, None), "batch, length, channel")
    check_floating("x", x)
    check_positive(eps=eps)
    if x.shape[1] == 0:
        raise ValueError(f"x must have at least one step, got {tuple(x.shape)} for (batch, length, channel)")
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    mean = wide.mean(dim=1, keepdim=True)
    variance = (wide - mean).square().mean(dim=1, keepdim=True)
    return WindowStatistics(mean, (variance + eps).sqrt())

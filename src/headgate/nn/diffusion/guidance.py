r"""Classifier-free guidance (Ho and Salimans, arXiv 2207.12598), on all times or within an interval.

.. math:: \tilde F = F(x, t, \varnothing) + s\,(F(x, t, c) - F(x, t, \varnothing))

(The interval: Kynkäänniemi et al., arXiv 2404.07724.)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

__all__ = ["Guidance"]


class Guidance:
    """A predictor of (x, t) from one of (x, t, condition).

    Args:
        predict: the network, with a condition as its third argument.
        condition: a tensor with one entry per sample.
        null: the absence of a condition, of the same shape.
        scale: s; 1 is the plain conditional prediction, 0 the unconditional one.
        interval: times (low, high) between which guidance applies; outside, the prediction is conditional.

    Raises:
        ValueError: no null condition where one is needed, or shapes that differ.
    """

    def __init__(
        self,
        predict: Callable[[Tensor, Tensor, Any], Tensor],
        condition: Tensor,
        null: Tensor | None,
        scale: float = 1.0,
        interval: tuple[float, float] | None = None,
    ) -> None:
        if null is None and scale != 1:
            raise ValueError(f"null must be given to guide, got None with scale={scale}")
        if null is not None and null.shape != condition.shape:
            raise ValueError(
                f"null must have the shape of condition, {tuple(condition.shape)}, got {tuple(null.shape)}"
            )
        self.predict = predict
        self.condition = condition
        self.null = null
        self.scale = scale
        self.interval = interval

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        """The guided prediction for ``x`` ``(batch, ...)`` at times ``t`` ``(batch,)``."""
        if self.null is None or self.scale == 1 or not self._applies(t):
            return self.predict(x, t, self.condition)
        both = self.predict(torch.cat([x, x]), torch.cat([t, t]), torch.cat([self.condition, self.null]))
        wanted, free = both.chunk(2)
        return free + self.scale * (wanted - free)

    def _applies(self, t: Tensor) -> bool:
        if self.interval is None:
            return True
        low, high = self.interval
        return bool(((t >= low) & (t <= high)).all())

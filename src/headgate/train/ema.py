"""A running average of a model's weights (Polyak averaging): what diffusion models are sampled and read from."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

__all__ = ["EMA"]


class EMA:
    """average ← decay · average + (1 - decay) · weights, after every update.

    Buffers are copied as they are.

    Args:
        model: whose weights are averaged; it is left alone.
        decay: in [0, 1); 0 copies.

    Raises:
        ValueError: ``decay`` outside its range.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"decay must lie in [0, 1), got {decay}")
        self.decay = decay
        self.model = model
        self.average = copy.deepcopy(model).requires_grad_(False).eval()

    @torch.no_grad()
    def update(self) -> None:
        """Take the present weights in."""
        for mean, weight in zip(self.average.parameters(), self.model.parameters(), strict=True):
            mean.lerp_(weight.to(mean.dtype), 1 - self.decay)
        for mean, buffer in zip(self.average.buffers(), self.model.buffers(), strict=True):  # type: ignore[assignment]
            mean.copy_(buffer)

    @contextlib.contextmanager
    def following(self, optimizer: torch.optim.Optimizer) -> Iterator[EMA]:
        """Update after every step of ``optimizer`` inside the block."""

        def after(optimizer: Any, args: Any, kwargs: Any) -> None:
            self.update()

        handle = optimizer.register_step_post_hook(after)
        try:
            yield self
        finally:
            handle.remove()

    @torch.no_grad()
    def copy_to(self, model: nn.Module) -> None:
        """Write the average into a model of the same architecture."""
        model.load_state_dict(self.average.state_dict())

"""Stochastic depth (Huang et al., arXiv 1603.09382): whole residual branches are dropped, per example."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from headgate.validate import check_floating, check_probability

__all__ = ["DropPath"]


class DropPath(nn.Module):
    """In training, zero the whole branch of an example with probability ``rate`` and scale the others by 1/(1 - rate).

    Args:
        rate: probability, in [0, 1].
    """

    def __init__(self, rate: float = 0.0) -> None:
        super().__init__()
        check_probability(rate=rate)
        self.rate = rate

    def forward(self, x: Float[Tensor, " batch *shape"]) -> Float[Tensor, " batch *shape"]:
        """Drop entries of ``x`` along its first axis; in eval mode ``x`` itself.

        Raises:
            TypeError: ``x`` is not floating point.
        """
        check_floating("x", x)
        if not self.training or self.rate == 0:
            return x
        if self.rate == 1:
            return torch.zeros_like(x)
        keep = torch.empty((x.shape[0],) + (1,) * (x.dim() - 1), dtype=x.dtype, device=x.device)
        return x * keep.bernoulli_(1 - self.rate).div_(1 - self.rate)

    def extra_repr(self) -> str:
        """The rate, for ``print``."""
        return f"rate={self.rate}"

"""The depthwise 3×3 convolution of the local branch, over pictures whose channels lie side by side."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from headgate.ops import depthwise_conv3x3

__all__ = ["DepthwiseConv3x3"]


class DepthwiseConv3x3(nn.Module):
    """Every channel with its own 3×3 taps, zeros beyond the border, then an activation.

    The weight ``(dim, 1, 3, 3)`` is that of ``nn.Conv2d(dim, dim, 3, padding=1, groups=dim, bias=False)``.

    Args:
        dim: channels.
        activation: ``"identity"`` or ``"silu"``.
    """

    def __init__(self, dim: int, activation: str = "identity") -> None:
        super().__init__()
        self.activation = activation
        self.weight = nn.Parameter(torch.empty(dim, 1, 3, 3))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weight anew, Xavier-uniform with gain 2^-2.5."""
        nn.init.xavier_uniform_(self.weight, gain=2**-2.5)

    def forward(self, x: Float[Tensor, "batch rows columns dim"]) -> Float[Tensor, "batch rows columns dim"]:
        """Convolve ``x`` ``(batch, rows, columns, dim)``."""
        return depthwise_conv3x3(x, self.weight, self.activation)

    def extra_repr(self) -> str:
        """The settings, for printing."""
        return f"dim={self.weight.shape[0]}, activation={self.activation}"

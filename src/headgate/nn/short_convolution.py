"""Short causal depthwise convolution: the token shift in front of or inside many sequence mixers."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from headgate.validate import check_floating, check_positive, check_shape

__all__ = ["ShortConvolution"]


class ShortConvolution(nn.Module):
    r"""Every channel is convolved with its own few taps: :math:`y_t = b + \sum_{s<K} w_{K-1-s} \odot x_{t-s}`.

    Weights start as those of :class:`torch.nn.Conv1d`, and hold the oldest tap first, as there. The taps are summed up
    one by one in the layout ``(batch, length, dim)``, which on a CPU is about twice as fast as a depthwise convolution.

    Args:
        dim: channels.
        kernel_size: number of taps K; the own token is one of them.
        bias: whether there is a bias b per channel.
    """

    def __init__(self, dim: int, kernel_size: int = 3, bias: bool = True) -> None:
        super().__init__()
        check_positive(dim=dim, kernel_size=kernel_size)
        self.dim = dim
        self.kernel_size = kernel_size
        bound = kernel_size**-0.5
        self.weight = nn.Parameter(torch.empty(dim, kernel_size).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(dim).uniform_(-bound, bound)) if bias else None

    def forward(self, x: Float[Tensor, "batch length dim"]) -> Float[Tensor, "batch length dim"]:
        """Convolve ``x`` ``(batch, length, dim)``; token t of the result sees tokens t-K+1 … t.

        Raises:
            TypeError: wrong dtype.
            ValueError: wrong shape.
        """
        check_shape("x", x, (None, None, self.dim), "batch, length, dim")
        check_floating("x", x, like=self.weight.dtype)
        length = x.shape[1]
        past = F.pad(x, (0, 0, self.kernel_size - 1, 0))
        y = past[:, :length] * self.weight[:, 0]
        y = y if self.bias is None else y + self.bias
        for tap in range(1, self.kernel_size):
            y = torch.addcmul(y, past[:, tap : tap + length], self.weight[:, tap])
        return y

    def state_size(self, length: int) -> int:
        """Floats kept to go on after ``length`` tokens: ``dim * kernel_size``."""
        return self.dim * self.kernel_size

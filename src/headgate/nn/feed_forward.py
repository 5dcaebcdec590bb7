"""Position-wise networks: they mix the channels of one token."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from headgate.validate import check_floating, check_positive, check_shape

__all__ = ["FeedForward", "GatedFeedForward", "swiglu_size"]


class FeedForward(nn.Module):
    r"""Two-layer network :math:`W_2\,\sigma(W_1 x + b_1) + b_2` (Vaswani et al., arXiv 1706.03762, equation 2).

    Args:
        dim: channels in and out.
        hidden_dim: channels between; default ``4 * dim``.
        activation: σ, a function of one tensor; default GELU.
    """

    def __init__(
        self, dim: int, hidden_dim: int | None = None, activation: Callable[[Tensor], Tensor] = F.gelu
    ) -> None:
        super().__init__()
        hidden_dim = 4 * dim if hidden_dim is None else hidden_dim
        check_positive(dim=dim, hidden_dim=hidden_dim)
        self.dim = dim
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, dim)
        self.activation = activation

    def forward(self, x: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch dim"]:
        """Map ``x`` ``(..., dim)`` token by token.

        Raises:
            TypeError: wrong dtype.
            ValueError: wrong last size.
        """
        _check(x, self.dim, self.fc1)
        return self.fc2(self.activation(self.fc1(x)))


class GatedFeedForward(nn.Module):
    r"""Gated unit :math:`W_3\,[\sigma(W_2 x) \odot W_1 x]` with biases (Shazeer, arXiv 2002.05202).

    Args:
        dim: channels in and out.
        hidden_dim: channels between; default ``4 * dim``.
        activation: σ of the gate; default GELU.
    """

    def __init__(
        self, dim: int, hidden_dim: int | None = None, activation: Callable[[Tensor], Tensor] = F.gelu
    ) -> None:
        super().__init__()
        hidden_dim = 4 * dim if hidden_dim is None else hidden_dim
        check_positive(dim=dim, hidden_dim=hidden_dim)
        self.dim = dim
        self.value = nn.Linear(dim, hidden_dim)
        self.gate = nn.Linear(dim, hidden_dim)
        self.output = nn.Linear(hidden_dim, dim)
        self.activation = activation

    def forward(self, x: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch dim"]:
        """Map ``x`` ``(..., dim)`` token by token.

        Raises:
            TypeError: wrong dtype.
            ValueError: wrong last size.
        """
        _check(x, self.dim, self.value)
        return self.output(self.value(x) * self.activation(self.gate(x)))


def swiglu_size(dim: int, ratio: float = 4, multiple: int = 256) -> int:
    """The usual width of a SwiGLU: two thirds of ``ratio * dim``, rounded up to a whole ``multiple``.

    Its three matrices then cost what the two of a network of width ``ratio * dim`` cost (Shazeer, arXiv 2002.05202).

    Args:
        dim: channels of the model.
        ratio: width of the network of equal cost, over ``dim``.
        multiple: what the width is rounded up to.
    """
    check_positive(dim=dim, ratio=ratio, multiple=multiple)
    return multiple * -(-int(dim * ratio * 2 / 3) // multiple)


def _check(x: Tensor, dim: int, first: nn.Linear) -> None:
    check_floating("x", x, like=first.weight.dtype)
    if x.dim() < 1:
        raise ValueError(f"x must have shape (..., dim), got {tuple(x.shape)}")
    check_shape("x", x, (None,) * (x.dim() - 1) + (dim,), ", ".join(["batch"] * (x.dim() - 1) + ["dim"]))

r"""Scores that say how much a token wants to look things up: the gates of :class:`.SparseLookups`.

A selector maps hidden states ``(batch, length, dim)`` to scores in [0, 1], ``(batch, length)``. Learned ones:

- :class:`SigmoidSelector`: :math:`s_t = \sigma(w \cdot x_t)`;
- :class:`SoftmaxPairSelector` (SMA; Ren et al., arXiv 2306.11197): the second entry of :math:`\mathrm{softmax}((W x_t +
  b)/\tau)` with a learned τ;
- :class:`SequenceSoftmaxSelector`: a softmax over the sequence. It looks at later tokens, so it is no causal model.

Programmed, without a parameter: :class:`RepeatSelector`, one at tokens that stand earlier in the sequence, too.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from headgate.validate import check_integer, check_shape

__all__ = ["RepeatSelector", "SequenceSoftmaxSelector", "SigmoidSelector", "SoftmaxPairSelector"]


class SigmoidSelector(nn.Module):
    """``sigmoid(w · x)`` without a bias.

    Args:
        dim: channels.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.proj = nn.Linear(dim, 1, bias=False)

    def forward(
        self, x: Float[Tensor, "batch length dim"], tokens: Int[Tensor, "batch length"] | None = None
    ) -> Float[Tensor, "batch length"]:
        """Score every token of ``x``; ``tokens`` are not looked at."""
        return torch.sigmoid(self.proj(x)).squeeze(-1)


class SoftmaxPairSelector(nn.Module):
    """``softmax((W x + b) / temperature)[1]``.

    Args:
        dim: channels.
        temperature: start of the learned temperature; default ``0.3 * sqrt(dim)``, as published.
    """

    def __init__(self, dim: int, temperature: float | None = None) -> None:
        super().__init__()
        self.proj = nn.Linear(dim, 2)
        self.temperature = nn.Parameter(torch.tensor([0.3 * math.sqrt(dim) if temperature is None else temperature]))

    def forward(
        self, x: Float[Tensor, "batch length dim"], tokens: Int[Tensor, "batch length"] | None = None
    ) -> Float[Tensor, "batch length"]:
        """Score every token of ``x``; ``tokens`` are not looked at."""
        return torch.softmax(self.proj(x) / self.temperature, dim=-1)[..., 1]


class SequenceSoftmaxSelector(nn.Module):
    """Softmax of ``w · x + b`` over the sequence, later tokens included.

    Args:
        dim: channels.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.proj = nn.Linear(dim, 1)

    def forward(
        self, x: Float[Tensor, "batch length dim"], tokens: Int[Tensor, "batch length"] | None = None
    ) -> Float[Tensor, "batch length"]:
        """Score every token of ``x``; ``tokens`` are not looked at."""
        return torch.softmax(self.proj(x).squeeze(-1), dim=-1)


class RepeatSelector(nn.Module):
    """One where the token stands earlier in the sequence, too, else zero. Causal.

    Args:
        ignored_token: a token id that never looks anything up, such as a filler; ``None`` for none.
    """

    needs_tokens = True

    def __init__(self, ignored_token: int | None = None) -> None:
        super().__init__()
        self.ignored_token = ignored_token

    def forward(
        self, x: Float[Tensor, "batch length dim"], tokens: Int[Tensor, "batch length"] | None = None
    ) -> Float[Tensor, "batch length"]:
        """Score every token; ``x`` gives the dtype.

        Raises:
            TypeError: ``tokens`` are missing or no integers.
            ValueError: ``tokens`` are of another shape than ``x``.
        """
        if tokens is None:
            raise TypeError("tokens must be given: a selector of repeated tokens looks at the token ids, got None")
        check_shape("tokens", tokens, tuple(x.shape[:2]), "batch, length")
        check_integer("tokens", tokens)
        # A stable sort puts equal ids side by side in the order of time: all but the first of a run are repeats.
        ordered, order = tokens.sort(dim=1, stable=True)
        again = torch.zeros_like(ordered, dtype=torch.bool)
        again[:, 1:] = ordered[:, 1:] == ordered[:, :-1]
        repeated = torch.zeros_like(again).scatter(1, order, again)
        if self.ignored_token is not None:
            repeated = repeated & (tokens != self.ignored_token)
        return repeated.to(x.dtype)

r"""Softmax attention (Vaswani et al., "Attention is all you need", arXiv 1706.03762), over everything or over a window.

.. math:: o_i = W_o \sum_{j \in S(i)} \frac{\exp(q_i \cdot k_j / \sqrt{d_h})}{\sum_{j'} \exp(q_i \cdot k_{j'} / \sqrt{d_h})}\, v_j

with S(i) all tokens, those up to i (causal), or those at most ``window`` steps away (Beltagy et al., arXiv 2004.05150).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from headgate.validate import (
    check_divides,
    check_floating,
    check_integer,
    check_positive,
    check_probability,
    check_shape,
)

__all__ = ["MultiHeadAttention", "SlidingWindowAttention"]


class MultiHeadAttention(nn.Module):
    """Multi-head self-attention with one fused projection for queries, keys and values.

    Args:
        dim: channels in and out.
        num_heads: heads; must divide ``dim``.
        causal: whether a token sees only itself and the tokens before it.
        bias: whether the fused projection has a bias. The output projection always has one.
        dropout: rate on the attention weights in training.
    """

    def __init__(
        self, dim: int, num_heads: int = 1, *, causal: bool = False, bias: bool = True, dropout: float = 0.0
    ) -> None:
        super().__init__()
        check_positive(dim=dim, num_heads=num_heads)
        check_divides(num_heads=num_heads, dim=dim)
        check_probability(dropout=dropout)
        self.dim = dim
        self.num_heads = num_heads
        self.causal = causal
        self.dropout = dropout
        self.qkv = nn.Linear(dim, 3 * dim, bias=bias)
        self.out_proj = nn.Linear(dim, dim)

    def forward(
        self, x: Float[Tensor, "batch length dim"], query_positions: Int[Tensor, "batch queries"] | None = None
    ) -> Float[Tensor, "batch tokens dim"]:
        """Attend within every sequence.

        Args:
            x: ``(batch, length, dim)``.
            query_positions: ``(batch, queries)`` in [0, length): compute only these tokens' outputs, in this order, at
                a cost of O(queries · length) in place of O(length²). Keys and values still come from every token.

        Returns:
            ``(batch, length, dim)``, or ``(batch, queries, dim)``.

        Raises:
            TypeError: wrong dtype.
            ValueError: wrong shape.
        """
        check_shape("x", x, (None, None, self.dim), "batch, length, dim")
        check_floating("x", x, like=self.qkv.weight.dtype)
        rate = self.dropout if self.training else 0.0
        if query_positions is None:
            q, k, v = (self._heads(part) for part in self.qkv(x).chunk(3, dim=-1))
            y = F.scaled_dot_product_attention(q, k, v, dropout_p=rate, is_causal=self.causal)
        else:
            check_shape("query_positions", query_positions, (x.shape[0], None), "batch, queries")
            check_integer("query_positions", query_positions)
            query_weight, key_value_weight = self.qkv.weight.split((self.dim, 2 * self.dim))
            query_bias, key_value_bias = (
                (None, None) if self.qkv.bias is None else self.qkv.bias.split((self.dim, 2 * self.dim))
            )
            chosen = x.gather(1, query_positions.long()[..., None].expand(-1, -1, self.dim))
            q = self._heads(F.linear(chosen, query_weight, query_bias))
            k, v = (self._heads(part) for part in F.linear(x, key_value_weight, key_value_bias).chunk(2, dim=-1))
            mask = None
            if self.causal:
                mask = (torch.arange(x.shape[1], device=x.device) <= query_positions[..., None])[:, None]
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=rate)
        return self.out_proj(y.transpose(1, 2).flatten(2))

    def state_size(self, length: int) -> int:
        """Floats kept to go on after ``length`` tokens: keys and values, ``2 * length * dim``."""
        return 2 * length * self.dim

    def _heads(self, x: Float[Tensor, "batch tokens dim"]) -> Float[Tensor, "batch heads tokens head_dim"]:
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)


class SlidingWindowAttention(nn.Module):
    """Attention to the own token and the ``window`` tokens before it (and after it, where it is not causal).

    The sequence is cut into blocks of ``window`` tokens, each of which meets itself and its neighbours, so time and
    memory grow with length × window.

    Args:
        dim: channels in and out.
        window: how many steps a token sees to a side, at least 1.
        num_heads: heads; must divide ``dim``.
        causal: whether a token sees backwards only.
        bias: whether the fused projection has a bias. The output projection always has one.
        dropout: rate on the attention weights in training.
    """

    def __init__(
        self,
        dim: int,
        window: int,
        num_heads: int = 1,
        *,
        causal: bool = False,
        bias: bool = True,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        check_positive(dim=dim, window=window, num_heads=num_heads)
        check_divides(num_heads=num_heads, dim=dim)
        check_probability(dropout=dropout)
        self.dim = dim
        self.window = window
        self.num_heads = num_heads
        self.causal = causal
        self.dropout = dropout
        self.qkv = nn.Linear(dim, 3 * dim, bias=bias)
        self.out_proj = nn.Linear(dim, dim)

    def forward(self, x: Float[Tensor, "batch length dim"]) -> Float[Tensor, "batch length dim"]:
        """Attend within the window of every token of ``x`` ``(batch, length, dim)``.

        Raises:
            TypeError: wrong dtype.
            ValueError: wrong shape.
        """
        check_shape("x", x, (None, None, self.dim), "batch, length, dim")
        check_floating("x", x, like=self.qkv.weight.dtype)
        length = x.shape[1]
        block = min(self.window, length)
        blocks = -(-length // block)
        sides = 1 if self.causal else 2
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        q, k, v = F.pad(qkv, (0, 0, 0, blocks * block - length)).unbind(0)
        q = q.unflatten(2, (blocks, block))
        around = (0, 0, block, block * (sides - 1))
        k, v = (F.pad(part, around).unfold(2, (1 + sides) * block, block).transpose(-1, -2) for part in (k, v))
        mask = self._mask(length, block, blocks, sides, x.device)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=self.dropout if self.training else 0.0)
        return self.out_proj(y.flatten(2, 3)[:, :, :length].transpose(1, 2).flatten(2))

    def state_size(self, length: int) -> int:
        """Floats kept to go on after ``length`` tokens: keys and values of the window, ``2 * window * dim``."""
        return 2 * self.window * self.dim

    def _mask(
        self, length: int, block: int, blocks: int, sides: int, device: torch.device
    ) -> Bool[Tensor, "blocks queries keys"]:
        """Which of its own and its neighbours' tokens a block's queries see."""
        query = torch.arange(blocks * block, device=device).view(blocks, block, 1)
        first = (torch.arange(blocks, device=device) - 1) * block
        key = first.view(blocks, 1, 1) + torch.arange((1 + sides) * block, device=device)
        ahead = 0 if self.causal else self.window
        return (key >= 0) & (key < length) & (query - key <= self.window) & (key - query <= ahead)

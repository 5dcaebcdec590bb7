r"""Multi-head subspace self-attention (MSSA): one projection is query, key and value.

Yu et al. (arXiv 2311.13110, equation of the MSSA operator), as it is trained: with :math:`w_k = x U_k` the projection of
tokens onto subspace k,

.. math:: \operatorname{MSSA}(x) = \operatorname{concat}_k\bigl(\operatorname{softmax}(w_k w_k^\top / \sqrt p)\, w_k\bigr) W + b .

Derived, W would be Uᵀ and the scale would not be there (:func:`~headgate.methods.vision.crate.operators.mssa_step`); the
authors train a free W.
"""

from __future__ import annotations

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from headgate.validate import check_divides, check_floating, check_positive, check_probability, check_shape

__all__ = ["MSSA"]


class MSSA(nn.Module):
    """Self-attention whose queries, keys and values are one projection of the tokens onto K subspaces.

    The logit of a token with itself is its squared norm: tokens with large projections see only themselves.

    Args:
        dim: channels d in and out.
        num_heads: K, the subspaces.
        head_dim: p, their dimension; default ``dim / num_heads``.
        dropout: rate on the attention weights and on the output, in training.
        tie_output: project back with U itself, as derived, in place of a free matrix and bias.

    Raises:
        ValueError: ``num_heads`` does not divide ``dim`` and ``head_dim`` is left out, or a number is out of range.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        head_dim: int | None = None,
        dropout: float = 0.0,
        tie_output: bool = False,
    ) -> None:
        super().__init__()
        check_positive(dim=dim, num_heads=num_heads)
        check_probability(dropout=dropout)
        if head_dim is None:
            check_divides(num_heads=num_heads, dim=dim)
            head_dim = dim // num_heads
        check_positive(head_dim=head_dim)
        self.dim = dim
        self.num_heads = num_heads
        self.head_dim = head_dim
        self.dropout = dropout
        self.tie_output = tie_output
        inner = num_heads * head_dim
        self.qkv = nn.Linear(dim, inner, bias=False)
        self.to_out: nn.Module = nn.Dropout(dropout)
        if not tie_output:
            # One head of full width needs no way back.
            whole = num_heads == 1 and head_dim == dim
            self.to_out = nn.Identity() if whole else nn.Sequential(nn.Linear(inner, dim), nn.Dropout(dropout))

    def forward(self, x: Float[Tensor, "batch length dim"]) -> Float[Tensor, "batch length dim"]:
        """Attend within every sequence.

        Args:
            x: ``(batch, length, dim)``, normalised.

        Returns:
            ``(batch, length, dim)``, without the skip.

        Raises:
            TypeError: wrong dtype.
            ValueError: wrong shape.
        """
        w = self.project(x)
        y = F.scaled_dot_product_attention(w, w, w, dropout_p=self.dropout if self.training else 0.0)
        y = y.transpose(1, 2).flatten(2)
        return self.to_out(F.linear(y, self.qkv.weight.t()) if self.tie_output else y)

    def project(self, x: Float[Tensor, "batch length dim"]) -> Float[Tensor, "batch heads length head_dim"]:
        """The tokens' coordinates in every subspace, ``x U_k``.

        Args:
            x: ``(batch, length, dim)``.

        Returns:
            ``(batch, num_heads, length, head_dim)``.

        Raises:
            TypeError: wrong dtype.
            ValueError: wrong shape.
        """
        check_shape("x", x, (None, None, self.dim), "batch, length, dim")
        check_floating("x", x, like=self.qkv.weight.dtype)
        return self.qkv(x).unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)

    def weights(self, x: Float[Tensor, "batch length dim"]) -> Float[Tensor, "batch heads length length"]:
        """How much every token (row) takes from every token (column); rows sum to one.

        Args:
            x: ``(batch, length, dim)``.

        Returns:
            ``(batch, num_heads, length, length)``.

        Raises:
            TypeError: wrong dtype.
            ValueError: wrong shape.
        """
        w = self.project(x)
        return (w @ w.mT * self.head_dim**-0.5).softmax(dim=-1)

    def bases(self) -> Float[Tensor, "heads dim head_dim"]:
        """U ``(num_heads, dim, head_dim)``, as the rate measures take it."""
        return self.qkv.weight.unflatten(0, (self.num_heads, self.head_dim)).transpose(1, 2)

    def extra_repr(self) -> str:
        """The numbers that the submodules do not show."""
        return f"num_heads={self.num_heads}, head_dim={self.head_dim}, tie_output={self.tie_output}"

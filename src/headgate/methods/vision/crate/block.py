r"""One layer of CRATE: compression, then sparsification (arXiv 2311.13110).

.. math:: Z^{l+1} = \operatorname{ISTA}\bigl(\operatorname{norm}(Z^l + \operatorname{MSSA}(\operatorname{norm}(Z^l)))\bigr)

The layer's output is the sparse code itself: there is no skip around the second step, which norms its input.
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor, nn

from headgate.methods.vision.crate.attention import MSSA
from headgate.methods.vision.crate.ista import ISTA, OvercompleteISTA
from headgate.validate import check_floating, check_positive, check_shape

__all__ = ["CRATEBlock", "PreNorm"]


class PreNorm(nn.Module):
    """A layer norm, a function of tokens, and a skip around both where asked for.

    Args:
        dim: channels.
        fn: maps ``(batch, length, dim)`` to the same shape.
        skip: whether the input is added.
    """

    def __init__(self, dim: int, fn: nn.Module, skip: bool) -> None:
        super().__init__()
        check_positive(dim=dim)
        self.norm = nn.LayerNorm(dim)
        self.fn = fn
        self.skip = skip

    def forward(self, x: Float[Tensor, "batch length dim"]) -> Float[Tensor, "batch length dim"]:
        """``fn(norm(x))``, or ``x + fn(norm(x))``.

        Raises:
            TypeError: wrong dtype.
            ValueError: wrong shape.
        """
        check_shape("x", x, (None, None, self.norm.normalized_shape[0]), "batch, length, dim")
        check_floating("x", x, like=self.norm.weight.dtype)
        y = self.fn(self.norm(x))
        return x + y if self.skip else y


class CRATEBlock(nn.Sequential):
    """Subspace attention, then ISTA, each behind a layer norm.

    Its two parts have the names ``0`` and ``1``, as in the published weights.

    Args:
        dim: channels.
        num_heads: subspaces of :class:`MSSA`.
        head_dim: their dimension; default ``dim / num_heads``.
        dropout: of :class:`MSSA`.
        step_size: η of the sparsification.
        lambd: λ of the sparsification.
        nonnegative: of :class:`ISTA`.
        tie_output: of :class:`MSSA`.
        skip: whether there is a skip around the sparsification, too. Published networks have none; CRATE-α has.
        expansion: atoms per channel of an :class:`OvercompleteISTA`, CRATE-α's; default: :class:`ISTA`.

    Raises:
        ValueError: a size does not fit or a number is out of range.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        head_dim: int | None = None,
        *,
        dropout: float = 0.0,
        step_size: float = 0.1,
        lambd: float = 0.1,
        nonnegative: bool = True,
        tie_output: bool = False,
        skip: bool = False,
        expansion: int | None = None,
    ) -> None:
        sparsify: nn.Module
        if expansion is None:
            sparsify = ISTA(dim, step_size, lambd, nonnegative)
        elif nonnegative:
            sparsify = OvercompleteISTA(dim, expansion, step_size, lambd)
        else:
            raise ValueError("nonnegative=False needs expansion=None: codes of an OvercompleteISTA are non-negative")
        attention = MSSA(dim, num_heads, head_dim, dropout, tie_output)
        super().__init__(PreNorm(dim, attention, skip=True), PreNorm(dim, sparsify, skip=skip))

    def forward(self, x: Float[Tensor, "batch length dim"]) -> Float[Tensor, "batch length dim"]:
        """One layer on tokens ``(batch, length, dim)``.

        Returns:
            The sparse code of every token, ``(batch, length, dim)``.

        Raises:
            TypeError: wrong dtype.
            ValueError: wrong shape.
        """
        compress, sparsify = self
        return sparsify(compress(x))

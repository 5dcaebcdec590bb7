r"""Sparsification by one proximal gradient step (ISTA) in a learned dictionary, in place of a transformer's MLP.

Yu et al. (arXiv 2311.13110): one step on ½‖y - D z‖² + λ‖z‖₁ over z ≥ 0, started at z = y,

.. math:: \operatorname{ISTA}(y) = \operatorname{ReLU}\bigl(y + η D^\top (y - D y) - η λ\bigr) .

There is no skip around it: what leaves is the code itself. CRATE-α (Yang et al., arXiv 2405.20299) has a dictionary of more
atoms than channels, two steps from z = 0 and a second dictionary that leads back, with a skip around.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from headgate.methods.vision.crate.operators import check_step_size, soft_threshold
from headgate.validate import check_floating, check_positive

__all__ = ["ISTA", "OvercompleteISTA"]


class ISTA(nn.Module):
    """One ISTA step in a square dictionary.

    D starts Kaiming-uniform, entries in ±√(6/d), and is not kept orthogonal.

    Args:
        dim: channels d.
        step_size: η, positive.
        lambd: λ, at least 0; 0.1 in CRATE.
        nonnegative: whether codes are non-negative, as published; without, both signs are thresholded.

    Raises:
        ValueError: a number is out of range.
    """

    def __init__(self, dim: int, step_size: float = 0.1, lambd: float = 0.1, nonnegative: bool = True) -> None:
        super().__init__()
        _check_numbers(dim, step_size, lambd)
        self.dim = dim
        self.step_size = step_size
        self.lambd = lambd
        self.nonnegative = nonnegative
        self.weight = nn.Parameter(torch.empty(dim, dim))
        nn.init.kaiming_uniform_(self.weight)

    def forward(self, y: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch dim"]:
        """Code every token.

        Args:
            y: ``(..., dim)``, normalised.

        Returns:
            ``(..., dim)``, non-negative and sparse.

        Raises:
            TypeError: wrong dtype.
            ValueError: wrong last size.
        """
        _check_tokens(y, self.dim, self.weight)
        transposed = self.weight.t()
        rest = F.linear(y, transposed) - F.linear(F.linear(y, self.weight), transposed)  # Dᵀ y - Dᵀ D y
        return soft_threshold(y + self.step_size * rest, self.step_size * self.lambd, self.nonnegative)

    def check_step_size(self) -> None:
        """Check η < 2/‖D‖² for the dictionary as it is now; it costs a singular value decomposition.

        Raises:
            ValueError: η is too large: the step raises the objective that it is derived from.
        """
        check_step_size(self.step_size, self.weight)

    def extra_repr(self) -> str:
        """The numbers that the parameters do not show."""
        return f"dim={self.dim}, step_size={self.step_size}, lambd={self.lambd}, nonnegative={self.nonnegative}"


class OvercompleteISTA(nn.Module):
    """CRATE-α's sparsification: steps of ISTA in a dictionary of more atoms than channels, then back to the channels.

    Args:
        dim: channels d.
        expansion: atoms per channel; the dictionaries are ``(d, expansion · d)``.
        step_size: η, positive.
        lambd: λ, at least 0.
        steps: of ISTA, from a code of zeros.
        decoupled: whether a second dictionary leads back, as published, in place of the first one.

    Raises:
        ValueError: a number is out of range.
    """

    def __init__(
        self,
        dim: int,
        expansion: int = 4,
        step_size: float = 0.1,
        lambd: float = 0.1,
        steps: int = 2,
        decoupled: bool = True,
    ) -> None:
        super().__init__()
        _check_numbers(dim, step_size, lambd)
        check_positive(expansion=expansion, steps=steps)
        self.dim = dim
        self.step_size = step_size
        self.lambd = lambd
        self.steps = steps
        self.weight = nn.Parameter(torch.empty(dim, expansion * dim))
        self.output_weight = nn.Parameter(torch.empty(dim, expansion * dim)) if decoupled else None
        for weight in self.parameters():
            nn.init.kaiming_uniform_(weight)

    def forward(self, y: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch dim"]:
        """Code every token and lead the code back.

        Args:
            y: ``(..., dim)``, normalised.

        Returns:
            ``(..., dim)``, neither sparse nor of one sign.

        Raises:
            TypeError: wrong dtype.
            ValueError: wrong last size.
        """
        weight = self.weight if self.output_weight is None else self.output_weight
        return F.linear(self.code(y), weight)

    def code(self, y: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch atoms"]:
        """The sparse code of every token.

        Args:
            y: ``(..., dim)``.

        Returns:
            ``(..., expansion · dim)``, non-negative.

        Raises:
            TypeError: wrong dtype.
            ValueError: wrong last size.
        """
        _check_tokens(y, self.dim, self.weight)
        transposed, threshold = self.weight.t(), self.step_size * self.lambd
        code = soft_threshold(self.step_size * F.linear(y, transposed), threshold)
        for _ in range(self.steps - 1):
            rest = y - F.linear(code, self.weight)
            code = soft_threshold(code + self.step_size * F.linear(rest, transposed), threshold)
        return code

    def check_step_size(self) -> None:
        """Check η < 2/‖D‖² for the dictionary as it is now; it costs a singular value decomposition.

        Raises:
            ValueError: η is too large: steps raise the objective that they are derived from.
        """
        check_step_size(self.step_size, self.weight)

    def extra_repr(self) -> str:
        """The numbers that the parameters do not show."""
        return f"dim={self.dim}, step_size={self.step_size}, lambd={self.lambd}, steps={self.steps}"


def _check_numbers(dim: int, step_size: float, lambd: float) -> None:
    check_positive(dim=dim, step_size=step_size)
    if not lambd >= 0:
        raise ValueError(f"lambd must be at least 0, got lambd={lambd}")


def _check_tokens(y: Tensor, dim: int, weight: Tensor) -> None:
    if not isinstance(y, Tensor) or y.dim() < 1 or y.shape[-1] != dim:
        came = tuple(y.shape) if isinstance(y, Tensor) else type(y).__name__
        raise ValueError(f"y must be a tensor of shape (..., {dim}), got {came}")
    check_floating("y", y, like=weight.dtype)

r"""Feature maps φ of linear attention, where φ(q)·φ(k) stands in place of exp(q·k).

The second-order Taylor map of Based (Arora et al., arXiv 2402.18668) has

.. math:: \phi(q) \cdot \phi(k) = 1 + s + s^2/2 \ge \tfrac12,\qquad s = q \cdot k / \sqrt f .

The vector :math:`[1, x/f^{1/4}, \mathrm{vec}(x x^\top)/(\sqrt2 \sqrt f)]` does that; its f² products hold every pair
twice, so here a pair stands once with weight √2, which leaves f (f + 1) / 2 of them and the same inner product.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

__all__ = ["FEATURE_MAPS", "FeatureMap"]


class FeatureMap:
    """φ as a plain function: ``expand`` gives the features, ``product`` their inner products."""

    def expand(self, x: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch features"]:
        """φ(x); the identity here."""
        return x

    def product(
        self, q: Float[Tensor, "*batch queries dim"], k: Float[Tensor, "*batch keys dim"]
    ) -> Float[Tensor, "*batch queries keys"]:
        """φ(q)·φ(k) for every pair."""
        return self.expand(q) @ self.expand(k).transpose(-1, -2)

    def size(self, dim: int) -> int:
        """Number of features of a vector of ``dim`` entries."""
        return dim


class _Taylor(FeatureMap):
    def expand(self, x: Tensor) -> Tensor:
        dim = x.shape[-1]
        row, column = torch.triu_indices(dim, dim, device=x.device)
        pair_weight = torch.where(row == column, math.sqrt(0.5), 1.0).to(x.dtype) / math.sqrt(dim)
        return torch.cat((torch.ones_like(x[..., :1]), x / dim**0.25, x[..., row] * x[..., column] * pair_weight), -1)

    def product(self, q: Tensor, k: Tensor) -> Tensor:
        s = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
        return 1 + s + s.square() / 2

    def size(self, dim: int) -> int:
        return 1 + dim + dim * (dim + 1) // 2


class _Elu(FeatureMap):
    def expand(self, x: Tensor) -> Tensor:
        return F.elu(x) + 1


class _Relu(FeatureMap):
    def expand(self, x: Tensor) -> Tensor:
        return F.relu(x).clamp(min=1e-12)


class _Square(FeatureMap):
    def expand(self, x: Tensor) -> Tensor:
        return x.square()


FEATURE_MAPS: dict[str, FeatureMap] = {
    "taylor": _Taylor(),
    "elu": _Elu(),
    "relu": _Relu(),
    "square": _Square(),
    "identity": FeatureMap(),
}
"""Name → feature map. Only ``taylor``, ``elu`` and ``relu`` keep the weights of linear attention positive."""

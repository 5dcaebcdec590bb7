"""Normalisation over the batch: each unit has mean 0 and variance 1 over the items that are seen together.

The published code applies InstanceNorm1d to the transposed matrix, so this is what it computes, in training and in
evaluation: the result for an item depends on the items beside it.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from headgate.validate import check_positive

__all__ = ["AcrossBatchNorm"]


class AcrossBatchNorm(nn.Module):
    """``(r - mean) / √(var + eps)`` over the batch, per unit; then scale and shift where ``affine``.

    Args:
        num_features: units.
        eps: added to the variance, the one that divides by the number of items.
        affine: learn a scale and a shift per unit.
        device: of the parameters.
        dtype: of the parameters.
    """

    def __init__(
        self,
        num_features: int,
        *,
        eps: float = 1e-5,
        affine: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_positive(num_features=num_features, eps=eps)
        self.num_features = num_features
        self.eps = eps
        self.weight: nn.Parameter | None = None
        self.bias: nn.Parameter | None = None
        if affine:
            self.weight = nn.Parameter(torch.ones(num_features, device=device, dtype=dtype))
            self.bias = nn.Parameter(torch.zeros(num_features, device=device, dtype=dtype))

    def forward(self, x: Float[Tensor, "batch features"]) -> Float[Tensor, "batch features"]:
        """Normalise ``(batch, features)``.

        Raises:
            ValueError: a single item, which has no spread.
        """
        if x.shape[0] < 2:
            raise ValueError(f"x must hold at least 2 items to be normalised over the batch, got {tuple(x.shape)}")
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        centred = wide - wide.mean(dim=0)
        result = centred * torch.rsqrt(centred.square().mean(dim=0) + self.eps)
        if self.weight is not None and self.bias is not None:
            result = result * self.weight + self.bias
        return result.to(x.dtype)

    def extra_repr(self) -> str:
        """The settings, for printing."""
        return f"{self.num_features}, eps={self.eps}, affine={self.weight is not None}"

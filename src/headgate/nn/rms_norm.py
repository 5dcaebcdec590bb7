"""Root-mean-square norm (Zhang and Sennrich, arXiv 1910.07467) that goes through memory once."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor, nn

from headgate.ops import rms_norm
from headgate.validate import check_floating, check_positive, check_shape

__all__ = ["RMSNorm"]


class RMSNorm(nn.RMSNorm):
    """x / sqrt(mean(x²) + ε) ⊙ weight over the last axis: :class:`torch.nn.RMSNorm`, faster on a CPU in inference.

    Args:
        dim: channels.
        eps: ε.
    """

    def __init__(self, dim: int, eps: float = 1e-5) -> None:
        check_positive(dim=dim, eps=eps)
        super().__init__(dim, eps=eps)

    def forward(self, x: Float[Tensor, "*tokens dim"]) -> Float[Tensor, "*tokens dim"]:
        """Normalise ``(*tokens, dim)``.

        Raises:
            TypeError: wrong dtype.
            ValueError: wrong shape.
        """
        axes = ["tokens"] * (x.dim() - 1) + ["dim"]
        check_shape("x", x, [None] * (x.dim() - 1) + [self.weight.shape[0]], ", ".join(axes))
        check_floating("x", x, like=self.weight.dtype)
        return rms_norm(x, self.weight, float(self.eps or 0.0))

r"""The channel mixer of the language models: :math:`W_3\,[\mathrm{swish}(W_1 x) \odot W_2 x]` (Shazeer, arXiv 2002.05202)."""

from __future__ import annotations

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from headgate.nn import swiglu_size
from headgate.validate import check_floating, check_positive, check_shape

__all__ = ["SwiGLU"]


class SwiGLU(nn.Module):
    """SwiGLU without biases, under the names that published checkpoints use.

    Args:
        dim: channels in and out.
        hidden_dim: channels between; default :func:`headgate.nn.swiglu_size` of ``dim``.
    """

    def __init__(self, dim: int, hidden_dim: int | None = None) -> None:
        super().__init__()
        hidden_dim = swiglu_size(dim) if hidden_dim is None else hidden_dim
        check_positive(dim=dim, hidden_dim=hidden_dim)
        self.dim = dim
        self.gate_proj = nn.Linear(dim, hidden_dim, bias=False)
        self.up_proj = nn.Linear(dim, hidden_dim, bias=False)
        self.down_proj = nn.Linear(hidden_dim, dim, bias=False)

    def forward(self, x: Float[Tensor, "batch length dim"]) -> Float[Tensor, "batch length dim"]:
        """Map ``x`` ``(batch, length, dim)`` token by token.

        Raises:
            TypeError: wrong dtype.
            ValueError: wrong shape.
        """
        check_shape("x", x, (None, None, self.dim), "batch, length, dim")
        check_floating("x", x, like=self.gate_proj.weight.dtype)
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))

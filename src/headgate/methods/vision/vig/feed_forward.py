r"""SwiGLU, the position-wise half of a block (Shazeer, arXiv 2002.05202).

.. math:: y = W_3\,(\mathrm{silu}(W_1 x) \odot W_2 x), \qquad m = c \lceil \lfloor 8d/3 \rfloor / c \rceil
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor, nn

from headgate.methods.vision.vig.tokenwise import map_tokens
from headgate.ops import swiglu
from headgate.validate import check_positive

__all__ = ["SwiGLU"]


class SwiGLU(nn.Module):
    """Gated unit without biases; gate and value come out of one product.

    Args:
        dim: channels in and out.
        hidden_dim: m, channels between.
    """

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        check_positive(dim=dim, hidden_dim=hidden_dim)
        self.dim = dim
        self.hidden_dim = hidden_dim
        self.gate_value = nn.Linear(dim, 2 * hidden_dim, bias=False)  # W_1 above W_2
        self.output = nn.Linear(hidden_dim, dim, bias=False)  # W_3

    def forward(self, x: Float[Tensor, "batch length dim"]) -> Float[Tensor, "batch length dim"]:
        """Map ``x`` ``(batch, length, dim)`` token by token."""
        return map_tokens(self, self._map, self.dim, x)

    def _map(self, x: Tensor) -> Tensor:
        return self.output(swiglu(self.gate_value(x)))

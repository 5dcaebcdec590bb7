r"""The data-dependent gate of gated linear attention, as a logarithm.

.. math:: \log \alpha = \frac{\log \sigma(x W_1 W_2 + b_2)}{\tau} = \log\,\sigma(x W_1 W_2 + b_2)^{1/\tau}

(Yang et al., arXiv 2312.06635, section 4.3): the product of two narrow matrices keeps it cheap, the temperature τ
starts every gate near one.
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor, nn

from headgate.ops import log_sigmoid_gate
from headgate.validate import check_floating, check_positive, check_shape

__all__ = ["LowRankLogGate"]


class LowRankLogGate(nn.Module):
    """Logarithms of gates in (0, 1), computed from the current token.

    Args:
        dim: channels in.
        gate_dim: gates out.
        rank: width of the bottleneck between the two matrices.
        normalizer: τ; the larger, the closer the gates start to one.
        clamp_min: smallest logarithm that is let through, below zero; ``None`` for no limit.
    """

    def __init__(
        self, dim: int, gate_dim: int, rank: int = 16, *, normalizer: float = 16.0, clamp_min: float | None = None
    ) -> None:
        super().__init__()
        check_positive(dim=dim, gate_dim=gate_dim, rank=rank, normalizer=normalizer)
        if clamp_min is not None and not clamp_min < 0:
            raise ValueError(f"clamp_min must be below zero, the logarithm of an open gate, got {clamp_min}")
        self.dim = dim
        self.normalizer = normalizer
        self.clamp_min = clamp_min
        self.down = nn.Linear(dim, rank, bias=False)  # W_1
        self.up = nn.Linear(rank, gate_dim)  # W_2, b_2

    def forward(self, x: Float[Tensor, "batch length dim"]) -> Float[Tensor, "batch length gate"]:
        """Gates ``(batch, length, gate_dim)``, at most 0, for tokens ``(batch, length, dim)``; float32 or wider.

        Raises:
            TypeError: wrong dtype.
            ValueError: wrong shape.
        """
        check_shape("x", x, (None, None, self.dim), "batch, length, dim")
        check_floating("x", x, like=self.down.weight.dtype)
        return log_sigmoid_gate(self.up(self.down(x)), self.normalizer, self.clamp_min)

r"""Based linear attention (Arora et al., arXiv 2402.18668; the Taylor attention of arXiv 2312.04927).

.. math:: o_t = \frac{\sum_{i \le t} \phi(q_t)\cdot\phi(k_i)\, v_i}{\sum_{i \le t} \phi(q_t)\cdot\phi(k_i) + \epsilon}

Queries and keys are projected to few features per head, on which :mod:`.feature_maps` gives φ.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from headgate.methods.sequence.zoology.feature_maps import FEATURE_MAPS
from headgate.nn import apply_rotary
from headgate.validate import check_divides, check_floating, check_positive, check_shape

__all__ = ["Based"]


class Based(nn.Module):
    """Causal linear attention with a second-order Taylor feature map.

    Within a chunk of tokens the weights φ(q)·φ(k) are computed for every pair; what came before the chunk is summed up
    in Σ φ(k) vᵀ and Σ φ(k). Up to ``chunk_size`` tokens that is plain quadratic attention, beyond it time grows
    linearly.

    Args:
        dim: channels in and out.
        num_heads: query heads.
        feature_dim: f, channels of a query or key, per head.
        num_kv_heads: key and value heads, each shared by num_heads / num_kv_heads query heads; default ``num_heads``. A
            value has dim / num_kv_heads channels.
        feature_map: φ, a name of :data:`.FEATURE_MAPS`.
        rotary_base: base of rotary positions on queries and keys; ``None`` for no positions.
        eps: ε of the normaliser.
        chunk_size: tokens of a chunk; results do not depend on it.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 1,
        feature_dim: int = 8,
        num_kv_heads: int | None = None,
        *,
        feature_map: str = "taylor",
        rotary_base: float | None = None,
        eps: float = 1e-12,
        chunk_size: int = 128,
    ) -> None:
        super().__init__()
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        check_positive(
            dim=dim, num_heads=num_heads, feature_dim=feature_dim, num_kv_heads=num_kv_heads, chunk_size=chunk_size
        )
        check_divides(num_kv_heads=num_kv_heads, num_heads=num_heads)
        check_divides(num_kv_heads=num_kv_heads, dim=dim)
        if feature_map not in FEATURE_MAPS:
            raise ValueError(f"feature_map must be one of {', '.join(FEATURE_MAPS)}, got {feature_map!r}")
        if rotary_base is not None and feature_dim % 2:
            raise ValueError(f"feature_dim must be even for rotary positions, got {feature_dim}")
        self.dim = dim
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads
        self.feature_dim = feature_dim
        self.head_dim = dim // num_kv_heads
        self.feature_map = FEATURE_MAPS[feature_map]
        self.rotary_base = rotary_base
        self.eps = eps
        self.chunk_size = chunk_size
        self.query = nn.Linear(dim, num_heads * feature_dim, bias=False)
        self.key = nn.Linear(dim, num_kv_heads * feature_dim, bias=False)
        self.value = nn.Linear(dim, dim, bias=False)
        self.output = nn.Linear(num_heads * self.head_dim, dim, bias=False)

    def forward(self, x: Float[Tensor, "batch length dim"]) -> Float[Tensor, "batch length dim"]:
        """Mix ``x`` ``(batch, length, dim)``. Weights and sums are computed in float32 at least.

        Raises:
            TypeError: wrong dtype.
            ValueError: wrong shape.
        """
        check_shape("x", x, (None, None, self.dim), "batch, length, dim")
        check_floating("x", x, like=self.query.weight.dtype)
        length = x.shape[1]
        q = self._heads(self.query(x), self.num_heads)
        k = self._heads(self.key(x), self.num_kv_heads)
        v = self._heads(self.value(x), self.num_kv_heads)
        if self.rotary_base is not None:
            q, k = apply_rotary(q, self.rotary_base), apply_rotary(k, self.rotary_base)
        shared = self.num_heads // self.num_kv_heads
        k, v = k.repeat_interleave(shared, dim=1), v.repeat_interleave(shared, dim=1)
        # A column of ones makes the normaliser the last channel of the weighted sum.
        v = F.pad(v, (0, 1), value=1.0)
        if length <= self.chunk_size:
            mixed = self.feature_map.product(q, k).tril() @ v
        else:
            mixed = self._chunked(q, k, v)
        y = mixed[..., :-1] / (mixed[..., -1:] + self.eps)
        return self.output(y.transpose(1, 2).flatten(2).to(self.output.weight.dtype))

    def state_size(self, length: int) -> int:
        """Floats kept to go on after ``length`` tokens: Σ φ(k) vᵀ and Σ φ(k) of every key and value head."""
        return self.num_kv_heads * (self.head_dim + 1) * self.feature_map.size(self.feature_dim)

    def _heads(self, x: Tensor, heads: int) -> Float[Tensor, "batch heads length size"]:
        return x.unflatten(-1, (heads, -1)).transpose(1, 2).to(torch.promote_types(x.dtype, torch.float32))

    def _chunked(self, q: Tensor, k: Tensor, v: Tensor) -> Float[Tensor, "batch heads length value"]:
        length = q.shape[2]
        missing = -length % self.chunk_size
        q, k, v = (F.pad(part, (0, 0, 0, missing)).unflatten(2, (-1, self.chunk_size)) for part in (q, k, v))
        inside = self.feature_map.product(q, k).tril() @ v
        sums = self.feature_map.expand(k).transpose(-1, -2) @ v
        before = F.pad(sums.cumsum(2), (0, 0, 0, 0, 1, -1))
        return (inside + self.feature_map.expand(q) @ before).flatten(2, 3)[:, :, :length]

r"""Multi-scale retention (Sun et al., "Retentive network", arXiv 2307.08621): linear attention that forgets at fixed rates.

With rotary queries and keys, head h decays by :math:`\gamma_h = 1 - 2^{-5-h}`:

.. math:: o_t = q_t \sum_{i \le t} \gamma_h^{\,t-i}\, k_i^\top v_i
          \quad\Longleftrightarrow\quad S_t = \gamma_h S_{t-1} + k_t^\top v_t,\quad o_t = q_t S_t

(parallel and recurrent form, equations 5 and 6), then
:math:`y = W_o\,(\mathrm{swish}(W_g x) \odot \mathrm{GroupNorm}_h(o))` (equation 8).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from headgate.nn import apply_rotary
from headgate.validate import check_divides, check_floating, check_positive, check_shape

__all__ = ["Retention"]


class Retention(nn.Module):
    """The token mixer of RetNet.

    Args:
        dim: channels in and out.
        num_heads: heads, each with its own rate of decay; must divide ``dim`` into an even number of channels.
        value_dim: channels of all values together; default ``2 * dim``, as published.
        rotary_base: base of the rotary angles.
        norm_eps: ε of the group norm.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 1,
        value_dim: int | None = None,
        *,
        rotary_base: float = 10000.0,
        norm_eps: float = 1e-5,
    ) -> None:
        super().__init__()
        value_dim = 2 * dim if value_dim is None else value_dim
        check_positive(dim=dim, num_heads=num_heads, value_dim=value_dim)
        check_divides(num_heads=num_heads, dim=dim)
        check_divides(num_heads=num_heads, value_dim=value_dim)
        if dim // num_heads % 2:
            raise ValueError(f"num_heads must leave an even head size, got dim={dim}, num_heads={num_heads}")
        self.dim = dim
        self.num_heads = num_heads
        self.value_dim = value_dim
        self.rotary_base = rotary_base
        self.norm_eps = norm_eps
        self.query = nn.Linear(dim, dim, bias=False)
        self.key = nn.Linear(dim, dim, bias=False)
        self.value = nn.Linear(dim, value_dim, bias=False)
        self.gate = nn.Linear(dim, value_dim, bias=False)
        self.output = nn.Linear(value_dim, dim, bias=False)

    def forward(self, x: Float[Tensor, "batch length dim"]) -> Float[Tensor, "batch length dim"]:
        """Mix ``x`` ``(batch, length, dim)`` in the parallel form, O(length²).

        Raises:
            TypeError: wrong dtype.
            ValueError: wrong shape.
        """
        q, k, v = self._project(x, offset=0)
        steps = torch.arange(x.shape[1], device=x.device)
        distance = (steps[:, None] - steps).clamp(min=0)
        decay = torch.exp(distance * self._log_gamma(q)).tril()
        retained = ((q @ k.transpose(-1, -2)) * decay) @ v
        return self._read(x, retained)

    def step(
        self,
        x: Float[Tensor, "batch dim"],
        state: Float[Tensor, "batch heads key value"] | None = None,
        position: int = 0,
    ) -> tuple[Float[Tensor, "batch dim"], Float[Tensor, "batch heads key value"]]:
        """Mix one more token in the recurrent form, O(1) per token.

        Args:
            x: the token, ``(batch, dim)``.
            state: S after the tokens before; ``None`` before the first.
            position: how many tokens came before.

        Returns:
            The mixed token and the new state.
        """
        q, k, v = self._project(x[:, None], offset=position)
        state_now = k.transpose(-1, -2) @ v
        if state is not None:
            state_now = state_now + state * self._log_gamma(state).exp()
        return self._read(x[:, None], q @ state_now)[:, 0], state_now

    def state_size(self, length: int) -> int:
        """Floats kept to go on after ``length`` tokens: the matrix S of every head, ``dim * value_dim / num_heads``."""
        return self.dim * self.value_dim // self.num_heads

    def _log_gamma(self, like: Tensor) -> Float[Tensor, "heads 1 1"]:
        """The logarithm of every head's decay."""
        heads = torch.arange(self.num_heads, device=like.device, dtype=like.dtype)
        return torch.log1p(-(2.0 ** (-5 - heads)))[:, None, None]

    def _project(self, x: Tensor, offset: int) -> tuple[Tensor, Tensor, Tensor]:
        """Rotary queries, rotary scaled keys, and values, ``(batch, heads, length, size)``, in float32 at least."""
        check_shape("x", x, (None, None, self.dim), "batch, length, dim")
        check_floating("x", x, like=self.query.weight.dtype)
        q, k, v = (
            layer(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for layer in (self.query, self.key, self.value)
        )
        wide = torch.promote_types(v.dtype, torch.float32)
        q, k, v = q.to(wide), k.to(wide) * q.shape[-1] ** -0.5, v.to(wide)
        return apply_rotary(q, self.rotary_base, offset), apply_rotary(k, self.rotary_base, offset), v

    def _read(self, x: Tensor, retained: Float[Tensor, "batch heads length value"]) -> Tensor:
        """Group norm per head, gate, output projection."""
        normed = F.layer_norm(retained, retained.shape[-1:], eps=self.norm_eps).transpose(1, 2).flatten(2)
        gate = F.silu(self.gate(x))
        return self.output(gate * normed.to(gate.dtype))

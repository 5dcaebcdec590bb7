r"""BiGLA, gated linear attention for images (Liao et al., "ViG", arXiv 2405.18425).

Tokens lie in raster order on a grid. With a depthwise 3×3 convolution C, per head:

.. math::
    x_s &= \mathrm{act}(C(x)), \qquad [q\,|\,k\,|\,v] = x_s W_{qkv} \\
    [g_f\,|\,g_b] &= \log\sigma(x_s W_1 W_2 + b_2) / 16 \\
    o &= (\mathrm{scan}_{\to}(q, k, v, g_f) + \mathrm{scan}_{\leftarrow}(q, k, v, g_b)) / 2 \\
    y &= \mathrm{act}(G \odot \mathrm{norm}_g(o) + (1 - G) \odot \mathrm{norm}_l(x_s))\,W_o, \qquad G = \sigma(x_s W_g + b_g)

Three things make the causal layer one for images: two scans that share everything but the gate, the convolution that
sees the grid, and the gate G that mixes what came from afar with what came from next door.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from headgate.methods.vision.vig.convolution import DepthwiseConv3x3
from headgate.methods.vision.vig.positions import RotaryMode, rotate
from headgate.methods.vision.vig.tokenwise import map_tokens
from headgate.nn import LowRankLogGate
from headgate.ops import bidirectional_gated_linear_attention, gated_linear_attention, mix_branches, rms_norm
from headgate.validate import check_divides, check_floating, check_positive, check_shape

__all__ = ["Activation", "BidirectionalGLA"]

Activation = Literal["silu"]


class BidirectionalGLA(nn.Module):
    """Mix the tokens of a grid at a cost that is linear in their number.

    Args:
        dim: channels d in and out.
        num_heads: heads; must divide the queries' and the values' channels.
        expand_k: channels of queries and keys, as a multiple of ``dim``.
        expand_v: channels of values, as a multiple of ``dim``; 1 with ``locality``, whose branch has ``dim`` channels.
        gate_low_rank_dim: width between W_1 and W_2.
        gate_logit_normalizer: divisor of the log gates; the larger, the closer the gates start to one.
        clamp_min: smallest log gate that is let through, below zero; ``None`` for no limit.
        conv_act: activation behind the convolution, ``"silu"`` (ViG-T) or ``None``.
        out_act: activation before W_o, ``"silu"`` (ViG-T) or ``None``.
        direction_gates: whether each scan has gates of its own. Without, the layer cannot tell before from after.
        bidirectional: whether there is a backward scan; without, o is the forward scan alone and W_2 is half as wide.
        locality: whether there is a 2-D part. Without, x_s is x itself and ``y = G ⊙ norm(o) W_o``.
        rotary: rotary positions on queries and keys, along the sequence (``"1d"``) or the grid (``"2d"``); no
            published configuration has them.
        norm_eps: ε of the norms over each head's channels.
        official_eval_halving: halve o once more in evaluation mode, as the published plain ViG does. The norm behind it
            hides the factor but for its ε; it is for matching published logits to the last digit.

    Raises:
        ValueError: the heads do not divide the channels, or options that exclude each other.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 3,
        expand_k: float = 0.5,
        expand_v: float = 1.0,
        gate_low_rank_dim: int = 16,
        gate_logit_normalizer: float = 16,
        clamp_min: float | None = None,
        conv_act: Activation | None = None,
        out_act: Activation | None = None,
        *,
        direction_gates: bool = True,
        bidirectional: bool = True,
        locality: bool = True,
        rotary: RotaryMode | None = None,
        norm_eps: float = 1e-6,
        official_eval_halving: bool = False,
    ) -> None:
        super().__init__()
        check_positive(dim=dim, num_heads=num_heads, expand_k=expand_k, expand_v=expand_v, norm_eps=norm_eps)
        check_positive(gate_low_rank_dim=gate_low_rank_dim, gate_logit_normalizer=gate_logit_normalizer)
        key_dim, value_dim = int(dim * expand_k), int(dim * expand_v)
        check_positive(key_dim=key_dim, value_dim=value_dim)
        check_divides(num_heads=num_heads, key_dim=key_dim)
        check_divides(num_heads=num_heads, value_dim=value_dim)
        for name, activation in {"conv_act": conv_act, "out_act": out_act}.items():
            if activation not in (None, "silu"):
                raise ValueError(f"{name} must be 'silu' or None, got {activation!r}")
        if locality and value_dim != dim:
            raise ValueError(f"expand_v must be 1 with locality, whose branch has dim={dim} channels, got {expand_v}")
        if not locality and conv_act is not None:
            raise ValueError(f"conv_act needs the convolution of locality=True, got conv_act={conv_act!r}")
        if rotary not in (None, "1d", "2d"):
            raise ValueError(f"rotary must be '1d', '2d' or None, got {rotary!r}")
        pair = {None: 1, "1d": 2, "2d": 4}[rotary]
        if key_dim // num_heads % pair:
            raise ValueError(
                f"rotary={rotary!r} needs heads of a multiple of {pair} channels, got {key_dim // num_heads}"
            )
        self.dim = dim
        self.num_heads = num_heads
        self.key_dim = key_dim
        self.value_dim = value_dim
        self.conv_act = conv_act
        self.out_act = out_act
        self.direction_gates = direction_gates
        self.bidirectional = bidirectional
        self.rotary = rotary
        self.official_eval_halving = official_eval_halving
        self.norm_eps = norm_eps
        self.conv = DepthwiseConv3x3(dim, conv_act or "identity") if locality else None
        self.qkv = nn.Linear(dim, 2 * key_dim + value_dim, bias=False)
        gate_dim = key_dim * (2 if direction_gates and bidirectional else 1)
        self.log_gate = LowRankLogGate(
            dim, gate_dim, gate_low_rank_dim, normalizer=gate_logit_normalizer, clamp_min=clamp_min
        )
        self.mix = nn.Linear(dim, value_dim)  # W_g, b_g
        self.global_norm_weight = nn.Parameter(torch.empty(value_dim // num_heads))
        self.local_norm_weight = nn.Parameter(torch.empty(value_dim // num_heads)) if locality else None
        self.output = nn.Linear(value_dim, dim, bias=False)  # W_o
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw all weights anew: Xavier-uniform with gain 2^-2.5, biases 0, norms 1."""
        if self.conv is not None:
            self.conv.reset_parameters()
        for linear in (self.qkv, self.log_gate.down, self.log_gate.up, self.mix, self.output):
            nn.init.xavier_uniform_(linear.weight, gain=2**-2.5)
        for bias in (self.log_gate.up.bias, self.mix.bias):
            nn.init.zeros_(bias)
        for weight in (self.global_norm_weight, self.local_norm_weight):
            if weight is not None:
                nn.init.ones_(weight)

    def forward(self, x: Float[Tensor, "batch length dim"], grid: tuple[int, int]) -> Float[Tensor, "batch length dim"]:
        """Mix the tokens ``x`` ``(batch, rows * columns, dim)``, which lie in raster order.

        Args:
            x: tokens.
            grid: rows and columns, one pair for the whole batch.

        Returns:
            ``(batch, rows * columns, dim)``.

        Raises:
            TypeError: wrong dtype.
            ValueError: wrong shape, or a grid that does not hold the tokens (as when there is a class token).
        """
        check_shape("x", x, (None, None, self.dim), "batch, length, dim")
        check_floating("x", x, like=self.qkv.weight.dtype)
        _check_grid(grid, x.shape[1])
        # Tokens are a picture whose channels lie side by side: no axis is moved.
        local = x if self.conv is None else self.conv(x.unflatten(1, grid)).flatten(1, 2)
        scanned = self._scan(local, grid)
        if self.official_eval_halving and not self.training:
            scanned = scanned / 2
        return map_tokens(self, self._mix, self.dim, local, scanned)

    def extra_repr(self) -> str:
        """The settings that the submodules do not show, for printing."""
        return (
            f"dim={self.dim}, num_heads={self.num_heads}, conv_act={self.conv_act}, out_act={self.out_act}, "
            f"direction_gates={self.direction_gates}, bidirectional={self.bidirectional}"
        )

    def _scan(self, local: Tensor, grid: tuple[int, int]) -> Float[Tensor, "batch length value_dim"]:
        """o, of all heads side by side."""
        gates = self.log_gate(local).split(self.key_dim, dim=-1)
        q, k, v = (
            self._heads(part) for part in self.qkv(local).split((self.key_dim, self.key_dim, self.value_dim), dim=-1)
        )
        q, k = rotate(q, grid, self.rotary), rotate(k, grid, self.rotary)
        if self.bidirectional:
            output = bidirectional_gated_linear_attention(q, k, v, self._heads(gates[0]), self._heads(gates[-1]))
        else:
            output = gated_linear_attention(q, k, v, self._heads(gates[0])).output
        return output.flatten(2)

    def _mix(self, local: Tensor, scanned: Tensor) -> Tensor:
        """y, from x_s and o."""
        logits = self.mix(local)
        # Under autocast these are narrower than the weights: a small o must not be squared there.
        local, scanned, logits = (part.to(self.global_norm_weight.dtype) for part in (local, scanned, logits))
        if self.local_norm_weight is None:
            mixed = torch.sigmoid(logits) * self._norm(scanned)
            return self.output(F.silu(mixed) if self.out_act else mixed)
        mixed = mix_branches(
            scanned,
            local,
            logits,
            self.global_norm_weight,
            self.local_norm_weight,
            self.norm_eps,
            self.out_act or "identity",
        )
        return self.output(mixed)

    def _norm(self, scanned: Tensor) -> Tensor:
        return rms_norm(self._heads(scanned), self.global_norm_weight, self.norm_eps).flatten(2)

    def _heads(self, x: Tensor) -> Float[Tensor, "batch length heads channels"]:
        return x.reshape(x.shape[0], x.shape[1], self.num_heads, -1)


def _check_grid(grid: tuple[int, int], length: int) -> None:
    is_pair = isinstance(grid, tuple | list | torch.Size) and len(grid) == 2
    if not is_pair or not all(isinstance(size, int | torch.SymInt) for size in grid):
        raise ValueError(f"grid must be one pair (rows, columns) of whole numbers for the whole batch, got {grid!r}")
    if grid[0] < 1 or grid[1] < 1 or grid[0] * grid[1] != length:
        raise ValueError(
            f"grid must hold the {length} tokens of x, one per place (a class token has none), "
            f"got {grid[0]} rows of {grid[1]}"
        )

r"""The gated linear attention layer: a drop-in replacement for causal self-attention with a memory of constant size.

With :math:`q = x W_q,\; k = x W_k,\; v = x W_v` cut into heads and the gate
:math:`\log \alpha = \log \sigma(x W_1 W_2 + b_2) / \tau`,

.. math:: S_t = \mathrm{diag}(\alpha_t)\, S_{t-1} + k_t^\top v_t, \qquad o_t = q_t S_t / \sqrt{d_k},
          \qquad y = \bigl(\mathrm{norm}(o) \odot \mathrm{swish}(x W_r)\bigr) W_o

(Yang et al., "Gated linear attention transformers with hardware-efficient training", arXiv 2312.06635, sections 4.3 and
4.4). Two layers are called official; they compute different functions, and :class:`GatedLinearAttention` is either.
"""

from __future__ import annotations

import functools
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from headgate.methods.sequence.gla.activations import find_activation
from headgate.methods.sequence.gla.cache import GLACache, GLAState
from headgate.methods.sequence.gla.convolution import convolve
from headgate.methods.sequence.gla.initialization import initialize, start_from_xavier
from headgate.methods.sequence.gla.padding import Packing, read_padding
from headgate.nn import LowRankLogGate, RMSNorm, ShortConvolution
from headgate.ops import gated_linear_attention
from headgate.validate import check_divides, check_floating, check_positive, check_shape

__all__ = ["GatedLinearAttention", "Variant"]

Variant = Literal["fla", "first_release"]


class GatedLinearAttention(nn.Module):
    """Causal token mixer whose memory fades by gates that are computed from the tokens, one per key channel.

    Args:
        dim: channels in and out (``hidden_size`` in flash-linear-attention).
        num_heads: heads H. Fewer heads have a larger memory, ``dim² · expand_k · expand_v / num_heads`` in all.
        expand_k: the keys of all heads together have ``dim * expand_k`` channels.
        expand_v: the same for the values.
        num_kv_heads: heads of keys, values and gates, each shared by ``num_heads / num_kv_heads`` query heads; default
            ``num_heads``.
        feature_map: function of queries and keys, by its name in flash-linear-attention; ``None`` for the identity.
        use_short_conv: put a short causal convolution and SiLU behind the projections of queries, keys and values.
        conv_size: taps of these convolutions.
        conv_bias: whether they have biases.
        use_output_gate: multiply the normed outputs by a gate of the token.
        gate_fn: function of the output gate, by its name in flash-linear-attention.
        gate_low_rank_dim: width of the bottleneck of the memory's gate.
        gate_logit_normalizer: τ, the temperature of that gate; the larger, the closer the gates start to one.
        clamp_min: smallest log gate that is let through, below zero; ``None`` for no limit.
        elementwise_affine: whether the norm of the heads has weights. It never has in the first release.
        norm_eps: ε of that norm.
        variant: ``"fla"``: the living implementation, flash-linear-attention: RMS norm per head, no biases but the
            gate's. ``"first_release"``: the layer behind the first published checkpoint: layer norm without weights, a
            bias in the output gate, keys multiplied by ``(dim / num_heads) ** -0.5`` on top of the scale of the
            queries, another start of the weights.
        layer_idx: which layer of a model this is; its states lie under this number in a :class:`GLACache`.

    Attributes:
        log_gate: maps ``x`` to log gates ``(batch, length, num_kv_heads * key)``, at most 0; another module of this
            form may take its place.

    Raises:
        ValueError: heads that do not divide the channels, a name or number that is not on offer.
    """

    def __init__(
        self,
        dim: int = 1024,
        num_heads: int = 4,
        expand_k: float = 0.5,
        expand_v: float = 1.0,
        num_kv_heads: int | None = None,
        feature_map: str | None = None,
        use_short_conv: bool = False,
        conv_size: int = 4,
        conv_bias: bool = False,
        use_output_gate: bool = True,
        gate_fn: str = "swish",
        gate_low_rank_dim: int = 16,
        gate_logit_normalizer: float = 16,
        clamp_min: float | None = None,
        elementwise_affine: bool = True,
        norm_eps: float = 1e-5,
        variant: Variant = "fla",
        layer_idx: int = 0,
    ) -> None:
        super().__init__()
        key_dim, value_dim = int(dim * expand_k), int(dim * expand_v)
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        check_positive(dim=dim, num_heads=num_heads, num_kv_heads=num_kv_heads, key_dim=key_dim, value_dim=value_dim)
        check_divides(num_heads=num_heads, key_dim=key_dim)
        check_divides(num_heads=num_heads, value_dim=value_dim)
        check_divides(num_kv_heads=num_kv_heads, num_heads=num_heads)
        check_positive(conv_size=conv_size, norm_eps=norm_eps)
        if variant not in ("fla", "first_release"):
            raise ValueError(f"variant must be 'fla' or 'first_release', got {variant!r}")
        first_release = variant == "first_release"
        self.dim = dim
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads
        self.head_key_dim = key_dim // num_heads
        self.head_value_dim = value_dim // num_heads
        self.variant = variant
        self.layer_idx = layer_idx
        self.key_scale = (dim / num_heads) ** -0.5 if first_release else None
        self.feature_map = None if feature_map is None else find_activation("feature_map", feature_map)
        self.gate_fn = find_activation("gate_fn", gate_fn)

        kv_key_dim, kv_value_dim = num_kv_heads * self.head_key_dim, num_kv_heads * self.head_value_dim
        self.q_proj = nn.Linear(dim, key_dim, bias=False)
        self.k_proj = nn.Linear(dim, kv_key_dim, bias=False)
        self.v_proj = nn.Linear(dim, kv_value_dim, bias=False)
        self.convolutions = nn.ModuleList(
            ShortConvolution(channels, conv_size, bias=conv_bias)
            for channels in ((key_dim, kv_key_dim, kv_value_dim) if use_short_conv else ())
        )
        log_gate = LowRankLogGate(
            dim, kv_key_dim, gate_low_rank_dim, normalizer=gate_logit_normalizer, clamp_min=clamp_min
        )
        self.log_gate: nn.Module = log_gate
        self.norm: nn.Module
        if first_release:
            self.norm = nn.LayerNorm(self.head_value_dim, eps=norm_eps, elementwise_affine=False)
        else:
            norm = RMSNorm if elementwise_affine else functools.partial(nn.RMSNorm, elementwise_affine=False)
            self.norm = norm(self.head_value_dim, eps=norm_eps)
        self.g_proj = nn.Linear(dim, value_dim, bias=first_release) if use_output_gate else None
        self.o_proj = nn.Linear(value_dim, dim, bias=False)
        if first_release:
            for layer in (self.q_proj, self.k_proj, log_gate.down, log_gate.up):
                start_from_xavier(layer, gain=2**-2.5)
        self.reset_parameters()

    def reset_parameters(self, std: float = 0.02) -> None:
        """Draw all weights anew, as the variant's published code does.

        Args:
            std: standard deviation of linear layers and convolutions; biases become zero. In the first release, queries,
                keys and the memory's gate start from Xavier's uniform distribution with gain 2^-2.5 in its place.
        """
        self.apply(functools.partial(initialize, std=std))

    def forward(
        self,
        x: Float[Tensor, "batch length dim"],
        attention_mask: Int[Tensor, "batch seen"] | None = None,
        cache: GLACache | None = None,
        cu_seqlens: Int[Tensor, " sequences_plus_one"] | None = None,
        *,
        packing: Packing | None = None,
    ) -> Float[Tensor, "batch length dim"]:
        """Mix the tokens of every sequence.

        Args:
            x: ``(batch, length, dim)``, at least one token.
            attention_mask: 1 (or true) at real tokens and 0 at padding, ``(batch, length)``; padding may stand anywhere
                and is removed, not zeroed. With a cache, columns for the tokens before may stand in front.
            cache: the states of the sequences, read and updated in place. One token without gradients takes constant
                time; any number of tokens goes on where the cache stopped.
            cu_seqlens: ``(sequences + 1,)`` rising boundaries from 0 to ``length`` of sequences packed in one batch row,
                in place of a mask. A cache then holds one state per sequence.
            packing: the same, from a model that has removed the padding by itself.

        Returns:
            ``(batch, length, dim)``; zeros at padding.

        Raises:
            TypeError: wrong dtype.
            ValueError: wrong shape or mask, no tokens, or a cache of another batch.
        """
        check_shape("x", x, (None, None, self.dim), "batch, length, dim")
        check_floating("x", x, like=self.q_proj.weight.dtype)
        if x.shape[1] == 0 and packing is None:
            raise ValueError(f"x must hold at least one token, got {tuple(x.shape)} for (batch, length, dim)")
        if packing is not None:
            return self._mix(x, packing, cache)
        padding, packing = read_padding(x, attention_mask, cu_seqlens, continued=cache is not None)
        if padding is None:
            return self._mix(x, packing, cache)
        return padding.unpack(self._mix(padding.pack(x), packing, cache))

    def state_size(self, length: int) -> int:
        """Floats kept to go on after ``length`` tokens: the memory of every head, and the convolutions' last inputs."""
        recent = sum(conv.state_size(length) // conv.kernel_size * (conv.kernel_size - 1) for conv in self._convs())
        return self.num_heads * self.head_key_dim * self.head_value_dim + recent

    def extra_repr(self) -> str:
        """Heads and variant, for ``print``."""
        return f"num_heads={self.num_heads}, num_kv_heads={self.num_kv_heads}, variant={self.variant!r}"

    def _mix(self, x: Tensor, packing: Packing | None, cache: GLACache | None) -> Float[Tensor, "batch length dim"]:
        """Mix tokens without padding, and move the cache on."""
        sequences, spare = (x.shape[0], 0) if packing is None else (packing.sequences, packing.spare)
        past = None if cache is None else self._past(cache, sequences)
        q, k, v, log_gate, recent = self._project(x, past, packing)
        one_token = x.shape[1] == 1 and packing is None
        if cache is not None and past is not None and one_token and not torch.is_grad_enabled():
            o = cache.step(self.layer_idx, q[:, 0], k[:, 0], v[:, 0], log_gate[:, 0], recent)[:, None]
            return self._read(x, o)
        memory = None if past is None else F.pad(past.memory, (0, 0, 0, 0, 0, 0, 0, spare))
        if x.shape[1] == 0:  # nothing but padding
            o, memory = v, self._blank(v, sequences) if memory is None else memory
        else:
            o, memory = gated_linear_attention(
                q, k, v, log_gate,
                initial_state=memory,
                return_state=cache is not None,
                cu_seqlens=None if packing is None else packing.cu_seqlens,
            )  # fmt: skip
        if cache is not None and memory is not None:
            state = GLAState(memory[:sequences], tuple(part[:sequences] for part in recent))
            columns = None if packing is None else packing.columns
            cache.write(self.layer_idx, state, x.shape[1] if columns is None else columns)
        return self._read(x, o)

    def _project(
        self, x: Tensor, past: GLAState | None, packing: Packing | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, tuple[Tensor, ...]]:
        """Queries, keys, values and log gates per head, and the convolutions' last inputs."""
        parts = [self.q_proj(x), self.k_proj(x), self.v_proj(x)]
        recent: list[Tensor] = []
        for index, conv in enumerate(self._convs()):
            before = None if past is None else past.recent[index]
            if before is not None and packing is not None:
                before = F.pad(before, (0, 0, 0, 0, 0, packing.spare))
            mixed, last = convolve(conv, parts[index], before, packing)
            parts[index] = F.silu(mixed)
            recent.append(last)
        log_gate = self.log_gate(x)
        expected = (x.shape[0], x.shape[1], self.num_kv_heads * self.head_key_dim)
        check_shape("the result of log_gate", log_gate, expected, "batch, length, num_kv_heads * key")
        q = parts[0].unflatten(-1, (self.num_heads, self.head_key_dim))
        k = self._heads(parts[1], self.head_key_dim)
        v = self._heads(parts[2], self.head_value_dim)
        if self.key_scale is not None:
            k = k * self.key_scale
        if self.feature_map is not None:
            q, k = self.feature_map(q), self.feature_map(k)
        return q, k, v, self._heads(log_gate, self.head_key_dim), tuple(recent)

    def _heads(self, x: Tensor, size: int) -> Float[Tensor, "batch length heads size"]:
        """Cut into heads, and repeat each one for the query heads that share it."""
        x = x.unflatten(-1, (self.num_kv_heads, size))
        groups = self.num_heads // self.num_kv_heads
        return x if groups == 1 else x.repeat_interleave(groups, dim=2)

    def _read(self, x: Tensor, o: Float[Tensor, "batch length heads value"]) -> Float[Tensor, "batch length dim"]:
        """Norm per head, output gate, output projection."""
        y = self.norm(o.to(self.o_proj.weight.dtype)).flatten(-2)
        if self.g_proj is not None:
            y = y * self.gate_fn(self.g_proj(x))
        return self.o_proj(y)

    def _convs(self) -> list[ShortConvolution]:
        return [conv for conv in self.convolutions if isinstance(conv, ShortConvolution)]

    def _past(self, cache: GLACache, sequences: int) -> GLAState | None:
        state = cache[self.layer_idx]
        if state is None:
            return None
        expected = (sequences, self.num_heads, self.head_key_dim, self.head_value_dim)
        if tuple(state.memory.shape) != expected or len(state.recent) != len(self.convolutions):
            raise ValueError(
                f"cache must hold a memory of {expected} (sequences, heads, key, value) and {len(self.convolutions)} "
                f"convolutions' inputs for layer {self.layer_idx}, got {tuple(state.memory.shape)} and {len(state.recent)}"
            )
        return state

    def _blank(self, v: Tensor, sequences: int) -> Float[Tensor, "sequences heads key value"]:
        """The memory before the first token."""
        dtype = torch.promote_types(v.dtype, torch.float32)
        return v.new_zeros(sequences, self.num_heads, self.head_key_dim, self.head_value_dim, dtype=dtype)

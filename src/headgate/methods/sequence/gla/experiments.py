r"""The small networks of the claim, and the gates that are compared in them.

The gate of a layer is its submodule ``log_gate``; another module takes its place, and everything else stays. From fine to
coarse, with head h and key channel c:

.. math:: \alpha_{t,h,c} = \sigma(x_t W_1 W_2 + b_2)_{h,c}^{1/\tau}, \quad
          \alpha_{t,h} = \sigma(x_t W_1 W_2 + b_2)_h^{1/\tau}, \quad
          \alpha_h = 1 - 2^{-5-h}, \quad \alpha = 1

are the published gate, a scalar gate (as in Mamba-2), the decay of RetNet (Sun et al., arXiv 2307.08621), and plain
linear attention. Two more gates do not see the data: the published one with :math:`W_1 = 0` learns a constant per channel,
and :math:`\alpha_h = 1 - 2^{-3-h}` forgets four times as fast as RetNet.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, Int64
from torch import Tensor, nn

from headgate.data.overwrite_recall import OverwriteRecallData
from headgate.methods.sequence.gla.initialization import initialize
from headgate.methods.sequence.gla.layer import GatedLinearAttention
from headgate.methods.sequence.gla.model import GLAModel
from headgate.nn import LowRankLogGate, RMSNorm, apply_rotary
from headgate.validate import check_divides, check_positive

__all__ = [
    "ConstantLogGate",
    "GateKind",
    "HeadLogGate",
    "LanguageNet",
    "RecallNet",
    "RotaryAttention",
    "kept_memory",
    "set_gate",
]

GateKind = Literal["vector", "scalar", "fixed", "fast", "none", "blind"]


class HeadLogGate(nn.Module):
    """One gate per head, computed from the token, for all key channels of the head.

    Args:
        dim: channels in.
        num_heads: heads H.
        head_key_dim: key channels per head K.
        rank: width of the bottleneck.
        normalizer: the temperature τ.
    """

    def __init__(self, dim: int, num_heads: int, head_key_dim: int, rank: int, normalizer: float) -> None:
        super().__init__()
        self.head_key_dim = head_key_dim
        self.gate = LowRankLogGate(dim, num_heads, rank, normalizer=normalizer)
        self.apply(initialize)

    def forward(self, x: Float[Tensor, "batch length dim"]) -> Float[Tensor, "batch length gate"]:
        """Log gates ``(batch, length, H · K)``, K times the same for every head."""
        return self.gate(x).repeat_interleave(self.head_key_dim, dim=-1)


class ConstantLogGate(nn.Module):
    """One decay per head, whatever the token; nothing is learned.

    Args:
        decays: factors in (0, 1] on the memory per step, one per head.
        head_key_dim: key channels per head.
    """

    log_decay: Tensor

    def __init__(self, decays: Sequence[float], head_key_dim: int) -> None:
        super().__init__()
        self.register_buffer("log_decay", torch.tensor(decays).log().repeat_interleave(head_key_dim))

    def forward(self, x: Float[Tensor, "batch length dim"]) -> Float[Tensor, "batch length gate"]:
        """Log gates ``(batch, length, H · K)``."""
        return self.log_decay.expand(*x.shape[:-1], -1)


def set_gate(layer: GatedLinearAttention, kind: GateKind) -> None:
    """Give a freshly made layer another gate; all other weights stay.

    Args:
        layer: its gate is the published one; rank and temperature are taken over from it.
        kind: ``"vector"``: leave it. ``"scalar"``: :class:`HeadLogGate`. ``"fixed"``: decay 1 - 2^(-5 - h) in head h.
            ``"fast"``: decay 1 - 2^(-3 - h). ``"none"``: decay 1. ``"blind"``: the published gate with W_1 = 0, held
            there.
    """
    gate, heads, key = layer.log_gate, layer.num_kv_heads, layer.head_key_dim
    assert isinstance(gate, LowRankLogGate)
    if kind == "scalar":
        layer.log_gate = HeadLogGate(layer.dim, heads, key, gate.down.out_features, gate.normalizer)
    elif kind in ("fixed", "fast"):
        slowness = 5 if kind == "fixed" else 3
        layer.log_gate = ConstantLogGate([1 - 2.0 ** (-slowness - head) for head in range(heads)], key)
    elif kind == "none":
        layer.log_gate = ConstantLogGate([1.0] * heads, key)
    elif kind == "blind":
        nn.init.zeros_(gate.down.weight)
        gate.down.weight.requires_grad_(False)


class RotaryAttention(nn.Module):
    """Causal softmax attention with rotary positions, for orientation: a memory that grows with every step.

    Args:
        dim: channels in and out.
        num_heads: heads; must divide ``dim``.
    """

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        check_divides(num_heads=num_heads, dim=dim)
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.out_proj = nn.Linear(dim, dim, bias=False)

    def forward(self, x: Float[Tensor, "batch length dim"]) -> Float[Tensor, "batch length dim"]:
        """Attend to the own token and those before."""
        q, k, v = (part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, dim=-1))
        y = F.scaled_dot_product_attention(apply_rotary(q), apply_rotary(k), v, is_causal=True)
        return self.out_proj(y.transpose(1, 2).flatten(2))


class RecallNet(nn.Module):
    """One mixer between the embedding of a step and the guess of its value: ``head(N(x + mixer(N(x))))``.

    A step enters as the sum of the embeddings of its key and of its value (or of "query"). All that is not the mixer is
    drawn first, so that nets with different mixers start alike there.

    Args:
        num_keys: number of keys.
        num_values: number of values.
        dim: channels.
        num_heads: heads.
        gate: the layer's gate; ``None`` for softmax attention in the layer's place.
        normalizer: the gate's temperature τ.
    """

    def __init__(
        self, num_keys: int, num_values: int, dim: int, num_heads: int, gate: GateKind | None, normalizer: float
    ) -> None:
        super().__init__()
        check_positive(num_keys=num_keys, num_values=num_values, dim=dim, num_heads=num_heads)
        self.num_keys = num_keys
        self.key_embedding = nn.Embedding(num_keys, dim)
        self.value_embedding = nn.Embedding(num_values + 1, dim)
        for embedding in (self.key_embedding, self.value_embedding):
            nn.init.normal_(embedding.weight, std=0.5)
        self.norm = RMSNorm(dim)
        self.last_norm = RMSNorm(dim)
        self.head = nn.Linear(dim, num_values)
        self.mixer: nn.Module
        if gate is None:
            self.mixer = RotaryAttention(dim, num_heads)
        else:
            self.mixer = GatedLinearAttention(dim, num_heads, gate_logit_normalizer=normalizer)
            set_gate(self.mixer, gate)

    def forward(
        self, keys: Int64[Tensor, "batch length"], values: Int64[Tensor, "batch length"]
    ) -> Float[Tensor, "batch length values"]:
        """Score every value at every step; what is scored at a write means nothing."""
        x = self.embed(keys, values)
        return self.head(self.last_norm(x + self.mixer(self.norm(x))))

    def embed(
        self, keys: Int64[Tensor, "batch length"], values: Int64[Tensor, "batch length"]
    ) -> Float[Tensor, "batch length dim"]:
        """What a step enters as."""
        return self.key_embedding(keys) + self.value_embedding(values)


class LanguageNet(nn.Module):
    """The language model's backbone with tied output weights and the chosen gate in every block.

    Args:
        vocab_size: number of token ids.
        gate: the gate of all blocks.
        **sizes: keywords of :class:`GLAModel`.
    """

    def __init__(self, vocab_size: int, gate: GateKind, **sizes: Any) -> None:
        super().__init__()
        self.model = GLAModel(vocab_size, **sizes)
        for layer in self.mixers():
            set_gate(layer, gate)

    def forward(self, tokens: Int[Tensor, "batch length"]) -> Float[Tensor, "batch length vocab"]:
        """Score every next token."""
        return F.linear(self.model(tokens), self.model.embeddings.weight)

    def mixers(self) -> list[GatedLinearAttention]:
        """The layers that hold a gate, first block first."""
        return [module for module in self.modules() if isinstance(module, GatedLinearAttention)]


@torch.no_grad()
def kept_memory(net: RecallNet, data: OverwriteRecallData) -> Float[Tensor, "keys tokens"]:
    """What one step leaves of the memory of every key: the mean gate on the rows of the memory that the key uses.

    A key uses row (head, channel) as much as its writes write there: by the mean square of their k.

    Args:
        net: a trained net with a gate.
        data: examples in which every key is written and asked for.

    Returns:
        ``(num_keys, 2 · num_keys)`` in [0, 1]: entry (i, j) is what a write to key j leaves of key i's memory, entry
        (i, num_keys + j) what a query for key j leaves of it.
    """
    layer, keys = net.mixer, net.num_keys
    assert isinstance(layer, GatedLinearAttention)
    x = net.norm(net.embed(data.keys, data.values))
    kind = (data.keys + keys * (data.values == net.value_embedding.num_embeddings - 1)).flatten()
    member = F.one_hot(kind, 2 * keys).to(x.dtype)
    member = member / member.sum(dim=0)
    gates = member.T @ layer.log_gate(x).exp().flatten(0, 1)
    used = member[:, :keys].T @ layer.k_proj(x).square().flatten(0, 1)
    return (used / used.sum(dim=1, keepdim=True)) @ gates.T

r"""RWKV-4 (Peng et al., "RWKV: Reinventing RNNs for the transformer era", arXiv 2305.13048): time mix and channel mix.

Both read the token shift :math:`\tilde x_t = \mu \odot x_t + (1 - \mu) \odot x_{t-1}` with a μ of their own for each
projection. The time mix averages values with exponentially decaying weights, per channel,

.. math:: \mathrm{wkv}_t = \frac{\sum_{i<t} e^{-(t-1-i) w + k_i} v_i + e^{u + k_t} v_t}{\sum_{i<t} e^{-(t-1-i) w + k_i} + e^{u + k_t}},
          \qquad w = e^{\mathrm{decay}},\qquad o = W_o(\sigma(r) \odot \mathrm{wkv})

and the channel mix is :math:`\sigma(r') \odot W_v\,\mathrm{relu}(W_k \tilde x)^2`.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from headgate.validate import check_floating, check_positive, check_shape

__all__ = ["RWKVChannelMix", "RWKVTimeMix", "wkv", "wkv_reference"]


def wkv(
    key: Float[Tensor, "batch length dim"],
    value: Float[Tensor, "batch length dim"],
    decay: Float[Tensor, " dim"],
    bonus: Float[Tensor, " dim"],
) -> Float[Tensor, "batch length dim"]:
    """The decaying average of the time mix, over all tokens in ⌈log₂ length⌉ steps.

    The sums up to t form a semigroup: the sum over 2s tokens is the sum over the later s plus the decayed sum over the
    earlier s. Each sum is kept as (numerator, denominator, maximum) with the exponent's running maximum taken out, in
    float32 at least, so no exponential exceeds one. The maxima cancel in the quotient and therefore carry no gradient.

    Args:
        key: k, ``(batch, length, dim)``.
        value: v, of the same shape.
        decay: w > 0, ``(dim,)``: by how much the exponent falls with every step.
        bonus: u, ``(dim,)``: added to the exponent of the token itself.

    Returns:
        ``(batch, length, dim)`` in the dtype of ``value``: each entry lies between the smallest and the largest value
        so far.
    """
    wide = torch.promote_types(value.dtype, torch.float32)
    k, v, w, u = key.to(wide), value.to(wide), decay.to(wide), bonus.to(wide)
    length = k.shape[1]
    largest = k.detach()
    weight = torch.exp(k - largest)
    top, bottom = weight * v, weight
    span = 1
    while span < length:
        fallen = largest[:, :-span] - span * w.detach()
        peak = torch.maximum(fallen, largest[:, span:])
        # The exponent is (largest - span·w - peak); only w carries a gradient.
        earlier = torch.exp(largest[:, :-span] - span * w - peak)
        later = torch.exp(largest[:, span:] - peak)
        top = torch.cat((top[:, :span], top[:, :-span] * earlier + top[:, span:] * later), dim=1)
        bottom = torch.cat((bottom[:, :span], bottom[:, :-span] * earlier + bottom[:, span:] * later), dim=1)
        largest = torch.cat((largest[:, :span], peak), dim=1)
        span *= 2
    own = u + k
    peak = torch.maximum(largest[:, :-1], own[:, 1:].detach())
    past = torch.exp(largest[:, :-1] - peak)
    present = torch.exp(own[:, 1:] - peak)
    average = (top[:, :-1] * past + present * v[:, 1:]) / (bottom[:, :-1] * past + present)
    return torch.cat((v[:, :1], average), dim=1).to(value.dtype)


def wkv_reference(
    key: Float[Tensor, "batch length dim"],
    value: Float[Tensor, "batch length dim"],
    decay: Float[Tensor, " dim"],
    bonus: Float[Tensor, " dim"],
) -> Float[Tensor, "batch length dim"]:
    """The same average, token by token, with a state of three numbers per channel: the form for decoding."""
    wide = torch.promote_types(value.dtype, torch.float32)
    k, v, w, u = key.to(wide), value.to(wide), decay.to(wide), bonus.to(wide)
    top = bottom = torch.zeros_like(k[:, 0])
    largest = torch.full_like(k[:, 0], -torch.inf)
    outputs = []
    for t in range(k.shape[1]):
        peak = torch.maximum(largest, u + k[:, t])
        past, present = torch.exp(largest - peak), torch.exp(u + k[:, t] - peak)
        outputs.append((past * top + present * v[:, t]) / (past * bottom + present))
        peak = torch.maximum(largest - w, k[:, t])
        past, present = torch.exp(largest - w - peak), torch.exp(k[:, t] - peak)
        top, bottom, largest = past * top + present * v[:, t], past * bottom + present, peak
    return torch.stack(outputs, dim=1).to(value.dtype)


class RWKVTimeMix(nn.Module):
    """The sequence mixer of RWKV-4.

    Args:
        dim: channels.
        layer: index of the block; the start of decay and token shift depends on it as published.
        depth: number of blocks of the model, more than ``layer``.
    """

    def __init__(self, dim: int, layer: int = 0, depth: int = 12) -> None:
        super().__init__()
        rising, falling = _layer_ratios(dim, layer, depth)
        self.dim = dim
        place = torch.arange(dim) / max(dim - 1, 1)
        self.log_decay = nn.Parameter(-5 + 8 * place ** (0.7 + 1.3 * rising))
        self.bonus = nn.Parameter(math.log(0.3) + 0.5 * ((torch.arange(dim) + 1) % 3 - 1))
        share = torch.arange(dim) / dim
        self.mix_key = nn.Parameter(share**falling)
        self.mix_value = nn.Parameter(share**falling + 0.3 * rising)
        self.mix_receptance = nn.Parameter(share ** (0.5 * falling))
        self.key = nn.Linear(dim, dim, bias=False)
        self.value = nn.Linear(dim, dim, bias=False)
        self.receptance = nn.Linear(dim, dim, bias=False)
        self.output = nn.Linear(dim, dim, bias=False)

    def forward(self, x: Float[Tensor, "batch length dim"]) -> Float[Tensor, "batch length dim"]:
        """Mix ``x`` ``(batch, length, dim)`` along the sequence.

        Raises:
            TypeError: wrong dtype.
            ValueError: wrong shape.
        """
        check_shape("x", x, (None, None, self.dim), "batch, length, dim")
        check_floating("x", x, like=self.key.weight.dtype)
        before = _shift(x)
        key = self.key(torch.lerp(before, x, self.mix_key.to(x.dtype)))
        value = self.value(torch.lerp(before, x, self.mix_value.to(x.dtype)))
        receptance = self.receptance(torch.lerp(before, x, self.mix_receptance.to(x.dtype)))
        return self.output(torch.sigmoid(receptance) * wkv(key, value, self.log_decay.exp(), self.bonus))

    def state_size(self, length: int) -> int:
        """Floats kept to go on after ``length`` tokens: the token before and three sums, ``4 * dim``."""
        return 4 * self.dim


class RWKVChannelMix(nn.Module):
    """The state mixer of RWKV-4.

    Args:
        dim: channels.
        layer: index of the block; the start of the token shift depends on it as published.
        depth: number of blocks of the model, more than ``layer``.
        hidden_dim: channels between; default ``4 * dim``.
    """

    def __init__(self, dim: int, layer: int = 0, depth: int = 12, hidden_dim: int | None = None) -> None:
        super().__init__()
        _, falling = _layer_ratios(dim, layer, depth)
        hidden_dim = 4 * dim if hidden_dim is None else hidden_dim
        check_positive(hidden_dim=hidden_dim)
        self.dim = dim
        share = torch.arange(dim) / dim
        self.mix_key = nn.Parameter(share**falling)
        self.mix_receptance = nn.Parameter(share**falling)
        self.key = nn.Linear(dim, hidden_dim, bias=False)
        self.receptance = nn.Linear(dim, dim, bias=False)
        self.value = nn.Linear(hidden_dim, dim, bias=False)

    def forward(self, x: Float[Tensor, "batch length dim"]) -> Float[Tensor, "batch length dim"]:
        """Mix the channels of ``x`` ``(batch, length, dim)``, each token with the one before it.

        Raises:
            TypeError: wrong dtype.
            ValueError: wrong shape.
        """
        check_shape("x", x, (None, None, self.dim), "batch, length, dim")
        check_floating("x", x, like=self.key.weight.dtype)
        before = _shift(x)
        key = self.key(torch.lerp(before, x, self.mix_key.to(x.dtype)))
        receptance = self.receptance(torch.lerp(before, x, self.mix_receptance.to(x.dtype)))
        return torch.sigmoid(receptance) * self.value(F.relu(key).square())

    def state_size(self, length: int) -> int:
        """Floats kept to go on after ``length`` tokens: the token before, ``dim``."""
        return self.dim


def _shift(x: Float[Tensor, "batch length dim"]) -> Float[Tensor, "batch length dim"]:
    """The token before; zero before the first."""
    return F.pad(x, (0, 0, 1, -1))


def _layer_ratios(dim: int, layer: int, depth: int) -> tuple[float, float]:
    """How deep the layer lies, rising from 0 to 1, and falling from 1 to almost 0."""
    check_positive(dim=dim, depth=depth)
    if not 0 <= layer < depth:
        raise ValueError(f"layer must lie in [0, depth), got layer={layer}, depth={depth}")
    return layer / max(depth - 1, 1), 1 - layer / depth

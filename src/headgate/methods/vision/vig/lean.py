"""One block on a large picture in little memory, in place: inference on a CPU.

The block's modules, one after the other, each hold their results for all tokens: on a large picture that is several times
the picture. Here normed tokens exist for a strip of rows at a time, queries, keys, values, gates and outputs for a group
of heads, and what is token-wise for some hundred tokens; x_s alone is kept whole. The values are the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from headgate.methods.vision.vig.positions import rotate
from headgate.ops import (
    bidirectional_gated_linear_attention,
    gated_linear_attention,
    log_sigmoid_gate,
    mix_branches,
    rms_norm,
    swiglu,
)

if TYPE_CHECKING:
    from headgate.methods.vision.vig.block import ViGBlock
    from headgate.methods.vision.vig.layer import BidirectionalGLA

__all__ = ["advance_in_place", "may_overwrite"]

_LARGE = 1024
"""Tokens of a batch from which on memory counts more than the calls that save it."""
_GROUPS = 3
"""Into how many groups the heads are cut, at most."""
_NARROW_BLOCK, _WIDE_BLOCK = 1024, 256
"""Tokens at a time, where results are as narrow as a group of heads, and where they are as wide as SwiGLU."""


def may_overwrite(model: nn.Module, features: Float[Tensor, "batch dim rows columns"]) -> bool:
    """Whether the maps within ``model`` may be written over, and are large enough for it to pay.

    They may not where somebody else looks at them: autograd, a compiler, or a hook.
    """
    if torch.compiler.is_compiling() or torch.is_grad_enabled() or model.training or type(features) is not Tensor:
        return False
    if features.shape[0] * features.shape[2] * features.shape[3] < _LARGE or features.device.type != "cpu":
        return False
    if features.dtype not in (torch.float32, torch.float64) or torch.is_autocast_enabled("cpu"):
        return False
    hooked = any(part._forward_hooks or part._forward_pre_hooks for part in model.modules())
    return not hooked and not nn.modules.module._has_any_global_hook()


def advance_in_place(block: ViGBlock, features: Float[Tensor, "batch dim rows columns"]) -> Tensor:
    """What ``block(features)`` is in evaluation mode, written over ``features`` where it lies in channels-last order."""
    picture = features.permute(0, 2, 3, 1).contiguous()
    _add_mixed(block.mixer, _local(block, picture), picture)
    _add_fed_forward(block, picture.flatten(0, 2))
    return picture.permute(0, 3, 1, 2)


def _blocks(tokens: int, size: int) -> Iterator[slice]:
    size *= torch.get_num_threads()
    return (slice(start, start + size) for start in range(0, tokens, size))


def _local(
    block: ViGBlock, picture: Float[Tensor, "batch rows columns dim"]
) -> Float[Tensor, "batch rows columns dim"]:
    """x_s, from strips of rows with their neighbours above and below."""
    batch, rows, columns, dim = picture.shape
    local = torch.empty_like(picture)
    height = max(1, _NARROW_BLOCK // (batch * columns))
    for top in range(0, rows, height):
        above, bottom = max(0, top - 1), min(rows, top + height)
        strip = block.mixer_norm(picture[:, above : bottom + 1].flatten(1, 2)).view(batch, -1, columns, dim)
        if block.mixer.conv is not None:
            strip = block.mixer.conv(strip)
        local[:, top:bottom] = strip[:, top - above : bottom - above]
    return local


def _add_mixed(mixer: BidirectionalGLA, local: Tensor, picture: Float[Tensor, "batch rows columns dim"]) -> None:
    """Add what the mixer makes of x_s to ``picture``, one group of heads after the other."""
    size = -(-mixer.num_heads // _GROUPS)
    low_rank = mixer.log_gate.down(local.flatten(0, 2))
    for first in range(0, mixer.num_heads, size):
        heads = range(first, min(mixer.num_heads, first + size))
        _add_branches(mixer, heads, local.flatten(0, 2), _scan(mixer, heads, local, low_rank), picture.flatten(0, 2))


def _scan(
    mixer: BidirectionalGLA,
    heads: range,
    local: Float[Tensor, "batch rows columns dim"],
    low_rank: Float[Tensor, "tokens rank"],
) -> Float[Tensor, "tokens width"]:
    """o of a group of heads, side by side."""
    batch, rows, columns, _ = local.shape
    qkv, gates = _project(mixer, heads, local.flatten(0, 2), low_rank)

    def split(x: Tensor) -> Tensor:
        return x.unflatten(0, (batch, -1)).unflatten(-1, (len(heads), -1))

    width = len(heads) * mixer.key_dim // mixer.num_heads
    q, k, v = split(qkv[:, :width]), split(qkv[:, width : 2 * width]), split(qkv[:, 2 * width :])
    q, k = (rotate(x, (rows, columns), mixer.rotary) for x in (q, k))
    if mixer.bidirectional:
        o = bidirectional_gated_linear_attention(q, k, v, split(gates[:, :width]), split(gates[:, -width:]))
    else:
        o = gated_linear_attention(q, k, v, split(gates)).output
    return (o.div_(2) if mixer.official_eval_halving else o).flatten(2).flatten(0, 1)


def _project(
    mixer: BidirectionalGLA, heads: range, local: Float[Tensor, "tokens dim"], low_rank: Float[Tensor, "tokens rank"]
) -> tuple[Float[Tensor, "tokens qkv"], Float[Tensor, "tokens gates"]]:
    """Queries, keys and values of a group of heads, and its log gates of one or both directions."""
    keys, values = _channels(heads, mixer.key_dim, mixer), _channels(heads, mixer.value_dim, mixer)
    q_weight, k_weight, v_weight = mixer.qkv.weight.split((mixer.key_dim, mixer.key_dim, mixer.value_dim))
    weight = torch.cat([q_weight[keys], k_weight[keys], v_weight[values]])
    log_gate = mixer.log_gate
    up_weight = log_gate.up.weight.unflatten(0, (-1, mixer.key_dim))[:, keys].flatten(0, 1)
    up_bias = log_gate.up.bias.unflatten(0, (-1, mixer.key_dim))[:, keys].flatten()
    qkv, gates = local.new_empty(len(local), len(weight)), local.new_empty(len(local), len(up_bias))
    for block in _blocks(len(local), _NARROW_BLOCK):
        torch.mm(local[block], weight.t(), out=qkv[block])
        logits = F.linear(low_rank[block], up_weight, up_bias)
        gates[block] = log_sigmoid_gate(logits, log_gate.normalizer, log_gate.clamp_min)
    return qkv, gates


def _channels(heads: range, width: int, mixer: BidirectionalGLA) -> slice:
    size = width // mixer.num_heads
    return slice(heads.start * size, heads.stop * size)


def _add_branches(
    mixer: BidirectionalGLA,
    heads: range,
    local: Float[Tensor, "tokens dim"],
    scanned: Float[Tensor, "tokens width"],
    tokens: Float[Tensor, "tokens dim"],
) -> None:
    """Mix a group's global branch with its local one, and add the group's share of the output to ``tokens``."""
    channels = _channels(heads, mixer.value_dim, mixer)
    gate_weight, gate_bias = mixer.mix.weight[channels], mixer.mix.bias[channels]
    output_weight, eps, act = mixer.output.weight[:, channels].t(), mixer.norm_eps, mixer.out_act or "identity"
    far_weight, near_weight = mixer.global_norm_weight, mixer.local_norm_weight
    for block in _blocks(len(tokens), _NARROW_BLOCK):
        far, logits = scanned[block], F.linear(local[block], gate_weight, gate_bias)
        if near_weight is None:
            far = rms_norm(far.unflatten(1, (len(heads), -1)), far_weight, eps).flatten(1)
            mixed = logits.sigmoid_() * far
            mixed = F.silu(mixed) if mixer.out_act else mixed
        else:
            mixed = mix_branches(far, local[block, channels], logits, far_weight, near_weight, eps, act)
        tokens[block].addmm_(mixed, output_weight)


def _add_fed_forward(block: ViGBlock, tokens: Float[Tensor, "tokens dim"]) -> None:
    """Add what SwiGLU makes of the normed tokens to them, one half of its inner channels after the other.

    Half a weight matrix at a time also halves the copy of it that a matrix product makes for itself and keeps.
    """
    gates, values = block.mlp.gate_value.weight.chunk(2)
    halves = list(zip(gates.chunk(2), values.chunk(2), block.mlp.output.weight.chunk(2, dim=1), strict=True))
    for rows in _blocks(len(tokens), _WIDE_BLOCK):
        part = tokens[rows]
        normed = block.mlp_norm(part[None])[0]
        for gate, value, output in halves:
            inner = part.new_empty(len(part), 2 * len(gate))
            torch.mm(normed, gate.t(), out=inner[:, : len(gate)])
            torch.mm(normed, value.t(), out=inner[:, len(gate) :])
            part.addmm_(swiglu(inner), output.t())

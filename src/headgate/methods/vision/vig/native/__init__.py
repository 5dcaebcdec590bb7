"""The parts of a block on both sides of its scans, each in one pass over the tokens: inference on a CPU."""

from __future__ import annotations

import math
import struct
from typing import TYPE_CHECKING, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from headgate.methods.vision.vig.native.kernels import ENTRIES, LOCAL, MERGE, PROJECT, scratch_numbers, worker
from headgate.nn import RMSNorm
from headgate.ops.native.vectors import VECTOR_BYTES

if TYPE_CHECKING:
    from headgate.methods.vision.vig.block import ViGBlock

__all__ = ["Weights", "add_merged", "find_weights", "local_features", "project"]

_WHOLE = 16
"""Widths that are a multiple of this are whole registers and tiles on every CPU and in both dtypes."""
_REGISTERS = 4
"""Registers of tokens in a block of many tokens; half as many where that gives every thread more even work."""
_ROWS = 16
"""Rows of a picture that are convolved at a time, at most; the two beside them are normed for it, too."""


class Weights(NamedTuple):
    """A block's sizes and settings, and the addresses of its weights."""

    dtype: torch.dtype
    dim: int
    key: int
    """Of one head, as is the next one."""
    value: int
    key_dim: int
    rank: int
    directions: int
    """Of the gates."""
    hidden: int
    entries: dict[str, int]
    taps: Tensor
    """[9, dim], of the convolution."""


def find_weights(block: ViGBlock) -> Weights | None:
    """What the compiled form needs of a block; ``None`` where it does not cover it.

    It covers blocks with both branches, widths of whole registers, RMS or layer norms, and plain weights.
    """
    mixer, mlp, first_norm, norm = block.mixer, block.mlp, block.mixer_norm, block.mlp_norm
    conv, gate = mixer.conv, mixer.log_gate
    if conv is None or type(norm) not in (RMSNorm, nn.LayerNorm) or type(first_norm) is not type(norm):
        return None
    assert isinstance(norm, RMSNorm | nn.LayerNorm)
    assert isinstance(first_norm, RMSNorm | nn.LayerNorm)
    key, value = mixer.key_dim // mixer.num_heads, mixer.value_dim // mixer.num_heads
    down, up, gate_value, output = gate.down.weight, gate.up.weight, mlp.gate_value.weight, mlp.output.weight
    if any(width % _WHOLE for width in (key, value, mixer.dim, len(down), mlp.hidden_dim)):
        return None
    qkv, mix, taps = mixer.qkv.weight, mixer.mix, conv.weight
    named = {
        "norm_weight": first_norm.weight,
        "norm_bias": getattr(first_norm, "bias", None),
        "qkv_weight": qkv,
        "down_weight": down,
        "up_weight": up,
        "up_bias": gate.up.bias,
        "mix_weight": mix.weight,
        "mix_bias": mix.bias,
        "far_weight": mixer.global_norm_weight,
        "near_weight": mixer.local_norm_weight,
        "output_weight": mixer.output.weight,
        "mlp_norm_weight": norm.weight,
        "mlp_norm_bias": getattr(norm, "bias", None),
        "gate_value_weight": gate_value,
        "mlp_output_weight": output,
    }
    dtype, addresses = qkv.dtype, {}
    for name, weight in named.items():
        if weight is None and name.endswith("norm_bias"):
            continue
        if type(weight) is not nn.Parameter or weight.dtype != dtype or not weight.is_contiguous():
            return None
        addresses[name] = weight.data_ptr()
    entries = {
        "dim": mixer.dim,
        "head_dim": value,
        "rank": len(down),
        "directions": len(up) // mixer.key_dim,
        "factor": _bits(1 / gate.normalizer),
        "lowest": _bits(-math.inf if gate.clamp_min is None else gate.clamp_min),
        "conv_silu": int(mixer.conv_act is not None),
        "silu": int(mixer.out_act is not None),
        "output_row": mixer.value_dim * qkv.element_size(),
        "branch_eps": _bits(mixer.norm_eps),
        "norm_eps": _bits(float(first_norm.eps or 0.0)),
        "mlp_norm_eps": _bits(float(norm.eps or 0.0)),
        "layer_norm": int(isinstance(norm, nn.LayerNorm)),
        **addresses,
    }
    return Weights(
        dtype, mixer.dim, key, value, mixer.key_dim, len(down), len(up) // mixer.key_dim, mlp.hidden_dim,
        entries, taps.reshape(mixer.dim, 9).t().contiguous(),
    )  # fmt: skip


def local_features(
    weights: Weights, picture: Float[Tensor, "batch rows columns dim"]
) -> Float[Tensor, "batch rows columns dim"]:
    """x_s of tokens that are not normed yet."""
    batch, rows, columns, dim = picture.shape
    local = torch.empty_like(picture)
    height = min(_ROWS, -(-rows // (2 * torch.get_num_threads())))
    numbers = (height + 2) * columns * dim
    own = {
        "taps": weights.taps.data_ptr(),
        "rows": rows,
        "columns": columns,
        "tokens_in": picture.data_ptr(),
        "local": local.data_ptr(),
    }
    _run(LOCAL, weights, own, batch * -(-rows // height), height, numbers)
    return local


def project(
    weights: Weights, heads: range, local: Float[Tensor, "tokens dim"]
) -> tuple[Float[Tensor, "tokens qkv"], Float[Tensor, "tokens gates"]]:
    """Queries, keys and values of a group of heads side by side, and the log gates of one or both directions.

    Args:
        weights: of the block.
        heads: the group.
        local: x_s.
    """
    tokens, size, entries = len(local), local.element_size(), weights.entries
    keys, values, first = len(heads) * weights.key, len(heads) * weights.value, heads.start * weights.key
    qkv = local.new_empty(tokens, 2 * keys + values)
    gates = local.new_empty(tokens, weights.directions * keys)
    row, qkv_weight = weights.dim * size, entries["qkv_weight"]
    backward = first + (weights.key_dim if weights.directions == 2 else 0)
    own = {
        "local": local.data_ptr(),
        "tokens": tokens,
        "key_width": keys,
        "value_width": values,
        "query_weight": qkv_weight + first * row,
        "key_weight": qkv_weight + (weights.key_dim + first) * row,
        "value_weight": qkv_weight + (2 * weights.key_dim + heads.start * weights.value) * row,
        "up_weight": entries["up_weight"] + first * weights.rank * size,
        "up_bias": entries["up_bias"] + first * size,
        "up_weight_backward": entries["up_weight"] + backward * weights.rank * size,
        "up_bias_backward": entries["up_bias"] + backward * size,
        "qkv": qkv.data_ptr(),
        "gates": gates.data_ptr(),
    }
    block = _tokens_at_once(tokens, size)
    numbers = scratch_numbers(PROJECT, weights.dim, max(keys, values), weights.rank, 0, block, VECTOR_BYTES // size)
    _run(PROJECT, weights, own, -(-tokens // block), block, numbers)
    return qkv, gates


def add_merged(
    weights: Weights,
    heads: range,
    local: Float[Tensor, "tokens dim"],
    scanned: Float[Tensor, "tokens width"],
    tokens: Float[Tensor, "tokens dim"],
    feed_forward: bool,
) -> None:
    """Mix a group's scans with x_s and add its share of the output to ``tokens``.

    Args:
        weights: of the block.
        heads: the group.
        local: x_s.
        scanned: o of the group's heads, side by side.
        tokens: what is added to.
        feed_forward: whether then to norm what stands in ``tokens`` and to add what SwiGLU makes of it.
    """
    count, size, entries = len(local), local.element_size(), weights.entries
    first, width, hidden = heads.start * weights.value, len(heads) * weights.value, weights.hidden * feed_forward
    own = {
        "local": local.data_ptr(),
        "tokens": count,
        "width": width,
        "first_channel": first,
        "scanned": scanned.data_ptr(),
        "mix_weight": entries["mix_weight"] + first * weights.dim * size,
        "mix_bias": entries["mix_bias"] + first * size,
        "output_weight": entries["output_weight"] + first * size,
        "tokens_out": tokens.data_ptr(),
        "hidden": hidden,
    }
    block = _tokens_at_once(count, size)
    numbers = scratch_numbers(MERGE, weights.dim, width, 0, hidden, block, VECTOR_BYTES // size)
    _run(MERGE, weights, own, -(-count // block), block, numbers)


def _tokens_at_once(tokens: int, size: int) -> int:
    block = _REGISTERS * VECTOR_BYTES // size
    return block if tokens >= 8 * torch.get_num_threads() * block else block // 2


def _run(kind: int, weights: Weights, own: dict[str, int], items: int, block: int, numbers: int) -> None:
    """Run a job of ``items`` items; one worker writes down ``numbers`` numbers."""
    scratch_bytes = -(-numbers * weights.dtype.itemsize // VECTOR_BYTES) * VECTOR_BYTES
    threads = min(torch.get_num_threads(), items)
    scratch = torch.empty(threads * scratch_bytes + VECTOR_BYTES, dtype=torch.uint8)
    entries = {
        **weights.entries,
        **own,
        "kind": kind,
        "items": items,
        "block": block,
        "scratch": -(-scratch.data_ptr() // VECTOR_BYTES) * VECTOR_BYTES,
        "scratch_bytes": scratch_bytes,
    }
    worker(weights.dtype == torch.float64).run([entries.get(name, 0) for name in ENTRIES], threads)


def _bits(number: float) -> int:
    """The bits of a float64, as an integer."""
    return int(struct.unpack("q", struct.pack("d", number))[0])

r"""The parts of a block on both sides of its scans, compiled for this CPU: a few dozen tokens go through all of a part.

``LOCAL`` makes x_s of the tokens: norm, depthwise convolution, activation. ``PROJECT`` makes queries, keys, values and log gates of x_s. ``MERGE`` mixes the scans' outputs with x_s, maps the mix
and adds it to the tokens; then, where it is asked to, norms these and adds what SwiGLU makes of them. Intermediate
results are never longer than those tokens and stay in the cache.

A job is a table of 64-bit integers, addresses and strides in bytes, real numbers as the bits of a float64. Heads come
in groups: widths and addresses are those of a group's channels.
"""

from __future__ import annotations

import math
from functools import cache
from pathlib import Path
from typing import Any

from numba import cfunc, float32, float64, njit, types

from headgate.ops.native.functions import log_gate, log_gate_terms, sigmoid
from headgate.ops.native.products import add_rows, linear, read_tokens, write_tokens
from headgate.ops.native.threads import Worker, sources_digest
from headgate.ops.native.vectors import (
    TILE_ROWS,
    VECTOR_BYTES,
    add,
    cast,
    divide,
    fetch_add,
    item_size,
    lanes,
    load,
    load_int,
    load_scalar,
    multiply,
    multiply_add,
    splat,
    square_root,
    store,
    subtract,
    total,
)
from headgate.ops.tokenwise.kernels import convolve_row

__all__ = ["ENTRIES", "LOCAL", "MERGE", "PROJECT", "scratch_numbers", "worker"]

LOCAL, PROJECT, MERGE = range(3)
"""Kinds of job."""

ENTRIES = (
    "workers",  # how many have begun: counts up
    "next_item",  # counts up
    "kind",
    "items",
    "block",  # tokens, or rows of a picture, of one item
    "scratch",
    "scratch_bytes",  # of one worker
    "tokens",
    "dim",
    "local",  # x_s: [tokens, dim]; the result of LOCAL
    "layer_norm",  # whether the mean is taken off before a token is scaled
    # LOCAL
    "tokens_in",  # [tokens, dim]
    "rows",  # of one picture
    "columns",
    "norm_weight",
    "norm_bias",  # 0 for none
    "norm_eps",
    "taps",  # [9, dim]
    "conv_silu",
    # PROJECT
    "key_width",
    "value_width",
    "query_weight",  # [key_width, dim]
    "key_weight",
    "value_weight",
    "down_weight",  # [rank, dim]
    "rank",
    "directions",
    "up_weight",  # [key_width, rank], forward
    "up_bias",
    "up_weight_backward",
    "up_bias_backward",
    "factor",
    "lowest",
    "qkv",  # the result: [tokens, 2 * key_width + value_width]
    "gates",  # the result: [tokens, directions * key_width]
    # MERGE
    "width",
    "head_dim",
    "first_channel",
    "scanned",  # o: [tokens, width]
    "mix_weight",  # [width, dim]
    "mix_bias",
    "far_weight",  # [head_dim]
    "near_weight",
    "branch_eps",
    "silu",
    "output_weight",  # [dim, ...], of which the group's columns
    "output_row",
    "tokens_out",  # what is added to: [tokens, dim]
    "hidden",  # inner channels of SwiGLU; 0 for none
    "mlp_norm_weight",
    "mlp_norm_bias",  # 0 for none
    "mlp_norm_eps",
    "gate_value_weight",  # [2 * hidden, dim]
    "mlp_output_weight",  # [dim, hidden]
)

# the same as offsets in bytes
(
    _WORKERS, _NEXT, _KIND, _ITEMS, _BLOCK, _SCRATCH, _SCRATCH_BYTES, _TOKENS, _DIM, _LOCAL, _LAYER_NORM,
    _IN, _ROWS, _COLUMNS, _NORM, _NORM_BIAS, _NORM_EPS, _TAPS, _CONV_SILU,
    _KEYS, _VALUES, _QUERY_WEIGHT, _KEY_WEIGHT, _VALUE_WEIGHT, _DOWN, _RANK, _DIRECTIONS,
    _UP, _UP_BIAS, _UP_BACKWARD, _UP_BIAS_BACKWARD, _FACTOR, _LOWEST, _QKV, _GATES,
    _WIDTH, _HEAD_DIM, _FIRST_CHANNEL, _SCANNED, _MIX, _MIX_BIAS, _FAR, _NEAR, _BRANCH_EPS, _SILU,
    _OUTPUT, _OUTPUT_ROW, _OUT, _HIDDEN, _MLP_NORM, _MLP_NORM_BIAS, _MLP_NORM_EPS, _GATE_VALUE, _MLP_OUTPUT,
) = range(0, 8 * len(ENTRIES), 8)  # fmt: skip

_compiled = njit(nogil=True, error_model="numpy")


@cache
def worker(double: bool) -> Worker:
    """The worker for float64, or for float32; compiled at the first call on a machine."""
    return Worker((_compile_double if double else _compile_single)(sources_digest(Path(__file__).parent)))


def scratch_numbers(kind: int, dim: int, width: int, rank: int, hidden: int, pitch: int, lane_count: int) -> int:
    """Numbers that one worker writes down.

    Args:
        kind: of job.
        dim: channels.
        width: the largest width of a group.
        rank: of the gate.
        hidden: inner channels of SwiGLU.
        pitch: tokens of a block.
        lane_count: numbers in one register.
    """
    rows = dim + width + rank if kind == PROJECT else 2 * dim + 2 * width + hidden + 2 * TILE_ROWS
    return rows * pitch + lane_count * max(dim, width)


def _compile_single(sources: str) -> Any:
    @cfunc(types.void(types.int64), cache=True)
    def vig_single(job: int) -> None:
        if len(sources):  # in use here, it becomes part of the cache's key
            _work(job, float32(0))

    return vig_single


def _compile_double(sources: str) -> Any:
    @cfunc(types.void(types.int64), cache=True)
    def vig_double(job: int) -> None:
        if len(sources):
            _work(job, float64(0))

    return vig_double


@_compiled
def _norm_token(job: int, x: int, out: int, channels: int, zero: Any) -> None:
    """Root-mean-square norm, or layer norm, of one token whose channels lie side by side."""
    length, bias, eps = channels * item_size(zero), load_int(job + _NORM_BIAS), load_scalar(job + _NORM_EPS, 0.0)
    mean = splat(zero)
    if load_int(job + _LAYER_NORM):
        for offset in range(0, length, VECTOR_BYTES):
            mean = add(mean, load(x + offset, zero))
        mean = splat(cast(total(mean) / channels, zero))
    squares = splat(zero)
    for offset in range(0, length, VECTOR_BYTES):
        value = subtract(load(x + offset, zero), mean)
        squares = multiply_add(value, value, squares)
    scale = splat(cast(1 / math.sqrt(total(squares) / channels + eps), zero))
    for offset in range(0, length, VECTOR_BYTES):
        value = multiply(subtract(load(x + offset, zero), mean), scale)
        value = multiply(value, load(load_int(job + _NORM) + offset, zero))
        store(out + offset, add(value, load(bias + offset, zero)) if bias else value)


@_compiled
def _local(job: int, item: int, base: int, zero: Any) -> None:
    """Some rows of a picture; the rows beside them are normed once more, which costs less than to keep them."""
    rows, columns, channels = load_int(job + _ROWS), load_int(job + _COLUMNS), load_int(job + _DIM)
    height, length = load_int(job + _BLOCK), load_int(job + _DIM) * item_size(zero)
    strips = (rows + height - 1) // height
    picture, top = item // strips * rows * columns * length, item % strips * height
    first, last = max(0, top - 1), min(rows, top + height + 1)
    for token in range((last - first) * columns):
        source = load_int(job + _IN) + picture + first * columns * length
        _norm_token(job, source + token * length, base + token * length, channels, zero)
    # addresses as if the whole picture had been normed
    normed, out = base - first * columns * length, load_int(job + _LOCAL) + picture
    silu = load_int(job + _CONV_SILU) != 0
    for row in range(top, min(rows, top + height)):
        convolve_row(normed, load_int(job + _TAPS), out, row, rows, columns, length, silu, zero)


@_compiled
def _inverse_rms(block: int, channels: int, pitch: int, eps: float, zero: Any) -> Any:
    """1 / sqrt(mean over channels of x² + ε), of the tokens in the register at ``block``."""
    even, odd = splat(zero), splat(zero)
    for channel in range(0, channels, 2):
        value = load(block + channel * pitch, zero)
        even = multiply_add(value, value, even)
        value = load(block + (channel + 1) * pitch, zero)
        odd = multiply_add(value, value, odd)
    mean = multiply_add(add(even, odd), splat(cast(1 / channels, zero)), splat(cast(eps, zero)))
    return divide(splat(cast(1.0, zero)), square_root(mean))


@_compiled
def _norm(job: int, block: int, out: int, channels: int, pitch: int, zero: Any) -> None:
    """Root-mean-square norm, or layer norm, of all tokens."""
    size, weight, bias = item_size(zero), load_int(job + _MLP_NORM), load_int(job + _MLP_NORM_BIAS)
    eps = load_scalar(job + _MLP_NORM_EPS, 0.0)
    for column in range(0, pitch, VECTOR_BYTES):
        source = block + column
        if load_int(job + _LAYER_NORM):
            mean = splat(zero)
            for channel in range(channels):
                mean = add(mean, load(block + column + channel * pitch, zero))
            mean = multiply(mean, splat(cast(1 / channels, zero)))
            for channel in range(channels):
                at = column + channel * pitch
                store(out + at, subtract(load(block + at, zero), mean))
            source = out + column
        scale = _inverse_rms(source, channels, pitch, eps, zero)
        for channel in range(channels):
            value = multiply(load(source + channel * pitch, zero), scale)
            value = multiply(value, splat(load_scalar(weight + channel * size, zero)))
            if bias:
                value = add(value, splat(load_scalar(bias + channel * size, zero)))
            store(out + column + channel * pitch, value)


@_compiled
def _mix(job: int, logits: int, scanned: int, local: int, pitch: int, zero: Any) -> None:
    """act(G ⊙ norm_g(o) + (1 - G) ⊙ norm_l(x_s)) over the logits of G."""
    size, head_dim, silu = item_size(zero), load_int(job + _HEAD_DIM), load_int(job + _SILU)
    far_weight, near_weight, bias = load_int(job + _FAR), load_int(job + _NEAR), load_int(job + _MIX_BIAS)
    eps = load_scalar(job + _BRANCH_EPS, 0.0)
    for head in range(0, load_int(job + _WIDTH), head_dim):
        for column in range(head * pitch, (head + 1) * pitch, VECTOR_BYTES):
            far_scale = _inverse_rms(scanned + column, head_dim, pitch, eps, zero)
            near_scale = _inverse_rms(local + column, head_dim, pitch, eps, zero)
            for channel in range(head_dim):
                at = column + channel * pitch
                here = splat(load_scalar(bias + (head + channel) * size, zero))
                gate = sigmoid(add(load(logits + at, zero), here), zero)
                a = multiply(load(scanned + at, zero), far_scale)
                a = multiply(a, splat(load_scalar(far_weight + channel * size, zero)))
                b = multiply(load(local + at, zero), near_scale)
                b = multiply(b, splat(load_scalar(near_weight + channel * size, zero)))
                mixed = multiply_add(gate, subtract(a, b), b)
                store(logits + at, multiply(mixed, sigmoid(mixed, zero)) if silu else mixed)


@_compiled
def _log_gates(logits: int, bias: int, rows: int, pitch: int, factor: Any, lowest: Any, zero: Any) -> None:
    size, terms = item_size(zero), log_gate_terms(zero)
    for row in range(rows):
        here = splat(load_scalar(bias + row * size, zero))
        for at in range(logits + row * pitch, logits + (row + 1) * pitch, VECTOR_BYTES):
            store(at, log_gate(add(load(at, zero), here), factor, lowest, terms, zero))


@_compiled
def _swiglu(gates: int, values: int, out: int, rows: int, pitch: int, zero: Any) -> None:
    for at in range(0, rows * pitch, VECTOR_BYTES):
        gate = load(gates + at, zero)
        store(out + at, multiply(multiply(gate, sigmoid(gate, zero)), load(values + at, zero)))


@_compiled
def _project(job: int, first: int, count: int, pitch: int, base: int, spare: int, zero: Any) -> None:
    size, dim, rank = item_size(zero), load_int(job + _DIM), load_int(job + _RANK)
    keys, values, directions = load_int(job + _KEYS), load_int(job + _VALUES), load_int(job + _DIRECTIONS)
    row = dim * size
    x, made, low = base, base + dim * pitch, base + (dim + max(keys, values)) * pitch
    read_tokens(load_int(job + _LOCAL) + first * row, row, count, dim, x, pitch, spare, zero)
    qkv_row, gates_row = (2 * keys + values) * size, directions * keys * size
    qkv, gates = load_int(job + _QKV) + first * qkv_row, load_int(job + _GATES) + first * gates_row
    for part in range(3):
        width = values if part == 2 else keys
        linear(load_int(job + _QUERY_WEIGHT + 8 * part), row, width, dim, x, made, pitch, zero)
        write_tokens(made, pitch, width, qkv + part * keys * size, qkv_row, count, spare, zero)
    linear(load_int(job + _DOWN), row, rank, dim, x, low, pitch, zero)
    factor, lowest = cast(load_scalar(job + _FACTOR, 0.0), zero), cast(load_scalar(job + _LOWEST, 0.0), zero)
    for direction in range(directions):
        up = job + _UP + 16 * direction
        linear(load_int(up), rank * size, keys, rank, low, made, pitch, zero)
        _log_gates(made, load_int(up + 8), keys, pitch, factor, lowest, zero)
        write_tokens(made, pitch, keys, gates + direction * keys * size, gates_row, count, spare, zero)


@_compiled
def _merge(job: int, first: int, count: int, pitch: int, base: int, spare: int, zero: Any) -> None:
    size, dim, width = item_size(zero), load_int(job + _DIM), load_int(job + _WIDTH)
    hidden, row = load_int(job + _HIDDEN), load_int(job + _DIM) * item_size(zero)
    x, result, logits = base, base + dim * pitch, base + 2 * dim * pitch
    scanned = logits + width * pitch
    read_tokens(load_int(job + _LOCAL) + first * row, row, count, dim, x, pitch, spare, zero)
    read_tokens(
        load_int(job + _SCANNED) + first * width * size, width * size, count, width, scanned, pitch, spare, zero
    )
    linear(load_int(job + _MIX), row, width, dim, x, logits, pitch, zero)
    _mix(job, logits, scanned, x + load_int(job + _FIRST_CHANNEL) * pitch, pitch, zero)
    out = load_int(job + _OUT) + first * row
    read_tokens(out, row, count, dim, result, pitch, spare, zero)
    linear(load_int(job + _OUTPUT), load_int(job + _OUTPUT_ROW), dim, width, logits, x, pitch, zero)
    add_rows(x, result, dim, pitch, zero)
    if hidden:
        inner = scanned + width * pitch
        gates = inner + hidden * pitch
        values, weight = gates + TILE_ROWS * pitch, load_int(job + _GATE_VALUE)
        _norm(job, result, x, dim, pitch, zero)
        for channel in range(0, hidden, TILE_ROWS):
            linear(weight + channel * row, row, TILE_ROWS, dim, x, gates, pitch, zero)
            linear(weight + (hidden + channel) * row, row, TILE_ROWS, dim, x, values, pitch, zero)
            _swiglu(gates, values, inner + channel * pitch, TILE_ROWS, pitch, zero)
        linear(load_int(job + _MLP_OUTPUT), hidden * size, dim, hidden, inner, x, pitch, zero)
        add_rows(x, result, dim, pitch, zero)
    write_tokens(result, pitch, dim, out, row, count, spare, zero)


@_compiled
def _work(job: int, zero: Any) -> None:
    size, width = item_size(zero), lanes(zero)
    tokens, block, items = load_int(job + _TOKENS), load_int(job + _BLOCK), load_int(job + _ITEMS)
    kind, end = load_int(job + _KIND), load_int(job + _SCRATCH_BYTES)
    scratch = load_int(job + _SCRATCH) + fetch_add(job + _WORKERS, 1) * end
    widest = max(load_int(job + _DIM), load_int(job + _KEYS), load_int(job + _VALUES), load_int(job + _WIDTH))
    item = fetch_add(job + _NEXT, 1)
    while item < items:
        first = item * block
        count = min(block, tokens - first)
        pitch = (count + width - 1) // width * VECTOR_BYTES
        spare = scratch + end - width * widest * size
        if kind == LOCAL:
            _local(job, item, scratch, zero)
        elif kind == PROJECT:
            _project(job, first, count, pitch, scratch, spare, zero)
        else:
            _merge(job, first, count, pitch, scratch, spare, zero)
        item = fetch_add(job + _NEXT, 1)

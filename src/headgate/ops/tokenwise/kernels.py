"""The token-wise operations compiled for this CPU: each reads its inputs once and writes its result once.

A job is a table of 64-bit integers, named by the constants below. Its items are blocks of tokens (of picture rows for
the convolution), which the workers take one after the other. All widths are whole registers.
"""

from __future__ import annotations

import math
from functools import cache
from pathlib import Path
from typing import Any

from numba import cfunc, float32, float64, njit, types

from headgate.ops.native.functions import log_gate, log_gate_terms, sigmoid
from headgate.ops.native.threads import Worker, sources_digest
from headgate.ops.native.vectors import (
    VECTOR_BYTES,
    add,
    cast,
    fetch_add,
    item_size,
    load,
    load_int,
    load_scalar,
    multiply,
    multiply_add,
    splat,
    store,
    subtract,
    total,
)

__all__ = ["BLOCK", "DEPTHWISE", "LOG_GATE", "MIX", "RMS_NORM", "SWIGLU", "convolve_row", "worker"]

RMS_NORM, SWIGLU, LOG_GATE, MIX, DEPTHWISE = range(5)
"""Kinds of job."""

BLOCK = 32
"""Tokens of one item."""

# entries of the table, as offsets in bytes; what comes after the three inputs depends on the kind
_NEXT, _ITEMS, _KIND, _TOKENS, _WIDTH, _OUT, _A, _B, _C, _W1, _W2, _X1, _X2, _ACTIVATION = range(0, 8 * 14, 8)

_compiled = njit(nogil=True, error_model="numpy")


@cache
def worker(double: bool) -> Worker:
    """The worker for float64, or for float32; compiled at the first call on a machine."""
    return Worker((_compile_double if double else _compile_single)(sources_digest(Path(__file__).parent)))


def _compile_single(sources: str) -> Any:
    @cfunc(types.void(types.int64), cache=True)
    def tokenwise_single(job: int) -> None:
        if len(sources):  # in use here, it becomes part of the cache's key
            _work(job, float32(0))

    return tokenwise_single


def _compile_double(sources: str) -> Any:
    @cfunc(types.void(types.int64), cache=True)
    def tokenwise_double(job: int) -> None:
        if len(sources):
            _work(job, float64(0))

    return tokenwise_double


@_compiled
def _inverse_rms(x: int, width: int, eps: float, zero: Any) -> Any:
    """1 / sqrt(mean(x²) + ε), in all lanes."""
    size = item_size(zero)
    squares, more = splat(zero), splat(zero)
    for offset in range(0, width * size, 2 * VECTOR_BYTES):
        value = load(x + offset, zero)
        squares = multiply_add(value, value, squares)
        if offset + VECTOR_BYTES < width * size:
            value = load(x + offset + VECTOR_BYTES, zero)
            more = multiply_add(value, value, more)
    return splat(cast(1 / math.sqrt(total(add(squares, more)) / width + eps), zero))


@_compiled
def _norm_token(x: int, weight: int, out: int, width: int, eps: float, zero: Any) -> None:
    scale = _inverse_rms(x, width, eps, zero)
    for offset in range(0, width * item_size(zero), VECTOR_BYTES):
        store(out + offset, multiply(multiply(load(x + offset, zero), scale), load(weight + offset, zero)))


@_compiled
def _swiglu_token(x: int, out: int, length: int, zero: Any) -> None:
    for offset in range(0, length, VECTOR_BYTES):
        gate = load(x + offset, zero)
        store(out + offset, multiply(multiply(gate, sigmoid(gate, zero)), load(x + length + offset, zero)))


@_compiled
def _log_gate_token(x: int, out: int, length: int, factor: Any, lowest: Any, terms: int, zero: Any) -> None:
    for offset in range(0, length, VECTOR_BYTES):
        store(out + offset, log_gate(load(x + offset, zero), factor, lowest, terms, zero))


@_compiled
def _mix_token(
    far: int,
    near: int,
    logits: int,
    far_weight: int,
    near_weight: int,
    out: int,
    heads: int,
    head_dim: int,
    eps: float,
    silu: bool,
    zero: Any,
) -> None:
    length = head_dim * item_size(zero)
    for start in range(0, heads * length, length):
        far_scale = _inverse_rms(far + start, head_dim, eps, zero)
        near_scale = _inverse_rms(near + start, head_dim, eps, zero)
        for offset in range(0, length, VECTOR_BYTES):
            at = start + offset
            gate = sigmoid(load(logits + at, zero), zero)
            a = multiply(multiply(load(far + at, zero), far_scale), load(far_weight + offset, zero))
            b = multiply(multiply(load(near + at, zero), near_scale), load(near_weight + offset, zero))
            mixed = multiply_add(gate, subtract(a, b), b)
            store(out + at, multiply(mixed, sigmoid(mixed, zero)) if silu else mixed)


@_compiled
def convolve_row(
    x: int, taps: int, out: int, row: int, rows: int, columns: int, length: int, silu: bool, zero: Any
) -> None:
    """One row of one picture; ``x`` is the picture, ``taps`` nine rows of ``length`` bytes."""
    pitch = columns * length
    for column in range(columns):
        for offset in range(0, length, VECTOR_BYTES):
            result = splat(zero)
            for i in range(3):
                y = row + i - 1
                if 0 <= y < rows:
                    base = x + y * pitch + (column - 1) * length + offset
                    tap = taps + 3 * i * length + offset
                    if column > 0:
                        result = multiply_add(load(base, zero), load(tap, zero), result)
                    result = multiply_add(load(base + length, zero), load(tap + length, zero), result)
                    if column < columns - 1:
                        result = multiply_add(load(base + 2 * length, zero), load(tap + 2 * length, zero), result)
            store(
                out + row * pitch + column * length + offset,
                multiply(result, sigmoid(result, zero)) if silu else result,
            )


@_compiled
def _work(job: int, zero: Any) -> None:
    size = item_size(zero)
    kind, items, tokens, width = (
        load_int(job + _KIND),
        load_int(job + _ITEMS),
        load_int(job + _TOKENS),
        load_int(job + _WIDTH),
    )
    out, a, b, c = load_int(job + _OUT), load_int(job + _A), load_int(job + _B), load_int(job + _C)
    first_weight, second_weight = load_int(job + _W1), load_int(job + _W2)
    number, other = load_scalar(job + _X1, 0.0), load_scalar(job + _X2, 0.0)
    silu = load_int(job + _ACTIVATION) != 0
    length = width * size
    terms = log_gate_terms(zero)
    item = fetch_add(job + _NEXT, 1)
    while item < items:
        if kind == DEPTHWISE:
            picture = item // tokens * tokens * b * length
            convolve_row(a + picture, first_weight, out + picture, item % tokens, tokens, b, length, silu, zero)
        else:
            for token in range(item * BLOCK, min(tokens, item * BLOCK + BLOCK)):
                at = token * length
                if kind == RMS_NORM:
                    _norm_token(a + at, first_weight, out + at, width, number, zero)
                elif kind == SWIGLU:
                    _swiglu_token(a + 2 * at, out + at, length, zero)
                elif kind == LOG_GATE:
                    _log_gate_token(a + at, out + at, length, cast(number, zero), cast(other, zero), terms, zero)
                else:
                    head_dim = second_weight
                    _mix_token(
                        a + at, b + at, c + at, first_weight, first_weight + head_dim * size, out + at,
                        width // head_dim, head_dim, number, silu, zero,
                    )  # fmt: skip
        item = fetch_add(job + _NEXT, 1)

"""What is prepared for a chunk, and what its results become: gates and scores, and the rows that are written.

E is the product of the gates since the start of the chunk, see ``scan``.
"""

from __future__ import annotations

from typing import Any

from headgate.ops.gated_linear_attention.native.buffers import Buffers, Rows, compiled
from headgate.ops.native.tiles import CHUNK, multiply_scores, transpose_square
from headgate.ops.native.vectors import (
    TILE_ROWS,
    VECTOR_BYTES,
    add,
    exponential,
    inverse_exponential,
    item_size,
    lanes,
    load,
    load_scalar,
    minimum,
    multiply,
    multiply_add,
    smallest,
    splat,
    store,
    store_scalar,
)

__all__ = [
    "fill_rows",
    "gate_lanes",
    "gate_rows",
    "open_gates",
    "scale_rows",
    "score",
    "set_own_apart",
    "write_gated_rows",
    "write_rows",
]


@compiled
def gate_rows(
    buffers: Buffers, x: Rows, w: Rows, gate: Rows, tall: int, after: bool, x_scale: Any, w_scale: Any, zero: Any
) -> Any:
    """x·E, w/E and E at the end; the smallest logarithm of the latter.

    E is the exponential of a sum. Products of rounded gates would drift away over thousands of tokens where all gates
    are alike.
    """
    x_factor, w_factor = splat(x_scale), splat(w_scale)
    least = splat(zero)
    for column in range(0, tall, VECTOR_BYTES):
        sum_ = splat(zero)
        for token in range(CHUNK):
            after_it = add(sum_, load(gate.address + token * gate.stride + column, zero))
            sum_ = sum_ if after else after_it
            x_row = multiply(load(x.address + token * x.stride + column, zero), x_factor)
            w_row = multiply(load(w.address + token * w.stride + column, zero), w_factor)
            store(buffers.x + token * tall + column, multiply(x_row, exponential(sum_)))
            store(buffers.w + token * tall + column, multiply(w_row, inverse_exponential(sum_)))
            sum_ = after_it
        store(buffers.total + column, exponential(sum_))
        least = minimum(sum_, least)
    return smallest(least)


@compiled
def gate_lanes(
    buffers: Buffers, y: Rows, gate: Rows, wide: int, after: bool, x_scale: Any, w_scale: Any, zero: Any
) -> Any:
    """y/E, the E that the results take, and E at the end; the smallest logarithm of the latter. They take the scales."""
    x_factor, w_factor = splat(x_scale), splat(w_scale)
    least = splat(zero)
    for column in range(0, wide, VECTOR_BYTES):
        sum_ = splat(zero)
        for token in range(CHUNK):
            after_it = add(sum_, load(gate.address + token * gate.stride + column, zero))
            sum_ = sum_ if after else after_it
            y_row = multiply(load(y.address + token * y.stride + column, zero), w_factor)
            store(buffers.product + token * wide + column, multiply(exponential(sum_), x_factor))
            store(buffers.y + token * wide + column, multiply(y_row, inverse_exponential(sum_)))
            sum_ = after_it
        store(buffers.total + column, exponential(sum_))
        least = minimum(sum_, least)
    return smallest(least)


@compiled
def open_gates(gate: int, pitch: int, zero: Any) -> None:
    """Turn logarithms into gates."""
    for address in range(gate, gate + CHUNK * pitch, VECTOR_BYTES):
        store(address, exponential(load(address, zero)))


@compiled
def scale_rows(target: int, pitch: int, factor: Any, zero: Any) -> None:
    """target ← factor · target."""
    scale = splat(factor)
    for address in range(target, target + CHUNK * pitch, VECTOR_BYTES):
        store(address, multiply(load(address, zero), scale))


@compiled
def fill_rows(target: int, pitch: int, value: Any, zero: Any) -> None:
    """Put one number everywhere."""
    for address in range(target, target + CHUNK * pitch, VECTOR_BYTES):
        store(address, splat(value))


@compiled
def score(buffers: Buffers, x: Rows, w: Rows, tall: int, zero: Any) -> None:
    """P = x·wᵀ, zero above the diagonal."""
    size = item_size(zero)
    pitch, side = CHUNK * size, lanes(zero)
    for token in range(0, CHUNK, side):
        for column in range(0, tall // size, side):
            transpose_square(
                w.address + token * w.stride + column * size,
                w.stride,
                buffers.w_columns + column * pitch + token * size,
                pitch,
                zero,
            )
    for row in range(0, CHUNK, TILE_ROWS):
        multiply_scores(
            buffers.scores + row * pitch, pitch,
            x.address + row * x.stride, x.stride, size, buffers.w_columns, pitch, tall // size, row, zero,
        )  # fmt: skip


@compiled
def set_own_apart(buffers: Buffers, zero: Any) -> None:
    """Move the scores' diagonal, each token's own score, to ``own``."""
    size = item_size(zero)
    for token in range(CHUNK):
        diagonal = buffers.scores + token * (CHUNK + 1) * size
        store_scalar(buffers.own + token * size, load_scalar(diagonal, zero))
        store_scalar(diagonal, zero)


@compiled
def write_rows(source: Rows, count: int, width: int, target: Rows, accumulate: bool, zero: Any) -> None:
    """Copy the results of a chunk out, or add them to what is there."""
    size = item_size(zero)
    whole = width // lanes(zero) * VECTOR_BYTES
    for i in range(count):
        row, there = source.address + i * source.stride, target.address + i * target.stride
        for offset in range(0, whole, VECTOR_BYTES):
            value = load(row + offset, zero)
            store(there + offset, add(load(there + offset, zero), value) if accumulate else value)
        for offset in range(whole, width * size, size):
            number = load_scalar(row + offset, zero)
            store_scalar(there + offset, load_scalar(there + offset, zero) + number if accumulate else number)


@compiled
def write_gated_rows(
    buffers: Buffers,
    wide: int,
    count: int,
    width: int,
    target: Rows,
    accumulate: bool,
    factor: Rows,
    terms: Rows,
    sign: Any,
    add_terms: bool,
    zero: Any,
) -> None:
    """Give the results of lane gates their E, and what every token reads of its own writing.

    Without the latter, sign · factor ⊙ results are the ``terms`` of the gate's gradient.
    """
    size = item_size(zero)
    whole = width // lanes(zero) * VECTOR_BYTES
    signs = splat(sign)
    for i in range(count):
        own = load_scalar(buffers.own + i * size, zero)
        owns = splat(own)
        out, product, y = buffers.out + i * wide, buffers.product + i * wide, buffers.y + i * wide
        there, factors, gradient = (
            target.address + i * target.stride,
            factor.address + i * factor.stride,
            terms.address + i * terms.stride,
        )
        for offset in range(0, whole, VECTOR_BYTES):
            gates, others = load(product + offset, zero), load(out + offset, zero)
            term = multiply(multiply(multiply(others, gates), signs), load(factors + offset, zero))
            store(gradient + offset, add(load(gradient + offset, zero), term) if add_terms else term)
            value = multiply(multiply_add(owns, load(y + offset, zero), others), gates)
            store(there + offset, add(load(there + offset, zero), value) if accumulate else value)
        for offset in range(whole, width * size, size):
            gate, other = load_scalar(product + offset, zero), load_scalar(out + offset, zero)
            single = other * gate * sign * load_scalar(factors + offset, zero)
            store_scalar(gradient + offset, load_scalar(gradient + offset, zero) + single if add_terms else single)
            number = (own * load_scalar(y + offset, zero) + other) * gate
            store_scalar(there + offset, load_scalar(there + offset, zero) + number if accumulate else number)

"""The scratch memory of one worker: the state of a scan, and the rows of a chunk.

The state lies there as strips of columns, as wide as a tile, one after the other; so a strip is one piece of memory,
and stays in the fastest cache while it is used. All else is rows. Padding to whole registers and tiles holds zeros.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from numba import njit

from headgate.ops.native.tiles import CHUNK
from headgate.ops.native.vectors import (
    TILE_ROWS,
    TILE_VECTORS,
    VECTOR_BYTES,
    add,
    item_size,
    lanes,
    load,
    load_scalar,
    multiply_add,
    splat,
    store,
    store_scalar,
)

__all__ = [
    "STRIP",
    "Buffers",
    "Rows",
    "add_spare",
    "clear_state",
    "compiled",
    "compiled_height",
    "compiled_width",
    "fill_state",
    "make_buffers",
    "overlap",
    "padded_height",
    "padded_width",
    "read_rows",
    "set_aside",
    "store_state",
]

STRIP = TILE_VECTORS * VECTOR_BYTES
"""Bytes of a row within one strip of the state."""

compiled = njit(nogil=True, error_model="numpy", boundscheck=False)


class Rows(NamedTuple):
    """One row of numbers for every visited token: where the first one starts, and the bytes from one to the next."""

    address: int
    stride: int


class Buffers(NamedTuple):
    """Addresses in the scratch memory of one worker."""

    state: int  # [strips, height, STRIP]
    x: int  # [CHUNK, height]
    w: int  # [CHUNK, height]
    w_columns: int  # [height, CHUNK]
    y: int  # [CHUNK, width]
    gate: int  # [CHUNK, max(height, width)]: the gates of single tokens
    product: int  # [CHUNK, max(height, width)]: their products since the chunk began
    total: int  # [max(height, width)]: the product over the whole chunk
    scores: int  # [CHUNK, CHUNK]
    own: int  # [CHUNK]: the scores' diagonal
    out: int  # [CHUNK, width]
    spare: int  # [height, width]: another state, in rows
    terms: int  # [CHUNK, width]: terms of the gates' gradient


def padded_height(height: int, lane_count: int) -> int:
    """Rows of the state, in whole tiles and registers."""
    step = max(TILE_ROWS, lane_count)
    return (height + step - 1) // step * step


def padded_width(width: int, lane_count: int) -> int:
    """Columns of the state, in whole tiles."""
    step = TILE_VECTORS * lane_count
    return (width + step - 1) // step * step


compiled_height = compiled(padded_height)
compiled_width = compiled(padded_width)


@compiled
def make_buffers(base: int, height: int, width: int, zero: Any) -> Buffers:
    """Lay the buffers out from ``base``, every one starting with a whole register."""
    size = item_size(zero)
    tall, wide = compiled_height(height, lanes(zero)) * size, compiled_width(width, lanes(zero)) * size
    longest = max(tall, wide)
    state = base
    x = state + tall // size * wide
    w = x + CHUNK * tall
    w_columns = w + CHUNK * tall
    y = w_columns + CHUNK * tall
    gate = y + CHUNK * wide
    product = gate + CHUNK * longest
    total = product + CHUNK * longest
    scores = total + longest
    own = scores + CHUNK * CHUNK * size
    out = own + CHUNK * size
    spare = out + CHUNK * wide
    terms = spare + tall // size * wide
    return Buffers(state, x, w, w_columns, y, gate, product, total, scores, own, out, spare, terms)


@compiled
def read_rows(rows: Rows, count: int, width: int, target: int, pitch: int, zero: Any) -> Rows:
    """Copy ``count`` rows into a padded buffer of ``CHUNK`` rows; everything else in it becomes zero."""
    size = item_size(zero)
    whole = width // lanes(zero) * VECTOR_BYTES
    nothing = splat(zero)
    for i in range(count):
        source, row = rows.address + i * rows.stride, target + i * pitch
        for offset in range(0, whole, VECTOR_BYTES):
            store(row + offset, load(source + offset, zero))
        for offset in range(whole, pitch, VECTOR_BYTES):
            store(row + offset, nothing)
        for offset in range(whole, width * size, size):
            store_scalar(row + offset, load_scalar(source + offset, zero))
    for address in range(target + count * pitch, target + CHUNK * pitch, VECTOR_BYTES):
        store(address, nothing)
    return Rows(target, pitch)


# --- the state -------------------------------------------------------------------------------------------------------


@compiled
def _column(buffers: Buffers, height: int, offset: int, zero: Any) -> int:
    """Where the column at ``offset`` bytes of a row of the state starts."""
    strip = compiled_height(height, lanes(zero)) * STRIP
    return buffers.state + offset // STRIP * strip + offset % STRIP


@compiled
def clear_state(buffers: Buffers, height: int, width: int, zero: Any) -> None:
    """Set the state, padding included, to zero."""
    nothing = splat(zero)
    tall, wide = compiled_height(height, lanes(zero)), compiled_width(width, lanes(zero)) * item_size(zero)
    for address in range(buffers.state, buffers.state + tall * wide, VECTOR_BYTES):
        store(address, nothing)


@compiled
def fill_state(buffers: Buffers, height: int, width: int, source: int, row: int, column: int, zero: Any) -> None:
    """Read the state from ``source``, with the given bytes from row to row and from column to column; 0 means zeros."""
    clear_state(buffers, height, width, zero)
    if source:
        for j in range(width):
            start = _column(buffers, height, j * item_size(zero), zero)
            for i in range(height):
                store_scalar(start + i * STRIP, load_scalar(source + i * row + j * column, zero))


@compiled
def store_state(buffers: Buffers, height: int, width: int, target: int, row: int, zero: Any) -> None:
    """Write the state to ``target``, with the given bytes from row to row; nothing if that is 0."""
    if target:
        size = item_size(zero)
        whole = width // lanes(zero) * VECTOR_BYTES
        for offset in range(0, whole, VECTOR_BYTES):
            start = _column(buffers, height, offset, zero)
            for i in range(height):
                store(target + i * row + offset, load(start + i * STRIP, zero))
        for offset in range(whole, width * size, size):
            start = _column(buffers, height, offset, zero)
            for i in range(height):
                store_scalar(target + i * row + offset, load_scalar(start + i * STRIP, zero))


@compiled
def set_aside(buffers: Buffers, height: int, width: int, zero: Any) -> None:
    """Copy the state to the spare one."""
    wide = compiled_width(width, lanes(zero)) * item_size(zero)
    for offset in range(0, wide, VECTOR_BYTES):
        start = _column(buffers, height, offset, zero)
        for i in range(height):
            store(buffers.spare + i * wide + offset, load(start + i * STRIP, zero))


@compiled
def add_spare(buffers: Buffers, height: int, width: int, zero: Any) -> None:
    """Add the spare state to the state."""
    wide = compiled_width(width, lanes(zero)) * item_size(zero)
    for offset in range(0, wide, VECTOR_BYTES):
        start = _column(buffers, height, offset, zero)
        for i in range(height):
            sum_ = add(load(start + i * STRIP, zero), load(buffers.spare + i * wide + offset, zero))
            store(start + i * STRIP, sum_)


@compiled
def overlap(buffers: Buffers, height: int, width: int, other: int, row: int, target: int, zero: Any) -> None:
    """Put Σ_rows S ⊙ other, per column, into ``target``; zeros if ``other`` is 0. ``target`` may be a row of ``other``."""
    size = item_size(zero)
    whole = width // lanes(zero) * VECTOR_BYTES
    wide = compiled_width(width, lanes(zero)) * size
    rows = height if other else 0
    for offset in range(0, whole, VECTOR_BYTES):
        start, sums = _column(buffers, height, offset, zero), splat(zero)
        for i in range(rows):
            sums = multiply_add(load(start + i * STRIP, zero), load(other + i * row + offset, zero), sums)
        store(target + offset, sums)
    for offset in range(whole, wide, size):
        start, sum_ = _column(buffers, height, offset, zero), zero
        if offset < width * size:
            for i in range(rows):
                sum_ += load_scalar(start + i * STRIP, zero) * load_scalar(other + i * row + offset, zero)
        store_scalar(target + offset, sum_)

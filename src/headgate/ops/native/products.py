r"""Linear maps of tokens that lie across the lanes of registers.

A block holds some tokens as ``[channels, pitch]``: a register holds one channel of as many tokens as it has lanes. In
this order a linear map :math:`W x` reads the weights as they are stored, number by number, and the tokens register by
register; nothing has to be packed for it, and norms and gates need no sums across lanes. Addresses and strides are in
bytes; lanes beyond the tokens hold zeros.
"""

from __future__ import annotations

from typing import Any

from numba import njit

from headgate.ops.native.tiles import multiply_lane, multiply_tile, transpose_square
from headgate.ops.native.vectors import (
    TILE_ROWS,
    TILE_VECTORS,
    VECTOR_BYTES,
    add,
    item_size,
    lanes,
    load,
    splat,
    store,
)

__all__ = ["add_rows", "linear", "read_tokens", "write_tokens"]

_compiled = njit(nogil=True, error_model="numpy")


@_compiled
def read_tokens(
    source: int, source_row: int, count: int, channels: int, block: int, pitch: int, spare: int, zero: Any
) -> None:
    """Lay ``count`` tokens across the lanes; ``spare`` holds ``lanes`` tokens, and channels fill whole registers."""
    size, width = item_size(zero), lanes(zero)
    length = channels * size
    for first in range(0, count, width):
        address, row = source + first * source_row, source_row
        if first + width > count:
            for token in range(width):
                for offset in range(0, length, VECTOR_BYTES):
                    there = first + token < count
                    value = load(address + token * row + offset, zero) if there else splat(zero)
                    store(spare + token * length + offset, value)
            address, row = spare, length
        for channel in range(0, channels, width):
            transpose_square(address + channel * size, row, block + channel * pitch + first * size, pitch, zero)


@_compiled
def write_tokens(
    block: int, pitch: int, channels: int, target: int, target_row: int, count: int, spare: int, zero: Any
) -> None:
    """The reverse of :func:`read_tokens`."""
    size, width = item_size(zero), lanes(zero)
    length = channels * size
    for first in range(0, count, width):
        address, row = target + first * target_row, target_row
        whole = first + width <= count
        for channel in range(0, channels, width):
            source = block + channel * pitch + first * size
            if whole:
                transpose_square(source, pitch, address + channel * size, row, zero)
            else:
                transpose_square(source, pitch, spare + channel * size, length, zero)
        if not whole:
            for token in range(count - first):
                for offset in range(0, length, VECTOR_BYTES):
                    store(address + token * row + offset, load(spare + token * length + offset, zero))


@_compiled
def linear(weight: int, weight_row: int, rows: int, depth: int, block: int, out: int, pitch: int, zero: Any) -> None:
    """out = W x with the weights ``[rows, depth]``; ``rows`` is a multiple of ``TILE_ROWS``."""
    size, wide = item_size(zero), TILE_VECTORS * VECTOR_BYTES
    even = pitch // wide * wide
    for row in range(0, rows, TILE_ROWS):
        a, c = weight + row * weight_row, out + row * pitch
        for column in range(0, even, wide):
            multiply_tile(c + column, pitch, a, weight_row, size, block + column, pitch, depth, 0, 0, 0, 0, 0, 0, zero)
        if even < pitch:
            multiply_lane(c + even, pitch, a, weight_row, size, block + even, pitch, depth, 0, 0, 0, 0, 0, 0, zero)


@_compiled
def add_rows(addend: int, block: int, channels: int, pitch: int, zero: Any) -> None:
    """block += addend."""
    for offset in range(0, channels * pitch, VECTOR_BYTES):
        store(block + offset, add(load(block + offset, zero), load(addend + offset, zero)))

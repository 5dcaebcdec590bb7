"""What the kernels of gated linear attention are put together from: places in memory, tiles, gates and products.

Offsets along tokens, chunks and sequences are counted in 64 bits. Log-gates come to base 2, and never below -1e4 to base e.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = [
    "fade_to_end",
    "jit",
    "keys_before_block",
    "load_gate_row",
    "load_gates",
    "load_row",
    "load_scores",
    "load_state",
    "load_tile",
    "locate_chunk",
    "locate_sequence",
    "locate_state",
    "multiply",
    "store_tile",
]

jit = triton.jit(do_not_specialize=("length", "chunks", "all_chunks", "sequences", "tokens"))
"""Another batch size or length takes the kernel that is compiled already."""

LOG2_E = tl.constexpr(1.4426950408889634)
LOWEST_LOG_GATE = tl.constexpr(-1e4)
"""Gates below count as this one; it keeps -inf out of the sums."""


@jit
def locate_state(
    sequences: tl.tensor,
    heads: tl.tensor,
    key_dim: tl.tensor,
    value_dim: tl.tensor,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
) -> tuple[tl.tensor, ...]:
    """Which direction, sequence, head, key channels and value channels this program walks with."""
    key_blocks = tl.cdiv(key_dim, BLOCK_K)
    value_blocks = tl.cdiv(value_dim, BLOCK_V)
    index = tl.program_id(0)
    columns = index % value_blocks * BLOCK_V + tl.arange(0, BLOCK_V)
    index //= value_blocks
    channels = index % key_blocks * BLOCK_K + tl.arange(0, BLOCK_K)
    index //= key_blocks
    head = index % heads
    index //= heads
    return index // sequences, index % sequences, head, channels, columns


@jit
def locate_sequence(
    sequence: tl.tensor, table: tl.tensor, length: tl.tensor, chunks: tl.tensor
) -> tuple[tl.tensor, ...]:
    """The batch row of a sequence, its first token, how many it has, and its first chunk."""
    if table is None:
        row = sequence.to(tl.int64)
        return row, row * 0, row * 0 + length, row * chunks
    else:
        table += sequence * 3
        first = tl.load(table)
        return first * 0, first, tl.load(table + 1), tl.load(table + 2)


@jit
def locate_chunk(
    chunk: tl.tensor, table: tl.tensor, length: tl.tensor, chunks: tl.tensor, CHUNK: tl.constexpr
) -> tuple[tl.tensor, ...]:
    """The batch row of a chunk, its first token, and how many it has."""
    if table is None:
        row = (chunk // chunks).to(tl.int64)
        first = (chunk % chunks).to(tl.int64) * CHUNK
        return row, first, tl.minimum(length - first, CHUNK)
    else:
        first = tl.load(table + chunk * 2)
        return first * 0, first, tl.load(table + chunk * 2 + 1)


@jit
def load_tile(
    pointer: tl.tensor, tokens: tl.tensor, stride: tl.tensor, channels: tl.tensor, dim: tl.tensor, valid: tl.tensor
) -> tl.tensor:
    """``(tokens, channels)``, zero where a token is not valid or a channel does not exist."""
    mask = valid[:, None] & (channels < dim)[None, :]
    return tl.load(pointer + tokens[:, None] * stride + channels[None, :], mask=mask, other=0.0)


@jit
def load_gates(
    pointer: tl.tensor,
    tokens: tl.tensor,
    stride: tl.tensor,
    channels: tl.tensor,
    dim: tl.tensor,
    valid: tl.tensor,
    WIDE: tl.constexpr,
) -> tl.tensor:
    """Log-gates to base 2, ``(tokens, channels)``, zero where there is none."""
    gates = load_tile(pointer, tokens, stride, channels, dim, valid).to(WIDE)
    return tl.where(gates < LOWEST_LOG_GATE, LOWEST_LOG_GATE, gates) * LOG2_E


@jit
def load_row(pointer: tl.tensor, token: tl.tensor, stride: tl.tensor, channels: tl.tensor, dim: tl.tensor) -> tl.tensor:
    """``(channels,)`` of one token, zero where a channel does not exist."""
    return tl.load(pointer + token * stride + channels, mask=channels < dim, other=0.0)


@jit
def load_gate_row(
    pointer: tl.tensor, token: tl.tensor, stride: tl.tensor, channels: tl.tensor, dim: tl.tensor, WIDE: tl.constexpr
) -> tl.tensor:
    """Log-gates to base 2 of one token, ``(channels,)``."""
    gates = tl.load(pointer + token * stride + channels, mask=channels < dim, other=0.0).to(WIDE)
    return tl.where(gates < LOWEST_LOG_GATE, LOWEST_LOG_GATE, gates) * LOG2_E


@jit
def load_state(
    state: tl.tensor, channels: tl.tensor, columns: tl.tensor, key_dim: tl.tensor, value_dim: tl.tensor
) -> tl.tensor:
    """``(channels, columns)`` of a state."""
    mask = (channels < key_dim)[:, None] & (columns < value_dim)[None, :]
    return tl.load(state + channels[:, None] * value_dim + columns[None, :], mask=mask, other=0.0)


@jit
def load_scores(
    scores: tl.tensor, chunk: tl.tensor, head: tl.tensor, heads: tl.tensor, size: tl.tensor, CHUNK: tl.constexpr
) -> tl.tensor:
    """The matrix of a chunk and head, zero in the rows of tokens that do not exist."""
    rows = tl.arange(0, CHUNK)
    place = scores + (chunk.to(tl.int64) * heads + head) * CHUNK * CHUNK
    return tl.load(place + rows[:, None] * CHUNK + rows[None, :], mask=(rows < size)[:, None], other=0.0)


@jit
def store_tile(
    pointer: tl.tensor,
    first: tl.tensor,
    head: tl.tensor,
    heads: tl.tensor,
    channels: tl.tensor,
    dim: tl.tensor,
    size: tl.tensor,
    tile: tl.tensor,
    CHUNK: tl.constexpr,
) -> None:
    """Write the first ``size`` rows of a tile to a contiguous ``(tokens, heads, dim)``."""
    rows = tl.arange(0, CHUNK)
    place = pointer + ((first + rows) * heads + head)[:, None] * dim + channels[None, :]
    mask = (rows < size)[:, None] & (channels < dim)[None, :]
    tl.store(place, tile.to(pointer.dtype.element_ty), mask=mask)


@jit
def multiply(
    a: tl.tensor, b: tl.tensor, result: tl.tensor, ROUND: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr
) -> tl.tensor:
    """``result + a @ b`` with rounded operands."""
    return tl.dot(a.to(ROUND).to(DOT), b.to(ROUND).to(DOT), result, input_precision=PRECISION, out_dtype=result.dtype)


@jit
def keys_before_block(
    k: tl.tensor,
    gates: tl.tensor,
    first: tl.tensor,
    base: tl.tensor,
    size: tl.tensor,
    columns: tl.tensor,
    channels: tl.tensor,
    key_dim: tl.tensor,
    k_token: tl.tensor,
    g_token: tl.tensor,
    BACKWARD: tl.constexpr,
    SUBCHUNK: tl.constexpr,
    WIDE: tl.constexpr,
) -> tl.tensor:
    """The chunk's keys that a scan visits before a block of rows, faded up to the block's border; zero for all others."""
    if BACKWARD:
        earlier = (columns >= base + SUBCHUNK) & (columns < size)
        neighbours = columns - 1
        between = (neighbours >= base + SUBCHUNK) & (columns < size)
    else:
        earlier = columns < base
        neighbours = columns + 1
        between = neighbours < base
    fade = load_gates(gates, first + neighbours, g_token, channels, key_dim, between, WIDE)
    keys = load_tile(k, first + columns, k_token, channels, key_dim, earlier).to(WIDE)
    return keys * tl.exp2(tl.cumsum(fade, axis=0, reverse=not BACKWARD))


@jit
def fade_to_end(
    gates: tl.tensor,
    first: tl.tensor,
    size: tl.tensor,
    channels: tl.tensor,
    key_dim: tl.tensor,
    g_token: tl.tensor,
    BACKWARD: tl.constexpr,
    CHUNK: tl.constexpr,
    WIDE: tl.constexpr,
) -> tl.tensor:
    """Sums of the log-gates of the tokens that a scan visits after each token of the chunk."""
    rows = tl.arange(0, CHUNK)
    if BACKWARD:
        neighbours = rows - 1
        valid = (neighbours >= 0) & (rows < size)
    else:
        neighbours = rows + 1
        valid = neighbours < size
    fade = load_gates(gates, first + neighbours, g_token, channels, key_dim, valid, WIDE)
    return tl.cumsum(fade, axis=0, reverse=not BACKWARD)

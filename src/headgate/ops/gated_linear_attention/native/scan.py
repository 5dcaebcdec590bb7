r"""One scan of one head, sixteen tokens at a time, with the state in fast memory.

All that gated linear attention needs, forwards and backwards, are scans of one form: tokens write :math:`w^\top y` into
a state and read it with x, and the state fades along its rows or along its columns ("lanes"):

.. math:: S_t = \mathrm{fade}_t(S_{t-1}) + w_t^\top y_t, \qquad \mathrm{out}_t = x_t S_t

=====================  =====  =====  =====  =========  =========
scan                   x      w      y      out        fades
=====================  =====  =====  =====  =========  =========
outputs                q      k      v      o          rows
gradient of q          do     v      k      dq         lanes
gradient of k          v      do     q      dk         lanes
gradient of v          k      q      do     dv         rows
=====================  =====  =====  =====  =========  =========

The last two run against the time, and there the state fades after it was read (by the gate of the token just read).
With :math:`E_t` the product of the gates since the start of the chunk, a chunk is three small matrix products
(arXiv 2312.06635, section 4.2): scores :math:`P = (x E)(w / E)^\top` below the diagonal, outputs
:math:`(x E) S + P y`, and the new state :math:`E_{16} (S + (w / E)^\top y)`. Where a chunk fades so much that 1/E would
lose accuracy, the same tile of the state is instead updated token by token: the definition itself.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from headgate.ops.gated_linear_attention.native.buffers import (
    STRIP,
    Buffers,
    Rows,
    compiled,
    compiled_height,
    compiled_width,
    read_rows,
)
from headgate.ops.gated_linear_attention.native.chunk import (
    fill_rows,
    gate_lanes,
    gate_rows,
    open_gates,
    scale_rows,
    score,
    set_own_apart,
    write_gated_rows,
    write_rows,
)
from headgate.ops.native.tiles import (
    CHUNK,
    add_tile,
    multiply_tile,
    recur_lanes,
    recur_lanes_after,
    recur_rows,
    recur_rows_after,
    update_lanes,
    update_rows,
)
from headgate.ops.native.vectors import TILE_ROWS, cast, item_size, lanes, prefetch

__all__ = ["scan"]

WEAKEST = -25.3
"""A chunk whose log gates sum up to less in some channel is updated token by token; 1/E would lose accuracy."""


class Sizes(NamedTuple):
    """Of the state and of the rows beside it."""

    height: int
    width: int
    tall: int
    """Bytes of a padded row of x or w."""
    wide: int
    """Bytes of a padded row of y or out."""


class Chunk(NamedTuple):
    """The rows that a scan reads and writes, from the first token of a chunk on."""

    x: Rows
    w: Rows
    y: Rows
    gate: Rows
    out: Rows
    factor: Rows
    terms: Rows
    tokens: int
    """How many there are in the chunk."""


@compiled
def scan(
    buffers: Buffers,
    height: int,
    width: int,
    tokens: int,
    x: Rows,
    w: Rows,
    y: Rows,
    gate: Rows,
    out: Rows,
    x_scale: Any,
    w_scale: Any,
    lane_gates: bool,
    after: bool,
    accumulate: bool,
    factor: Rows,
    terms: Rows,
    sign: Any,
    add_terms: bool,
    zero: Any,
) -> None:
    """Scan ``tokens`` tokens, starting from and leaving behind the state in ``buffers``.

    Args:
        buffers: scratch memory with the state.
        height: numbers in a row of x and w.
        width: numbers in a row of y and out.
        tokens: how many rows are visited.
        x: what reads the state.
        w: the rows' side of what is written.
        y: the columns' side of what is written.
        gate: logarithms of the gates, ``height`` numbers per token, or ``width`` if ``lane_gates``.
        out: the results.
        x_scale: factor on x.
        w_scale: factor on w.
        lane_gates: whether the state fades along its columns, which makes it a scan for gradients of keys or queries.
        after: whether the state fades after it was read.
        accumulate: whether the results are added to what is in ``out``.
        factor: with ``lane_gates``, multiplied with the results less each token's own share to give ``terms``.
        terms: where that goes.
        sign: factor on ``terms``.
        add_terms: whether they are added to what is there.
        zero: 0 in the type of the computation.
    """
    size = item_size(zero)
    tall, wide = compiled_height(height, lanes(zero)) * size, compiled_width(width, lanes(zero)) * size
    sizes = Sizes(height, width, tall, wide)
    for first in range(0, tokens, CHUNK):
        count = min(CHUNK, tokens - first)
        chunk = Chunk(
            _from(x, first), _from(w, first), _from(y, first), _from(gate, first), _from(out, first),
            _from(factor, first), _from(terms, first), count,
        )  # fmt: skip
        if lane_gates:
            _lane_chunk(buffers, sizes, chunk, x_scale, w_scale, after, zero)
            write_gated_rows(
                buffers, wide, count, width, chunk.out, accumulate, chunk.factor, chunk.terms, sign, add_terms, zero
            )  # fmt: skip
        else:
            _row_chunk(buffers, sizes, chunk, x_scale, w_scale, after, accumulate, zero)


@compiled
def _from(rows: Rows, first: int) -> Rows:
    return Rows(rows.address + first * rows.stride, rows.stride)


@compiled
def _whole_rows(rows: Rows, count: int, width: int, target: int, pitch: int, zero: Any) -> Rows:
    """The rows of a chunk where they are; a copy that is padded with zeros if they do not fill registers and chunk."""
    if count == CHUNK and width * item_size(zero) == pitch:
        return rows
    return read_rows(rows, count, width, target, pitch, zero)


@compiled
def _row_chunk(
    buffers: Buffers, sizes: Sizes, chunk: Chunk, x_scale: Any, w_scale: Any, after: bool, accumulate: bool, zero: Any
) -> None:
    """One chunk of a scan whose state fades along its rows."""
    height, width, tall, wide = sizes
    count = chunk.tokens
    x = _whole_rows(chunk.x, count, height, buffers.x, tall, zero)
    w = _whole_rows(chunk.w, count, height, buffers.w, tall, zero)
    y = _whole_rows(chunk.y, count, width, buffers.y, wide, zero)
    gate = _whole_rows(chunk.gate, count, height, buffers.gate, tall, zero)
    gated_x, gated_w, result = Rows(buffers.x, tall), Rows(buffers.w, tall), Rows(buffers.out, wide)
    if gate_rows(buffers, x, w, gate, tall, after, x_scale, w_scale, zero) > cast(WEAKEST, zero):
        score(buffers, gated_x, gated_w, tall, zero)
        if count == CHUNK and width * item_size(zero) == wide:
            _multiply_chunk(buffers, sizes, chunk, gated_x, y, chunk.out, False, accumulate, zero)
            return
        _multiply_chunk(buffers, sizes, chunk, gated_x, y, result, False, False, zero)
    else:
        read_rows(chunk.x, count, height, buffers.x, tall, zero)
        read_rows(chunk.w, count, height, buffers.w, tall, zero)
        opened = read_rows(chunk.gate, count, height, buffers.gate, tall, zero)
        scale_rows(buffers.x, tall, x_scale, zero)
        scale_rows(buffers.w, tall, w_scale, zero)
        open_gates(buffers.gate, tall, zero)
        _recur_chunk(buffers, sizes, chunk, gated_x, gated_w, y, opened, False, after, zero)
    write_rows(result, count, width, chunk.out, accumulate, zero)


@compiled
def _lane_chunk(
    buffers: Buffers, sizes: Sizes, chunk: Chunk, x_scale: Any, w_scale: Any, after: bool, zero: Any
) -> None:
    """One chunk of a scan whose state fades along its columns; the results, not yet gated, stay in ``buffers.out``."""
    height, width, tall, wide = sizes
    count = chunk.tokens
    x = _whole_rows(chunk.x, count, height, buffers.x, tall, zero)
    w = _whole_rows(chunk.w, count, height, buffers.w, tall, zero)
    y = _whole_rows(chunk.y, count, width, buffers.y, wide, zero)
    gate = _whole_rows(chunk.gate, count, width, buffers.gate, wide, zero)
    gated_y, result = Rows(buffers.y, wide), Rows(buffers.out, wide)
    mild = gate_lanes(buffers, y, gate, wide, after, x_scale, w_scale, zero) > cast(WEAKEST, zero)
    score(buffers, x, w, tall, zero)
    set_own_apart(buffers, zero)
    if mild:
        _multiply_chunk(buffers, sizes, chunk, x, gated_y, result, True, False, zero)
    else:
        read_rows(chunk.y, count, width, buffers.y, wide, zero)
        opened = read_rows(chunk.gate, count, width, buffers.gate, wide, zero)
        scale_rows(buffers.y, wide, w_scale, zero)
        open_gates(buffers.gate, wide, zero)
        fill_rows(buffers.product, wide, x_scale, zero)
        _recur_chunk(buffers, sizes, chunk, x, w, gated_y, opened, True, after, zero)


# --- the arithmetic of a chunk ---------------------------------------------------------------------------------------


@compiled
def _multiply_chunk(
    buffers: Buffers,
    sizes: Sizes,
    chunk: Chunk,
    x: Rows,
    y: Rows,
    out: Rows,
    lane_gates: bool,
    accumulate: bool,
    zero: Any,
) -> None:
    """Outputs and new state, one strip of columns after the other."""
    size = item_size(zero)
    height, pitch, count = sizes.tall // size, CHUNK * size, chunk.tokens
    for column in range(0, sizes.wide, STRIP):
        strip, written = buffers.state + column * height, y.address + column
        for row in range(0, CHUNK, TILE_ROWS):
            result = out.address + row * out.stride + column
            read, scores = x.address + row * x.stride, buffers.scores + row * pitch
            if accumulate:
                add_tile(
                    result, out.stride, read, x.stride, size, strip, STRIP, height,
                    scores, pitch, size, written, y.stride, row + TILE_ROWS, zero,
                )  # fmt: skip
            else:
                multiply_tile(
                    result, out.stride, read, x.stride, size, strip, STRIP, height,
                    scores, pitch, size, written, y.stride, row + TILE_ROWS, zero,
                )  # fmt: skip
        for row in range(0, height, TILE_ROWS):
            _look_ahead(chunk, sizes, column * height + row * STRIP, lane_gates, zero)
            tile, w = strip + row * STRIP, buffers.w_columns + row * pitch
            if lane_gates:
                update_lanes(tile, STRIP, w, pitch, size, written, y.stride, count, buffers.total + column, zero)
            else:
                update_rows(tile, STRIP, w, pitch, size, written, y.stride, count, buffers.total + row * size, zero)


@compiled
def _recur_chunk(
    buffers: Buffers,
    sizes: Sizes,
    chunk: Chunk,
    x: Rows,
    w: Rows,
    y: Rows,
    gate: Rows,
    lane_gates: bool,
    after: bool,
    zero: Any,
) -> None:
    """The same token by token, for gates that close within the chunk; the results go to ``buffers.out``."""
    size = item_size(zero)
    height, wide, count = sizes.tall // size, sizes.wide, chunk.tokens
    fill_rows(buffers.out, wide, zero, zero)
    for column in range(0, wide, STRIP):
        ys, out = y.address + column, buffers.out + column
        for row in range(0, height, TILE_ROWS):
            _look_ahead(chunk, sizes, column * height + row * STRIP, lane_gates, zero)
            tile = buffers.state + column * height + row * STRIP
            xs, ws, gates = x.address + row * size, w.address + row * size, gate.address
            if lane_gates:
                gates += column
                if after:
                    recur_lanes_after(
                        tile, STRIP, xs, x.stride, ws, w.stride, ys, y.stride, gates, gate.stride, out, wide, count, zero
                    )  # fmt: skip
                else:
                    recur_lanes(
                        tile, STRIP, xs, x.stride, ws, w.stride, ys, y.stride, gates, gate.stride, out, wide, count, zero
                    )  # fmt: skip
            else:
                gates += row * size
                if after:
                    recur_rows_after(
                        tile, STRIP, xs, x.stride, ws, w.stride, ys, y.stride, gates, gate.stride, out, wide, count, zero
                    )  # fmt: skip
                else:
                    recur_rows(
                        tile, STRIP, xs, x.stride, ws, w.stride, ys, y.stride, gates, gate.stride, out, wide, count, zero
                    )  # fmt: skip


@compiled
def _look_ahead(chunk: Chunk, sizes: Sizes, place: int, lane_gates: bool, zero: Any) -> None:
    """Ask for the share of the next chunk's rows that belongs to the tile at ``place`` bytes of the state.

    Asked for all at once they would block the memory's queue.
    """
    shares = sizes.wide // STRIP * (sizes.tall // item_size(zero) // TILE_ROWS)
    share = place // (TILE_ROWS * STRIP)
    for token in range(CHUNK + share * CHUNK // shares, CHUNK + (share + 1) * CHUNK // shares):
        _prefetch(chunk.x, token, sizes.tall)
        _prefetch(chunk.w, token, sizes.tall)
        _prefetch(chunk.y, token, sizes.wide)
        _prefetch(chunk.gate, token, sizes.wide if lane_gates else sizes.tall)
        _prefetch(chunk.out, token, sizes.wide)
        if lane_gates:
            _prefetch(chunk.factor, token, sizes.wide)
            _prefetch(chunk.terms, token, sizes.wide)


@compiled
def _prefetch(rows: Rows, token: int, length: int) -> None:
    for address in range(rows.address + token * rows.stride, rows.address + token * rows.stride + length, 64):
        prefetch(address)

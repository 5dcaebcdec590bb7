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

from numba import njit

from headgate.ops.native.tiles import (
    CHUNK,
    multiply_scores,
    multiply_tile,
    recur_lanes,
    recur_lanes_after,
    recur_rows,
    recur_rows_after,
    transpose_square,
    update_lanes,
    update_rows,
)
from headgate.ops.native.vectors import (
    TILE_ROWS,
    TILE_VECTORS,
    VECTOR_BYTES,
    add,
    cast,
    divide,
    exponential,
    item_size,
    lanes,
    load,
    load_scalar,
    minimum,
    multiply,
    multiply_add,
    prefetch,
    smallest,
    splat,
    store,
    store_scalar,
)

__all__ = [
    "Buffers",
    "Rows",
    "accumulate_gate",
    "accumulate_gate_from_start",
    "add_spare",
    "clear_state",
    "compiled",
    "fill_state",
    "make_buffers",
    "overlap",
    "padded_height",
    "padded_width",
    "scan",
    "set_aside",
    "store_state",
    "terms_rows",
]

WEAKEST = 1e-11
"""A chunk that leaves less than this of some channel is updated token by token."""

compiled = njit(nogil=True, error_model="numpy", boundscheck=False)


class Rows(NamedTuple):
    """One row of numbers for every visited token: where the first one starts, and the bytes from one to the next."""

    address: int
    stride: int


class Ahead(NamedTuple):
    """The rows that a scan reads and writes, and the first token of the chunk after the current one."""

    x: Rows
    w: Rows
    y: Rows
    gate: Rows
    out: Rows
    first: int


class Buffers(NamedTuple):
    """Addresses in the scratch memory of one worker; all rows are padded with zeros to whole registers and tiles."""

    state: int  # [height, width]
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
    spare: int  # [height, width]: another state
    terms: int  # [CHUNK, width]: terms of the gates' gradient


def padded_height(height: int, lane_count: int) -> int:
    """Rows of the state, in whole tiles and registers."""
    step = max(TILE_ROWS, lane_count)
    return (height + step - 1) // step * step


def padded_width(width: int, lane_count: int) -> int:
    """Columns of the state, in whole tiles."""
    step = TILE_VECTORS * lane_count
    return (width + step - 1) // step * step


_padded_height = compiled(padded_height)
_padded_width = compiled(padded_width)


@compiled
def make_buffers(base: int, height: int, width: int, zero: Any) -> Buffers:
    """Lay the buffers out from ``base``, every one starting with a whole register."""
    size = item_size(zero)
    tall, wide = _padded_height(height, lanes(zero)) * size, _padded_width(width, lanes(zero)) * size
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


# --- the state -------------------------------------------------------------------------------------------------------


@compiled
def clear_state(buffers: Buffers, height: int, width: int, zero: Any) -> None:
    """Set the state, padding included, to zero."""
    nothing = splat(zero)
    tall, wide = _padded_height(height, lanes(zero)), _padded_width(width, lanes(zero)) * item_size(zero)
    for address in range(buffers.state, buffers.state + tall * wide, VECTOR_BYTES):
        store(address, nothing)


@compiled
def fill_state(buffers: Buffers, height: int, width: int, source: int, row: int, column: int, zero: Any) -> None:
    """Read the state from ``source``, with the given bytes from row to row and from column to column; 0 means zeros."""
    clear_state(buffers, height, width, zero)
    if source:
        size, pitch = item_size(zero), _padded_width(width, lanes(zero)) * item_size(zero)
        for i in range(height):
            for j in range(width):
                store_scalar(buffers.state + i * pitch + j * size, load_scalar(source + i * row + j * column, zero))


@compiled
def store_state(buffers: Buffers, height: int, width: int, target: int, row: int, column: int, zero: Any) -> None:
    """Write the state to ``target``; nothing if that is 0."""
    if target:
        size, pitch = item_size(zero), _padded_width(width, lanes(zero)) * item_size(zero)
        for i in range(height):
            for j in range(width):
                store_scalar(target + i * row + j * column, load_scalar(buffers.state + i * pitch + j * size, zero))


@compiled
def set_aside(buffers: Buffers, height: int, width: int, zero: Any) -> None:
    """Copy the state to the spare one."""
    tall, wide = _padded_height(height, lanes(zero)), _padded_width(width, lanes(zero)) * item_size(zero)
    for offset in range(0, tall * wide, VECTOR_BYTES):
        store(buffers.spare + offset, load(buffers.state + offset, zero))


@compiled
def add_spare(buffers: Buffers, height: int, width: int, zero: Any) -> None:
    """Add the spare state to the state."""
    tall, wide = _padded_height(height, lanes(zero)), _padded_width(width, lanes(zero)) * item_size(zero)
    for offset in range(0, tall * wide, VECTOR_BYTES):
        store(buffers.state + offset, add(load(buffers.state + offset, zero), load(buffers.spare + offset, zero)))


# --- steps of a chunk ------------------------------------------------------------------------------------------------


@compiled
def _read_rows(rows: Rows, first: int, count: int, width: int, target: int, pitch: int, zero: Any) -> None:
    """Copy ``count`` rows into a padded buffer of ``CHUNK`` rows; everything else in it becomes zero."""
    size = item_size(zero)
    whole = width // lanes(zero) * VECTOR_BYTES
    nothing = splat(zero)
    for i in range(count):
        source, row = rows.address + (first + i) * rows.stride, target + i * pitch
        for offset in range(0, whole, VECTOR_BYTES):
            store(row + offset, load(source + offset, zero))
        for offset in range(whole, pitch, VECTOR_BYTES):
            store(row + offset, nothing)
        for offset in range(whole, width * size, size):
            store_scalar(row + offset, load_scalar(source + offset, zero))
    for address in range(target + count * pitch, target + CHUNK * pitch, VECTOR_BYTES):
        store(address, nothing)


@compiled
def _multiply_gates(buffers: Buffers, pitch: int, after: bool, zero: Any) -> Any:
    """Exponentials of the sums of the log gates; the smallest one over the whole chunk.

    Products of rounded gates would drift away over thousands of tokens where all gates are alike.
    """
    nothing = splat(zero)
    least = splat(cast(1.0, zero))
    for column in range(0, pitch, VECTOR_BYTES):
        sum_, product = nothing, exponential(nothing)
        for row in range(column, column + CHUNK * pitch, pitch):
            if after:
                store(buffers.product + row, product)
            sum_ = add(sum_, load(buffers.gate + row, zero))
            product = exponential(sum_)
            if not after:
                store(buffers.product + row, product)
        store(buffers.total + column, product)
        least = minimum(product, least)
    return smallest(least)


@compiled
def _open_gates(buffers: Buffers, pitch: int, zero: Any) -> None:
    """Turn logarithms into gates."""
    for address in range(buffers.gate, buffers.gate + CHUNK * pitch, VECTOR_BYTES):
        store(address, exponential(load(address, zero)))


@compiled
def _scale_rows(target: int, pitch: int, factor: Any, zero: Any) -> None:
    if factor != cast(1.0, zero):
        scale = splat(factor)
        for address in range(target, target + CHUNK * pitch, VECTOR_BYTES):
            store(address, multiply(load(address, zero), scale))


@compiled
def _gate_rows(buffers: Buffers, pitch: int, x_scale: Any, w_scale: Any, zero: Any) -> None:
    """x ← x·E and w ← w/E."""
    x_factor, w_factor = splat(x_scale), splat(w_scale)
    for offset in range(0, CHUNK * pitch, VECTOR_BYTES):
        product = load(buffers.product + offset, zero)
        store(buffers.x + offset, multiply(load(buffers.x + offset, zero), multiply(product, x_factor)))
        store(buffers.w + offset, multiply(load(buffers.w + offset, zero), divide(w_factor, product)))


@compiled
def _gate_lanes(buffers: Buffers, pitch: int, zero: Any) -> None:
    """y ← y/E."""
    for offset in range(0, CHUNK * pitch, VECTOR_BYTES):
        store(buffers.y + offset, divide(load(buffers.y + offset, zero), load(buffers.product + offset, zero)))


@compiled
def _score(buffers: Buffers, tall: int, set_apart: bool, zero: Any) -> None:
    """P = x·wᵀ, zero above the diagonal; the diagonal, each token's own score, is ``set_apart`` on demand."""
    size = item_size(zero)
    pitch, side = CHUNK * size, lanes(zero)
    for token in range(0, CHUNK, side):
        for column in range(0, tall // size, side):
            transpose_square(
                buffers.w + token * tall + column * size,
                tall,
                buffers.w_columns + column * pitch + token * size,
                pitch,
                zero,
            )
    for row in range(0, CHUNK, TILE_ROWS):
        multiply_scores(
            buffers.scores + row * pitch, pitch,
            buffers.x + row * tall, tall, size, buffers.w_columns, pitch, tall // size,
            buffers.x, 0, 0, buffers.w_columns, 0, 0, zero,
        )  # fmt: skip
    for row in range(CHUNK):
        diagonal = buffers.scores + row * pitch + row * size
        if set_apart:
            store_scalar(buffers.own + row * size, load_scalar(diagonal, zero))
            store_scalar(diagonal, zero)
        for column in range(row + 1, CHUNK):
            store_scalar(buffers.scores + row * pitch + column * size, zero)


@compiled
def _add_own(buffers: Buffers, wide: int, count: int, gated: bool, zero: Any) -> None:
    """Add what every token reads of its own writing to its result; y is still divided by E where ``gated``."""
    size = item_size(zero)
    for i in range(count):
        own = splat(load_scalar(buffers.own + i * size, zero))
        for offset in range(i * wide, i * wide + wide, VECTOR_BYTES):
            y = load(buffers.y + offset, zero)
            if gated:
                y = multiply(y, load(buffers.product + offset, zero))
            store(buffers.out + offset, multiply_add(own, y, load(buffers.out + offset, zero)))


@compiled
def _prefetch(rows: Rows, token: int, length: int) -> None:
    for address in range(rows.address + token * rows.stride, rows.address + token * rows.stride + length, 64):
        prefetch(address)


@compiled
def _look_ahead(ahead: Ahead, strip: int, strips: int, tall: int, wide: int, lane_gates: bool) -> None:
    """Ask for a share of the next chunk's rows; asked for all at once they would block the memory's queue."""
    for token in range(ahead.first + strip, ahead.first + CHUNK, strips):
        _prefetch(ahead.x, token, tall)
        _prefetch(ahead.w, token, tall)
        _prefetch(ahead.y, token, wide)
        _prefetch(ahead.gate, token, wide if lane_gates else tall)
        _prefetch(ahead.out, token, wide)


@compiled
def _multiply_chunk(
    buffers: Buffers, tall: int, wide: int, count: int, lane_gates: bool, ahead: Ahead, zero: Any
) -> None:
    """Outputs and new state, one strip of columns after the other, so that a strip of the state stays close."""
    size = item_size(zero)
    pitch = CHUNK * size
    strip = TILE_VECTORS * VECTOR_BYTES
    for column in range(0, wide, strip):
        _look_ahead(ahead, column // strip, wide // strip, tall, wide, lane_gates)
        for row in range(0, CHUNK, TILE_ROWS):
            multiply_tile(
                buffers.out + row * wide + column, wide,
                buffers.x + row * tall, tall, size, buffers.state + column, wide, tall // size,
                buffers.scores + row * pitch, pitch, size, buffers.y + column, wide, row + TILE_ROWS, zero,
            )  # fmt: skip
        for row in range(0, tall // size, TILE_ROWS):
            state = buffers.state + row * wide + column
            if lane_gates:
                update_lanes(
                    state, wide, buffers.w + row * size, size, tall, buffers.y + column, wide, count, buffers.total + column, zero
                )  # fmt: skip
            else:
                update_rows(
                    state, wide, buffers.w + row * size, size, tall, buffers.y + column, wide, count, buffers.total + row * size, zero
                )  # fmt: skip


@compiled
def _recur_chunk(
    buffers: Buffers, tall: int, wide: int, count: int, lane_gates: bool, after: bool, ahead: Ahead, zero: Any
) -> None:
    """The same token by token, for gates that close within the chunk."""
    size = item_size(zero)
    nothing = splat(zero)
    for address in range(buffers.out, buffers.out + CHUNK * wide, VECTOR_BYTES):
        store(address, nothing)
    strip = TILE_VECTORS * VECTOR_BYTES
    for column in range(0, wide, strip):
        _look_ahead(ahead, column // strip, wide // strip, tall, wide, lane_gates)
        y, out = buffers.y + column, buffers.out + column
        for row in range(0, tall // size, TILE_ROWS):
            state, x, w = buffers.state + row * wide + column, buffers.x + row * size, buffers.w + row * size
            if lane_gates:
                gate = buffers.gate + column
                if after:
                    recur_lanes_after(state, wide, x, tall, w, tall, y, wide, gate, wide, out, wide, count, zero)
                else:
                    recur_lanes(state, wide, x, tall, w, tall, y, wide, gate, wide, out, wide, count, zero)
            else:
                gate = buffers.gate + row * size
                if after:
                    recur_rows_after(state, wide, x, tall, w, tall, y, wide, gate, tall, out, wide, count, zero)
                else:
                    recur_rows(state, wide, x, tall, w, tall, y, wide, gate, tall, out, wide, count, zero)


@compiled
def _write_rows(
    source: int, pitch: int, count: int, width: int, rows: Rows, first: int, accumulate: bool, zero: Any
) -> None:
    """Copy the results of a chunk out, or add them to what is there."""
    size = item_size(zero)
    whole = width // lanes(zero) * VECTOR_BYTES
    for i in range(count):
        row, target = source + i * pitch, rows.address + (first + i) * rows.stride
        if accumulate:
            for offset in range(0, whole, VECTOR_BYTES):
                store(target + offset, add(load(target + offset, zero), load(row + offset, zero)))
            for offset in range(whole, width * size, size):
                store_scalar(target + offset, load_scalar(target + offset, zero) + load_scalar(row + offset, zero))
        else:
            for offset in range(0, whole, VECTOR_BYTES):
                store(target + offset, load(row + offset, zero))
            for offset in range(whole, width * size, size):
                store_scalar(target + offset, load_scalar(row + offset, zero))


@compiled
def _multiply_rows(
    source: int,
    pitch: int,
    count: int,
    width: int,
    factor: Rows,
    target: Rows,
    first: int,
    sign: Any,
    accumulate: bool,
    zero: Any,
) -> None:
    """target ← sign · factor ⊙ results, or added to what is there: the terms of the gate's gradient."""
    size = item_size(zero)
    whole = width // lanes(zero) * VECTOR_BYTES
    signs = splat(sign)
    for i in range(count):
        row = source + i * pitch
        factors, out = factor.address + (first + i) * factor.stride, target.address + (first + i) * target.stride
        for offset in range(0, whole, VECTOR_BYTES):
            term = multiply(multiply(load(row + offset, zero), signs), load(factors + offset, zero))
            store(out + offset, add(load(out + offset, zero), term) if accumulate else term)
        for offset in range(whole, width * size, size):
            number = load_scalar(row + offset, zero) * sign * load_scalar(factors + offset, zero)
            store_scalar(out + offset, load_scalar(out + offset, zero) + number if accumulate else number)


# --- the scan --------------------------------------------------------------------------------------------------------


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
    product: Rows,
    sign: Any,
    add_product: bool,
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
        factor: with ``lane_gates``, multiplied with the results less each token's own share to give ``product``.
        product: where that goes.
        sign: factor on ``product``.
        add_product: whether ``product`` is added to what is there.
        zero: 0 in the type of the computation.
    """
    size = item_size(zero)
    tall, wide = _padded_height(height, lanes(zero)) * size, _padded_width(width, lanes(zero)) * size
    gate_width, gate_pitch = (width, wide) if lane_gates else (height, tall)
    for first in range(0, tokens, CHUNK):
        count = min(CHUNK, tokens - first)
        ahead = Ahead(x, w, y, gate, out, first + CHUNK)
        _read_rows(x, first, count, height, buffers.x, tall, zero)
        _read_rows(w, first, count, height, buffers.w, tall, zero)
        _read_rows(y, first, count, width, buffers.y, wide, zero)
        _read_rows(gate, first, count, gate_width, buffers.gate, gate_pitch, zero)
        mild = _multiply_gates(buffers, gate_pitch, after, zero) > WEAKEST
        if lane_gates or not mild:
            _scale_rows(buffers.x, tall, x_scale, zero)
            _scale_rows(buffers.w, tall, w_scale, zero)
        elif mild:
            _gate_rows(buffers, tall, x_scale, w_scale, zero)
        if lane_gates or mild:
            _score(buffers, tall, lane_gates, zero)
        if mild:
            if lane_gates:
                _gate_lanes(buffers, wide, zero)
            _multiply_chunk(buffers, tall, wide, count, lane_gates, ahead, zero)
            if lane_gates:
                for offset in range(0, count * wide, VECTOR_BYTES):
                    gated = multiply(load(buffers.out + offset, zero), load(buffers.product + offset, zero))
                    store(buffers.out + offset, gated)
        else:
            _open_gates(buffers, gate_pitch, zero)
            _recur_chunk(buffers, tall, wide, count, lane_gates, after, ahead, zero)
        if lane_gates:
            _multiply_rows(buffers.out, wide, count, width, factor, product, first, sign, add_product, zero)
            _add_own(buffers, wide, count, mild, zero)
        _write_rows(buffers.out, wide, count, width, out, first, accumulate, zero)


@compiled
def overlap(
    buffers: Buffers, height: int, width: int, other: int, row: int, column: int, target: int, zero: Any
) -> None:
    """Put Σ_rows S ⊙ other, per column, into ``target``; zeros if ``other`` is 0. ``target`` may be a row of ``other``."""
    size = item_size(zero)
    wide = _padded_width(width, lanes(zero)) * size
    for j in range(wide // size):
        sum_ = zero
        if other and j < width:
            for i in range(height):
                mine = load_scalar(buffers.state + i * wide + j * size, zero)
                sum_ += mine * load_scalar(other + i * row + j * column, zero)
        store_scalar(target + j * size, sum_)


@compiled
def accumulate_gate(buffers: Buffers, width: int, tokens: int, terms: Rows, zero: Any) -> None:
    """Turn the terms of the gate's gradient into sums from each token to the last one, plus ``buffers.total``."""
    size = item_size(zero)
    whole = width // lanes(zero) * VECTOR_BYTES
    for offset in range(0, whole, VECTOR_BYTES):
        running = load(buffers.total + offset, zero)
        for token in range(tokens - 1, -1, -1):
            address = terms.address + token * terms.stride + offset
            running = add(running, load(address, zero))
            store(address, running)
    for offset in range(whole, width * size, size):
        last = load_scalar(buffers.total + offset, zero)
        for token in range(tokens - 1, -1, -1):
            address = terms.address + token * terms.stride + offset
            last += load_scalar(address, zero)
            store_scalar(address, last)


@compiled
def terms_rows(buffers: Buffers, width: int, zero: Any) -> Rows:
    """The rows of ``buffers.terms``."""
    return Rows(buffers.terms, _padded_width(width, lanes(zero)) * item_size(zero))


@compiled
def accumulate_gate_from_start(
    buffers: Buffers, width: int, tokens: int, terms: Rows, gradient: Rows, zero: Any
) -> None:
    """Add to each token's gradient the first row of ``buffers.spare`` and the terms of all tokens before it."""
    size = item_size(zero)
    whole = width // lanes(zero) * VECTOR_BYTES
    for offset in range(0, whole, VECTOR_BYTES):
        running = load(buffers.spare + offset, zero)
        for token in range(tokens):
            address = gradient.address + token * gradient.stride + offset
            store(address, add(running, load(address, zero)))
            running = add(running, load(terms.address + token * terms.stride + offset, zero))
    for offset in range(whole, width * size, size):
        so_far = load_scalar(buffers.spare + offset, zero)
        for token in range(tokens):
            address = gradient.address + token * gradient.stride + offset
            store_scalar(address, so_far + load_scalar(address, zero))
            so_far += load_scalar(terms.address + token * terms.stride + offset, zero)

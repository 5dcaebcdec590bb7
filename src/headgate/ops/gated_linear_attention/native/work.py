"""What a worker does with one item of a job: the scans of one head of one sequence, or of a block of its columns.

A job is a table of 64-bit integers; the constants below name its entries. Five numbers stand for every tensor: its
address, and its strides in bytes along sequences, tokens and heads (numbers of one row lie side by side).
"""

from __future__ import annotations

from typing import Any

from numba import njit

from headgate.ops.gated_linear_attention.native.buffers import (
    Rows,
    add_spare,
    clear_state,
    compiled,
    fill_state,
    make_buffers,
    overlap,
    set_aside,
    store_state,
)
from headgate.ops.gated_linear_attention.native.gate_gradient import (
    accumulate_gate,
    accumulate_gate_from_start,
    terms_rows,
)
from headgate.ops.gated_linear_attention.native.scan import scan
from headgate.ops.native.tiles import CHUNK
from headgate.ops.native.vectors import cast, fetch_add, item_size, load_int, load_scalar

__all__ = ["ENTRIES", "FIRST_TENSOR", "TENSORS", "work"]

ENTRIES = (
    "workers",  # how many have begun: counts up
    "next_item",  # counts up
    "items",
    "scratch",  # address
    "scratch_bytes",  # of one worker
    "is_backward",
    "sequences",  # address of a table: batch row, first token, length, blocks of time before this sequence
    "heads",
    "key_dim",
    "value_dim",
    "key_blocks",  # blocks of columns that a head is cut into
    "key_block",  # columns of one
    "value_blocks",
    "value_block",
    "directions",  # 1, or 2 for the bidirectional form
    "reverse",  # whether the first direction runs against the time
    "scale",  # a float64
    "time_block",  # tokens between two stored states in the backward pass
    "key_items",  # items that give the gradients of queries, keys and gates; the others give those of the values
    "states",  # address of the stored states: [blocks of time, heads, value_dim, key_dim]
)
TENSORS = (
    "q", "k", "v", "log_gate", "log_gate_backward", "o",
    "do", "dq", "dk", "dv", "dlog_gate", "dlog_gate_backward",
    "initial_state", "final_state", "dstate", "dinitial_state",
)  # fmt: skip
FIRST_TENSOR = len(ENTRIES)

# the same names as offsets in bytes
(
    _WORKERS, _NEXT, _ITEMS, _SCRATCH, _SCRATCH_BYTES, _IS_BACKWARD, _SEQUENCES, _HEADS, _KEY, _VALUE,
    _KEY_BLOCKS, _KEY_BLOCK, _VALUE_BLOCKS, _VALUE_BLOCK, _DIRECTIONS, _REVERSE, _SCALE, _TIME_BLOCK, _KEY_ITEMS, _STATES,
) = range(0, 8 * FIRST_TENSOR, 8)  # fmt: skip
(
    _Q, _K, _V, _GATE, _GATE2, _O, _DO, _DQ, _DK, _DV, _DGATE, _DGATE2, _INITIAL, _FINAL, _DSTATE, _DINITIAL,
) = range(8 * FIRST_TENSOR, 8 * FIRST_TENSOR + 32 * len(TENSORS), 32)  # fmt: skip


@compiled
def _rows(job: int, tensor: int, sequence: int, head: int, offset: int, backwards: bool) -> Rows:
    """The rows of one head of one sequence in the order of visiting, from ``offset`` bytes on."""
    table = load_int(job + _SEQUENCES) + 32 * sequence
    batch, start, length = load_int(table), load_int(table + 8), load_int(table + 16)
    stride = load_int(tensor + 16)
    address = load_int(tensor) + batch * load_int(tensor + 8) + head * load_int(tensor + 24) + offset
    if backwards:
        return Rows(address + (start + length - 1) * stride, -stride)
    return Rows(address + start * stride, stride)


@compiled
def _part(rows: Rows, first: int, count: int, backwards: bool) -> Rows:
    """``count`` rows from the one number ``first`` on, or the same ones from the last to the first."""
    if backwards:
        return Rows(rows.address + (first + count - 1) * rows.stride, -rows.stride)
    return Rows(rows.address + first * rows.stride, rows.stride)


@compiled
def _state(tensor: int, sequence: int, head: int, offset: int) -> int:
    """Address of the state of one head of one sequence; 0 if there is none."""
    address = load_int(tensor)
    return address + sequence * load_int(tensor + 8) + head * load_int(tensor + 24) + offset if address else 0


@compiled
def _value_scans(
    job: int, sequence: int, head: int, block: int, base: int, gradient: bool, scale: Any, zero: Any
) -> None:
    """Outputs and final state; or, as ``gradient``, dv and the gradient of the initial state.

    The latter is the former against the time, with keys and queries swapped.
    """
    size, height, columns = item_size(zero), load_int(job + _KEY), load_int(job + _VALUE)
    first = block * load_int(job + _VALUE_BLOCK)
    width, offset = min(load_int(job + _VALUE_BLOCK), columns - first), first * size
    length = load_int(load_int(job + _SEQUENCES) + 32 * sequence + 16)
    buffers = make_buffers(base, height, width, zero)
    one, nowhere, no = cast(1.0, zero), Rows(0, 0), job == 0
    read, written = (job + _K, job + _Q) if gradient else (job + _Q, job + _K)
    values, results = (job + _DO, job + _DV) if gradient else (job + _V, job + _O)
    before, behind = (job + _DSTATE, job + _DINITIAL) if gradient else (job + _INITIAL, job + _FINAL)
    read_scale, write_scale = (one, scale) if gradient else (scale, one)
    for direction in range(load_int(job + _DIRECTIONS)):
        backwards = (load_int(job + _REVERSE) != direction) != gradient
        fill_state(buffers, height, width, _state(before, sequence, head, offset), columns * size, size, zero)
        scan(
            buffers, height, width, length,
            _rows(job, read, sequence, head, 0, backwards),
            _rows(job, written, sequence, head, 0, backwards),
            _rows(job, values, sequence, head, offset, backwards),
            _rows(job, job + _GATE + 32 * direction, sequence, head, 0, backwards),
            _rows(job, results, sequence, head, offset, backwards),
            read_scale, write_scale, no, gradient, direction > 0, nowhere, nowhere, one, no, zero,
        )  # fmt: skip
        store_state(buffers, height, width, _state(behind, sequence, head, offset), columns * size, zero)


@compiled
def _key_gradients(job: int, sequence: int, head: int, block: int, base: int, scale: Any, zero: Any) -> None:
    r"""dk against the time, dq along it, and the gradient of the gates from both.

    A gate acts on every pair of a write before it and a read from it on. With dq and dk less the token's own pair,
    :math:`dg_t = \sum_{i=t}^{n} (q_i dq_i - k_i dk_i) + \sum_v S_n \odot dS_n` for any later token n, where S and dS are
    the state after it and its gradient (arXiv 2312.06635, section 4.2). The first scan stores dS at the end of every
    block of time, where the second one meets it with S, so that no sum runs further than one block and rounding does
    not pile up. What the gradient of the final state adds to dk in the last chunk is kept apart, and is summed from
    the start: taken from the whole it would leave rounding noise where all gates are closed.
    """
    size, height, columns = item_size(zero), load_int(job + _VALUE), load_int(job + _KEY)
    first = block * load_int(job + _KEY_BLOCK)
    width, offset = min(load_int(job + _KEY_BLOCK), columns - first), first * size
    table = load_int(job + _SEQUENCES) + 32 * sequence
    length, blocks_before = load_int(table + 16), load_int(table + 24)
    if length == 0:
        return
    time_block = load_int(job + _TIME_BLOCK)
    body = (length - 1) // CHUNK * CHUNK
    rest = length - body
    blocks = (body + time_block - 1) // time_block
    stored_step = load_int(job + _HEADS) * height * columns * size
    stored = load_int(job + _STATES) + blocks_before * stored_step + head * height * columns * size + offset
    buffers = make_buffers(base, height, width, zero)
    one, no, yes = cast(1.0, zero), job == 0, job != 0
    nothing = one - one
    row, column = size, height * size  # of the transposed states
    dstate = _state(job + _DSTATE, sequence, head, first * column)
    initial = _state(job + _INITIAL, sequence, head, first * column)
    final_terms = _part(terms_rows(buffers, width, zero), 0, rest, yes)
    for direction in range(load_int(job + _DIRECTIONS)):
        backwards, again = load_int(job + _REVERSE) != direction, direction > 0
        q = _rows(job, job + _Q, sequence, head, offset, backwards)
        k = _rows(job, job + _K, sequence, head, offset, backwards)
        v = _rows(job, job + _V, sequence, head, 0, backwards)
        gate = _rows(job, job + _GATE + 32 * direction, sequence, head, offset, backwards)
        do = _rows(job, job + _DO, sequence, head, 0, backwards)
        dq = _rows(job, job + _DQ, sequence, head, offset, backwards)
        dk = _rows(job, job + _DK, sequence, head, offset, backwards)
        dgate = _rows(job, job + _DGATE + 32 * direction, sequence, head, offset, backwards)

        if dstate:
            fill_state(buffers, height, width, dstate, row, column, zero)
            scan(
                buffers, height, width, rest,
                _part(v, body, rest, yes), _part(do, body, rest, yes), _part(q, body, rest, yes),
                _part(gate, body, rest, yes), _part(dk, body, rest, yes),
                one, nothing, yes, yes, again, _part(k, body, rest, yes), final_terms, one, no, zero,
            )  # fmt: skip
            set_aside(buffers, height, width, zero)
        clear_state(buffers, height, width, zero)
        for part in range(blocks, -1, -1):
            start = body if part == blocks else part * time_block
            count = rest if part == blocks else min(time_block, body - start)
            scan(
                buffers, height, width, count,
                _part(v, start, count, yes), _part(do, start, count, yes), _part(q, start, count, yes),
                _part(gate, start, count, yes), _part(dk, start, count, yes),
                one, scale, yes, yes, again or (part == blocks and dstate != 0),
                _part(k, start, count, yes), _part(dgate, start, count, yes), -one, no, zero,
            )  # fmt: skip
            if part == blocks and dstate:
                add_spare(buffers, height, width, zero)
            if part > 0:
                store_state(buffers, height, width, stored + (part - 1) * stored_step, columns * size, zero)

        fill_state(buffers, height, width, initial, row, column, zero)
        for part in range(blocks + 1):
            start = body if part == blocks else part * time_block
            count = rest if part == blocks else min(time_block, body - start)
            terms = _part(dgate, start, count, no)
            adds_final = part == blocks and dstate != 0
            if adds_final:
                wide = terms_rows(buffers, width, zero).stride
                overlap(buffers, height, width, buffers.spare, wide, buffers.spare, zero)
            scan(
                buffers, height, width, count,
                _part(do, start, count, no), _part(v, start, count, no), _part(k, start, count, no),
                _part(gate, start, count, no), _part(dq, start, count, no),
                scale, one, yes, no, again, _part(q, start, count, no), terms, one, yes, zero,
            )  # fmt: skip
            if part < blocks:
                later = stored + part * stored_step
                overlap(buffers, height, width, later, columns * size, buffers.total, zero)
            else:
                overlap(buffers, height, width, 0, 0, buffers.total, zero)
            accumulate_gate(buffers, width, count, terms, zero)
            if adds_final:
                accumulate_gate_from_start(buffers, width, count, _part(final_terms, 0, rest, yes), terms, zero)


def _work(job: int, zero: Any) -> None:
    base = load_int(job + _SCRATCH) + fetch_add(job + _WORKERS, 1) * load_int(job + _SCRATCH_BYTES)
    scale = cast(load_scalar(job + _SCALE, 0.0), zero)
    heads, items, key_items = load_int(job + _HEADS), load_int(job + _ITEMS), load_int(job + _KEY_ITEMS)
    gradient = load_int(job + _IS_BACKWARD) != 0
    item = fetch_add(job + _NEXT, 1)
    while item < items:
        if item < key_items:
            blocks = load_int(job + _KEY_BLOCKS)
            _key_gradients(job, item // blocks // heads, item // blocks % heads, item % blocks, base, scale, zero)
        else:
            blocks, number = load_int(job + _VALUE_BLOCKS), item - key_items
            sequence, head, block = number // blocks // heads, number // blocks % heads, number % blocks
            _value_scans(job, sequence, head, block, base, gradient, scale, zero)
        item = fetch_add(job + _NEXT, 1)


work = njit(nogil=True, error_model="numpy", inline="always")(_work)
"""Take items until none is left; ``(job, zero)``, the address of the table and 0 in the type of the computation."""

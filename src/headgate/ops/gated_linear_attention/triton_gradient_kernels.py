r"""GPU kernels of gated linear attention, backward.

With :math:`S` the state before a chunk and :math:`dS` the gradient with respect to the state after it (Yang et al., arXiv
2312.06635, appendix C; notation of :mod:`~headgate.ops.gated_linear_attention.triton_kernels`),

.. math:: dP = \mathrm{scale}\; dO\, V^\top, \qquad dV = P^\top dO + (K \odot e^{b_C - b})\, dS, \qquad
          dS \leftarrow \mathrm{diag}(e^{b_C})\, dS + \mathrm{scale}\,(Q \odot e^{b})^\top dO,

.. math:: dq_i = \sum_{j \le i} dP_{ij}\, k_j \odot e^{b_i - b_j} + \mathrm{scale}\, e^{b_i} \odot (dO_i\, S^\top), \qquad
          dk_j = \sum_{i \ge j} dP_{ij}\, q_i \odot e^{b_i - b_j} + e^{b_C - b_j} \odot (V_j\, dS^\top).

A gate's gradient collects every path that passes it. With :math:`dq', dk'` the sums above over :math:`j < i`, and
:math:`dq'', dk''` the parts that come from the states,

.. math:: dg_t = \sum_{i \ge t} (q_i \odot (dq'_i + dq''_i) - k_i \odot dk'_i) + \sum_{i < t} k_i \odot dk''_i
          + e^{b_C} \odot \sum_v S \odot dS,

all sums within the chunk. It is the closed form of the paper, cut at the chunk's end, without the terms that occur with
both signs (a token's own write, and the writes that reach the end of the chunk without passing t): so it stays accurate
where gates are so strong that little passes them.
"""

from __future__ import annotations

import triton.language as tl

from headgate.ops.gated_linear_attention.triton_tiles import (
    fade_to_end,
    jit,
    keys_before_block,
    load_gate_row,
    load_gates,
    load_row,
    load_scores,
    load_state,
    load_tile,
    locate_chunk,
    locate_sequence,
    locate_state,
    multiply,
    store_tile,
)

__all__ = [
    "inner_gradients_kernel",
    "key_query_gradients_kernel",
    "score_gradients_kernel",
    "state_gradients_kernel",
    "value_gradients_kernel",
]

NOTHING_PASSES = tl.constexpr(-2000.0)
"""Two to this power is zero in every dtype, and so is the gradient of a gate that small."""


@jit
def state_gradients_kernel(
    q: tl.tensor,
    do: tl.tensor,
    gates: tl.tensor,
    gates_back: tl.tensor,
    dfinal: tl.tensor,
    dstates: tl.tensor,
    dinitial: tl.tensor,
    sequence_table: tl.tensor,
    scale: tl.tensor,
    length: tl.tensor,
    chunks: tl.tensor,
    all_chunks: tl.tensor,
    sequences: tl.tensor,
    heads: tl.tensor,
    key_dim: tl.tensor,
    value_dim: tl.tensor,
    q_row: tl.tensor,
    q_token: tl.tensor,
    q_head: tl.tensor,
    o_row: tl.tensor,
    o_token: tl.tensor,
    o_head: tl.tensor,
    g_row: tl.tensor,
    g_token: tl.tensor,
    g_head: tl.tensor,
    REVERSE: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
) -> None:
    """Walk over the chunks against the scan; store the gradient of the state after each chunk.

    ``dstates`` is ``(directions, all_chunks, heads, key, value)``. ``dinitial``, where given, gets the gradient of the
    initial state. Program axes as in ``states_kernel``.
    """
    rows = tl.arange(0, CHUNK)
    direction, sequence, head, channels, columns = locate_state(sequences, heads, key_dim, value_dim, BLOCK_K, BLOCK_V)
    row, first, count, first_chunk = locate_sequence(sequence, sequence_table, length, chunks)
    if direction == 1:
        gates = gates_back
    backward = direction + REVERSE
    state_mask = (channels < key_dim)[:, None] & (columns < value_dim)[None, :]
    state_tile = channels[:, None] * value_dim + columns[None, :]
    q += row * q_row + head * q_head
    do += row * o_row + head * o_head
    gates += row * g_row + head * g_head
    dstates += (direction.to(tl.int64) * all_chunks + first_chunk) * heads * key_dim * value_dim

    dstate = tl.zeros([BLOCK_K, BLOCK_V], dtype=WIDE)
    sequence_state = (sequence.to(tl.int64) * heads + head) * key_dim * value_dim + state_tile
    if dfinal is not None:
        dstate += tl.load(dfinal + sequence_state, mask=state_mask, other=0.0)
    steps = tl.cdiv(count, CHUNK)
    for step in range(steps):
        chunk = steps - 1 - step + backward * (2 * step + 1 - steps)
        size = tl.minimum(count - chunk * CHUNK, CHUNK)
        tokens = first + chunk * CHUNK + backward * (size - 1) + (1 - 2 * backward) * rows
        fade = load_gates(gates, tokens, g_token, channels, key_dim, rows < size, WIDE)
        queries = load_tile(q, tokens, q_token, channels, key_dim, rows < size).to(WIDE) * scale
        doutputs = load_tile(do, tokens, o_token, columns, value_dim, rows < size).to(WIDE)
        place = dstates + (chunk * heads + head) * key_dim * value_dim + state_tile
        tl.store(place, dstate.to(dstates.dtype.element_ty), mask=state_mask)
        dstate *= tl.exp2(tl.sum(fade, axis=0))[:, None]
        queries *= tl.exp2(tl.cumsum(fade, axis=0))
        dstate = tl.dot(tl.trans(queries), doutputs, dstate, input_precision=PRECISION, out_dtype=WIDE)
    if dinitial is not None:
        tl.store(dinitial + sequence_state, dstate, mask=state_mask)


@jit
def score_gradients_kernel(
    v: tl.tensor,
    do: tl.tensor,
    dscores: tl.tensor,
    chunk_table: tl.tensor,
    scale: tl.tensor,
    length: tl.tensor,
    chunks: tl.tensor,
    heads: tl.tensor,
    value_dim: tl.tensor,
    v_row: tl.tensor,
    v_token: tl.tensor,
    v_head: tl.tensor,
    o_row: tl.tensor,
    o_token: tl.tensor,
    o_head: tl.tensor,
    CHUNK: tl.constexpr,
    BLOCK_V: tl.constexpr,
    ROUND: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
) -> None:
    """Compute dP of one chunk and head, for all pairs of tokens: it is the same for both directions."""
    index = tl.program_id(0)
    head = index % heads
    chunk = index // heads
    row, first, size = locate_chunk(chunk, chunk_table, length, chunks, CHUNK)
    if size <= 0:
        return
    rows = tl.arange(0, CHUNK)
    v += row * v_row + head * v_head
    do += row * o_row + head * o_head
    result = tl.zeros([CHUNK, CHUNK], dtype=WIDE)
    for start in range(0, value_dim, BLOCK_V):
        columns = start + tl.arange(0, BLOCK_V)
        values = load_tile(v, first + rows, v_token, columns, value_dim, rows < size)
        doutputs = load_tile(do, first + rows, o_token, columns, value_dim, rows < size)
        result = multiply(doutputs, tl.trans(values), result, ROUND, DOT, PRECISION)
    place = dscores + (chunk.to(tl.int64) * heads + head) * CHUNK * CHUNK
    tl.store(place + rows[:, None] * CHUNK + rows[None, :], result * scale)


@jit
def value_gradients_kernel(
    k: tl.tensor,
    do: tl.tensor,
    gates: tl.tensor,
    gates_back: tl.tensor,
    scores: tl.tensor,
    dstates: tl.tensor,
    dv: tl.tensor,
    chunk_table: tl.tensor,
    length: tl.tensor,
    chunks: tl.tensor,
    all_chunks: tl.tensor,
    heads: tl.tensor,
    key_dim: tl.tensor,
    value_dim: tl.tensor,
    k_row: tl.tensor,
    k_token: tl.tensor,
    k_head: tl.tensor,
    o_row: tl.tensor,
    o_token: tl.tensor,
    o_head: tl.tensor,
    g_row: tl.tensor,
    g_token: tl.tensor,
    g_head: tl.tensor,
    DIRECTIONS: tl.constexpr,
    REVERSE: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    ROUND: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
) -> None:
    """Compute dV of one chunk, head and block of value channels."""
    value_blocks = tl.cdiv(value_dim, BLOCK_V)
    index = tl.program_id(0)
    columns = index % value_blocks * BLOCK_V + tl.arange(0, BLOCK_V)
    head = index // value_blocks % heads
    chunk = index // value_blocks // heads
    row, first, size = locate_chunk(chunk, chunk_table, length, chunks, CHUNK)
    if size <= 0:
        return
    rows = tl.arange(0, CHUNK)
    k += row * k_row + head * k_head
    do += row * o_row + head * o_head
    shift = row * g_row + head * g_head
    doutputs = load_tile(do, first + rows, o_token, columns, value_dim, rows < size)
    weights = load_scores(scores, chunk, head, heads, size, CHUNK)
    result = tl.zeros([CHUNK, BLOCK_V], dtype=WIDE)
    result = multiply(tl.trans(weights), doutputs, result, ROUND, DOT, PRECISION)
    dstate = dstates + (chunk.to(tl.int64) * heads + head) * key_dim * value_dim
    result = _write_states(
        result, k, gates + shift, dstate, first, size, columns, key_dim, value_dim, k_token, g_token,
        REVERSE, CHUNK, BLOCK_K, ROUND, DOT, PRECISION, WIDE,
    )  # fmt: skip
    if DIRECTIONS == 2:
        dstate += (row * 0 + all_chunks) * heads * key_dim * value_dim
        result = _write_states(
            result, k, gates_back + shift, dstate, first, size, columns, key_dim, value_dim, k_token, g_token,
            True, CHUNK, BLOCK_K, ROUND, DOT, PRECISION, WIDE,
        )  # fmt: skip
    store_tile(dv, row * length + first, head, heads, columns, value_dim, size, result, CHUNK)


@jit
def _write_states(
    result: tl.tensor,
    k: tl.tensor,
    gates: tl.tensor,
    dstate: tl.tensor,
    first: tl.tensor,
    size: tl.tensor,
    columns: tl.tensor,
    key_dim: tl.tensor,
    value_dim: tl.tensor,
    k_token: tl.tensor,
    g_token: tl.tensor,
    BACKWARD: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ROUND: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
) -> tl.tensor:
    rows = tl.arange(0, CHUNK)
    for start in range(0, key_dim, BLOCK_K):
        channels = start + tl.arange(0, BLOCK_K)
        keys = load_tile(k, first + rows, k_token, channels, key_dim, rows < size).to(WIDE)
        keys *= tl.exp2(fade_to_end(gates, first, size, channels, key_dim, g_token, BACKWARD, CHUNK, WIDE))
        memory = load_state(dstate, channels, columns, key_dim, value_dim)
        result = multiply(keys, memory, result, ROUND, DOT, PRECISION)
    return result


@jit
def inner_gradients_kernel(
    q: tl.tensor,
    k: tl.tensor,
    gates: tl.tensor,
    gates_back: tl.tensor,
    dscores: tl.tensor,
    inner_dq: tl.tensor,
    inner_dk: tl.tensor,
    chunk_table: tl.tensor,
    length: tl.tensor,
    chunks: tl.tensor,
    tokens: tl.tensor,
    heads: tl.tensor,
    key_dim: tl.tensor,
    q_row: tl.tensor,
    q_token: tl.tensor,
    q_head: tl.tensor,
    k_row: tl.tensor,
    k_token: tl.tensor,
    k_head: tl.tensor,
    g_row: tl.tensor,
    g_token: tl.tensor,
    g_head: tl.tensor,
    DIRECTIONS: tl.constexpr,
    REVERSE: tl.constexpr,
    CHUNK: tl.constexpr,
    SUBCHUNK: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ROUND: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
) -> None:
    """Compute dq' and dk' of one block of rows of a chunk, head and block of key channels, one pair per direction.

    ``inner_dq`` and ``inner_dk`` are ``(directions, tokens, heads, key)``.
    """
    blocks: tl.constexpr = CHUNK // SUBCHUNK
    key_blocks = tl.cdiv(key_dim, BLOCK_K)
    index = tl.program_id(0)
    channels = index % key_blocks * BLOCK_K + tl.arange(0, BLOCK_K)
    index //= key_blocks
    base = index % blocks * SUBCHUNK
    head = index // blocks % heads
    chunk = index // blocks // heads
    row, first, size = locate_chunk(chunk, chunk_table, length, chunks, CHUNK)
    if base >= size:
        return
    q += row * q_row + head * q_head
    k += row * k_row + head * k_head
    shift = row * g_row + head * g_head
    dscores += (chunk.to(tl.int64) * heads + head) * CHUNK * CHUNK
    place = row * length + first + base
    dq, dk = _inner_gradients(
        q, k, gates + shift, dscores, first, base, size, channels, key_dim, q_token, k_token, g_token,
        REVERSE, CHUNK, SUBCHUNK, BLOCK_K, ROUND, DOT, PRECISION, WIDE,
    )  # fmt: skip
    store_tile(inner_dq, place, head, heads, channels, key_dim, size - base, dq, SUBCHUNK)
    store_tile(inner_dk, place, head, heads, channels, key_dim, size - base, dk, SUBCHUNK)
    if DIRECTIONS == 2:
        dq, dk = _inner_gradients(
            q, k, gates_back + shift, dscores, first, base, size, channels, key_dim, q_token, k_token, g_token,
            True, CHUNK, SUBCHUNK, BLOCK_K, ROUND, DOT, PRECISION, WIDE,
        )  # fmt: skip
        store_tile(inner_dq, tokens + place, head, heads, channels, key_dim, size - base, dq, SUBCHUNK)
        store_tile(inner_dk, tokens + place, head, heads, channels, key_dim, size - base, dk, SUBCHUNK)


@jit
def _inner_gradients(
    q: tl.tensor,
    k: tl.tensor,
    gates: tl.tensor,
    dscores: tl.tensor,
    first: tl.tensor,
    base: tl.tensor,
    size: tl.tensor,
    channels: tl.tensor,
    key_dim: tl.tensor,
    q_token: tl.tensor,
    k_token: tl.tensor,
    g_token: tl.tensor,
    BACKWARD: tl.constexpr,
    CHUNK: tl.constexpr,
    SUBCHUNK: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ROUND: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
) -> tuple[tl.tensor, ...]:
    rows = tl.arange(0, SUBCHUNK)
    valid = base + rows < size
    queries = load_tile(q, first + base + rows, q_token, channels, key_dim, valid).to(WIDE)
    dq = tl.zeros([SUBCHUNK, BLOCK_K], dtype=WIDE)
    dk = tl.zeros([SUBCHUNK, BLOCK_K], dtype=WIDE)
    if CHUNK > SUBCHUNK:
        # Pairs with the tokens of other blocks, over the border that this block shares with them.
        columns = tl.arange(0, CHUNK)
        keys = keys_before_block(
            k, gates, first, base, size, columns, channels, key_dim, k_token, g_token, BACKWARD, SUBCHUNK, WIDE
        )
        weights = tl.load(
            dscores + (base + rows)[:, None] * CHUNK + columns[None, :], mask=(columns < size)[None, :], other=0.0
        )
        fade = load_gates(gates, first + base + rows, g_token, channels, key_dim, valid, WIDE)
        dq = multiply(weights, keys, dq, ROUND, DOT, PRECISION)
        dq *= tl.exp2(tl.cumsum(fade, axis=0, reverse=BACKWARD))

        if BACKWARD:
            later = columns < base
            neighbours = rows - 1
            between = (neighbours >= 0) & valid
        else:
            later = (columns >= base + SUBCHUNK) & (columns < size)
            neighbours = rows + 1
            between = (neighbours < SUBCHUNK) & (base + neighbours < size)
        fade = load_gates(gates, first + columns, g_token, channels, key_dim, later, WIDE)
        others = load_tile(q, first + columns, q_token, channels, key_dim, later).to(WIDE)
        others *= tl.exp2(tl.cumsum(fade, axis=0, reverse=BACKWARD))
        weights = tl.load(
            dscores + columns[None, :] * CHUNK + (base + rows)[:, None], mask=(columns < size)[None, :], other=0.0
        )
        dk = multiply(weights, others, dk, ROUND, DOT, PRECISION)
        fade = load_gates(gates, first + base + neighbours, g_token, channels, key_dim, between, WIDE)
        dk *= tl.exp2(tl.cumsum(fade, axis=0, reverse=not BACKWARD))

    between = tl.zeros([SUBCHUNK, BLOCK_K], dtype=WIDE)
    count = tl.minimum(size - base, SUBCHUNK)
    for step in range(count):
        # Pairs within the block, column by column as in the scores; a token's pair with itself passes no gate.
        if BACKWARD:
            column = step
            neighbour = tl.maximum(base + column - 1, 0)
            after = rows < column
        else:
            column = count - 1 - step
            neighbour = tl.minimum(base + column + 1, size - 1)
            after = rows > column
        passed = load_gate_row(gates, first + neighbour, g_token, channels, key_dim, WIDE)
        between = tl.where(after[:, None], between + passed[None, :], 0.0)
        key = load_row(k, first + base + column, k_token, channels, key_dim).to(WIDE)
        weight = tl.load(dscores + (base + rows) * CHUNK + base + column)
        weight = tl.where(after, weight, 0.0)[:, None] * tl.exp2(between)
        dq += weight * key[None, :]
        dk += tl.where((rows == column)[:, None], tl.sum(weight * queries, axis=0)[None, :], 0.0)
    return dq, dk


@jit
def key_query_gradients_kernel(
    q: tl.tensor,
    k: tl.tensor,
    v: tl.tensor,
    do: tl.tensor,
    gates: tl.tensor,
    gates_back: tl.tensor,
    states: tl.tensor,
    dstates: tl.tensor,
    dscores: tl.tensor,
    inner_dq: tl.tensor,
    inner_dk: tl.tensor,
    dq: tl.tensor,
    dk: tl.tensor,
    dgates: tl.tensor,
    dgates_back: tl.tensor,
    chunk_table: tl.tensor,
    scale: tl.tensor,
    length: tl.tensor,
    chunks: tl.tensor,
    all_chunks: tl.tensor,
    tokens: tl.tensor,
    heads: tl.tensor,
    key_dim: tl.tensor,
    value_dim: tl.tensor,
    q_row: tl.tensor,
    q_token: tl.tensor,
    q_head: tl.tensor,
    k_row: tl.tensor,
    k_token: tl.tensor,
    k_head: tl.tensor,
    v_row: tl.tensor,
    v_token: tl.tensor,
    v_head: tl.tensor,
    o_row: tl.tensor,
    o_token: tl.tensor,
    o_head: tl.tensor,
    g_row: tl.tensor,
    g_token: tl.tensor,
    g_head: tl.tensor,
    DIRECTIONS: tl.constexpr,
    REVERSE: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    ROUND: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
) -> None:
    """Compute dQ, dK and the gates' gradients of one chunk, head and block of key channels."""
    key_blocks = tl.cdiv(key_dim, BLOCK_K)
    index = tl.program_id(0)
    channels = index % key_blocks * BLOCK_K + tl.arange(0, BLOCK_K)
    head = index // key_blocks % heads
    chunk = index // key_blocks // heads
    row, first, size = locate_chunk(chunk, chunk_table, length, chunks, CHUNK)
    if size <= 0:
        return
    rows = tl.arange(0, CHUNK)
    q += row * q_row + head * q_head
    k += row * k_row + head * k_head
    v += row * v_row + head * v_head
    do += row * o_row + head * o_head
    shift = row * g_row + head * g_head
    queries = load_tile(q, first + rows, q_token, channels, key_dim, rows < size).to(WIDE)
    keys = load_tile(k, first + rows, k_token, channels, key_dim, rows < size).to(WIDE)
    place = row * length + first
    inner = ((place + rows) * heads + head)[:, None] * key_dim
    state = (chunk.to(tl.int64) * heads + head) * key_dim * value_dim

    total_dq, total_dk = _through_gates(
        queries, keys, v, do, gates + shift, states + state, dstates + state, inner_dq + inner, inner_dk + inner,
        dgates, first, place, size, head, heads, channels, scale, key_dim, value_dim, v_token, o_token, g_token,
        REVERSE, CHUNK, BLOCK_K, BLOCK_V, ROUND, DOT, PRECISION, WIDE,
    )  # fmt: skip
    if DIRECTIONS == 2:
        state += (row * 0 + all_chunks) * heads * key_dim * value_dim
        inner += (row * 0 + tokens) * heads * key_dim
        back_dq, back_dk = _through_gates(
            queries, keys, v, do, gates_back + shift, states + state, dstates + state, inner_dq + inner,
            inner_dk + inner, dgates_back, first, place, size, head, heads, channels, scale, key_dim, value_dim,
            v_token, o_token, g_token, True, CHUNK, BLOCK_K, BLOCK_V, ROUND, DOT, PRECISION, WIDE,
        )  # fmt: skip
        total_dq += back_dq
        total_dk += back_dk

    # Every direction lets a token read its own write.
    own = dscores + (chunk.to(tl.int64) * heads + head) * CHUNK * CHUNK + rows * (CHUNK + 1)
    weight = DIRECTIONS * tl.load(own, mask=rows < size, other=0.0)
    total_dq += weight[:, None] * keys
    total_dk += weight[:, None] * queries
    store_tile(dq, place, head, heads, channels, key_dim, size, total_dq, CHUNK)
    store_tile(dk, place, head, heads, channels, key_dim, size, total_dk, CHUNK)


@jit
def _through_gates(
    queries: tl.tensor,
    keys: tl.tensor,
    v: tl.tensor,
    do: tl.tensor,
    gates: tl.tensor,
    state: tl.tensor,
    dstate: tl.tensor,
    inner_dq: tl.tensor,
    inner_dk: tl.tensor,
    dgates: tl.tensor,
    first: tl.tensor,
    place: tl.tensor,
    size: tl.tensor,
    head: tl.tensor,
    heads: tl.tensor,
    channels: tl.tensor,
    scale: tl.tensor,
    key_dim: tl.tensor,
    value_dim: tl.tensor,
    v_token: tl.tensor,
    o_token: tl.tensor,
    g_token: tl.tensor,
    BACKWARD: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    ROUND: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
) -> tuple[tl.tensor, ...]:
    """One direction's dq and dk, all but the pairs of a token with itself; writes the gradients of its gates."""
    rows = tl.arange(0, CHUNK)
    outer_dq = tl.zeros([CHUNK, BLOCK_K], dtype=WIDE)
    outer_dk = tl.zeros([CHUNK, BLOCK_K], dtype=WIDE)
    through = tl.zeros([BLOCK_K], dtype=WIDE)
    for start in range(0, value_dim, BLOCK_V):
        columns = start + tl.arange(0, BLOCK_V)
        values = load_tile(v, first + rows, v_token, columns, value_dim, rows < size)
        doutputs = load_tile(do, first + rows, o_token, columns, value_dim, rows < size)
        memory = load_state(state, channels, columns, key_dim, value_dim)
        dmemory = load_state(dstate, channels, columns, key_dim, value_dim)
        outer_dq = multiply(doutputs, tl.trans(memory), outer_dq, ROUND, DOT, PRECISION)
        outer_dk = multiply(values, tl.trans(dmemory), outer_dk, ROUND, DOT, PRECISION)
        through += tl.sum(memory.to(WIDE) * dmemory.to(WIDE), axis=1)
    gate_mask = (rows < size)[:, None] & (channels < key_dim)[None, :]
    fade = load_gates(gates, first + rows, g_token, channels, key_dim, rows < size, WIDE)
    outer_dq *= scale * tl.exp2(tl.cumsum(fade, axis=0, reverse=BACKWARD))
    outer_dk *= tl.exp2(fade_to_end(gates, first, size, channels, key_dim, g_token, BACKWARD, CHUNK, WIDE))
    near_dq = tl.load(inner_dq + channels[None, :], mask=gate_mask, other=0.0)
    near_dk = tl.load(inner_dk + channels[None, :], mask=gate_mask, other=0.0)

    # Sums over the tokens from t on, and before t, as products with triangles of ones: a sum that leaves its own row
    # out by subtraction would drown small terms.
    if BACKWARD:
        earlier = rows[:, None] < rows[None, :]
    else:
        earlier = rows[:, None] > rows[None, :]
    before = tl.where(earlier, 1.0, 0.0).to(WIDE)
    dgate = tl.dot(before, keys * outer_dk, input_precision=PRECISION, out_dtype=WIDE)
    rest = queries * (near_dq + outer_dq) - keys * near_dk
    dgate = tl.dot(1.0 - before, rest, dgate, input_precision=PRECISION, out_dtype=WIDE)
    dgate += (tl.exp2(tl.sum(fade, axis=0)) * through)[None, :]
    dgate = tl.where(fade < NOTHING_PASSES, 0.0, dgate)
    store_tile(dgates, place, head, heads, channels, key_dim, size, dgate, CHUNK)
    return near_dq + outer_dq, near_dk + outer_dk

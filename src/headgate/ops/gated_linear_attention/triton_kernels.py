r"""GPU kernels of gated linear attention, forward: the states between chunks, the scores inside them, the outputs.

Tokens are cut into chunks of C, and chunks into blocks of c = 16 (Yang et al., arXiv 2312.06635, sections 4.2 and 4.3).
With :math:`S` the state before a chunk,

.. math:: O = P V + \mathrm{scale}\,(Q \odot e^{b})\, S, \qquad
          S \leftarrow \mathrm{diag}(e^{b_{C}})\, S + (K \odot e^{b_{C} - b})^\top V,

where :math:`b_t` sums the log-gates of the chunk up to token t and :math:`P_{ij} = \mathrm{scale} \sum_c q_{ic} k_{jc}
e^{b_{ic} - b_{jc}}`. A pair of tokens in different blocks splits its exponent at the border between them, so that the
scores are matrix products; a pair within one block is summed elementwise.

No exponent is a difference of sums: :math:`b_C - b_t` and the like are sums of their own, over the tokens after t. So
strong gates leave no rounding errors in the terms of weak ones, and every exponent is at most 0.

Rows of a tile stand in the order of time. Where a scan runs ``BACKWARD``, "before" and "after" change places. All sums
are in base-2 logarithms. ``WIDE`` is the dtype of states and sums; operands of matrix products are rounded to ``ROUND``
and multiplied in ``DOT``, the products that build states in ``WIDE``. A tile's offset is counted in 64 bits.
"""

from __future__ import annotations

import triton.language as tl

from headgate.ops.gated_linear_attention.triton_tiles import (
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

__all__ = ["outputs_kernel", "scores_kernel", "states_kernel"]


@jit
def states_kernel(
    k: tl.tensor,
    v: tl.tensor,
    gates: tl.tensor,
    gates_back: tl.tensor,
    initial: tl.tensor,
    states: tl.tensor,
    final: tl.tensor,
    sequence_table: tl.tensor,
    length: tl.tensor,
    chunks: tl.tensor,
    all_chunks: tl.tensor,
    sequences: tl.tensor,
    heads: tl.tensor,
    key_dim: tl.tensor,
    value_dim: tl.tensor,
    k_row: tl.tensor,
    k_token: tl.tensor,
    k_head: tl.tensor,
    v_row: tl.tensor,
    v_token: tl.tensor,
    v_head: tl.tensor,
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
    """Walk over the chunks of one sequence, direction, head and block of the state; store the state before each chunk.

    ``states`` is ``(directions, all_chunks, heads, key, value)``. ``final``, where given, gets the state after the last
    chunk. The second direction, where the grid has one, reads ``gates_back`` and runs against the first.
    """
    rows = tl.arange(0, CHUNK)
    direction, sequence, head, channels, columns = locate_state(sequences, heads, key_dim, value_dim, BLOCK_K, BLOCK_V)
    row, first, count, first_chunk = locate_sequence(sequence, sequence_table, length, chunks)
    if direction == 1:
        gates = gates_back
    backward = direction + REVERSE
    state_mask = (channels < key_dim)[:, None] & (columns < value_dim)[None, :]
    state_tile = channels[:, None] * value_dim + columns[None, :]
    k += row * k_row + head * k_head
    v += row * v_row + head * v_head
    gates += row * g_row + head * g_head
    states += (direction.to(tl.int64) * all_chunks + first_chunk) * heads * key_dim * value_dim

    state = tl.zeros([BLOCK_K, BLOCK_V], dtype=WIDE)
    sequence_state = (sequence.to(tl.int64) * heads + head) * key_dim * value_dim + state_tile
    if initial is not None:
        state += tl.load(initial + sequence_state, mask=state_mask, other=0.0)
    steps = tl.cdiv(count, CHUNK)
    for step in range(steps):
        # Rows stand in the order of the visit here: only their sum matters.
        chunk = step + backward * (steps - 1 - 2 * step)
        size = tl.minimum(count - chunk * CHUNK, CHUNK)
        begin = first + chunk * CHUNK + backward * (size - 1)
        tokens = begin + (1 - 2 * backward) * rows
        fade = load_gates(gates, tokens + 1 - 2 * backward, g_token, channels, key_dim, rows + 1 < size, WIDE)
        first_fade = load_gate_row(gates, begin, g_token, channels, key_dim, WIDE)
        keys = load_tile(k, tokens, k_token, channels, key_dim, rows < size).to(WIDE)
        values = load_tile(v, tokens, v_token, columns, value_dim, rows < size).to(WIDE)
        place = states + (chunk * heads + head) * key_dim * value_dim + state_tile
        tl.store(place, state.to(states.dtype.element_ty), mask=state_mask)
        state *= tl.exp2(tl.sum(fade, axis=0) + first_fade)[:, None]
        keys *= tl.exp2(tl.cumsum(fade, axis=0, reverse=True))
        state = tl.dot(tl.trans(keys), values, state, input_precision=PRECISION, out_dtype=WIDE)
    if final is not None:
        tl.store(final + sequence_state, state, mask=state_mask)


@jit
def scores_kernel(
    q: tl.tensor,
    k: tl.tensor,
    gates: tl.tensor,
    gates_back: tl.tensor,
    scores: tl.tensor,
    chunk_table: tl.tensor,
    scale: tl.tensor,
    length: tl.tensor,
    chunks: tl.tensor,
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
    """Compute P for one block of rows of one chunk and head; both directions add to the same matrix.

    ``scores`` is ``(all_chunks, heads, CHUNK, CHUNK)``; rows of tokens that do not exist are left as they are.
    """
    blocks: tl.constexpr = CHUNK // SUBCHUNK
    index = tl.program_id(0)
    base = index % blocks * SUBCHUNK
    head = index // blocks % heads
    chunk = index // blocks // heads
    row, first, size = locate_chunk(chunk, chunk_table, length, chunks, CHUNK)
    if base >= size:
        return
    q += row * q_row + head * q_head
    k += row * k_row + head * k_head
    shift = row * g_row + head * g_head
    result = tl.zeros([SUBCHUNK, CHUNK], dtype=WIDE)
    result = _add_scores(
        result, q, k, gates + shift, first, base, size, scale, key_dim, q_token, k_token, g_token,
        REVERSE, CHUNK, SUBCHUNK, BLOCK_K, ROUND, DOT, PRECISION, WIDE,
    )  # fmt: skip
    if DIRECTIONS == 2:
        result = _add_scores(
            result, q, k, gates_back + shift, first, base, size, scale, key_dim, q_token, k_token, g_token,
            True, CHUNK, SUBCHUNK, BLOCK_K, ROUND, DOT, PRECISION, WIDE,
        )  # fmt: skip
    rows = base + tl.arange(0, SUBCHUNK)
    place = scores + (chunk.to(tl.int64) * heads + head) * CHUNK * CHUNK
    place += rows[:, None] * CHUNK + tl.arange(0, CHUNK)[None, :]
    tl.store(place, result.to(scores.dtype.element_ty))


@jit
def _add_scores(
    result: tl.tensor,
    q: tl.tensor,
    k: tl.tensor,
    gates: tl.tensor,
    first: tl.tensor,
    base: tl.tensor,
    size: tl.tensor,
    scale: tl.tensor,
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
) -> tl.tensor:
    rows = tl.arange(0, SUBCHUNK)
    columns = tl.arange(0, CHUNK)
    for start in range(0, key_dim, BLOCK_K):
        channels = start + tl.arange(0, BLOCK_K)
        valid = base + rows < size
        queries = load_tile(q, first + base + rows, q_token, channels, key_dim, valid).to(WIDE) * scale
        if CHUNK > SUBCHUNK:
            fade = load_gates(gates, first + base + rows, g_token, channels, key_dim, valid, WIDE)
            faded_keys = keys_before_block(
                k, gates, first, base, size, columns, channels, key_dim, k_token, g_token, BACKWARD, SUBCHUNK, WIDE
            )
            faded_queries = queries * tl.exp2(tl.cumsum(fade, axis=0, reverse=BACKWARD))
            result = multiply(faded_queries, tl.trans(faded_keys), result, ROUND, DOT, PRECISION)
        between = tl.zeros([SUBCHUNK, BLOCK_K], dtype=WIDE)
        count = tl.minimum(size - base, SUBCHUNK)
        for step in range(count):
            # The columns of the diagonal block, from the last one that a scan visits to the first: every step
            # adds one token's gate to the sums between that column and the rows after it.
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
            score = tl.sum(queries * key[None, :] * tl.exp2(between), axis=1)
            score = tl.where(after | (rows == column), score, 0.0)
            result += tl.where(columns[None, :] == base + column, score[:, None], 0.0)
    return result


@jit
def outputs_kernel(
    q: tl.tensor,
    v: tl.tensor,
    gates: tl.tensor,
    gates_back: tl.tensor,
    scores: tl.tensor,
    states: tl.tensor,
    output: tl.tensor,
    chunk_table: tl.tensor,
    scale: tl.tensor,
    length: tl.tensor,
    chunks: tl.tensor,
    all_chunks: tl.tensor,
    heads: tl.tensor,
    key_dim: tl.tensor,
    value_dim: tl.tensor,
    q_row: tl.tensor,
    q_token: tl.tensor,
    q_head: tl.tensor,
    v_row: tl.tensor,
    v_token: tl.tensor,
    v_head: tl.tensor,
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
    """Compute the outputs of one chunk, head and block of value channels from the scores and the states before it."""
    value_blocks = tl.cdiv(value_dim, BLOCK_V)
    index = tl.program_id(0)
    columns = index % value_blocks * BLOCK_V + tl.arange(0, BLOCK_V)
    head = index // value_blocks % heads
    chunk = index // value_blocks // heads
    row, first, size = locate_chunk(chunk, chunk_table, length, chunks, CHUNK)
    if size <= 0:
        return
    rows = tl.arange(0, CHUNK)
    q += row * q_row + head * q_head
    v += row * v_row + head * v_head
    shift = row * g_row + head * g_head
    values = load_tile(v, first + rows, v_token, columns, value_dim, rows < size)
    weights = load_scores(scores, chunk, head, heads, size, CHUNK)
    result = tl.zeros([CHUNK, BLOCK_V], dtype=WIDE)
    result = multiply(weights, values, result, ROUND, DOT, PRECISION)
    state = states + (chunk.to(tl.int64) * heads + head) * key_dim * value_dim
    result = _read_states(
        result, q, gates + shift, state, first, size, columns, scale, key_dim, value_dim, q_token, g_token,
        REVERSE, CHUNK, BLOCK_K, ROUND, DOT, PRECISION, WIDE,
    )  # fmt: skip
    if DIRECTIONS == 2:
        state += (row * 0 + all_chunks) * heads * key_dim * value_dim
        result = _read_states(
            result, q, gates_back + shift, state, first, size, columns, scale, key_dim, value_dim, q_token, g_token,
            True, CHUNK, BLOCK_K, ROUND, DOT, PRECISION, WIDE,
        )  # fmt: skip
    store_tile(output, row * length + first, head, heads, columns, value_dim, size, result, CHUNK)


@jit
def _read_states(
    result: tl.tensor,
    q: tl.tensor,
    gates: tl.tensor,
    state: tl.tensor,
    first: tl.tensor,
    size: tl.tensor,
    columns: tl.tensor,
    scale: tl.tensor,
    key_dim: tl.tensor,
    value_dim: tl.tensor,
    q_token: tl.tensor,
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
        queries = load_tile(q, first + rows, q_token, channels, key_dim, rows < size).to(WIDE) * scale
        fade = load_gates(gates, first + rows, g_token, channels, key_dim, rows < size, WIDE)
        queries *= tl.exp2(tl.cumsum(fade, axis=0, reverse=BACKWARD))
        memory = load_state(state, channels, columns, key_dim, value_dim)
        result = multiply(queries, memory, result, ROUND, DOT, PRECISION)
    return result

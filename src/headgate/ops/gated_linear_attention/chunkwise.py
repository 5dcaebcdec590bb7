r"""Gated linear attention as blocks of matrix products, linear in the length: plain PyTorch, on any device.

The sequence is cut into chunks. With :math:`b_t` the sum of the logarithms of the gates from the chunk's start through
token t, :math:`b_C` the sum over the whole chunk and S the state before it (arXiv 2312.06635, sections 4.2 and 4.3):

.. math::
    O = \mathrm{scale}\,(Q \odot e^{b})\, S + P V, \qquad
    P_{ij} = \mathrm{scale} \sum_c q_{ic}\, k_{jc}\, e^{b_{ic} - b_{jc}} \;(j \le i), \qquad
    S \leftarrow e^{b_C} \odot S + (K \odot e^{b_C - b})^\top V

A chunk is cut once more. Between two sub-chunks the exponent is split at the border n before the later one, so that P
is a matrix product, :math:`(Q_i \odot e^{b_i - n})(K_j \odot e^{n - b_j})^\top`; inside a sub-chunk it is a sum over
channels, one diagonal of P at a time. No sum of gates is ever subtracted from another one: every stretch is added up
(inside a sub-chunk: multiplied up) by itself. So no exponent is above zero, and a gate of -1e4 leaves the digits of its
neighbours alone.

The backward pass keeps the inputs only and computes the states again. Its gate gradient is a closed form (section 4.3),
which is summed inside each chunk alone, where it cannot cancel over the whole length. To ``torch.compile`` and
``torch.export`` both passes are one operator each: so they compile at once, for every length, and no partitioner keeps
more for the backward pass than the inputs.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from headgate.ops.autocast import without_autocast
from headgate.validate import check_positive

__all__ = ["recurrence_chunkwise", "recurrence_chunkwise_autograd"]


def recurrence_chunkwise(
    q: Float[Tensor, "batch length heads key"],
    k: Float[Tensor, "batch length heads key"],
    v: Float[Tensor, "batch length heads value"],
    log_gate: Float[Tensor, "batch length heads key"],
    scale: float,
    initial_state: Float[Tensor, "sequences heads key value"] | None = None,
    cu_seqlens: Int[Tensor, " sequences_plus_one"] | None = None,
    reverse: bool = False,
    *,
    chunk_size: int = 64,
    subchunk_size: int = 16,
) -> tuple[Float[Tensor, "batch length heads value"], Float[Tensor, "sequences heads key value"]]:
    """Run the recurrence chunk by chunk, with gradients in closed form; results as of :func:`recurrence_reference`.

    The backward pass needs memory for some multiple of the inputs and for one state per chunk. It has no derivative
    itself (asking for one is an error); :func:`recurrence_chunkwise_autograd` has.

    Args:
        q: queries ``(batch, length, heads, key)``; all inputs are in the dtype of the computation.
        k: keys, shaped like ``q``.
        v: values ``(batch, length, heads, value)``.
        log_gate: logarithms of the gates, finite and at most 0, shaped like ``q``.
        scale: factor on the queries.
        initial_state: the state before the first token that is visited; zeros if ``None``.
        cu_seqlens: boundaries of the sequences that are packed in one batch row; ``None`` for one sequence per row.
        reverse: visit the tokens from the last one to the first.
        chunk_size: tokens per chunk; it is lowered for short sequences, then raised to a multiple of ``subchunk_size``.
        subchunk_size: tokens per sub-chunk; lowered to ``chunk_size`` where it is above.

    Returns:
        The outputs and the state after the last visited token.

    Raises:
        ValueError: ``chunk_size`` or ``subchunk_size`` below one.
    """
    check_positive(chunk_size=chunk_size, subchunk_size=subchunk_size)
    return torch.ops.headgate.gated_linear_attention_chunkwise(
        q, k, v, log_gate, initial_state, cu_seqlens, scale, reverse, chunk_size, subchunk_size
    )


def recurrence_chunkwise_autograd(
    q: Float[Tensor, "batch length heads key"],
    k: Float[Tensor, "batch length heads key"],
    v: Float[Tensor, "batch length heads value"],
    log_gate: Float[Tensor, "batch length heads key"],
    scale: float,
    initial_state: Float[Tensor, "sequences heads key value"] | None = None,
    cu_seqlens: Int[Tensor, " sequences_plus_one"] | None = None,
    reverse: bool = False,
    *,
    chunk_size: int = 64,
    subchunk_size: int = 16,
) -> tuple[Float[Tensor, "batch length heads value"], Float[Tensor, "sequences heads key value"]]:
    """The forward pass of :func:`recurrence_chunkwise`, each step of which autograd records and differentiates.

    Arguments, results and errors are the same; the backward pass needs many times the memory.
    """
    check_positive(chunk_size=chunk_size, subchunk_size=subchunk_size)
    sizes = _sizes(q, cu_seqlens, chunk_size, subchunk_size)
    return _forward(q, k, v, log_gate, initial_state, cu_seqlens, scale, reverse, sizes)


@torch.library.custom_op("headgate::gated_linear_attention_chunkwise", mutates_args=())
def _operator(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_gate: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    reverse: bool,
    chunk_size: int,
    subchunk_size: int,
) -> tuple[Tensor, Tensor]:
    sizes = _sizes(q, cu_seqlens, chunk_size, subchunk_size)
    with without_autocast(q.device):
        return _forward(q, k, v, log_gate, initial_state, cu_seqlens, scale, reverse, sizes)


@_operator.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_gate: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    reverse: bool,
    chunk_size: int,
    subchunk_size: int,
) -> tuple[Tensor, Tensor]:
    return v.new_empty(v.shape), v.new_empty(_state_shape(q, v, cu_seqlens))


@torch.library.custom_op("headgate::gated_linear_attention_chunkwise_backward", mutates_args=())
def _operator_backward(
    do: Tensor | None,
    dfinal: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_gate: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    reverse: bool,
    chunk_size: int,
    subchunk_size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    sizes = _sizes(q, cu_seqlens, chunk_size, subchunk_size)
    do = torch.zeros_like(v) if do is None else do
    with without_autocast(q.device):
        return _backward(do, dfinal, q, k, v, log_gate, initial_state, cu_seqlens, scale, reverse, sizes)


@_operator_backward.register_fake
def _(
    do: Tensor | None,
    dfinal: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_gate: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    reverse: bool,
    chunk_size: int,
    subchunk_size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    dq, dk, dv, dlog_gate = (x.new_empty(x.shape) for x in (q, k, v, log_gate))
    return dq, dk, dv, dlog_gate, v.new_empty(_state_shape(q, v, cu_seqlens))


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.scale, ctx.reverse, ctx.chunk_size, ctx.subchunk_size = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors)


def _gradients(ctx: Any, do: Tensor | None, dfinal: Tensor | None) -> tuple[Tensor | None, ...]:
    *gradients, dstart = _operator_backward(
        do, dfinal, *ctx.saved_tensors, ctx.scale, ctx.reverse, ctx.chunk_size, ctx.subchunk_size
    )
    has_state = ctx.saved_tensors[4] is not None
    return *gradients, dstart if has_state else None, None, None, None, None, None


_operator.register_autograd(_gradients, setup_context=_save)


@register_flop_formula(torch.ops.headgate.gated_linear_attention_chunkwise)
def _flops(q_shape: Any, k_shape: Any, v_shape: Any, *args: Any, **kwargs: Any) -> int:
    """Of the recurrence, as for every backend: decay, write and read of the state."""
    return 6 * math.prod(q_shape) * v_shape[-1]


@register_flop_formula(torch.ops.headgate.gated_linear_attention_chunkwise_backward)
def _flops_backward(
    do_shape: Any, dfinal_shape: Any, q_shape: Any, k_shape: Any, v_shape: Any, *args: Any, **kwargs: Any
) -> int:
    return 18 * math.prod(q_shape) * v_shape[-1]


def _state_shape(q: Tensor, v: Tensor, cu_seqlens: Tensor | None) -> tuple[int, int, int, int]:
    return (q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1), q.shape[2], q.shape[3], v.shape[3]


class _Sizes(NamedTuple):
    """How a row of tokens is cut: ``chunks`` of ``subchunks`` of ``tokens``; the last ones may be partly empty."""

    chunks: int
    subchunks: int
    tokens: int


def _sizes(q: Tensor, cu_seqlens: Tensor | None, chunk_size: int, subchunk_size: int) -> _Sizes:
    length = q.shape[1]
    tokens = min(subchunk_size, chunk_size)
    if cu_seqlens is None:
        tokens = min(tokens, length)
        subchunks = -(-min(chunk_size, length) // tokens)
        return _Sizes(-(-length // (subchunks * tokens)), subchunks, tokens)
    # Every packed sequence begins a chunk of its own: one far longer than the sequences would be mostly empty.
    sequences = cu_seqlens.shape[0] - 1
    subchunks = -(-min(chunk_size, max(tokens, -(-length // sequences))) // tokens)
    chunk = subchunks * tokens
    return _Sizes((length + sequences * (chunk - 1)) // chunk, subchunks, tokens)


class _Packing(NamedTuple):
    """Which chunk holds what where sequences are packed, in the order of visiting.

    Attributes:
        slot: ``(length,)`` the place of each token in the row of chunks.
        sequence: ``(chunks,)`` the sequence that a chunk belongs to.
        first: ``(sequences,)`` the first chunk of each sequence.
        last: ``(sequences,)`` its last chunk.
        occupied: ``(sequences,)`` whether it has a token, and so a chunk, at all.
    """

    slot: Tensor
    sequence: Tensor
    first: Tensor
    last: Tensor
    occupied: Tensor


def _packing(cu_seqlens: Tensor | None, q: Tensor, sizes: _Sizes, reverse: bool) -> _Packing | None:
    if cu_seqlens is None:
        return None
    bounds = cu_seqlens.to(q.device, torch.int64)
    chunk = sizes.subchunks * sizes.tokens
    counts = (bounds.diff() + chunk - 1) // chunk
    ends = counts.cumsum(0)
    first = ends - counts
    position = torch.arange(q.shape[1], device=q.device)
    owner = torch.searchsorted(bounds, position, right=True) - 1
    place = bounds[owner + 1] - 1 - position if reverse else position - bounds[owner]
    # sizes.chunks is an upper bound; the chunks left over are empty, and go with the last sequence.
    index = torch.arange(sizes.chunks, device=q.device)
    sequence = torch.searchsorted(ends, index, right=True).clamp_max(counts.shape[0] - 1)
    last_chunk = (ends - 1).clamp_min(0)
    return _Packing(first[owner] * chunk + place, sequence, first.clamp_max(sizes.chunks - 1), last_chunk, counts > 0)


def _cut(x: Tensor, sizes: _Sizes, packing: _Packing | None, reverse: bool) -> Tensor:
    """``(batch, length, heads, channels)`` → ``(batch, heads, chunks, subchunks, tokens, channels)``, filled up with 0."""
    batch, length, heads, channels = x.shape
    slots = sizes.chunks * sizes.subchunks * sizes.tokens
    if packing is not None:
        x = x.new_zeros(batch, slots, heads, channels).index_copy(1, packing.slot, x)
    else:
        x = F.pad(x.flip(1) if reverse else x, (0, 0, 0, 0, 0, slots - length))
    return x.transpose(1, 2).reshape(batch, heads, *sizes, channels).contiguous()


def _join(x: Tensor, length: int, packing: _Packing | None, reverse: bool) -> Tensor:
    """The inverse of :func:`_cut`, contiguous."""
    x = x.flatten(2, 4).transpose(1, 2)
    if packing is not None:
        return x.index_select(1, packing.slot)
    x = x[:, :length]
    return (x.flip(1) if reverse else x).contiguous()


class _Decays(NamedTuple):
    """Products of gates over stretches of a chunk; each is the exponential of one sum of non-positive numbers.

    Attributes:
        step: the gate of each token, ``(..., subchunks, tokens, key)``.
        since: from the start of its sub-chunk through the token.
        until: from after the token to the end of its sub-chunk.
        lead: over all earlier sub-chunks of the chunk, ``(..., subchunks, 1, key)``.
        trail: over all later ones.
        gaps: for every sub-chunk i but the first, over what lies between each earlier one and it,
            ``(..., i, 1, key)``.
        chunk: over the whole chunk, ``(..., key, 1)``.
    """

    step: Tensor
    since: Tensor
    until: Tensor
    lead: Tensor
    trail: Tensor
    gaps: list[Tensor]
    chunk: Tensor


def _decays(log_gate: Tensor) -> _Decays:
    since = log_gate.cumsum(-2)
    whole = since[..., -1, :]
    none = torch.zeros_like(whole[..., :1, :])
    gaps, gap = [], none
    for i in range(1, whole.shape[-2]):
        gaps.append(gap.exp()[..., None, :])
        gap = torch.cat([gap + whole[..., i : i + 1, :], none], dim=-2)
    return _Decays(
        step=log_gate.exp(),
        since=since.exp(),
        until=_sum_after(log_gate).exp(),
        lead=_sum_before(whole).exp()[..., None, :],
        trail=_sum_after(whole).exp()[..., None, :],
        gaps=gaps,
        chunk=whole.sum(-2).exp()[..., None],
    )


def _sum_before(x: Tensor) -> Tensor:
    """Sums over all earlier entries of the last axis but one."""
    return F.pad(x[..., :-1, :], (0, 0, 1, 0)).cumsum(-2)


def _sum_after(x: Tensor) -> Tensor:
    """Sums over all later entries of the last axis but one."""
    return F.pad(x[..., 1:, :], (0, 0, 0, 1)).flip(-2).cumsum(-2).flip(-2)


def _pass_on(
    change: Tensor, kept: Tensor, start: Tensor, packing: _Packing | None, *, backwards: bool = False
) -> tuple[Tensor, Tensor]:
    """Carry a state over the chunks, ``state ← kept · state + change``.

    Args:
        change: ``(batch, heads, chunks, key, value)``.
        kept: ``(batch, heads, chunks, key, 1)``.
        start: ``(sequences, heads, key, value)``.
        packing: what is packed; every sequence enters with a state of its own.
        backwards: from the last chunk to the first.

    Returns:
        The state as it meets each chunk, shaped like ``change``, and that after each sequence, shaped like ``start``.
    """
    order = range(change.shape[2])
    order = order[::-1] if backwards else order
    changes, keeps = change.unbind(2), kept.unbind(2)
    met = list(changes)
    if packing is None:
        state = start
        for m in order:
            met[m] = state
            state = torch.addcmul(changes[m], keeps[m], state)
        return torch.stack(met, dim=2), state
    enters, leaves = (packing.last, packing.first) if backwards else (packing.first, packing.last)
    here = torch.arange(len(order), device=start.device) == enters[packing.sequence]
    entering = (here & packing.occupied[packing.sequence]).unbind(0)
    starts = start[packing.sequence].unbind(0)
    after = list(changes)
    state = torch.zeros_like(changes[0])
    for m in order:
        met[m] = torch.where(entering[m], starts[m], state)
        after[m] = state = torch.addcmul(changes[m], keeps[m], met[m])
    end = torch.cat(after)[leaves]
    return torch.stack(met, dim=2), torch.where(packing.occupied[:, None, None, None], end, start)


def _inner_scores(q: Tensor, k: Tensor, step: Tensor) -> Tensor:
    """P of the pairs inside each sub-chunk: ``(..., tokens, key)`` → ``(..., tokens, tokens)``, lower triangular."""
    tokens = q.shape[-2]
    faded = k  # the key of token j as token j + distance sees it
    bands = [(q * k).sum(-1)]
    for distance in range(1, tokens):
        faded = faded[..., :-1, :] * step[..., distance:, :]
        bands.append(F.pad((q[..., distance:, :] * faded).sum(-1), (distance, 0)))
    # Row i holds distances in falling order; read with rows one entry longer, row i moves right by i + 1 - tokens.
    rows = F.pad(torch.stack(bands[::-1], dim=-1), (1, 0))
    return rows.flatten(-2)[..., tokens:].unflatten(-1, (tokens, tokens))


def _flat(x: Tensor) -> Tensor:
    """Sub-chunks laid end to end: ``(..., subchunks, tokens, channels)`` → ``(..., chunk, channels)``."""
    return x.flatten(-3, -2)


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_gate: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    reverse: bool,
    sizes: _Sizes,
) -> tuple[Tensor, Tensor]:
    length = q.shape[1]
    packing = _packing(cu_seqlens, q, sizes, reverse)
    start = v.new_zeros(_state_shape(q, v, cu_seqlens)) if initial_state is None else initial_state
    q, k, v, log_gate = (_cut(x, sizes, packing, reverse) for x in (scale * q, k, v, log_gate))
    decays = _decays(log_gate)
    q_local, k_local = q * decays.since, k * decays.until
    written = _flat(k_local * decays.trail).mT @ _flat(v)
    states, final = _pass_on(written, decays.chunk, start, packing)
    rows = list((_inner_scores(q, k, decays.step) @ v).unbind(-3))
    for i, gap in enumerate(decays.gaps, start=1):
        scores = q_local[..., i, :, :] @ _flat(k_local[..., :i, :, :] * gap).mT
        rows[i] = rows[i] + scores @ _flat(v[..., :i, :, :])
    output = torch.stack(rows, dim=-3) + (_flat(q_local * decays.lead) @ states).view_as(v)
    return _join(output, length, packing, reverse), final


def _backward(
    do: Tensor,
    dfinal: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_gate: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    reverse: bool,
    sizes: _Sizes,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    length = q.shape[1]
    packing = _packing(cu_seqlens, q, sizes, reverse)
    none = v.new_zeros(_state_shape(q, v, cu_seqlens))
    start, dend = none if initial_state is None else initial_state, none if dfinal is None else dfinal
    q, k, v, log_gate, do = (_cut(x, sizes, packing, reverse) for x in (scale * q, k, v, log_gate, do))
    decays = _decays(log_gate)
    q_local, k_local = q * decays.since, k * decays.until
    q_read, k_written = q_local * decays.lead, k_local * decays.trail
    states, _ = _pass_on(_flat(k_written).mT @ _flat(v), decays.chunk, start, packing)
    dstates, dstart = _pass_on(_flat(q_read).mT @ _flat(do), decays.chunk, dend, packing, backwards=True)

    # What goes through the states: O = q_read S, S' = ... + k_writtenᵀ V.
    dq_local = (_flat(do) @ states.mT).view_as(q) * decays.lead
    dk_written = (_flat(v) @ dstates.mT).view_as(k)
    dv = (_flat(k_written) @ dstates).view_as(v) + _inner_scores(q, k, decays.step).mT @ do
    # Between sub-chunks: P_ij = q_local_i (k_local_j · gap)ᵀ.
    dk_local = torch.zeros_like(k)
    for i, gap in enumerate(decays.gaps, start=1):
        keys, q_i, do_i = _flat(k_local[..., :i, :, :] * gap), q_local[..., i, :, :], do[..., i, :, :]
        dscores = do_i @ _flat(v[..., :i, :, :]).mT
        dq_local[..., i, :, :] += dscores @ keys
        dk_local[..., :i, :, :] += (dscores.mT @ q_i).view_as(dk_local[..., :i, :, :]) * gap
        dv[..., :i, :, :] += (keys @ q_i.mT @ do_i).view_as(dv[..., :i, :, :])
    # Inside a sub-chunk, one diagonal of P at a time.
    dq, dk = dq_local * decays.since, dk_local * decays.until
    dinner = do @ v.mT
    decay = torch.ones_like(decays.step)
    for distance in range(1, sizes.tokens):
        decay = decay[..., :-1, :] * decays.step[..., distance:, :]
        dband = dinner.diagonal(-distance, -2, -1)[..., None]
        dq[..., distance:, :].addcmul_(dband, k[..., :-distance, :] * decay)
        dk[..., :-distance, :].addcmul_(dband, q[..., distance:, :] * decay)
    # d log α_t: a gate acts on every pair of a write before it and a read from it on. Both in this chunk: the sum from
    # t on of q ⊙ dq - k ⊙ dk, where a token's own pair (no gate between) is left out. The read after the chunk: the
    # writes before t. The write before the chunk: in q ⊙ dq. Neither in the chunk: the same for all of its tokens.
    pairs = _flat(q * dq - k * dk)
    across = (decays.chunk * states * dstates).sum(-1)[..., None, :]
    dlog_gate = pairs + _sum_after(pairs) + _sum_before(_flat(k_written * dk_written)) + across
    own = dinner.diagonal(0, -2, -1)[..., None]
    dq = dq + own * k
    dk = dk + own * q + dk_written * (decays.until * decays.trail)
    dq, dk, dv, dlog_gate = (
        _join(x, length, packing, reverse) for x in (scale * dq, dk, dv, dlog_gate.view_as(log_gate))
    )
    return dq, dk, dv, dlog_gate, dstart

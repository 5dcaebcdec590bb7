r"""Gated linear attention: a matrix-valued memory whose rows fade by a gate per key channel.

.. math:: S_t = \mathrm{diag}(e^{g_t})\, S_{t-1} + k_t^\top v_t, \qquad o_t = \mathrm{scale} \cdot q_t S_t

(Yang et al., "Gated linear attention transformers with hardware-efficient training", arXiv 2312.06635), and its
two-way form with one gate per direction (Liao et al., "ViG", arXiv 2405.18425). The cost is linear in the length.
"""

from __future__ import annotations

import importlib.util
import os
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from headgate.ops.autocast import without_autocast
from headgate.ops.gated_linear_attention import registration
from headgate.ops.gated_linear_attention.checks import check_log_gate_values, check_sequences, check_state, check_tokens
from headgate.ops.gated_linear_attention.chunkwise import recurrence_chunkwise
from headgate.ops.gated_linear_attention.decoding import GatedLinearAttentionState
from headgate.ops.gated_linear_attention.parallel import recurrence_parallel
from headgate.ops.gated_linear_attention.reference import recurrence_reference
from headgate.ops.gated_linear_attention.registration import state_dtype

__all__ = [
    "GatedLinearAttentionOutput",
    "GatedLinearAttentionState",
    "bidirectional_gated_linear_attention",
    "gated_linear_attention",
    "gated_linear_attention_backends",
]

BackendName = Literal["auto", "reference", "parallel", "chunk", "native", "triton"]

_LOWEST_LOG_GATE = -1e4
"""e to this power is zero in every dtype; it keeps -inf out of the differences of cumulative sums."""


class GatedLinearAttentionOutput(NamedTuple):
    """The outputs, and the state after the last visited token (``None`` unless it was asked for)."""

    output: Float[Tensor, "batch length heads value"]
    state: Float[Tensor, "sequences heads key value"] | None


def gated_linear_attention_backends(device: torch.device | str = "cpu") -> dict[str, str]:
    """Which backends can run on ``device``: name → ``""``, or the reason why it cannot."""
    kind = torch.device(device).type
    reasons = {"reference": "", "parallel": "", "chunk": ""}
    reasons["native"] = "" if kind in ("cpu", "meta") else f"runs on the CPU only, not on {kind}"
    if importlib.util.find_spec("triton") is None:
        reasons["triton"] = "the package triton is not installed"
    elif kind in ("cuda", "xpu", "meta") or os.environ.get("TRITON_INTERPRET") == "1":
        reasons["triton"] = ""
    else:
        reasons["triton"] = f"needs a GPU, not {kind} (or TRITON_INTERPRET=1, to test it)"
    return reasons


def _choose(backend: BackendName, q: Tensor) -> BackendName:
    reasons = gated_linear_attention_backends(q.device)
    if backend == "auto":
        if q.device.type in ("cpu", "meta"):
            return "native"
        return "triton" if q.dtype != torch.float64 and not reasons["triton"] else "chunk"
    if backend not in reasons:
        raise ValueError(f"backend must be 'auto' or one of {', '.join(map(repr, reasons))}, got {backend!r}")
    if reasons[backend]:
        raise ValueError(f"backend {backend!r} cannot run here: {reasons[backend]}")
    return backend


def _common_dtype(q: Tensor, k: Tensor, v: Tensor) -> torch.dtype:
    return torch.promote_types(torch.promote_types(q.dtype, k.dtype), v.dtype)


def _in_one_dtype(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Under autocast they may differ; the widest one loses nothing."""
    dtype = _common_dtype(q, k, v)
    return q.to(dtype), k.to(dtype), v.to(dtype)


def gated_linear_attention(
    q: Float[Tensor, "batch length heads key"],
    k: Float[Tensor, "batch length heads key"],
    v: Float[Tensor, "batch length heads value"],
    log_gate: Float[Tensor, "batch length heads key"],
    *,
    scale: float | None = None,
    initial_state: Float[Tensor, "sequences heads key value"] | None = None,
    return_state: bool = False,
    reverse: bool = False,
    cu_seqlens: Int[Tensor, " sequences_plus_one"] | None = None,
    backend: BackendName = "auto",
    chunk_size: int = 64,
    subchunk_size: int = 16,
) -> GatedLinearAttentionOutput:
    """Read a memory that every token first fades, channel by channel, and then writes to.

    Args:
        q: queries ``(batch, length, heads, key)``.
        k: keys, shaped like ``q``.
        v: values ``(batch, length, heads, value)``.
        log_gate: logarithm of the gates, at most 0, shaped like ``q``; below -1e4 (so -inf, too) it counts as -1e4.
            It may have another floating dtype than ``q``.
        scale: factor on the queries; default ``key ** -0.5``.
        initial_state: ``(sequences, heads, key, value)``, the memory before the first visited token, in float32
            (float64 for float64 inputs); zeros if ``None``. There is one per batch row, or per packed sequence.
        return_state: whether to return the memory after the last visited token.
        reverse: visit the tokens from the last one to the first; a token's gate still acts before its own write.
        cu_seqlens: ``(sequences + 1,)`` rising boundaries from 0 to ``length`` of sequences packed along one batch row;
            none of them sees another one.
        backend: ``"auto"``: native on a CPU, Triton on a GPU, chunkwise elsewhere. ``"reference"``: the definition as
            a loop over time. ``"parallel"``: quadratic in the length. ``"chunk"``: blocks of matrix products in plain
            PyTorch. ``"native"``: compiled for this CPU. ``"triton"``: GPU kernels.
            :func:`gated_linear_attention_backends` tells which of them run here.
        chunk_size: tokens per block of the chunkwise backend.
        subchunk_size: tokens per block within a block, of the chunkwise backend.

    Returns:
        ``output`` ``(batch, length, heads, value)`` in the dtype of ``v``; ``state``
        ``(sequences, heads, key, value)`` or ``None``. All arithmetic is in float32 (float64 for float64 inputs).

    Raises:
        TypeError: no floating tensors, q, k and v of different dtypes, or a state in another dtype.
        ValueError: a shape does not fit, no tokens, a gate above one, bad boundaries, or a backend that cannot run here.
    """
    check_tokens(q, k, v, {"log_gate": log_gate})
    check_log_gate_values("log_gate", log_gate)
    batch, length, heads, key_dim = q.shape
    sequences = batch
    if cu_seqlens is not None:
        check_sequences(cu_seqlens, batch, length)
        sequences = cu_seqlens.shape[0] - 1
    dtype = v.dtype
    wide = state_dtype(_common_dtype(q, k, v))
    if initial_state is not None:
        check_state(initial_state, sequences, heads, key_dim, v.shape[-1], wide)
    scale = key_dim**-0.5 if scale is None else float(scale)
    name = _choose(backend, q)
    if name in registration.BACKENDS:
        q, k, wide_v = _in_one_dtype(q, k, v)
        output, state = torch.ops.headgate.gated_linear_attention(
            q, k, wide_v, log_gate, initial_state, cu_seqlens, scale, reverse, name
        )
        return GatedLinearAttentionOutput(output.to(dtype), state if return_state else None)
    tokens = (q.to(wide), k.to(wide), v.to(wide), log_gate.to(wide).clamp_min(_LOWEST_LOG_GATE))
    with without_autocast(q.device):
        if name == "chunk":
            output, state = recurrence_chunkwise(
                *tokens, scale, initial_state, cu_seqlens, reverse, chunk_size=chunk_size, subchunk_size=subchunk_size
            )
        elif name == "parallel":
            output, state = recurrence_parallel(*tokens, scale, initial_state, cu_seqlens, reverse)
        else:
            output, state = recurrence_reference(*tokens, scale, initial_state, cu_seqlens, reverse)
    return GatedLinearAttentionOutput(output.to(dtype), state if return_state else None)


def bidirectional_gated_linear_attention(
    q: Float[Tensor, "batch length heads key"],
    k: Float[Tensor, "batch length heads key"],
    v: Float[Tensor, "batch length heads value"],
    log_gate_forward: Float[Tensor, "batch length heads key"],
    log_gate_backward: Float[Tensor, "batch length heads key"],
    *,
    scale: float | None = None,
    cu_seqlens: Int[Tensor, " sequences_plus_one"] | None = None,
    backend: BackendName = "auto",
    chunk_size: int = 64,
    subchunk_size: int = 16,
) -> Float[Tensor, "batch length heads value"]:
    """The mean of a scan from the first token to the last and one from the last to the first.

    Both scans read the same queries, keys and values; only the gates differ. Every token's own write counts in both
    (ViG, section 3.3).

    Args:
        q: queries ``(batch, length, heads, key)``.
        k: keys, shaped like ``q``.
        v: values ``(batch, length, heads, value)``.
        log_gate_forward: logarithm of the gates of the forward scan, at most 0, shaped like ``q``.
        log_gate_backward: the same for the backward scan.
        scale: factor on the queries; default ``key ** -0.5``.
        cu_seqlens: boundaries of packed sequences, as in :func:`gated_linear_attention`.
        backend: as in :func:`gated_linear_attention`.
        chunk_size: as in :func:`gated_linear_attention`.
        subchunk_size: as in :func:`gated_linear_attention`.

    Returns:
        ``(batch, length, heads, value)`` in the dtype of ``v``.

    Raises:
        TypeError: no floating tensors, or q, k and v of different dtypes.
        ValueError: a shape does not fit, no tokens, a gate above one, bad boundaries, or a backend that cannot run here.
    """
    gates = {"log_gate_forward": log_gate_forward, "log_gate_backward": log_gate_backward}
    check_tokens(q, k, v, gates)
    for name, log_gate in gates.items():
        check_log_gate_values(name, log_gate)
    if cu_seqlens is not None:
        check_sequences(cu_seqlens, q.shape[0], q.shape[1])
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    name = _choose(backend, q)
    if name in registration.BACKENDS:
        q, k, wide_v = _in_one_dtype(q, k, v)
        return torch.ops.headgate.bidirectional_gated_linear_attention(
            q, k, wide_v, log_gate_forward, log_gate_backward, cu_seqlens, scale, name
        ).to(v.dtype)
    scans = [
        gated_linear_attention(
            q,
            k,
            v,
            log_gate,
            scale=scale,
            reverse=reverse,
            cu_seqlens=cu_seqlens,
            backend=name,
            chunk_size=chunk_size,
            subchunk_size=subchunk_size,
        ).output
        for log_gate, reverse in ((log_gate_forward, False), (log_gate_backward, True))
    ]
    return (scans[0] + scans[1]) / 2

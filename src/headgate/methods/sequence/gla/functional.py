"""The recurrence itself as one function, with the arguments of the published code."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, NamedTuple

from jaxtyping import Float, Int
from torch import Tensor

from headgate.ops import gated_linear_attention

__all__ = ["GLAOutput", "gla"]

_BACKENDS: Mapping[str, Literal["auto", "chunk", "reference", "parallel"]] = {
    "auto": "auto",
    "chunk": "chunk",
    "recurrent": "reference",
    "parallel": "parallel",
}


class GLAOutput(NamedTuple):
    """The outputs, and the memory after the last visited token (``None`` unless it was asked for)."""

    output: Float[Tensor, "batch length heads value"]
    state: Float[Tensor, "sequences heads key value"] | None


def gla(
    q: Float[Tensor, "batch length heads key"],
    k: Float[Tensor, "batch length heads key"],
    v: Float[Tensor, "batch length heads value"],
    gk: Float[Tensor, "batch length heads key"],
    *,
    scale: float | None = None,
    initial_state: Float[Tensor, "sequences heads key value"] | None = None,
    return_state: bool = False,
    cu_seqlens: Int[Tensor, " sequences_plus_one"] | None = None,
    mode: Literal["auto", "chunk", "recurrent", "parallel"] = "auto",
    chunk_size: int = 64,
    subchunk_size: int = 16,
    reverse: bool = False,
) -> GLAOutput:
    r"""Gated linear attention: :math:`S_t = \mathrm{diag}(e^{g_t}) S_{t-1} + k_t^\top v_t,\; o_t = \mathrm{scale} \cdot q_t S_t`.

    (Yang et al., arXiv 2312.06635, equation 3.) Layout and arguments are those of flash-linear-attention from 0.2 on;
    older releases had the heads before the length.

    Args:
        q: queries ``(batch, length, heads, key)``.
        k: keys, shaped like ``q``.
        v: values ``(batch, length, heads, value)``.
        gk: g, the logarithm of the gates, at most 0, shaped like ``q``.
        scale: factor on the queries; default ``key ** -0.5``.
        initial_state: the memory before the first visited token, ``(sequences, heads, key, value)`` in float32 (float64
            for float64 inputs); zeros if ``None``.
        return_state: whether to return the memory after the last visited token.
        cu_seqlens: ``(sequences + 1,)`` rising boundaries from 0 to ``length`` of sequences packed in one batch row.
        mode: ``"auto"``: the fastest way on the device. ``"chunk"``: blocks of matrix products. ``"recurrent"``: the
            definition, token by token. ``"parallel"``: all pairs of tokens, for short sequences. All compute the same.
        chunk_size: tokens per block in mode ``"chunk"``.
        subchunk_size: tokens per block within a block.
        reverse: visit the tokens from the last one to the first.

    Returns:
        ``output`` ``(batch, length, heads, value)`` in the dtype of ``v``, and ``state`` ``(sequences, heads, key, value)``
        or ``None``.

    Raises:
        TypeError: no floating tensors, q, k and v of different dtypes, or a state in another dtype.
        ValueError: a shape does not fit, no tokens, a gate above one, bad boundaries, or an unknown mode.
    """
    if mode not in _BACKENDS:
        raise ValueError(f"mode must be one of {', '.join(_BACKENDS)}, got {mode!r}")
    output, state = gated_linear_attention(
        q,
        k,
        v,
        gk,
        scale=scale,
        initial_state=initial_state,
        return_state=return_state,
        reverse=reverse,
        cu_seqlens=cu_seqlens,
        backend=_BACKENDS[mode],
        chunk_size=chunk_size,
        subchunk_size=subchunk_size,
    )
    return GLAOutput(output, state)

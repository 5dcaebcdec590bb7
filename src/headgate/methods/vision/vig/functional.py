"""Gated linear attention in both directions, as a function (arXiv 2405.18425, direction-wise gating)."""

from __future__ import annotations

from jaxtyping import Float, Int
from torch import Tensor

from headgate.ops import bidirectional_gated_linear_attention
from headgate.ops.gated_linear_attention import BackendName

__all__ = ["gla_bidirectional"]


def gla_bidirectional(
    q: Float[Tensor, "batch length heads key"],
    k: Float[Tensor, "batch length heads key"],
    v: Float[Tensor, "batch length heads value"],
    gk_fwd: Float[Tensor, "batch length heads key"],
    gk_bwd: Float[Tensor, "batch length heads key"],
    *,
    scale: float | None = None,
    cu_seqlens: Int[Tensor, " sequences_plus_one"] | None = None,
    backend: BackendName = "auto",
) -> Float[Tensor, "batch length heads value"]:
    """The mean of a forward and a backward scan that share everything but their gates.

    It is :func:`headgate.ops.bidirectional_gated_linear_attention` under the argument names of the published code.

    Args:
        q: queries ``(batch, length, heads, key)``.
        k: keys, shaped like ``q``.
        v: values ``(batch, length, heads, value)``.
        gk_fwd: logarithms of the forward scan's gates, at most 0, shaped like ``q``.
        gk_bwd: the same for the backward scan.
        scale: factor on the queries; default ``key ** -0.5``.
        cu_seqlens: ``(sequences + 1,)`` boundaries of sequences packed along one batch row.
        backend: implementation, see :func:`headgate.ops.gated_linear_attention`.

    Returns:
        ``(batch, length, heads, value)`` in the dtype of ``v``.

    Raises:
        TypeError: no floating tensors, or q, k and v of different dtypes.
        ValueError: a shape does not fit, no tokens, a gate above one, bad boundaries, or a backend that cannot run here.
    """
    return bidirectional_gated_linear_attention(
        q, k, v, gk_fwd, gk_bwd, scale=scale, cu_seqlens=cu_seqlens, backend=backend
    )

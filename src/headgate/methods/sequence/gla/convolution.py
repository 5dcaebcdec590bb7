"""A short convolution over one or several sequences that may go on where an earlier call stopped."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from headgate.methods.sequence.gla.padding import Packing
from headgate.nn import ShortConvolution

__all__ = ["convolve"]


def convolve(
    convolution: ShortConvolution,
    x: Float[Tensor, "batch length dim"],
    recent: Float[Tensor, "sequences span dim"] | None = None,
    packing: Packing | None = None,
) -> tuple[Float[Tensor, "batch length dim"], Float[Tensor, "sequences span dim"]]:
    """Convolve every sequence by itself.

    Args:
        convolution: the taps, K per channel.
        x: tokens ``(batch, length, dim)``.
        recent: the K - 1 tokens before, per sequence; zeros if ``None``.
        packing: where several sequences lie in one batch row; ``None`` for one per row.

    Returns:
        The convolved tokens, and the last K - 1 tokens of every sequence, for the next call.
    """
    span = convolution.kernel_size - 1
    sequences = x.shape[0] if packing is None else packing.cu_seqlens.shape[0] - 1
    if recent is None:
        recent = x.new_zeros(sequences, span, x.shape[2])
    if packing is None:
        extended = torch.cat([recent.to(x.dtype), x], dim=1)
        # A copy: a view would keep the whole prompt in memory for as long as its last tokens.
        return convolution(extended)[:, span:], extended[:, extended.shape[1] - span :].clone()
    # Room for K - 1 earlier tokens in front of every sequence, so that no convolution reaches across a boundary.
    bounds = packing.cu_seqlens.to(x.device, torch.int64)
    room = torch.arange(sequences, device=x.device)[:, None] * span + torch.arange(span, device=x.device)
    position = torch.arange(x.shape[1], device=x.device)
    position = position + (torch.searchsorted(bounds, position, right=True)) * span
    extended = x.new_zeros(1, x.shape[1] + sequences * span, x.shape[2])
    extended = extended.index_copy(1, (bounds[:-1, None] + room).flatten(), recent.to(x.dtype).flatten(0, 1)[None])
    extended = extended.index_copy(1, position, x)
    return convolution(extended)[:, position], extended[0, bounds[1:, None] + room]

r"""Gated linear attention as one masked matrix product, quadratic in the length.

With :math:`b_t = \sum_{j \le t} g_j`, per channel,

.. math:: P_{ij} = \mathrm{scale} \sum_c q_{ic}\, k_{jc}\, e^{b_{ic} - b_{jc}} \;(j \le i), \qquad O = P V + \mathrm{scale}\,(Q \odot e^{b})\, S_0

(arXiv 2312.06635, section 4.1). :math:`e^{b}` and :math:`e^{-b}` alone leave the range of floats after some dozens of
tokens, and :math:`b_i - b_j` loses its digits after one closed gate: so the gates between each two tokens are added up.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

__all__ = ["recurrence_parallel"]


def recurrence_parallel(
    q: Float[Tensor, "batch length heads key"],
    k: Float[Tensor, "batch length heads key"],
    v: Float[Tensor, "batch length heads value"],
    log_gate: Float[Tensor, "batch length heads key"],
    scale: float,
    initial_state: Float[Tensor, "sequences heads key value"] | None = None,
    cu_seqlens: Int[Tensor, " sequences_plus_one"] | None = None,
    reverse: bool = False,
) -> tuple[Float[Tensor, "batch length heads value"], Float[Tensor, "sequences heads key value"]]:
    """All pairs of tokens at once; arguments and results as in :func:`recurrence_reference`.

    The memory grows with ``length² · key``: for short sequences and for tests.
    """
    q, k, v, log_gate = (x.flip(1) if reverse else x for x in (q, k, v, log_gate))
    batch, length = q.shape[:2]
    position = torch.arange(length, device=q.device)
    owner = torch.zeros_like(position)
    if cu_seqlens is not None:
        owner = torch.searchsorted(cu_seqlens.to(q.device, torch.int64), position, right=True) - 1
        owner = owner.flip(0) if reverse else owner
    sequences = 1 if cu_seqlens is None else cu_seqlens.shape[0] - 1
    member = (owner == torch.arange(sequences, device=q.device)[:, None]).to(q.dtype)

    together = owner[:, None] == owner
    later = together & (position[:, None] > position)
    visible = together & (position[:, None] >= position)
    # [i, j] = the sum of the gates after token j through token i
    between = torch.where(later[:, :, None, None], log_gate[:, :, None], 0.0).cumsum(1)
    weights = between.masked_fill(~visible[:, :, None, None], -torch.inf).exp()
    scores = torch.einsum("bihk,bjhk,bijhk->bhij", scale * q, k, weights)
    output = torch.einsum("bhij,bjhv->bihv", scores, v)
    until_end = torch.einsum("ij,bihk->bjhk", later.to(q.dtype), log_gate)
    final = torch.einsum("nj,bjhk,bjhv->bnhkv", member, k * until_end.exp(), v)
    if initial_state is not None:
        states = initial_state.unflatten(0, (batch, sequences))
        since_start = torch.einsum("ij,bjhk->bihk", visible.to(q.dtype), log_gate)
        output = output + torch.einsum("ni,bihk,bnhkv->bihv", member, scale * q * since_start.exp(), states)
        final = final + torch.einsum("nj,bjhk->bnhk", member, log_gate).exp()[..., None] * states
    return (output.flip(1) if reverse else output), final.flatten(0, 1)

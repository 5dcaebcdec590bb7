r"""The definition of gated linear attention as a loop over time; every other backend is tested against it.

.. math:: S_t = \mathrm{diag}(e^{g_t})\, S_{t-1} + k_t^\top v_t, \qquad o_t = \mathrm{scale} \cdot q_t S_t

(Yang et al., arXiv 2312.06635, equation 3, with :math:`g_t = \log \alpha_t \le 0`).
"""

from __future__ import annotations

from itertools import pairwise

import torch
from jaxtyping import Float, Int
from torch import Tensor

__all__ = ["recurrence_reference"]


def recurrence_reference(
    q: Float[Tensor, "batch length heads key"],
    k: Float[Tensor, "batch length heads key"],
    v: Float[Tensor, "batch length heads value"],
    log_gate: Float[Tensor, "batch length heads key"],
    scale: float,
    initial_state: Float[Tensor, "sequences heads key value"] | None = None,
    cu_seqlens: Int[Tensor, " sequences_plus_one"] | None = None,
    reverse: bool = False,
) -> tuple[Float[Tensor, "batch length heads value"], Float[Tensor, "sequences heads key value"]]:
    """Run the recurrence one token at a time; differentiable through autograd.

    Args:
        q, k, v, log_gate: inputs, all in the dtype of the computation.
        scale: factor on the queries.
        initial_state: the state before the first token that is visited; zeros if ``None``.
        cu_seqlens: boundaries of the sequences that are packed in one batch row; ``None`` for one sequence per row.
        reverse: visit the tokens from the last one to the first.

    Returns:
        The outputs and the state after the last visited token.
    """
    if cu_seqlens is not None:
        bounds = cu_seqlens.tolist()
        parts = [
            recurrence_reference(
                q[:, start:end],
                k[:, start:end],
                v[:, start:end],
                log_gate[:, start:end],
                scale,
                None if initial_state is None else initial_state[n : n + 1],
                reverse=reverse,
            )
            for n, (start, end) in enumerate(pairwise(bounds))
        ]
        return torch.cat([o for o, _ in parts], dim=1), torch.cat([state for _, state in parts])
    batch, length, heads, key_dim = k.shape
    state = k.new_zeros(batch, heads, key_dim, v.shape[-1]) if initial_state is None else initial_state
    outputs = list(v.unbind(1))
    for t in reversed(range(length)) if reverse else range(length):
        state = log_gate[:, t].exp()[..., None] * state + k[:, t, :, :, None] * v[:, t, :, None, :]
        outputs[t] = torch.einsum("bhk,bhkv->bhv", scale * q[:, t], state)
    return torch.stack(outputs, dim=1) if length else torch.zeros_like(v), state

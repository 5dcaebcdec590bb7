r"""One token at a time: constant time and memory, however long the past.

.. math:: S \leftarrow \mathrm{diag}(e^{g})\, S + k^\top v, \qquad o = \mathrm{scale} \cdot q S

(arXiv 2312.06635, equation 3).
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from headgate.ops.autocast import without_autocast
from headgate.ops.gated_linear_attention.checks import check_log_gate_values
from headgate.ops.gated_linear_attention.registration import state_dtype
from headgate.validate import check_floating, check_positive, check_shape

__all__ = ["GatedLinearAttentionState"]


class GatedLinearAttentionState:
    """The memory of a batch of sequences that are being decoded.

    Start from an empty one, or from the state that :func:`gated_linear_attention` returns for a prompt::

        output, final = gated_linear_attention(q, k, v, log_gate, return_state=True)
        state = GatedLinearAttentionState(final)
        o = state.step(q_next, k_next, v_next, log_gate_next)

    Args:
        value: ``(batch, heads, key, value)`` in float32 or float64. It is copied, then changed in place.

    Attributes:
        value: the memory after the last token.
    """

    def __init__(self, value: Float[Tensor, "batch heads key value"]) -> None:
        check_shape("value", value, (None, None, None, None), "batch, heads, key, value")
        if value.dtype not in (torch.float32, torch.float64):
            raise TypeError(
                f"value must be float32 or float64, got {value.dtype}: a state in fewer bits loses old tokens"
            )
        self.value = value.detach().clone(memory_format=torch.contiguous_format)

    @classmethod
    def empty(
        cls,
        batch: int,
        num_heads: int,
        key_dim: int,
        value_dim: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> GatedLinearAttentionState:
        """A memory that has seen nothing.

        Raises:
            TypeError: another dtype than float32 or float64.
            ValueError: a size below one.
        """
        check_positive(batch=batch, num_heads=num_heads, key_dim=key_dim, value_dim=value_dim)
        return cls(torch.zeros(batch, num_heads, key_dim, value_dim, device=device, dtype=dtype))

    @torch.no_grad()
    def step(
        self,
        q: Float[Tensor, "batch heads key"],
        k: Float[Tensor, "batch heads key"],
        v: Float[Tensor, "batch heads value"],
        log_gate: Float[Tensor, "batch heads key"],
        *,
        scale: float | None = None,
    ) -> Float[Tensor, "batch heads value"]:
        """Fade, write, read: one token of every sequence. No gradients are kept.

        Args:
            q: queries ``(batch, heads, key)``.
            k: keys, shaped like ``q``.
            v: values ``(batch, heads, value)``.
            log_gate: logarithm of the gates, at most 0, shaped like ``q``.
            scale: factor on the queries; default ``key ** -0.5``.

        Returns:
            ``(batch, heads, value)`` in the dtype of ``v``.

        Raises:
            TypeError: no floating tensors, or inputs that need more bits than the state has.
            ValueError: a shape does not fit, or a gate above one.
        """
        batch, heads, key_dim, value_dim = self.value.shape
        for name, tensor, size in (
            ("q", q, key_dim),
            ("k", k, key_dim),
            ("v", v, value_dim),
            ("log_gate", log_gate, key_dim),
        ):
            check_shape(name, tensor, (batch, heads, size), "batch, heads, channels")
            check_floating(name, tensor)
            if tensor.dtype == torch.float64 and state_dtype(tensor.dtype) != self.value.dtype:
                raise TypeError(f"{name} is {tensor.dtype}, but the state is {self.value.dtype}")
        check_log_gate_values("log_gate", log_gate)
        wide = self.value.dtype
        scale = key_dim**-0.5 if scale is None else float(scale)
        with without_autocast(v.device):
            # S + (e^g - 1) S: gates just below one, rounded, would all err to the same side for thousands of tokens
            self.value.addcmul_(self.value, torch.expm1(log_gate.to(wide))[..., None])
            self.value.addcmul_(k.to(wide)[..., None], v.to(wide)[..., None, :])
            output = torch.matmul(q.to(wide)[..., None, :], self.value)[..., 0, :]
        return output.mul_(scale).to(v.dtype)

    def select(self, rows: Tensor) -> GatedLinearAttentionState:
        """The memories of some sequences, in the order of ``rows`` ``(selected,)``: beam search, or a shrinking batch."""
        return GatedLinearAttentionState(self.value[rows])

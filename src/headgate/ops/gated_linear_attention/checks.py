"""What the arguments of gated linear attention must be, checked before any backend sees them."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from headgate.validate import check_floating, check_integer, check_shape

__all__ = ["check_log_gate_values", "check_sequences", "check_state", "check_tokens"]

_AXES = "batch, length, heads, channels"


def check_tokens(q: Tensor, k: Tensor, v: Tensor, log_gates: dict[str, Tensor]) -> None:
    """Check the inputs that have one entry per token: ranks, equal sizes, dtypes, at least one token.

    Raises:
        TypeError: no floating tensor, or q, k and v of different dtypes.
        ValueError: a shape does not fit.
    """
    check_shape("q", q, (None, None, None, None), _AXES)
    batch, length, heads, key_dim = q.shape
    check_shape("k", k, (batch, length, heads, key_dim), _AXES)
    check_shape("v", v, (batch, length, heads, None), _AXES)
    for name, tensor in {"q": q, "k": k, "v": v}.items():
        check_floating(name, tensor)
    if not q.dtype == k.dtype == v.dtype and not torch.is_autocast_enabled(q.device.type):
        raise TypeError(f"q, k and v must share one dtype, got {q.dtype}, {k.dtype} and {v.dtype}")
    for name, log_gate in log_gates.items():
        check_shape(name, log_gate, (batch, length, heads, key_dim), _AXES)
        check_floating(name, log_gate)
    for name, size in {
        "length": length,
        "heads": heads,
        "key channels": key_dim,
        "value channels": v.shape[-1],
    }.items():
        if size == 0:
            raise ValueError(
                f"q, k and v must have at least one entry along {name}, got {tuple(q.shape)} and {tuple(v.shape)}"
            )


def check_log_gate_values(name: str, log_gate: Tensor) -> None:
    """Check that no gate exceeds one, which is what a gate passed in place of its logarithm does.

    The values are looked at on a CPU and outside of tracing only; a look at a GPU's memory would stop its queue.

    Raises:
        ValueError: a value above zero.
    """
    if (
        torch.compiler.is_compiling()
        or log_gate.device.type != "cpu"
        or type(log_gate) is not Tensor
        or not log_gate.numel()
    ):
        return
    largest = float(log_gate.detach().amax())
    if largest > 0:
        raise ValueError(
            f"{name} must hold logarithms of gates in (0, 1], so be at most 0; got {largest:.4g} (pass log(gate), e.g. logsigmoid(logits))"
        )


def check_sequences(cu_seqlens: Tensor, batch: int, length: int) -> None:
    """Check the boundaries of packed sequences.

    Raises:
        TypeError: no integer tensor.
        ValueError: wrong shape, more than one batch row, or boundaries that do not run from 0 to ``length``.
    """
    check_shape("cu_seqlens", cu_seqlens, (None,), "sequences + 1")
    check_integer("cu_seqlens", cu_seqlens)
    if batch != 1:
        raise ValueError(f"cu_seqlens packs all sequences in one batch row, so batch must be 1, got batch={batch}")
    if cu_seqlens.shape[0] < 2:
        raise ValueError(f"cu_seqlens must have at least two boundaries, got {cu_seqlens.shape[0]}")
    if torch.compiler.is_compiling() or cu_seqlens.device.type != "cpu" or type(cu_seqlens) is not Tensor:
        return
    bounds = cu_seqlens.tolist()
    if bounds[0] != 0 or bounds[-1] != length or any(a > b for a, b in pairwise(bounds)):
        raise ValueError(f"cu_seqlens must rise from 0 to the length {length}, got {bounds}")


def check_state(
    initial_state: Tensor, sequences: int, heads: int, key_dim: int, value_dim: int, dtype: torch.dtype
) -> None:
    """Check a state: one per sequence, in the dtype of the computation.

    Raises:
        TypeError: another dtype than ``dtype``.
        ValueError: a shape does not fit.
    """
    if isinstance(initial_state, Tensor) and initial_state.dim() == 4 and initial_state.shape[0] != sequences:
        raise ValueError(f"initial_state must hold one state per sequence ({sequences}), got {initial_state.shape[0]}")
    check_shape("initial_state", initial_state, (sequences, heads, key_dim, value_dim), "sequences, heads, key, value")
    if initial_state.dtype != dtype:
        raise TypeError(
            f"initial_state must be {dtype}, got {initial_state.dtype}: a state in fewer bits loses old tokens"
        )

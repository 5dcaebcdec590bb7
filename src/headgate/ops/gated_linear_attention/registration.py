"""The operators that PyTorch sees: one forward and one backward, for the backends that bring their own gradients.

They are opaque to autograd, ``torch.compile``, ``torch.export`` and FLOP counters, so each of these is told here what
it needs to know: the shapes of the results, the gradients, and the arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

__all__ = ["BACKENDS", "Backend", "state_dtype"]


@dataclass(frozen=True)
class Backend:
    """One implementation with gradients of its own.

    Attributes:
        forward: ``(q, k, v, log_gate, initial_state, cu_seqlens, scale, reverse) -> (o, final_state)``.
        backward: ``(do, dstate, q, k, v, log_gate, initial_state, final_state, cu_seqlens, scale, reverse)
            -> (dq, dk, dv, dlog_gate, dinitial_state)``; ``dstate`` is ``None`` where the final state is not used, and
            ``dinitial_state`` is wanted only where ``initial_state`` is given.
        bidirectional: ``(q, k, v, log_gate_forward, log_gate_backward, cu_seqlens, scale) -> o``.
        bidirectional_backward: ``(do, q, k, v, log_gate_forward, log_gate_backward, cu_seqlens, scale)
            -> (dq, dk, dv, dlog_gate_forward, dlog_gate_backward)``.

    Outputs have the shape, and outputs and gradients the dtype, of what they belong to, and are contiguous; states have
    the dtype of :func:`state_dtype`. Inputs may be strided in any way.
    """

    forward: Callable[..., tuple[Tensor, Tensor]]
    backward: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]]
    bidirectional: Callable[..., Tensor]
    bidirectional_backward: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor, Tensor]]


def _load_native() -> Backend:
    from headgate.ops.gated_linear_attention import native

    return Backend(native.forward, native.backward, native.bidirectional, native.bidirectional_backward)


def _load_triton() -> Backend:
    from headgate.ops.gated_linear_attention import triton_backend as triton

    return Backend(triton.forward, triton.backward, triton.bidirectional, triton.bidirectional_backward)


BACKENDS: dict[str, Callable[[], Backend]] = {"native": _load_native, "triton": _load_triton}
"""Loaded at the first call: numba and Triton are slow to import."""

_loaded: dict[str, Backend] = {}


def _backend(name: str) -> Backend:
    if name not in _loaded:
        _loaded[name] = BACKENDS[name]()
    return _loaded[name]


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of states and of the arithmetic: float64 for float64 inputs, float32 for all others."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _sequences(q: Tensor, cu_seqlens: Tensor | None) -> int:
    return q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1


def _new(like: Tensor) -> Tensor:
    return torch.empty(like.shape, dtype=like.dtype, device=like.device)


for _name, _schema in {
    "gated_linear_attention": (
        "(Tensor q, Tensor k, Tensor v, Tensor log_gate, Tensor? initial_state, Tensor? cu_seqlens, float scale, bool reverse, str backend"
        ") -> (Tensor, Tensor)"
    ),
    "gated_linear_attention_backward": (
        "(Tensor do, Tensor? dstate, Tensor q, Tensor k, Tensor v, Tensor log_gate, Tensor? initial_state, Tensor final_state, Tensor? cu_seqlens, float scale, bool reverse, str backend"
        ") -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
    ),
    "bidirectional_gated_linear_attention": (
        "(Tensor q, Tensor k, Tensor v, Tensor log_gate_forward, Tensor log_gate_backward, Tensor? cu_seqlens, float scale, str backend"
        ") -> Tensor"
    ),
    "bidirectional_gated_linear_attention_backward": (
        "(Tensor do, Tensor q, Tensor k, Tensor v, Tensor log_gate_forward, Tensor log_gate_backward, Tensor? cu_seqlens, float scale, str backend"
        ") -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
    ),
}.items():
    torch.library.define(f"headgate::{_name}", _schema)


@torch.library.impl("headgate::gated_linear_attention", "default")
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_gate: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    reverse: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    return _backend(backend).forward(q, k, v, log_gate, initial_state, cu_seqlens, scale, reverse)


@torch.library.register_fake("headgate::gated_linear_attention")
def _forward_fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_gate: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    reverse: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    state = q.new_empty(_sequences(q, cu_seqlens), q.shape[2], q.shape[3], v.shape[3], dtype=state_dtype(q.dtype))
    return _new(v), state


@torch.library.impl("headgate::gated_linear_attention_backward", "default")
def _backward(
    do: Tensor,
    dstate: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_gate: Tensor,
    initial_state: Tensor | None,
    final_state: Tensor,
    cu_seqlens: Tensor | None,
    scale: float,
    reverse: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    dq, dk, dv, dgate, dinitial = _backend(backend).backward(
        do, dstate, q, k, v, log_gate, initial_state, final_state, cu_seqlens, scale, reverse
    )
    return dq, dk, dv, dgate, final_state.new_empty(0) if dinitial is None else dinitial


@torch.library.register_fake("headgate::gated_linear_attention_backward")
def _backward_fake(
    do: Tensor,
    dstate: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_gate: Tensor,
    initial_state: Tensor | None,
    final_state: Tensor,
    cu_seqlens: Tensor | None,
    scale: float,
    reverse: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    dinitial = final_state.new_empty(0) if initial_state is None else _new(final_state)
    return _new(q), _new(k), _new(v), _new(log_gate), dinitial


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, log_gate, initial_state, cu_seqlens, ctx.scale, ctx.reverse, ctx.backend = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, log_gate, initial_state, cu_seqlens, output[1])


def _gradients(ctx: Any, do: Tensor | None, dstate: Tensor | None) -> tuple[Tensor | None, ...]:
    q, k, v, log_gate, initial_state, cu_seqlens, final_state = ctx.saved_tensors
    do = torch.zeros_like(v) if do is None else do
    dq, dk, dv, dgate, dinitial = torch.ops.headgate.gated_linear_attention_backward(
        do, dstate, q, k, v, log_gate, initial_state, final_state, cu_seqlens, ctx.scale, ctx.reverse, ctx.backend
    )
    return dq, dk, dv, dgate, None if initial_state is None else dinitial, None, None, None, None


torch.library.register_autograd("headgate::gated_linear_attention", _gradients, setup_context=_save)


@torch.library.impl("headgate::bidirectional_gated_linear_attention", "default")
def _bidirectional(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_gate_forward: Tensor,
    log_gate_backward: Tensor,
    cu_seqlens: Tensor | None,
    scale: float,
    backend: str,
) -> Tensor:
    return _backend(backend).bidirectional(q, k, v, log_gate_forward, log_gate_backward, cu_seqlens, scale)


@torch.library.register_fake("headgate::bidirectional_gated_linear_attention")
def _bidirectional_fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_gate_forward: Tensor,
    log_gate_backward: Tensor,
    cu_seqlens: Tensor | None,
    scale: float,
    backend: str,
) -> Tensor:
    return _new(v)


@torch.library.impl("headgate::bidirectional_gated_linear_attention_backward", "default")
def _bidirectional_backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_gate_forward: Tensor,
    log_gate_backward: Tensor,
    cu_seqlens: Tensor | None,
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return _backend(backend).bidirectional_backward(do, q, k, v, log_gate_forward, log_gate_backward, cu_seqlens, scale)


@torch.library.register_fake("headgate::bidirectional_gated_linear_attention_backward")
def _bidirectional_backward_fake(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_gate_forward: Tensor,
    log_gate_backward: Tensor,
    cu_seqlens: Tensor | None,
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return _new(q), _new(k), _new(v), _new(log_gate_forward), _new(log_gate_backward)


def _save_bidirectional(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.scale, ctx.backend = inputs
    ctx.save_for_backward(*tensors)


def _gradients_bidirectional(ctx: Any, do: Tensor) -> tuple[Tensor | None, ...]:
    q, k, v, log_gate_forward, log_gate_backward, cu_seqlens = ctx.saved_tensors
    grads = torch.ops.headgate.bidirectional_gated_linear_attention_backward(
        do, q, k, v, log_gate_forward, log_gate_backward, cu_seqlens, ctx.scale, ctx.backend
    )
    return *grads, None, None, None


torch.library.register_autograd(
    "headgate::bidirectional_gated_linear_attention", _gradients_bidirectional, setup_context=_save_bidirectional
)


def _no_second_derivative(ctx: Any, *gradients: Tensor | None) -> tuple[None, ...]:
    raise RuntimeError(
        "gated linear attention has no second derivative here; the backends 'reference' and 'parallel' do"
    )


for _name in ("gated_linear_attention_backward", "bidirectional_gated_linear_attention_backward"):
    torch.library.register_autograd(f"headgate::{_name}", _no_second_derivative)


def _multiply_adds(q_shape: tuple[int, ...], v_shape: tuple[int, ...]) -> int:
    """Of the recurrence: decay, write and read of every entry of the state, for every token and head."""
    batch, length, heads, key_dim = q_shape
    return 3 * batch * length * heads * key_dim * v_shape[-1]


@register_flop_formula(torch.ops.headgate.gated_linear_attention)
def _flops(q_shape: Any, k_shape: Any, v_shape: Any, *args: Any, **kwargs: Any) -> int:
    return 2 * _multiply_adds(q_shape, v_shape)


@register_flop_formula(torch.ops.headgate.gated_linear_attention_backward)
def _flops_backward(
    do_shape: Any, dstate_shape: Any, q_shape: Any, k_shape: Any, v_shape: Any, *args: Any, **kwargs: Any
) -> int:
    return 6 * _multiply_adds(q_shape, v_shape)


@register_flop_formula(torch.ops.headgate.bidirectional_gated_linear_attention)
def _flops_bidirectional(q_shape: Any, k_shape: Any, v_shape: Any, *args: Any, **kwargs: Any) -> int:
    return 4 * _multiply_adds(q_shape, v_shape)


@register_flop_formula(torch.ops.headgate.bidirectional_gated_linear_attention_backward)
def _flops_bidirectional_backward(
    do_shape: Any, q_shape: Any, k_shape: Any, v_shape: Any, *args: Any, **kwargs: Any
) -> int:
    return 12 * _multiply_adds(q_shape, v_shape)

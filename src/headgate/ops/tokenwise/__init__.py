"""Operations that treat every token alone (or with its neighbours on a grid): norms, gates, gated units.

Each is a few multiplications per number, so what it costs is the way through memory. PyTorch's operations, one after
the other, go that way several times; on a CPU, where no gradient is asked for, these go it once. Everywhere else they
are the PyTorch operations of ``reference.py``, which autograd and compilers see through.
"""

from __future__ import annotations

import math
import struct
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from headgate.ops.native.memory import new_result
from headgate.ops.tokenwise.reference import (
    ACTIVATIONS,
    depthwise_conv3x3_reference,
    log_sigmoid_gate_reference,
    mix_branches_reference,
    rms_norm_reference,
    swiglu_reference,
)
from headgate.validate import check_floating, check_positive, check_shape

__all__ = ["depthwise_conv3x3", "log_sigmoid_gate", "mix_branches", "rms_norm", "swiglu"]

_WHOLE = 16
"""Widths that are a multiple of this are whole registers on every CPU and in both dtypes."""


def rms_norm(
    x: Float[Tensor, "*tokens dim"], weight: Float[Tensor, " dim"], eps: float
) -> Float[Tensor, "*tokens dim"]:
    """Root-mean-square norm over the last axis: x / sqrt(mean(x²) + ε) ⊙ weight (Zhang and Sennrich, arXiv 1910.07467).

    Args:
        x: ``(*tokens, dim)``.
        weight: ``(dim,)``.
        eps: ε, above zero.

    Returns:
        ``(*tokens, dim)``.

    Raises:
        TypeError: no floating tensor.
        ValueError: shapes that do not fit, or ε not above zero.
    """
    check_floating("x", x)
    check_shape("weight", weight, (x.shape[-1],), "dim")
    check_positive(eps=eps)
    if not _runs_native((x, weight), x.shape[-1]):
        return rms_norm_reference(x, weight, eps)
    return _run(_kernels().RMS_NORM, x, x.shape[-1], weights=weight, numbers=(eps, 0.0))


def swiglu(x: Float[Tensor, "*tokens twice_dim"]) -> Float[Tensor, "*tokens dim"]:
    """Swish-gated linear unit: silu(first half) ⊙ second half of the last axis (Shazeer, arXiv 2002.05202).

    Args:
        x: ``(*tokens, 2 * dim)``.

    Returns:
        ``(*tokens, dim)``.

    Raises:
        TypeError: no floating tensor.
        ValueError: an odd last axis.
    """
    check_floating("x", x)
    if x.shape[-1] % 2:
        raise ValueError(f"x must have an even last axis, gate and value side by side, got {tuple(x.shape)}")
    width = x.shape[-1] // 2
    return _run(_kernels().SWIGLU, x, width) if _runs_native((x,), width) else swiglu_reference(x)


def log_sigmoid_gate(
    logits: Float[Tensor, "*tokens gate"], normalizer: float = 1.0, clamp_min: float | None = None
) -> Float[Tensor, "*tokens gate"]:
    """Logarithm of a gate with a temperature: log σ(logits) / normalizer (arXiv 2312.06635, section 4.3).

    Args:
        logits: ``(*tokens, gate)``.
        normalizer: τ, above zero.
        clamp_min: smallest value that is let through, below zero; ``None`` for no limit.

    Returns:
        ``(*tokens, gate)``, at most 0, in float32, or float64 for float64 logits.

    Raises:
        TypeError: no floating tensor.
        ValueError: a normalizer not above zero, or a limit not below it.
    """
    check_floating("logits", logits)
    check_positive(normalizer=normalizer)
    if clamp_min is not None and not clamp_min < 0:
        raise ValueError(f"clamp_min must be below zero, the logarithm of an open gate, got {clamp_min}")
    if not _runs_native((logits,), logits.shape[-1]):
        return log_sigmoid_gate_reference(logits, normalizer, clamp_min)
    lowest = -math.inf if clamp_min is None else clamp_min
    return _run(_kernels().LOG_GATE, logits, logits.shape[-1], numbers=(1 / normalizer, lowest))


def mix_branches(
    scanned: Float[Tensor, "*tokens dim"],
    local: Float[Tensor, "*tokens dim"],
    logits: Float[Tensor, "*tokens dim"],
    scanned_weight: Float[Tensor, " head"],
    local_weight: Float[Tensor, " head"],
    eps: float,
    activation: str = "identity",
) -> Float[Tensor, "*tokens dim"]:
    r"""Let a gate choose, channel by channel, between what came from afar and what came from next door.

    .. math:: \mathrm{act}(G \odot \mathrm{norm}_g(o) + (1 - G) \odot \mathrm{norm}_l(x_s)), \qquad G = \sigma(\mathrm{logits})

    (ViG, arXiv 2405.18425, section 3.3); both norms are root-mean-square norms over the channels of a head.

    Args:
        scanned: o, ``(*tokens, dim)``.
        local: x_s, ``(*tokens, dim)``.
        logits: of the gate, ``(*tokens, dim)``.
        scanned_weight: ``(head,)``, weight of the norm of o, shared by the heads; ``head`` divides ``dim``.
        local_weight: ``(head,)``, weight of the norm of x_s.
        eps: ε of the norms, above zero.
        activation: ``"identity"`` or ``"silu"``.

    Returns:
        ``(*tokens, dim)``.

    Raises:
        TypeError: no floating tensor.
        ValueError: shapes that do not fit, an unknown activation, or ε not above zero.
    """
    for name, tensor in {"scanned": scanned, "local": local, "logits": logits}.items():
        check_floating(name, tensor)
        if tensor.shape != scanned.shape:
            raise ValueError(f"{name} must have the shape of scanned {tuple(scanned.shape)}, got {tuple(tensor.shape)}")
    head = scanned_weight.shape[0]
    check_shape("local_weight", local_weight, (head,), "head")
    if scanned.shape[-1] % head:
        raise ValueError(f"the weights' size must divide dim, got head={head}, dim={scanned.shape[-1]}")
    check_positive(eps=eps)
    _check_activation(activation)
    inputs = (scanned, local, logits, scanned_weight, local_weight)
    if not _runs_native(inputs, head):
        return mix_branches_reference(*inputs, eps, activation)
    return _run(
        _kernels().MIX, scanned, scanned.shape[-1], local, logits,
        weights=torch.cat([scanned_weight, local_weight]), entry=head, numbers=(eps, 0.0), activation=activation,
    )  # fmt: skip


def depthwise_conv3x3(
    x: Float[Tensor, "batch rows columns dim"], weight: Float[Tensor, "dim 1 3 3"], activation: str = "identity"
) -> Float[Tensor, "batch rows columns dim"]:
    """Depthwise 3×3 convolution of pictures whose channels lie side by side, with zeros beyond the border.

    Args:
        x: ``(batch, rows, columns, dim)``.
        weight: ``(dim, 1, 3, 3)``, as :class:`torch.nn.Conv2d` with ``groups=dim`` has it.
        activation: what follows, ``"identity"`` or ``"silu"``.

    Returns:
        ``(batch, rows, columns, dim)``.

    Raises:
        TypeError: no floating tensor.
        ValueError: shapes that do not fit, or an unknown activation.
    """
    check_shape("x", x, (None, None, None, None), "batch, rows, columns, dim")
    check_floating("x", x)
    check_shape("weight", weight, (x.shape[3], 1, 3, 3), "dim, 1, 3, 3")
    _check_activation(activation)
    if not _runs_native((x, weight), x.shape[3]):
        return depthwise_conv3x3_reference(x, weight, activation)
    return torch.ops.headgate.depthwise_conv3x3(x, weight, activation)


torch.library.define("headgate::depthwise_conv3x3", "(Tensor x, Tensor weight, str activation) -> Tensor")


@torch.library.impl("headgate::depthwise_conv3x3", "cpu")
def _depthwise(x: Tensor, weight: Tensor, activation: str) -> Tensor:
    taps = weight.reshape(x.shape[3], 9).t().contiguous()
    return _run(_kernels().DEPTHWISE, x, x.shape[3], weights=taps, activation=activation)


@torch.library.register_fake("headgate::depthwise_conv3x3")
def _depthwise_fake(x: Tensor, weight: Tensor, activation: str) -> Tensor:
    return x.new_empty(x.shape)


@register_flop_formula(torch.ops.headgate.depthwise_conv3x3)
def _depthwise_flops(x_shape: Any, weight_shape: Any, *args: Any, **kwargs: Any) -> int:
    return 2 * 9 * math.prod(x_shape)


def _check_activation(activation: str) -> None:
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(map(repr, ACTIVATIONS))}, got {activation!r}")


def _runs_native(tensors: tuple[Tensor, ...], width: int) -> bool:
    """Whether the compiled form can take over: plain CPU tensors of one wide dtype, no gradients, no tracing."""
    first = tensors[0]
    if width % _WHOLE or first.numel() == 0 or torch.compiler.is_compiling() or first.device.type != "cpu":
        return False
    if first.dtype not in (torch.float32, torch.float64) or torch.is_autocast_enabled("cpu"):
        return False
    tracks = torch.is_grad_enabled()
    return all(
        type(tensor) in (Tensor, torch.nn.Parameter)
        and tensor.dtype == first.dtype
        and not (tracks and tensor.requires_grad)
        for tensor in tensors
    )


def _kernels() -> Any:
    from headgate.ops.tokenwise import kernels

    return kernels


def _run(
    kind: int,
    a: Tensor,
    width: int,
    b: Tensor | None = None,
    c: Tensor | None = None,
    *,
    weights: Tensor | None = None,
    entry: int = 0,
    numbers: tuple[float, float] = (0.0, 0.0),
    activation: str = "identity",
) -> Tensor:
    """Run one job of ``kind``; the result has the shape of ``a``, with ``width`` as its last axis."""
    kernels = _kernels()
    a = a.contiguous()
    b = None if b is None else b.contiguous()
    c = None if c is None else c.contiguous()
    weights = None if weights is None else weights.contiguous()
    out = new_result((*a.shape[:-1], width), a.dtype)
    if kind == kernels.DEPTHWISE:
        batch, tokens, columns, _ = a.shape
        items, second = batch * tokens, columns
    else:
        tokens = out.numel() // width
        items, second = -(-tokens // kernels.BLOCK), 0 if b is None else b.data_ptr()
    first_number, second_number = struct.unpack("qq", struct.pack("dd", *numbers))
    table = (
        0, items, kind, tokens, width, out.data_ptr(), a.data_ptr(), second, 0 if c is None else c.data_ptr(),
        0 if weights is None else weights.data_ptr(), entry, first_number, second_number, int(activation == "silu"),
    )  # fmt: skip
    threads = min(torch.get_num_threads(), items)
    kernels.worker(a.dtype == torch.float64).run(table, threads)
    return out

"""The definitions of the token-wise operations in plain PyTorch; differentiable, on any device."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

__all__ = [
    "ACTIVATIONS",
    "depthwise_conv3x3_reference",
    "log_sigmoid_gate_reference",
    "mix_branches_reference",
    "rms_norm_reference",
    "swiglu_reference",
]

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"identity": lambda x: x, "silu": F.silu}


def rms_norm_reference(
    x: Float[Tensor, "*tokens dim"], weight: Float[Tensor, " dim"], eps: float
) -> Float[Tensor, "*tokens dim"]:
    """x / sqrt(mean(x²) + ε) ⊙ weight."""
    return F.rms_norm(x, (x.shape[-1],), weight, eps)


def swiglu_reference(x: Float[Tensor, "*tokens twice_dim"]) -> Float[Tensor, "*tokens dim"]:
    """silu(first half) ⊙ second half."""
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate) * up


def log_sigmoid_gate_reference(
    logits: Float[Tensor, "*tokens gate"], normalizer: float, clamp_min: float | None
) -> Float[Tensor, "*tokens gate"]:
    """log σ(logits) / normalizer, from below clamped, in float32 at least."""
    log_gate = F.logsigmoid(logits.to(torch.promote_types(logits.dtype, torch.float32))) / normalizer
    return log_gate if clamp_min is None else log_gate.clamp_min(clamp_min)


def mix_branches_reference(
    scanned: Float[Tensor, "*tokens dim"],
    local: Float[Tensor, "*tokens dim"],
    logits: Float[Tensor, "*tokens dim"],
    scanned_weight: Float[Tensor, " head"],
    local_weight: Float[Tensor, " head"],
    eps: float,
    activation: str,
) -> Float[Tensor, "*tokens dim"]:
    """act(G ⊙ norm(scanned) + (1 - G) ⊙ norm(local)) with G = σ(logits); both norms head by head."""
    heads = (-1, scanned_weight.shape[0])
    far = rms_norm_reference(scanned.unflatten(-1, heads), scanned_weight, eps).flatten(-2)
    near = rms_norm_reference(local.unflatten(-1, heads), local_weight, eps).flatten(-2)
    return ACTIVATIONS[activation](torch.lerp(near, far, torch.sigmoid(logits)))


def depthwise_conv3x3_reference(
    x: Float[Tensor, "batch rows columns dim"], weight: Float[Tensor, "dim 1 3 3"], activation: str
) -> Float[Tensor, "batch rows columns dim"]:
    """Every channel with its own 3×3 taps, zeros beyond the border, then the activation."""
    y = F.conv2d(x.permute(0, 3, 1, 2), weight, padding=1, groups=x.shape[-1]).permute(0, 2, 3, 1)
    return ACTIVATIONS[activation](y)

"""Strong decoupled weight decay on weights alone: the two groups of parameters, and the optimizer of the paper.

*Regularised* is every parameter but biases and codebooks (gains of norms and a learned input map included): gradients are
clipped value by value to [-1, 1], then AdamW. *Unregularised* are biases and codebooks: Adam with the same rate.

What decay does depends on learning rate × weight decay × steps; the published runs have 1e-3 · 0.1 · 2e5 = 20, where
weights have long come to rest between decay and gradient. A shorter run with a larger weight decay only underfits.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from headgate.methods.latent.latent_quantization.quantizer import LatentQuantizer
from headgate.validate import check_positive

__all__ = ["qlae_optimizer", "weight_decay_groups"]


def weight_decay_groups(
    model: nn.Module, weight_decay: float, codebooks: tuple[type[nn.Module], ...] = (LatentQuantizer,)
) -> list[dict[str, Any]]:
    """Divide trainable parameters into those that decay and those that do not, for any optimizer of ``torch.optim``.

    Args:
        model: the model; a parameter that two modules share counts once.
        weight_decay: of the first group, at least 0.
        codebooks: modules whose parameters are not decayed.

    Returns:
        Two groups with ``params`` and ``weight_decay``: first all but biases (names that end so) and codebooks, then those
        with weight decay 0. A group without parameters is left out.

    Raises:
        ValueError: a negative weight decay, or nothing to train.
    """
    decayed, undecayed = _divide(model, weight_decay, codebooks)
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": undecayed, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def qlae_optimizer(
    model: nn.Module,
    learning_rate: float = 1e-3,
    weight_decay: float = 0.1,
    *,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    clip_value: float | None = 1.0,
    codebooks: tuple[type[nn.Module], ...] = (LatentQuantizer,),
) -> torch.optim.AdamW:
    """The published optimizer: AdamW over :func:`weight_decay_groups`, gradients of the decayed group clipped by value.

    The clipping happens inside ``step()`` (the limit stands in the group as ``clip_value``), so a loop needs to know
    nothing of it; it comes after a gradient scaler has unscaled.

    Args:
        model: what to train.
        learning_rate: above 0, for both groups.
        weight_decay: decoupled, at least 0; 0.1 in the paper, 0.001 on MPI3D.
        betas: of Adam.
        eps: of Adam.
        clip_value: largest absolute value of a gradient's entry, above 0; ``None`` does not clip.
        codebooks: as in :func:`weight_decay_groups`.

    Raises:
        ValueError: a number outside its range, or nothing to train.
    """
    check_positive(learning_rate=learning_rate)
    if clip_value is not None:
        check_positive(clip_value=clip_value)
    decayed, undecayed = _divide(model, weight_decay, codebooks)
    groups = [
        {"params": decayed, "weight_decay": weight_decay, "clip_value": clip_value},
        {"params": undecayed, "weight_decay": 0.0, "clip_value": None},
    ]
    optimizer = torch.optim.AdamW(
        [group for group in groups if group["params"]], lr=learning_rate, betas=betas, eps=eps
    )
    optimizer.register_step_pre_hook(_clip_values)
    return optimizer


def _divide(
    model: nn.Module, weight_decay: float, codebooks: tuple[type[nn.Module], ...]
) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Trainable parameters that decay, and those that do not."""
    if weight_decay < 0:
        raise ValueError(f"weight_decay must not be negative, got {weight_decay}")
    exempt = {id(p) for module in model.modules() if isinstance(module, codebooks) for p in module.parameters()}
    decayed: list[nn.Parameter] = []
    undecayed: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            is_exempt = id(parameter) in exempt or name.endswith("bias")
            (undecayed if is_exempt else decayed).append(parameter)
    if not decayed and not undecayed:
        raise ValueError("model must have a parameter with requires_grad, got none")
    return decayed, undecayed


def _clip_values(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    for group in optimizer.param_groups:
        if group["clip_value"] is not None:
            torch.nn.utils.clip_grad_value_(group["params"], group["clip_value"])

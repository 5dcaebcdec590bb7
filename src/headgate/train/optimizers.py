"""Optimizers with the parameter groups that training recipes ask for."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from headgate.validate import check_positive

__all__ = ["count_parameters", "make_optimizer"]

_NORMS = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.modules.batchnorm._NormBase)


def make_optimizer(
    model: nn.Module,
    name: str = "adamw",
    learning_rate: float = 1e-3,
    weight_decay: float = 0.0,
    momentum: float = 0.9,
    betas: tuple[float, float] = (0.9, 0.999),
    decay_norms_and_biases: bool = False,
    overrides: Mapping[str, Mapping[str, Any]] | None = None,
) -> torch.optim.Optimizer:
    """Make an optimizer over a model's trainable parameters.

    AdamW is that of Loshchilov and Hutter, "Decoupled Weight Decay Regularization" (ICLR 2019). Parameters with the same
    settings share one group, groups in order of first appearance. AdamW uses PyTorch's fused kernel where all parameters are
    floating point and lie on a CPU or CUDA device.

    Args:
        model: its parameters with ``requires_grad`` are optimised.
        name: ``"adamw"`` or ``"sgd"``.
        learning_rate: base learning rate, > 0.
        weight_decay: ≥ 0; decoupled for AdamW, added to the gradient for SGD.
        momentum: of SGD, in [0, 1); AdamW does not look at it.
        betas: of AdamW, each in [0, 1); SGD does not look at it.
        decay_norms_and_biases: without it, parameters of normalisation layers, parameters named ``…bias`` and those with
            fewer than two axes get weight decay 0.
        overrides: pattern of parameter names (:mod:`fnmatch`) → settings of the optimizer's group, such as
            ``{"head.*": {"lr": 1e-2}}``; where several patterns match, later ones win.

    Returns:
        ``torch.optim.AdamW`` or ``torch.optim.SGD``.

    Raises:
        ValueError: unknown name, a number outside its range, no trainable parameter, a pattern that matches none, or an
            unknown setting.
    """
    check_positive(learning_rate=learning_rate)
    if weight_decay < 0:
        raise ValueError(f"weight_decay must not be negative, got {weight_decay}")
    kind: Any
    settings: dict[str, Any]
    trainable = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if not trainable:
        raise ValueError("model must have a parameter with requires_grad, got none")
    if name == "adamw":
        fused = all(p.is_floating_point() and p.device.type in ("cpu", "cuda") for p in trainable.values())
        kind, settings = torch.optim.AdamW, {"betas": betas, "fused": fused}
    elif name == "sgd":
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum must lie in [0, 1), got {momentum}")
        # Fused, SGD would begin with uninitialised momentum where the first step of fp16 overflows and is left out.
        kind, settings = torch.optim.SGD, {"momentum": momentum}
    else:
        raise ValueError(f"name must be 'adamw' or 'sgd', got {name!r}")

    undecayed = set() if decay_norms_and_biases else _norms_and_biases(model)
    chosen: dict[str, dict[str, Any]] = {
        name: {"lr": learning_rate, "weight_decay": 0.0 if name in undecayed else weight_decay} for name in trainable
    }
    known = set(kind([nn.Parameter(torch.zeros(1))], lr=learning_rate).param_groups[0]) - {"params"}
    for pattern, override in (overrides or {}).items():
        matched = fnmatch.filter(trainable, pattern)
        if not matched:
            raise ValueError(
                f"overrides must match trainable parameters, {pattern!r} matches none of {list(trainable)}"
            )
        if unknown := set(override) - known:
            raise ValueError(f"overrides[{pattern!r}] has unknown settings {sorted(unknown)}; known: {sorted(known)}")
        for setting in ("lr", "weight_decay"):
            if override.get(setting, 0) < 0:
                raise ValueError(f"overrides[{pattern!r}] must not have a negative {setting}, got {override[setting]}")
        for matched_name in matched:
            chosen[matched_name].update(override)

    groups: list[dict[str, Any]] = []
    for parameter_name, parameter in trainable.items():
        group = next((g for g in groups if g["settings"] == chosen[parameter_name]), None)
        if group is None:
            group = {"settings": chosen[parameter_name], "params": []}
            groups.append(group)
        group["params"].append(parameter)
    return kind(
        [{"params": group["params"], **group["settings"]} for group in groups],
        lr=learning_rate,
        weight_decay=weight_decay,
        **settings,
    )


def count_parameters(model: nn.Module, trainable_only: bool = False) -> int:
    """Count the numbers in a model's parameters; a parameter that two modules share counts once.

    Args:
        model: any module, on the meta device too.
        trainable_only: leave out parameters with ``requires_grad=False``.

    Returns:
        The count.
    """
    return sum(p.numel() for p in model.parameters() if p.requires_grad or not trainable_only)


def _norms_and_biases(model: nn.Module) -> set[str]:
    names = {name for name, p in model.named_parameters() if p.dim() < 2 or name.endswith("bias")}
    for prefix, module in model.named_modules():
        if isinstance(module, _NORMS) or type(module).__name__.endswith("Norm"):
            names |= {f"{prefix}.{name}" if prefix else name for name, _ in module.named_parameters(recurse=False)}
    return names

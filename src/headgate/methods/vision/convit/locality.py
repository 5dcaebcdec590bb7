"""Bring existing layers to the local start, and turn plain self-attention into gated positional self-attention.

For networks that are trained already, or that were built elsewhere: ConViT (d'Ascoli et al., arXiv 2103.10697) starts local
by itself.
"""

from __future__ import annotations

import math
from typing import Any, TypeVar

import torch
from torch import nn

from headgate.methods.vision.convit.attention import GPSA
from headgate.validate import check_probability

__all__ = ["gpsa_from_mhsa", "localise_"]

Module = TypeVar("Module", bound=nn.Module)


def localise_(module: Module, locality_strength: float | None = None) -> Module:
    """Bring every :class:`GPSA` in ``module`` to the local start, in place (:meth:`GPSA.localise_`).

    Args:
        module: a layer, or a model that holds some.
        locality_strength: α; default: each layer's own.

    Returns:
        ``module``.

    Raises:
        ValueError: ``module`` holds no such layer.
    """
    layers = [part for part in module.modules() if isinstance(part, GPSA)]
    if not layers:
        raise ValueError(f"module must be or hold a GPSA layer, got {type(module).__name__}")
    for layer in layers:
        layer.localise_(locality_strength)
    return module


def gpsa_from_mhsa(
    attention: nn.Module,
    gate: float = 0.1,
    *,
    locality_strength: float = 1.0,
    grid_size: tuple[int, int] | None = None,
) -> GPSA:
    """Turn self-attention into gated positional self-attention: its own projections, local positions, one gate.

    Args:
        attention: :class:`MHSA`, :class:`headgate.nn.MultiHeadAttention`, or any other module with ``num_heads`` and the
            linear layers ``qkv`` (queries, keys and values of all heads, in this order) and ``proj`` or ``out_proj``, with
            nothing between them but attention. Its dropout is not taken over.
        gate: the share g of positional attention at the start, in [0, 1]. At 0 the layer computes what ``attention``
            does; a gate at 0 or 1 has no gradient and stays.
        locality_strength: α of the positions.
        grid_size: of the new layer.

    Returns:
        A layer with copies of the weights, on their device and in their dtype.

    Raises:
        TypeError: ``attention`` has no such layers.
        ValueError: ``gate`` lies outside [0, 1]; ``attention`` is causal, normalises queries or keys, or changes the
            number of channels.
    """
    check_probability(gate=gate)
    qkv, output, num_heads = _parts(attention)
    dim = qkv.in_features
    layer = GPSA(dim, num_heads, qkv.bias is not None, locality_strength=locality_strength, grid_size=grid_size).to(
        qkv.weight
    )
    with torch.no_grad():
        for kind in ("weight", "bias") if qkv.bias is not None else ("weight",):
            of_content, of_values = getattr(qkv, kind).split((2 * dim, dim))
            getattr(layer.qk, kind).copy_(of_content)
            getattr(layer.v, kind).copy_(of_values)
        layer.proj.weight.copy_(output.weight)
        if output.bias is not None:
            layer.proj.bias.copy_(output.bias)
        layer.gating_param.fill_(_logit(gate))
    return layer.train(attention.training)


def _parts(attention: Any) -> tuple[nn.Linear, nn.Linear, int]:
    """Its two linear layers and its number of heads, once it is sure that there is plain attention between them."""
    qkv = getattr(attention, "qkv", None)
    output = getattr(attention, "proj", None) or getattr(attention, "out_proj", None)
    if not isinstance(qkv, nn.Linear) or not isinstance(output, nn.Linear) or not hasattr(attention, "num_heads"):
        raise TypeError(
            "attention must have num_heads and the linear layers qkv and proj (or out_proj), "
            f"got {type(attention).__name__}"
        )
    between = [name for name in ("q_norm", "k_norm", "norm") if _changes(getattr(attention, name, None))]
    if between or getattr(attention, "causal", False):
        raise ValueError(f"attention must be neither causal nor normalised, got {', '.join(between) or 'causal=True'}")
    dim = qkv.in_features
    if (qkv.out_features, output.in_features, output.out_features) != (3 * dim, dim, dim):
        raise ValueError(
            f"attention must project {dim} channels to {3 * dim} and {dim} to {dim}, got {qkv.out_features}, and "
            f"{output.in_features} to {output.out_features}"
        )
    return qkv, output, attention.num_heads


def _changes(part: object) -> bool:
    return part is not None and not isinstance(part, nn.Identity)


def _logit(share: float) -> float:
    if share in (0, 1):
        return math.inf if share else -math.inf
    return math.log(share / (1 - share))

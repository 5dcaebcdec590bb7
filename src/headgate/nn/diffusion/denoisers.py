"""One way to call the denoisers of this library and of diffusers: noisy maps, times, and a condition or its absence.

A network that was trained with conditions has to be told which one is meant; where the absence of a condition is meant, that
is said with ``"null"``.
"""

from __future__ import annotations

from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from headgate.nn.diffusion.adm_unet import ADMUNet
from headgate.nn.diffusion.dit import DiT

__all__ = ["Condition", "denoise"]

Condition: TypeAlias = Literal["null"] | int | Tensor | None


def denoise(model: nn.Module, x: Tensor, timesteps: Tensor, condition: Condition = None) -> Tensor:
    """Run a denoiser.

    Args:
        model: an :class:`~headgate.nn.diffusion.ADMUNet` or :class:`~headgate.nn.diffusion.DiT`; a ``UNet2DModel``,
            ``UNet2DConditionModel`` or ``DiTTransformer2DModel`` of diffusers; or any module that is called with
            ``(x, timesteps)`` or, where a condition is given, ``(x, timesteps, condition)``.
        x: noisy maps ``(batch, channels, height, width)``.
        timesteps: ``(batch,)``.
        condition: ``None`` for a network without conditions; a class or classes ``(batch,)``; for
            ``UNet2DConditionModel`` text embeddings ``(batch or 1, tokens, dim)``, of the empty prompt where none is meant;
            ``"null"`` for the null class of a network that has one.

    Returns:
        What the network predicts.

    Raises:
        ValueError: a condition that is missing, that the network does not have, or whose null it lacks; sides that its
            levels do not divide.
    """
    if isinstance(model, ADMUNet):
        return model(x, timesteps, _labels(x, condition, model.num_classes, None))
    if isinstance(model, DiT):
        null = model.num_classes or None
        return model(x, timesteps, _labels(x, condition, model.num_classes or None, null))
    names = {kind.__name__ for kind in type(model).__mro__}
    config: Any = getattr(model, "config", None)
    if "UNet2DModel" in names:
        _check_sides(x, len(config.down_block_types))
        classes = config.num_class_embeds
        labels = _labels(x, condition, classes or (1 if config.class_embed_type else None), None)
        return model(x, timesteps, class_labels=labels).sample
    if "UNet2DConditionModel" in names:
        _check_sides(x, len(config.down_block_types))
        if not isinstance(condition, Tensor) or condition.dim() != 3:
            raise ValueError(
                "condition must be text embeddings (batch or 1, tokens, dim) for UNet2DConditionModel, those of the empty "
                f"prompt where none is meant; got {_describe(condition)}"
            )
        text = condition.to(x.device, x.dtype).expand(x.shape[0], -1, -1)
        return model(x, timesteps, encoder_hidden_states=text).sample
    if "DiTTransformer2DModel" in names:
        classes = config.num_embeds_ada_norm
        return model(x, timestep=timesteps, class_labels=_labels(x, condition, classes, classes)).sample
    if condition is None:
        return model(x, timesteps)
    if isinstance(condition, str):
        raise ValueError(f"condition='null' is not defined for {type(model).__name__}; give the condition itself")
    given = torch.full((x.shape[0],), condition, device=x.device) if isinstance(condition, int) else condition
    return model(x, timesteps, given)


def _labels(x: Tensor, condition: Condition, classes: int | None, null: int | None) -> Tensor | None:
    """Class labels for a batch, or None for a network without classes."""
    if classes is None:
        if condition is not None and condition != "null":
            raise ValueError(f"condition must be None for a network without classes, got {_describe(condition)}")
        return None
    if condition is None:
        hint = " or 'null'" if null is not None else ""
        raise ValueError(f"condition must be a class{hint} for a network of {classes} classes, got None")
    if isinstance(condition, str):
        if condition != "null" or null is None:
            raise ValueError(f"condition must be a class for a network without null class, got {condition!r}")
        condition = null
    if isinstance(condition, int):
        limit = classes if null is None else null + 1
        if not 0 <= condition < limit:
            raise ValueError(f"condition must be a class in 0..{limit - 1}, got {condition}")
        return torch.full((x.shape[0],), condition, dtype=torch.int64, device=x.device)
    if condition.shape != x.shape[:1]:
        raise ValueError(f"condition must hold a class per sample, {tuple(x.shape[:1])}, got {tuple(condition.shape)}")
    return condition.to(x.device)


def _check_sides(x: Tensor, levels: int) -> None:
    factor = 2 ** (levels - 1)
    if any(side % factor for side in x.shape[2:]):
        raise ValueError(f"x's sides must be divisible by 2^(levels - 1) = {factor}, got {tuple(x.shape[2:])}")


def _describe(condition: object) -> str:
    return f"a tensor {tuple(condition.shape)}" if isinstance(condition, Tensor) else repr(condition)

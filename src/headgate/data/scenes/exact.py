"""Exact coverage of continuous poses: clamp(1/2 - d, 0, 1) with the signed distance d in pixels."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from headgate.data.scenes.atlas import DARKENING
from headgate.data.scenes.shapes import signed_distance, texture_distance

__all__ = ["cover_exactly"]

_Distance = Callable[[str, Tensor, Tensor], Tensor]


def cover_exactly(
    pose: Mapping[str, Tensor], shapes: Sequence[str], textures: Sequence[str], size: int
) -> tuple[Float[Tensor, "batch objects size size"], Float[Tensor, "batch objects size size"]]:
    """Cover pixels by objects of any centre, radius and rotation; differentiable in these.

    Args:
        pose: ``shape`` and ``texture`` (batch, objects) int64 indices into the names; ``radius``, ``x``, ``y`` as fractions
            of the side and ``rotation`` in radians, floating point (batch, objects).
        shapes: names.
        textures: names.
        size: the side in pixels.

    Returns:
        Coverage, and coverage less the darkening of the texture.
    """
    axes = pose["shape"].shape
    radius = (pose["radius"] * size).flatten()
    steps = torch.arange(size, device=radius.device, dtype=radius.dtype) + 0.5
    dx = (steps[None, :] - (pose["x"] * size).flatten()[:, None]) / radius[:, None]
    dy = (steps[None, :] - (pose["y"] * size).flatten()[:, None]) / radius[:, None]
    cosine, sine = pose["rotation"].flatten().cos()[:, None, None], pose["rotation"].flatten().sin()[:, None, None]
    x = cosine * dx[:, None, :] + sine * dy[:, :, None]
    y = cosine * dy[:, :, None] - sine * dx[:, None, :]
    scale = radius[:, None, None]
    cover = _by_kind(pose["shape"].flatten(), shapes, x, y, scale, signed_distance)
    if tuple(textures) == ("solid",):
        paint = cover
    else:
        paint = cover * (1.0 - DARKENING * _by_kind(pose["texture"].flatten(), textures, x, y, scale, _dark_distance))
    return cover.unflatten(0, axes), paint.unflatten(0, axes)


def _dark_distance(texture: str, x: Tensor, y: Tensor) -> Tensor:
    return torch.full_like(x, 1e6) if texture == "solid" else texture_distance(texture, x, y)


def _by_kind(kind: Tensor, names: Sequence[str], x: Tensor, y: Tensor, scale: Tensor, distance: _Distance) -> Tensor:
    cover = torch.zeros_like(x)
    for index, name in enumerate(names):
        rows = (kind == index).nonzero().squeeze(1)
        if rows.numel():
            part = (0.5 - distance(name, x[rows], y[rows]) * scale[rows]).clamp(0.0, 1.0)
            cover = cover.index_copy(0, rows, part)
    return cover

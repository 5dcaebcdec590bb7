r"""Rotary positions for queries and keys on a grid (Su et al., arXiv 2104.09864; axial form as in the published ViG code).

On a grid, channel pairs (2i, 2i + 1) turn by turns with the column x and the row y: pair 2j by
:math:`x\,b^{-4j/K}`, pair 2j + 1 by :math:`y\,b^{-4j/K}`. Coordinates are scaled so that any grid spans ``base_size``
steps, so a model sees the angles it was trained with at every resolution.
"""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from headgate.nn import apply_rotary

__all__ = ["RotaryMode", "rotate"]

RotaryMode = Literal["1d", "2d"]


def rotate(
    x: Float[Tensor, "batch length heads key"], grid: tuple[int, int], mode: RotaryMode | None
) -> Float[Tensor, "batch length heads key"]:
    """Turn queries or keys by their positions.

    Args:
        x: ``(batch, rows * columns, heads, key)`` in raster order.
        grid: rows and columns.
        mode: ``"1d"`` by the place in raster order, ``"2d"`` by row and column, ``None`` not at all.

    Returns:
        The turned vectors, of the shape and dtype of ``x``; norms are unchanged.
    """
    if mode is None:
        return x
    if mode == "1d":
        return apply_rotary(x.transpose(1, 2)).transpose(1, 2)
    return _rotate_axial(x, grid)


def _rotate_axial(x: Tensor, grid: tuple[int, int], base: float = 10000.0, base_size: int = 14) -> Tensor:
    wide = torch.promote_types(x.dtype, torch.float32)
    key = x.shape[-1]
    frequency = base ** (-torch.arange(0, key, 4, device=x.device, dtype=wide) / key)
    y, x_ = (torch.arange(size, device=x.device, dtype=wide) * (base_size / size) for size in grid)
    angle = torch.stack((x_[None, :, None].expand(*grid, 1), y[:, None, None].expand(*grid, 1)), dim=-1)
    angle = (angle * frequency[:, None]).flatten(2).flatten(0, 1)[:, None]  # (rows * columns, 1, key / 2)
    cos, sin = angle.cos(), angle.sin()
    left, right = x.to(wide).unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((left * cos - right * sin, right * cos + left * sin), dim=-1).flatten(-2).to(x.dtype)

"""Sinusoids of a time or of places on a grid."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Real
from torch import Tensor

from headgate.validate import check_positive

__all__ = ["grid_sinusoids", "time_sinusoids"]


def time_sinusoids(t: Real[Tensor, " batch"], dim: int, max_period: float = 10000.0) -> Float[Tensor, "batch dim"]:
    """cos(ω t), then sin(ω t), for frequencies ω = max_period^(-i / (dim // 2)), i = 0, 1, … (ADM, DiT).

    Args:
        t: ``(batch,)`` times as the network is to see them.
        dim: length of the embedding; an odd one ends in a zero.
        max_period: of the slowest wave, nearly.

    Returns:
        ``(batch, dim)`` in the dtype of ``t``, at least float32.

    Raises:
        ValueError: ``t`` is no vector.
    """
    check_positive(dim=dim, max_period=max_period)
    if t.dim() != 1:
        raise ValueError(f"t must have shape (batch,), got {tuple(t.shape)}")
    wide = torch.promote_types(t.dtype if t.is_floating_point() else torch.float32, torch.float32)
    half = dim // 2
    steps = torch.arange(half, device=t.device, dtype=wide)
    angle = t.to(wide)[:, None] * torch.exp(-math.log(max_period) * steps / max(half, 1))
    waves = torch.cat([angle.cos(), angle.sin()], dim=-1)
    return waves if dim % 2 == 0 else torch.nn.functional.pad(waves, (0, 1))


def grid_sinusoids(rows: int, columns: int, dim: int) -> Float[Tensor, "1 places dim"]:
    """Fixed positions of a grid in raster order: sin and cos of the column, then of the row (DiT, MAE).

    Args:
        rows: of the grid.
        columns: of the grid.
        dim: channels, a multiple of 4.

    Returns:
        ``(1, rows * columns, dim)``, float32.

    Raises:
        ValueError: ``dim`` is no multiple of 4.
    """
    check_positive(rows=rows, columns=columns, dim=dim)
    if dim % 4:
        raise ValueError(f"dim must be a multiple of 4, got {dim}")
    row, column = torch.meshgrid(
        torch.arange(rows, dtype=torch.float64), torch.arange(columns, dtype=torch.float64), indexing="ij"
    )
    frequencies = 10000.0 ** (-torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    parts = []
    for places in (column, row):
        angle = places.reshape(-1, 1) * frequencies
        parts += [angle.sin(), angle.cos()]
    return torch.cat(parts, dim=1)[None].float()

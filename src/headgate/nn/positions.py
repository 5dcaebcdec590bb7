r"""Rotary positions (Su et al., "RoFormer", arXiv 2104.09864, equation 34).

Pair i of a vector at position m is turned by the angle :math:`m\,\theta_i,\ \theta_i = b^{-2i/d}`, so that the inner
product of a rotated query and a rotated key depends on the distance of their positions alone. Pairs are (i, i + d/2),
as in GPT-NeoX and Llama.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

__all__ = ["apply_rotary"]


def apply_rotary(
    x: Float[Tensor, "*batch length dim"], base: float = 10000.0, offset: int = 0
) -> Float[Tensor, "*batch length dim"]:
    """Turn the vectors of ``x`` by their positions.

    Args:
        x: ``(..., length, dim)`` with an even ``dim``.
        base: b of the angles; larger turns slower.
        offset: position of the first token.

    Returns:
        The turned vectors, of the shape and dtype of ``x``; norms are unchanged.

    Raises:
        TypeError: ``x`` is no floating tensor.
        ValueError: ``dim`` is odd.
    """
    if not x.is_floating_point():
        raise TypeError(f"x must be floating point, got {x.dtype}")
    length, dim = x.shape[-2:]
    if dim % 2:
        raise ValueError(f"x must have an even last size for rotary positions, got {tuple(x.shape)}")
    wide = torch.promote_types(x.dtype, torch.float32)
    pairs = torch.arange(dim // 2, device=x.device, dtype=wide)
    positions = torch.arange(length, device=x.device, dtype=wide) + offset
    angle = positions[:, None] * base ** (-2 * pairs / dim)
    cos, sin = angle.cos(), angle.sin()
    left, right = x.to(wide).chunk(2, dim=-1)
    return torch.cat((left * cos - right * sin, right * cos + left * sin), dim=-1).to(x.dtype)

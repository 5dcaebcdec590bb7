"""Shapes and textures as signed distances in object coordinates.

A shape of radius 1 lies around the origin, x to the right and y down as in an image. Negative distances are inside:

    circle   square   triangle   cross     star     ring    diamond    bar
      ●        ■         ▲         ✚         ★        ◯        ◆        ▬

Circle and ring are closed forms; the others are polygons, whose distance is the least over the edges, with the sign of
the crossing-number test. No shape reaches farther than :data:`REACH` from the origin.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

__all__ = ["REACH", "SHAPES", "TEXTURES", "rotation_period", "signed_distance", "texture_distance"]

REACH = 1.3

SHAPES = ("circle", "square", "triangle", "cross", "star", "ring", "diamond", "bar")
TEXTURES = ("solid", "stripes", "dots")

_RING_OUTER, _RING_INNER = 1.05, 0.55
_STRIPE_PERIOD = 0.9
_DOT_PERIOD, _DOT_RADIUS = 0.9, 0.28


def _ngon(count: int, radius: float) -> tuple[tuple[float, float], ...]:
    angles = [2 * math.pi * index / count - math.pi / 2 for index in range(count)]
    return tuple((radius * math.cos(angle), radius * math.sin(angle)) for angle in angles)


def _star(points: int, outer: float, inner: float) -> tuple[tuple[float, float], ...]:
    angles = [math.pi * index / points - math.pi / 2 for index in range(2 * points)]
    radii = [inner if index % 2 else outer for index in range(2 * points)]
    return tuple((r * math.cos(angle), r * math.sin(angle)) for r, angle in zip(radii, angles, strict=True))


def _box(half_width: float, half_height: float) -> tuple[tuple[float, float], ...]:
    x, y = half_width, half_height
    return ((-x, -y), (x, -y), (x, y), (-x, y))


def _plus(length: float, width: float) -> tuple[tuple[float, float], ...]:
    a, b = length, width
    quarter = ((b, -a), (b, -b), (a, -b))
    turns = [(1, 0), (0, 1), (-1, 0), (0, -1)]
    return tuple((c * x - s * y, s * x + c * y) for c, s in turns for x, y in quarter)


_POLYGONS = {
    "square": _box(0.9, 0.9),
    "triangle": _ngon(3, 1.25),
    "cross": _plus(1.15, 0.4),
    "star": _star(5, 1.28, 0.52),
    "diamond": ((0.0, -1.28), (0.72, 0.0), (0.0, 1.28), (-0.72, 0.0)),
    "bar": _box(1.22, 0.42),
}

# Turns by 2 pi / order leave the shape or the texture as it is; 0 means any turn.
_SHAPE_ORDER = {"circle": 0, "square": 4, "triangle": 3, "cross": 4, "star": 5, "ring": 0, "diamond": 2, "bar": 2}
_TEXTURE_ORDER = {"solid": 0, "stripes": 2, "dots": 4}


def signed_distance(shape: str, x: Float[Tensor, ...], y: Float[Tensor, ...]) -> Float[Tensor, ...]:
    """Measure how far points lie outside a shape of radius 1.

    Args:
        shape: one of :data:`SHAPES`.
        x: coordinates to the right, in radii.
        y: coordinates down, in radii.

    Returns:
        Distances in radii, negative inside; differentiable in both coordinates.

    Raises:
        ValueError: unknown shape.
    """
    if shape in ("circle", "ring"):
        distance = (x * x + y * y).clamp_min(1e-12).sqrt()
        if shape == "circle":
            return distance - 1.0
        return torch.maximum(distance - _RING_OUTER, _RING_INNER - distance)
    if shape not in _POLYGONS:
        raise ValueError(f"shape must be one of {', '.join(SHAPES)}, got {shape!r}")
    return _polygon_distance(_POLYGONS[shape], x, y)


def texture_distance(texture: str, x: Float[Tensor, ...], y: Float[Tensor, ...]) -> Float[Tensor, ...]:
    """Measure how far points lie outside the dark part of a texture: stripes across x, or dots on a square lattice.

    Args:
        texture: ``"stripes"`` or ``"dots"``.
        x: coordinates to the right, in radii.
        y: coordinates down, in radii.

    Returns:
        Distances in radii, negative in the dark part.

    Raises:
        ValueError: the texture has no dark part or is unknown.
    """
    if texture == "stripes":
        return _to_nearest_multiple(x, _STRIPE_PERIOD).abs() - _STRIPE_PERIOD / 4
    if texture == "dots":
        dx, dy = _to_nearest_multiple(x, _DOT_PERIOD), _to_nearest_multiple(y, _DOT_PERIOD)
        return (dx * dx + dy * dy).clamp_min(1e-12).sqrt() - _DOT_RADIUS
    raise ValueError(f"texture must be stripes or dots, got {texture!r}")


def rotation_period(shape: str, texture: str, rotations: int) -> int:
    """Give the number of rotation bins after which an object looks the same: 1 for a plain circle.

    Args:
        shape: one of :data:`SHAPES`.
        texture: one of :data:`TEXTURES`.
        rotations: bins of 2 pi / ``rotations``.

    Returns:
        ``rotations / gcd(rotations, order)``, where ``order`` counts the turns that leave shape and texture unchanged.
    """
    return rotations // math.gcd(rotations, math.gcd(_SHAPE_ORDER[shape], _TEXTURE_ORDER[texture]))


def _to_nearest_multiple(x: Float[Tensor, ...], period: float) -> Float[Tensor, ...]:
    return x - period * torch.round(x.detach() / period)


def _polygon_distance(
    vertices: tuple[tuple[float, float], ...], x: Float[Tensor, ...], y: Float[Tensor, ...]
) -> Float[Tensor, ...]:
    squared = torch.full_like(x, math.inf)
    inside = torch.zeros_like(x, dtype=torch.bool)
    for (ax, ay), (bx, by) in zip(vertices, vertices[1:] + vertices[:1], strict=True):
        ex, ey = bx - ax, by - ay
        wx, wy = x - ax, y - ay
        along = ((wx * ex + wy * ey) / (ex * ex + ey * ey)).clamp(0.0, 1.0)
        squared = torch.minimum(squared, (wx - along * ex) ** 2 + (wy - along * ey) ** 2)
        if ey != 0.0:
            spans = (y >= min(ay, by)) & (y < max(ay, by))
            inside = inside ^ (spans & (wx < wy * (ex / ey)))
    distance = squared.clamp_min(1e-12).sqrt()
    return torch.where(inside, -distance, distance)

r"""A small world for diffusion models: one coloured shape on 32 × 32 pixels, drawn from signed distances in closed form.

A pixel shows ``background (1 - a) + colour a`` with ``a = clip(1/2 - d, 0, 1)``, d the signed distance to the shape in pixels
(negative inside). Attributes: shape (circle, square, triangle, cross), colour (red, green, blue, yellow), size (small,
large), and the quadrant of the image in which the centre lies.

========  ===============================================================================================
preset    what varies
========  ===============================================================================================
large     big and nearly central on grey: easy to generate
jitter    small, anywhere, turned by up to a quarter radian, on a coloured gradient with noise: hard to probe
========  ===============================================================================================

Every picture is a function of (preset, seed, number).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from headgate.data.seeding import portable_normal, stream_generator

__all__ = ["SHAPE_COLOURS", "SHAPE_NAMES", "ShapePictures", "draw_shape", "shape_pictures"]

SHAPE_NAMES = ("circle", "square", "triangle", "cross")
SHAPE_COLOURS = {
    "red": (0.9, 0.15, 0.15),
    "green": (0.15, 0.75, 0.2),
    "blue": (0.2, 0.3, 0.95),
    "yellow": (0.95, 0.85, 0.1),
}
_SIDE = 32


@dataclass(frozen=True)
class _Preset:
    radii: tuple[float, float]
    centre: tuple[float, float]
    noise: float
    turned: float = 0.0
    radius_jitter: float = 0.0
    coloured: bool = False


_PRESETS = {
    "large": _Preset(radii=(0.30, 0.39), centre=(0.42, 0.58), noise=0.01),
    "jitter": _Preset(
        radii=(0.19, 0.28), centre=(0.3, 0.7), noise=0.03, turned=0.25, radius_jitter=0.05, coloured=True
    ),
}


@dataclass(frozen=True)
class ShapePictures:
    """Pictures and what they show.

    Attributes:
        images: float32 ``(n, 3, 32, 32)`` in [-1, 1], as diffusion models take them.
        shape: index into :data:`SHAPE_NAMES`, int64 ``(n,)``.
        colour: index into :data:`SHAPE_COLOURS`.
        size: 0 small, 1 large.
        quadrant: of the centre: 0 top left, 1 top right, 2 bottom left, 3 bottom right.
    """

    images: Float[Tensor, "n 3 32 32"]
    shape: Int[Tensor, " n"]
    colour: Int[Tensor, " n"]
    size: Int[Tensor, " n"]
    quadrant: Int[Tensor, " n"]

    def __len__(self) -> int:
        return len(self.images)

    @property
    def label(self) -> Int[Tensor, " n"]:
        """One of 16 classes, ``4 * shape + colour``."""
        return 4 * self.shape + self.colour


def shape_pictures(count: int, seed: int, preset: str = "large", split: str = "train") -> ShapePictures:
    """Draw pictures.

    Args:
        count: how many, ≥ 1.
        seed: of the draw.
        preset: ``"large"`` or ``"jitter"``.
        split: a name such as ``"train"`` or ``"test"``; each is a stream of its own.

    Raises:
        ValueError: ``count`` below 1 or an unknown preset.
    """
    if preset not in _PRESETS:
        raise ValueError(f"preset must be one of {', '.join(_PRESETS)}, got {preset!r}")
    if count < 1:
        raise ValueError(f"count must be at least 1, got {count}")
    settings = _PRESETS[preset]
    generator = stream_generator(seed, f"shape_pictures/{preset}/{split}")

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(count, *shape, generator=generator)

    shape, colour, size = (torch.randint(n, (count,), generator=generator) for n in (4, 4, 2))
    centre = uniform(*settings.centre, 2) * _SIDE
    radius = torch.tensor(settings.radii)[size] * _SIDE * (1 + settings.radius_jitter * uniform(-1, 1))
    angle = settings.turned * uniform(-1, 1)
    if settings.coloured:
        steps = torch.linspace(-1, 1, _SIDE)
        slope = 0.1 * uniform(-1, 1, 2, 1, 1, 1)
        gradient = slope[:, 0] * steps[None, None, None, :] + slope[:, 1] * steps[None, None, :, None]
        background = uniform(0.2, 0.6, 3, 1, 1) + gradient
    else:
        background = uniform(0.2, 0.4, 1, 1, 1).expand(-1, 3, _SIDE, _SIDE)
    cover = draw_shape(shape, centre, radius, angle)[:, None]
    rgb = torch.tensor(tuple(SHAPE_COLOURS.values()))[colour][:, :, None, None]
    pictures = background * (1 - cover) + rgb * cover
    pictures = pictures + settings.noise * portable_normal(pictures.shape, generator)
    quadrant = (centre[:, 0] >= _SIDE / 2).long() + 2 * (centre[:, 1] >= _SIDE / 2).long()
    return ShapePictures(pictures.clamp(0, 1) * 2 - 1, shape, colour, size, quadrant)


def draw_shape(
    shape: Int[Tensor, " n"], centre: Float[Tensor, "n 2"], radius: Float[Tensor, " n"], angle: Float[Tensor, " n"]
) -> Float[Tensor, "n 32 32"]:
    """How much of each pixel a shape covers, in [0, 1].

    Args:
        shape: index into :data:`SHAPE_NAMES`.
        centre: (x, y) in pixels from the top left corner; pixel i reaches from i to i + 1.
        radius: in pixels.
        angle: by which the shape is turned, in radians.
    """
    places = torch.arange(_SIDE) + 0.5
    x = places[None, None, :] - centre[:, 0, None, None]
    y = places[None, :, None] - centre[:, 1, None, None]
    cos, sin = angle.cos()[:, None, None], angle.sin()[:, None, None]
    u, v = cos * x + sin * y, cos * y - sin * x
    r = radius[:, None, None]
    circle = (u.square() + v.square()).sqrt() - r
    square = torch.maximum(u.abs(), v.abs()) - 0.85 * r
    sides = torch.maximum(0.866 * u + 0.5 * v, -0.866 * u + 0.5 * v)
    triangle = torch.maximum(sides, -v) - 0.55 * r
    lying = torch.maximum(u.abs() - 1.05 * r, v.abs() - 0.36 * r)
    standing = torch.maximum(v.abs() - 1.05 * r, u.abs() - 0.36 * r)
    cross = torch.minimum(lying, standing)
    distance = torch.stack([circle, square, triangle, cross], dim=1)
    chosen = distance.gather(1, shape[:, None, None, None].expand(-1, 1, _SIDE, _SIDE))[:, 0]
    return (0.5 - chosen).clamp(0, 1)

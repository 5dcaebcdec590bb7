"""The sprite atlas: every object drawn once, then only copied.

For each shape, size, rotation bin and sub-pixel phase a patch holds the share of each pixel that the object covers,
counted over 4 x 4 sub-samples. A centre that lies on a multiple of 1/phases pixel is a whole-pixel offset and a phase,
so placing is copying: the same factors give the same bits.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from headgate.data.scenes.shapes import REACH, signed_distance, texture_distance

__all__ = ["DARKENING", "SUBSAMPLES", "build_atlas", "patch_side", "place_patches"]

SUBSAMPLES = 4
DARKENING = 0.625  # how much of an object's colour the dark part of its texture takes away

_TIE = 1e-5  # sub-samples on the border count as inside, whatever the rounding of the last bit


def patch_side(radii: Sequence[float]) -> int:
    """Give the side of a patch in pixels, even, that holds the largest object at any phase.

    Args:
        radii: the sizes in pixels.
    """
    return 2 * math.ceil(REACH * max(radii)) + 2


def build_atlas(
    shapes: Sequence[str], radii: Sequence[float], rotations: int, phases: int, texture: str = "solid"
) -> Float[Tensor, "shapes sizes rotations phases phases side side"]:
    """Rasterise every patch.

    Args:
        shapes: names.
        radii: sizes in pixels.
        rotations: bins of 2 pi / ``rotations``.
        phases: sub-pixel positions per pixel and axis; the first of the two phase axes is y.
        texture: ``"solid"`` gives coverage in [0, 1]; another texture gives coverage less the darkening of its dark part.

    Returns:
        float32 patches whose centre lies at ``side / 2 + phase / phases`` pixels.
    """
    side = patch_side(radii)
    steps = (torch.arange(side * SUBSAMPLES, dtype=torch.float64) + 0.5) / SUBSAMPLES - side / 2
    atlas = torch.empty(len(shapes), len(radii), rotations, phases, phases, side, side)
    shifts = torch.arange(phases, dtype=torch.float64) / phases
    y, x = torch.meshgrid(steps, steps, indexing="ij")
    x = (x[None, None] - shifts[None, :, None, None]).expand(phases, phases, -1, -1)
    y = (y[None, None] - shifts[:, None, None, None]).expand(phases, phases, -1, -1)
    for size, radius in enumerate(radii):
        near = (x * x + y * y) < (REACH * radius + 1e-6) ** 2
        near_x, near_y = x[near] / radius, y[near] / radius
        for rotation in range(rotations):
            angle = 2 * math.pi * rotation / rotations
            turned_x = math.cos(angle) * near_x + math.sin(angle) * near_y
            turned_y = -math.sin(angle) * near_x + math.cos(angle) * near_y
            for index, shape in enumerate(shapes):
                paint = (signed_distance(shape, turned_x, turned_y) <= _TIE).double()
                if texture != "solid":
                    paint -= DARKENING * paint * (texture_distance(texture, turned_x, turned_y) <= _TIE)
                samples = torch.zeros_like(x).masked_scatter_(near, paint)
                blocks = samples.view(phases, phases, side, SUBSAMPLES, side, SUBSAMPLES)
                atlas[index, size, rotation] = blocks.mean(dim=(3, 5)).float()
    return atlas


def place_patches(
    patches: Float[Tensor, "objects side side"], x: Int[Tensor, " objects"], y: Int[Tensor, " objects"], size: int
) -> Float[Tensor, "objects size size"]:
    """Copy each patch into its own empty image, cutting off what lies outside.

    Args:
        patches: even side.
        x: pixel column, 0 to ``size``, at which the middle of the patch (its column side / 2) comes to lie.
        y: pixel row, likewise.
        size: the side of the images.
    """
    count, side, _ = patches.shape
    width = size + side
    canvas = patches.new_zeros(count * width * width)
    corner = (torch.arange(count, device=x.device) * width + y) * width + x
    steps = torch.arange(side, device=x.device)
    inner = (steps[:, None] * width + steps[None, :]).flatten()
    canvas[(corner[:, None] + inner).flatten()] = patches.flatten()
    half = side // 2
    return canvas.view(count, width, width)[:, half : half + size, half : half + size]

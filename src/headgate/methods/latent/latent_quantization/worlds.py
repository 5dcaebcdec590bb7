"""Images with known factors for the claim: the procedural scenes on a laptop, Shapes3D from its file."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from jaxtyping import Float, Int
from torch import Tensor

from headgate.data.factors import FactorDataset, Shapes3D
from headgate.data.scenes import SingleObject, World
from headgate.errors import DataError

__all__ = ["Images", "scene_images", "shapes3d_images"]


@dataclass(frozen=True)
class Images:
    """A set of images and their factors.

    Attributes:
        size: number of images.
        shape: ``(channels, height, width)``.
        factor_names: names of the factors.
        pixels: indices → float images in [0, 1], ``(count, channels, height, width)``.
        factors: indices → int64 factors, ``(count, factor)``.
    """

    size: int
    shape: tuple[int, int, int]
    factor_names: tuple[str, ...]
    pixels: Callable[[Tensor], Float[Tensor, "count channel height width"]]
    factors: Callable[[Tensor], Int[Tensor, "count factor"]]


@functools.lru_cache(maxsize=2)
def scene_images(side: int = 16, radii: tuple[float, float, float] | None = None) -> Images:
    """All 8,100 pictures of one shape; rendered once per process.

    Args:
        side: pixels to a side.
        radii: the three sizes of the shape, as fractions of the side; by default 0.125 to 0.22.
    """
    world = World(size=side, shapes=3, sizes=radii or 3, positions=5, hues=6, backgrounds=6)
    scenes = SingleObject(world, "shapes3d-lite")
    rendered = scenes.all()
    pixels, factors = rendered["image"], rendered["factors"]
    return Images(
        len(scenes),
        (3, side, side),
        scenes.factor_names,
        lambda index: pixels[index],
        lambda index: factors[index],
    )


def shapes3d_images() -> Images:
    """Shapes3D, read as it is needed.

    Raises:
        DataError: ``$HEADGATE_SHAPES3D`` is not set, or names no such file.
        MissingExtraError: h5py is not installed.
    """
    path = os.environ.get("HEADGATE_SHAPES3D")
    if path is None:
        raise DataError("Shapes3D was not found; set HEADGATE_SHAPES3D to the file 3dshapes.h5")
    return _from_dataset(Shapes3D(Path(path)))


def _from_dataset(data: FactorDataset) -> Images:
    height, width, channels = data.images(0).shape[1:]
    return Images(
        len(data),
        (channels, height, width),
        data.factor_names,
        lambda index: data.images(index).permute(0, 3, 1, 2).float() / 255,
        data.factors,
    )

"""One object per picture: every picture is a place in a grid of factors."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Bool, Int, UInt8
from torch import Tensor

from headgate.data.factors.protocol import FactorGrid, FactorSubset, Indices
from headgate.data.scenes.export import write_dsprites
from headgate.data.scenes.splits import PARTS, Split, kept_indices, split
from headgate.data.scenes.world import World
from headgate.data.seeding import BatchLoader, splitmix64_array

__all__ = ["PRESETS", "SingleObject"]

PRESETS = ("full", "dsprites-lite", "shapes3d-lite")
_ALL_AT_ONCE = 200_000
_CHUNK = 1024


class SingleObject(FactorGrid):
    """Pictures of one object, enumerated by their factors; a :class:`~headgate.data.factors.FactorDataset`.

    The grid holds every factor of the preset that has more than one value. Shapes that look alike at any angle (a plain
    circle) report rotation 0; other symmetric shapes keep their rotation, and ``world.rotation_period`` tells when they
    look alike again. :meth:`is_canonical` flags the first of the pictures that look alike.

    Args:
        world: the world to draw from.
        preset: ``"full"``; ``"dsprites-lite"``, white shapes on black of one channel with pixels 0 or 1, over shape, size,
            rotation, x and y; ``"shapes3d-lite"`` over shape, size, x, y, hue and the ground's colours.
        fixed: values of factors that shall not vary, e.g. ``{"size": 2}``. Factors outside the preset take their first
            value, sizes and positions their middle one.
        out: dtype of ``image`` in examples and batches, ``"float32"`` or ``"uint8"``.
        range: ``"01"`` or ``"-11"``.
        seed: of the pixel noise, if the world has noise; a picture always has the same noise.

    Raises:
        ValueError: unknown preset or factors, or nothing that varies.
    """

    def __init__(
        self,
        world: World,
        preset: str = "full",
        *,
        fixed: Mapping[str, int] | None = None,
        out: str = "float32",
        range: str = "01",
        seed: int = 0,
    ) -> None:
        chosen = {
            "full": world.factors,
            "dsprites-lite": ("shape", "size", "rotation", "x", "y"),
            "shapes3d-lite": ("shape", "size", "x", "y", "hue", *world.scene_factors),
        }
        if preset not in chosen:
            raise ValueError(f"preset must be one of {', '.join(PRESETS)}, got {preset!r}")
        if preset == "dsprites-lite":
            world = world.replace(channels=1, hues=("white",), backgrounds=("black",), background="plain", textures=1)
        self.world = world
        self.preset = preset
        self.fixed = dict(fixed or {})
        world.render(self.fixed, out=out, range=range, noise_keys=torch.zeros(1, dtype=torch.int64))
        names = [name for name in chosen[preset] if world.cards[name] > 1 and name not in self.fixed]
        if not names:
            raise ValueError("the preset must leave a factor that varies, got one value for each")
        super().__init__(names, [world.cards[name] for name in names], cyclic=("rotation", "hue"))
        self.out = out
        self.range = range
        self.seed = seed

    def scene(self, index: Indices) -> dict[str, Int[Tensor, " count"]]:
        """Give every factor of the world, the fixed ones too, at places of the grid."""
        grid = self.unravel(index)
        scene = {}
        for name in self.world.factors:
            middle = self.world.cards[name] // 2 if name in ("size", "x", "y") else 0
            scene[name] = torch.full((len(grid),), self.fixed.get(name, middle))
        scene |= {name: grid[:, column] for column, name in enumerate(self.factor_names)}
        period = self.world.rotation_period[scene["shape"], scene["texture"]]
        return scene | {"rotation": scene["rotation"] * (period > 1)}

    def factors(self, index: Indices) -> Int[Tensor, "count factors"]:
        """Give the factors of pictures as int64 indices; plain circles have rotation 0."""
        scene = self.scene(index)
        return torch.stack([scene[name] for name in self.factor_names], dim=-1)

    def images(self, index: Indices) -> UInt8[Tensor, "count height width channels"]:
        """Draw pictures, uint8 with the channels last."""
        return self._draw(index, "uint8", "01").permute(0, 2, 3, 1).contiguous()

    def is_canonical(self, index: Indices) -> Bool[Tensor, " count"]:
        """Tell which pictures are the first of those that look alike."""
        scene = self.scene(index)
        canonical = self.world.canonical(scene)
        raw = self.unravel(index)
        if "rotation" not in self.factor_names:
            return torch.ones(len(raw), dtype=torch.bool)
        return canonical["rotation"] == raw[:, self.factor_names.index("rotation")]

    def __getitem__(self, item: int) -> dict[str, Tensor]:
        if not -len(self) <= item < len(self):
            raise IndexError(f"item must lie in [0, {len(self)}), got {item}")
        example = self.take(item % len(self))
        return {"image": example["image"][0], "factors": example["factors"][0]}

    def take(self, index: Indices) -> dict[str, Tensor]:
        """Give examples at places of the grid: ``image`` (count, channels, size, size), ``factors`` and ``index``."""
        return {
            "image": self._draw(index, self.out, self.range),
            "factors": self.factors(index),
            "index": self.places(index),
        }

    def sample(self, count: int, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """Draw examples uniformly from the grid, each independently of the others."""
        return self.take(torch.randint(len(self), (count,), generator=generator))

    def batch(self, count: int, generator: torch.Generator | None = None) -> dict[str, Any]:
        """Draw examples as :meth:`sample` does; the name that all modes share."""
        return self.sample(count, generator)

    def loader(self, batch_size: int, steps: int, seed: int = 0, stream: int | str = 0, start: int = 0) -> BatchLoader:
        """Give an iterable of batches; the same (seed, stream, step) is the same batch on any machine."""
        return BatchLoader(self.batch, batch_size, steps, seed, stream, start)

    def all(self) -> dict[str, Tensor]:
        """Give every picture of the grid at once.

        Raises:
            ValueError: the grid has 200,000 pictures or more.
        """
        if len(self) >= _ALL_AT_ONCE:
            raise ValueError(
                f"all() is for grids of under {_ALL_AT_ONCE} pictures, got {len(self)}; sample or split it"
            )
        return self.take(torch.arange(len(self)))

    def split(
        self, kind: str | Split = "iid", seed: int = 0, unique: bool = False, **options: Any
    ) -> dict[str, Tensor]:
        """Divide the grid.

        Args:
            kind: a kind or a :func:`~headgate.data.scenes.splits.split`.
            seed: of the split, if ``kind`` is a name.
            unique: leave out pictures that look like an earlier one. Those that stay lie in the same part in any case.
            options: of :func:`~headgate.data.scenes.splits.split`, if ``kind`` is a name.

        Returns:
            ``train``, ``val`` and ``test``: ascending places of the grid.

        Raises:
            ValueError: a split that does not fit the grid.
        """
        described = split(kind, seed, **options) if isinstance(kind, str) else kind
        still = [factor for factor in described.factors if factor not in self.factor_names]
        if still:
            raise ValueError(f"the split needs factors that vary in this grid, got {', '.join(still)}")
        whole = torch.arange(len(self))
        if unique:
            whole = whole[self.is_canonical(whole)]
        scene = self.scene(whole)
        return {name: whole[kept_indices(self.world, described.part(self.world, name), scene)] for name in PARTS}

    def dataset(
        self, split: str | Split = "iid", part: str = "train", seed: int = 0, unique: bool = False, **options: Any
    ) -> FactorSubset:
        """Give one part of a split as a torch ``Dataset`` of ``image`` and ``factors``.

        Args:
            split: as ``kind`` in :meth:`split`.
            part: ``"train"``, ``"val"`` or ``"test"``.
            seed: as in :meth:`split`.
            unique: as in :meth:`split`.
            options: as in :meth:`split`.

        Raises:
            ValueError: unknown part, or a split that does not fit the grid.
        """
        parts = self.split(split, seed, unique, **options)
        if part not in parts:
            raise ValueError(f"part must be one of {', '.join(PARTS)}, got {part!r}")
        return FactorSubset(self, parts[part], self.out, self.range)

    def to_npz(self, path: str | os.PathLike[str], style: str = "dsprites") -> None:
        """Write the whole grid with the keys of a public file, so that code written for that file reads it unchanged.

        Args:
            path: the file to write.
            style: ``"dsprites"``; needs the preset ``"dsprites-lite"``.

        Raises:
            ValueError: another style or preset.
        """
        if style != "dsprites" or self.preset != "dsprites-lite" or self.fixed:
            raise ValueError(
                "style must be 'dsprites' with the preset 'dsprites-lite' and nothing fixed, "
                f"got style={style!r}, preset={self.preset!r}, fixed={self.fixed}"
            )
        write_dsprites(path, self.world, self.images(torch.arange(len(self)))[..., 0] // 255)

    def _draw(self, index: Indices, out: str, range: str) -> Tensor:
        places = self.places(index)
        if len(places) == 0:
            raise ValueError("index must name at least one picture, got none")
        return torch.cat([self._draw_chunk(chunk, out, range) for chunk in places.split(_CHUNK)])

    def _draw_chunk(self, places: Tensor, out: str, range: str) -> Tensor:
        keys = torch.from_numpy(splitmix64_array(places, self.seed).view("int64"))
        if self.preset != "dsprites-lite":
            return self.world.render(self.scene(places), out=out, range=range, noise_keys=keys)
        image = self.world.render(self.scene(places), noise_keys=keys)
        binary = (image >= 0.5).to(torch.float32)
        if out == "uint8":
            return (binary * 255).to(torch.uint8)
        return binary if range == "01" else binary * 2.0 - 1.0

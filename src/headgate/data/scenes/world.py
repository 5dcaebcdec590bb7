"""The world: factors in, pictures out.

A factor is an int64 index into its values. An object has shape, size, rotation, x, y, hue and texture; the picture has a
background (or a floor and a wall). :class:`World` knows the values, turns factors into a number in the row-major grid and
back, and renders: by copying sprites from an atlas, or exactly and differentiably from signed distances.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, Literal, overload

import torch
from jaxtyping import Float, Int
from torch import Tensor

from headgate.data.scenes.atlas import build_atlas, place_patches
from headgate.data.scenes.compositing import Rendering, composite, finish_image, labels_of
from headgate.data.scenes.config import OBJECT_FACTORS, WorldConfig, radii, size_names, take_names
from headgate.data.scenes.exact import cover_exactly
from headgate.data.scenes.palette import COLOURS, HUES, floor_rgb, ground_rgb, hue_of, luma, object_rgb
from headgate.data.scenes.shapes import SHAPES, TEXTURES, rotation_period
from headgate.data.seeding import hashed_normal

__all__ = ["World"]

_BAR_GREY = 150.0
_HORIZON = 0.55  # the wall ends and the floor begins at this fraction of the height


class World:
    """A world of coloured shapes with known factors.

    Args:
        size: the side of an image in pixels.
        channels: 3, or 1 for grey levels (then choose hues that differ in brightness, e.g. ``hues=("white",)``).
        shapes: how many of circle, square, triangle, cross, star, ring, diamond, bar; or names out of these.
        sizes: how many (1 to 6), or radii as fractions of the side.
        rotations: bins of 2 pi / ``rotations``.
        positions: values of x and of y.
        hues: how many of red, orange, yellow, green, cyan, blue, purple, pink; or up to 8 names, grey, white and black too.
        phases: sub-pixel positions per pixel and axis, even.
        background: ``"plain"``, or ``"floor_wall"`` for a floor and a wall with a colour each.
        textures: how many of solid, stripes, dots; or names.
        backgrounds: how many ground colours (the ninth is grey), or names.
        aa: ``"atlas"``, or ``"sdf"`` to render exactly by default.
        margin: centres keep this fraction of the side away from the border.
        noise: standard deviation of Gaussian pixel noise on the scale 0 to 1.

    Attributes:
        config: the settings; worlds hash and compare by them.
        object_factors: the factors of an object.
        scene_factors: the factors of a picture.
        factors: all of them in the order of the grid.
        cards: factor → number of values.

    Raises:
        ValueError: unknown names, a size whose patch does not fit, odd phases, negative noise, too many positions.
    """

    def __init__(
        self,
        size: int = 32,
        channels: int = 3,
        shapes: int | Sequence[str] = 4,
        sizes: int | Sequence[float] = 3,
        rotations: int = 8,
        positions: int = 8,
        hues: int | Sequence[str] = 8,
        phases: int = 2,
        background: str = "plain",
        *,
        textures: int | Sequence[str] = 1,
        backgrounds: int | Sequence[str] = 8,
        aa: str = "atlas",
        margin: float = 0.15,
        noise: float = 0.0,
    ) -> None:
        self.config = WorldConfig(
            size=size,
            channels=channels,
            shapes=take_names("shapes", shapes, SHAPES),
            sizes=radii(sizes),
            rotations=rotations,
            positions=positions,
            hues=take_names("hues", hues, COLOURS, most=len(HUES)),
            textures=take_names("textures", textures, TEXTURES),
            backgrounds=take_names("backgrounds", backgrounds, COLOURS),
            phases=phases,
            background=background,
            aa=aa,
            margin=margin,
            noise=noise,
        )
        self.object_factors = OBJECT_FACTORS
        self.scene_factors = self.config.scene_factors
        self.factors = (*self.object_factors, *self.scene_factors)
        self.cards = self.config.cards
        self._devices: dict[torch.device, _Tables] = {}
        if aa == "atlas":
            self._tables(torch.device("cpu"))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, World) and self.config == other.config

    def __hash__(self) -> int:
        return hash(self.config)

    def __repr__(self) -> str:
        fields = ", ".join(
            f"{field.name}={getattr(self.config, field.name)!r}" for field in dataclasses.fields(self.config)
        )
        return f"World({fields})"

    def replace(self, **settings: Any) -> World:
        """Give a world with some settings changed, e.g. ``world.replace(noise=0.1)``."""
        known = {field.name: getattr(self.config, field.name) for field in dataclasses.fields(self.config)}
        return World(**(known | settings))

    @property
    def atlas(self) -> Float[Tensor, "shapes sizes rotations phases phases side side"]:
        """Coverage patches of every shape, size, rotation, y-phase and x-phase.

        Raises:
            ValueError: a world with ``aa="sdf"`` has none.
        """
        if self.config.aa != "atlas":
            raise ValueError("a world with aa='sdf' has no atlas")
        return self._tables(torch.device("cpu")).atlas

    @property
    def position_units(self) -> Int[Tensor, " positions"]:
        """The values of x and y in units of 1/phases pixel."""
        return torch.tensor(self.config.position_units)

    def names(self, factor: str) -> tuple[str, ...]:
        """Give the words for the values of a factor that captions can name.

        Raises:
            ValueError: the factor is unknown or its values have no names.
        """
        config = self.config
        words = {
            "shape": config.shapes,
            "size": size_names(len(config.sizes)),
            "hue": config.hues,
            "texture": config.textures,
        } | dict.fromkeys(self.scene_factors, config.backgrounds)
        if factor not in words:
            raise ValueError(f"factor must be one of {', '.join(words)}, got {factor!r}")
        return words[factor]

    def values(self, factor: str) -> Float[Tensor, " values"]:
        """Give the physical values of a factor.

        Returns:
            size: radii as fractions of the side; rotation: radians; x, y: fractions of the side; hue and grounds: hue in
            [0, 1), NaN for grey, white and black; shape and texture: the place in the list of all shapes or textures.

        Raises:
            ValueError: unknown factor.
        """
        config = self.config
        if factor == "size":
            return torch.tensor(config.sizes)
        if factor == "rotation":
            return torch.tensor([2 * math.pi * index / config.rotations for index in range(config.rotations)])
        if factor in ("x", "y"):
            return torch.tensor([unit / (config.phases * config.size) for unit in config.position_units])
        if factor == "shape":
            return torch.tensor([float(SHAPES.index(name)) for name in config.shapes])
        if factor == "texture":
            return torch.tensor([float(TEXTURES.index(name)) for name in config.textures])
        if factor == "hue" or factor in self.scene_factors:
            return torch.tensor([hue_of(name) for name in self.names(factor)])
        raise ValueError(f"factor must be one of {', '.join(self.factors)}, got {factor!r}")

    def index(self, factors: Mapping[str, Tensor]) -> Int[Tensor, ...]:
        """Give the row-major place of factors in the grid of all of them.

        Args:
            factors: every factor of :attr:`factors`, int64 of one shape.

        Raises:
            ValueError: a factor is missing, unknown or out of range.
        """
        self._check(factors)
        missing = [name for name in self.factors if name not in factors]
        if missing:
            raise ValueError(f"factors must hold every factor of the grid, missing: {', '.join(missing)}")
        place = torch.zeros_like(factors[self.factors[0]])
        for name in self.factors:
            place = place * self.cards[name] + factors[name]
        return place

    def unravel(self, index: int | Tensor) -> dict[str, Int[Tensor, ...]]:
        """Give the factors at a place of the grid; the inverse of :meth:`index`.

        Raises:
            ValueError: outside the grid.
        """
        place = torch.as_tensor(index, dtype=torch.int64)
        total = math.prod(self.cards.values())
        if place.numel() and not (int(place.min()) >= 0 and int(place.max()) < total):
            raise ValueError(f"index must lie in [0, {total}), got {int(place.min())} to {int(place.max())}")
        factors = {}
        for name in reversed(self.factors):
            factors[name] = place % self.cards[name]
            place = place // self.cards[name]
        return {name: factors[name] for name in self.factors}

    @property
    def rotation_period(self) -> Int[Tensor, "shapes textures"]:
        """After how many rotation bins an object looks the same; 1 for a plain circle."""
        config = self.config
        return torch.tensor(
            [
                [rotation_period(shape, texture, config.rotations) for texture in config.textures]
                for shape in config.shapes
            ]
        )

    def canonical(self, factors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Give the factors with each rotation replaced by the least one that draws the same picture."""
        texture = factors.get("texture", torch.zeros_like(factors["shape"]))
        period = self.rotation_period[factors["shape"], texture]
        return {**factors, "rotation": factors["rotation"] % period}

    def physical(self, factors: Mapping[str, Tensor | int]) -> dict[str, Tensor]:
        """Turn factors into what :meth:`render_physical` takes: the same picture with a continuous pose.

        Returns:
            shape, texture: int64; radius, x, y: fractions of the side; rotation: radians; rgb in [0, 1], with a last axis
            of channels; present; and the scene factors. All of shape (batch, objects), scene factors (batch,).
        """
        known = self._resolve(factors)
        table = self._tables(known["shape"].device)
        pose = {name: known[name] for name in ("shape", "texture", "present", *self.scene_factors)}
        pose["radius"] = self.values("size").to(table.device)[known["size"]]
        for name in ("rotation", "x", "y"):
            pose[name] = self.values(name).to(table.device)[known[name]]
        pose["rgb"] = table.colours[known["hue"]] / 255.0
        return pose

    @overload
    def render(
        self,
        factors: Mapping[str, Tensor | int],
        return_masks: Literal[False] = False,
        *,
        out: str = ...,
        range: str = ...,
        noise_keys: Tensor | None = ...,
        device: torch.device | str | None = ...,
    ) -> Tensor: ...
    @overload
    def render(
        self,
        factors: Mapping[str, Tensor | int],
        return_masks: Literal[True],
        *,
        out: str = ...,
        range: str = ...,
        noise_keys: Tensor | None = ...,
        device: torch.device | str | None = ...,
    ) -> Rendering: ...
    def render(
        self,
        factors: Mapping[str, Tensor | int],
        return_masks: bool = False,
        *,
        out: str = "float32",
        range: str = "01",
        noise_keys: Tensor | None = None,
        device: torch.device | str | None = None,
    ) -> Tensor | Rendering:
        """Draw pictures.

        Args:
            factors: object factors as int64 of shape (batch,), or (batch, objects) with the last object in front, or one
                number for all; scene factors of shape (batch,); ``present`` (batch, objects), 0 for objects to leave out.
                Factors that are not given take their first value, sizes and positions their middle one.
            return_masks: whether to hand back a :class:`~headgate.data.scenes.compositing.Rendering`.
            out: ``"float32"`` or ``"uint8"``.
            range: ``"01"``, or ``"-11"`` for float images in [-1, 1].
            noise_keys: one int64 per picture that names its pixel noise; needed where the world has noise.
            device: where to draw; default: where the factors are.

        Returns:
            Images (batch, channels, size, size), or a ``Rendering``.

        Raises:
            TypeError: factors of another dtype than int64.
            ValueError: unknown factors, indices out of range, shapes that do not agree.
        """
        known = self._resolve(factors, device)
        units = self._tables(known["shape"].device).units
        return self.render_units(
            {**known, "x": units[known["x"]], "y": units[known["y"]]}, return_masks, out, range, noise_keys
        )

    def render_units(
        self,
        sprites: Mapping[str, Tensor],
        return_masks: bool = False,
        out: str = "float32",
        range: str = "01",
        noise_keys: Tensor | None = None,
    ) -> Any:
        """Draw objects whose ``x`` and ``y`` are centres in units of 1/phases pixel instead of factor values.

        Args:
            sprites: every object factor (batch, objects), every scene factor (batch,), ``present`` (batch, objects); with
                ``aa="sdf"`` x and y may be fractional. ``occluder`` (batch, size, size) hides everything behind it.
            return_masks: as in :meth:`render`.
            out: as in :meth:`render`.
            range: as in :meth:`render`.
            noise_keys: as in :meth:`render`.

        Raises:
            ValueError: a centre outside the image.
        """
        config = self.config
        whole = config.size * config.phases
        for axis in ("x", "y"):
            low, high = int(sprites[axis].min()), int(sprites[axis].max())
            if low < 0 or high > whole:
                raise ValueError(
                    f"{axis} must lie in [0, {whole}] units of 1/{config.phases} pixel, got {low} to {high}"
                )
        table = self._tables(sprites["shape"].device)
        colours = table.colours[sprites["hue"]]
        if config.aa == "sdf":
            pose = {
                "shape": sprites["shape"],
                "texture": sprites["texture"],
                "radius": table.sizes[sprites["size"]],
                "rotation": sprites["rotation"] * (2 * math.pi / config.rotations),
                "x": sprites["x"].to(table.sizes.dtype) / whole,
                "y": sprites["y"].to(table.sizes.dtype) / whole,
            }
            cover, paint = cover_exactly(pose, config.shapes, config.textures, config.size)
        else:
            cover, paint = self._copy(sprites, table)
        return self._compose(cover, paint, colours, sprites, return_masks, out, range, noise_keys)

    def render_physical(
        self,
        pose: Mapping[str, Tensor],
        return_masks: bool = False,
        *,
        out: str = "float32",
        range: str = "01",
        noise_keys: Tensor | None = None,
    ) -> Any:
        """Draw objects of a continuous pose exactly, whatever the world's ``aa``.

        A pixel's coverage is clamp(1/2 - d, 0, 1) with the signed distance d in pixels, differentiable in radius,
        rotation, x, y and rgb.

        Args:
            pose: what :meth:`physical` gives, changed at will; in float64 the picture is, too.
            return_masks: as in :meth:`render`.
            out: as in :meth:`render`.
            range: as in :meth:`render`.
            noise_keys: as in :meth:`render`.
        """
        cover, paint = cover_exactly(pose, self.config.shapes, self.config.textures, self.config.size)
        return self._compose(cover, paint, pose["rgb"] * 255.0, pose, return_masks, out, range, noise_keys)

    def _copy(self, sprites: Mapping[str, Tensor], table: _Tables) -> tuple[Tensor, Tensor]:
        config = self.config
        shape = sprites["shape"]
        batch, objects = shape.shape
        whole_x, phase_x = sprites["x"] // config.phases, sprites["x"] % config.phases
        whole_y, phase_y = sprites["y"] // config.phases, sprites["y"] % config.phases
        place = (shape * len(config.sizes) + sprites["size"]) * config.rotations + sprites["rotation"]
        place = ((place * config.phases + phase_y) * config.phases + phase_x).flatten()
        columns, rows = whole_x.flatten(), whole_y.flatten()

        def draw(patches: Tensor) -> Tensor:
            return place_patches(patches, columns, rows, config.size).unflatten(0, (batch, objects))

        cover = draw(table.patches[place])
        if config.textures == ("solid",):
            return cover, cover
        per_texture = table.patches.shape[0]
        return cover, draw(table.painted[sprites["texture"].flatten() * per_texture + place])

    def _compose(
        self,
        cover: Tensor,
        paint: Tensor,
        colours: Tensor,
        scene: Mapping[str, Tensor],
        return_masks: bool,
        out: str,
        range: str,
        noise_keys: Tensor | None,
    ) -> Tensor | Rendering:
        config = self.config
        present = scene.get("present")
        if present is not None:
            keep = present.to(cover.dtype)[:, :, None, None]
            cover, paint = cover * keep, paint * keep
        table = self._tables(cover.device)
        if config.background == "plain":
            ground = table.grounds[scene["background"]][:, :, None, None].expand(-1, -1, config.size, config.size)
        else:
            wall, floor = table.grounds[scene["wall"]], table.floors[scene["floor"]]
            ground = torch.where(table.below, floor[:, :, None, None], wall[:, :, None, None])
        image, masks = composite(cover, paint, colours.to(cover.dtype), ground.to(cover.dtype))
        if "occluder" in scene:
            bar = scene["occluder"][:, None]
            image = torch.where(bar, _BAR_GREY, image)
            masks = torch.cat([torch.where(bar, 1.0, masks[:, :1]), torch.where(bar, 0.0, masks[:, 1:])], dim=1)
        if config.noise > 0:
            if noise_keys is None:
                raise ValueError("noise_keys must name the noise of each picture, because this world has noise")
            draws = hashed_normal(noise_keys, image[0].numel()).view_as(image).to(image.device)
            image = (image + 255.0 * config.noise * draws).clamp(0.0, 255.0)
        image = finish_image(image, out, range)  # type: ignore[arg-type]
        return Rendering(image, masks, labels_of(masks), cover) if return_masks else image

    def _tables(self, device: torch.device) -> _Tables:
        if device not in self._devices:
            self._devices[device] = _Tables(self.config, device)
        return self._devices[device]

    def _check(self, factors: Mapping[str, Tensor | int]) -> None:
        unknown = [name for name in factors if name not in self.factors and name != "present"]
        if unknown:
            raise ValueError(f"factors must be out of {', '.join(self.factors)}; unknown: {', '.join(unknown)}")
        for name, value in factors.items():
            if name == "present":
                continue
            if isinstance(value, Tensor) and value.dtype != torch.int64:
                raise TypeError(f"factor {name!r} must be int64, got {value.dtype}")
            tensor = torch.as_tensor(value)
            if tensor.numel() and not (int(tensor.min()) >= 0 and int(tensor.max()) < self.cards[name]):
                raise ValueError(
                    f"factor {name!r} must lie in [0, {self.cards[name]}), got {int(tensor.min())} to {int(tensor.max())}"
                )

    def _resolve(
        self, factors: Mapping[str, Tensor | int], device: torch.device | str | None = None
    ) -> dict[str, Tensor]:
        self._check(factors)
        given = {name: torch.as_tensor(value, device=device) for name, value in factors.items()}
        place = next((value.device for value in given.values()), torch.device("cpu"))
        per_object = [value for name, value in given.items() if name not in self.scene_factors]
        per_scene = [value for name, value in given.items() if name in self.scene_factors]
        rank = max((value.dim() for value in per_object), default=0)
        if rank > 2 or any(value.dim() > 1 for value in per_scene):
            raise ValueError("object factors must have the axes (batch,) or (batch, objects), scene factors (batch,)")
        try:
            shape = torch.broadcast_shapes(*(value.shape for value in per_object)) if per_object else torch.Size()
            batch = torch.broadcast_shapes(shape[:1], *(value.shape for value in per_scene), (1,))
        except RuntimeError as error:
            shapes = {name: tuple(value.shape) for name, value in given.items()}
            raise ValueError(f"factors must agree in batch and objects, got {shapes}") from error
        objects = (*batch, shape[1] if rank == 2 else 1)
        known: dict[str, Tensor] = {}
        for name in self.object_factors:
            middle = self.cards[name] // 2 if name in ("size", "x", "y") else 0
            value = given.get(name, torch.tensor(middle, device=place))
            known[name] = (value[:, None] if value.dim() == 1 else value).expand(objects)
        for name in self.scene_factors:
            known[name] = given.get(name, torch.tensor(0, device=place)).expand(batch)
        present = given.get("present", torch.ones((), dtype=torch.bool, device=place))
        known["present"] = (present[:, None] if present.dim() == 1 else present).expand(objects)
        return known


class _Tables:
    """What rendering looks up, on one device."""

    def __init__(self, config: WorldConfig, device: torch.device) -> None:
        def rgb(names: Sequence[str], colour: Any) -> Tensor:
            triples = [colour(name) for name in names]
            rows = triples if config.channels == 3 else [(luma(triple),) for triple in triples]
            return torch.tensor(rows, dtype=torch.float32, device=device)

        self.device = device
        self.units = torch.tensor(config.position_units, device=device)
        self.sizes = torch.tensor(config.sizes, device=device)
        self.colours = rgb(config.hues, object_rgb)
        self.grounds = rgb(config.backgrounds, ground_rgb)
        self.floors = rgb(config.backgrounds, floor_rgb)
        self.below = (torch.arange(config.size, device=device) >= round(_HORIZON * config.size))[:, None]
        pixels = tuple(config.size * radius for radius in config.sizes)
        if config.aa == "atlas":
            self.atlas = _atlas(config.shapes, pixels, config.rotations, config.phases, "solid").to(device)
            self.patches = self.atlas.flatten(0, 4)
            if config.textures != ("solid",):
                painted = [_atlas(config.shapes, pixels, config.rotations, config.phases, t) for t in config.textures]
                self.painted = torch.stack(painted).flatten(0, 5).to(device)


@lru_cache(maxsize=32)
def _atlas(shapes: tuple[str, ...], pixels: tuple[float, ...], rotations: int, phases: int, texture: str) -> Tensor:
    return build_atlas(shapes, pixels, rotations, phases, texture)

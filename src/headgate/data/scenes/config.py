"""The settings of a world: which values each factor takes, checked and hashable."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from headgate.data.scenes.atlas import patch_side
from headgate.validate import check_positive

__all__ = ["OBJECT_FACTORS", "WorldConfig", "radii", "size_names", "take_names"]

OBJECT_FACTORS = ("shape", "size", "rotation", "x", "y", "hue", "texture")

_SMALLEST, _LARGEST = 0.125, 0.22
_SIZE_NAMES = {
    1: ("medium",),
    2: ("small", "large"),
    3: ("small", "medium", "large"),
    4: ("tiny", "small", "large", "huge"),
    5: ("tiny", "small", "medium", "large", "huge"),
    6: ("tiny", "small", "medium", "large", "huge", "giant"),
}


@dataclass(frozen=True)
class WorldConfig:
    """What a :class:`~headgate.data.scenes.World` is made of; two worlds with equal settings draw equal pictures.

    Attributes:
        size: the side of an image in pixels.
        channels: 3, or 1 for grey levels.
        shapes: names of shapes.
        sizes: radii as fractions of the side, ascending.
        rotations: bins of 2 pi / ``rotations``.
        positions: values of x and of y.
        hues: names of object colours.
        textures: names of textures.
        backgrounds: names of ground colours.
        phases: sub-pixel positions per pixel and axis, even.
        background: ``"plain"``, or ``"floor_wall"`` for two colours that meet at a horizon.
        aa: ``"atlas"``, or ``"sdf"`` for the exact, differentiable mode.
        margin: centres keep this fraction of the side away from the border.
        noise: standard deviation of the pixel noise.
    """

    size: int
    channels: int
    shapes: tuple[str, ...]
    sizes: tuple[float, ...]
    rotations: int
    positions: int
    hues: tuple[str, ...]
    textures: tuple[str, ...]
    backgrounds: tuple[str, ...]
    phases: int
    background: str
    aa: str
    margin: float
    noise: float

    def __post_init__(self) -> None:
        check_positive(size=self.size, rotations=self.rotations, positions=self.positions)
        if self.channels not in (1, 3):
            raise ValueError(f"channels must be 1 or 3, got {self.channels}")
        if self.phases < 2 or self.phases % 2:
            raise ValueError(f"phases must be even and at least 2, got {self.phases}")
        if self.background not in ("plain", "floor_wall"):
            raise ValueError(f"background must be 'plain' or 'floor_wall', got {self.background!r}")
        if self.aa not in ("atlas", "sdf"):
            raise ValueError(f"aa must be 'atlas' or 'sdf', got {self.aa!r}")
        if not 0 <= self.margin < 0.5:
            raise ValueError(f"margin must lie in [0, 0.5), got {self.margin}")
        if not self.noise >= 0:
            raise ValueError(f"noise must not be negative, got {self.noise}")
        if list(self.sizes) != sorted(set(self.sizes)) or not self.sizes[0] > 0:
            raise ValueError(f"sizes must be positive and ascending, got {self.sizes}")
        side = patch_side([self.size * radius for radius in self.sizes])
        if side > self.size:
            raise ValueError(
                f"sizes must give patches that fit into the image of {self.size} pixels, got a patch of {side} "
                f"pixels for the radius {self.sizes[-1]}"
            )
        if len(set(self.position_units)) < self.positions:
            room = self.position_units[-1] - self.position_units[0] + 1
            raise ValueError(
                f"positions must be at most the {room} sub-pixel places of this world, got {self.positions}; "
                "take a larger size, more phases or a smaller margin"
            )

    @property
    def position_units(self) -> tuple[int, ...]:
        """The values of x and y in units of 1/phases pixel, symmetric about the middle of the image."""
        whole = self.size * self.phases
        low = round(self.margin * whole)
        if self.positions == 1:
            return (whole // 2,)
        span = whole - 2 * low
        return tuple(
            low + (2 * i * span + self.positions - 1) // (2 * (self.positions - 1)) for i in range(self.positions)
        )

    @property
    def scene_factors(self) -> tuple[str, ...]:
        """The factors that a picture has once, however many objects it holds."""
        return ("background",) if self.background == "plain" else ("floor", "wall")

    @property
    def cards(self) -> dict[str, int]:
        """Factor → number of its values, in the order of the grid."""
        counts = {
            "shape": len(self.shapes),
            "size": len(self.sizes),
            "rotation": self.rotations,
            "x": self.positions,
            "y": self.positions,
            "hue": len(self.hues),
            "texture": len(self.textures),
        }
        return counts | {name: len(self.backgrounds) for name in self.scene_factors}


def take_names(
    argument: str, chosen: int | Sequence[str], known: Sequence[str], most: int | None = None
) -> tuple[str, ...]:
    """Turn a number into that many of the known names, or check names that came.

    Raises:
        ValueError: too many, none, an unknown name, or one twice.
    """
    most = len(known) if most is None else most
    if isinstance(chosen, int):
        if not 1 <= chosen <= most:
            raise ValueError(f"{argument} must lie between 1 and {most}, got {chosen}")
        return tuple(known[:chosen])
    names = (chosen,) if isinstance(chosen, str) else tuple(chosen)
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(
            f"{argument} must be names out of {', '.join(known)}; unknown: {', '.join(map(repr, unknown))}"
        )
    if not names or len(set(names)) < len(names) or len(names) > most:
        raise ValueError(f"{argument} must be 1 to {most} different names, got {names}")
    return names


def radii(sizes: int | Sequence[float]) -> tuple[float, ...]:
    """Turn a number of sizes into radii between 0.125 and 0.22 of the side, or take the radii that came."""
    if not isinstance(sizes, int):
        if not 1 <= len(sizes) <= max(_SIZE_NAMES):
            raise ValueError(f"sizes must be 1 to {max(_SIZE_NAMES)} radii, got {len(sizes)}")
        return tuple(float(radius) for radius in sizes)
    if sizes not in _SIZE_NAMES:
        raise ValueError(f"sizes must lie between 1 and {max(_SIZE_NAMES)}, got {sizes}")
    if sizes == 1:
        return (0.17,)
    if sizes == 3:
        return (_SMALLEST, 0.17, _LARGEST)
    return tuple(_SMALLEST + (_LARGEST - _SMALLEST) * index / (sizes - 1) for index in range(sizes))


def size_names(count: int) -> tuple[str, ...]:
    """Give the words for ``count`` sizes, ascending."""
    return _SIZE_NAMES[count]

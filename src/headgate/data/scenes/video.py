"""Moving objects: frames, masks with persistent identities, velocities, and which factor moved."""

from __future__ import annotations

import math
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from headgate.data.scenes import dynamics as motion
from headgate.data.scenes.compositing import Rendering
from headgate.data.scenes.multi import MultiObject
from headgate.data.scenes.splits import Split
from headgate.data.scenes.world import World

__all__ = ["DYNAMICS", "MOVABLE", "MovingScenes"]

DYNAMICS = ("linear", "bounce", "orbit", "factor")
MOVABLE = ("hue", "size", "rotation", "x", "y")
_CYCLIC = ("hue", "rotation")
_BAR_WIDTH = 0.19  # of the occluder, as a fraction of the side


class MovingScenes(MultiObject):
    """A stream of short videos.

    Objects keep their slot, so channel k of the masks is the same object in every frame. A world with ``aa="sdf"`` moves
    at any speed; the atlas moves in whole units of 1/phases pixel (bounce and orbit are rounded to them).

    Args:
        world: the world to draw from.
        T: frames of a video.
        dynamics: ``"linear"``, constant speed with reflection at the border; ``"bounce"``, elastic collisions of discs,
            too; ``"orbit"``, circles about the middle; ``"factor"``, exactly one factor of one object moves by one step per
            frame, around for hue and rotation, to and fro for size, x and y.
        n_objects: fewest and most objects.
        max_overlap: of the first frame, as in :class:`MultiObject`.
        slots: as in :class:`MultiObject`.
        speed: the largest speed along an axis in pixels per frame, for linear and bounce.
        movable: which factors ``"factor"`` may move.
        occluder: whether a grey bar that does not move stands before everything.
        split: as in :class:`MultiObject`; it divides first frames.
        part: as in :class:`MultiObject`.
        out: as in :class:`MultiObject`.
        range: as in :class:`MultiObject`.
        device: as in :class:`MultiObject`.
        seed: as in :class:`MultiObject`.

    Raises:
        ValueError: unknown dynamics or factors, fewer than two frames, a speed below one unit, nothing that can move.
    """

    def __init__(
        self,
        world: World,
        T: int = 8,
        dynamics: str = "linear",
        n_objects: int | tuple[int, int] = (1, 3),
        max_overlap: float = 0.0,
        slots: int | None = None,
        *,
        speed: float = 2.0,
        movable: tuple[str, ...] = MOVABLE,
        occluder: bool = False,
        split: str | Split | None = None,
        part: str = "train",
        out: str = "float32",
        range: str = "01",
        device: torch.device | str | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(
            world, n_objects, max_overlap, slots, split=split, part=part, out=out, range=range, device=device, seed=seed
        )
        if T < 2:
            raise ValueError(f"T must be at least 2 frames, got {T}")
        if dynamics not in DYNAMICS:
            raise ValueError(f"dynamics must be one of {', '.join(DYNAMICS)}, got {dynamics!r}")
        unknown = [factor for factor in movable if factor not in MOVABLE]
        if unknown:
            raise ValueError(f"movable must be factors out of {', '.join(MOVABLE)}, got {', '.join(unknown)}")
        self.T = T
        self.dynamics = dynamics
        self.movable = tuple(factor for factor in movable if world.cards[factor] > 1)
        self.occluder = occluder
        self._limit = motion.speed_limit(speed, world.config.phases)
        turning = bool((world.rotation_period > 1).any(dim=1).all())
        if dynamics == "factor" and (not self.movable or (self.movable == ("rotation",) and not turning)):
            raise ValueError(f"movable must hold a factor that changes every object of this world, got {movable}")

    def batch(self, count: int, generator: torch.Generator | None = None) -> dict[str, Any]:
        """Draw videos.

        Args:
            count: how many.
            generator: a CPU generator.

        Returns:
            frames: (count, T, channels, size, size).
            masks: (count, T, slots + 1, size, size); channel 0 is the ground with the occluder; sums to 1.
            labels: (count, T, size, size) int64, 0 for the ground and the occluder.
            amodal: (count, T, slots, size, size), what objects would cover if nothing lay before them.
            factors: (count, T, slots, 7) int64; x and y are the nearest grid values where motion leaves the grid.
            centers: (count, T, slots, 2), x and y as fractions of the side.
            velocities: (count, T, slots, 2), fractions of the side per frame; 0 for ``"factor"``.
            present: (count, slots) bool.
            crowded: (count,) bool, as in :class:`MultiObject`, of the first frame.
            The scene factors: (count,) int64.
            moved, moved_object, direction: (count,) int64, for ``"factor"``: which of ``movable``, of which slot, which way.
            occluder: (count, size, size) bool, where there is one.
        """
        world = self.world
        scenes = self.draw(count, generator)
        moved: dict[str, Tensor] = {}
        video = {name: scenes[name][:, None].expand(-1, self.T, -1) for name in world.object_factors}
        if self.dynamics == "factor":
            moved = self._choose_move(scenes, generator)
            video |= self._step(scenes, moved)
            units = world.position_units
            place = torch.stack([units[video["x"]], units[video["y"]]], dim=-1)
            velocity = torch.zeros(place.shape)
        else:
            place, velocity = self._move(scenes, generator)
            place = place * scenes["present"][:, None, :, None]
            velocity = velocity * scenes["present"][:, None, :, None]
            distance = (place[..., None] - world.position_units).abs()
            video["x"], video["y"] = distance.argmin(dim=-1).unbind(dim=-1)
        column = torch.rand(count, generator=generator)
        bars = {"occluder": self._bar(column)} if self.occluder else {}
        picture = self._film(scenes, video, place, bars)
        whole = world.config.size * world.config.phases
        split_time = {name: value.unflatten(0, (count, self.T)) for name, value in picture._asdict().items()}
        result = {
            "frames": split_time["image"],
            "masks": split_time["masks"],
            "labels": split_time["labels"],
            "amodal": split_time["amodal"],
            "factors": torch.stack([video[name] for name in world.object_factors], dim=-1),
            "centers": (place / whole).float(),
            "velocities": (velocity / whole).float(),
            "present": scenes["present"],
            "crowded": scenes["crowded"],
        } | {name: scenes[name] for name in world.scene_factors}
        return {name: value.to(self.device) for name, value in (result | moved | bars).items()}

    def _film(
        self, scenes: dict[str, Tensor], video: dict[str, Tensor], place: Tensor, bars: dict[str, Tensor]
    ) -> Rendering:
        def every_frame(value: Tensor) -> Tensor:
            return value.repeat_interleave(self.T, dim=0).to(self.device)

        sprites = {name: value.flatten(0, 1).to(self.device) for name, value in video.items()}
        sprites["x"], sprites["y"] = place.flatten(0, 1).to(self.device).unbind(dim=-1)
        once = {name: scenes[name] for name in ("present", *self.world.scene_factors)} | bars
        sprites |= {name: every_frame(value) for name, value in once.items()}
        keys = (scenes["noise_keys"][:, None] + torch.arange(self.T)).flatten()
        picture: Rendering = self.world.render_units(sprites, True, self.out, self.range, keys)
        return picture

    def _move(self, scenes: dict[str, Tensor], generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
        """Give centres and velocities in units of 1/phases pixel; whole numbers for the atlas."""
        config = self.world.config
        whole = config.size * config.phases
        exact = config.aa == "sdf"
        units = self.world.position_units
        start = torch.stack([units[scenes["x"]], units[scenes["y"]]], dim=-1)
        radius = self.world.values("size").double()[scenes["size"]] * whole
        low = radius.ceil().long()[..., None]
        high = whole - low
        sign = 2 * torch.randint(2, start.shape, generator=generator) - 1
        draws = torch.rand(start.shape, generator=generator, dtype=torch.float64)
        if self.dynamics == "orbit":
            turn = sign[..., 0] * (0.15 + 0.35 * draws[..., 0])
            place, velocity = motion.orbit(start.double(), turn, whole / 2, 0.15 * whole, self.T)
            return (place if exact else place.round().long()), velocity
        pace = draws * self._limit if exact else (draws * self._limit).long() + 1
        start = torch.maximum(torch.minimum(start, high), low)
        if self.dynamics == "linear":
            return motion.linear(start.to(pace.dtype), sign * pace, low, high, self.T)
        place, velocity = motion.bounce(
            start.double(), (sign * pace).double(), radius, scenes["present"], low.double(), high.double(), self.T
        )
        return (place if exact else place.round().long()), velocity

    def _choose_move(self, scenes: dict[str, Tensor], generator: torch.Generator | None) -> dict[str, Tensor]:
        count = len(scenes["present"])
        allowed = scenes["present"][:, :, None].repeat(1, 1, len(self.movable))
        if "rotation" in self.movable:
            period = self.world.rotation_period[scenes["shape"], scenes["texture"]]
            allowed[:, :, self.movable.index("rotation")] &= period > 1
        options = allowed.flatten(1).double().cumsum(dim=1)
        level = torch.rand(count, generator=generator, dtype=torch.float64) * options[:, -1]
        chosen = (options <= level[:, None]).sum(dim=1)
        return {
            "moved": chosen % len(self.movable),
            "moved_object": chosen // len(self.movable),
            "direction": 2 * torch.randint(2, (count,), generator=generator) - 1,
        }

    def _step(
        self, scenes: dict[str, Tensor], moved: dict[str, Tensor]
    ) -> dict[str, Int[Tensor, "batch frames slots"]]:
        rows = torch.arange(len(moved["moved"]))
        video = {}
        for number, factor in enumerate(self.movable):
            values = scenes[factor][:, None].repeat(1, self.T, 1)
            start = scenes[factor][rows, moved["moved_object"]]
            steps = motion.step_factor(start, moved["direction"], self.world.cards[factor], factor in _CYCLIC, self.T)
            chosen = moved["moved"] == number
            values[rows[chosen], :, moved["moved_object"][chosen]] = steps[chosen]
            video[factor] = values
        return video

    def _bar(self, column: Float[Tensor, " batch"]) -> Tensor:
        size = self.world.config.size
        width = math.ceil(_BAR_WIDTH * size)
        left = (size - width) / 4 + column * (size - width) / 2
        pixel = torch.arange(size)
        inside = (pixel >= left.floor()[:, None]) & (pixel < left.floor()[:, None] + width)
        return inside[:, None].expand(-1, size, -1)

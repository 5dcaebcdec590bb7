"""Several objects per picture, with masks, boxes and factors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from headgate.data.scenes.compositing import Rendering, boxes_of
from headgate.data.scenes.drawing import draw_scenes
from headgate.data.scenes.splits import Part, Split, everything, split
from headgate.data.scenes.tables import FactorTable, TableSampler
from headgate.data.scenes.world import World
from headgate.data.seeding import BatchLoader, stream_generator
from headgate.validate import check_probability

__all__ = ["MultiObject"]

_EXAMPLES = 0x5CE7E  # the stream of single examples, apart from the small numbers that loaders take


class MultiObject:
    """An endless stream of pictures of several objects.

        factors (4 slots, 3 present)          image        labels
        red circle, blue cross, green ring    ● ✚ ◯        1 2 3 on 0

    Args:
        world: the world to draw from.
        n_objects: fewest and most objects, or one number.
        max_overlap: how deep two objects may lie in one another (0: they at most touch, 1: anything goes). Out of 16
            random layouts the first that keeps to it is taken, else the least crowded one, flagged in ``crowded``.
        slots: objects of every picture, present or not; default the most objects.
        split: a kind or a :func:`~headgate.data.scenes.splits.split`; None draws from everything.
        part: which part of the split.
        tables: further weights over factors.
        out: ``"float32"`` or ``"uint8"``.
        range: ``"01"`` or ``"-11"``.
        device: where pictures are drawn and batches live.
        seed: names the examples that :meth:`example` gives.

    Raises:
        ValueError: more objects than slots, an overlap outside [0, 1], a split that does not fit.
    """

    def __init__(
        self,
        world: World,
        n_objects: int | tuple[int, int] = (2, 4),
        max_overlap: float = 0.3,
        slots: int | None = None,
        *,
        split: str | Split | None = None,
        part: str = "train",
        tables: Sequence[FactorTable] = (),
        out: str = "float32",
        range: str = "01",
        device: torch.device | str | None = None,
        seed: int = 0,
    ) -> None:
        low, high = (n_objects, n_objects) if isinstance(n_objects, int) else n_objects
        slots = high if slots is None else slots
        if not 1 <= low <= high <= slots:
            raise ValueError(f"n_objects must be 1 or more, ascending, and at most slots={slots}, got {n_objects}")
        check_probability(max_overlap=max_overlap)
        self.world = world
        self.max_overlap = max_overlap
        self.slots = slots
        self.part: Part = _part_of(world, split, part, (low, high))
        self.n_objects = self.part.n_objects or (low, high)
        self.sampler = TableSampler(world, [*self.part.tables, *tables])
        self.out = out
        self.range = range
        self.device = torch.device(device or "cpu")
        self.seed = seed
        world.render({}, out=out, range=range, noise_keys=torch.zeros(1, dtype=torch.int64))

    def batch(self, count: int, generator: torch.Generator | None = None) -> dict[str, Any]:
        """Draw pictures.

        Args:
            count: how many.
            generator: a CPU generator.

        Returns:
            image: (count, channels, size, size).
            masks: (count, slots + 1, size, size), the visible share of ground (0) and objects; sums to 1.
            labels: (count, size, size) int64, 0 for the ground.
            factors: (count, slots, 7) int64 in the order of ``world.object_factors``.
            present: (count, slots) bool.
            boxes: (count, slots, 4), left, top, right, bottom in [0, 1] of what an object covers.
            crowded: (count,) bool, true where ``max_overlap`` could not be kept.
            The scene factors: (count,) int64.
        """
        scenes = self.draw(count, generator)
        return self.paint(scenes)

    def draw(self, count: int, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """Draw the factors of pictures without painting them: a dict that ``world.render`` and :meth:`paint` take."""
        scenes = draw_scenes(
            self.world, self.sampler, self.part, count, self.n_objects, self.slots, self.max_overlap, generator
        )
        # Always drawn, so that the factors of later batches do not depend on whether there is noise.
        return scenes | {"noise_keys": torch.randint(2**62, (count,), generator=generator)}

    def paint(self, scenes: dict[str, Tensor]) -> dict[str, Any]:
        """Paint what :meth:`draw` gave."""
        world = self.world
        factors = {name: scenes[name] for name in (*world.factors, "present")}
        picture: Rendering = world.render(
            factors, True, out=self.out, range=self.range, noise_keys=scenes["noise_keys"], device=self.device
        )
        return {
            "image": picture.image,
            "masks": picture.masks,
            "labels": picture.labels,
            "factors": torch.stack([scenes[name] for name in world.object_factors], dim=-1).to(self.device),
            "present": scenes["present"].to(self.device),
            "boxes": boxes_of(picture.amodal),
            "crowded": scenes["crowded"].to(self.device),
        } | {name: scenes[name].to(self.device) for name in world.scene_factors}

    def example(self, index: int) -> dict[str, Any]:
        """Give example ``index`` of the data set's own stream, without the batch axis."""
        batch = self.batch(1, stream_generator(self.seed, _EXAMPLES, index))
        return {name: value[0] for name, value in batch.items()}

    def loader(self, batch_size: int, steps: int, seed: int = 0, stream: int | str = 0, start: int = 0) -> BatchLoader:
        """Give an iterable of batches; the same (seed, stream, step) is the same batch on any machine."""
        return BatchLoader(self.batch, batch_size, steps, seed, stream, start)

    def allows(self, factors: dict[str, Tensor]) -> Tensor:
        """Tell per object whether the part's tables allow its factors; the part as a predicate.

        Args:
            factors: object factors (batch, objects), scene factors (batch,), optionally ``present``.

        Returns:
            (batch, objects) bool; absent objects are allowed.
        """
        allowed = self.sampler.allows(factors).expand(factors["shape"].shape)
        return allowed | ~factors.get("present", torch.ones_like(allowed)).bool()


def _part_of(world: World, chosen: str | Split | None, name: str, n_objects: tuple[int, int]) -> Part:
    if chosen is None:
        return everything()
    described = split(chosen) if isinstance(chosen, str) else chosen
    return described.part(world, name, n_objects)

"""Drawing whole pictures' factors: how many objects, how they look, where they lie."""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from headgate.data.scenes.splits import Part, in_bucket
from headgate.data.scenes.tables import TableSampler
from headgate.data.scenes.world import World

__all__ = ["disc_overlap", "draw_scenes"]

CANDIDATES = 16
_ROUNDS = 200


def draw_scenes(
    world: World,
    sampler: TableSampler,
    part: Part,
    count: int,
    n_objects: tuple[int, int],
    slots: int,
    max_overlap: float,
    generator: torch.Generator | None,
) -> dict[str, Tensor]:
    """Draw pictures of one part of a split.

    Args:
        world: whose factors.
        sampler: the part's tables (and any others).
        part: which hash buckets to keep; pictures outside are drawn anew.
        count: pictures.
        n_objects: fewest and most objects.
        slots: objects of every picture, present or not.
        max_overlap: the largest allowed :func:`disc_overlap` between two objects.
        generator: a CPU generator.

    Returns:
        Scene factors (count,), object factors (count, slots), ``present`` (count, slots) and ``crowded`` (count,): true
        where none of 16 layouts kept to ``max_overlap`` and the best of them was taken. Absent objects have factors 0.

    Raises:
        ValueError: no picture of the part was found.
    """
    share = (part.buckets[1] - part.buckets[0]) / 1000
    pieces: list[dict[str, Tensor]] = []
    found = 0
    for _ in range(_ROUNDS):
        wanted = count - found
        batch = wanted if share == 1 else math.ceil(1.2 * wanted / share) + 8
        scenes = _draw(world, sampler, batch, n_objects, slots, max_overlap, generator)
        if share < 1:
            chosen = in_bucket(world, part, scenes).nonzero().squeeze(1)[:wanted]
            scenes = {name: value[chosen] for name, value in scenes.items()}
        pieces.append(scenes)
        found += len(scenes["present"])
        if found == count:
            return {name: torch.cat([piece[name] for piece in pieces]) for name in pieces[0]}
    raise ValueError(f"the part holds too few pictures: {found} of {count} found; take a larger world or another split")


def disc_overlap(
    x: Float[Tensor, "... objects"], y: Float[Tensor, "... objects"], radius: Float[Tensor, "... objects"]
) -> Float[Tensor, "... objects objects"]:
    """Measure how deep discs lie in one another: 0 for discs that at most touch, 1 where the smaller lies within the other.

    It is (r_i + r_j - d) / (2 min(r_i, r_j)), clamped to [0, 1]; 0 on the diagonal.

    Args:
        x: centres, in the unit of ``radius``.
        y: centres.
        radius: of the discs.
    """
    dx = x[..., :, None] - x[..., None, :]
    dy = y[..., :, None] - y[..., None, :]
    first, second = radius[..., :, None], radius[..., None, :]
    depth = (first + second - (dx * dx + dy * dy).sqrt()) / (2 * torch.minimum(first, second))
    return depth.clamp(0.0, 1.0) * (1 - torch.eye(x.shape[-1], dtype=x.dtype))


def _draw(
    world: World,
    sampler: TableSampler,
    batch: int,
    n_objects: tuple[int, int],
    slots: int,
    max_overlap: float,
    generator: torch.Generator | None,
) -> dict[str, Tensor]:
    number = torch.randint(n_objects[0], n_objects[1] + 1, (batch,), generator=generator)
    present = torch.arange(slots) < number[:, None]
    looks = sampler.draw_looks(batch, slots, generator)
    places = sampler.draw_places(looks, CANDIDATES, generator)
    chosen, crowded = _choose_layout(world, looks["size"], places, present, max_overlap)
    rows = torch.arange(batch)
    factors = looks | {name: value[rows, chosen] for name, value in places.items()}
    scenes = {
        name: factors[name] * present if name in world.object_factors else factors[name] for name in world.factors
    }
    return scenes | {"present": present, "crowded": crowded}


def _choose_layout(
    world: World,
    size: Int[Tensor, "batch objects"],
    places: dict[str, Int[Tensor, "batch candidates objects"]],
    present: Bool[Tensor, "batch objects"],
    max_overlap: float,
) -> tuple[Int[Tensor, " batch"], Bool[Tensor, " batch"]]:
    values = world.values("x")
    radius = world.values("size")[size][:, None].expand_as(places["x"])
    overlap = disc_overlap(values[places["x"]], values[places["y"]], radius)
    both = present[:, None, :, None] & present[:, None, None, :]
    worst = (overlap * both).flatten(2).amax(dim=-1)
    allowed = worst <= max_overlap
    crowded = ~allowed.any(dim=1)
    return torch.where(crowded, worst.argmin(dim=1), allowed.int().argmax(dim=1)), crowded

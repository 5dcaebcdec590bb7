"""Splits of a world into training, validation and test, streamed or enumerated.

A part is a predicate on pictures: tables over factors, a range of hash buckets and a number of objects. Nothing is
stored, so the parts are the same for any order of drawing and any number of workers.

    iid           hash of the grid index mod 1000: 80 / 10 / 10 %
    combination   pairs (or triples) of values on a Latin-square diagonal are seen at test alone
    range         extreme values of one factor are seen at test alone
    count         more objects at test
    correlated    two factors are tied in training with strength rho, independent at test

Everywhere ``val`` is drawn like ``train`` but shares no picture with it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from headgate.data.scenes.tables import FactorTable, table_weight
from headgate.data.scenes.world import World
from headgate.data.seeding import splitmix64, splitmix64_array, splitmix64_fold
from headgate.validate import check_probability

__all__ = ["PARTS", "Part", "Split", "everything", "in_bucket", "kept_indices", "split"]

PARTS = ("train", "val", "test")
_KINDS = ("iid", "combination", "range", "count", "correlated")
_BUCKETS = 1000
_THINNING = 1  # the stream of hashes that thins an enumerated grid


@dataclass(frozen=True, eq=False)
class Part:
    """One part of a split.

    Attributes:
        seed: of the hash.
        tables: weights over factors.
        buckets: which hashes mod 1000 belong, from the first to before the second.
        n_objects: fewest and most objects; None leaves the data set's own.
    """

    seed: int = 0
    tables: tuple[FactorTable, ...] = ()
    buckets: tuple[int, int] = (0, _BUCKETS)
    n_objects: tuple[int, int] | None = None


@dataclass(frozen=True)
class Split:
    """How a world is divided; build it with :func:`split`."""

    kind: str
    seed: int
    factors: tuple[str, ...]
    rho: float
    held: int | None
    side: str
    boundary: int | None

    def part(self, world: World, name: str, n_objects: tuple[int, int] | None = None) -> Part:
        """Give one part for a world.

        Args:
            world: the world to divide.
            name: ``"train"``, ``"val"`` or ``"test"``.
            n_objects: fewest and most objects of the data set, which ``count`` divides.

        Raises:
            ValueError: an unknown part, or a split that the world is too small for.
        """
        if name not in PARTS:
            raise ValueError(f"part must be one of {', '.join(PARTS)}, got {name!r}")
        unknown = [factor for factor in self.factors if factor not in world.cards]
        if unknown:
            raise ValueError(f"factors must be out of {', '.join(world.factors)}, got {', '.join(unknown)}")
        if self.kind == "iid":
            return Part(self.seed, buckets={"train": (0, 800), "val": (800, 900), "test": (900, _BUCKETS)}[name])
        if self.kind == "correlated":
            tied = () if name == "test" else (self._tied(world),)
            return Part(self.seed, tied, {"train": (0, 800), "val": (800, 900), "test": (900, _BUCKETS)}[name])
        buckets = {"train": (0, 900), "val": (900, _BUCKETS), "test": (0, _BUCKETS)}[name]
        if self.kind == "count":
            return Part(self.seed, buckets=buckets, n_objects=self._counts(n_objects, name))
        held = self._diagonal(world) if self.kind == "combination" else self._extremes(world)
        allowed = held if name == "test" else ~held
        return Part(self.seed, (FactorTable(self.factors, allowed.double()),), buckets)

    def _diagonal(self, world: World) -> Bool[Tensor, ...]:
        sizes = [world.cards[factor] for factor in self.factors]
        if min(sizes) < 2:
            raise ValueError(
                f"a combination split needs factors of two values or more, got {dict(zip(self.factors, sizes, strict=True))}"
            )
        total = torch.zeros((), dtype=torch.int64)
        for place, size in enumerate(sizes):
            axis = _shuffled(size, self.seed, place).view([-1 if i == place else 1 for i in range(len(sizes))])
            total = total + axis
        return total % max(sizes) == 0

    def _extremes(self, world: World) -> Bool[Tensor, " values"]:
        (factor,) = self.factors
        count = world.cards[factor]
        held = max(1, count // 4) if self.held is None else self.held
        ends = 2 if self.side == "both" else 1
        if not 0 < held * ends < count:
            raise ValueError(
                f"held must leave values of {factor} ({count}) for training, got held={held}, side={self.side!r}"
            )
        value = torch.arange(count)
        low, high = value < held, value >= count - held
        return {"low": low, "high": high, "both": low | high}[self.side]

    def _counts(self, n_objects: tuple[int, int] | None, name: str) -> tuple[int, int]:
        if n_objects is None:
            raise ValueError("a count split needs pictures of several objects")
        low, high = n_objects
        boundary = high - 1 if self.boundary is None else self.boundary
        if not low <= boundary < high:
            raise ValueError(f"boundary must lie in [{low}, {high}) for n_objects={n_objects}, got {boundary}")
        return (boundary + 1, high) if name == "test" else (low, boundary)

    def _tied(self, world: World) -> FactorTable:
        first, second = (world.cards[factor] for factor in self.factors)
        partner = _shuffled(second, self.seed, 0)[
            torch.arange(first) * second // first if first > second else torch.arange(first)
        ]
        weights = torch.full((first, second), (1.0 - self.rho) / (first * second), dtype=torch.float64)
        weights[torch.arange(first), partner] += self.rho / first
        return FactorTable(self.factors, weights)


def split(
    kind: str,
    seed: int = 0,
    *,
    factors: tuple[str, ...] | str | None = None,
    order: int | None = None,
    rho: float = 0.9,
    held: int | None = None,
    side: str = "high",
    boundary: int | None = None,
) -> Split:
    """Describe a split.

    Args:
        kind: ``"iid"``, ``"combination"``, ``"range"``, ``"count"`` or ``"correlated"``.
        seed: of the hashes, of which diagonal is held out and of which values are tied.
        factors: for combination, the pair or triple (default shape and hue; with ``order=3`` size, too); for range, one
            factor (default size); for correlated, the two that are tied (default shape and hue).
        order: for combination, 2 or 3 factors.
        rho: for correlated: with this probability the second factor follows from the first, otherwise it is uniform.
        held: for range, how many extreme values are held out at each end; default a quarter, at least one.
        side: for range, ``"low"``, ``"high"`` or ``"both"``.
        boundary: for count, the most objects in training; default one less than the data set's most.

    Raises:
        ValueError: an unknown kind, or options that do not fit it.
    """
    if kind not in _KINDS:
        raise ValueError(f"kind must be one of {', '.join(_KINDS)}, got {kind!r}")
    if side not in ("low", "high", "both"):
        raise ValueError(f"side must be low, high or both, got {side!r}")
    check_probability(rho=rho)
    usual = {"range": ("size",), "correlated": ("shape", "hue"), "combination": ("shape", "hue", "size")[: order or 2]}
    names = (factors,) if isinstance(factors, str) else tuple(factors or usual.get(kind, ()))
    wanted = {
        "iid": (0,),
        "count": (0,),
        "range": (1,),
        "correlated": (2,),
        "combination": (order,) if order else (2, 3),
    }[kind]
    if len(names) not in wanted or len(set(names)) < len(names) or (order is not None and order not in (2, 3)):
        raise ValueError(
            f"factors must be {' or '.join(map(str, wanted))} different ones for {kind}, got {names}, order={order}"
        )
    return Split(kind, seed, names, rho, held, side, boundary)


def everything() -> Part:
    """Give the part that holds every picture."""
    return Part()


def in_bucket(world: World, part: Part, factors: Mapping[str, Tensor]) -> Bool[Tensor, " batch"]:
    """Tell which pictures fall into the part's hash buckets.

    The hash is ``splitmix64(seed, index of object 1, index of object 2, …)`` of the canonical grid indices, so pictures
    that look the same fall into the same part.

    Args:
        world: whose grid.
        part: its seed and buckets.
        factors: scene factors (batch,), object factors (batch, objects), optionally ``present``.
    """
    objects = factors["shape"].shape[1]
    grid = {name: factors[name][:, None].expand(-1, objects) for name in world.scene_factors}
    index = world.index(world.canonical({name: factors[name] for name in world.object_factors} | grid))
    state = np.full(len(index), splitmix64(part.seed), dtype=np.uint64)
    present = factors.get("present", torch.ones_like(index)).bool().numpy()
    for place in range(objects):
        state = np.where(present[:, place], splitmix64_fold(state, index[:, place]), state)
    bucket = torch.from_numpy((state % np.uint64(_BUCKETS)).astype(np.int64))
    return (bucket >= part.buckets[0]) & (bucket < part.buckets[1])


def kept_indices(world: World, part: Part, factors: Mapping[str, Tensor]) -> Int[Tensor, " kept"]:
    """Choose the rows of an enumerated grid that belong to a part.

    Where tables weigh unequally, rows are thinned by a hash of their place in proportion to their weight.

    Args:
        world: whose grid.
        part: what belongs.
        factors: every factor (rows,).

    Returns:
        Ascending row numbers.
    """
    rows = {name: value if name in world.scene_factors else value[:, None] for name, value in factors.items()}
    keep = in_bucket(world, part, rows)
    for table in part.tables:
        table.check(world)
    weight = table_weight(part.tables, dict(factors))
    canonical = world.index(world.canonical(factors))
    draw = splitmix64_array(canonical, part.seed, _THINNING).astype(np.float64) / 2.0**64
    return (keep & (torch.from_numpy(draw) < weight)).nonzero().squeeze(1)


def _shuffled(count: int, seed: int, place: int) -> Int[Tensor, " count"]:
    """Permute 0 … count - 1 by their hashes."""
    keys = splitmix64_array(torch.arange(count), seed, place)
    return torch.from_numpy(np.argsort(np.argsort(keys)).astype(np.int64))

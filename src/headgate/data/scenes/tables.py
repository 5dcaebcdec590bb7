"""Joint distributions over factors, and drawing from them.

A :class:`FactorTable` weighs every joint value of some factors: zeros hold combinations out, larger weights make a
language prior or a shortcut. Factors that no table names are uniform. Draws go from the picture's factors over the
objects' looks to the objects' places, each given what came before, so tables may tie factors of all three.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from headgate.data.scenes.world import World

__all__ = ["FactorTable", "TableSampler", "table_weight"]

_PLACES = ("x", "y")


@dataclass(frozen=True, eq=False)
class FactorTable:
    """Weights over the joint values of some factors.

    Attributes:
        factors: names of different factors.
        weights: one axis per factor, float64, not negative.
    """

    factors: tuple[str, ...]
    weights: Float[Tensor, ...]

    def __post_init__(self) -> None:
        if len(set(self.factors)) != len(self.factors) or len(self.factors) != self.weights.dim():
            raise ValueError(
                f"weights must have one axis for each of the different factors {self.factors}, "
                f"got {tuple(self.weights.shape)}"
            )
        if not bool((self.weights >= 0).all()) or not 0 < float(self.weights.sum()) < math.inf:
            raise ValueError("weights must be finite, not negative and not all zero")

    def check(self, world: World) -> None:
        """Check that the axes are the factors of a world.

        Raises:
            ValueError: unknown factors or other sizes.
        """
        unknown = [name for name in self.factors if name not in world.cards]
        if unknown:
            raise ValueError(f"factors must be out of {', '.join(world.factors)}, got {', '.join(unknown)}")
        expected = tuple(world.cards[name] for name in self.factors)
        if tuple(self.weights.shape) != expected:
            raise ValueError(f"weights over {self.factors} must have shape {expected}, got {tuple(self.weights.shape)}")


def table_weight(tables: Sequence[FactorTable], factors: dict[str, Tensor]) -> Float[Tensor, ...]:
    """Multiply the weights that tables give to factors, each table scaled to a largest weight of 1.

    Args:
        tables: any number.
        factors: int64 of shapes that broadcast; scene factors may come as (batch, 1).
    """
    weight = torch.ones((), dtype=torch.float64)
    for table in tables:
        weight = weight * (table.weights / table.weights.max())[tuple(factors[name] for name in table.factors)]
    return weight


class TableSampler:
    """Draws factors of a world from tables.

    Args:
        world: whose factors.
        tables: tables that share a factor are multiplied.

    Raises:
        ValueError: a table does not fit the world, or tables together allow nothing.
    """

    def __init__(self, world: World, tables: Sequence[FactorTable]) -> None:
        for table in tables:
            table.check(world)
        self.world = world
        self._joints = [_Joint(world, table) for table in _merged(tables)]

    def draw_looks(self, batch: int, objects: int, generator: torch.Generator | None) -> dict[str, Int[Tensor, ...]]:
        """Draw every factor but the objects' places.

        Returns:
            Scene factors (batch,), object factors (batch, objects), rotations canonical.
        """
        world = self.world
        looks = {
            name: torch.randint(
                world.cards[name], (batch,) if name in world.scene_factors else (batch, objects), generator=generator
            )
            for name in world.factors
            if name not in _PLACES
        }
        for joint in self._joints:
            joint.draw_looks(looks, batch, objects, generator)
        return world.canonical(looks)

    def draw_places(
        self, looks: dict[str, Tensor], candidates: int, generator: torch.Generator | None
    ) -> dict[str, Int[Tensor, "batch candidates objects"]]:
        """Draw several values of x and y for every object, given the other factors."""
        batch, objects = looks["shape"].shape
        shape = (batch, candidates, objects)
        places = {name: torch.randint(self.world.cards[name], shape, generator=generator) for name in _PLACES}
        for joint in self._joints:
            joint.draw_places(places, looks, shape, generator)
        return places

    def marginal(self, factors: Sequence[str]) -> Float[Tensor, ...]:
        """Give the distribution of some factors of one object, one axis per factor; sums to 1."""
        result = torch.full([self.world.cards[name] for name in factors], 1.0, dtype=torch.float64)
        for joint in self._joints:
            result = result * joint.marginal(factors)
        return result / result.sum()

    def allows(self, factors: dict[str, Tensor]) -> Bool[Tensor, ...]:
        """Tell which objects the tables give a weight above zero."""
        allowed = torch.ones((), dtype=torch.bool)
        for joint in self._joints:
            allowed = allowed & joint.allows(factors)
        return allowed


class _Joint:
    """One table with its axes in the order of drawing: scene, looks, places."""

    def __init__(self, world: World, table: FactorTable) -> None:
        scene = [name for name in table.factors if name in world.scene_factors]
        places = [name for name in table.factors if name in _PLACES]
        looks = [name for name in table.factors if name not in scene and name not in places]
        order = [*scene, *looks, *places]
        weights = table.weights.double().permute([table.factors.index(name) for name in order])
        self.groups = [(names, [world.cards[name] for name in names]) for names in (scene, looks, places)]
        self.weights = weights.reshape([math.prod(sizes) for _, sizes in self.groups])

    def draw_looks(self, looks: dict[str, Tensor], batch: int, objects: int, generator: torch.Generator | None) -> None:
        rows = torch.zeros(batch, dtype=torch.int64)
        if self.groups[0][0]:
            rows = _pick(self.weights.sum(dim=(1, 2)), torch.rand(batch, generator=generator, dtype=torch.float64))
            looks.update(_spread(rows, self.groups[0]))
        if self.groups[1][0]:
            draws = torch.rand(batch, objects, generator=generator, dtype=torch.float64)
            looks.update(_spread(_pick(self.weights.sum(dim=2)[rows][:, None], draws), self.groups[1]))

    def draw_places(
        self,
        places: dict[str, Tensor],
        looks: dict[str, Tensor],
        shape: tuple[int, int, int],
        generator: torch.Generator | None,
    ) -> None:
        if self.groups[2][0]:
            draws = torch.rand(shape, generator=generator, dtype=torch.float64)
            rows = self.weights[
                _flat(looks, self.groups[0], shape[0])[:, None], _flat(looks, self.groups[1], *shape[::2])
            ]
            places.update(_spread(_pick(rows[:, None], draws), self.groups[2]))

    def marginal(self, factors: Sequence[str]) -> Tensor:
        names = [name for group, _ in self.groups for name in group]
        weights = self.weights.reshape([size for _, sizes in self.groups for size in sizes])
        for axis in reversed(range(len(names))):
            if names[axis] not in factors:
                weights = weights.sum(dim=axis)
        kept = tuple(name for name in names if name in factors)
        return _aligned(FactorTable(kept, weights), tuple(factors)) if kept else torch.ones((), dtype=torch.float64)

    def allows(self, factors: dict[str, Tensor]) -> Tensor:
        objects = factors["shape"].shape
        scene = _flat(factors, self.groups[0], objects[0])
        while scene.dim() < len(objects):
            scene = scene[..., None]
        return (
            self.weights[scene, _flat(factors, self.groups[1], *objects), _flat(factors, self.groups[2], *objects)] > 0
        )


def _merged(tables: Sequence[FactorTable]) -> list[FactorTable]:
    done: list[FactorTable] = []
    for table in tables:
        current = table
        while (other := next((t for t in done if set(t.factors) & set(current.factors)), None)) is not None:
            done.remove(other)
            names = other.factors + tuple(name for name in current.factors if name not in other.factors)
            product = _aligned(other, names) * _aligned(current, names)
            if not float(product.sum()) > 0:
                raise ValueError(f"the split and the co-occurrence over {', '.join(names)} together allow nothing")
            current = FactorTable(names, product)
        done.append(current)
    return done


def _aligned(table: FactorTable, names: tuple[str, ...]) -> Tensor:
    order = [table.factors.index(name) for name in names if name in table.factors]
    weights = table.weights.double().permute(order)
    shape = iter(weights.shape)
    return weights.reshape([next(shape) if name in table.factors else 1 for name in names])


def _pick(weights: Float[Tensor, "... values"], draws: Float[Tensor, ...]) -> Int[Tensor, ...]:
    """Invert the cumulative weights; a value of weight zero is never picked."""
    cumulative = weights.cumsum(dim=-1)
    level = draws * cumulative[..., -1]
    return (cumulative <= level[..., None]).sum(dim=-1).clamp_max(weights.shape[-1] - 1)


def _spread(flat: Tensor, group: tuple[list[str], list[int]]) -> dict[str, Tensor]:
    values = {}
    for name, size in zip(reversed(group[0]), reversed(group[1]), strict=True):
        values[name] = flat % size
        flat = flat // size
    return values


def _flat(factors: dict[str, Tensor], group: tuple[list[str], list[int]], *shape: int) -> Tensor:
    flat = torch.zeros(shape, dtype=torch.int64)
    for name, size in zip(*group, strict=True):
        flat = flat * size + factors[name]
    return flat

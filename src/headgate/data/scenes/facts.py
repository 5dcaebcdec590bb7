"""What is true of a picture: descriptions, statements, and the oracle that judges them.

A description names some attributes of an object; a statement says that such an object exists, how many there are, or how
two of them relate. Statements are read existentially: "a red circle left of a blue square" is true if any red circle lies
left of any blue square; "two red circles" is true if there are exactly two.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from headgate.data.scenes.world import World

__all__ = [
    "ATTRIBUTES",
    "OPPOSITES",
    "RELATIONS",
    "SPATIAL",
    "Description",
    "SceneObject",
    "Statement",
    "describe",
    "holds",
    "matches",
    "objects_of",
    "relates",
]

ATTRIBUTES = ("size", "texture", "hue", "shape")
SPATIAL = ("left", "right", "above", "below")
RELATIONS = (*SPATIAL, "larger", "smaller", "same_colour", "same_shape")
OPPOSITES = {
    "left": "right",
    "right": "left",
    "above": "below",
    "below": "above",
    "larger": "smaller",
    "smaller": "larger",
}


@dataclass(frozen=True)
class SceneObject:
    """One present object; attributes are factor indices, x and y whole numbers of 1/phases pixel."""

    slot: int
    shape: int
    hue: int
    size: int
    texture: int
    x: int
    y: int


@dataclass(frozen=True)
class Description:
    """Attributes that are named, as factor indices; ``None`` where nothing is said."""

    shape: int | None = None
    hue: int | None = None
    size: int | None = None
    texture: int | None = None

    def given(self) -> dict[str, int]:
        """Give the named attributes in the order in which they are said."""
        named = {name: getattr(self, name) for name in ATTRIBUTES}
        return {name: value for name, value in named.items() if value is not None}

    def with_(self, **changes: int | None) -> Description:
        """Give the description with some attributes changed."""
        return replace(self, **changes)


@dataclass(frozen=True)
class Statement:
    """What a caption says.

    Attributes:
        subject: what it is about.
        relation: one of :data:`RELATIONS`, ``"and"``, or ``None`` if only the subject is named.
        other: the second object of a relation or an ``"and"``.
        count: how many of the subject there are; 1 says at least one.
    """

    subject: Description
    relation: str | None = None
    other: Description | None = None
    count: int = 1

    def descriptions(self) -> list[Description]:
        """Give the subject and, where there is one, the other object."""
        return [self.subject] if self.other is None else [self.subject, self.other]

    def with_description(self, place: int, description: Description) -> Statement:
        """Give the statement with the subject (0) or the other object (1) exchanged."""
        return replace(self, subject=description) if place == 0 else replace(self, other=description)


def objects_of(world: World, factors: Sequence[Sequence[int]], present: Sequence[bool]) -> list[SceneObject]:
    """List the present objects of one picture.

    Args:
        world: which drew it.
        factors: per slot, the values of ``world.object_factors``.
        present: per slot.
    """
    units = world.config.position_units
    found = []
    for slot, (row, there) in enumerate(zip(factors, present, strict=True)):
        if there:
            value: dict[str, Any] = dict(zip(world.object_factors, row, strict=True))
            look = {name: value[name] for name in ATTRIBUTES}
            found.append(SceneObject(slot, x=units[value["x"]], y=units[value["y"]], **look))
    return found


def describe(thing: SceneObject, attributes: Sequence[str]) -> Description:
    """Describe an object by some of its attributes."""
    return Description(**{name: getattr(thing, name) for name in attributes})


def matches(thing: SceneObject, description: Description) -> bool:
    """Tell whether an object is as described."""
    return (
        description.shape in (None, thing.shape)
        and description.hue in (None, thing.hue)
        and description.size in (None, thing.size)
        and description.texture in (None, thing.texture)
    )


def relates(world: World, first: SceneObject, relation: str, second: SceneObject) -> bool:
    """Tell whether a relation holds from one object to another.

    Left, right, above and below ask for a difference of centres of more than a sixth of the side along the axis, and more
    than along the other axis.

    Raises:
        ValueError: unknown relation.
    """
    right, down = second.x - first.x, second.y - first.y
    sixth = world.config.size * world.config.phases / 6
    if relation in ("left", "right"):
        along = right if relation == "left" else -right
        return along > sixth and along > abs(down)
    if relation in ("above", "below"):
        along = down if relation == "above" else -down
        return along > sixth and along > abs(right)
    if relation == "larger":
        return first.size > second.size
    if relation == "smaller":
        return first.size < second.size
    if relation == "same_colour":
        return first.hue == second.hue
    if relation == "same_shape":
        return first.shape == second.shape
    raise ValueError(f"relation must be one of {', '.join(RELATIONS)}, got {relation!r}")


def holds(world: World, statement: Statement, scene: Sequence[SceneObject]) -> bool:
    """Judge a statement of a picture."""
    subjects = [thing for thing in scene if matches(thing, statement.subject)]
    if statement.other is None:
        return len(subjects) == statement.count if statement.count > 1 else bool(subjects)
    others = [thing for thing in scene if matches(thing, statement.other)]
    pairs = [(first, second) for first in subjects for second in others if first.slot != second.slot]
    if statement.relation == "and" or statement.relation is None:
        return bool(pairs)
    return any(relates(world, first, statement.relation, second) for first, second in pairs)

"""False statements that are hard to tell from a true one.

    true        a red circle left of a blue square
    swap        a blue circle left of a red square       an attribute changes places between the two objects
    wrong       a red circle left of a green square      one attribute is another
    relation    a red circle right of a blue square      the relation is turned round
    absent      a red circle left of a yellow cross      one object is not in the picture

Each is judged by the oracle and kept only if it is false of the whole picture.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

from headgate.data.scenes.choices import Choices
from headgate.data.scenes.facts import OPPOSITES, SPATIAL, SceneObject, Statement, holds
from headgate.data.scenes.world import World

__all__ = ["KINDS", "Negative", "false_variant", "hard_negatives"]

KINDS = ("swap", "wrong", "relation", "absent")


@dataclass(frozen=True)
class Negative:
    """A false caption.

    Attributes:
        kind: one of :data:`KINDS`.
        text: the caption.
        statement: what it says.
    """

    kind: str
    text: str
    statement: Statement


def hard_negatives(
    world: World, statement: Statement, scene: Sequence[SceneObject], choices: Choices
) -> dict[str, Statement | None]:
    """Find one false statement of each kind; ``None`` where the picture allows none."""
    return {kind: false_variant(world, kind, statement, scene, choices) for kind in KINDS}


def false_variant(
    world: World, kind: str, statement: Statement, scene: Sequence[SceneObject], choices: Choices
) -> Statement | None:
    """Change a statement at random so that it is false of a picture.

    Args:
        world: which drew it.
        kind: one of :data:`KINDS`.
        statement: a statement to change.
        scene: the objects of the picture.
        choices: where chance comes from.

    Returns:
        One of the false variants of that kind, each as likely; ``None`` if there is none.
    """
    edits = {"swap": _swaps, "wrong": _wrongs, "relation": _turns, "absent": _absents}[kind](world, statement, scene)
    for edit in choices.one_by_one(edits):
        variant = _edited(statement, edit)
        if not holds(world, variant, scene):
            return variant
    return None


# What an edit changes: attributes of the subject, attributes of the other object, the relation.
_Edit = tuple[dict[str, int], dict[str, int], str | None]


def _edited(statement: Statement, edit: _Edit) -> Statement:
    subject, other, relation = edit
    return Statement(
        statement.subject.with_(**subject) if subject else statement.subject,
        relation or statement.relation,
        statement.other.with_(**other) if other and statement.other else statement.other,
        statement.count,
    )


def _swaps(world: World, statement: Statement, scene: Sequence[SceneObject]) -> list[_Edit]:
    if statement.other is None:
        return []
    first, second = statement.subject.given(), statement.other.given()
    common = [name for name in first if name in second and first[name] != second[name]]
    return [({name: second[name]}, {name: first[name]}, None) for name in common]


def _wrongs(world: World, statement: Statement, scene: Sequence[SceneObject]) -> list[_Edit]:
    edits: list[_Edit] = []
    for place, description in enumerate(statement.descriptions()):
        for name, value in description.given().items():
            changes = [{name: other} for other in range(world.cards[name]) if other != value]
            edits += [(change, {}, None) if place == 0 else ({}, change, None) for change in changes]
    return edits


def _turns(world: World, statement: Statement, scene: Sequence[SceneObject]) -> list[_Edit]:
    if statement.relation is None or statement.relation == "and":
        return []
    if statement.relation in OPPOSITES:
        return [({}, {}, OPPOSITES[statement.relation])]
    return [({}, {}, relation) for relation in SPATIAL]


def _absents(world: World, statement: Statement, scene: Sequence[SceneObject]) -> list[_Edit]:
    edits: list[_Edit] = []
    for place, description in enumerate(statement.descriptions()):
        changing = [name for name in ("shape", "hue") if getattr(description, name) is not None]
        seen = {tuple(getattr(thing, name) for name in changing) for thing in scene}
        for values in product(*(range(world.cards[name]) for name in changing)):
            if values not in seen:
                change = dict(zip(changing, values, strict=True))
                edits.append((change, {}, None) if place == 0 else ({}, change, None))
    return edits

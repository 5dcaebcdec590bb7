"""Noisy captions: what goes wrong between pictures and texts that were gathered rather than written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

from headgate.data.scenes.choices import Choices
from headgate.data.scenes.facts import SceneObject, Statement
from headgate.data.scenes.negatives import false_variant
from headgate.data.scenes.world import World
from headgate.validate import check_probability

__all__ = ["NoiseModel"]


@dataclass(frozen=True)
class NoiseModel:
    """The probability of each thing that can happen to a caption; each that happened is flagged.

    Args:
        swap_attribute: an attribute changes places between the two objects, so that the caption is false.
        wrong_attribute: an attribute is another, so that the caption is false.
        drop: an adjective is left out.
        shuffle_captions: the caption is that of another picture of the batch.
        filler: a word is added that says nothing.

    Raises:
        ValueError: a probability outside [0, 1].
    """

    swap_attribute: float = 0.0
    wrong_attribute: float = 0.0
    drop: float = 0.0
    shuffle_captions: float = 0.0
    filler: float = 0.0

    def __post_init__(self) -> None:
        check_probability(**{name: getattr(self, name) for name in self.events()})

    @classmethod
    def events(cls) -> tuple[str, ...]:
        """Give the names of the events in the order of the flags."""
        return tuple(field.name for field in fields(cls))

    def disturb(
        self, world: World, statement: Statement, scene: Sequence[SceneObject], choices: Choices
    ) -> tuple[Statement, dict[str, bool]]:
        """Change what a caption says.

        Args:
            world: which drew the picture.
            statement: true of it.
            scene: its objects.
            choices: where chance comes from.

        Returns:
            The statement, and which events happened; ``shuffle_captions`` and ``filler`` are only drawn here, and carried
            out where the captions of a batch are written. An event that a picture does not allow (no two objects to swap
            between, no adjective to drop) does not happen.
        """
        drawn = {name: choices.chance(getattr(self, name)) for name in self.events()}
        if drawn["drop"]:
            shorter = _without_an_adjective(statement)
            drawn["drop"] = bool(shorter)
            statement = choices.pick(shorter) if shorter else statement
        for event, kind in (("swap_attribute", "swap"), ("wrong_attribute", "wrong")):
            if drawn[event]:
                variant = false_variant(world, kind, statement, scene, choices)
                drawn[event] = variant is not None
                statement = variant or statement
        return statement, drawn


def _without_an_adjective(statement: Statement) -> list[Statement]:
    return [
        statement.with_description(place, description.with_(**{name: None}))
        for place, description in enumerate(statement.descriptions())
        for name in description.given()
        if name != "shape"
    ]

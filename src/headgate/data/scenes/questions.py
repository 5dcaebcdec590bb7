"""Yes/no questions about a picture, balanced, with the three ways of POPE to find what is not there.

    existence   is there a circle
    pair        is there a red circle                 (red things and circles may be there without a red circle)
    count       are there more red shapes than blue shapes
    relation    is there a red circle left of a blue square

POPE: Li et al., "Evaluating object hallucination in large vision-language models", EMNLP 2023.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import permutations, product

from jaxtyping import Float
from torch import Tensor

from headgate.data.scenes.choices import Choices
from headgate.data.scenes.facts import SPATIAL, Description, SceneObject, Statement, describe, holds, matches
from headgate.data.scenes.grammar import Grammar
from headgate.data.scenes.world import World

__all__ = ["QUESTION_KINDS", "SAMPLINGS", "Question", "QuestionMaker"]

QUESTION_KINDS = ("existence", "pair", "count", "relation")
SAMPLINGS = ("random", "popular", "adversarial")


@dataclass(frozen=True)
class Question:
    """A question and its answer.

    Attributes:
        kind: one of :data:`QUESTION_KINDS`.
        sampling: how questions with the answer no were found.
        text: the question.
        answer: yes or no.
    """

    kind: str
    sampling: str
    text: str
    answer: bool


@dataclass(frozen=True)
class _More:
    """There are more objects of the first description than of the second."""

    first: Description
    second: Description

    def descriptions(self) -> list[Description]:
        return [self.first, self.second]


_Claim = Statement | _More


class QuestionMaker:
    """Asks questions.

    Args:
        world: which draws the pictures.
        grammar: says the questions.
        frequency: (shapes, hues) weights of an object in the pictures that are asked about.
        training: (shapes, hues) weights of an object in training.
    """

    def __init__(
        self,
        world: World,
        grammar: Grammar,
        frequency: Float[Tensor, "shapes hues"],
        training: Float[Tensor, "shapes hues"],
    ) -> None:
        self.world = world
        self.grammar = grammar
        self._frequency = (frequency / frequency.sum()).tolist()
        by_shape = training.sum(dim=1, keepdim=True).clamp_min(1e-12)
        by_hue = training.sum(dim=0, keepdim=True).clamp_min(1e-12)
        self._hue_given_shape = (training / by_shape).tolist()
        self._shape_given_hue = (training / by_hue).tolist()

    def ask(
        self, scene: Sequence[SceneObject], kind: str, sampling: str, number: int, choices: Choices
    ) -> list[Question]:
        """Ask about one picture; see :meth:`CaptionedScenes.questions`.

        Questions with the answer yes are drawn uniformly. Those with the answer no are drawn uniformly, or are the
        first by frequency in the part, or by how strongly training ties them to the picture's shapes and hues.
        """
        if kind not in QUESTION_KINDS:
            raise ValueError(f"kind must be one of {', '.join(QUESTION_KINDS)}, got {kind!r}")
        if sampling not in SAMPLINGS:
            raise ValueError(f"sampling must be one of {', '.join(SAMPLINGS)}, got {sampling!r}")
        if number < 2 or number % 2:
            raise ValueError(f"number must be even and at least 2, got {number}")
        yes, no = {
            "existence": self._existence,
            "pair": self._pairs,
            "count": self._counts,
            "relation": self._relations,
        }[kind](scene)
        half = min(number // 2, len(yes), len(no))
        positive = choices.shuffled(yes)[:half]
        if sampling == "random":
            negative = choices.shuffled(no)[:half]
        else:
            measure = self._popularity if sampling == "popular" else self._cooccurrence
            scores = {claim: sum(measure(thing, scene) for thing in claim.descriptions()) for claim in no}
            negative = choices.ranked(no, scores.__getitem__)[:half]
        asked = [(claim, True) for claim in positive] + [(claim, False) for claim in negative]
        return [Question(kind, sampling, self._text(claim), answer) for claim, answer in choices.shuffled(asked)]

    def _existence(self, scene: Sequence[SceneObject]) -> tuple[list[_Claim], list[_Claim]]:
        return _by_presence([Description(shape=shape) for shape in range(self.world.cards["shape"])], scene)

    def _pairs(self, scene: Sequence[SceneObject]) -> tuple[list[_Claim], list[_Claim]]:
        pairs = product(range(self.world.cards["shape"]), range(self.world.cards["hue"]))
        return _by_presence([Description(shape=shape, hue=hue) for shape, hue in pairs], scene)

    def _counts(self, scene: Sequence[SceneObject]) -> tuple[list[_Claim], list[_Claim]]:
        yes: list[_Claim] = []
        no: list[_Claim] = []
        for name in ("shape", "hue"):
            things = [Description(**{name: value}) for value in range(self.world.cards[name])]
            number = {thing: sum(matches(one, thing) for one in scene) for thing in things}
            for first, second in permutations(things, 2):
                if number[first] > number[second]:
                    yes.append(_More(first, second))
                elif number[second] > 0:
                    no.append(_More(first, second))
        return yes, no

    def _relations(self, scene: Sequence[SceneObject]) -> tuple[list[_Claim], list[_Claim]]:
        things = dict.fromkeys(describe(thing, ("hue", "shape")) for thing in scene)
        yes: list[_Claim] = []
        no: list[_Claim] = []
        for first, second in permutations(things, 2):
            for relation in SPATIAL:
                claim = Statement(first, relation, second)
                (yes if holds(self.world, claim, scene) else no).append(claim)
        return yes, no

    def _text(self, claim: _Claim) -> str:
        return self.grammar.ask_more(claim.first, claim.second) if isinstance(claim, _More) else self.grammar.ask(claim)

    def _popularity(self, thing: Description, scene: Sequence[SceneObject]) -> float:
        rows = self._frequency if thing.shape is None else [self._frequency[thing.shape]]
        return sum(sum(row) if thing.hue is None else row[thing.hue] for row in rows)

    def _cooccurrence(self, thing: Description, scene: Sequence[SceneObject]) -> float:
        shapes, hues = {one.shape for one in scene}, {one.hue for one in scene}
        if thing.shape is None:
            assert thing.hue is not None
            return sum(self._hue_given_shape[shape][thing.hue] for shape in shapes)
        if thing.hue is None:
            return sum(self._shape_given_hue[thing.shape][hue] for hue in hues)
        score = self._hue_given_shape[thing.shape][thing.hue] if thing.shape in shapes else 0.0
        return score + (self._shape_given_hue[thing.shape][thing.hue] if thing.hue in hues else 0.0)


def _by_presence(things: list[Description], scene: Sequence[SceneObject]) -> tuple[list[_Claim], list[_Claim]]:
    there = {thing: any(matches(one, thing) for one in scene) for thing in things}
    return [Statement(thing) for thing in things if there[thing]], [
        Statement(thing) for thing in things if not there[thing]
    ]

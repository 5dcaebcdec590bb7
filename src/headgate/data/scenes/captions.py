"""Pictures with captions, token spans, phrases with masks, hard negatives and questions.

level 0   triangle and square
level 1   red triangle and …                          one object alone: the bare phrase, "red triangle"
level 2   a large red triangle and a small blue square
level 3   a large red triangle left of a small blue square
counts    two red circles                             (below level 3, where several objects fit the description)
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from headgate.data.scenes.choices import Choices
from headgate.data.scenes.export import write_image_folder
from headgate.data.scenes.facts import RELATIONS, SceneObject, Statement, describe, holds, matches, objects_of, relates
from headgate.data.scenes.grammar import Grammar, Tokenizer
from headgate.data.scenes.multi import MultiObject
from headgate.data.scenes.negatives import KINDS, Negative, hard_negatives
from headgate.data.scenes.noise import NoiseModel
from headgate.data.scenes.questions import Question, QuestionMaker
from headgate.data.scenes.splits import Split
from headgate.data.scenes.tables import FactorTable
from headgate.data.scenes.world import World

__all__ = ["CaptionedScenes"]

_MOST_OBJECTS = 6  # "six" is the largest number with a word
_CAPTION, _NEGATIVES, _QUESTIONS = 1, 2, 3

Spans = dict[int, dict[str, tuple[int, int]]]


class CaptionedScenes(MultiObject):
    """A stream of pictures with captions that are true of them, or noisy where noise is asked for.

    Args:
        world: the world to draw from.
        n_objects: fewest and most objects, at most 6.
        max_overlap: as in :class:`MultiObject`.
        slots: as in :class:`MultiObject`, at most 6.
        caption_level: 0 names the shape, 1 hue and shape, 2 size (and texture, where the world has several), too, and 3
            says how two objects relate.
        relations: which relations level 3 may say; out of left, right, above, below, larger, smaller, same_colour and
            same_shape. Where none holds, level 3 joins two objects by "and".
        noise: what may go wrong with captions.
        cooccurrence: (shapes, hues) weights of the joint distribution of shape and hue in ``train`` and ``val``; ``test``
            stays uniform, so a prior learned from training shows there as hallucination.
        length: tokens of an encoded caption.
        split: as in :class:`MultiObject`.
        part: as in :class:`MultiObject`.
        out: as in :class:`MultiObject`.
        range: as in :class:`MultiObject`.
        device: as in :class:`MultiObject`.
        seed: names the examples of :meth:`example`, :meth:`negatives` and :meth:`questions`.

    Attributes:
        grammar: says and reads statements.
        tokenizer: turns captions into tokens.

    Raises:
        ValueError: an unknown level or relation, too many objects, weights of another shape.
    """

    def __init__(
        self,
        world: World,
        n_objects: int | tuple[int, int] = (1, 3),
        max_overlap: float = 0.3,
        slots: int | None = None,
        *,
        caption_level: int = 1,
        relations: Sequence[str] = RELATIONS,
        noise: NoiseModel | None = None,
        cooccurrence: Tensor | None = None,
        length: int = 16,
        split: str | Split | None = None,
        part: str = "train",
        out: str = "float32",
        range: str = "01",
        device: torch.device | str | None = None,
        seed: int = 0,
    ) -> None:
        if caption_level not in (0, 1, 2, 3):
            raise ValueError(f"caption_level must be 0, 1, 2 or 3, got {caption_level}")
        unknown = [relation for relation in relations if relation not in RELATIONS]
        if unknown or not relations:
            raise ValueError(f"relations must be out of {', '.join(RELATIONS)}, got {tuple(relations)}")
        prior = () if cooccurrence is None else (FactorTable(("shape", "hue"), cooccurrence.double()),)
        for table in prior:
            table.check(world)
        super().__init__(
            world,
            n_objects,
            max_overlap,
            slots,
            split=split,
            part=part,
            tables=() if part == "test" else prior,
            out=out,
            range=range,
            device=device,
            seed=seed,
        )
        if self.slots > _MOST_OBJECTS:
            raise ValueError(f"slots must be at most {_MOST_OBJECTS} for captions, got {self.slots}")
        self.caption_level = caption_level
        self.relations = tuple(relations)
        self.noise = noise or NoiseModel()
        self.grammar = Grammar(world, length)
        self.attributes = {0: ("shape",), 1: ("hue", "shape")}.get(caption_level, self.grammar.named)
        uniform = torch.ones(world.cards["shape"], world.cards["hue"], dtype=torch.float64)
        training = prior[0].weights if prior else uniform
        self._asker = QuestionMaker(world, self.grammar, self.sampler.marginal(("shape", "hue")), training)

    @property
    def tokenizer(self) -> Tokenizer:
        """Turns captions into tokens."""
        return self.grammar.tokenizer

    def batch(self, count: int, generator: torch.Generator | None = None) -> dict[str, Any]:
        """Draw pictures with captions.

        Returns:
            What :meth:`MultiObject.batch` gives, and:

            caption: list of texts.
            tokens: (count, length) int64.
            spans: per picture, slot of the object → attribute → (first, one past the last) token of its words; the
            subject's holds ``relation`` or ``count``, too. Empty where the caption is another picture's.
            caption_true: (count,) bool, judged by the oracle.
            noise_flags: (count, 5) bool in the order of ``NoiseModel.events()``.
            statements: per picture, the true statement before noise.
            phrases: per picture and slot, the words for the object; empty for absent ones.
            phrase_tokens: (count, slots, length) int64.
            phrase_masks: (count, slots, size, size), the visible share of all objects that the phrase fits.
        """
        scenes = self.draw(count, generator)
        keys = torch.randint(2**62, (count,), generator=generator).tolist()
        batch = self.paint(scenes)
        everything = self.facts(batch)
        statements, said, slots, flags = [], [], [], []
        for key, scene in zip(keys, everything, strict=True):
            choices = Choices(key, _CAPTION)
            statement, mentioned = self._state(scene, choices)
            noisy, happened = self.noise.disturb(self.world, statement, scene, choices)
            statements.append(statement)
            said.append(noisy)
            slots.append(mentioned)
            flags.append(happened)
        shuffled = [row for row, happened in enumerate(flags) if happened["shuffle_captions"]]
        if len(shuffled) < 2:
            for row in shuffled:
                flags[row]["shuffle_captions"] = False
            shuffled = []
        source = list(range(count))
        for row, other in zip(shuffled, shuffled[1:] + shuffled[:1], strict=True):
            source[row] = other
        written = [self.grammar.write(said[row], filler=flags[row]["filler"]) for row in source]
        captions = [text for text, _ in written]
        spans: list[Spans] = []
        for row, (_, places) in enumerate(written):
            named = zip(slots[row], places, strict=True) if source[row] == row else ()
            spans.append({slot: dict(place) for group, place in named for slot in group})
        true = [holds(self.world, said[source[row]], scene) for row, scene in enumerate(everything)]
        return (
            batch
            | {
                "caption": captions,
                "tokens": self.tokenizer.encode_all(captions).to(self.device),
                "spans": spans,
                "caption_true": torch.tensor(true, dtype=torch.bool, device=self.device),
                "noise_flags": torch.tensor([list(happened.values()) for happened in flags], device=self.device),
                "statements": statements,
            }
            | self._phrases(batch, everything)
        )

    def facts(self, batch: dict[str, Any]) -> list[list[SceneObject]]:
        """List the present objects of every picture of a batch."""
        rows = zip(batch["factors"].tolist(), batch["present"].tolist(), strict=True)
        return [objects_of(self.world, factors, present) for factors, present in rows]

    def negatives(self, index: int) -> list[Negative]:
        """Give the hard negatives of example ``index``, at most one of each kind, each false of the picture."""
        example = self.example(index)
        scene = objects_of(self.world, example["factors"].tolist(), example["present"].tolist())
        found = hard_negatives(self.world, example["statements"], scene, Choices(self.seed, _NEGATIVES, index))
        return [
            Negative(kind, self.grammar.write(statement)[0], statement)
            for kind, statement in found.items()
            if statement is not None
        ]

    def batch_negatives(self, batch: dict[str, Any], generator: torch.Generator | None = None) -> dict[str, Any]:
        """Give hard negatives for every picture of a batch.

        Args:
            batch: what :meth:`batch` gave.
            generator: a CPU generator.

        Returns:
            kinds: swap, wrong, relation, absent; the order of the axis.
            captions: per picture and kind, a text; empty where the picture allows none.
            tokens: (count, 4, length) int64.
            valid: (count, 4) bool, false where the picture allows none.
        """
        scenes = self.facts(batch)
        keys = torch.randint(2**62, (len(scenes),), generator=generator).tolist()
        captions = []
        for key, statement, scene in zip(keys, batch["statements"], scenes, strict=True):
            found = hard_negatives(self.world, statement, scene, Choices(key, _NEGATIVES))
            captions.append([self.grammar.write(false)[0] if false else "" for false in found.values()])
        tokens = self.tokenizer.encode_all([text for row in captions for text in row])
        return {
            "kinds": KINDS,
            "captions": captions,
            "tokens": tokens.view(len(scenes), len(KINDS), -1).to(self.device),
            "valid": torch.tensor([[bool(text) for text in row] for row in captions], device=self.device),
        }

    def questions(self, index: int, kind: str, sampling: str = "random", number: int = 2) -> list[Question]:
        """Ask yes/no questions about example ``index``, as many with the answer yes as no.

        Args:
            index: the example.
            kind: ``"existence"`` (of a shape), ``"pair"`` (of a hue and shape), ``"count"`` or ``"relation"``.
            sampling: how questions with the answer no are found: ``"random"``, ``"popular"`` (what is frequent in this
                part) or ``"adversarial"`` (what occurs with the picture's shapes and hues in training); the settings of
                POPE (Li et al., "Evaluating object hallucination in large vision-language models", EMNLP 2023).
            number: an even number; fewer come where the picture does not allow as many.

        Raises:
            ValueError: unknown kind or sampling, or an odd number.
        """
        example = self.example(index)
        scene = objects_of(self.world, example["factors"].tolist(), example["present"].tolist())
        return self._asker.ask(scene, kind, sampling, number, Choices(self.seed, _QUESTIONS, index))

    def batch_questions(
        self,
        batch: dict[str, Any],
        kind: str,
        sampling: str = "random",
        number: int = 2,
        generator: torch.Generator | None = None,
    ) -> dict[str, Any]:
        """Ask questions about every picture of a batch.

        Args:
            batch: what :meth:`batch` gave.
            kind: as in :meth:`questions`.
            sampling: as in :meth:`questions`.
            number: as in :meth:`questions`.
            generator: a CPU generator.

        Returns:
            image: (questions,) int64, the row of the picture; text: list; tokens: (questions, length) int64; answer:
            (questions,) bool, half of them true.
        """
        scenes = self.facts(batch)
        keys = torch.randint(2**62, (len(scenes),), generator=generator).tolist()
        rows, asked = [], []
        for row, (key, scene) in enumerate(zip(keys, scenes, strict=True)):
            found = self._asker.ask(scene, kind, sampling, number, Choices(key, _QUESTIONS))
            asked += found
            rows += [row] * len(found)
        return {
            "image": torch.tensor(rows, dtype=torch.int64, device=self.device),
            "text": [question.text for question in asked],
            "tokens": self.tokenizer.encode_all([question.text for question in asked]).to(self.device),
            "answer": torch.tensor([question.answer for question in asked], dtype=torch.bool, device=self.device),
        }

    def to_folder(self, folder: str | os.PathLike[str], count: int) -> None:
        """Write the first examples as PNG files with a Hugging Face ``metadata.jsonl``.

        Each line holds ``file_name``, ``text``, ``caption_true`` and ``objects`` (names, centres and boxes in [0, 1]).
        ``datasets.load_dataset("imagefolder", data_dir=folder)`` reads the folder.

        Args:
            folder: must not exist yet, or be empty.
            count: how many examples.

        Raises:
            DataError: the folder holds something.
            ValueError: ``count`` below 1.
        """
        if count < 1:
            raise ValueError(f"count must be at least 1, got {count}")
        write_image_folder(folder, (self._line(self.example(index)) for index in range(count)))

    def _line(self, example: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
        image = example["image"].cpu()
        if self.out == "float32":
            image = ((image if self.range == "01" else (image + 1) / 2) * 255 + 0.5).to(torch.uint8)
        whole = self.world.config.size * self.world.config.phases
        scene = objects_of(self.world, example["factors"].tolist(), example["present"].tolist())
        objects = [
            {name: self.world.names(name)[getattr(thing, name)] for name in ("shape", "hue", "size", "texture")}
            | {"center": [thing.x / whole, thing.y / whole], "box": example["boxes"][thing.slot].tolist()}
            for thing in scene
        ]
        true = bool(example["caption_true"])
        return image, {"text": example["caption"], "caption_true": true, "objects": objects}

    def _state(self, scene: Sequence[SceneObject], choices: Choices) -> tuple[Statement, list[list[int]]]:
        """Choose a true statement, and tell which slots each of its descriptions stands for."""
        if self.caption_level == 3:
            related = [
                (first, second, held)
                for first in scene
                for second in scene
                if first.slot != second.slot
                and (held := [name for name in self.relations if relates(self.world, first, name, second)])
            ]
            if related:
                first, second, held = choices.pick(related)
                said = (describe(first, self.attributes), choices.pick(held), describe(second, self.attributes))
                return Statement(*said), [[first.slot], [second.slot]]
        first = choices.pick(scene)
        subject = describe(first, self.attributes)
        alike = [thing.slot for thing in scene if matches(thing, subject)]
        if len(alike) > 1:
            return Statement(subject, count=len(alike)), [alike]
        rest = [thing for thing in scene if thing.slot != first.slot]
        if not rest:
            return Statement(subject), [[first.slot]]
        second = choices.pick(rest)
        return Statement(subject, "and", describe(second, self.attributes)), [[first.slot], [second.slot]]

    def _phrases(self, batch: dict[str, Any], everything: list[list[SceneObject]]) -> dict[str, Any]:
        phrases = []
        for scene in everything:
            row = [""] * self.slots
            for thing in scene:
                row[thing.slot] = self.grammar.phrase(describe(thing, self.attributes))
            phrases.append(row)
        columns = [self.world.object_factors.index(name) for name in self.attributes]
        looks, present = batch["factors"][..., columns], batch["present"]
        alike = (looks[:, :, None] == looks[:, None]).all(dim=-1) & present[:, :, None] & present[:, None]
        visible = batch["masks"][:, 1:]
        masks = torch.bmm(alike.to(visible.dtype), visible.flatten(2)).view_as(visible)
        tokens = self.tokenizer.encode_all([phrase for row in phrases for phrase in row])
        return {
            "phrases": phrases,
            "phrase_tokens": tokens.view(len(everything), self.slots, -1).to(self.device),
            "phrase_masks": masks,
        }

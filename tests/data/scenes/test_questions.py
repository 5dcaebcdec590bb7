"""Questions: right answers, balance, and the three ways to find what is not there."""

from __future__ import annotations

import re

import pytest
import torch

from headgate.data.scenes import CaptionedScenes, World
from headgate.data.scenes.questions import QUESTION_KINDS, SAMPLINGS
from headgate.data.seeding import stream_generator
from tests.data.scenes.oracle import answer, things


@pytest.mark.parametrize("kind", QUESTION_KINDS)
@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_answers_are_right_and_balanced(kind: str, sampling: str) -> None:
    world = World(16)
    weights = torch.rand(4, 8, generator=stream_generator(1)) ** 3
    dataset = CaptionedScenes(world, (2, 4), cooccurrence=weights)
    batch = dataset.batch(150, stream_generator(0))
    asked = dataset.batch_questions(batch, kind, sampling, number=4, generator=stream_generator(2))
    assert len(asked["text"]) > 250
    assert float(asked["answer"].float().mean()) == 0.5
    for row in range(150):
        mine = asked["answer"][asked["image"] == row]
        assert int(mine.sum()) * 2 == len(mine) <= 4
    for row, text, true in zip(asked["image"].tolist(), asked["text"], asked["answer"].tolist(), strict=True):
        assert answer(world, text, things(world, batch, row)) == true, text
    assert [dataset.tokenizer.decode(tokens) for tokens in asked["tokens"]] == asked["text"]
    assert not bool((asked["tokens"] == dataset.tokenizer.unk).any())


def test_each_kind_asks_what_it_promises() -> None:
    dataset = CaptionedScenes(World(16), 3)
    batch = dataset.batch(40, stream_generator(0))
    patterns = {
        "existence": r"is there a (circle|square|triangle|cross)",
        "pair": r"is there an? \w+ (circle|square|triangle|cross)",
        "count": r"are there more \w+( shapes)? than \w+( shapes)?",
        "relation": r"is there an? \w+ \w+ (left of|right of|above|below) an? \w+ \w+",
    }
    for kind, pattern in patterns.items():
        for text in dataset.batch_questions(batch, kind)["text"]:
            assert re.fullmatch(pattern, text), text


def test_questions_of_an_example_are_about_that_example() -> None:
    world = World(16)
    dataset = CaptionedScenes(world, 3, seed=3)
    for index in range(10):
        example = dataset.example(index)
        scene = things(world, {"present": example["present"][None], "factors": example["factors"][None]}, 0)
        for kind in QUESTION_KINDS:
            questions = dataset.questions(index, kind, number=2)
            assert sum(question.answer for question in questions) * 2 == len(questions)
            assert all(answer(world, question.text, scene) == question.answer for question in questions)
            assert questions == dataset.questions(index, kind, number=2)
            assert {question.kind for question in questions} <= {kind}


def test_popular_asks_for_the_most_frequent_absent_objects_of_the_part() -> None:
    world = World(16)
    weights = torch.arange(1.0, 33.0).view(4, 8)  # pink crosses are the most frequent, red circles the rarest
    dataset = CaptionedScenes(world, 2, cooccurrence=weights)
    batch = dataset.batch(60, stream_generator(0))
    asked = dataset.batch_questions(batch, "pair", "popular", number=4)
    names = [f"{hue} {shape}" for shape in world.names("shape") for hue in world.names("hue")]
    checked = 0
    for row in range(60):
        there = {f"{thing['hue']} {thing['shape']}" for thing in things(world, batch, row)}
        absent = [name for name in reversed(names) if name not in there]
        rows = [k for k, image in enumerate(asked["image"].tolist()) if image == row and not asked["answer"][k]]
        said = {asked["text"][k].split(maxsplit=3)[3] for k in rows}
        assert said == set(absent[: len(said)])
        checked += len(said)
    assert checked > 100


def test_adversarial_asks_for_what_training_ties_to_the_picture() -> None:
    world = World(16)
    weights = torch.full((4, 8), 0.01)
    partner = {"circle": "red", "square": "yellow", "triangle": "cyan", "cross": "purple"}
    for shape, hue in partner.items():
        weights[world.names("shape").index(shape), world.names("hue").index(hue)] = 1.0
    # at test shapes and hues are independent, so the partner is mostly absent
    dataset = CaptionedScenes(world, 1, cooccurrence=weights, split="iid", part="test")
    batch = dataset.batch(80, stream_generator(0))
    asked = dataset.batch_questions(batch, "pair", "adversarial")
    pairs = {f"{hue} {shape}" for shape, hue in partner.items()}
    matched = 0
    for row, text, true in zip(asked["image"].tolist(), asked["text"], asked["answer"].tolist(), strict=True):
        if not true:
            (thing,) = things(world, batch, row)
            asked_about = text.split(maxsplit=3)[3]
            assert asked_about in pairs or partner[thing["shape"]] == thing["hue"]
            if thing["hue"] not in partner.values():
                assert asked_about == f"{partner[thing['shape']]} {thing['shape']}"
                matched += 1
    assert matched > 25
    random = dataset.batch_questions(batch, "pair", "random")
    ties = sum(
        text.split(maxsplit=3)[3] in pairs
        for text, true in zip(random["text"], random["answer"].tolist(), strict=True)
        if not true
    )
    assert ties < 25


def test_bad_arguments_are_refused() -> None:
    dataset = CaptionedScenes(World(16))
    for arguments, message in [
        (("colour",), "kind must be one of"),
        (("pair", "hard"), "sampling must be one of"),
        (("pair", "random", 3), "number must be even"),
        (("pair", "random", 0), "number must be even"),
    ]:
        with pytest.raises(ValueError, match=message):
            dataset.questions(0, *arguments)  # type: ignore[arg-type]

"""Captions, spans, phrases, noise and hard negatives, judged by a second oracle."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from headgate.data.scenes import CaptionedScenes, NoiseModel, World
from headgate.data.scenes.facts import RELATIONS, Description, Statement
from headgate.data.scenes.grammar import Grammar, Tokenizer
from headgate.data.scenes.negatives import KINDS
from headgate.data.seeding import stream_generator
from headgate.errors import DataError
from tests.data.scenes.oracle import is_true, things

LEVELS = (0, 1, 2, 3)


def largest_world() -> World:
    return World(16, shapes=8, sizes=6, textures=3)


def scenes(
    level: int, count: int = 200, world: World | None = None, **settings: Any
) -> tuple[CaptionedScenes, dict[str, Any]]:
    dataset = CaptionedScenes(world or World(16), (1, 4), caption_level=level, **settings)
    return dataset, dataset.batch(count, stream_generator(level))


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("world", [World(16), largest_world()], ids=["default", "largest"])
def test_every_caption_is_true_of_its_scene(level: int, world: World) -> None:
    _, batch = scenes(level, world=world)
    assert bool(batch["caption_true"].all())
    for row, caption in enumerate(batch["caption"]):
        assert is_true(world, caption, things(world, batch, row)), caption


@pytest.mark.parametrize("level", LEVELS)
def test_captions_parse_back_to_the_factors_that_made_them(level: int) -> None:
    world = largest_world()
    dataset, batch = scenes(level, world=world)
    for row, caption in enumerate(batch["caption"]):
        statement = dataset.grammar.parse(caption)
        assert statement == batch["statements"][row]
        assert dataset.grammar.write(statement)[0] == caption
        described = statement.descriptions()
        groups = list(batch["spans"][row])
        groups = [groups] if statement.other is None else [[slot] for slot in groups]
        for description, slots in zip(described, groups, strict=True):
            for slot in slots:
                value = dict(zip(world.object_factors, batch["factors"][row, slot].tolist(), strict=True))
                assert description.given() == {name: value[name] for name in description.given()}
        named = {0: {"shape"}, 1: {"shape", "hue"}}.get(level, {"shape", "hue", "size", "texture"})
        assert all(set(description.given()) == named for description in described)


def test_levels_say_what_they_promise() -> None:
    texts = {level: scenes(level, 300)[1]["caption"] for level in LEVELS}
    assert not any(re.search(r"red|small|left", text) for text in texts[0])
    assert any("red" in text for text in texts[1])
    assert not any(re.search(r"small|left", text) for text in texts[1])
    assert any("small" in text for text in texts[2])
    assert not any("left" in text for text in texts[2])
    for words in (
        "left of",
        "right of",
        "above",
        "below",
        "larger than",
        "smaller than",
        "same colour as",
        "same shape as",
    ):
        assert any(words in text for text in texts[3]), words
    assert any(text.startswith("two ") for text in texts[0])


def test_articles_and_plurals() -> None:
    grammar = Grammar(World())
    orange, cross = Description(shape=0, hue=1), Description(shape=3, hue=0)
    assert grammar.write(Statement(orange, "left", cross))[0] == "an orange circle left of a red cross"
    assert (
        grammar.write(Statement(cross, "same_colour", orange), filler=True)[0]
        == "a nice red cross same colour as an orange circle"
    )
    assert grammar.write(Statement(cross, count=3))[0] == "three red crosses"
    assert grammar.write(Statement(cross.with_(size=2)))[0] == "large red cross"
    assert grammar.ask(Statement(orange)) == "is there an orange circle"
    assert grammar.ask_more(Description(hue=1), Description(hue=5)) == "are there more orange shapes than blue shapes"


def test_the_vocabulary_is_closed_and_small() -> None:
    for world in (World(), largest_world()):
        dataset, batch = scenes(3, 100, world, noise=NoiseModel(filler=0.5))
        tokenizer = dataset.tokenizer
        assert len(tokenizer.words) - 4 < 60
        assert len(set(tokenizer.words)) == len(tokenizer.words)
        assert not bool((batch["tokens"] == tokenizer.unk).any())
        assert [tokenizer.decode(tokens) for tokens in batch["tokens"]] == batch["caption"]


def test_tokens_have_bos_eos_and_padding() -> None:
    tokenizer = Tokenizer(["red", "circle"], length=6)
    assert tokenizer.encode("red circle").tolist() == [1, 4, 5, 2, 0, 0]
    assert tokenizer.encode("red  heart circle").tolist() == [1, 4, 3, 5, 2, 0]
    assert tokenizer.encode_all([]).shape == (0, 6)
    assert len(tokenizer) == 6
    with pytest.raises(ValueError, match="at most 4 words, got 5"):
        tokenizer.encode("red red red red circle")


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("filler", [0.0, 1.0])
def test_spans_hold_the_words_of_the_attributes(level: int, filler: float) -> None:
    world = largest_world()
    dataset, batch = scenes(level, world=world, noise=NoiseModel(filler=filler))
    words = {"stripes": "striped", "dots": "dotted"}
    for row, spans in enumerate(batch["spans"]):
        assert spans
        for slot, places in spans.items():
            value = dict(zip(world.object_factors, batch["factors"][row, slot].tolist(), strict=True))
            for attribute, (start, end) in places.items():
                said = dataset.tokenizer.decode(batch["tokens"][row, start:end])
                if attribute == "relation":
                    assert re.fullmatch(
                        r"left of|right of|above|below|(larger|smaller) than|same (colour|shape) as", said
                    )
                elif attribute == "count":
                    assert said == ("two", "three", "four")[len(spans) - 2]
                else:
                    name = world.names(attribute)[value[attribute]]
                    expected = words.get(name, name)
                    assert said in (expected, expected + "s", expected + "es")


def test_phrases_name_every_object_and_their_masks_show_all_that_fit() -> None:
    world = World(16, hues=2, shapes=2)
    dataset, batch = scenes(1, world=world)
    shared = 0
    for row, phrases in enumerate(batch["phrases"]):
        for slot, phrase in enumerate(phrases):
            alike = [other for other, words in enumerate(phrases) if words and words == phrase]
            shared += len(alike) > 1
            expected = sum((batch["masks"][row, other + 1] for other in alike), torch.zeros(16, 16))
            assert torch.equal(batch["phrase_masks"][row, slot], expected)
            assert bool(phrase) == bool(batch["present"][row, slot])
            assert dataset.tokenizer.decode(batch["phrase_tokens"][row, slot]) == phrase
            if phrase:
                hue, shape = phrase.split()
                assert world.names("hue").index(hue) == int(batch["factors"][row, slot, 5])
                assert world.names("shape").index(shape) == int(batch["factors"][row, slot, 0])
    assert shared > 50
    assert float(batch["phrase_masks"].max()) <= 1


@pytest.mark.parametrize("level", LEVELS)
def test_every_negative_is_false_of_its_scene_and_its_kind_tells_how(level: int) -> None:
    world = World(16)
    dataset, batch = scenes(level, world=world)
    negatives = dataset.batch_negatives(batch, stream_generator(9))
    assert negatives["kinds"] == KINDS
    seen = dict.fromkeys(KINDS, 0)
    for row, texts in enumerate(negatives["captions"]):
        scene = things(world, batch, row)
        true = batch["statements"][row]
        for kind, text, valid in zip(KINDS, texts, negatives["valid"][row].tolist(), strict=True):
            assert valid == bool(text)
            if not text:
                continue
            seen[kind] += 1
            assert not is_true(world, text, scene), (kind, text, batch["caption"][row])
            false = dataset.grammar.parse(text)
            before = [value for thing in true.descriptions() for value in thing.given().items()]
            after = [value for thing in false.descriptions() for value in thing.given().items()]
            changed = sum(first != second for first, second in zip(before, after, strict=True))
            if kind == "swap":
                assert changed == 2
                assert sorted(before) == sorted(after)
                assert false.relation == true.relation
            elif kind == "wrong":
                assert changed == 1
                assert false.relation == true.relation
            elif kind == "relation":
                assert changed == 0
                assert false.relation != true.relation
            else:
                assert 1 <= changed <= 2
                assert false.relation == true.relation
                absent = [d for d in false.descriptions() if d not in true.descriptions()]
                assert not any(
                    all(scene_thing_has(world, thing, *item) for item in absent[0].given().items()) for thing in scene
                )
    # a swap of shapes alone between "a circle and a square" is never false, and only level 3 has relations
    expected = {"swap": level > 0, "wrong": True, "relation": level == 3, "absent": True}
    assert {kind: number > 0 for kind, number in seen.items()} == expected
    assert torch.equal(negatives["tokens"][0, 1], dataset.tokenizer.encode(negatives["captions"][0][1]))


def scene_thing_has(world: World, thing: dict[str, Any], name: str, value: int) -> bool:
    return thing[name] == world.names(name)[value]


def test_negatives_of_an_example_are_false_of_that_example() -> None:
    world = World(16)
    dataset = CaptionedScenes(world, 3, caption_level=3, seed=4)
    for index in range(20):
        example = dataset.example(index)
        scene = things(world, {"present": example["present"][None], "factors": example["factors"][None]}, 0)
        negatives = dataset.negatives(index)
        assert len({negative.kind for negative in negatives}) == len(negatives) >= 2
        assert is_true(world, example["caption"], scene)
        for negative in negatives:
            assert not is_true(world, negative.text, scene)
            assert dataset.grammar.parse(negative.text) == negative.statement
        assert negatives == dataset.negatives(index)


def test_noise_happens_as_often_as_asked_and_is_flagged() -> None:
    world = World(16)
    noise = NoiseModel(swap_attribute=0.2, wrong_attribute=0.3, drop=0.4, shuffle_captions=0.5, filler=0.6)
    dataset = CaptionedScenes(world, 3, caption_level=2, noise=noise)
    batch = dataset.batch(1500, stream_generator(1))
    assert NoiseModel.events() == ("swap_attribute", "wrong_attribute", "drop", "shuffle_captions", "filler")
    rates = batch["noise_flags"].float().mean(dim=0).tolist()
    assert rates == pytest.approx([0.2, 0.3, 0.4, 0.5, 0.6], abs=0.05)
    for row, caption in enumerate(batch["caption"]):
        assert is_true(world, caption, things(world, batch, row)) == bool(batch["caption_true"][row])


@pytest.mark.parametrize("event", NoiseModel.events())
def test_each_noise_does_what_it_says(event: str) -> None:
    world = World(16)
    _, batch = scenes(3, world=world)
    noisy = CaptionedScenes(world, (1, 4), caption_level=3, noise=NoiseModel(**{event: 1.0}))
    other = noisy.batch(200, stream_generator(3))
    assert torch.equal(other["image"], batch["image"])
    assert other["statements"] == batch["statements"]
    column = NoiseModel.events().index(event)
    happened = other["noise_flags"][:, column]
    assert not bool(other["noise_flags"][:, [c for c in range(5) if c != column]].any())
    assert (
        float(happened.float().mean())
        > (0.7 if event == "swap_attribute" else 0.99) - (event == "swap_attribute") * 0.2
    )
    for row in range(200):
        before, after = batch["caption"][row], other["caption"][row]
        if not happened[row]:
            assert before == after
        elif event in ("swap_attribute", "wrong_attribute"):
            assert not bool(other["caption_true"][row])
            assert (
                (sorted(before.split()) == sorted(after.split()))
                or event == "wrong_attribute"
                or "an" in before + after
            )
        elif event == "drop":
            assert bool(other["caption_true"][row])
            assert len(after.split()) == len(before.split()) - 1
        elif event == "filler":
            assert after.replace("nice ", "").replace("an ", "a ") == before.replace("an ", "a ")
            assert "nice" in after
            assert bool(other["caption_true"][row])
        else:
            assert after == batch["caption"][(row + 1) % 200]
            assert other["spans"][row] == {}


def test_flags_of_noise_that_cannot_happen_stay_down() -> None:
    world = World(16)
    alone = CaptionedScenes(world, 1, caption_level=0, noise=NoiseModel(swap_attribute=1.0, drop=1.0))
    batch = alone.batch(50, stream_generator(0))
    assert not bool(batch["noise_flags"].any())
    assert bool(batch["caption_true"].all())
    single = CaptionedScenes(world, 2, noise=NoiseModel(shuffle_captions=1.0)).batch(1, stream_generator(0))
    assert not bool(single["noise_flags"].any())
    assert bool(single["caption_true"][0])


def test_cooccurrence_biases_training_and_leaves_test_uniform() -> None:
    world = World(16)
    weights = torch.full((4, 8), 0.1)
    weights[torch.arange(4), torch.arange(4)] = 5.0
    joints = {}
    for part in ("train", "val", "test"):
        batch = CaptionedScenes(world, 2, cooccurrence=weights, split="iid", part=part).batch(1000, stream_generator(0))
        index = batch["factors"][..., 0] * 8 + batch["factors"][..., 5]
        joints[part] = torch.bincount(index.flatten(), minlength=32).view(4, 8) / 2000
    for part in ("train", "val"):
        assert float((joints[part] - weights / weights.sum()).abs().max()) < 0.03
    assert float((joints["test"] - 1 / 32).abs().max()) < 0.02


def test_same_generator_gives_the_same_texts() -> None:
    first, second = (scenes(3, 20, noise=NoiseModel(0.3, 0.3, 0.3, 0.3, 0.3))[1] for _ in range(2))
    assert first["caption"] == second["caption"]
    assert first["spans"] == second["spans"]
    assert torch.equal(first["tokens"], second["tokens"])
    loader = CaptionedScenes(World(16)).loader(4, 3, seed=0)
    assert loader[2]["caption"] == list(loader)[2]["caption"]


def test_restricted_relations_are_the_only_ones_said() -> None:
    dataset = CaptionedScenes(World(16), 3, caption_level=3, relations=("left", "right"))
    relations = {statement.relation for statement in dataset.batch(200, stream_generator(0))["statements"]}
    assert {"left", "right"} <= relations <= {"left", "right", "and", None}


def test_to_folder_writes_pictures_and_metadata(tmp_path: Path) -> None:
    dataset = CaptionedScenes(World(16), (1, 3), caption_level=3, seed=2)
    dataset.to_folder(tmp_path / "set", 5)
    lines = [json.loads(line) for line in (tmp_path / "set" / "metadata.jsonl").read_text().splitlines()]
    assert [line["file_name"] for line in lines] == [f"images/{index:06d}.png" for index in range(5)]
    for index, line in enumerate(lines):
        example = dataset.example(index)
        assert line["text"] == example["caption"]
        assert line["caption_true"] is True
        pixels = np.array(Image.open(tmp_path / "set" / line["file_name"]))
        assert np.abs(pixels - example["image"].permute(1, 2, 0).numpy() * 255).max() <= 0.51
        assert len(line["objects"]) == int(example["present"].sum())
        for slot, thing in enumerate(line["objects"]):
            assert thing["shape"] == dataset.world.names("shape")[int(example["factors"][slot, 0])]
            assert thing["center"][0] == pytest.approx(float(dataset.world.values("x")[example["factors"][slot, 3]]))
            assert thing["box"] == pytest.approx(example["boxes"][slot].tolist())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["set"]
    with pytest.raises(DataError, match="already holds files"):
        dataset.to_folder(tmp_path / "set", 1)


def test_a_folder_that_cannot_be_finished_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = CaptionedScenes(World(16))
    whole = CaptionedScenes.example

    def breaks(self: CaptionedScenes, index: int) -> dict[str, Any]:
        if index == 2:
            raise RuntimeError("stopped")
        return whole(self, index)

    monkeypatch.setattr(CaptionedScenes, "example", breaks)
    with pytest.raises(RuntimeError, match="stopped"):
        dataset.to_folder(tmp_path / "set", 5)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"caption_level": 4}, "caption_level must be"),
        ({"relations": ("beside",)}, "relations must be out of"),
        ({"relations": ()}, "relations must be out of"),
        ({"n_objects": 7}, "slots must be at most 6"),
        ({"cooccurrence": torch.ones(3, 8)}, "must have shape"),
    ],
)
def test_bad_arguments_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CaptionedScenes(World(16), **arguments)


def test_other_bad_input_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="drop must lie"):
        NoiseModel(drop=1.5)
    with pytest.raises(ValueError, match="count must be at least 1"):
        CaptionedScenes(World(16)).to_folder(tmp_path / "set", 0)
    for text in ("", "red", "a red heart", "two red circles and a blue square", "red circle beside a blue square"):
        with pytest.raises(ValueError, match="caption of this grammar"):
            Grammar(World()).parse(text)
    assert len(RELATIONS) == 8

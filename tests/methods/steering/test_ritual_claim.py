"""The experiment: its world, what the arms share, that it gives the same numbers again; and POPE on a made-up folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from headgate.catalog import read_card
from headgate.errors import DataError
from headgate.methods.steering.ritual import claim, pope
from headgate.methods.steering.ritual.claim import SCALES, measure
from headgate.methods.steering.ritual.decodings import DECODINGS, decode_logits
from headgate.methods.steering.ritual.pope import PopeScale, answer_question, measure_pope, read_pope
from headgate.methods.steering.ritual.reader import Reader, train_reader
from headgate.methods.steering.ritual.worlds import OBJECTS, TURNS, ask, draw_scenes, noised, picture_world, turned
from headgate.train import seeded
from tests.methods.steering.ritual_models import TinyProcessor, llava

CARD = read_card(Path(claim.__file__).parent / "card.toml", claim.__package__ or "")


def stream(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def smoke(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HEADGATE_CACHE", str(tmp_path_factory.mktemp("models")))
        return {arm.name: measure(arm.name, 100, "smoke") for arm in CARD.claim.arms_at("smoke")}


def test_arms_and_scales_are_those_of_the_card() -> None:
    assert set(DECODINGS) == {arm.name for arm in CARD.claim.arms}
    assert set(SCALES) == set(CARD.claim.scales)
    assert {arm.name for arm in CARD.claim.arms_at("laptop")} == set(DECODINGS) - {"m3id"}
    with pytest.raises(ValueError, match=r"arm must be one of ritual, base, vcd, ritual_vcd, .* got 'm3id'"):
        measure("m3id", 0, "laptop")
    with pytest.raises(ValueError, match="scale must be one of smoke, laptop, paper, got 'huge'"):
        measure("base", 0, "huge")


def test_every_arm_gives_the_cards_metrics_and_the_same_numbers_again(smoke: dict[str, Any]) -> None:
    for arm, measurement in smoke.items():
        assert set(measurement.metrics) == set(CARD.claim.metrics) - {"accuracy_popular"}, arm
        assert all(0 <= value <= 1 for value in measurement.metrics.values()), arm
        both = (measurement.metrics["accuracy_random"] + measurement.metrics["accuracy_adversarial"]) / 2
        assert measurement.metrics["accuracy"] == pytest.approx(both)
    again = measure("ritual_vcd", 100, "smoke")
    assert again.metrics == smoke["ritual_vcd"].metrics
    assert measure("base", 101, "smoke").metrics != smoke["base"].metrics
    assert smoke["greedy"].metrics["accuracy"] == smoke["base"].metrics["most_likely"]
    assert smoke["sharpened"].metrics["most_likely"] == smoke["base"].metrics["most_likely"]
    assert smoke["normalised"].metrics["most_likely"] == smoke["ritual"].metrics["most_likely"]
    curve = smoke["ritual"].curves["weight of the second view"]
    assert curve.y[curve.x.index(3.0)] == pytest.approx(100 * smoke["ritual"].metrics["accuracy"])
    assert curve.y[0] == pytest.approx(100 * smoke["mask_only"].metrics["accuracy"])
    assert smoke["ritual"].pictures["views"].shape[2] == 3


def test_decodings_are_what_their_arms_say() -> None:
    names = ("original", "turned", "turned 2", "turned 3", "noised", "imageless")
    logits = {name: 0.3 * torch.randn(5, 2, generator=stream(place)) for place, name in enumerate(names)}
    plain, second, noise = logits["original"], logits["turned"], logits["noised"]
    expected = {
        "base": plain,
        "mask_only": plain,
        "transformed": second,
        "ritual": plain + 3 * second,
        "ritual_alpha1": plain + second,
        "normalised": (plain + 3 * second) / 4,
        "sharpened": 4 * plain,
        "cold": 4 * plain,
        "four_views": plain + second + logits["turned 2"] + logits["turned 3"],
        "vcd": 2 * plain - noise,
        "ritual_vcd": 2 * plain + 3 * second - noise,
        "m3id": plain,
        "greedy": 1e6 * plain,
    }
    assert set(expected) == set(DECODINGS)
    for arm, scores in expected.items():
        torch.testing.assert_close(decode_logits(DECODINGS[arm], logits), scores.softmax(dim=-1))
    far = {"original": torch.tensor([[0.0, 2.4]]), "turned": torch.tensor([[9.0, 0.0]])}
    assert decode_logits(DECODINGS["ritual"], far).tolist() == [[0.0, 1.0]]  # "no" is implausible to the original


def test_objects_keep_company_in_training_alone_and_pictures_show_them() -> None:
    train = draw_scenes(3000, 0.8, 0.2, stream(1))
    test = draw_scenes(3000, 0.0, 0.2, stream(2))
    for scenes, low, high in ((train, 0.6, 0.9), (test, 0.02, 0.15)):
        pairs = scenes.there.sum(dim=1) == 2
        kept = (scenes.there & scenes.there.roll(7, dims=1)).any(dim=1)[pairs].float().mean()
        assert low < float(kept) < high
        number = scenes.there.sum(dim=1)
        assert sorted(number.unique().tolist()) == [1, 2, 3]
        assert float(scenes.there.float().mean(dim=0).min()) > 0.05
    assert abs(float(test.images.mean())) < 0.5
    assert 0.5 < float(test.images.std()) < 1.5
    clean = draw_scenes(50, 0.0, 0.0, stream(3))
    assert picture_world(0.0).cards["shape"] * picture_world(0.0).cards["hue"] == OBJECTS
    colours = (clean.images * 0.25 + 0.4).flatten(2)  # 50, 3, pixels
    for row in range(50):
        strong = {int(hue) for hue in range(3) if bool((colours[row, hue] > colours[row].roll(1, 0)[hue] + 0.4).any())}
        hues = {thing % 3 for thing in clean.there[row].nonzero()[:, 0].tolist()}
        assert hues <= strong


def test_half_of_the_answers_are_yes_and_adversarial_questions_ask_about_missing_partners() -> None:
    scenes = draw_scenes(300, 0.0, 0.2, stream(1))
    for kind in ("random", "adversarial"):
        asked = ask(scenes, 400, kind, stream(2))
        assert float(asked.answer.float().mean()) == 0.5
        assert torch.equal(scenes.there[asked.scene, asked.thing], asked.answer)
        partner_there = scenes.there[asked.scene, (asked.thing - 7) % OBJECTS]
        share = float(partner_there[~asked.answer].float().mean())
        assert share == 1.0 if kind == "adversarial" else share < 0.3
    with pytest.raises(ValueError, match="random, adversarial, got 'popular'"):
        ask(scenes, 4, "popular", stream())


def test_every_picture_is_changed_once_and_its_changes_differ() -> None:
    images = draw_scenes(400, 0.0, 0.2, stream(1)).images
    views = [turned(images, 5, number) for number in range(len(TURNS))]
    assert torch.equal(views[0], turned(images, 5, 0))
    flips = {
        "horizontal flip": images.flip(-1),
        "vertical flip": images.flip(-2),
        "half turn": images.flip(-1, -2),
        "quarter turn": images.rot90(1, (-2, -1)),
        "three quarters": images.rot90(3, (-2, -1)),
    }
    for flipped in flips.values():
        same = torch.stack([(view == flipped).flatten(1).all(dim=1) for view in views])
        assert torch.equal(same.sum(dim=0), torch.ones(400, dtype=torch.int64))  # each change in exactly one view
        assert float(same[0].float().mean()) == pytest.approx(1 / 7, abs=0.06)
    centre = torch.stack([view.mean(dim=(1, 2, 3)) for view in views])
    assert float((centre - centre[0]).abs().max()) < 0.1
    assert not torch.equal(views[0], turned(images, 6, 0))
    noisy = noised(images, 5)
    assert torch.equal(noisy, noised(images, 5))
    assert 0.05 < float((noisy * images).mean() / (images * images).mean()) < 0.95


def test_the_reader_learns_to_look() -> None:
    scenes = draw_scenes(400, 0.8, 0.05, stream(1))
    with seeded(0):
        reader = Reader()
    asked = ask(scenes, 400, "random", stream(3))

    @torch.no_grad()
    def loss() -> float:
        logits = reader(scenes.images[asked.scene], asked.thing)
        return float(torch.nn.functional.cross_entropy(logits, asked.answer.long()))

    before = loss()
    train_reader(reader, scenes, steps=150, seed=0)
    assert loss() < 0.93 * before


def pope_folder(folder: Path) -> Path:
    (folder / "val2014").mkdir(parents=True)
    rows = []
    for place in range(3):
        Image.effect_noise((30, 20), 60 + 30 * place).convert("RGB").save(folder / "val2014" / f"{place}.png")
        rows.append({"image": f"{place}.png", "text": "is there a red circle", "label": ("yes", "no")[place % 2]})
    for kind in pope.POPE_KINDS:
        (folder / f"coco_pope_{kind}.json").write_text("\n".join(map(json.dumps, rows)) + "\n", encoding="utf-8")
    return folder


def test_pope_is_read_and_answered_with_every_decoding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = pope_folder(tmp_path / "pope")
    (tmp_path / "llava").mkdir()
    monkeypatch.setenv("HEADGATE_POPE", str(folder))
    monkeypatch.setenv("HEADGATE_LLAVA", str(tmp_path / "llava"))
    model, processor = llava(), TinyProcessor()
    monkeypatch.setattr(pope, "_load", lambda folder: (model, processor))
    scale = PopeScale(questions=2, max_new_tokens=3)
    state = torch.random.get_rng_state()
    for arm, decoding in DECODINGS.items():
        measured = measure_pope(decoding, 1, scale)
        assert {"accuracy", "accuracy_random", "accuracy_popular", "accuracy_adversarial", "f1", "yes_ratio"} == set(
            measured.metrics
        ), arm
        assert measured.notes["questions"] == 6
    assert torch.equal(torch.random.get_rng_state(), state)
    picture = Image.open(folder / "val2014" / "0.png").convert("RGB")

    def say(arm: str, seed: int) -> str:
        return answer_question(model, processor, picture, "what do you see", DECODINGS[arm], scale, seed, 0)

    assert say("ritual", 3) == say("ritual", 3)
    assert say("greedy", 3) == say("greedy", 4)
    assert len({say("ritual", seed) for seed in range(6)}) > 1


def test_pope_with_alpha_zero_is_the_mask_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model, processor = llava(), TinyProcessor()
    picture = Image.effect_noise((30, 20), 90).convert("RGB")
    scale, greedy = PopeScale(max_new_tokens=4), DECODINGS["greedy"]
    answers: list[Tensor] = []
    decode = processor.batch_decode
    monkeypatch.setattr(processor, "batch_decode", lambda ids, **o: (answers.append(ids), decode(ids, **o))[1])
    masked = claim.replace(greedy, mask=True)
    for decoding in (greedy, masked):
        answer_question(model, processor, picture, "what do you see", decoding, scale, 0, 0)
    assert torch.equal(*answers)


def test_bad_pope_folders_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "coco_pope_random.json"
    with pytest.raises(DataError, match="is missing"):
        read_pope(file)
    for text, match in (
        ("{}\n", "line 1: expected a JSON object"),
        ("nonsense", "line 1: expected a JSON object"),
        ('{"image": "a", "text": "b", "label": "yes"}\n{"image": "a", "text": "b", "label": "so"}', "line 2: label"),
        ("\n", "holds no question"),
    ):
        file.write_text(text, encoding="utf-8")
        with pytest.raises(DataError, match=match):
            read_pope(file)
    monkeypatch.delenv("HEADGATE_SHARED", raising=False)
    monkeypatch.delenv("HEADGATE_LLAVA", raising=False)
    with pytest.raises(DataError, match="HEADGATE_LLAVA"):
        measure("ritual", 0, "paper")
    monkeypatch.setenv("HEADGATE_LLAVA", str(tmp_path))
    with pytest.raises(DataError, match="does not hold an image-text model"):
        measure("ritual", 0, "paper")

"""Does a second, transformed look keep a model from naming what is not there, or does it only make it surer?

A small reader answers yes/no questions about pictures of objects that keep company in training (:mod:`.worlds`). Test
pictures have no company to go by, and half of the questions that deserve a "no" ask about the missing partner. All arms
decode the same trained reader, with the same questions and the same transformed pictures. The accuracy is that expected under
sampling at temperature 1, the mean probability of the right answer. Adding alpha times a second view's logits also multiplies
the logits' scale by about 1 + alpha, so two arms take that apart: ``sharpened`` adds the original's own logits in place of a
second view's, ``normalised`` divides by 1 + alpha.

At scale ``paper``, POPE on LLaVA-1.5 (:mod:`.pope`).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from functools import lru_cache

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from headgate.data.seeding import stream_generator
from headgate.measurement import Curve, Measurement
from headgate.methods.steering.ritual.decodings import DECODINGS, Decoding, decode_logits
from headgate.methods.steering.ritual.pope import PopeScale, measure_pope
from headgate.methods.steering.ritual.reader import Reader, train_reader
from headgate.methods.steering.ritual.worlds import KINDS, TURNS, Questions, Scenes, ask, draw_scenes, noised, turned
from headgate.train import base_model, seeded

_REVISION = 1


@dataclass(frozen=True)
class Scale:
    """How large the experiment with the small reader is.

    Attributes:
        steps: of training.
        train_scenes: pictures to train on.
        test_scenes: pictures to test on.
        questions: of each kind, at the test.
        learning_rate: of AdamW.
        batch_size: questions per step.
        company: how often an object's partner follows it in training.
        noise: standard deviation of the pixels' noise.
    """

    steps: int
    train_scenes: int
    test_scenes: int
    questions: int
    learning_rate: float = 2e-3
    batch_size: int = 64
    company: float = 0.8
    noise: float = 0.2


SCALES: dict[str, Scale | PopeScale] = {
    "smoke": Scale(steps=20, train_scenes=200, test_scenes=60, questions=80),
    "laptop": Scale(steps=900, train_scenes=6000, test_scenes=2500, questions=2500),
    "paper": PopeScale(),
}

_POPE_ONLY = ("m3id",)
_ALPHAS = (0.0, 0.5, 1.0, 2.0, 3.0, 5.0, 8.0)


def measure(arm: str, seed: int, scale: str) -> Measurement:
    """Decode with one arm and score the answers.

    Args:
        arm: one of :data:`~headgate.methods.steering.ritual.decodings.DECODINGS`.
        seed: decides the reader, the pictures, questions and transformations, alike for all arms.
        scale: one of :data:`SCALES`.

    Raises:
        ValueError: unknown arm or scale, or an arm that is not measured at this scale.
        DataError: the scale's data are missing.
    """
    if scale not in SCALES:
        raise ValueError(f"scale must be one of {', '.join(SCALES)}, got {scale!r}")
    settings = SCALES[scale]
    known = [name for name in DECODINGS if isinstance(settings, PopeScale) or name not in _POPE_ONLY]
    if arm not in known:
        raise ValueError(f"arm must be one of {', '.join(known)}, got {arm!r}")
    if isinstance(settings, PopeScale):
        return measure_pope(DECODINGS[arm], seed, settings)
    reader, seconds = _trained(settings, seed)
    test = _test(settings, seed)
    decoding = DECODINGS[arm]
    logits = [_logits(reader, test, questions, decoding, seed) for questions in test.questions]
    right = [_right(decoding, views, q.answer) for views, q in zip(logits, test.questions, strict=True)]
    best = [
        _right(replace(decoding, greedy=True), views, q.answer) for views, q in zip(logits, test.questions, strict=True)
    ]
    accuracy = dict(zip(KINDS, (float(one.mean()) for one in right), strict=True))
    return Measurement(
        metrics={
            "accuracy": sum(accuracy.values()) / len(accuracy),
            **{f"accuracy_{kind}": value for kind, value in accuracy.items()},
            "most_likely": sum(float(one.mean()) for one in best) / len(best),
            **_yes_scores(torch.cat(right), torch.cat([questions.answer for questions in test.questions])),
        },
        curves=_over_alpha(arm, logits, test.questions),
        pictures={"views": _picture(test.scenes, seed)} if arm == "ritual" else {},
        notes={"views": len(set(decoding.names)), "questions": len(KINDS) * settings.questions},
        base_seconds=seconds if arm == "ritual" else 0.0,
    )


@dataclass(frozen=True)
class _Test:
    scenes: Scenes
    questions: tuple[Questions, ...]


def _trained(settings: Scale, seed: int) -> tuple[Reader, float]:
    """The reader of one seed, trained once for all arms."""

    def build() -> Reader:
        with seeded(seed):
            return Reader()

    def train(model: Reader) -> None:
        generator = stream_generator(seed, "training scenes")
        scenes = draw_scenes(settings.train_scenes, settings.company, settings.noise, generator)
        train_reader(
            model,
            scenes,
            steps=settings.steps,
            learning_rate=settings.learning_rate,
            batch_size=settings.batch_size,
            seed=seed,
        )

    return base_model("ritual-reader", build, train, {"revision": _REVISION, "seed": seed, **asdict(settings)})


@lru_cache(maxsize=2)
def _test(settings: Scale, seed: int) -> _Test:
    """Pictures without company, and the questions about them."""
    scenes = draw_scenes(settings.test_scenes, 0.0, settings.noise, stream_generator(seed, "test scenes"))
    questions = [ask(scenes, settings.questions, kind, stream_generator(seed, f"{kind} questions")) for kind in KINDS]
    return _Test(scenes, tuple(questions))


@torch.no_grad()
def _logits(
    reader: Reader, test: _Test, questions: Questions, decoding: Decoding, seed: int
) -> dict[str, Float[Tensor, "count 2"]]:
    """The reader's logits for every view that a decoding looks at."""
    return {
        name: reader(_view(test.scenes.images, name, seed)[questions.scene], questions.thing)
        for name in dict.fromkeys(decoding.names)
    }


def _view(images: Tensor, name: str, seed: int) -> Tensor:
    if name == "original":
        return images
    if name == "noised":
        return noised(images, seed)
    return turned(images, seed, 0 if name == "turned" else int(name.removeprefix("turned ")) - 1)


def _right(decoding: Decoding, logits: dict[str, Tensor], answer: Bool[Tensor, " count"]) -> Float[Tensor, " count"]:
    """The probability of the right answer."""
    return decode_logits(decoding, logits).gather(1, answer.long()[:, None])[:, 0]


def _yes_scores(right: Float[Tensor, " count"], answer: Bool[Tensor, " count"]) -> dict[str, float]:
    """Expected F1 of "yes", and how often it is said."""
    yes = torch.where(answer, right, 1 - right)
    hits = float((yes * answer).sum())
    return {"f1": 2 * hits / float(yes.sum() + answer.sum()), "yes_ratio": float(yes.mean())}


def _over_alpha(arm: str, logits: list[dict[str, Tensor]], questions: tuple[Questions, ...]) -> dict[str, Curve]:
    """Expected accuracy as the weight of the second view (or of the original once more) grows."""
    if arm not in ("ritual", "sharpened", "normalised"):
        return {}
    decoding = DECODINGS[arm]
    (view,) = (name for name, _ in decoding.views)
    values = [
        np.mean(
            [
                float(_right(replace(decoding, views=((view, alpha),)), views, asked.answer).mean())
                for views, asked in zip(logits, questions, strict=True)
            ]
        )
        for alpha in _ALPHAS
    ]
    return {"weight of the second view": Curve(_ALPHAS, [100 * float(v) for v in values], "α", "expected accuracy (%)")}


def _picture(scenes: Scenes, seed: int) -> np.ndarray:
    """Four pictures: as they are, three times transformed, and noised."""
    rows = [scenes.images[:4]]
    rows += [turned(scenes.images, seed, number)[:4] for number in range(min(3, len(TURNS)))]
    rows.append(noised(scenes.images, seed)[:4])
    cells = torch.stack(rows, dim=1)  # picture, view
    shown = ((cells * 0.25 + 0.4).clamp(0, 1) * 255).round().to(torch.uint8)
    count, views, _, side, _ = shown.shape
    canvas = torch.full((3, count * (side + 2), views * (side + 2)), 255, dtype=torch.uint8)
    for row in range(count):
        for column in range(views):
            top, left = row * (side + 2) + 1, column * (side + 2) + 1
            canvas[:, top : top + side, left : left + side] = shown[row, column]
    return canvas.permute(1, 2, 0).repeat_interleave(3, 0).repeat_interleave(3, 1).numpy()

"""POPE with LLaVA-1.5, as the paper measures it: 500 pictures of COCO, six yes/no questions each, in three settings.

The folder ``$HEADGATE_POPE`` holds the published questions, ``coco_pope_random.json``, ``coco_pope_popular.json`` and
``coco_pope_adversarial.json`` (one JSON object with ``image``, ``text`` and ``label`` per line), and the pictures in
``val2014/``. The folder ``$HEADGATE_LLAVA`` holds the model and its processor as transformers saves them.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from headgate.data.folders import data_folder
from headgate.data.seeding import splitmix64, stream_generator
from headgate.errors import DataError, MissingExtraError
from headgate.measurement import Measurement
from headgate.methods.steering.ritual.decodings import Decoding
from headgate.methods.steering.ritual.generate import generate_with_views
from headgate.methods.steering.ritual.metrics import pope_scores
from headgate.methods.steering.ritual.noise import noise_image
from headgate.methods.steering.ritual.processor import View
from headgate.methods.steering.ritual.prompts import image_prompt, prepare_inputs, without_image
from headgate.methods.steering.ritual.transforms import TRANSFORMS
from headgate.train import seeded

__all__ = ["POPE_KINDS", "PopeQuestion", "PopeScale", "answer_question", "measure_pope", "read_pope"]

POPE_KINDS = ("random", "popular", "adversarial")


@dataclass(frozen=True)
class PopeScale:
    """How POPE is run.

    Attributes:
        questions: of each setting; None for all 3,000.
        max_new_tokens: of an answer.
        noise_step: of the view that VCD contrasts with.
    """

    questions: int | None = None
    max_new_tokens: int = 64
    noise_step: int = 500


@dataclass(frozen=True)
class PopeQuestion:
    """One line of a question file."""

    image: str
    text: str
    label: str


def read_pope(path: Path) -> list[PopeQuestion]:
    """Read a file of questions.

    Raises:
        DataError: the file is missing, or a line is no question with the label yes or no.
    """
    if not path.is_file():
        raise DataError(f"{path} is missing")
    questions = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            question = PopeQuestion(str(row["image"]), str(row["text"]), str(row["label"]).strip().lower())
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise DataError(f"{path}, line {number}: expected a JSON object with image, text and label") from error
        if question.label not in ("yes", "no"):
            raise DataError(f"{path}, line {number}: label must be yes or no, got {question.label!r}")
        questions.append(question)
    if not questions:
        raise DataError(f"{path} holds no question")
    return questions


def measure_pope(decoding: Decoding, seed: int, scale: PopeScale) -> Measurement:
    """Answer the questions of all three settings with one way of decoding.

    Raises:
        DataError: the model, the questions or the pictures are missing.
    """
    model, processor = _load(data_folder("llava"))
    folder = data_folder("pope")
    metrics: dict[str, float] = {}
    said: list[str] = []
    labels: list[str] = []
    for kind in POPE_KINDS:
        questions = read_pope(folder / f"coco_pope_{kind}.json")[: scale.questions]
        answers = [
            answer_question(model, processor, _picture(folder, question), question.text, decoding, scale, seed, number)
            for number, question in enumerate(questions)
        ]
        right = [question.label for question in questions]
        metrics[f"accuracy_{kind}"] = pope_scores(answers, right).accuracy
        said += answers
        labels += right
    scores = pope_scores(said, labels)
    metrics |= {"accuracy": scores.accuracy, "f1": scores.f1, "yes_ratio": scores.yes_ratio}
    return Measurement(metrics, notes={"questions": len(labels)})


def answer_question(
    model: Any,
    processor: Any,
    image: Any,
    question: str,
    decoding: Decoding,
    scale: PopeScale,
    seed: int,
    number: int,
) -> str:
    """Answer one question; the transformation, the noise and the sampling depend on seed and number alone.

    Args:
        model: an image-text model from transformers.
        processor: its processor.
        image: a PIL image.
        question: as the benchmark has it.
        decoding: how to decode.
        scale: of the run.
        seed: of the run.
        number: of the question.
    """
    prompt = image_prompt(processor, question)
    views = {name: _view(model, processor, image, prompt, name, scale, seed, number) for name in decoding.names}
    base = views[decoding.base]
    options = {
        "max_new_tokens": scale.max_new_tokens,
        "do_sample": not decoding.greedy,
        **({} if decoding.greedy else {"temperature": decoding.temperature, "top_p": 1.0, "top_k": 0}),
    }
    with seeded(splitmix64(seed, number) % 2**32):
        if decoding.views or decoding.mask:
            # The mask alone needs a view, too: the original once more, without weight.
            further = [View(views[name], weight) for name, weight in decoding.views] or [View(base, 0.0)]
            ids = generate_with_views(
                model, base, further, decoding.plausibility, normalize=decoding.normalize, **options
            )
        else:
            ids = model.generate(**base, **options)
    text: str = processor.batch_decode(ids[:, base["input_ids"].shape[1] :], skip_special_tokens=True)[0]
    return text


def _view(
    model: Any, processor: Any, image: Any, prompt: str, name: str, scale: PopeScale, seed: int, number: int
) -> dict[str, Any]:
    images: Sequence[Any] | None = [image]
    if name.startswith("turned"):
        # A question's transformations differ from one another, each is drawn evenly.
        order = torch.randperm(len(TRANSFORMS), generator=stream_generator(seed, "transformations", number)).tolist()
        place = 0 if name == "turned" else int(name.removeprefix("turned ")) - 1
        transform = TRANSFORMS[tuple(TRANSFORMS)[order[place]]]
        images = [transform(image, stream_generator(seed, name, number))]
    elif name == "imageless":
        images, (prompt,) = None, without_image(processor, [prompt])
    inputs = prepare_inputs(model, processor, images, [prompt])
    if name == "noised":
        inputs["pixel_values"] = noise_image(
            inputs["pixel_values"], scale.noise_step, stream_generator(seed, name, number)
        )
    return inputs


def _picture(folder: Path, question: PopeQuestion) -> Any:
    try:
        import PIL.Image
    except ImportError as error:
        raise MissingExtraError("pillow", "files", "reading POPE's pictures") from error
    path = folder / "val2014" / question.image
    try:
        with PIL.Image.open(path) as image:
            return image.convert("RGB")
    except OSError as error:
        raise DataError(f"{path} cannot be read as a picture") from error


@lru_cache(maxsize=1)
def _load(folder: Path) -> tuple[Any, Any]:
    try:
        import transformers
    except ImportError as error:
        raise MissingExtraError("transformers", "language", "POPE with LLaVA") from error
    try:
        processor = transformers.AutoProcessor.from_pretrained(folder, local_files_only=True)
        model: Any = transformers.AutoModelForImageTextToText.from_pretrained(
            folder, local_files_only=True, use_safetensors=True, dtype="auto"
        )
    except (OSError, ValueError) as error:
        raise DataError(f"{folder} does not hold an image-text model and its processor: {error}") from error
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval(), processor

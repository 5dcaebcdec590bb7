"""RITUAL from a picture and a question to an answer, with any model and processor from transformers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from headgate.errors import MissingExtraError
from headgate.methods.steering.ritual.fusion import WEIGHTS
from headgate.methods.steering.ritual.noise import noise_image
from headgate.methods.steering.ritual.processor import View, ViewFusionLogitsProcessor
from headgate.methods.steering.ritual.prompts import image_prompt, prepare_inputs, without_image
from headgate.methods.steering.ritual.transforms import TRANSFORMS, draw_transform

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["choose_transform", "generate_with_views", "parse_choice", "ritual_generate"]

Choice = str | Callable[[Any, torch.Generator], Any]
_COMBINED = ("vcd", "m3id")

_INSTRUCTION = """You judge which change of a picture helps to answer a question about it.
Question: {question}
Changes:
{changes}
Select the most positive one, the change that would help most to answer the question correctly. Answer with its name alone."""


def ritual_generate(
    model: nn.Module,
    processor: Callable[..., Any],
    image: Image | Sequence[Image],
    text: str | Sequence[str],
    transform: Choice | Sequence[Choice] = "random",
    *,
    alpha: float = 3.0,
    beta: float | None = 0.1,
    combine: Sequence[str] = (),
    normalize: bool = False,
    generator: torch.Generator | None = None,
    noise_step: int = 500,
    **generate_arguments: Any,
) -> Any:
    """Answer a prompt about a picture with the help of a transformed copy of it.

    Args:
        model: an image-text model from transformers.
        processor: its processor: ``processor(images=..., text=..., return_tensors="pt")``.
        image: one picture, or a list of one per text.
        text: one prompt, or a list, with the model's placeholder for the image. Prompts of different lengths are padded on
            the left, as ``generate`` needs it.
        transform: ``"random"`` (drawn anew for every picture and kept for its whole answer), a name out of
            :data:`TRANSFORMS`, a function ``(image, generator) -> image``, or a list of such, one per picture. RITUAL+ is the
            name that :func:`choose_transform` gives.
        alpha: weight of the transformed picture's logits.
        beta: tokens below this share of the best token's probability are left out.
        combine: further views: ``"vcd"`` (the picture drowned in noise, weight -1) and ``"m3id"`` (no picture at all).
        normalize: whether to divide by the sum of all weights.
        generator: a CPU generator for transformations and noise; default: one with seed 0. Sampling itself draws from
            PyTorch's global stream, as ``generate`` always does.
        noise_step: how far the noised picture is diffused, 0 to 999.
        **generate_arguments: for ``model.generate``, e.g. ``max_new_tokens``, ``do_sample``, ``num_beams``.

    Returns:
        What ``model.generate`` gives: token ids of prompts and answers, or its dictionary.

    Raises:
        MissingExtraError: transformers is not installed.
        ValueError: unknown names, or pictures, texts and transformations that differ in number.
    """
    pictures = list(image) if isinstance(image, Sequence) else [image]
    texts = [text] if isinstance(text, str) else list(text)
    single = isinstance(transform, str) or callable(transform)
    choices: list[Choice] = [transform] * len(pictures) if single else list(transform)  # type: ignore[list-item, arg-type]
    if not len(pictures) == len(texts) == len(choices):
        raise ValueError(
            "image, text and transform must be of one number, "
            f"got {len(pictures)} pictures, {len(texts)} texts and {len(choices)} transformations"
        )
    unknown = [name for name in combine if name not in _COMBINED]
    if unknown:
        raise ValueError(f"combine must be out of {', '.join(_COMBINED)}, got {tuple(combine)}")
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    changed = [
        _function(choice, generator)(picture, generator) for picture, choice in zip(pictures, choices, strict=True)
    ]

    inputs = prepare_inputs(model, processor, pictures, texts)
    views = [View(prepare_inputs(model, processor, changed, texts), alpha)]
    if "vcd" in combine:
        pixels = noise_image(inputs["pixel_values"], noise_step, generator)
        views.append(View({**inputs, "pixel_values": pixels}, WEIGHTS["vcd"]))
    if "m3id" in combine:
        views.append(View(prepare_inputs(model, processor, None, without_image(processor, texts)), WEIGHTS["m3id"]))
    return generate_with_views(model, inputs, views, beta, normalize=normalize, **generate_arguments)


def generate_with_views(
    model: nn.Module,
    inputs: Mapping[str, Any],
    views: Sequence[View],
    plausibility: float | None = 0.1,
    *,
    normalize: bool = False,
    **generate_arguments: Any,
) -> Any:
    """Call ``model.generate`` with :class:`ViewFusionLogitsProcessor` in front of every other processor.

    Args:
        model: the model.
        inputs: of the original view.
        views: the others.
        plausibility: as of :class:`ViewFusionLogitsProcessor`.
        normalize: as of :class:`ViewFusionLogitsProcessor`.
        **generate_arguments: for ``model.generate``. With ``num_beams`` above 1 ``renormalize_logits`` is set unless given.

    Raises:
        MissingExtraError: transformers is not installed.
        ValueError: assisted or custom generation was asked for.
    """
    kinds = _transformers()
    arguments = dict(generate_arguments)
    for name in ("assistant_model", "custom_generate"):
        if arguments.get(name) is not None:
            raise ValueError(f"{name} cannot be combined with views")
    streamer, synced = arguments.get("streamer"), bool(arguments.get("synced_gpus"))
    # generate makes this criterion itself, but not where the decoding loop is a function of ours.
    stop_strings, tokenizer = arguments.pop("stop_strings", None), arguments.pop("tokenizer", None)
    if stop_strings is not None:
        criterion = kinds.StopStringCriteria(tokenizer, stop_strings)
        arguments["stopping_criteria"] = [*arguments.get("stopping_criteria", ()), criterion]
    arguments["stopping_criteria"] = kinds.StoppingCriteriaList(arguments.get("stopping_criteria") or ())
    fusion = ViewFusionLogitsProcessor(model, views, plausibility, normalize=normalize)

    def decode(decoder: Any, input_ids: Tensor, logits_processor: Any, generation_config: Any, **state: Any) -> Any:
        others = [other for other in logits_processor if other is not fusion]
        if generation_config.num_beams > 1:
            if not any(isinstance(other, kinds.LogitNormalization) for other in others):
                others.append(kinds.LogitNormalization())
            loop, extra = decoder._beam_search, {}
        else:
            loop, extra = decoder._sample, {"streamer": streamer}
        first = kinds.LogitsProcessorList([fusion, *others])
        return loop(
            input_ids,
            logits_processor=first,
            generation_config=generation_config,
            synced_gpus=synced,
            **extra,
            **state,
        )

    given = [*(arguments.pop("logits_processor", None) or ()), fusion]
    return model.generate(  # type: ignore[operator]
        **inputs, **arguments, logits_processor=kinds.LogitsProcessorList(given), custom_generate=decode
    )


def choose_transform(
    model: nn.Module,
    processor: Any,
    image: Image,
    question: str,
    names: Sequence[str] | None = None,
    *,
    wrap: Callable[[str], str] | None = None,
    generator: torch.Generator | None = None,
    max_new_tokens: int = 16,
) -> str:
    """Ask the model itself which transformation would help to answer a question about a picture (RITUAL+).

    Args:
        model: the model.
        processor: its processor.
        image: the original picture.
        question: the bare question.
        names: transformations to choose from; default: all of :data:`TRANSFORMS`.
        wrap: makes a prompt with the image's placeholder out of the instruction; default: the processor's chat template,
            or the placeholder and the instruction where it has none.
        generator: a CPU generator for the choice where the answer names none; default: one with seed 0.
        max_new_tokens: of the answer, which is decoded greedily.

    Returns:
        A name.
    """
    chosen = tuple(TRANSFORMS if names is None else names)
    changes = "\n".join(f"{number}. {name.replace('_', ' ')}" for number, name in enumerate(chosen, start=1))
    instruction = _INSTRUCTION.format(question=question, changes=changes)
    prompt = image_prompt(processor, instruction) if wrap is None else wrap(instruction)
    inputs = prepare_inputs(model, processor, [image], [prompt])
    ids = model.generate(**inputs, do_sample=False, num_beams=1, max_new_tokens=max_new_tokens)  # type: ignore[operator]
    answer = processor.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)[0]
    return parse_choice(answer, chosen, torch.Generator().manual_seed(0) if generator is None else generator)


def parse_choice(answer: str, names: Sequence[str], generator: torch.Generator) -> str:
    """The name that an answer mentions first, or a random one where it mentions none.

    Args:
        answer: of the model; case, underscores and hyphens do not matter.
        names: of transformations.
        generator: a CPU generator.

    Raises:
        ValueError: a name is unknown, or there is none.
    """
    fallback = draw_transform(generator, names)
    said = answer.lower().replace("_", " ").replace("-", " ")
    found = [(said.find(name.replace("_", " ")), name) for name in names]
    mentioned = [(place, name) for place, name in found if place >= 0]
    return min(mentioned)[1] if mentioned else fallback


def _function(choice: Choice, generator: torch.Generator) -> Callable[[Any, torch.Generator], Any]:
    if not isinstance(choice, str):
        return choice
    if choice == "random":
        return TRANSFORMS[draw_transform(generator)]
    if choice not in TRANSFORMS:
        raise ValueError(f"transform must be 'random' or one of {', '.join(TRANSFORMS)}, got {choice!r}")
    return TRANSFORMS[choice]


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise MissingExtraError("transformers", "language", "generating with views") from error
    return transformers

"""Generation over several views: step by step the same as running every view on the whole sequence, without a cache."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from PIL import Image
from torch import Tensor

from headgate.methods.steering.ritual import (
    View,
    ViewFusionLogitsProcessor,
    choose_transform,
    fuse_logits,
    generate_with_views,
    m3id_weight,
    noise_image,
    parse_choice,
    ritual_generate,
    view_weights,
)
from tests.methods.steering.ritual_models import (
    MODELS,
    PAD,
    TinyProcessor,
    llava,
    llava_inputs,
    without_image,
)


def plain_logits(model: Any, inputs: dict[str, Tensor], answer: Tensor) -> Tensor:
    """The last logits after a prompt and an answer, by one forward of ``generate`` on all of it."""
    more = answer.shape[1]
    longer = {
        **inputs,
        "input_ids": torch.cat([inputs["input_ids"], answer], dim=1),
        "attention_mask": torch.cat([inputs["attention_mask"], torch.ones_like(answer)], dim=1),
    }
    if "mm_token_type_ids" in inputs:
        types = inputs["mm_token_type_ids"]
        longer["mm_token_type_ids"] = torch.cat([types, types.new_zeros(len(types), more)], dim=1)
    out = model.generate(**longer, max_new_tokens=1, do_sample=False, output_logits=True, return_dict_in_generate=True)
    return out.logits[0]


def reference(
    model: Any, inputs: dict[str, Tensor], views: list[View], steps: int, beta: float = 0.1
) -> tuple[Tensor, list[Tensor]]:
    """Greedy decoding of one example after another, by the definition."""
    answers, scores = [], []
    for row in range(len(inputs["input_ids"])):
        alone = _row(inputs, row)
        others = [_row(dict(view.inputs), row) for view in views]
        answer, own = torch.empty(1, 0, dtype=torch.int64), []
        for step in range(steps):
            weights = view_weights([view.resolved() for view in views], step)
            base = plain_logits(model, alone, answer)
            z = fuse_logits(base, [plain_logits(model, other, answer) for other in others], weights, beta)
            own.append(z)
            answer = torch.cat([answer, z.argmax(dim=1, keepdim=True)], dim=1)
        answers.append(answer)
        scores.append(torch.stack(own, dim=1))
    return torch.cat(answers), list(torch.cat(scores).unbind(dim=1))


def _row(inputs: dict[str, Tensor], row: int) -> dict[str, Tensor]:
    alone = {}
    for name, value in inputs.items():
        share = len(value) // len(inputs["input_ids"])
        alone[name] = value[row * share : (row + 1) * share]
    keep = alone["attention_mask"][0].bool()
    return {name: value[:, keep] if value.shape == keep[None].shape else value for name, value in alone.items()}


def _views(make: Any, padded: bool = False) -> tuple[dict[str, Tensor], list[View]]:
    inputs, changed = make(1, padded=padded), make(2, padded=padded)
    noised = {**inputs, "pixel_values": noise_image(inputs["pixel_values"], 500, torch.Generator().manual_seed(3))}
    return inputs, [View(changed, 3.0), View(noised, "vcd"), View(without_image(inputs), m3id_weight(0.1))]


@pytest.mark.parametrize("padded", [False, True], ids=["even", "padded"])
@pytest.mark.parametrize("name", sorted(MODELS))
def test_greedy_decoding_of_a_batch_follows_the_definition_with_all_views_combined(name: str, padded: bool) -> None:
    build, make = MODELS[name]
    model = build()
    inputs, views = _views(make, padded)
    expected, scores = reference(model, inputs, views, steps=6)
    fusion = ViewFusionLogitsProcessor(model, views)
    for _ in range(2):  # the second time the processor begins again by itself
        out = model.generate(
            **inputs, max_new_tokens=6, min_new_tokens=None, do_sample=False, logits_processor=[fusion],
            output_scores=True, return_dict_in_generate=True, eos_token_id=None,
        )  # fmt: skip
        assert torch.equal(out.sequences[:, 10:], expected)
        for ours, theirs in zip(out.scores, scores, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("name", sorted(MODELS))
def test_only_new_tokens_are_run_and_views_of_equal_prompts_share_a_batch(name: str) -> None:
    build, make = MODELS[name]
    model = build()
    inputs, views = _views(make)
    sizes: list[tuple[int, ...]] = []
    model.register_forward_pre_hook(
        lambda module, positional, named: sizes.append(tuple(named["input_ids"].shape)), with_kwargs=True
    )
    model.generate(
        **inputs, max_new_tokens=3, do_sample=False, logits_processor=[ViewFusionLogitsProcessor(model, views)],
        eos_token_id=None,
    )  # fmt: skip
    prompts, steps = [(2, 10), (4, 10), (2, 6)], [(2, 1), (4, 1), (2, 1)]
    assert sizes == prompts + steps + steps


def test_the_positions_that_qwen2_vl_remembers_are_those_of_the_original_view() -> None:
    build, make = MODELS["qwen2_vl"]
    model = build()
    inputs, views = _views(make)
    model.generate(**inputs, max_new_tokens=2, do_sample=False)
    expected = model.model.rope_deltas.clone()
    generate_with_views(model, inputs, views, max_new_tokens=2, do_sample=False)
    assert torch.equal(model.model.rope_deltas, expected)


@pytest.mark.parametrize("name", sorted(MODELS))
def test_beams_are_those_of_a_search_that_runs_every_view_anew_at_every_step(name: str) -> None:
    build, make = MODELS[name]
    model = build()
    inputs, views = _views(make)

    class Anew(transformers.LogitsProcessor):
        """The definition, without any memory."""

        def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
            rows = []
            for row in range(len(input_ids)):
                answer = input_ids[row : row + 1, 10:]
                others = [plain_logits(model, _row(dict(view.inputs), row // 3), answer) for view in views]
                weights = view_weights([view.resolved() for view in views], answer.shape[1])
                rows.append(fuse_logits(scores[row : row + 1], others, weights).log_softmax(dim=-1))
            return torch.cat(rows)

    options: dict[str, Any] = {"num_beams": 3, "max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    expected = model.generate(**inputs, **options, logits_processor=[Anew()])
    by_hand = model.generate(
        **inputs, **options, logits_processor=[ViewFusionLogitsProcessor(model, views)], renormalize_logits=True
    )
    assert torch.equal(by_hand, expected)
    assert torch.equal(generate_with_views(model, inputs, views, **options), expected)


def test_cached_branches_give_the_same_after_beams_change_places_and_after_answers_that_break_off() -> None:
    model = llava()
    inputs, views = _views(llava_inputs)
    fusion, prompt = ViewFusionLogitsProcessor(model, views), inputs["input_ids"].repeat_interleave(2, dim=0)
    base = torch.randn(4, 96, generator=torch.Generator().manual_seed(0))
    first = torch.tensor([[11], [12], [13], [14]])
    swapped = torch.tensor([[12, 21], [11, 22], [14, 23], [14, 24]])  # the first two changed places, one was doubled
    unknown = torch.tensor([[31, 1], [32, 2], [33, 3], [34, 4]])
    for answer in (first[:, :0], first, swapped, unknown, first):
        ids = torch.cat([prompt, answer], dim=1)
        fresh = ViewFusionLogitsProcessor(model, views)
        fresh(prompt, base)
        torch.testing.assert_close(fusion(ids, base), fresh(ids, base), rtol=1e-4, atol=1e-3)


def test_sampling_draws_what_the_fused_scores_say_and_returns_several_sequences() -> None:
    model = llava()
    inputs, views = _views(llava_inputs)
    torch.manual_seed(5)
    ids = generate_with_views(
        model, inputs, views, max_new_tokens=4, do_sample=True, num_return_sequences=3, eos_token_id=None
    )
    assert ids.shape == (6, 14)
    torch.manual_seed(5)
    expected = torch.empty(6, 0, dtype=torch.int64)
    for step in range(4):
        rows = []
        for row in range(6):
            answer = expected[row : row + 1]
            alone = _row(inputs, row // 3)
            others = [plain_logits(model, _row(dict(view.inputs), row // 3), answer) for view in views]
            weights = view_weights([view.resolved() for view in views], step)
            rows.append(fuse_logits(plain_logits(model, alone, answer), others, weights))
        drawn = torch.multinomial(torch.cat(rows).softmax(dim=-1), 1)
        expected = torch.cat([expected, drawn], dim=1)
    assert torch.equal(ids[:, 10:], expected)


def test_the_fusion_comes_before_the_processors_that_generate_makes() -> None:
    model = llava()
    inputs, views = _views(llava_inputs)
    seen: list[Tensor] = []

    def spy(input_ids: Tensor, scores: Tensor) -> Tensor:
        seen.append(scores.clone())
        return scores

    generate_with_views(
        model, inputs, views, max_new_tokens=1, do_sample=False, repetition_penalty=5.0, logits_processor=[spy]
    )
    _, scores = reference(model, inputs, views, steps=1)
    penalty = transformers.RepetitionPenaltyLogitsProcessor(5.0)
    torch.testing.assert_close(seen[0], penalty(inputs["input_ids"], scores[0]), rtol=1e-4, atol=1e-3)


def test_finished_answers_are_padded_and_stop_strings_and_streamers_work() -> None:
    model = llava()
    inputs, views = _views(llava_inputs)
    expected, _ = reference(model, inputs, views, steps=5)
    stop = int(expected[0, 0])
    assert stop not in expected[1]
    ids = generate_with_views(model, inputs, views, max_new_tokens=5, do_sample=False, eos_token_id=stop)
    assert ids[0, 10:].tolist() == [stop, PAD, PAD, PAD, PAD]
    assert ids[1, 10:].tolist() == expected[1].tolist()

    class Streamer:
        def __init__(self) -> None:
            self.tokens: list[int] = []

        def put(self, value: Tensor) -> None:
            self.tokens += value.flatten().tolist()

        def end(self) -> None:
            self.tokens.append(-1)

    streamer, one = Streamer(), {name: value[:1] for name, value in inputs.items()}
    alone = [View(_row(dict(view.inputs), 0), view.weight) for view in views]
    ids = generate_with_views(
        model, one, alone, max_new_tokens=3, do_sample=False, streamer=streamer, eos_token_id=None
    )
    assert streamer.tokens == [*ids[0].tolist(), -1]

    processor = TinyProcessor()
    word = processor.tokenizer.convert_ids_to_tokens(4)
    ids = generate_with_views(
        model, one, alone, 1e-30, max_new_tokens=6, do_sample=False, eos_token_id=None,
        stop_strings=[word], tokenizer=processor.tokenizer, forced_eos_token_id=None, suppress_tokens=_all_but(4),
    )  # fmt: skip
    assert ids[0, 10:].tolist() == [4]


def _all_but(token: int) -> list[int]:
    return [other for other in range(96) if other != token]


def test_a_view_without_weight_changes_nothing_but_the_mask() -> None:
    model = llava()
    inputs = llava_inputs(1)
    plain = model.generate(**inputs, max_new_tokens=5, do_sample=False, eos_token_id=None)
    none = generate_with_views(
        model, inputs, [View(llava_inputs(2), 0.0)], max_new_tokens=5, do_sample=False, eos_token_id=None
    )
    assert torch.equal(plain, none)
    changed = generate_with_views(
        model, inputs, [View(llava_inputs(2), 50.0)], 1e-9, max_new_tokens=5, do_sample=False, eos_token_id=None
    )
    other = model.generate(**llava_inputs(2), max_new_tokens=5, do_sample=False, eos_token_id=None)
    assert not torch.equal(plain, changed)
    assert torch.equal(other, changed)


def test_ritual_generate_transforms_the_raw_picture_once_and_combines_views() -> None:
    model, processor = llava(), TinyProcessor()
    picture = Image.effect_noise((40, 30), 90).convert("RGB")
    text = "<image> is there a red circle"
    ids = ritual_generate(
        model, processor, picture, text, "horizontal_flip", combine=("vcd", "m3id"),
        generator=torch.Generator().manual_seed(1), max_new_tokens=4, do_sample=False, eos_token_id=None,
    )  # fmt: skip
    flipped = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    assert [image.tobytes() for image in processor.seen] == [flipped.tobytes(), picture.tobytes()] or [
        image.tobytes() for image in processor.seen
    ] == [picture.tobytes(), flipped.tobytes()]
    inputs = processor([picture], [text], return_tensors="pt")
    pixels = noise_image(inputs["pixel_values"], 500, torch.Generator().manual_seed(1))
    views = [
        View(processor([flipped], [text], return_tensors="pt"), 3.0),
        View({**inputs, "pixel_values": pixels}, -1.0),
        View(processor(None, ["is there a red circle"], return_tensors="pt"), m3id_weight()),
    ]
    expected, _ = reference(model, inputs, views, steps=4)
    assert torch.equal(ids[:, inputs["input_ids"].shape[1] :], expected)


def test_ritual_generate_pads_a_batch_and_draws_a_transformation_for_every_picture() -> None:
    model, processor = llava(), TinyProcessor()
    pictures = [Image.effect_noise((32, 32), 60 + 20 * place).convert("RGB") for place in range(2)]
    texts = ["<image> is there a red circle", "<image> what do you see"]
    seen: list[bytes] = []

    def half(image: Image.Image, generator: torch.Generator) -> Image.Image:
        seen.append(image.tobytes())
        return image.rotate(180)

    together = ritual_generate(
        model, processor, pictures, texts, half, max_new_tokens=4, do_sample=False, eos_token_id=None
    )
    assert seen == [picture.tobytes() for picture in pictures]
    for row in range(2):
        alone = ritual_generate(
            model, processor, pictures[row], texts[row], half, max_new_tokens=4, do_sample=False, eos_token_id=None
        )
        assert alone[0, -4:].tolist() == together[row, -4:].tolist()
    first, again = (
        ritual_generate(
            model, processor, pictures, texts, generator=torch.Generator().manual_seed(9), max_new_tokens=4,
            do_sample=False,
        )
        for _ in range(2)
    )  # fmt: skip
    assert torch.equal(first, again)


def test_the_model_is_asked_for_a_transformation_and_its_answer_is_read() -> None:
    generator = torch.Generator().manual_seed(0)
    names = ("horizontal_flip", "crop", "rotation")
    assert parse_choice("2. Crop, then Rotation", names, generator) == "crop"
    assert parse_choice("Horizontal-Flip or crop", names, generator) == "horizontal_flip"
    assert {parse_choice("none of them", names, generator) for _ in range(30)} == set(names)
    model, processor = llava(), TinyProcessor()
    asked: list[str] = []

    def wrap(instruction: str) -> str:
        asked.append(instruction)
        return f"<image> {instruction}"

    def say(ids: Tensor, **options: Any) -> list[str]:
        assert ids.shape[1] <= 16
        return ["The rotation."]

    processor.batch_decode = say  # type: ignore[method-assign]
    picture = Image.effect_noise((16, 16), 90).convert("RGB")
    assert choose_transform(model, processor, picture, "Is there a cat?", names, wrap=wrap) == "rotation"
    assert "Is there a cat?" in asked[0]
    assert "1. horizontal flip\n2. crop\n3. rotation" in asked[0]


def test_bad_input_is_refused() -> None:
    model, inputs = llava(), llava_inputs(1)
    base = torch.zeros(2, 96)
    with pytest.raises(ValueError, match="input_ids of shape"):
        View({"pixel_values": torch.zeros(1, 3, 4, 4)}, 1.0)
    with pytest.raises(ValueError, match="one of ritual, vcd, m3id, got 'dola'"):
        View(inputs, "dola")
    with pytest.raises(ValueError, match="finite"):
        View(inputs, float("nan"))
    with pytest.raises(TypeError, match="generate"):
        ViewFusionLogitsProcessor(torch.nn.Linear(2, 2), [View(inputs)])
    with pytest.raises(TypeError, match="one View or more"):
        ViewFusionLogitsProcessor(model, [])
    with pytest.raises(ValueError, match="batches of one size, got 1, 2"):
        ViewFusionLogitsProcessor(model, [View(inputs), View(llava_inputs(1, batch=1))])
    with pytest.raises(ValueError, match=r"\(0, 1\], got 0"):
        ViewFusionLogitsProcessor(model, [View(inputs)], plausibility=0.0)
    with pytest.raises(ValueError, match="weight is negative"):
        ViewFusionLogitsProcessor(model, [View(inputs, "vcd")], plausibility=None)
    fusion = ViewFusionLogitsProcessor(model, [View(inputs)])
    with pytest.raises(ValueError, match="divides the model's, got 2 for 1"):
        fusion(inputs["input_ids"][:1], base[:1])
    fusion(inputs["input_ids"], base)
    with pytest.raises(ValueError, match="make a new processor"):
        fusion(inputs["input_ids"] + 1, base)
    with pytest.raises(ValueError, match="views"):
        ViewFusionLogitsProcessor(model, [View(inputs)])(inputs["input_ids"], torch.zeros(2, 95))
    with pytest.raises(ValueError, match="assistant_model cannot"):
        generate_with_views(model, inputs, [View(inputs)], assistant_model=model)
    picture = Image.effect_noise((16, 16), 90).convert("RGB")
    with pytest.raises(ValueError, match="of one number, got 1 pictures, 2 texts"):
        ritual_generate(model, TinyProcessor(), picture, ["a", "b"])
    with pytest.raises(ValueError, match="combine must be out of vcd, m3id"):
        ritual_generate(model, TinyProcessor(), picture, "<image> a", combine=("dola",))
    with pytest.raises(ValueError, match="transform must be 'random' or one of"):
        ritual_generate(model, TinyProcessor(), picture, "<image> a", "mirror")

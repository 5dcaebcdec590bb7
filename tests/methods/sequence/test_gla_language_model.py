"""The language model for transformers: loss, generation in constant memory, saving, tying, sizes of the presets."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor, nn
from transformers import DynamicCache

import headgate as hg
from headgate import GLACache, GLAConfig, GLAForCausalLM

MASK = torch.tensor([[0, 0, 0, 1, 1, 1, 1], [1] * 7, [0, 1, 1, 1, 1, 1, 1]])
GREEDY: dict[str, Any] = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}


def build(seed: int = 0, **config: Any) -> GLAForCausalLM:
    """A small model in evaluation mode, with weights large enough for every token to matter."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_heads": 2, "intermediate_size": 24, "vocab_size": 29}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = GLAForCausalLM(GLAConfig(**{**sizes, **config})).eval()
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.3)
    return model


def ids(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(1, 29, shape, generator=torch.Generator().manual_seed(seed))


def test_the_loss_scores_each_next_token_that_is_asked_for():
    model, tokens = build(), ids(2, 7)
    labels = tokens.clone()
    labels[0, :3] = -100
    output = model(tokens, labels=labels)
    scored = [(row, t) for row in range(2) for t in range(1, 7) if labels[row, t] != -100]
    chosen = torch.stack([output.logits[row, t - 1].log_softmax(-1)[tokens[row, t]] for row, t in scored])
    torch.testing.assert_close(output.loss, -chosen.mean())
    doubled = model(tokens, labels=labels, num_items_in_batch=2 * len(scored)).loss
    torch.testing.assert_close(doubled, output.loss / 2)


def test_generation_picks_the_likeliest_token_again_and_again():
    model, tokens = build(), ids(1, 5)
    expected = tokens
    for _ in range(6):
        expected = torch.cat([expected, model(expected).logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(model.generate(tokens, max_new_tokens=6, **GREEDY), expected)


@pytest.mark.parametrize("config", [{}, {"use_short_conv": True}, {"variant": "first_release"}, {"num_kv_heads": 1}])
def test_left_padded_prompts_go_on_as_each_would_alone(config: dict[str, Any]):
    model, tokens = build(**config), ids(3, 7)
    together = model.generate(tokens, attention_mask=MASK, max_new_tokens=6, **GREEDY)
    for row in range(3):
        alone = model.generate(tokens[row : row + 1, MASK[row].bool()], max_new_tokens=6, **GREEDY)
        assert torch.equal(together[row, -6:], alone[0, -6:])


@pytest.mark.parametrize(
    "options",
    [{}, {"num_beams": 3}, {"num_beams": 4, "num_return_sequences": 2}, {"do_sample": True, "num_return_sequences": 2}],
    ids=["greedy", "beams", "two beams", "samples"],
)
def test_the_cache_changes_no_generated_token(options: dict[str, Any]):
    model, tokens = build(use_short_conv=True), ids(3, 7)
    ways = []
    for way in ({}, {"use_cache": False}, {"prefill_chunk_size": 2}):
        torch.manual_seed(0)
        generated = model.generate(tokens, attention_mask=MASK, max_new_tokens=6, **{**GREEDY, **options}, **way)
        ways.append(generated)
    assert ways[0].shape == (3 * options.get("num_return_sequences", 1), 13)
    assert torch.equal(ways[0], ways[1])
    assert torch.equal(ways[0], ways[2])


def test_generation_hands_each_token_to_the_model_once():
    model, tokens = build(), ids(2, 7)
    lengths: list[int] = []
    model.model.layers[0].register_forward_pre_hook(lambda block, inputs: lengths.append(inputs[0].shape[1]))
    model.generate(tokens, max_new_tokens=5, **GREEDY)
    assert lengths == [7, 1, 1, 1, 1]


def test_a_conversation_goes_on_from_its_cache():
    model, tokens = build(), ids(3, 7)
    whole = model.generate(tokens, attention_mask=MASK, max_new_tokens=6, **GREEDY)
    first = model.generate(tokens, attention_mask=MASK, max_new_tokens=2, return_dict_in_generate=True, **GREEDY)
    assert isinstance(first.cache, GLACache)
    assert first.cache.get_seq_length() == 8
    mask = F.pad(MASK, (0, 2), value=1)
    branch = first.cache.select(torch.arange(3))
    # The text so far is handed in as a whole, or what the cache has not seen of it with the mask of the whole.
    second = model.generate(first.sequences, attention_mask=mask, cache=first.cache, max_new_tokens=4, **GREEDY)
    assert torch.equal(second, whole)
    third = model.generate(first.sequences[:, 8:], attention_mask=mask, cache=branch, max_new_tokens=4, **GREEDY)
    assert torch.equal(third[:, -4:], whole[:, -4:])


def test_a_call_goes_on_from_the_cache_that_the_call_before_returned():
    model, tokens = build(), ids(3, 9)
    mask = F.pad(MASK, (0, 2), value=1)
    expected = model(tokens, attention_mask=mask).logits
    with torch.no_grad():
        first = model(tokens[:, :7], attention_mask=MASK, use_cache=True)
        second = model(tokens[:, 7:8], attention_mask=mask[:, :8], past_key_values=first.cache)
        third = model(tokens[:, 8:], attention_mask=mask, cache=second.cache)
    torch.testing.assert_close(torch.cat([first.logits, second.logits, third.logits], dim=1), expected)
    assert third.cache is first.cache


def test_a_cache_comes_back_in_evaluation_only_unless_asked_for():
    model, tokens = build(), ids(1, 4)
    assert isinstance(model(tokens).cache, GLACache)
    assert model(tokens, use_cache=False).cache is None
    assert model.train()(tokens).cache is None
    assert isinstance(model(tokens, use_cache=True).cache, GLACache)
    assert build(use_cache=False)(tokens).cache is None


def test_truncated_backpropagation_trains_on_a_long_text_in_segments():
    model, text = build().train(), ids(2, 12)
    whole = model(text).logits
    cache = GLACache()
    for segment, expected in zip(text.split(4, dim=1), whole.split(4, dim=1), strict=True):
        output = model(segment, labels=segment, cache=cache)
        torch.testing.assert_close(output.logits, expected)
        output.loss.backward()
        cache.detach()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_hidden_states_run_from_the_embedding_to_the_last_norm():
    model, tokens = build(), ids(2, 5)
    output = model(tokens, output_hidden_states=True)
    assert len(output.hidden_states) == 3
    torch.testing.assert_close(output.hidden_states[0], model.model.embeddings(tokens))
    torch.testing.assert_close(output.hidden_states[1], model.model.layers[0](model.model.embeddings(tokens)))
    torch.testing.assert_close(model.lm_head(output.hidden_states[2]), output.logits)
    assert model(tokens).hidden_states is None


def test_logits_to_keep_scores_the_last_tokens_or_the_named_ones():
    model, tokens = build(), ids(2, 5)
    logits = model(tokens).logits
    torch.testing.assert_close(model(tokens, logits_to_keep=2).logits, logits[:, 3:])
    torch.testing.assert_close(model(tokens, logits_to_keep=torch.tensor([0, 4])).logits, logits[:, [0, 4]])


def test_embedded_tokens_give_what_their_ids_give():
    model, tokens = build(), ids(2, 5)
    embedded = model.get_input_embeddings()(tokens)
    assert torch.equal(model(inputs_embeds=embedded).logits, model(tokens).logits)
    generated = model.generate(inputs_embeds=embedded, max_new_tokens=4, **GREEDY)
    assert torch.equal(generated, model.generate(tokens, max_new_tokens=4, **GREEDY)[:, 5:])


def test_a_tuple_comes_back_where_no_dictionary_is_wanted():
    model, tokens = build(), ids(1, 4)
    loss, logits = model(tokens, labels=tokens, use_cache=False, return_dict=False)
    torch.testing.assert_close(loss, model(tokens, labels=tokens).loss)
    assert torch.equal(logits, model(tokens).logits)


def test_packed_texts_do_not_see_each_other():
    model, tokens = build(), ids(1, 9)
    packed = model(tokens, cu_seqlens=torch.tensor([0, 4, 9])).logits
    torch.testing.assert_close(packed, torch.cat([model(tokens[:, :4]).logits, model(tokens[:, 4:]).logits], dim=1))


@pytest.mark.parametrize("tied", [False, True])
def test_saving_and_loading_gives_the_same_model(tied: bool, tmp_path: Path):
    model = build(tie_word_embeddings=tied, use_short_conv=True, variant="first_release", clamp_min=-0.3)
    model.save_pretrained(tmp_path)
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".safetensors"}
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        assert ("lm_head.weight" in file.keys()) == (not tied)  # noqa: SIM118 (no mapping)
    loaded = GLAForCausalLM.from_pretrained(tmp_path)
    assert not loaded.training
    tokens = ids(2, 6)
    assert torch.equal(loaded(tokens).logits, model(tokens).logits)
    assert (loaded.lm_head.weight is loaded.model.embeddings.weight) == tied
    kept, given = loaded.config.to_dict(), model.config.to_dict()
    added = {"_name_or_path", "architectures", "dtype", "transformers_version"}
    assert {name: kept[name] for name in set(kept) - added} == {name: given[name] for name in set(given) - added}


def test_it_loads_in_another_dtype(tmp_path: Path):
    model = build()
    model.save_pretrained(tmp_path)
    half = GLAForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
    tokens = ids(2, 30)
    logits, expected = half(tokens).logits, model(tokens).logits
    assert logits.dtype == torch.bfloat16
    assert (logits.float() - expected).square().mean().sqrt() < 0.05 * expected.square().mean().sqrt()
    assert half.generate(tokens, max_new_tokens=3, **GREEDY).shape == (2, 33)


@pytest.mark.parametrize("tied", [False, True])
def test_the_vocabulary_can_grow(tied: bool):
    model, tokens = build(tie_word_embeddings=tied), ids(1, 4)
    before = model(tokens).logits
    model.resize_token_embeddings(33)
    after = model(torch.cat([tokens, torch.tensor([[32]])], dim=1))
    assert model.config.vocab_size == 33
    assert (model.lm_head.weight is model.model.embeddings.weight) == tied
    torch.testing.assert_close(after.logits[:, :4, :29], before)
    assert model(tokens, labels=torch.full((1, 4), 32)).loss.isfinite()


@pytest.mark.parametrize("every", [1, 2])
def test_gradient_checkpointing_leaves_gradients_as_they_are(every: int):
    model, tokens = build().train(), ids(3, 7)

    def gradients() -> list[Tensor]:
        model.zero_grad()
        model(tokens, attention_mask=MASK, labels=tokens.masked_fill(MASK == 0, -100)).loss.backward()
        return [parameter.grad.clone() for parameter in model.parameters()]

    expected = gradients()
    model.activation_checkpointing_enable(every_n_layers=every)
    assert [block.gradient_checkpointing for block in model.model.layers] == [True, every == 1]
    torch.testing.assert_close(gradients(), expected)
    model.activation_checkpointing_disable()
    assert not any(block.gradient_checkpointing for block in model.model.layers)


def test_weights_start_with_the_spread_of_the_configuration():
    torch.manual_seed(0)
    model = GLAForCausalLM(GLAConfig(hidden_size=64, num_hidden_layers=1, vocab_size=99, initializer_range=0.1))
    block = model.model.layers[0]
    for weight in (
        model.lm_head.weight,
        model.model.embeddings.weight,
        block.attn.q_proj.weight,
        block.mlp.up_proj.weight,
    ):
        assert weight.std().item() == pytest.approx(0.1, rel=0.05)
    assert (block.attn.log_gate.up.bias == 0).all()
    assert (block.attn.norm.weight == 1).all()
    first = GLAForCausalLM(GLAConfig(hidden_size=64, num_hidden_layers=1, vocab_size=99, variant="first_release"))
    bound = 2**-2.5 * (6 / 96) ** 0.5
    assert 0.95 * bound < first.model.layers[0].attn.q_proj.weight.abs().max() <= bound


@pytest.mark.parametrize(
    ("preset", "per_layer", "dim", "attention"),
    [("gla_340m", 12_872_448, 1024, 4.0), ("gla_1b3", 51_435_008, 2048, 4.0)],
)
def test_presets_have_the_sizes_of_the_paper(preset: str, per_layer: int, dim: int, attention: float):
    with torch.device("meta"):
        model = hg.create_model(preset)
    block = model.model.layers[0]
    assert len(model.model.layers) == 24
    assert sum(parameter.numel() for parameter in block.parameters()) == per_layer
    assert sum(parameter.numel() for parameter in block.attn.parameters()) / dim**2 == pytest.approx(
        attention, rel=0.02
    )
    assert (block.attn.head_key_dim, block.attn.head_value_dim) == (dim // 8, dim // 4)
    assert model.config.tie_word_embeddings == (preset == "gla_340m")


def test_the_340m_model_untied_has_the_stated_size():
    with torch.device("meta"):
        model = hg.create_model("gla_340m", tie_word_embeddings=False)
    assert sum(parameter.numel() for parameter in model.parameters()) == 374_475_776


def test_bad_input_is_refused_by_name():
    model, tokens = build(), ids(2, 4)
    with pytest.raises(TypeError, match="cache must be a GLACache, got DynamicCache"):
        model(tokens, cache=DynamicCache())
    with pytest.raises(TypeError, match="unknown keywords: position_ids; packed sequences need cu_seqlens"):
        model(tokens, position_ids=torch.arange(4))
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        model()
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        model(tokens, inputs_embeds=torch.zeros(2, 4, 16))
    with pytest.raises(ValueError, match="there is no attention matrix"):
        model(tokens, output_attentions=True)
    with pytest.raises(ValueError, match="labels must have length=4"):
        model(tokens, labels=ids(2, 5))
    with pytest.raises(ValueError, match="single pairs of tokens"):
        model(tokens, attention_mask=torch.ones(2, 4, 4, dtype=torch.long))
    for wrong, message in (
        ({"attn": {"layers": [0]}}, "attn must be None"),
        ({"use_l2warp": True}, "use_l2warp must be False"),
        ({"hidden_act": "relu"}, "hidden_act must be 'swish' or 'silu', got 'relu'"),
        ({"num_heads": 3}, "num_heads must divide key_dim"),
        ({"variant": "third"}, "variant must be"),
    ):
        with pytest.raises(ValueError, match=message):
            build(**wrong)


def run(code: str) -> str:
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_the_layer_does_not_load_transformers():
    code = (
        "import sys, headgate\nfrom headgate import GatedLinearAttention, GLACache, GLAModel, gla\n"
        "print('transformers' in sys.modules)\nheadgate.GLAForCausalLM\nprint('transformers' in sys.modules)"
    )
    assert run(code).split() == ["False", "True"]


def test_it_can_be_registered_with_the_auto_classes(tmp_path: Path):
    build().save_pretrained(tmp_path)
    code = (
        "import sys, headgate\nfrom transformers import AutoConfig, AutoModelForCausalLM\n"
        "AutoConfig.register('gla', headgate.GLAConfig)\n"
        "AutoModelForCausalLM.register(headgate.GLAConfig, headgate.GLAForCausalLM)\n"
        f"model = AutoModelForCausalLM.from_pretrained({str(tmp_path)!r})\n"
        "print(type(model) is headgate.GLAForCausalLM, model.config.num_hidden_layers)"
    )
    assert run(code).split() == ["True", "2"]


def test_an_older_transformers_is_refused_by_name():
    code = (
        "import transformers.modeling_outputs as outputs, headgate\n"
        "from headgate.errors import MissingExtraError\n"
        "class Old:\n    past_key_values = None\n"
        "outputs.CausalLMOutputWithPast = Old\n"
        "try:\n    headgate.GLAForCausalLM\nexcept MissingExtraError as error:\n    print(error)"
    )
    assert "GLAForCausalLM needs the package 'transformers>=5.24'" in run(code)


def test_without_transformers_the_layer_works_and_the_language_model_says_what_to_install():
    code = (
        "import sys\nsys.modules['transformers'] = None\nimport headgate, torch\n"
        "print(tuple(headgate.GatedLinearAttention(16, 2)(torch.zeros(1, 3, 16)).shape))\n"
        "from headgate.errors import MissingExtraError\n"
        "try:\n    headgate.GLAForCausalLM\nexcept MissingExtraError as error:\n    print(error)"
    )
    assert run(code).splitlines() == [
        "(1, 3, 16)",
        "GLAForCausalLM needs the package 'transformers': pip install 'headgate[language]'",
    ]

"""Configurations and weights of the published code under our names; the two official layers are never mixed up."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from headgate import GatedLinearAttention, GLAConfig, GLAForCausalLM
from headgate.methods.sequence.gla.official import (
    build_layer,
    convert_layer_state_dict,
    convert_model_state_dict,
    find_variant,
    infer_config,
    load_layer_state_dict,
    rename,
)


def layer_shapes(dim: int = 16, key: int = 8, value: int = 16, head: int = 4) -> dict[str, tuple[int, ...]]:
    """Names and shapes of flash-linear-attention's layer."""
    return {
        "q_proj.weight": (key, dim), "k_proj.weight": (key, dim), "v_proj.weight": (value, dim),
        "g_proj.weight": (value, dim), "gk_proj.0.weight": (16, dim), "gk_proj.1.weight": (key, 16),
        "gk_proj.1.bias": (key,), "g_norm_swish_gate.weight": (head,), "o_proj.weight": (dim, value),
    }  # fmt: skip


FIRST_RELEASE = {
    "q_proj.weight": (8, 16), "k_proj.weight": (8, 16), "k_gate.0.weight": (16, 16), "k_gate.1.weight": (8, 16),
    "k_gate.1.bias": (8,), "v_proj.weight": (16, 16), "g_proj.weight": (16, 16), "g_proj.bias": (16,),
    "out_proj.weight": (16, 16),
}  # fmt: skip


def draw(shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: 0.3 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def model_state(depth: int = 2, tied: bool = False, **sizes: int) -> dict[str, Tensor]:
    """Weights of flash-linear-attention's language model."""
    dim = sizes.get("dim", 16)
    shapes: dict[str, tuple[int, ...]] = {"model.embeddings.weight": (21, dim), "model.norm.weight": (dim,)}
    for index in range(depth):
        block = f"model.layers.{index}."
        shapes |= {f"{block}attn.{name}": shape for name, shape in layer_shapes(**sizes).items()}
        shapes |= {f"{block}attn_norm.weight": (dim,), f"{block}mlp_norm.weight": (dim,)}
        shapes |= {f"{block}mlp.gate_proj.weight": (40, dim), f"{block}mlp.up_proj.weight": (40, dim)}
        shapes |= {f"{block}mlp.down_proj.weight": (dim, 40)}
    if not tied:
        shapes["lm_head.weight"] = (21, dim)
    return draw(shapes)


def test_both_official_layers_load_into_their_variant():
    for config, state, variant in (
        ({"hidden_size": 16, "num_heads": 4}, draw(layer_shapes()), "fla"),
        ({"d_model": 16, "n_head": 4}, draw(FIRST_RELEASE), "first_release"),
    ):
        layer = build_layer(config)
        assert layer.variant == find_variant(state) == variant
        load_layer_state_dict(layer, state)
        ours = layer.state_dict()
        assert len(ours) == len(state)
        for name, value in state.items():
            assert torch.equal(ours[rename(name, variant)], value), name


def test_a_layer_of_the_other_variant_is_refused_by_name():
    fla, first = GatedLinearAttention(16, 4), GatedLinearAttention(16, 4, variant="first_release")
    with pytest.raises(ValueError, match="state is of the variant 'first_release', expected 'fla'"):
        load_layer_state_dict(fla, draw(FIRST_RELEASE))
    with pytest.raises(ValueError, match="state is of the variant 'fla', expected 'first_release'"):
        load_layer_state_dict(first, draw(layer_shapes()))
    with pytest.raises(RuntimeError, match=re.escape('Unexpected key(s) in state_dict: "g_proj.bias"')):
        fla.load_state_dict(first.state_dict())


def test_weights_of_something_else_and_of_other_sizes_are_refused():
    with pytest.raises(ValueError, match="state must hold the memory's gate"):
        convert_layer_state_dict({"q_proj.weight": torch.zeros(2, 2)})
    with pytest.raises(ValueError, match=r"(?s)state must fit the layer: .*size mismatch for q_proj.weight"):
        load_layer_state_dict(GatedLinearAttention(32, 4), draw(layer_shapes()))
    with pytest.raises(ValueError, match=r"state must hold model\.embeddings\.weight"):
        convert_model_state_dict(draw(layer_shapes()))


def test_every_option_of_the_published_layer_is_understood():
    config = {
        "mode": "chunk", "hidden_size": 16, "expand_k": 1.0, "expand_v": 2.0, "num_heads": 4, "num_kv_heads": 2,
        "feature_map": "relu", "use_short_conv": True, "conv_size": 3, "conv_bias": True, "use_output_gate": True,
        "gate_fn": "sigmoid", "elementwise_affine": True, "norm_eps": 1e-3, "gate_logit_normalizer": 8,
        "gate_low_rank_dim": 5, "clamp_min": -0.1, "fuse_norm": False, "layer_idx": None,
    }  # fmt: skip
    layer = build_layer(config)
    state = draw({
        "q_proj.weight": (16, 16), "k_proj.weight": (8, 16), "v_proj.weight": (16, 16), "g_proj.weight": (32, 16),
        "q_conv1d.weight": (16, 1, 3), "k_conv1d.weight": (8, 1, 3), "v_conv1d.weight": (16, 1, 3),
        "q_conv1d.bias": (16,), "k_conv1d.bias": (8,), "v_conv1d.bias": (16,), "gk_proj.0.weight": (5, 16),
        "gk_proj.1.weight": (8, 5), "gk_proj.1.bias": (8,), "g_norm.weight": (8,), "o_proj.weight": (16, 32),
    })  # fmt: skip
    load_layer_state_dict(layer, state)
    assert torch.equal(layer.convolutions[1].weight, state["k_conv1d.weight"][:, 0])
    assert layer.norm.eps == 1e-3
    assert layer.log_gate.normalizer == 8
    assert layer.log_gate.clamp_min == -0.1
    plain = build_layer({"hidden_size": 16, "use_output_gate": False, "elementwise_affine": False})
    load_layer_state_dict(
        plain, {k: v for k, v in draw(layer_shapes()).items() if not k.startswith(("g_proj", "g_norm"))}
    )


def test_options_that_are_not_on_offer_are_refused():
    with pytest.raises(ValueError, match="unknown option 'heads'"):
        build_layer({"hidden_size": 16, "heads": 4})
    assert build_layer({"d_model": 16, "n_head": 4, "use_gk": True, "use_gv": False}).variant == "first_release"
    for option in ({"use_gv": True}, {"use_gk": False}):
        with pytest.raises(ValueError, match="key gates alone are on offer"):
            build_layer({"d_model": 16, "n_head": 4, **option})


def test_names_are_found_behind_wrappers():
    state = {f"module._orig_mod.{name}": value for name, value in draw(layer_shapes()).items()}
    layer = GatedLinearAttention(16, 4)
    load_layer_state_dict(layer, state)
    assert torch.equal(layer.log_gate.down.weight, state["module._orig_mod.gk_proj.0.weight"])


def slow_logits(state: dict[str, Tensor], ids: Tensor) -> Tensor:
    """The published language model in the plainest form, for one text and four heads."""

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight

    hidden = state["model.embeddings.weight"][ids]
    for index in range(2):
        block = {k.removeprefix(f"model.layers.{index}."): v for k, v in state.items() if f"layers.{index}." in k}
        x = norm(hidden, block["attn_norm.weight"])
        q, k, v, g = (x @ block[f"attn.{name}_proj.weight"].T for name in "qkvg")
        logits = x @ block["attn.gk_proj.0.weight"].T @ block["attn.gk_proj.1.weight"].T + block["attn.gk_proj.1.bias"]
        alpha = torch.sigmoid(logits) ** (1 / 16)
        memory, rows = torch.zeros(4, 2, 4), []
        for t in range(len(ids)):
            q_t, k_t, a_t = (z[t].view(4, 2) for z in (q, k, alpha))
            memory = a_t[..., None] * memory + k_t[..., None] * v[t].view(4, 1, 4)
            rows.append(norm((q_t[:, None] @ memory)[:, 0] / 2**0.5, block["attn.g_norm_swish_gate.weight"]).flatten())
        hidden = hidden + (torch.stack(rows) * g * torch.sigmoid(g)) @ block["attn.o_proj.weight"].T
        x = norm(hidden, block["mlp_norm.weight"])
        gate = x @ block["mlp.gate_proj.weight"].T
        hidden = (
            hidden
            + (gate * torch.sigmoid(gate) * (x @ block["mlp.up_proj.weight"].T)) @ block["mlp.down_proj.weight"].T
        )
    return norm(hidden, state["model.norm.weight"]) @ state.get("lm_head.weight", state["model.embeddings.weight"]).T


@pytest.mark.parametrize("tied", [False, True])
def test_a_published_language_model_is_built_from_its_weights(tied: bool):
    state = model_state(tied=tied)
    model = GLAForCausalLM.from_fla_state_dict(state)
    config = model.config
    assert (config.hidden_size, config.num_heads, config.num_hidden_layers, config.vocab_size) == (16, 4, 2, 21)
    assert (config.expand_k, config.expand_v, config.intermediate_size, config.num_kv_heads) == (0.5, 1.0, 40, None)
    assert (model.lm_head.weight is model.model.embeddings.weight) == config.tie_word_embeddings == tied
    assert not model.training
    ids = torch.randint(21, (9,), generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(model(ids[None]).logits[0], slow_logits(state, ids), rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        model.model.embeddings.weight.zero_()
    assert state["model.embeddings.weight"].abs().max() > 0


def test_shared_heads_and_convolutions_are_read_off_the_weights():
    state = model_state()
    for index in range(2):
        attn = f"model.layers.{index}.attn."
        for name, value in draw({
            "k_proj.weight": (4, 16), "v_proj.weight": (8, 16), "gk_proj.1.weight": (4, 16), "gk_proj.1.bias": (4,),
            "q_conv1d.weight": (8, 1, 3), "k_conv1d.weight": (4, 1, 3), "v_conv1d.weight": (8, 1, 3),
        }).items():  # fmt: skip
            state[attn + name] = value
        del state[attn + "g_proj.weight"]
        state[attn + "g_norm.weight"] = state.pop(attn + "g_norm_swish_gate.weight")
    config = infer_config(state)
    assert (config["num_kv_heads"], config["use_short_conv"], config["conv_size"]) == (2, True, 3)
    assert not config["use_output_gate"]
    assert not config["conv_bias"]
    assert GLAForCausalLM.from_fla_state_dict(state)(torch.zeros(1, 3, dtype=torch.long)).logits.isfinite().all()


def test_a_config_that_does_not_fit_the_weights_is_refused():
    with pytest.raises(ValueError, match="state must fit the configuration"):
        GLAForCausalLM.from_fla_state_dict(model_state(), GLAConfig(hidden_size=32, num_hidden_layers=2, vocab_size=21))
    with pytest.raises(ValueError, match="state is of the variant 'fla', expected 'first_release'"):
        GLAForCausalLM.from_fla_state_dict(model_state(), GLAConfig(hidden_size=16, variant="first_release"))
    headless = {name: value for name, value in model_state().items() if "g_norm" not in name}
    with pytest.raises(ValueError, match="a config must be given"):
        infer_config(headless)


def write_published(folder: Path, state: dict[str, Tensor], **config: Any) -> None:
    """A checkpoint as flash-linear-attention writes it."""
    keys = {
        "architectures": ["GLAForCausalLM"], "model_type": "gla", "attn_mode": "chunk", "fuse_norm": True, "attn": None,
        "hidden_size": 16, "num_heads": 4, "num_hidden_layers": 2, "vocab_size": 21, "intermediate_size": 40,
        "hidden_act": "swish", "norm_eps": 1e-6, "use_gk": True, "use_gv": False, "tie_word_embeddings": False, **config,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(keys))
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def test_a_published_checkpoint_loads_from_its_folder_and_is_saved_under_our_names(tmp_path: Path):
    state = model_state()
    (tmp_path / "theirs").mkdir()
    write_published(tmp_path / "theirs", state)
    model, report = GLAForCausalLM.from_pretrained(tmp_path / "theirs", output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    ids = torch.randint(21, (1, 9), generator=torch.Generator().manual_seed(1))
    expected = GLAForCausalLM.from_fla_state_dict(state)(ids).logits
    torch.testing.assert_close(model(ids).logits, expected)
    model.save_pretrained(tmp_path / "ours")
    again, report = GLAForCausalLM.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    torch.testing.assert_close(again(ids).logits, expected)


def test_a_published_checkpoint_with_softmax_blocks_is_refused(tmp_path: Path):
    write_published(tmp_path, model_state(), attn={"layers": [1], "num_heads": 4})
    with pytest.raises(ValueError, match="attn must be None"):
        GLAForCausalLM.from_pretrained(tmp_path)


def test_a_language_model_of_the_first_release_loads_with_the_sizes_of_its_own_config():
    shapes: dict[str, tuple[int, ...]] = {"transformer.wte.weight": (21, 16), "transformer.ln_f.weight": (16,)}
    for index in range(2):
        block = f"transformer.h.{index}."
        shapes |= {f"{block}attn.{name}": shape for name, shape in FIRST_RELEASE.items()}
        shapes |= {f"{block}ln_1.weight": (16,), f"{block}ln_2.weight": (16,)}
        shapes |= {f"{block}w1.weight": (40, 16), f"{block}w3.weight": (40, 16), f"{block}w2.weight": (16, 40)}
    state = draw(shapes | {"lm_head.weight": (21, 16)})
    config = GLAConfig(
        hidden_size=16, num_heads=4, num_hidden_layers=2, vocab_size=21, intermediate_size=40, norm_eps=1e-5,
        variant="first_release",
    )  # fmt: skip
    model = GLAForCausalLM(config)
    model.load_state_dict(convert_model_state_dict(state, config.variant))
    block = model.model.layers[1]
    assert torch.equal(block.mlp.gate_proj.weight, state["transformer.h.1.w1.weight"])
    assert torch.equal(block.mlp.down_proj.weight, state["transformer.h.1.w2.weight"])
    assert torch.equal(block.attn.o_proj.weight, state["transformer.h.1.attn.out_proj.weight"])
    assert torch.equal(block.mlp_norm.weight, state["transformer.h.1.ln_2.weight"])
    with pytest.raises(ValueError, match="do not tell the number of heads"):
        infer_config(state)

"""Configurations and weights of the published code."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from headgate.methods.sequence.zoology import BaseConv, Based, HybridMixer, Hyena, RWKVTimeMix, SparseLookups
from headgate.methods.sequence.zoology.official import build_language_model, build_mixer, convert_state_dict
from headgate.nn import FeedForward, GatedFeedForward, MultiHeadAttention, SlidingWindowAttention

PUBLISHED: list[tuple[str, dict[str, Any], dict[str, tuple[int, ...]]]] = [
    ("MHA", {"num_heads": 2, "bias": False}, {"Wqkv.weight": (24, 8), "out_proj.weight": (8, 8), "out_proj.bias": (8,)}),
    (
        "SlidingAttn",
        {"block_size": 3, "attention_dropout": 0.0},
        {"Wqkv.weight": (24, 8), "Wqkv.bias": (24,), "out_proj.weight": (8, 8), "out_proj.bias": (8,)},
    ),
    (
        "BaseConv",
        {"l_max": 9, "kernel_size": [3, -1], "layer_idx": 0},
        {"projection.weight": (8, 8), "projection.bias": (8,), "conv.conv.weight": (8, 1, 3), "conv.conv.bias": (8,)},
    ),
    (
        "BaseConv",
        {"l_max": 9, "kernel_size": -1, "implicit_long_conv": False},
        {"projection.weight": (8, 8), "projection.bias": (8,), "conv.filter": (8, 9)},
    ),
    (
        "BaseConv",
        {"l_max": 9, "kernel_size": [3, -1], "layer_idx": 1, "use_act": True},
        {
            "projection.weight": (8, 8), "projection.bias": (8,), "conv.pos_emb.z": (1, 9, 3), "conv.mlp.0.weight": (16, 3),
            "conv.mlp.0.bias": (16,), "conv.mlp.2.weight": (8, 16), "conv.mlp.2.bias": (8,),
        },
    ),
    (
        "Based",
        {"num_heads": 2, "num_key_value_heads": 2, "feature_dim": 4, "train_view": "linear", "apply_rotary": True},
        {"proj_q.weight": (8, 8), "proj_k.weight": (8, 8), "proj_v.weight": (8, 8), "proj_o.weight": (8, 8)},
    ),
    (
        "Hyena",
        {"l_max": 9, "filter_order": 6, "num_inner_mlps": 1, "short_filter_order": 2, "emb_dim": 5},
        {
            "in_proj.weight": (24, 8), "in_proj.bias": (24,), "out_proj.weight": (8, 8), "out_proj.bias": (8,),
            "short_filter.weight": (24, 1, 2), "short_filter.bias": (24,), "filter_fn.bias": (8,),
            "filter_fn.pos_emb.z": (1, 9, 5), "filter_fn.pos_emb.t": (1, 9, 1), "filter_fn.modulation.deltas": (1, 1, 8),
            "filter_fn.implicit_filter.0.weight": (6, 5), "filter_fn.implicit_filter.0.bias": (6,),
            "filter_fn.implicit_filter.2.weight": (6, 6), "filter_fn.implicit_filter.2.bias": (6,),
            "filter_fn.implicit_filter.4.weight": (8, 6),
        },
    ),
    (
        "H3",
        {"l_max": 9, "d_state": 6, "head_dim": 2, "kernel_args": {"n_ssm": 2}},
        {
            "ssm_k_D": (8,), "D": (4,), "ssm_k_kernel.kernel.B": (8, 6), "ssm_k_kernel.kernel.C": (1, 8, 6),
            "kernel.kernel.C": (1, 4, 3, 2), "kernel.kernel.log_dt": (4,), "kernel.kernel.B": (2, 3, 2),
            "kernel.kernel.inv_A_real": (2, 3), "kernel.kernel.A_imag": (2, 3),
            **{f"{name}_proj.weight": (8, 8) for name in "qkv"}, **{f"{name}_proj.bias": (8,) for name in "qkv"},
            "output_linear.weight": (8, 8), "output_linear.bias": (8,),
        },
    ),
    (
        "SigmoidLookups",
        {"n_lookups": 3, "selection_penalty": 0.1},
        {
            "Wqkv.weight": (24, 8), "Wqkv.bias": (24,), "out_proj.weight": (8, 8), "out_proj.bias": (8,),
            "selecting.weight": (1, 8),
        },
    ),
    (
        "SelectiveLookups",
        {},
        {
            "Wqkv.weight": (24, 8), "Wqkv.bias": (24,), "out_proj.weight": (8, 8), "out_proj.bias": (8,),
            "selecting.weight": (1, 8), "selecting.bias": (1,),
        },
    ),
    (
        "SMA",
        {"alpha": 0.5},
        {
            "Wqkv.weight": (24, 8), "Wqkv.bias": (24,), "out_proj.weight": (8, 8), "out_proj.bias": (8,),
            "selection_proj.weight": (2, 8), "selection_proj.bias": (2,), "temperature": (1,),
        },
    ),
    (
        "RWKVTimeMixer",
        {"l_max": 9, "layer_idx": 1},
        {
            "time_decay": (8,), "time_first": (8,), "time_mix_k": (1, 1, 8), "time_mix_v": (1, 1, 8),
            "time_mix_r": (1, 1, 8), **{f"{n}.weight": (8, 8) for n in ("key", "value", "receptance", "output")},
        },
    ),
    (
        "RWKVStateMixer",
        {"layer_idx": 1},
        {
            "time_mix_k": (1, 1, 8), "time_mix_r": (1, 1, 8), "key.weight": (32, 8), "receptance.weight": (8, 8),
            "value.weight": (8, 32),
        },
    ),
    (
        "MLP", {"hidden_mult": 4},
        {"fc1.weight": (32, 8), "fc1.bias": (32,), "fc2.weight": (8, 32), "fc2.bias": (8,)},
    ),
    (
        "GLU", {"hidden_mult": 2},
        {
            "fc1.weight": (16, 8), "fc1.bias": (16,), "fc2.weight": (16, 8), "fc2.bias": (16,), "fc3.weight": (8, 16),
            "fc3.bias": (8,),
        },
    ),
]  # fmt: skip


def fill(shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    state = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    if any("implicit_filter" in name for name in state):
        frequency = torch.randn(1, 6, generator=generator)
        state |= {f"filter_fn.implicit_filter.{place}.freq": frequency for place in (1, 3)}
    return state


@pytest.mark.parametrize(("name", "options", "shapes"), PUBLISHED, ids=[name for name, _, _ in PUBLISHED])
def test_every_published_weight_finds_its_place(
    name: str, options: dict[str, Any], shapes: dict[str, tuple[int, ...]]
) -> None:
    mixer = build_mixer(f"zoology.mixers.somewhere.{name}", {"d_model": 8, **options}).eval()
    state = fill(shapes)
    converted = convert_state_dict(state)
    mixer.load_state_dict(converted)
    for key, value in state.items():
        values = value.flatten()
        assert any(torch.equal(ours.flatten()[: len(values)], values) for ours in converted.values()), key
    assert mixer(torch.randn(2, 9, 8)).isfinite().all()


def test_options_reach_our_arguments() -> None:
    assert build_mixer("MHA", {"d_model": 8, "dropout": 0.2}).dropout == 0.2
    assert build_mixer("MHA", {"d_model": 8}).causal
    sliding = build_mixer("SlidingAttn", {"d_model": 8, "block_size": 5})
    assert isinstance(sliding, SlidingWindowAttention)
    assert sliding.window == 5
    assert sliding.causal
    based = build_mixer("Based", {"d_model": 24, "feature_name": "pos_elu", "eps": 1e-6})
    assert isinstance(based, Based)
    assert (based.num_heads, based.num_kv_heads, based.feature_dim, based.eps) == (12, 12, 16, 1e-6)
    hyena = build_mixer("Hyena", {"d_model": 8, "l_max": 9, "w": 3, "dropout": 0.1, "lr": 1e-3, "return_state": True})
    assert isinstance(hyena, Hyena)
    assert (hyena.filter.frequency == 3).all()
    assert hyena.dropout.p == 0.1
    lookups = build_mixer("SigmoidLookups", {"d_model": 8, "n_lookups": 3, "selection_penalty": 0.1})
    assert isinstance(lookups, SparseLookups)
    assert (lookups.num_lookups, lookups.penalty) == (3, 0.1)
    pair = build_mixer("SMA", {"d_model": 16, "alpha": 0.5})
    assert pair.selector.temperature.item() == 2
    time = build_mixer("RWKVTimeMixer", {"d_model": 4, "l_max": 9, "layer_idx": 1, "n_layer": 3})
    torch.testing.assert_close(time.log_decay, RWKVTimeMix(4, 1, 3).log_decay)
    assert build_mixer("MLP", {"d_model": 8}).fc1.out_features == 8
    assert isinstance(build_mixer("torch.nn.Identity", {"d_model": 8, "layer_idx": 0}), nn.Identity)


def test_a_hybrid_configuration_gives_each_layer_its_mixer() -> None:
    configs = [
        {"name": "zoology.mixers.base_conv.BaseConv", "kwargs": {"l_max": 9, "kernel_size": 3}},
        {"name": "zoology.mixers.attention.MHA", "kwargs": {"num_heads": 2}},
    ]
    mixers = [build_mixer("Hybrid", {"d_model": 8, "configs": configs, "layer_idx": layer}) for layer in range(3)]
    assert all(isinstance(mixer, HybridMixer) for mixer in mixers)
    assert [type(mixer.mixer) for mixer in mixers] == [BaseConv, MultiHeadAttention, BaseConv]


CONFIG: dict[str, Any] = {
    "sequence_mixer": {"name": "zoology.mixers.attention.MHA", "kwargs": {"num_heads": 2}},
    "d_model": 8, "n_layers": 2, "max_position_embeddings": 6, "vocab_size": 10,
}  # fmt: skip


def published_model() -> dict[str, Tensor]:
    layer = {
        "sequence_mixer.Wqkv.weight": (24, 8), "sequence_mixer.Wqkv.bias": (24,), "sequence_mixer.out_proj.weight": (8, 8),
        "sequence_mixer.out_proj.bias": (8,), "state_mixer.fc1.weight": (32, 8), "state_mixer.fc1.bias": (32,),
        "state_mixer.fc2.weight": (8, 32), "state_mixer.fc2.bias": (8,), "norm1.weight": (8,), "norm1.bias": (8,),
        "norm2.weight": (8,), "norm2.bias": (8,),
    }  # fmt: skip
    shapes = {f"backbone.layers.{index}.{name}": shape for index in range(2) for name, shape in layer.items()}
    shapes["backbone.embeddings.word_embeddings.weight"] = (10, 8)
    shapes["backbone.embeddings.position_embeddings.weight"] = (6, 8)
    shapes |= {"backbone.ln_f.weight": (8,), "backbone.ln_f.bias": (8,)}
    state = fill(shapes)
    state["lm_head.weight"] = state["backbone.embeddings.word_embeddings.weight"]
    return state


def test_a_language_model_gets_every_published_weight() -> None:
    model = build_language_model(CONFIG)
    state = published_model()
    model.load_state_dict(convert_state_dict(state))
    assert isinstance(model.blocks[0].state_mixer, FeedForward)
    assert torch.equal(model.blocks[1].mixer.qkv.weight, state["backbone.layers.1.sequence_mixer.Wqkv.weight"])
    assert torch.equal(model.blocks[0].state_mixer.fc2.bias, state["backbone.layers.0.state_mixer.fc2.bias"])
    assert torch.equal(model.embedding.weight, state["lm_head.weight"])


def test_options_of_a_language_model_reach_ours() -> None:
    more = {
        "state_mixer": {"name": "zoology.mixers.mlp.GLU", "kwargs": {}}, "resid_dropout": 0.2, "embed_dropout": 0.3,
        "drop_path": 0.4, "layer_norm_epsilon": 1e-3, "pad_vocab_size_multiple": 8, "learnable_word_embeddings": False,
        "block_type": "TransformerBlock", "name": "default",
    }  # fmt: skip
    model = build_language_model({**CONFIG, **more})
    assert [block.dropout1.p for block in model.blocks] == [0.3, 0.2]
    assert model.blocks[1].dropout2.p == model.dropout.p == 0.2
    assert model.blocks[0].drop_path.rate == 0.4
    assert model.norm.eps == 1e-3
    assert model.vocab_size == 16
    assert not model.embedding.weight.requires_grad
    assert isinstance(model.blocks[0].state_mixer, GatedFeedForward)


@pytest.mark.parametrize(
    ("name", "options", "match"),
    [
        ("Mamba", {}, "name must be one of MHA"),
        ("MHA", {"d_model": 8, "heads": 2}, "MHA has no option 'heads'"),
        ("MHA", {}, "MHA needs the option 'd_model'"),
        ("BaseConv", {"d_model": 8, "l_max": 9, "kernel_size": [3, -1], "layer_idx": 2}, "an entry for layer_idx=2"),
        ("BaseConv", {"d_model": 8, "l_max": 9, "bidirectional": True}, "no option 'bidirectional'"),
        ("Hyena", {"d_model": 8, "l_max": 9, "num_blocks": 3}, "num_blocks=1 only, got 3"),
        ("Based", {"d_model": 24, "causal": False}, "causal=True only"),
        ("Based", {"d_model": 24, "feature_name": "performer"}, "no feature_name 'performer'"),
        ("Based", {"d_model": 24, "feature_name": "pos_elu", "feature_kwargs": {"temp": 2.0}}, "temp=1.0 only"),
        ("H3", {"d_model": 8, "kernel_args": {"disc": "zoh"}}, "disc='bilinear' only"),
        ("H3", {"d_model": 8, "kernel_args": {"magic": 1}}, "no option 'magic'"),
    ],
)
def test_unknown_or_missing_options_are_refused(name: str, options: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        build_mixer(name, options)


def test_unknown_options_of_a_language_model_are_refused() -> None:
    with pytest.raises(ValueError, match="no option 'hidden'"):
        build_language_model({**CONFIG, "hidden": 3})
    with pytest.raises(ValueError, match="block_type='TransformerBlock' only"):
        build_language_model({**CONFIG, "block_type": "MambaBlock"})


def test_foreign_or_untied_weights_are_refused() -> None:
    with pytest.raises(ValueError, match="no weights of a published mixer"):
        convert_state_dict({"weight": torch.zeros(2)})
    with pytest.raises(ValueError, match=r"'extra' is no weight of the published mixer"):
        convert_state_dict({"Wqkv.weight": torch.zeros(6, 2), "extra": torch.zeros(1)})
    state = published_model()
    with pytest.raises(ValueError, match=r"lm_head\.weight must be the tied"):
        convert_state_dict({**state, "lm_head.weight": torch.zeros(10, 8)})
    with pytest.raises(ValueError, match=r"'backbone\.magic' is no weight"):
        convert_state_dict({**state, "backbone.magic": torch.zeros(1)})
    with pytest.raises(ValueError, match="must equal its twin"):
        hyena = fill(next(shapes for name, _, shapes in PUBLISHED if name == "Hyena"))
        convert_state_dict({**hyena, "filter_fn.implicit_filter.3.freq": torch.zeros(1, 6)})

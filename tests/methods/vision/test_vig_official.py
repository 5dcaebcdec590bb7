"""Configurations and weights of the published code: names, refusals. Values stand in the golden tests."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from headgate.methods.vision.vig.official import build_layer, build_vig, build_vig_h, convert_state_dict

PLAIN = {
    "img_size": 32, "if_cls_token": False, "patch_embed_version": "v2", "use_swiglu": True, "depth": 1, "num_heads": 3,
    "embed_dim": 12, "num_classes": 5,
}  # fmt: skip
HIERARCHICAL = {
    "norm_layer": "ln2d", "downsample_version": "v3", "patchembed_version": "v2", "gmlp": True, "depths": [1, 1],
    "dims": 8, "num_heads": [1, 2], "num_classes": 5,
}  # fmt: skip


def test_what_is_left_out_has_its_published_default() -> None:
    model = build_vig(PLAIN)
    mixer = model.blocks[0].mixer
    assert (mixer.conv_act, mixer.out_act, mixer.official_eval_halving) == ("silu", None, True)
    layer = build_layer({"d_model": 24, "num_heads": 3, "expand_v": 1.0, "use_act_in_conv": False})
    assert layer.key_dim == 24
    assert layer.norm_eps == 1e-5
    assert build_vig_h(HIERARCHICAL).stages[1].blocks[0].drop_path.rate == pytest.approx(0.1)
    assert not build_vig_h(HIERARCHICAL).stages[0].blocks[0].mixer.official_eval_halving


def test_options_reach_our_modules() -> None:
    layer = build_layer(
        {"d_model": 24, "num_heads": 3, "expand_k": 1.0, "expand_v": 1.0, "clamp_min": -0.1, "rope_mode": "2dv1"}
    )
    assert (layer.log_gate.clamp_min, layer.rotary) == (-0.1, "2d")
    model = build_vig({**PLAIN, "if_abs_pos_embed": False, "channels": 1, "use_out_act": True, "drop_path_rate": 0.0})
    assert model.position_embedding is None
    assert model.patch_embedding.in_chans == 1
    assert model.blocks[0].mixer.out_act == "silu"
    assert build_vig_h({**HIERARCHICAL, "dims": [8, 16], "norm_layer": "LN"}).dims == [8, 16]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"if_cls_token": True}, "class token has no place on the grid"),
        ({"use_middle_cls_token": True}, "class token has no place on the grid"),
        ({"patch_embed_version": "v1"}, "only patch_embed_version='v2'"),
        ({"use_swiglu": False}, "only use_swiglu=True"),
        ({"rope_mode": "2dv0"}, "rope_mode must be one of none, 1d, 2dv1"),
        ({"scan_mode": "zigzag"}, "only scan_mode='default'"),
        ({"use_dirpe": True}, "only use_dirpe=False"),
        ({"hidden_act": "gelu"}, "only hidden_act='swish'"),
        ({"stride": 8}, "only stride=16"),
        ({"embed_dims": 16}, "no option 'embed_dims'"),
    ],
)
def test_options_that_are_not_offered_are_refused_by_name(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_vig({**PLAIN, **options})


def test_a_version_that_is_left_out_is_the_published_default_and_refused() -> None:
    with pytest.raises(ValueError, match="only patch_embed_version='v2' is offered, got 'v1'"):
        build_vig({name: value for name, value in PLAIN.items() if name != "patch_embed_version"})
    with pytest.raises(ValueError, match="only downsample_version='v3' is offered, got 'v2'"):
        build_vig_h({name: value for name, value in HIERARCHICAL.items() if name != "downsample_version"})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dims": [8, 24]}, "dims must double"),
        ({"norm_layer": "bn"}, "norm_layer must be"),
        ({"gmlp": False}, "only gmlp=True"),
    ],
)
def test_hierarchical_options_that_are_not_offered_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_vig_h({**HIERARCHICAL, **options})


def test_names_of_wrapped_models_and_pointwise_convolutions_are_understood() -> None:
    weight = torch.randn(16, 8)
    state = {
        "module.pos_embed": torch.zeros(1, 4, 8),
        "module.layers.0.blocks.1.op.qkv_proj.weight": weight[:, :, None, None],
        "module.layers.0.downsample.1.bias": torch.zeros(16),
        "module.classifier.head.weight": torch.zeros(5, 16),
        "blocks.11.attn.gk_proj.1.bias": torch.zeros(8),
        "g_norm.weight": torch.zeros(4),
    }
    converted = convert_state_dict(state)
    assert sorted(converted) == [
        "blocks.11.mixer.log_gate.up.bias",
        "global_norm_weight",
        "head.weight",
        "position_embedding",
        "stages.0.blocks.1.mixer.qkv.weight",
        "stages.1.downsample.conv.bias",
    ]
    assert torch.equal(converted["stages.0.blocks.1.mixer.qkv.weight"], weight)


@pytest.mark.parametrize(
    "name", ["cls_token", "blocks.0.attn.dirpe", "blocks.0.attn.q_proj.weight", "lower_bounds", "neck.weight"]
)
def test_a_weight_that_has_no_place_is_refused_by_name(name: str) -> None:
    with pytest.raises(ValueError, match=name):
        convert_state_dict({name: torch.zeros(2)})

"""ConViT: where the class token joins, any image size, feature maps, classifiers, the paper's tables, published weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import headgate
from headgate.errors import DataError
from headgate.evaluate import attention_distance
from headgate.methods.vision.convit import GPSA, MHSA, ConViT, convit_tiny
from headgate.methods.vision.convit.official import build_convit, convert_state_dict
from headgate.nn.patch_embedding import resize_positions
from headgate.train import make_optimizer

SMALL = {"img_size": 16, "patch_size": 4, "num_classes": 5, "embed_dim": 16, "depth": 3, "local_up_to_layer": 2}


def images(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape or (2, 3, 16, 16), generator=torch.Generator().manual_seed(seed))


def small(**options: Any) -> ConViT:
    torch.manual_seed(0)
    return ConViT(**{**SMALL, **options}).eval()


def on_meta(name: str, **options: Any) -> Any:
    with torch.device("meta"):
        return headgate.create_model(name, **options)


# --- the paper's table -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("preset", "dim", "heads", "published"),
    [
        ("convit_tiny", 192, 4, 1),
        ("convit_tiny_plus", 256, 4, 2),
        ("convit_small", 432, 9, 5.4),
        ("convit_small_plus", 576, 9, 10),
        ("convit_base", 768, 16, 17),
        ("convit_base_plus", 1024, 16, 30),
    ],
)
def test_presets_have_the_table_s_sizes_and_multiply_adds(preset: str, dim: int, heads: int, published: float) -> None:
    model = on_meta(preset)
    layers = [block.attn for block in model.blocks]
    assert [type(attn) for attn in layers] == [GPSA] * 10 + [MHSA] * 2
    assert {(attn.dim, attn.num_heads) for attn in layers} == {(dim, heads)}
    assert model.num_features == dim
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.empty(1, 3, 224, 224, device="meta"))
    by_op = {str(op): count / 2e9 for op, count in counter.get_flop_counts()["Global"].items()}
    # The table counts layers alone, without the products inside attention.
    inside = sum(count for op, count in by_op.items() if "attention" in op or "bmm" in op)
    assert sum(by_op.values()) - inside == pytest.approx(published, rel=0.1)
    assert 0 < inside < 0.25 * sum(by_op.values())


def test_drop_path_rises_linearly_from_zero_in_the_first_block() -> None:
    rates = [block.drop_path.rate for block in on_meta("convit_small", drop_path_rate=0.22).blocks]
    assert rates == pytest.approx([0.02 * index for index in range(12)])
    assert on_meta("convit_tiny").blocks[-1].drop_path.rate == 0.1


# --- what it computes ------------------------------------------------------------------------------------------------


def test_the_class_token_joins_in_front_before_the_first_plain_block() -> None:
    model = small()
    seen: list[Tensor] = []
    for block in model.blocks:
        block.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    features = model.forward_features(images())
    assert [x.shape[1] for x in seen] == [16, 16, 17]
    torch.testing.assert_close(seen[2][:, :1], model.cls_token.expand(2, 1, 16))
    patches = model.patch_embed.proj(images()).flatten(2).transpose(1, 2)
    torch.testing.assert_close(seen[0], patches + model.pos_embed)
    torch.testing.assert_close(model(images()), model.head(features[:, 0]))


def test_without_local_blocks_the_class_token_is_there_from_the_start() -> None:
    model = small(local_up_to_layer=0)
    assert all(isinstance(block.attn, MHSA) for block in model.blocks)
    seen: list[Tensor] = []
    model.blocks[0].register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    model(images())
    assert seen[0].shape[1] == 17
    assert model.gates().shape == (0, 4)


def test_a_block_is_two_residual_branches_behind_norms() -> None:
    model = small()
    block, x = model.blocks[0], torch.randn(2, 16, 16)
    x1 = x + block.attn(block.norm1(x))
    hidden = nn.functional.gelu(block.mlp.fc1(block.norm2(x1)))
    torch.testing.assert_close(block(x, (4, 4)), x1 + block.mlp.fc2(hidden))
    assert block.norm1.eps == 1e-6
    assert block.mlp.fc1.out_features == 64


def test_dropout_rests_in_evaluation_and_stands_where_the_published_code_has_it() -> None:
    model = small(drop_rate=0.4, attn_drop_rate=0.3)
    torch.testing.assert_close(model(images()), small()(images()))
    rates = [part.p for part in model.modules() if isinstance(part, nn.Dropout)]
    # On the embedding; per block behind attention, and twice in the token-wise network.
    assert rates == [0.4] * (1 + 3 * 3)
    assert {block.attn.attn_drop for block in model.blocks} == {0.3}


def test_pooling_the_mean_reads_the_patches_alone() -> None:
    model = small(global_pool="avg")
    features = model.forward_features(images())
    torch.testing.assert_close(model.forward_head(features, pre_logits=True), features[:, 1:].mean(1))
    torch.testing.assert_close(model(images()), model.head(features[:, 1:].mean(1)))


def test_positions_are_resized_to_the_images_grid() -> None:
    model = small()
    seen: list[Tensor] = []
    model.blocks[0].register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    features = model.forward_features(images(1, 3, 8, 24))
    patches = model.patch_embed.proj(images(1, 3, 8, 24)).flatten(2).transpose(1, 2)
    torch.testing.assert_close(seen[0], patches + resize_positions(model.pos_embed, (4, 4), (2, 6)))
    assert features.shape == (1, 13, 16)


def test_an_image_of_another_size_meets_the_same_filters() -> None:
    model = small(use_pos_embed=False, locality_strength=30.0)
    with torch.no_grad():
        for block in model.blocks[:2]:
            block.attn.gating_param.fill_(torch.inf)
    whole = model.forward_maps(images(1, 3, 24, 32), [1])[0]
    part = model.forward_maps(images(1, 3, 24, 32)[:, :, :, 8:28], [1])[0]
    # Two layers of one step each way: what lies two patches from the new border does not know of it.
    torch.testing.assert_close(part[..., 2:-2], whole[..., 4:-3], atol=1e-5, rtol=1e-4)
    assert not torch.allclose(part[..., :1], whole[..., 2:3], atol=1e-3)


def test_maps_are_the_patches_behind_blocks() -> None:
    model = small()
    outputs: list[Tensor] = []
    for block in model.blocks:
        block.register_forward_hook(lambda module, inputs, output: outputs.append(output))
    x = images(2, 3, 16, 8)
    features, maps = model.forward_intermediates(x, [0, -1])
    assert [one.shape for one in maps] == [(2, 16, 4, 2)] * 2
    torch.testing.assert_close(maps[0].flatten(2).mT, outputs[0])
    torch.testing.assert_close(maps[1].flatten(2).mT, outputs[2][:, 1:])
    torch.testing.assert_close(features, model.forward_features(x))
    outputs.clear()
    (first,) = model.forward_maps(x, [0])
    assert len(outputs) == 1
    torch.testing.assert_close(first, maps[0])
    assert len(model.forward_maps(x)) == 3
    assert len(model.forward_maps(x, 2)) == 2


def test_gates_and_attentions_of_all_blocks() -> None:
    model = small()
    with torch.no_grad():
        model.blocks[1].attn.gating_param.copy_(torch.tensor([-1.0, 0.0, 1.0, 2.0]))
    torch.testing.assert_close(model.gates()[1], torch.sigmoid(torch.tensor([-1.0, 0.0, 1.0, 2.0])))
    x = images(2, 3, 8, 16)
    weights = model.attentions(x)
    assert [one.shape for one in weights] == [(2, 4, 8, 8)] * 2 + [(2, 4, 9, 9)]
    entering = model.patch_embed.proj(x).flatten(2).transpose(1, 2)
    entering = entering + resize_positions(model.pos_embed, (4, 4), (2, 4))
    first = model.blocks[0]
    torch.testing.assert_close(weights[0], first.attn.attention(first.norm1(entering), (2, 4)))
    distances = model.attention_distances(x)
    assert distances.shape == (3, 4)
    for index, prefix in ((0, 0), (2, 1)):
        expected = attention_distance(weights[index], (2, 4), prefix_tokens=prefix)
        torch.testing.assert_close(distances[index], torch.from_numpy(expected))
    assert not any(block.attn._forward_pre_hooks for block in model.blocks)


def test_weights_start_as_published() -> None:
    model = small(embed_dim=64, depth=4, num_heads=16)
    for block in model.blocks:
        for linear in (block.mlp.fc1, block.mlp.fc2, block.attn.proj):
            assert float(linear.weight.detach().std()) == pytest.approx(0.02, rel=0.06)
            assert not linear.bias.any()
    assert torch.equal(model.blocks[0].attn.v.weight, torch.eye(64))
    assert float(model.blocks[3].attn.qkv.weight.std()) == pytest.approx(0.02, rel=0.05)
    assert float(model.pos_embed.std()) == pytest.approx(0.02, rel=0.1)
    assert float(model.cls_token.std()) == pytest.approx(0.02, rel=0.4)
    drawn = small(local_init=False).blocks[0].attn
    assert not torch.equal(drawn.v.weight, torch.eye(16))


# --- what timm's users expect ----------------------------------------------------------------------------------------


def test_a_classifier_can_be_replaced_and_left_out() -> None:
    model = small()
    pooled = model.forward_head(model.forward_features(images()), pre_logits=True)
    model.reset_classifier(7)
    assert model.num_classes == 7
    assert model(images()).shape == (2, 7)
    assert model.get_classifier() is model.head
    assert float(model.head.weight.abs().max()) < 0.2
    model.reset_classifier(0, "avg")
    torch.testing.assert_close(model(images()), model.forward_features(images())[:, 1:].mean(1))
    model.reset_classifier(0, "token")
    torch.testing.assert_close(model(images()), pooled)
    double = small().double()
    double.reset_classifier(3)
    assert double(images().double()).dtype == torch.float64


def test_gates_positions_and_the_class_token_are_spared_weight_decay() -> None:
    model = small()
    names = model.no_weight_decay()
    assert names == {"cls_token", "pos_embed"}
    assert small(use_pos_embed=False).no_weight_decay() == {"cls_token"}
    optimizer = make_optimizer(
        model, weight_decay=0.05, overrides={name: {"weight_decay": 0.0} for name in sorted(names)}
    )
    decayed = {id(p) for group in optimizer.param_groups if group["weight_decay"] for p in group["params"]}
    assert not {id(model.cls_token), id(model.pos_embed), id(model.blocks[0].attn.gating_param)} & decayed
    assert {id(model.blocks[0].attn.pos_proj.weight), id(model.head.weight)} <= decayed


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"local_up_to_layer": 3}, r"local_up_to_layer must lie in \[0, depth\).*local_up_to_layer=3, depth=3"),
        ({"local_up_to_layer": -1}, "local_up_to_layer must lie"),
        ({"embed_dim": 18}, "num_heads must divide dim, got dim=18, num_heads=4"),
        ({"img_size": 18}, "img_size must be whole patches of 4 pixels high and wide, got 18×18"),
        ({"num_classes": -1}, "num_classes must be 0"),
        ({"global_pool": "max"}, "global_pool must be 'token' or 'avg', got 'max'"),
        ({"depth": 0}, "depth must be positive"),
        ({"drop_path_rate": 2.0}, r"drop_path_rate must lie in \[0, 1\]"),
        ({"mlp_ratio": 0.0}, "mlp_ratio must be positive"),
    ],
)
def test_options_that_do_not_fit_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small(**options)


@pytest.mark.parametrize(
    ("shape", "error", "message"),
    [
        ((2, 3, 16, 18), ValueError, "images must be whole patches of 4 pixels high and wide, got 16×18"),
        ((2, 1, 16, 16), ValueError, "images must have channels=3"),
        ((3, 16, 16), ValueError, "images must have shape"),
    ],
)
def test_images_that_do_not_fit_are_refused(shape: tuple[int, ...], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        small()(torch.zeros(shape))
    with pytest.raises(TypeError, match="images must be floating point"):
        small()(torch.zeros(2, 3, 16, 16, dtype=torch.uint8))
    with pytest.raises(ValueError, match="indices must name different ones of 3 outputs"):
        small().forward_maps(images(), [3])
    with pytest.raises(ValueError, match="num_classes must be 0"):
        small().reset_classifier(-2)


# --- published weights -----------------------------------------------------------------------------------------------


def test_parameters_have_the_published_names() -> None:
    layer = {"gating_param", "qk.weight", "v.weight", "proj.weight", "proj.bias", "pos_proj.weight", "pos_proj.bias"}
    plain = {"qkv.weight", "proj.weight", "proj.bias"}
    parts = {f"{part}.{kind}" for part in ("norm1", "norm2", "mlp.fc1", "mlp.fc2") for kind in ("weight", "bias")}
    expected = {"cls_token", "pos_embed"}
    expected |= {f"{part}.{kind}" for part in ("patch_embed.proj", "norm", "head") for kind in ("weight", "bias")}
    for index in range(3):
        expected |= {f"blocks.{index}.{name}" for name in parts}
        expected |= {f"blocks.{index}.attn.{name}" for name in (layer if index < 2 else plain)}
    assert set(small().state_dict()) == expected


def test_checkpoints_are_unwrapped() -> None:
    model, state = small(), small().state_dict()
    saved = {"model": {f"module.{name}": value for name, value in state.items()}, "epoch": 299}
    saved["model"]["module.blocks.0.attn.rel_indices"] = torch.zeros(1, 16, 16, 3)
    converted = convert_state_dict(saved)
    assert set(converted) == set(state)
    model.load_state_dict(converted)
    tiny = convit_tiny(saved, **SMALL).eval()
    torch.testing.assert_close(tiny(images()), model(images()))
    assert set(convert_state_dict(GPSA(8, 4, qkv_bias=True).state_dict())) == set(
        GPSA(8, 4, qkv_bias=True).state_dict()
    )
    with pytest.raises(ValueError, match=r"'blocks.0.mixer.qkv.weight' is no weight"):
        convert_state_dict({"blocks.0.mixer.qkv.weight": torch.zeros(1)})


def test_published_keywords_build_our_model() -> None:
    model = build_convit({"embed_dim": 32, "num_heads": 4, "depth": 4, "local_up_to_layer": 3, "qkv_bias": True})
    assert (model.embed_dim, model.patch_size, model.num_classes) == (32, 16, 1000)
    assert model.blocks[-1].drop_path.rate == 0
    assert model.blocks[0].attn.v.bias is not None
    # timm, and the published command line, count the channels of one head.
    per_head = {"embed_dim": 12, "num_heads": 4, "depth": 11, "norm_layer": nn.LayerNorm, "global_pool": None}
    assert build_convit(per_head, channels_per_head=True).embed_dim == 48
    with pytest.raises(ValueError, match="only hybrid_backbone=None is offered, got 'resnet'"):
        build_convit({"hybrid_backbone": "resnet"})
    with pytest.raises(ValueError, match="has no option class_attention"):
        build_convit({"class_attention": True})


# --- files -----------------------------------------------------------------------------------------------------------


def test_a_saved_model_comes_back_as_it_was(tmp_path: Path) -> None:
    model = small(img_size=(16, 24), locality_strength=0.5)
    model.reset_classifier(7, "avg")
    model.save_pretrained(tmp_path)
    back = ConViT.from_pretrained(tmp_path)
    assert not back.training
    assert (back.num_classes, back.global_pool, back.grid_size) == (7, "avg", (4, 6))
    assert torch.equal(back(images(2, 3, 16, 24)), model(images(2, 3, 16, 24)))
    assert json.loads((tmp_path / "config.json").read_text())["locality_strength"] == 0.5


def test_weights_of_another_size_are_refused(tmp_path: Path) -> None:
    small().save_pretrained(tmp_path)
    with pytest.raises(DataError, match="does not fit ConViT"):
        ConViT.from_pretrained(tmp_path, depth=4)

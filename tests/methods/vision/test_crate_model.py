"""CRATE as a whole: the network written out, the interface of image models, reports, published weights, recipes."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import headgate
from headgate.errors import DataError
from headgate.evaluate import layerwise_report, projected_coding_rate
from headgate.methods.vision.crate import CRATE, ISTA, RECIPES, OvercompleteISTA, crate_small, crate_tiny
from headgate.methods.vision.crate.model import Patchify
from headgate.methods.vision.crate.official import build_crate, convert_state_dict
from headgate.train import Lion

PUBLISHED = {
    "image_size": 16,
    "patch_size": 4,
    "num_classes": 5,
    "dim": 32,
    "depth": 2,
    "heads": 4,
    "mlp_dim": 32,
    "dim_head": 8,
}


def small(**options: Any) -> CRATE:
    torch.manual_seed(0)
    return CRATE(**{"image_size": 8, "patch_size": 4, "num_classes": 5, "dim": 12, "depth": 2, "heads": 3, **options})


def images(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# --- the network ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pool", ["cls", "mean"])
def test_the_network_written_out(pool: str) -> None:
    model, x = small(pool=pool), images(2, 3, 8, 8)
    logits = []
    for image in x:
        patches = []
        for row in range(2):
            for column in range(2):
                patch = image[:, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4]
                patches.append(torch.stack([patch[:, i, j] for i in range(4) for j in range(4)]).flatten())
        _, first, linear, second = model.to_patch_embedding
        tokens = [model.cls_token[0, 0], *(second(linear(first(patch))) for patch in patches)]
        z = torch.stack(tokens) + model.pos_embedding[0]
        for layer in model.layers:
            z = layer(z[None])[0]
        norm, head = model.mlp_head
        logits.append(head(norm(z[0] if pool == "cls" else z.mean(0))))
    torch.testing.assert_close(model(x), torch.stack(logits))


def test_patches_are_written_row_by_row_pixel_by_pixel_channel_by_channel() -> None:
    picture = torch.arange(2 * 4 * 6.0).view(1, 2, 4, 6)
    cut = Patchify(2)(picture)
    assert cut.shape == (1, 6, 8)
    # The patch in row 1, column 2: pixels (2, 4), (2, 5), (3, 4), (3, 5), both channels of each.
    assert cut[0, 5].tolist() == [16, 40, 17, 41, 22, 46, 23, 47]


def test_class_token_and_positions_start_from_a_standard_normal() -> None:
    model = small(image_size=64, patch_size=4, dim=48)
    assert model.pos_embedding.std().item() == pytest.approx(1, rel=0.02)
    assert model.cls_token.std().item() == pytest.approx(1, rel=0.3)


def test_features_are_non_negative_and_sparse() -> None:
    features = small().forward_features(images(3, 3, 8, 8))
    assert features.shape == (3, 5, 12)
    assert (features >= 0).all()
    assert 0.2 < float((features == 0).float().mean()) < 0.9


def test_dropout_on_embedded_tokens_acts_in_training_alone() -> None:
    model, x = small(embedding_dropout=0.9), images(2, 3, 8, 8)
    assert not torch.equal(model(x), model(x))
    assert torch.equal(model.eval()(x), model(x))


def test_positions_of_other_image_sizes_are_resized_and_the_class_s_is_kept() -> None:
    model = small(image_size=(8, 12)).eval()
    assert model.grid == (2, 3)
    with torch.no_grad():
        model.pos_embedding[:, 1:] = 3.0  # the same everywhere, and so at every size
        one = model._embed(images(1, 3, 8, 12))
        other = model._embed(images(1, 3, 16, 20))
    assert other.shape == (1, 1 + 4 * 5, 12)
    torch.testing.assert_close(other[:, 0], one[:, 0])
    patches = model.to_patch_embedding(images(1, 3, 16, 20))
    torch.testing.assert_close(other[:, 1:], patches + 3.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_size": 10}, "image_size must be whole patches of 4 pixels high and wide, got 10×10"),
        ({"heads": 5}, "num_heads must divide dim"),
        ({"pool": "max"}, "pool must be 'cls' or 'mean', got 'max'"),
        ({"num_classes": -1}, "num_classes must be 0"),
        ({"depth": 0}, "depth must be positive"),
        ({"embedding_dropout": 2.0}, "embedding_dropout must lie in"),
        ({"step_size": 0.0}, "step_size must be positive"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small(**options)


def test_images_that_do_not_fit_are_refused() -> None:
    model = small()
    for shape, message in (
        ((2, 3, 8, 9), "images must be whole patches"),
        ((2, 1, 8, 8), "images must have channels=3"),
        ((3, 8, 8), "images must have shape"),
    ):
        with pytest.raises(ValueError, match=message):
            model(images(*shape))
    with pytest.raises(TypeError, match="images must be floating point"):
        model(torch.zeros(2, 3, 8, 8, dtype=torch.uint8))


def test_options_reach_every_layer() -> None:
    model = small(step_size=0.2, lambd=0.3, dim_head=6, dropout=0.1, tie_output=True, nonnegative=False)
    for layer in model.layers:
        assert (layer[1].fn.step_size, layer[1].fn.lambd, layer[1].fn.nonnegative) == (0.2, 0.3, False)
        assert (layer[0].fn.head_dim, layer[0].fn.dropout, layer[0].fn.tie_output) == (6, 0.1, True)
    for layer in small(expansion=2, skip=True).layers:
        assert isinstance(layer[1].fn, OvercompleteISTA)
        assert layer[1].skip


# --- the interface of image models ----------------------------------------------------------------------------------


@pytest.mark.parametrize("pool", ["cls", "mean"])
def test_features_and_head_make_up_the_model(pool: str) -> None:
    model, x = small(pool=pool).eval(), images(2, 3, 8, 8)
    features = model.forward_features(x)
    torch.testing.assert_close(model(x), model.forward_head(features))
    pooled = model.forward_head(features, pre_logits=True)
    assert pooled.shape == (2, model.num_features)
    torch.testing.assert_close(model(x), model.get_classifier()(pooled))


def test_a_classifier_can_be_replaced_and_taken_off() -> None:
    model, x = small().double(), images(2, 3, 8, 8).double()
    before = model.forward_features(x)
    model.reset_classifier(7)
    assert model(x).shape == (2, 7)
    assert model.num_classes == 7
    assert model.get_classifier().weight.dtype == torch.float64
    model.reset_classifier(0, pool="mean")
    torch.testing.assert_close(model(x), model.forward_head(before, pre_logits=True))
    torch.testing.assert_close(model(x), model.mlp_head[0](before.mean(1)))
    bare = small(num_classes=0)
    assert isinstance(bare.get_classifier(), nn.Identity)
    with pytest.raises(ValueError, match="num_classes must be 0"):
        model.reset_classifier(-2)
    with pytest.raises(ValueError, match="pool must be"):
        model.reset_classifier(2, pool="max")  # type: ignore[arg-type]


def test_attention_is_that_of_the_chosen_layer() -> None:
    model, x = small(depth=3).eval(), images(2, 3, 8, 8)
    seen = {}
    compress = model.layers[1][0]
    compress.norm.register_forward_hook(lambda _m, _i, output: seen.update(x=output))
    model(x)
    expected = compress.fn.weights(seen["x"])
    torch.testing.assert_close(model.attention(x, 1), expected)
    torch.testing.assert_close(model.attention(x, -2), expected)
    assert model.attention(x).shape == (2, 3, 5, 5)
    for layer in (3, -4):
        with pytest.raises(ValueError, match="layer must be one of 3"):
            model.attention(x, layer)


def test_maps_are_the_patches_behind_the_chosen_layers() -> None:
    model, x = small(depth=3, image_size=(8, 12)).eval(), images(2, 3, 8, 12)
    features, maps = model.forward_intermediates(x, (0, -1))
    torch.testing.assert_close(features, model.forward_features(x))
    first = model.layers[0](model._embed(x))
    assert [m.shape for m in maps] == [(2, 12, 2, 3)] * 2
    torch.testing.assert_close(maps[0][1, :, 1, 2], first[1, 1 + 3 + 2])
    torch.testing.assert_close(maps[1][0, :, 0, 1], features[0, 2])
    assert len(model.forward_intermediates(x)[1]) == 3
    ran = []
    model.layers[2].register_forward_hook(lambda *given: ran.append(given))
    (alone,) = model.forward_maps(x, [0])
    torch.testing.assert_close(alone, maps[0])
    assert not ran
    with pytest.raises(ValueError, match="indices must be at least 1"):
        model.forward_intermediates(x, 4)


def test_presets_are_found_by_name_and_take_overrides() -> None:
    assert headgate.list_models("crate_*") == ["crate_base", "crate_large", "crate_small", "crate_tiny"]
    with torch.device("meta"):
        model = headgate.create_model("crate_small", num_classes=10, depth=2)
    assert (model.num_features, len(model.layers), model.num_classes) == (576, 2, 10)
    assert model.layers[0][0].fn.head_dim == 48
    assert headgate.CRATE is CRATE


def test_a_layer_costs_what_the_paper_says() -> None:
    # Attention N² d twice (weights and values) and 2 N d² (projection, output), ISTA 3 N d²; 12 N d² in a ViT's layer.
    from torch.utils.flop_counter import FlopCounterMode

    model, x = small(image_size=16, dim=24, depth=1, heads=3, num_classes=0).eval(), images(1, 3, 16, 16)
    tokens = model._embed(x)
    with FlopCounterMode(display=False) as counter, nn.attention.sdpa_kernel(nn.attention.SDPBackend.MATH):
        model.layers[0](tokens)
    count = 17
    assert counter.get_total_flops() == 2 * (2 * count**2 * 24 + 2 * count * 24**2 + 3 * count * 24**2)


def test_a_saved_model_comes_back_as_it_was(tmp_path: Path) -> None:
    model = small(image_size=(8, 12), lambd=0.2, expansion=2).eval()
    model.reset_classifier(7, pool="mean")
    model.save_pretrained(tmp_path)
    back = CRATE.from_pretrained(tmp_path)
    assert not back.training
    assert (back.num_classes, back.pool, back.grid, back.layers[0][1].fn.lambd) == (7, "mean", (2, 3), 0.2)
    assert torch.equal(back(images(2, 3, 8, 12)), model(images(2, 3, 8, 12)))
    assert json.loads((tmp_path / "config.json").read_text())["expansion"] == 2


def test_weights_of_another_size_are_refused(tmp_path: Path) -> None:
    small().save_pretrained(tmp_path)
    with pytest.raises(DataError, match="does not fit CRATE"):
        CRATE.from_pretrained(tmp_path, depth=3)


# --- reports --------------------------------------------------------------------------------------------------------


def test_a_report_reads_the_projections_and_outputs_of_every_layer() -> None:
    model, x = small(depth=3), images(4, 3, 8, 8)
    report = layerwise_report(model, x)
    model.eval()
    z = model._embed(x)
    assert list(report.rows) == ["layer 1", "layer 2", "layer 3"]
    for layer, row in zip(model.layers, report.rows.values(), strict=True):
        rates = projected_coding_rate(layer[0].fn.project(layer[0].norm(z)).detach())
        z = layer(z)
        assert row.coding_rate == pytest.approx(float(rates.mean()), rel=1e-5)
        assert row.zeros == pytest.approx(float((z == 0).float().mean()), rel=1e-5)


def test_measures_have_the_names_of_the_paper_at_the_top() -> None:
    z = images(2, 9, 6)
    w = z.unflatten(-1, (3, 2)).transpose(1, 2)
    bases = torch.eye(6).unflatten(1, (3, 2)).permute(1, 0, 2)
    torch.testing.assert_close(
        headgate.subspace_coding_rate(z, bases, 0.01, normalize=True), headgate.projected_coding_rate(w)
    )
    torch.testing.assert_close(headgate.coding_rate(w).sum(1), headgate.projected_coding_rate(w))
    reduction = headgate.sparse_rate_reduction(z, bases, lambd=0.0)
    torch.testing.assert_close(reduction.objective, reduction.rate - reduction.subspace_rate)
    assert headgate.zero_share(z.relu()).shape == (2,)


# --- published weights ----------------------------------------------------------------------------------------------


def test_names_are_the_published_ones() -> None:
    names = {name for name in build_crate(PUBLISHED).state_dict() if "layers.1" not in name}
    layer = {"0.norm.weight", "0.norm.bias", "0.fn.qkv.weight", "0.fn.to_out.0.weight", "0.fn.to_out.0.bias"}
    layer |= {"1.norm.weight", "1.norm.bias", "1.fn.weight"}
    embedding = {f"to_patch_embedding.{i}.{kind}" for i in (1, 2, 3) for kind in ("weight", "bias")}
    head = {f"mlp_head.{i}.{kind}" for i in (0, 1) for kind in ("weight", "bias")}
    assert names == {"pos_embedding", "cls_token", *embedding, *head, *(f"transformer.layers.0.{n}" for n in layer)}


@pytest.mark.parametrize("wrapper", [None, "state_dict", "model"])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_weights_load_out_of_their_wrapping(wrapper: str | None, prefix: str) -> None:
    torch.manual_seed(1)
    source = build_crate(PUBLISHED)
    state: dict[str, Any] = {prefix + name: value for name, value in source.state_dict().items()}
    if wrapper:
        state = {wrapper: state, "epoch": 3}
    model = build_crate(PUBLISHED)
    model.load_state_dict(convert_state_dict(state))
    x = images(2, 3, 16, 16)
    assert torch.equal(model(x), source(x))


@pytest.mark.parametrize(
    "name", ["blocks.0.attn.qkv.weight", "transformer.layers.0.1.fn.bias", "to_patch_embedding.0.weight", "epoch"]
)
def test_a_weight_that_has_no_place_is_refused_by_name(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name!r} is no weight of a published CRATE"):
        convert_state_dict({name: torch.zeros(2)})


def test_published_keywords_build_the_model() -> None:
    model = build_crate(
        {
            **PUBLISHED,
            "channels": 1,
            "ista": 0.3,
            "pool": "mean",
            "emb_dropout": 0.2,
            "dropout": 0.1,
            "patch_size": [4, 4],
        }
    )
    assert (model.in_chans, model.pool, model.dropout.p, model.patch_size) == (1, "mean", 0.2, 4)
    assert (model.layers[0][1].fn.step_size, model.layers[0][0].fn.dropout) == (0.3, 0.1)
    assert model.layers[1][1].fn.lambd == 0.1
    # The published default, whatever the width.
    assert build_crate({k: v for k, v in PUBLISHED.items() if k != "dim_head"}).layers[0][0].fn.head_dim == 64
    with pytest.raises(ValueError, match="CRATE has no keyword 'img_size'"):
        build_crate({**PUBLISHED, "img_size": 16})
    with pytest.raises(ValueError, match="CRATE needs the keyword 'heads'"):
        build_crate({k: v for k, v in PUBLISHED.items() if k != "heads"})
    with pytest.raises(ValueError, match=r"patch_size must be square, got \(4, 2\)"):
        build_crate({**PUBLISHED, "patch_size": (4, 2)})


# --- recipes --------------------------------------------------------------------------------------------------------


def test_the_published_schedule_rises_and_falls_at_once_by_epochs() -> None:
    factor = RECIPES["imagenet"].schedule(steps_per_epoch=10)
    assert [factor(step) for step in (0, 9, 10, 30)] == pytest.approx([1 / 20, 1 / 20, 2 / 20, 4 / 20])
    assert factor(10 * 100) == pytest.approx(0.5)
    # In epoch 19 the rise has come to 1, and the cosine has begun to fall.
    assert factor(10 * 19) == pytest.approx((1 + math.cos(math.pi * 19 / 200)) / 2)
    assert factor(10 * 200) == factor(10**6) == pytest.approx(0)
    cosine = RECIPES["small_images"].schedule(5)
    assert cosine(0) == cosine(4) == 1
    assert cosine(5 * 50) == pytest.approx((1 + math.cos(math.pi / 4)) / 2)
    with pytest.raises(ValueError, match="steps_per_epoch must be positive"):
        RECIPES["imagenet"].schedule(0)


def test_recipes_are_those_of_readme_paper_and_script() -> None:
    main, paper, tuning = RECIPES["imagenet"], RECIPES["imagenet_paper"], RECIPES["small_images"]
    assert (main.kind, main.learning_rate, main.weight_decay, main.batch_size, main.epochs) == (
        "lion",
        2e-4,
        0.05,
        512,
        200,
    )
    assert (paper.learning_rate, paper.weight_decay, paper.batch_size, paper.epochs) == (2.4e-4, 0.5, 2048, 150)
    assert (main.warmup_epochs, paper.warmup_epochs, main.label_smoothing, paper.label_smoothing) == (20, 5, 0.1, 0.1)
    assert (tuning.kind, tuning.learning_rate, tuning.weight_decay, tuning.batch_size) == ("adamw", 5e-5, 0.01, 256)
    assert (RECIPES["fine_grained"].learning_rate, RECIPES["fine_grained"].epochs) == (1e-4, 400)
    assert (tuning.rand_augment_operations, tuning.rand_augment_magnitude) == (2, pytest.approx(10 * 14 / 30))


@pytest.mark.parametrize("name", ["imagenet", "small_images"])
def test_a_recipe_s_optimizer_decays_every_trainable_parameter(name: str) -> None:
    model = small()
    model.layers[0].requires_grad_(False)
    optimizer = RECIPES[name].optimizer(model, learning_rate=0.01)
    assert isinstance(optimizer, Lion if name == "imagenet" else torch.optim.AdamW)
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in model.parameters() if p.requires_grad}
    for group in optimizer.param_groups:
        assert (group["lr"], group["weight_decay"]) == (0.01, RECIPES[name].weight_decay)
    assert RECIPES[name].optimizer(model).param_groups[0]["lr"] == RECIPES[name].learning_rate


def test_a_dictionary_of_the_tiny_preset_has_its_published_size() -> None:
    with torch.device("meta"):
        tiny, other = crate_tiny(), crate_small()
    assert all(layer[1].fn.weight.shape == (384, 384) for layer in tiny.layers)
    assert isinstance(other.layers[0][1].fn, ISTA)
    assert (len(tiny.layers), tiny.layers[0][0].fn.head_dim, tiny.patch_size, tiny.grid) == (12, 64, 16, (14, 14))

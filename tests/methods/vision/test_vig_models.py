"""ViG and ViG-H: the papers' tables, any image size, feature maps, classifiers, files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import headgate
from headgate.errors import DataError
from headgate.methods.vision.vig import RECIPES, BidirectionalGLA, Recipe, ViG, ViGH, count_multiply_adds
from headgate.methods.vision.vig.backbone import Backbone
from headgate.methods.vision.vig.feed_forward import SwiGLU
from headgate.nn import swiglu_size
from headgate.nn.patch_embedding import resize_positions

PRESETS = ("vig_tiny", "vig_small", "vig_base", "vig_h_tiny", "vig_h_small", "vig_h_base")


def images(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def plain(**options: Any) -> ViG:
    torch.manual_seed(0)
    return ViG(**{"dim": 12, "depth": 2, "img_size": 32, "num_classes": 5, "mlp_dim": 16, **options})


def hierarchical(**options: Any) -> ViGH:
    torch.manual_seed(0)
    return ViGH(**{"dim": 8, "depths": (1, 2, 1), "num_heads": (1, 2, 2), "num_classes": 5, **options})


def on_meta(name: str, **options: Any) -> Any:
    with torch.device("meta"):
        return headgate.create_model(name, **options)


# --- the papers' tables ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("preset", "size", "full", "published"),
    [
        ("vig_tiny", 224, 1.20, 0.97),
        ("vig_small", 224, 4.54, 3.61),
        ("vig_base", 224, 17.66, 13.96),
        ("vig_tiny", 1024, 25.0, 20.2),
    ],
)
def test_multiply_adds_are_those_of_the_tables(preset: str, size: int, full: float, published: float) -> None:
    model = on_meta(preset)
    digits = 1 if size == 1024 else 2
    assert round(count_multiply_adds(model, size) / 1e9, digits) == full
    assert round(count_multiply_adds(model, size, as_published=True) / 1e9, digits) == published


def test_multiply_adds_of_a_block_follow_the_formula() -> None:
    one, two = (count_multiply_adds(plain(depth=depth, dim=24), (32, 48)) for depth in (1, 2))
    dim, tokens, heads, key, value = 24, 6, 3, 4, 8
    scans = 2 * 3 * heads * key * value
    assert two - one == tokens * (4 * dim**2 + 32 * dim + 9 * dim + scans + 3 * dim * 16)
    unseen = count_multiply_adds(plain(dim=24), (32, 48)) - count_multiply_adds(
        plain(dim=24), (32, 48), as_published=True
    )
    assert unseen == 2 * tokens * dim * 16


def test_counting_leaves_a_model_as_it_was() -> None:
    model = plain().eval()
    before = model(images(1, 3, 32, 32))
    count_multiply_adds(model, 64)
    torch.testing.assert_close(model(images(1, 3, 32, 32)), before, rtol=0, atol=0)
    assert not any(module._forward_hooks for module in model.modules())


def test_cost_grows_with_the_pixels_alone() -> None:
    model = on_meta("vig_tiny", num_classes=0)
    assert count_multiply_adds(model, 448) == 4 * count_multiply_adds(model, 224)


def test_the_tiny_preset_is_no_small_one_of_other_width() -> None:
    for name, activation, dim, heads in (
        ("vig_tiny", "silu", 192, 3),
        ("vig_small", None, 384, 6),
        ("vig_base", None, 768, 12),
    ):
        model = on_meta(name)
        mixers = [module for module in model.modules() if isinstance(module, BidirectionalGLA)]
        assert len(mixers) == 12
        assert {(mixer.conv_act, mixer.out_act) for mixer in mixers} == {(activation, activation)}
        assert {(mixer.dim, mixer.num_heads, mixer.key_dim) for mixer in mixers} == {(dim, heads, dim // 2)}


@pytest.mark.parametrize(
    ("dim", "multiple", "size"),
    [(192, 256, 512), (384, 256, 1024), (768, 256, 2048), (96, 32, 256), (128, 32, 352), (1024, 32, 2752)],
)
def test_inner_sizes_are_those_of_the_tables(dim: int, multiple: int, size: int) -> None:
    assert swiglu_size(dim, multiple=multiple) == size


def test_drop_path_rises_linearly_from_zero_in_the_first_block() -> None:
    small = on_meta("vig_small")
    assert [block.drop_path.rate for block in small.blocks] == pytest.approx([0.2 * i / 11 for i in range(12)])
    rates = [block.drop_path.rate for stage in on_meta("vig_h_tiny").stages for block in stage.blocks]
    assert rates == pytest.approx([0.2 * i / 10 for i in range(11)])
    assert [block.drop_path.rate for block in plain(depth=1, drop_path_rate=0.3).blocks] == [0.0]


def test_recipes_have_the_effective_rates_and_the_presets_drop_path() -> None:
    base = {
        "vig_tiny": 1e-3,
        "vig_small": 5e-4,
        "vig_base": 1e-3,
        "vig_h_tiny": 8e-4,
        "vig_h_small": 5e-4,
        "vig_h_base": 5e-4,
    }
    assert tuple(RECIPES) == PRESETS
    for name, recipe in RECIPES.items():
        assert recipe.learning_rate == pytest.approx(base[name] * recipe.batch_size / 512)
        last = [module for module in on_meta(name).modules() if hasattr(module, "drop_path")][-1]
        assert last.drop_path.rate == pytest.approx(recipe.drop_path_rate)
        assert recipe.weight_decay == (0.1 if name == "vig_small" else 0.05)


def test_schedule_rises_for_20_epochs_and_falls_to_its_end() -> None:
    recipe = Recipe(2e-3)
    factor = recipe.schedule(10)
    assert factor(0) * 2e-3 == pytest.approx(1e-6)
    assert factor(100) * 2e-3 == pytest.approx((1e-6 + 2e-3) / 2)
    assert factor(200) == 1
    assert factor(1600) * 2e-3 == pytest.approx((2e-3 + 1e-5) / 2)
    assert factor(3000) * 2e-3 == pytest.approx(1e-5)
    assert factor(9999) == factor(3000)


# --- what they compute -----------------------------------------------------------------------------------------------


def test_swiglu_gates_one_half_with_the_other() -> None:
    layer, x = SwiGLU(4, 6).double(), torch.randn(2, 3, 4, dtype=torch.float64)
    gate, value = (x @ weight.T for weight in layer.gate_value.weight.split(6))
    torch.testing.assert_close(layer(x), (gate * torch.sigmoid(gate) * value) @ layer.output.weight.T)


def test_logits_are_those_of_the_mean_token() -> None:
    model = plain().eval()
    tokens = model.forward_features(images(2, 3, 32, 48))
    assert tokens.shape == (2, 6, 12)
    torch.testing.assert_close(model.forward_head(tokens, pre_logits=True), tokens.mean(1))
    torch.testing.assert_close(model(images(2, 3, 32, 48)), model.head(tokens.mean(1)))


def test_hierarchical_logits_are_those_of_the_mean_of_the_last_map() -> None:
    model = hierarchical().eval()
    features = model.forward_features(images(2, 3, 32, 48))
    assert features.shape == (2, 32, 2, 3)
    torch.testing.assert_close(model.forward_head(features, pre_logits=True), features.mean((2, 3)))
    torch.testing.assert_close(model(images(2, 3, 32, 48)), model.head(features.mean((2, 3))))
    torch.testing.assert_close(features.mean(1), torch.zeros(2, 2, 3), atol=1e-5, rtol=0)


def test_without_classes_the_pooled_features_come_back() -> None:
    for model in (plain(num_classes=0).eval(), hierarchical(num_classes=0).eval()):
        x = images(2, 3, 32, 32)
        torch.testing.assert_close(model(x), model.forward_head(model.forward_features(x), pre_logits=True))
        assert model(x).shape == (2, model.num_features)


def test_positions_are_resized_to_the_images_grid_in_raster_order() -> None:
    model = plain(img_size=(32, 48)).eval()
    assert model.grid == (2, 3)
    x = images(1, 3, 64, 32)
    without = plain(img_size=(32, 48), position_embedding=False).eval()
    without.load_state_dict({name: value for name, value in model.state_dict().items() if name != "position_embedding"})
    difference = model._embed(x) - without._embed(x)
    expected = resize_positions(model.position_embedding, (2, 3), (4, 2)).unflatten(1, (4, 2))
    torch.testing.assert_close(difference.permute(0, 2, 3, 1), expected, atol=1e-6, rtol=0)
    assert without.no_weight_decay() == set()
    assert model.no_weight_decay() <= set(dict(model.named_parameters()))


def test_an_image_and_its_transpose_are_different_grids() -> None:
    model = plain().eval()
    x = images(1, 3, 32, 64)
    assert model.forward_features(x).shape == model.forward_features(x.mT).shape
    assert not torch.allclose(model(x), model(x.mT), atol=1e-4)


def test_padding_adds_zeros_below_and_at_the_right() -> None:
    model, padding = plain().eval(), plain(pad_images=True).eval()
    x = images(2, 3, 33, 40)
    torch.testing.assert_close(padding(x), model(F.pad(x, (0, 8, 0, 15))))
    torch.testing.assert_close(padding(x[..., :32, :32]), model(x[..., :32, :32]))
    assert plain(img_size=40, pad_images=True).grid == (3, 3)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((2, 3, 40, 32), "images must be whole patches of 16 pixels high and wide, got 40×32"),
        ((2, 3, 32, 8), "images must be at least 16 pixels high and wide, got 32×8"),
        ((2, 1, 32, 32), "images must have channels=3"),
        ((3, 32, 32), "images must have shape"),
    ],
)
def test_images_that_do_not_fit_are_refused(shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plain()(torch.zeros(shape))


def test_hierarchical_images_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 16 pixels high and wide, got 15×40"):
        hierarchical()(torch.zeros(1, 3, 15, 40))
    with pytest.raises(TypeError, match="images must"):
        hierarchical()(torch.zeros(1, 3, 16, 16, dtype=torch.int64))


@pytest.mark.parametrize(
    ("build", "options", "message"),
    [
        (plain, {"img_size": 40}, "img_size must be whole patches.*pad_images=True"),
        (plain, {"img_size": 8}, "img_size must be at least 16"),
        (plain, {"num_classes": -1}, "num_classes must be 0"),
        (plain, {"out_indices": 1}, "out_indices needs features_only=True"),
        (plain, {"features_only": True, "out_indices": (0, 2)}, "out_indices must name different ones of 2 maps"),
        (plain, {"features_only": True, "out_indices": 3}, "at most the 2 maps"),
        (plain, {"depth": 0}, "depth must be positive"),
        (plain, {"drop_path_rate": 1.5}, r"drop_path_rate must lie in \[0, 1\]"),
        (plain, {"num_heads": 5}, "num_heads must divide key_dim"),
        (hierarchical, {"num_heads": (1, 2)}, "num_heads must hold one number per stage"),
        (hierarchical, {"depths": (1, 0, 1)}, r"depths\[1\] must be positive"),
        (hierarchical, {"dim": 7}, "dim must be even|num_heads must divide"),
        (hierarchical, {"features_only": True, "out_indices": ()}, "out_indices must name"),
    ],
)
def test_options_that_do_not_fit_are_refused(build: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(**options)


# --- starting values -------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_plain_weights_start_as_published() -> None:
    torch.manual_seed(0)
    model = ViG(96, 1, 3, num_classes=50)
    assert float(model.head.weight.std()) == pytest.approx(0.02, rel=0.05)
    assert float(model.blocks[0].mlp.gate_value.weight.std()) == pytest.approx(0.02, rel=0.05)
    assert float(model.position_embedding.std()) == pytest.approx(0.02, rel=0.05)
    bound = 2**-2.5 * (6 / (96 + 192)) ** 0.5
    assert bound * 0.99 < float(model.blocks[0].mixer.qkv.weight.abs().max()) <= bound
    assert not any(
        value.any() for name, value in model.named_parameters() if name.endswith("bias") and "patch" not in name
    )
    assert all(
        (value == 1).all() for name, value in model.named_parameters() if "norm" in name and name.endswith("weight")
    )


@torch.no_grad()
def test_hierarchical_weights_start_as_published() -> None:
    torch.manual_seed(0)
    mixer = ViGH(96, (1,), (3,), num_classes=50).stages[0].blocks[0].mixer
    for linear in (mixer.qkv, mixer.mix, mixer.output, mixer.log_gate.down, mixer.log_gate.up):
        assert float(linear.weight.std()) == pytest.approx(0.02, rel=0.1)
        assert float(linear.weight.abs().max()) > 0.05  # no uniform distribution
    bound = 2**-2.5 * (6 / (9 + 9 * 96)) ** 0.5
    assert 0 < float(mixer.conv.weight.abs().max()) <= bound


# --- feature maps ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "sides"), [((64, 96), [(16, 24), (8, 12), (4, 6), (2, 3)]), ((70, 33), [(18, 9), (9, 5), (5, 3), (3, 2)])]
)
def test_a_pyramid_has_strides_4_to_32_rounded_up(size: tuple[int, int], sides: list[tuple[int, int]]) -> None:
    model = on_meta("vig_h_tiny", features_only=True)
    maps = model(torch.empty(2, 3, *size, device="meta"))
    assert [tuple(level.shape) for level in maps] == [(2, 96 * 2**s, *side) for s, side in enumerate(sides)]
    assert model.dims == [96, 192, 384, 768]


def without_classifier(model: nn.Module) -> dict[str, Tensor]:
    return {name: value for name, value in model.state_dict().items() if not name.startswith(("norm.", "head."))}


def test_features_only_returns_the_maps_of_a_classifier_with_equal_weights() -> None:
    for build, size in ((plain, (32, 48)), (hierarchical, (20, 36))):
        classifier, backbone = build().eval(), build(features_only=True).eval()
        backbone.load_state_dict(without_classifier(classifier))
        x = images(2, 3, *size)
        features, maps = classifier.forward_intermediates(x)
        torch.testing.assert_close(features, classifier.forward_features(x))
        for ours, theirs in zip(backbone(x), maps, strict=True):
            torch.testing.assert_close(ours, theirs)
        assert maps[-1].shape[0] == 2


def test_the_normed_last_map_is_what_the_classifier_reads() -> None:
    model, x = plain().eval(), images(2, 3, 32, 48)
    features, maps = model.forward_intermediates(x, [0])
    assert len(maps) == 1
    (last,) = model.forward_intermediates(x, 1, intermediates_only=True)
    assert last.shape == (2, 12, 2, 3)
    torch.testing.assert_close(model.norm(last.flatten(2).mT), features)


def test_maps_are_chosen_by_position_from_either_end() -> None:
    model, x = hierarchical().eval(), images(1, 3, 32, 32)
    every = model.forward_maps(x)
    assert [level.shape[1] for level in every] == [8, 16, 32]
    for chosen, expected in (([0, -1], [0, 2]), ([2, 1], [1, 2]), (2, [1, 2]), ((1,), [1])):
        for ours, index in zip(model.forward_maps(x, chosen), expected, strict=True):
            torch.testing.assert_close(ours, every[index])
    for wrong in ([3], [1, -2], 0, []):
        with pytest.raises(ValueError, match="indices must"):
            model.forward_maps(x, wrong)


def test_a_backbone_of_early_maps_has_no_later_parts() -> None:
    assert len(plain(depth=4, features_only=True, out_indices=(1,)).blocks) == 2
    model = hierarchical(features_only=True, out_indices=(0, 1))
    assert len(model.stages) == 2
    assert model.dims == [8, 16]
    # The depth of the whole model sets the rates of what is left.
    rates = [
        block.drop_path.rate
        for block in plain(depth=4, drop_path_rate=0.3, features_only=True, out_indices=(1,)).blocks
    ]
    assert rates == pytest.approx([0, 0.1])


@pytest.mark.parametrize(("depth", "indices"), [(12, [2, 5, 8, 11]), (4, [0, 1, 2, 3]), (2, [0, 1]), (1, [0])])
def test_plain_maps_come_from_the_ends_of_the_quarters(depth: int, indices: list[int]) -> None:
    with torch.device("meta"):
        assert ViG(12, depth, features_only=True).out_indices == indices


# --- classifiers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("build", [plain, hierarchical])
def test_a_fresh_classifier_has_the_models_dtype_and_the_published_start(build: Any) -> None:
    model = build().double().eval()
    x = images(2, 3, 32, 32).double()
    tokens = model.forward_features(x)
    model.reset_classifier(400)
    assert model.num_classes == 400
    assert model.get_classifier().weight.dtype == torch.float64
    assert float(model.get_classifier().weight.detach().std()) == pytest.approx(0.02, rel=0.05)
    assert not model.get_classifier().bias.any()
    torch.testing.assert_close(model.forward_features(x), tokens)
    assert model(x).shape == (2, 400)
    model.reset_classifier(0)
    torch.testing.assert_close(model(x), model.forward_head(tokens, pre_logits=True))


def test_a_classifier_needs_classes_and_a_model_that_has_one() -> None:
    with pytest.raises(ValueError, match="num_classes must be 0 or more"):
        plain().reset_classifier(-1)
    with pytest.raises(ValueError, match="for a model with a classifier"):
        hierarchical(features_only=True).reset_classifier(5)


# --- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("build", [plain, hierarchical])
def test_a_saved_model_comes_back_as_it_was(build: Any, tmp_path: Path) -> None:
    model = build(conv_act="silu", drop_path_rate=0.1).eval()
    model.reset_classifier(7)
    model.save_pretrained(tmp_path)
    back = type(model).from_pretrained(tmp_path)
    assert not back.training
    assert back.num_classes == 7
    x = images(2, 3, 32, 48)
    assert torch.equal(back(x), model(x))
    assert json.loads((tmp_path / "config.json").read_text())["conv_act"] == "silu"


def test_arguments_may_be_changed_on_loading(tmp_path: Path) -> None:
    hierarchical(features_only=True, drop_path_rate=0.1).save_pretrained(tmp_path)
    back = ViGH.from_pretrained(tmp_path, drop_path_rate=0.4)
    assert back.stages[-1].blocks[-1].drop_path.rate == pytest.approx(0.4)


def test_weights_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    plain().save_pretrained(tmp_path)
    with pytest.raises(DataError, match="does not fit ViG"):
        ViG.from_pretrained(tmp_path, num_classes=6)


def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    plain().save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(DataError, match="no whole safetensors file"):
        ViG.from_pretrained(tmp_path)


def test_a_folder_without_safetensors_is_refused_and_nothing_is_unpickled(tmp_path: Path) -> None:
    model = plain()
    model.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(DataError, match=r"must hold model\.safetensors"):
        ViG.from_pretrained(tmp_path)


def test_presets_are_backbones_by_name() -> None:
    assert set(PRESETS) <= set(headgate.list_models("vig*"))
    assert all(isinstance(on_meta(name), Backbone) for name in PRESETS)

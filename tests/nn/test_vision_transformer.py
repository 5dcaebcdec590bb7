"""The vision transformer: published sizes, what a block computes, other image sizes, and timm's conventions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from headgate.nn import (
    ExplicitAttention,
    FeedForward,
    MultiHeadAttention,
    TransformerBlock,
    VisionTransformer,
    deit_base,
    deit_small,
    deit_tiny,
)
from headgate.nn.patch_embedding import resize_positions
from headgate.train import count_parameters, make_optimizer


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def small(**options: Any) -> VisionTransformer:
    """Two blocks on a grid of 2 × 3 patches of 4 pixels, with random weights everywhere."""
    torch.manual_seed(0)
    settings = {"dim": 12, "depth": 2, "num_heads": 3, "img_size": (8, 12), "patch_size": 4, "in_chans": 2}
    model = VisionTransformer(**{**settings, "num_classes": 5, **options}).double()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model


@pytest.mark.parametrize(
    ("build", "dim", "parameters", "published"),
    [(deit_tiny, 192, 5_717_416, 1.3), (deit_small, 384, 22_050_664, 4.6), (deit_base, 768, 86_567_656, 17.6)],
)
def test_deit_has_the_published_size(
    build: Callable[..., VisionTransformer], dim: int, parameters: int, published: float
) -> None:
    with torch.device("meta"):
        model, images = build(), torch.empty(1, 3, 224, 224)
    assert count_parameters(model) == parameters
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        assert model(images).shape == (1, 1000)
    blocks = 12 * (12 * 197 * dim**2 + 2 * 197**2 * dim)
    assert counter.get_total_flops() == 2 * (blocks + 196 * 768 * dim + 1000 * dim)
    assert round(counter.get_total_flops() / 2e9, 1) == published


def test_explicit_attention_gives_the_values_and_gradients_of_fused_attention() -> None:
    torch.manual_seed(0)
    fused, explicit = MultiHeadAttention(12, 3).double(), ExplicitAttention(12, 3).double()
    explicit.load_state_dict(fused.state_dict())
    x = normal(2, 7, 12).requires_grad_()
    y = normal(2, 7, 12).requires_grad_()
    with torch.no_grad():
        y.copy_(x)
    torch.testing.assert_close(explicit(x), fused(y))
    (explicit(x) * normal(2, 7, 12, seed=1)).sum().backward()
    (fused(y) * normal(2, 7, 12, seed=1)).sum().backward()
    torch.testing.assert_close(x.grad, y.grad)
    torch.testing.assert_close(explicit.qkv.weight.grad, fused.qkv.weight.grad)


def test_the_weights_are_those_that_the_output_is_made_of() -> None:
    torch.manual_seed(0)
    layer = ExplicitAttention(12, 3).double()
    x = normal(2, 7, 12)
    weights = layer.weights(x)
    assert weights.shape == (2, 3, 7, 7)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 3, 7, dtype=torch.float64))
    q, k, v = layer.qkv(x).chunk(3, dim=-1)
    for head, row in ((0, 0), (2, 5)):
        part = slice(4 * head, 4 * head + 4)
        expected = torch.softmax(k[1, :, part] @ q[1, row, part] / 2, dim=0)
        torch.testing.assert_close(weights[1, head, row], expected)
    mixed = torch.einsum("bhij,bjhd->bihd", weights, v.unflatten(-1, (3, 4))).flatten(2)
    torch.testing.assert_close(layer(x), layer.out_proj(mixed))


def test_explicit_attention_drops_weights_in_training_alone() -> None:
    torch.manual_seed(0)
    layer = ExplicitAttention(8, 2, dropout=0.999).double()
    x = normal(1, 64, 8)
    alone = layer.out_proj.bias.expand(64, 8)
    kept = (layer(x)[0] - alone).abs().sum(-1) > 1e-12
    assert kept.sum() < 20
    layer.eval()
    assert ((layer(x)[0] - alone).abs().sum(-1) > 1e-12).all()


def test_a_block_is_that_of_pytorch_with_the_norms_first() -> None:
    torch.manual_seed(0)
    block = TransformerBlock(12, MultiHeadAttention(12, 3), FeedForward(12, 20)).double()
    theirs = nn.TransformerEncoderLayer(12, 3, 20, 0.0, "gelu", 1e-6, batch_first=True, norm_first=True).double()
    theirs.load_state_dict(
        {
            "self_attn.in_proj_weight": block.mixer.qkv.weight,
            "self_attn.in_proj_bias": block.mixer.qkv.bias,
            "self_attn.out_proj.weight": block.mixer.out_proj.weight,
            "self_attn.out_proj.bias": block.mixer.out_proj.bias,
            "linear1.weight": block.mlp.fc1.weight,
            "linear1.bias": block.mlp.fc1.bias,
            "linear2.weight": block.mlp.fc2.weight,
            "linear2.bias": block.mlp.fc2.bias,
            "norm1.weight": block.mixer_norm.weight,
            "norm1.bias": block.mixer_norm.bias,
            "norm2.weight": block.mlp_norm.weight,
            "norm2.bias": block.mlp_norm.bias,
        }
    )
    x = normal(2, 7, 12)
    torch.testing.assert_close(block(x), theirs(x))


def test_a_block_drops_whole_branches_of_an_image() -> None:
    torch.manual_seed(0)
    block = TransformerBlock(8, MultiHeadAttention(8, 2), FeedForward(8), drop_path=0.5).double()
    x = normal(200, 3, 8)
    whole = block.eval()(x)
    dropped = block.train()(x)
    untouched = (dropped == x).flatten(1).all(1)
    assert 25 <= int(untouched.sum()) <= 75  # both branches with probability 1/4
    assert not torch.allclose(dropped[~untouched], whole[~untouched])


def test_tokens_are_patches_in_raster_order_with_their_positions() -> None:
    model = small(class_token=False)
    images = normal(2, 2, 8, 12)
    weight = model.patch_embedding.weight.flatten(1)
    tokens = model._embed(images)
    assert tokens.shape == (2, 6, 12)
    for row, column in ((0, 0), (0, 2), (1, 1)):
        patch = images[1, :, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4].flatten()
        expected = weight @ patch + model.patch_embedding.bias + model.position_embedding[0, 3 * row + column]
        torch.testing.assert_close(tokens[1, 3 * row + column], expected)


@pytest.mark.parametrize("class_position", [False, True])
def test_the_class_token_stands_first_and_the_classifier_reads_it(class_position: bool) -> None:
    model = small(class_position=class_position)
    images = normal(2, 2, 8, 12)
    first = model._embed(images)[:, 0]
    expected = model.class_token[0] + (model.position_embedding[:, 0] if class_position else 0)
    torch.testing.assert_close(first, expected.expand(2, 12))
    assert model.position_embedding.shape == (1, 7 if class_position else 6, 12)
    features = model.forward_features(images)
    assert features.shape == (2, 7, 12)
    torch.testing.assert_close(model.forward_head(features, pre_logits=True), features[:, 0])
    torch.testing.assert_close(model(images), model.head(features[:, 0]))


@pytest.mark.parametrize("class_token", [False, True])
def test_average_pooling_is_over_the_patches_alone(class_token: bool) -> None:
    model = small(class_token=class_token, global_pool="avg")
    features = model.forward_features(normal(2, 2, 8, 12))
    patches = features[:, 1:] if class_token else features
    assert patches.shape[1] == 6
    torch.testing.assert_close(model.forward_head(features, pre_logits=True), patches.mean(1))


def test_without_positions_patches_could_change_places() -> None:
    model = small(class_token=False)
    images = normal(1, 2, 8, 12)
    swapped = torch.cat([images[..., 8:], images[..., 4:8], images[..., :4]], dim=-1)
    assert not torch.allclose(model(images), model(swapped))
    nn.init.zeros_(model.position_embedding)
    torch.testing.assert_close(model(images), model(swapped))


@pytest.mark.parametrize("class_position", [False, True])
def test_positions_of_patches_are_resized_for_other_images(class_position: bool) -> None:
    model = small(class_position=class_position)
    images = normal(2, 2, 16, 20)
    tokens = model._embed(images)
    assert tokens.shape == (2, 1 + 4 * 5, 12)
    positions = resize_positions(model.position_embedding[:, int(class_position) :], (2, 3), (4, 5))
    patches = model.patch_embedding(images).flatten(2).transpose(1, 2)
    torch.testing.assert_close(tokens[:, 1:], patches + positions)
    torch.testing.assert_close(tokens[:, 0], model._embed(normal(2, 2, 8, 12))[:, 0])


def test_a_pixel_can_be_a_token() -> None:
    model = VisionTransformer(12, 1, 3, img_size=4, patch_size=1, in_chans=1, num_classes=3)
    assert model.forward_features(torch.rand(2, 1, 4, 4)).shape == (2, 17, 12)


def test_maps_are_the_blocks_outputs_without_class_token_and_norm() -> None:
    model = small(depth=3)
    images = normal(2, 2, 8, 12)
    outputs: list[Tensor] = []
    for block in model.blocks:
        block.register_forward_hook(lambda module, inputs, output: outputs.append(output))
    features, maps = model.forward_intermediates(images)
    assert [tuple(level.shape) for level in maps] == 3 * [(2, 12, 2, 3)]
    for level, output in zip(maps, outputs, strict=True):
        torch.testing.assert_close(level[1, :, 1, 2], output[1, 1 + 5])
    torch.testing.assert_close(features, model.forward_features(images))
    torch.testing.assert_close(F.layer_norm(outputs[2], (12,), model.norm.weight, model.norm.bias, 1e-6), features)


def test_maps_can_be_chosen_and_nothing_behind_the_last_is_computed() -> None:
    model = small(depth=4)
    images = normal(2, 2, 8, 12)
    every = model.forward_maps(images)
    assert len(every) == 4
    for indices, expected in ((2, [2, 3]), ([-3, 0], [0, 1]), ([1], [1])):
        chosen = model.forward_maps(images, indices)
        assert len(chosen) == len(expected)
        for level, index in zip(chosen, expected, strict=True):
            torch.testing.assert_close(level, every[index])
    features, chosen = model.forward_intermediates(images, [1])
    torch.testing.assert_close(chosen[0], every[1])
    torch.testing.assert_close(features, model.forward_features(images))
    model.blocks[2].forward = None
    assert len(model.forward_maps(images, [1])) == 1


@pytest.mark.parametrize("indices", [0, 5, [], [0, 0], [0, -4], [4], [-5]])
def test_maps_that_do_not_exist_are_refused(indices: Any) -> None:
    with pytest.raises(ValueError, match=r"indices must .* 4 blocks"):
        small(depth=4).forward_maps(normal(1, 2, 8, 12), indices)


def test_explicit_attention_changes_the_cost_and_not_the_model() -> None:
    fused, explicit = small(), small(explicit_attention=True)
    explicit.load_state_dict(fused.state_dict())
    images = normal(2, 2, 8, 12)
    torch.testing.assert_close(explicit(images), fused(images))
    assert all(isinstance(block.mixer, ExplicitAttention) for block in explicit.blocks)


def test_a_new_classifier_has_the_new_classes_and_leaves_the_rest_alone() -> None:
    model = small()
    images = normal(2, 2, 8, 12)
    features = model.forward_features(images)
    model.reset_classifier(7)
    assert model.num_classes == 7
    assert model.get_classifier() is model.head
    assert model(images).shape == (2, 7)
    assert model.head.weight.dtype == torch.float64
    torch.testing.assert_close(model.forward_features(images), features)
    model.reset_classifier(0, global_pool="avg")
    torch.testing.assert_close(model(images), features[:, 1:].mean(1))
    assert model.num_features == model.embed_dim == 12


def test_drop_path_rises_linearly_from_zero() -> None:
    model = small(depth=4, drop_path_rate=0.3)
    assert [block.drop_path.rate for block in model.blocks] == pytest.approx([0, 0.1, 0.2, 0.3])
    assert small(depth=1, drop_path_rate=0.3).blocks[0].drop_path.rate == 0


def test_weights_start_as_deit_does() -> None:
    torch.manual_seed(0)
    model = VisionTransformer(96, 2, 3, img_size=64)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            assert torch.equal(parameter, torch.full_like(parameter, float(name.endswith("weight"))))
        elif "patch_embedding" in name:
            assert parameter.abs().max() <= (3 * 16 * 16) ** -0.5 + 1e-6
        elif name.endswith("bias"):
            assert not parameter.any()
        else:
            assert parameter.std().item() == pytest.approx(0.02, rel=0.15), name


def test_parameters_without_decay_are_those_that_are_no_weights() -> None:
    model = small()
    assert model.no_weight_decay() == {"position_embedding", "class_token"}
    assert small(class_token=False).no_weight_decay() == {"position_embedding"}
    overrides = {name: {"weight_decay": 0.0} for name in model.no_weight_decay()}
    groups = make_optimizer(model, weight_decay=0.1, overrides=overrides).param_groups
    decayed = {id(p) for group in groups if group["weight_decay"] for p in group["params"]}
    assert {name for name, p in model.named_parameters() if id(p) in decayed} == {
        name for name, p in model.named_parameters() if p.dim() > 1 and "embedding.p" not in name
    } - model.no_weight_decay()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"img_size": 30}, "img_size must be whole patches of 4 pixels high and wide, got 30×30"),
        ({"num_heads": 5}, "num_heads must divide dim"),
        ({"class_token": False, "global_pool": "token"}, "global_pool='token' needs class_token=True"),
        ({"global_pool": "max"}, "global_pool must be 'token' or 'avg', got 'max'"),
        ({"num_classes": -1}, "num_classes must be 0"),
        ({"depth": 0}, "depth must be positive"),
        ({"patch_size": 0}, "patch_size must be positive"),
        ({"drop_path_rate": 1.5}, r"drop_path_rate must lie in \[0, 1\]"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small(**options)


def test_images_that_do_not_fit_are_refused() -> None:
    model = small()
    with pytest.raises(ValueError, match="images must be whole patches of 4 pixels high and wide, got 8×3"):
        model(normal(1, 2, 8, 3))
    with pytest.raises(ValueError, match="channels=2"):
        model(normal(1, 3, 8, 12))
    with pytest.raises(ValueError, match="num_classes must be 0"):
        model.reset_classifier(-2)
    with pytest.raises(ValueError, match="needs class_token=True"):
        small(class_token=False).reset_classifier(2, global_pool="token")

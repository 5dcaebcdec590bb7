"""Encoders with anchors, the head, autoencoders, stitching, official state dicts, presets."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from headgate.methods.contrastive.relative_representations import (
    AbsoluteAutoencoder,
    RelativeAttention,
    RelativeAutoencoder,
    RelativeEncoder,
    RelativeProjection,
    RelativeQuantizer,
    StitchedAutoencoder,
    StitchingHead,
    SubspaceRelativeAttention,
    relative_distance,
    stitch,
)
from headgate.methods.contrastive.relative_representations.official import (
    convert_autoencoder,
    convert_head,
    convert_state_dict,
)
from headgate.presets import create_model

K = 5


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


INPUTS, ANCHORS = normal(4, 3), normal(K, 3, seed=1)


# --- end to end -----------------------------------------------------------------------------------------------------


def test_an_encoder_compares_with_its_anchors_as_they_are_now() -> None:
    encoder = nn.Linear(3, 6)
    model = RelativeEncoder(encoder, ANCHORS, 6)
    for _ in range(2):
        torch.testing.assert_close(model(INPUTS), RelativeAttention(K, 6)(encoder(INPUTS), encoder(ANCHORS)))
        nn.init.normal_(encoder.weight)


def test_gradients_flow_through_the_items_alone() -> None:
    encoder = nn.Linear(3, 6)
    model = RelativeEncoder(encoder, ANCHORS, 6)
    model(INPUTS).square().sum().backward()
    found = encoder.weight.grad.clone()
    encoder.zero_grad()
    frozen = encoder(ANCHORS).detach()
    RelativeAttention(K, 6)(encoder(INPUTS), frozen).square().sum().backward()
    torch.testing.assert_close(found, encoder.weight.grad)


def test_anchors_are_encoded_in_every_nth_step_of_training_and_always_in_evaluation() -> None:
    encoder = nn.Linear(3, 6)
    model = RelativeEncoder(encoder, ANCHORS, 6, refresh=3)
    seen = []
    for _ in range(7):
        seen.append(model.embed_anchors().clone())
        nn.init.normal_(encoder.weight)
    same = [torch.equal(a, b) for a, b in itertools.pairwise(seen)]
    assert same == [True, True, False, True, True, False]
    torch.testing.assert_close(model.eval().embed_anchors(), encoder(ANCHORS))
    assert "latents" not in model.state_dict()
    copy.deepcopy(model)


def test_anchors_go_through_dropout_and_batch_statistics_only_where_that_is_wanted() -> None:
    encoder = nn.Sequential(nn.Linear(3, 6), nn.BatchNorm1d(6), nn.Dropout(0.5))
    current = RelativeEncoder(encoder, ANCHORS, 6).train()
    assert not torch.equal(current.embed_anchors(), current.embed_anchors())
    quiet = RelativeEncoder(encoder, ANCHORS, 6, anchor_mode="eval").train()
    before = encoder[1].running_mean.clone()
    assert torch.equal(quiet.embed_anchors(), quiet.embed_anchors())
    assert torch.equal(encoder[1].running_mean, before)
    assert encoder[2].training


def test_an_encoder_keeps_ids_and_classes_and_takes_subspaces() -> None:
    labels = torch.tensor([0, 1, 2, 0, 1])
    model = RelativeEncoder(
        nn.Linear(3, 6), ANCHORS, 6, anchor_labels=labels, subspaces=2, aggregate="class", num_classes=3
    )
    assert model(INPUTS).shape == (4, 6)
    assert model.out_dim == 6
    assert model.state_dict()["anchor_labels"].tolist() == labels.tolist()
    assert model.anchor_ids.tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"anchor_inputs": ANCHORS.numpy()}, TypeError, "anchor_inputs must be a tensor, got ndarray"),
        ({"anchor_inputs": ANCHORS[:0]}, ValueError, "anchor_inputs must hold at least one anchor"),
        ({"refresh": 0}, ValueError, "refresh must be positive"),
        ({"anchor_mode": "train"}, ValueError, "anchor_mode must be 'current' or 'eval'"),
        ({"anchor_ids": torch.arange(4)}, ValueError, "anchor_ids must have anchors=5"),
        (
            {"anchor_labels": torch.arange(5), "aggregate": "class", "num_classes": 4},
            ValueError,
            r"anchor_labels must lie in \[0, 4\)",
        ),
    ],
)
def test_bad_encoders_are_refused(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        RelativeEncoder(nn.Linear(3, 6), **{"anchor_inputs": ANCHORS, "dim": 6, **arguments})


@pytest.mark.parametrize(
    ("model", "inputs"),
    [
        (AbsoluteAutoencoder((8, 7), 2, 5, (4, 6)), (3, 2, 8, 7)),
        (RelativeAutoencoder((8, 7), 2, K, (4, 6), out_norm="l2", similarity="angular"), (3, 2, 8, 7)),
        (RelativeAutoencoder(8, 2, K, (4, 6), quantizer=RelativeQuantizer("round", 0.1)), (3, 2, 8, 8)),
        (StitchingHead(K, 3, normalize=True), (4, K)),
    ],
)
def test_models_go_to_a_folder_and_come_back_with_their_anchors(model: Any, inputs: Any, tmp_path: Path) -> None:
    if isinstance(model, RelativeAutoencoder):
        model.fit_anchors(normal(K, *inputs[1:], seed=4).sigmoid(), ids=torch.tensor([9, 7, 5, 3, 1]))
    x = normal(*inputs).sigmoid()
    model.eval().save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert torch.equal(again(x), model(x))
    assert again.state_dict().keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor)


# --- the head -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("unit_norm", ["batch", "running", None])
def test_the_head_is_the_paper_s_and_can_do_without_its_batch(unit_norm: Any) -> None:
    torch.manual_seed(0)
    head = StitchingHead(K, 3, normalize=True, unit_norm=unit_norm)
    r = normal(8, K)
    for _ in range(3):
        head(normal(16, K, seed=2))
    head.eval()
    layers = [nn.LayerNorm(K), nn.Linear(K, K), nn.Tanh(), nn.Linear(K, 3)]
    layers[1].load_state_dict(head.hidden.state_dict())
    layers[3].load_state_dict(head.out.state_dict())
    hidden = layers[2](layers[1](layers[0](nn.functional.normalize(r, dim=1))))
    if unit_norm == "batch":
        hidden = nn.InstanceNorm1d(K)(hidden.T).T
    elif unit_norm == "running":
        hidden = (hidden - head.unit_norm.running_mean) / (head.unit_norm.running_var + 1e-5).sqrt()
    torch.testing.assert_close(head(r), layers[3](hidden))
    alone = torch.cat([head(r[:4]), head(r[4:])])
    assert torch.allclose(alone, head(r), atol=1e-6) == (unit_norm != "batch")


def test_bad_heads_are_refused() -> None:
    with pytest.raises(ValueError, match="unit_norm must be 'batch', 'running' or None, got 'layer'"):
        StitchingHead(K, 3, unit_norm="layer")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="num_classes must be positive"):
        StitchingHead(K, 0)


# --- autoencoders ---------------------------------------------------------------------------------------------------


def tiny(seed: int = 0, anchors: Tensor | None = None, **options: Any) -> RelativeAutoencoder:
    torch.manual_seed(seed)
    model = RelativeAutoencoder(8, 1, K, (4, 6), **options)
    given = torch.rand(K, 1, 8, 8, generator=torch.Generator().manual_seed(0)) if anchors is None else anchors
    return model.fit_anchors(given).eval()


IMAGES = torch.rand(3, 1, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("size", [28, 32, (9, 14), (16, 5)])
def test_decoders_restore_every_size(size: Any) -> None:
    model = AbsoluteAutoencoder(size, 2, latent_dim=7, hidden_dims=(3, 4, 5)).eval()
    height, width = (size, size) if isinstance(size, int) else size
    images = torch.rand(2, 2, height, width)
    found = model(images)
    assert found.shape == images.shape
    assert found.min() >= 0
    assert found.max() <= 1
    assert model.encode(images).shape == (2, 7)


def test_kernels_of_the_decoder_are_those_of_the_published_code() -> None:
    with torch.device("meta"):
        grey, colour = AbsoluteAutoencoder(28), AbsoluteAutoencoder(32, 3)
    # 2 → 4 → 7 → 14 → 28 and 2 → 4 → 8 → 16 → 32, stride 2, padding 1
    assert [layer[0].kernel_size for layer in list(grey.decoder)[:4]] == [(4, 4), (3, 3), (4, 4), (4, 4)]
    assert {layer[0].kernel_size for layer in list(colour.decoder)[:4]} == {(4, 4)}
    assert [layer[0].out_channels for layer in list(grey.decoder)] == [128, 64, 32, 32, 1]
    assert isinstance(grey.encoder[-1][2], nn.GELU)
    with torch.device("meta"):
        assert isinstance(RelativeAutoencoder(28).encoder[-1][2], nn.Identity)


def test_the_relative_autoencoder_decodes_similarities_to_its_anchors() -> None:
    model = tiny()
    embedded, anchors = model.embed(IMAGES), model.embed(model.anchor_images)
    assert embedded.shape == (3, 6 * 4)
    r = nn.functional.normalize(embedded, dim=1) @ nn.functional.normalize(anchors, dim=1).T
    torch.testing.assert_close(model.encode(IMAGES).similarities, r)
    hidden = nn.functional.gelu(model.decoder_in[0](nn.functional.layer_norm(r, (K,))))
    torch.testing.assert_close(model(IMAGES), model.decoder(hidden.view(3, 6, 2, 2)))


def test_a_decoder_reads_an_encoder_whose_space_is_rotated() -> None:
    model = tiny()
    turned = copy.deepcopy(model)
    turn = torch.linalg.qr(normal(24, 24)).Q
    turned.embed = lambda images: model.embed(images) @ turn  # type: ignore[method-assign]
    stitched = StitchedAutoencoder(turned, model)
    torch.testing.assert_close(stitched(IMAGES), model(IMAGES), rtol=1e-4, atol=1e-5)
    other = tiny(seed=1)
    torch.testing.assert_close(StitchedAutoencoder(model, other)(IMAGES), other.decode(model.encode(IMAGES)))
    other.anchor_ids.copy_(torch.arange(K).flip(0))
    with pytest.raises(ValueError, match="must share their anchors, got in another order"):
        StitchedAutoencoder(model, other)


def test_gradients_of_the_autoencoder_do_not_flow_through_its_anchors() -> None:
    model = tiny()
    model.decode(model.encode(IMAGES)).sum().backward()
    found = model.encoder[0][0].weight.grad.clone()
    model.zero_grad()
    anchors = model.embed(model.anchor_images).detach()
    model.decode(model.relative.encode(model.embed(IMAGES), anchors)).sum().backward()
    torch.testing.assert_close(found, model.encoder[0][0].weight.grad)


def test_autoencoders_refuse_what_they_cannot_use() -> None:
    fresh = RelativeAutoencoder(8, 1, K, (4, 6))
    with pytest.raises(ValueError, match="anchors must be given with fit_anchors, or by a state dict"):
        fresh(IMAGES)
    with pytest.raises(ValueError, match="images must have anchors=5"):
        fresh.fit_anchors(IMAGES)
    with pytest.raises(ValueError, match="images must be finite"):
        fresh.fit_anchors(torch.full((K, 1, 8, 8), float("nan")))
    with pytest.raises(TypeError, match="labels must be int64 or int32"):
        fresh.fit_anchors(torch.rand(K, 1, 8, 8), torch.zeros(K))
    with pytest.raises(ValueError, match="images must have height=8"):
        tiny()(IMAGES[:, :, :7])
    with pytest.raises(ValueError, match="hidden_dims must be positive"):
        AbsoluteAutoencoder(8, hidden_dims=())
    fresh.load_state_dict(tiny().state_dict())
    torch.testing.assert_close(fresh.eval()(IMAGES), tiny()(IMAGES))


# --- stitching ------------------------------------------------------------------------------------------------------


def test_a_stitched_model_answers_as_the_one_whose_head_it_has() -> None:
    torch.manual_seed(0)
    first = nn.Linear(3, 6)
    turn = torch.linalg.qr(normal(6, 6)).Q
    second = nn.Linear(3, 6)
    with torch.no_grad():
        second.weight.copy_(2 * turn @ first.weight)
        second.bias.copy_(2 * turn @ first.bias)
    head = StitchingHead(K, 4)
    ids = torch.tensor([7, 3, 1, 0, 9])
    of_first = RelativeProjection().fit(first(ANCHORS), ids=ids)
    own = stitch(first, of_first, head)
    crossed = stitch(second, RelativeProjection().fit(second(ANCHORS), ids=ids), head, head_projection=of_first)
    torch.testing.assert_close(crossed(INPUTS), own(INPUTS), rtol=1e-4, atol=1e-5)
    assert not crossed.training
    from_items = stitch(second, ANCHORS, head, similarity="cosine")
    torch.testing.assert_close(from_items(INPUTS), own(INPUTS), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="must share their anchors, got other items"):
        stitch(second, ANCHORS, head, head_projection=of_first)
    with pytest.raises(ValueError, match="options must not be given beside a fitted projection, got center"):
        stitch(first, of_first, head, center=True)


def test_distance_to_a_reference_is_the_mean_over_items() -> None:
    r, reference = torch.tensor([[3.0, 4.0], [1.0, 0.0]]), torch.tensor([[0.0, 0.0], [1.0, 0.0]])
    assert relative_distance(r, reference) == pytest.approx(2.5)
    turned = np.array([[4.0, -3.0], [2.0, 0.0]])
    assert relative_distance(r, turned, "cosine") == pytest.approx(0.5)
    assert relative_distance(turned, turned, "cosine") == pytest.approx(0)
    with pytest.raises(ValueError, match="metric must be 'l2' or 'cosine'"):
        relative_distance(r, reference, "l1")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="must have the same dim"):
        relative_distance(r, normal(2, 3))


def test_distance_to_a_good_model_tells_how_much_noise_a_model_has() -> None:
    items, anchors = normal(50, 8), normal(20, 8, seed=1)
    reference = RelativeProjection(anchors)(items)
    distances = []
    for noise in (0.1, 0.4, 1.6):
        turn = torch.linalg.qr(normal(8, 8, seed=2)).Q
        seen = [(part + noise * normal(len(part), 8, seed=seed)) @ turn for seed, part in ((3, items), (4, anchors))]
        distances.append(relative_distance(RelativeProjection(seen[1])(seen[0]), reference))
    assert distances == sorted(distances)
    assert distances[0] < distances[2] / 3


# --- official state dicts -------------------------------------------------------------------------------------------

BACK = (
    ("query_map.", "pre_attention_transforms.module_dict.attention_queries."),
    ("key_map.", "pre_attention_transforms.module_dict.attention_keys."),
    ("value_map.", "pre_attention_transforms.module_dict.attention_values."),
    ("similarity_norm.", "sim_norm."),
    ("to_queries", "sim_to_queries"),
    ("to_keys", "sim_to_keys"),
    ("to_values", "sim_to_values"),
    ("gather.", "self_attention_aggregation."),
    ("of_anchors.", "anchors_relative_attention."),
    ("out_norm.", "outnorm."),
    ("blocks.", "relative_attentions."),
    ("pooling.", "head_pooling."),
    ("relative.", "relative_attention."),
    ("anchor_images", "anchors_images"),
    ("anchor_labels", "anchors_targets"),
)


def as_official(module: nn.Module) -> dict[str, Tensor]:
    state = {}
    for name, tensor in module.state_dict().items():
        for ours, theirs in BACK:
            name = name.replace(ours, theirs)
        state[name] = tensor.clone()
    return state


@pytest.mark.parametrize(
    "options",
    [
        {"values": "anchors", "maps": ("queries", "keys", "values"), "hidden_dim": 6},
        {"values": "trainable", "hidden_dim": 3, "out_norm": "batchnorm"},
        {"values": "self_attention", "attention_dim": 4, "num_heads": 2, "out_norm": "instancenorm"},
        {"values": "relative_anchors", "out_norm": "layernorm"},
    ],
)
def test_official_blocks_load(options: dict[str, Any]) -> None:
    torch.manual_seed(1)
    ours, fresh = RelativeAttention(K, 6, **options).eval(), RelativeAttention(K, 6, **options).eval()
    official = as_official(ours)
    assert not set(official) & set(fresh.state_dict()) - {"values"} - {n for n in official if "self_attention." in n}
    fresh.load_state_dict(convert_state_dict(official))
    x, anchors = normal(4, 6), normal(K, 6, seed=1)
    torch.testing.assert_close(fresh(x, anchors), ours(x, anchors), rtol=0, atol=0)


def test_official_multi_head_blocks_autoencoders_and_heads_load() -> None:
    options: dict[str, Any] = {"subspaces": 2, "pool": "linear", "out_norm": "layernorm"}
    torch.manual_seed(0)
    ours, fresh = SubspaceRelativeAttention(K, 6, **options), SubspaceRelativeAttention(K, 6, **options)
    official = as_official(ours)
    assert "relative_attentions.1.outnorm.weight" in official
    fresh.load_state_dict(convert_state_dict(official))
    x, anchors = normal(4, 6), normal(K, 6, seed=1)
    torch.testing.assert_close(fresh(x, anchors), ours(x, anchors), rtol=0, atol=0)

    model = tiny(seed=3)
    state = as_official(model)
    del state["anchor_ids"]
    wrapped = {f"autoencoder.{name}": tensor for name, tensor in state.items()}
    wrapped |= {"anchors_images": state["anchors_images"], "fixed_images": torch.zeros(2)}
    for given in (state, wrapped):
        loaded = RelativeAutoencoder(8, 1, K, (4, 6)).eval()
        loaded.load_state_dict(convert_autoencoder(given, anchor_ids=torch.tensor([4, 2, 0, 1, 3])))
        torch.testing.assert_close(loaded(IMAGES), model(IMAGES), rtol=0, atol=0)
        assert loaded.anchor_ids.tolist() == [4, 2, 0, 1, 3]
    absolute, empty = AbsoluteAutoencoder(8, 1, 7, (4, 6)).eval(), AbsoluteAutoencoder(8, 1, 7, (4, 6)).eval()
    empty.load_state_dict(convert_autoencoder(absolute.state_dict()))
    torch.testing.assert_close(empty(IMAGES), absolute(IMAGES), rtol=0, atol=0)

    published = nn.Sequential(
        nn.LayerNorm(K), nn.Linear(K, K), nn.Tanh(), nn.Identity(), nn.Identity(), nn.Identity(), nn.Linear(K, 3)
    )
    head = StitchingHead(K, 3, unit_norm=None)
    head.load_state_dict(convert_head(published.state_dict()))
    torch.testing.assert_close(head(normal(4, K)), published(normal(4, K)))


def test_state_dicts_of_something_else_are_refused() -> None:
    with pytest.raises(ValueError, match=r"state must hold decoder_in.0.weight of an autoencoder, got \['weight'"):
        convert_autoencoder(nn.Linear(2, 2).state_dict())
    with pytest.raises(ValueError, match="state must hold weight and bias of the layers 0, 1 and 6"):
        convert_head(nn.Linear(2, 2).state_dict())
    with pytest.raises(ValueError, match="anchor_ids must name 5 anchors, got 2"):
        convert_autoencoder(as_official(tiny()), anchor_ids=torch.arange(2))


# --- presets --------------------------------------------------------------------------------------------------------


def convolution(inputs: int, outputs: int, kernel: int) -> int:
    return inputs * outputs * kernel * kernel + outputs


@pytest.mark.parametrize(("name", "kernels", "channels"), [("mnist", (4, 3, 4, 4), 1), ("cifar", (4, 4, 4, 4), 3)])
def test_autoencoders_are_as_large_as_their_layers_add_up_to(
    name: str, kernels: tuple[int, ...], channels: int
) -> None:
    up = [channels, 32, 64, 128, 256]
    down = [256, 128, 64, 32, 32]
    trunk = sum(convolution(a, b, 3) + 2 * b for a, b in itertools.pairwise(up))
    trunk += sum(convolution(a, b, k) + 2 * b for a, b, k in zip(down, down[1:], kernels, strict=False))
    trunk += convolution(32, channels, 3)
    linear = 500 * 1024 + 1024
    expected = {"relative": trunk + linear + 2 * 500, "absolute": trunk + linear + 1024 * 500 + 500}
    with torch.device("meta"):
        for kind, count in expected.items():
            model = create_model(f"{kind}_ae_{name}")
            assert sum(parameter.numel() for parameter in model.parameters()) == count


def test_heads_of_the_presets_are_the_published_ones() -> None:
    with torch.device("meta"):
        head = create_model("relative_head_cifar100_coarse")
    assert sum(p.numel() for p in head.parameters()) == 2 * 768 + 768 * 769 + 769 * 20
    assert type(head.unit_norm).__name__ == "AcrossBatchNorm"
    assert head.normalize

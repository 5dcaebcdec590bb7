"""Heads, feedback, classifier and comparisons of diffusion features."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from headgate.evaluate import cka
from headgate.methods.generative.diffusion_classification import (
    HEAD_RECIPES,
    ADMUNet,
    AttentionHead,
    ConvHead,
    DifFeed,
    DifFormer,
    DiffusionClassifier,
    DiffusionFeatures,
    HeadRecipe,
    LinearProbe,
    MLPHead,
    block_similarity,
    cache_features,
    train_head,
)
from headgate.methods.generative.diffusion_classification.official import (
    build_attention,
    build_linear,
    build_unet,
    convert_attention_state_dict,
    convert_state_dict,
)
from headgate.methods.generative.diffusion_classification.recipe import central_crop, flip_images
from headgate.nn.diffusion import VP


def unet(**options):
    torch.manual_seed(0)
    model = ADMUNet(8, 3, 32, 6, 1, (2,), (1, 2), num_head_channels=32, **options)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape))
    return model.eval()


def bright_and_dark(count=64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 2
    images = (labels[:, None, None, None] - 0.5) + 0.3 * torch.randn(count, 3, 8, 8, generator=generator)
    return images.clamp(-1, 1), labels


def encoder(model=None, layers=(2,), times=(10,), **options):
    generator = torch.Generator().manual_seed(3)
    return DiffusionFeatures(model or unet(), VP.linear(), layers, times, generator=generator, **options)


def test_a_linear_head_sees_the_means_of_its_cells():
    head = LinearProbe(2, 3, pool=2)
    maps = torch.randn(4, 2, 6, 4)
    cells = torch.stack(
        [maps[:, :, 3 * i : 3 * i + 3, 2 * j : 2 * j + 2].mean((2, 3)) for i in (0, 1) for j in (0, 1)], -1
    )
    layer = head.layers[0]
    torch.testing.assert_close(head(maps), cells.flatten(1) @ layer.weight.T + layer.bias)


def test_hidden_layers_are_relu_networks():
    head = MLPHead(3, 2, (5, 4), pool=1)
    x = torch.randn(2, 3, 2, 2)
    y = x.mean((2, 3))
    for layer in head.layers[:-1]:
        y = (y @ layer.weight.T + layer.bias).clamp(min=0)
    torch.testing.assert_close(head(x), y @ head.layers[-1].weight.T + head.layers[-1].bias)


def test_small_maps_are_repeated_only_on_request():
    maps = torch.randn(2, 3, 1, 1)
    quirky = LinearProbe(3, 2, pool=2, official_quirks=True)
    repeated = maps.expand(-1, -1, 2, 2).flatten(1)
    torch.testing.assert_close(quirky(maps), repeated @ quirky.layers[0].weight.T + quirky.layers[0].bias)
    with pytest.raises(ValueError, match="pool=2"):
        LinearProbe(3, 2, pool=2)(maps)


def test_the_convolutional_head_halves_twice_and_averages():
    head = ConvHead(3, 4, (6, 5)).eval()
    x = torch.randn(2, 3, 8, 8)
    h = F.relu(F.conv2d(x, head.conv1.weight, head.conv1.bias, stride=2, padding=1) / (1 + 1e-5) ** 0.5)
    h = F.relu(F.conv2d(h, head.conv2.weight, head.conv2.bias, stride=2, padding=1) / (1 + 1e-5) ** 0.5)
    assert h.shape == (2, 5, 2, 2)
    torch.testing.assert_close(head(x), head.classifier(h.mean((2, 3))))


def test_attention_has_no_positions_behind_a_plain_norm():
    head = AttentionHead(3, 4, 8, 1, 2, grid=2)
    x = torch.randn(2, 3, 2, 2)
    torch.testing.assert_close(head(x), head(x.flip(2, 3)), rtol=1e-4, atol=1e-5)
    nn.init.normal_(head.tokens.norm.weight)
    assert not torch.allclose(head(x), head(x.flip(2, 3)), atol=1e-4)


def test_attention_normalises_over_channels_and_cells_together():
    head = AttentionHead(3, 4, 8, 1, 2, grid=2)
    x = torch.randn(1, 3, 2, 2)
    normed = (x - x.mean()) / (x.var(correction=0) + 1e-5).sqrt()
    wanted = F.conv2d(normed, head.tokens.proj.weight, head.tokens.proj.bias).flatten(2).transpose(1, 2)
    torch.testing.assert_close(head.tokens(x), wanted)
    torch.testing.assert_close(head.tokens(x.repeat_interleave(2, 2).repeat_interleave(2, 3)), wanted)


def test_difformer_of_one_block_and_time_is_the_attention_head():
    one = AttentionHead(3, 4, 8, 2, 2, grid=2)
    several = DifFormer((3,), 4, 1, 8, 2, 2, grids=2)
    state = {name.replace("tokens.", "tokens.0."): value for name, value in one.state_dict().items()}
    several.load_state_dict(state)
    x = torch.randn(2, 3, 4, 4)
    torch.testing.assert_close(several([[x]]), one(x))


def test_difformer_shares_its_attention_over_times():
    torch.manual_seed(0)
    head = DifFormer((3, 2), 4, 2, 8, 1, 2, grids=(2, 1))
    first, second = ([torch.randn(2, 3, 2, 2), torch.randn(2, 2, 2, 2)] for _ in range(2))
    swapped = DifFormer((3, 2), 4, 2, 8, 1, 2, grids=(2, 1))
    swapped.load_state_dict(head.state_dict())
    with torch.no_grad():
        swapped.classifier.weight.copy_(head.classifier.weight.roll(8, dims=1))
    torch.testing.assert_close(swapped([second, first]), head([first, second]))
    with pytest.raises(ValueError, match="one batch"):
        head([first, [second[0][:1], second[1]]])
    with pytest.raises(ValueError, match="grids"):
        DifFormer((3, 2), 4, grids=(1,))


def test_difffeed_adds_mirrored_maps_in_a_second_pass():
    model = unet()
    feed = DifFeed(model, LinearProbe(64, 2), (7, 8), read_block=6).eval()
    assert model.num_blocks == 9
    x, t = torch.randn(2, 3, 8, 8), torch.tensor([5, 6])
    first = model.forward_blocks(x, t, [7, 8])
    told = {3: feed.feedback[0](first[0]), 2: feed.feedback[1](first[1])}
    wanted = model.forward_blocks(x, t, [6], feedback=told)[0]
    torch.testing.assert_close(feed.forward_features(x, t), wanted)
    torch.testing.assert_close(feed(x, t), feed.head(wanted))


def test_difffeed_trains_feedback_and_head_alone():
    feed = DifFeed(unet(), LinearProbe(64, 2), (7, 8), read_block=6).train()
    assert not feed.unet.training
    assert feed.feedback.training
    feed(torch.randn(2, 3, 8, 8), torch.tensor([5, 6])).square().sum().backward()
    reached = {name for name, p in feed.named_parameters() if p.grad is not None and p.grad.any()}
    assert reached
    assert all(name.startswith(("feedback.", "head.")) for name in reached)
    assert any(name.startswith("feedback.0") for name in reached)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"feedback_blocks": (3,)}, "output blocks"),
        ({"feedback_blocks": ()}, "at least one"),
        ({"read_block": 40}, "read_block"),
    ],
)
def test_difffeed_refuses_blocks_that_there_are_not(arguments, match):
    with pytest.raises(ValueError, match=match):
        DifFeed(unet(), LinearProbe(64, 2), **{"feedback_blocks": (7,), "read_block": 6, **arguments})


def test_a_classifier_learns_and_keeps_the_denoiser():
    model = unet()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    images, labels = bright_and_dark()
    classifier = DiffusionClassifier(
        encoder(model), LinearProbe(32, 2), HeadRecipe(learning_rate=0.1, epochs=20, batch_size=16, decay_every=20)
    )
    fitted = classifier.fit(images.numpy(), labels.numpy())
    assert fitted is classifier
    assert classifier.score(*bright_and_dark(seed=1)) > 0.9
    assert classifier.classes_.tolist() == [0, 1]
    np.testing.assert_allclose(classifier.predict_proba(images).sum(1), 1, rtol=1e-5)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_fine_tuning_moves_the_denoiser_up_to_the_block_that_is_read():
    model = unet()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    recipe = HeadRecipe(learning_rate=0.1, epochs=1, batch_size=16, finetune=True)
    DiffusionClassifier(encoder(model), LinearProbe(32, 2), recipe).fit(*bright_and_dark(32))
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert "input_blocks.0.0.weight" in moved
    assert not any(name.startswith(("output_blocks", "out.", "middle_block")) for name in moved)


def test_a_difformer_is_given_all_times_and_layers():
    images, labels = bright_and_dark(16)
    head = DifFormer((32, 64), 2, 2, 8, 1, 2, grids=2)
    classifier = DiffusionClassifier(
        encoder(layers=(2, 5), times=(10, 90)), head, HeadRecipe(epochs=1, batch_size=8), seed=4
    )
    read = classifier.read(images)
    assert [[tuple(maps.shape) for maps in time] for time in read] == [[(16, 32, 8, 8), (16, 64, 4, 4)]] * 2
    assert classifier.fit(images, labels).decision_function(images).shape == (16, 2)
    with pytest.raises(ValueError, match="4 cells"):
        DiffusionClassifier(encoder(layers=(2, 5), times=(10, 90)), LinearProbe(32, 2))


def test_a_loader_of_batches_is_taken():
    images, labels = bright_and_dark(32)
    batches = [(images[:16], labels[:16]), (images[16:], labels[16:])]
    head = LinearProbe(32, 2)
    weights = head.layers[0].weight.clone()
    DiffusionClassifier(encoder(), head, HeadRecipe(epochs=1)).fit(batches)
    assert not torch.equal(head.layers[0].weight, weights)


@pytest.mark.parametrize(
    ("labels", "error", "match"),
    [
        (torch.tensor([0, 2]), ValueError, r"0\.\.1"),
        (torch.tensor([0.0, 1.0]), TypeError, "integers"),
        (torch.tensor([0]), ValueError, "shape"),
    ],
)
def test_labels_that_do_not_fit_are_refused(labels, error, match):
    with pytest.raises(error, match=match):
        DiffusionClassifier(encoder(), LinearProbe(32, 2)).fit(torch.zeros(2, 3, 8, 8), labels)


def test_the_learning_rate_falls_to_a_tenth_every_seven_epochs(monkeypatch):
    seen = []
    from headgate.methods.generative.diffusion_classification import recipe as module

    monkeypatch.setattr(
        module, "fit", lambda *a, schedule, steps, **k: seen.append([schedule(s) for s in range(steps)])
    )
    head = LinearProbe(3, 2, pool=1)
    train_head(
        head, lambda x: x, (torch.zeros(20, 3, 2, 2), torch.zeros(20).long()), HeadRecipe(epochs=15, batch_size=10)
    )
    assert seen[0] == pytest.approx([1.0] * 14 + [0.1] * 14 + [0.01] * 2)
    assert (HEAD_RECIPES["linear"].learning_rate, HEAD_RECIPES["attention"].learning_rate) == (1e-2, 5e-2)
    assert HEAD_RECIPES["finetune"].learning_rate == 1e-3
    assert HEAD_RECIPES["linear"].epochs == 28


def test_crops_and_flips_do_what_they_say():
    images = torch.arange(32.0).reshape(1, 1, 4, 8)
    assert central_crop(images, 2)[0, 0].tolist() == [[11, 12], [19, 20]]
    with pytest.raises(ValueError, match="size=5"):
        central_crop(images, 5)
    many = images.expand(200, -1, -1, -1)
    flipped = flip_images(many, torch.Generator().manual_seed(0))
    mirrored = (flipped == many.flip(3)).all(dim=(1, 2, 3))
    assert 60 < int(mirrored.sum()) < 140
    assert torch.equal(flipped[~mirrored], many[~mirrored])


def test_similarity_is_the_linear_cka_of_pooled_features():
    generator = torch.Generator().manual_seed(0)
    maps, tokens = torch.randn(40, 5, 2, 2, generator=generator), torch.randn(40, 3, 6, generator=generator)
    table = block_similarity({"maps": maps, "tokens": tokens})
    assert table.shape == (2, 2)
    assert table[0, 0] == pytest.approx(1)
    wanted = cka(maps.mean((2, 3)).numpy(), tokens.mean(1).numpy())
    assert table[0, 1] == pytest.approx(wanted)
    assert table[1, 0] == pytest.approx(wanted)
    assert block_similarity({"maps": maps}, {"twice": 2 * maps}, debiased=False)[0, 0] == pytest.approx(1)


def test_cached_features_are_those_of_the_encoder(tmp_path):
    images, labels = bright_and_dark(6)
    loader = [(images[:4], labels[:4]), (images[4:], labels[4:])]
    kept = cache_features(encoder(layers=(2, "middle_block")), loader, tmp_path, pool=2)
    fresh = encoder(layers=(2, "middle_block"), pool=2)
    wanted = torch.cat([fresh(part)[2, 10] for part, _ in loader]).flatten(1)
    np.testing.assert_allclose(kept[2, 10].rows(slice(None)), wanted.numpy(), rtol=2e-3, atol=2e-3)
    assert kept["middle_block", 10].y.tolist() == labels.tolist()
    with pytest.warns(UserWarning, match="generator"):
        cache_features(DiffusionFeatures(unet(), VP.linear(), [2], [10]), loader, tmp_path)
    with pytest.raises(ValueError, match="at least one batch"), warnings.catch_warnings():
        cache_features(encoder(), [], tmp_path)


def test_a_saved_network_comes_back(tmp_path):
    model = unet()
    model.save_pretrained(tmp_path)
    again = ADMUNet.from_pretrained(tmp_path)
    x, t = torch.randn(1, 3, 8, 8), torch.tensor([4])
    assert torch.equal(again(x, t), model(x, t))


def test_published_options_give_the_published_networks():
    with torch.device("meta"):
        model = build_unet(
            {
                "image_size": 256,
                "num_channels": 256,
                "num_res_blocks": 2,
                "attention_resolutions": "32,16,8",
                "num_head_channels": 64,
                "learn_sigma": True,
                "resblock_updown": True,
                "use_fp16": True,
            }
        )
    assert sum(p.numel() for p in model.parameters()) == 552_814_086
    with pytest.raises(ValueError, match="frobnicate"):
        build_unet({"image_size": 64, "frobnicate": 1})
    assert list(convert_state_dict({"module.encoder.out.2.bias": torch.zeros(1)})) == ["out.2.bias"]


def test_published_heads_find_their_places():
    state = {"fcs.0.weight": torch.randn(5, 12), "fcs.0.bias": torch.zeros(5)}
    state |= {"fcs.1.weight": torch.randn(3, 5), "fcs.1.bias": torch.zeros(3)}
    head = build_linear(state, pool=2)
    maps = torch.randn(2, 3, 2, 2)
    torch.testing.assert_close(head(maps), (maps.flatten(1) @ state["fcs.0.weight"].T).relu() @ state["fcs.1.weight"].T)
    with pytest.raises(ValueError, match="pre_pool_size=5"):
        build_linear(state, pool=5)

    ours = DifFormer((3, 2), 4, 2, 8, 2, 2, grids=(2, 1))
    theirs = {}
    for name, value in ours.state_dict().items():
        name = name.replace("tokens.0.", "pre_layer.24.").replace("tokens.1.", "pre_layer.19.")
        name = name.replace(".norm.", ".1.").replace(".proj.", ".2.").replace("classifier.", "head.")
        name = name.replace("attention.class_token", "intra_inter_block_attention.cls_token")
        for index in range(2):
            name = name.replace(f"attention.blocks.{index}.", f"intra_inter_block_attention.layers.{index + 1}.")
        name = name.replace("mixer_norm", "norm1").replace("mlp_norm", "norm2")
        name = name.replace("mixer.qkv", "attn.qkv").replace("mixer.out_proj", "attn.proj")
        theirs[name] = value
    again = build_attention(theirs, num_timesteps=2, num_heads=2, blocks=[24, 19])
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in ours.state_dict().items())
    assert "tokens.0.proj.weight" in convert_attention_state_dict(theirs)
    assert convert_attention_state_dict(theirs)["tokens.0.proj.weight"].shape[1] == 2

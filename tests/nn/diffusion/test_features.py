"""Taps and diffusion features: what is read, when a pass ends, what stays behind, and what is refused."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from headgate.nn.diffusion import (
    VP,
    ADMUNet,
    DiffusionFeatures,
    DiT,
    LinearFlow,
    denoise,
    numbered_blocks,
    pool_features,
    tap,
)


class Chain(nn.Module):
    def __init__(self, depth=4):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(3, 3) for _ in range(depth))
        self.ran = 0

    def forward(self, x, t=None):
        for block in self.blocks:
            self.ran += 1
            x = block(x)
        return x


def hooks(model):
    return sum(len(module._forward_hooks) for module in model.modules())


def unet(**options):
    torch.manual_seed(0)
    model = ADMUNet(16, 3, 32, 6, 1, (2,), (1, 2), num_head_channels=32, **options)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape))
    return model


def images(count=2, seed=0):
    return torch.rand(count, 3, 16, 16, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def test_a_tap_reads_names_numbers_and_patterns():
    model, x = Chain(), torch.randn(2, 3)
    with tap(model, ["blocks.0", 3]) as features:
        model(x)
    torch.testing.assert_close(features["blocks.0"], model.blocks[0](x).detach())
    torch.testing.assert_close(features[3], model.blocks[2](model.blocks[1](model.blocks[0](x))).detach())
    with tap(model, ["blocks.*"]) as features:
        model(x)
    assert list(features) == [f"blocks.{index}" for index in range(4)]


def test_a_tap_ends_the_pass_early_and_leaves_no_hooks():
    model = Chain()
    with tap(model, [2], stop_early=True) as features:
        model(torch.randn(1, 3))
    assert model.ran == 2
    assert list(features) == [2]
    assert hooks(model) == 0


def test_no_hooks_are_left_by_an_error():
    model = Chain()
    with pytest.raises(RuntimeError, match="mine"), tap(model, [1]):
        raise RuntimeError("mine")
    assert hooks(model) == 0
    with pytest.raises(ValueError, match=r"1\.\.4"), tap(model, ["blocks.0", 9]):
        pass
    assert hooks(model) == 0


def test_a_tap_keeps_a_graph_only_when_asked():
    model, x = Chain(), torch.randn(1, 3)
    with tap(model, [1]) as features:
        model(x)
    assert not features[1].requires_grad
    with tap(model, [1], detach=False) as features:
        model(x)
    features[1].sum().backward()
    assert model.blocks[0].weight.grad is not None


def test_a_tap_works_under_autocast_in_full_precision():
    model = Chain()
    with tap(model, [1], full_precision=True) as features, torch.autocast("cpu", dtype=torch.bfloat16):
        model(torch.randn(1, 3))
    assert features[1].dtype == torch.float32


def test_pooling_is_what_it_says():
    tokens = torch.arange(16.0).reshape(1, 4, 4)
    assert pool_features(tokens, "mean").tolist() == [[6, 7, 8, 9]]
    assert pool_features(tokens, "cls").tolist() == [[0, 1, 2, 3]]
    assert pool_features(tokens, 2)[0, 1].tolist() == [[1, 5], [9, 13]]
    maps = torch.arange(16.0).reshape(1, 1, 4, 4)
    assert pool_features(maps, 2)[0, 0].tolist() == [[2.5, 4.5], [10.5, 12.5]]
    assert pool_features(maps, None) is maps
    for features, pool, match in ((maps, 5, "pool=5"), (maps, "cls", "tokens"), (tokens[:, :3], 1, "square")):
        with pytest.raises(ValueError, match=match):
            pool_features(features, pool)


def test_features_are_blocks_of_the_noised_image():
    model, path = unet().eval(), VP.linear()
    x, noise = images(), torch.randn(2, 3, 16, 16)
    found = DiffusionFeatures(model, path, [2, 7], [90, 150])(x, noise)
    assert list(found) == [(2, 90), (7, 90), (2, 150), (7, 150)]
    for time in (90, 150):
        t = torch.full((2,), time)
        with torch.no_grad():
            wanted = model.forward_blocks(path.add_noise(x, noise, t), t, [2, 7])
        torch.testing.assert_close(found[2, time], wanted[0])
        torch.testing.assert_close(found[7, time], wanted[1])


def test_noise_comes_from_the_generator_and_is_averaged():
    model, x = unet(), images()

    def read(**options):
        generator = torch.Generator().manual_seed(7)
        return DiffusionFeatures(model, VP.linear(), [3], [50], generator=generator, **options)(x)[3, 50]

    assert torch.equal(read(), read())
    draws = torch.stack(
        [torch.randn(x.shape, generator=g) for g in [torch.Generator().manual_seed(7)] for _ in range(2)]
    )
    each = [DiffusionFeatures(model, VP.linear(), [3], [50])(x, draw)[3, 50] for draw in draws]
    torch.testing.assert_close(read(num_noise=2), (each[0] + each[1]) / 2)


def test_modes_and_gradients_are_left_as_they_were():
    model = unet(dropout=0.5).train()
    model.middle_block.eval()
    first = DiffusionFeatures(model, VP.linear(), [4], [10])
    noise = torch.zeros(2, 3, 16, 16)
    assert torch.equal(first(images(), noise)[4, 10], first(images(), noise)[4, 10])
    assert model.training
    assert not model.middle_block.training
    tuned = DiffusionFeatures(model, VP.linear(), [4], [10], detach=False)(images(), noise)[4, 10]
    tuned.sum().backward()
    assert model.input_blocks[0][0].weight.grad is not None
    assert model.out[2].weight.grad is None


def test_the_place_before_up_sampling_can_be_read():
    model = unet()
    number = len(model.input_blocks) + 1 + 2  # the last output block of the lower level
    noise = torch.zeros(1, 3, 16, 16)
    after, before = (
        DiffusionFeatures(model, VP.linear(), [number], [10], position=position)(images(1), noise)[number, 10]
        for position in ("after", "before_upsample")
    )
    assert after.shape[2:] == (16, 16)
    assert before.shape[2:] == (8, 8)


@pytest.mark.parametrize(
    ("build", "call", "match"),
    [
        ({"timesteps": [1000]}, {}, r"0\.\.999"),
        ({"layers": [0]}, {}, r"1\.\.9"),
        ({"layers": ["nothing"]}, {}, "nothing"),
        ({"num_noise": 0}, {}, "num_noise"),
        ({}, {"images": torch.rand(1, 3, 16, 16) * 255}, r"0\.\.255"),
        ({}, {"images": torch.rand(1, 3, 16, 16) * 4 - 2}, r"\[-1, 1\]"),
        ({}, {"images": torch.zeros(1, 3, 15, 16)}, "divisible"),
        ({}, {"images": torch.zeros(1, 3, 16, 16), "noise": torch.zeros(1, 3, 8, 8)}, "noise"),
        ({"condition": 3}, {"images": torch.zeros(1, 3, 16, 16)}, "without classes"),
    ],
)
def test_bad_input_is_refused_by_name(build, call, match):
    def run():
        arguments = {"layers": [2], "timesteps": [90], **build}
        encoder = DiffusionFeatures(
            unet(), VP.linear(), arguments.pop("layers"), arguments.pop("timesteps"), **arguments
        )
        encoder(**call)

    with pytest.raises(ValueError, match=match):
        run()


def test_conditions_have_to_be_said():
    x, t = torch.randn(2, 3, 16, 16), torch.tensor([1, 2])
    classes = unet(num_classes=4)
    with pytest.raises(ValueError, match="4 classes"):
        denoise(classes, x, t)
    with pytest.raises(ValueError, match="without null"):
        denoise(classes, x, t, "null")
    torch.testing.assert_close(denoise(classes, x, t, 2), classes(x, t, torch.tensor([2, 2])))
    torch.manual_seed(0)
    dit = DiT(8, 2, 3, 32, 2, 2, num_classes=3)
    z = torch.randn(2, 3, 8, 8)
    with tap(dit, [2]) as null:
        denoise(dit, z, torch.tensor([0.1, 0.2]), "null")
    with tap(dit, [2]) as last:
        dit(z, torch.tensor([0.1, 0.2]), torch.tensor([3, 3]))
    assert torch.equal(null[2], last[2])
    with pytest.raises(ValueError, match=r"0\.\.3"):
        denoise(dit, z, t, 4)


def test_tokens_and_latents_are_read_on_a_flow():
    dit = DiT(8, 2, 3, 32, 2, 2, num_classes=0)
    latents = torch.randn(2, 3, 8, 8) * 5
    encoder = DiffusionFeatures(dit, LinearFlow(), [1, 2], [0.1], latents=True)
    assert encoder(latents)[2, 0.1].shape == (2, 16, 32)
    with pytest.raises(ValueError, match=r"\[-1, 1\]"):
        DiffusionFeatures(dit, LinearFlow(), [1], [0.1])(latents)


def test_networks_of_diffusers_are_numbered_as_adm_is():
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    model = diffusers.UNet2DModel(
        sample_size=16,
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=8,
    )
    paths = [path for path, _ in numbered_blocks(model)]
    assert paths == [
        "conv_in",
        "down_blocks.0.resnets.0",
        "down_blocks.0.downsamplers.0",
        "down_blocks.1.attentions.0",
        "mid_block",
        "up_blocks.0.attentions.0",
        "up_blocks.0.upsamplers.0",
        "up_blocks.1.resnets.0",
        "up_blocks.1.resnets.1",
    ]
    assert [path for path, _ in numbered_blocks(model, "before_upsample")][6] == "up_blocks.0.attentions.1"
    encoder = DiffusionFeatures(model, diffusers.DDPMScheduler(), [3, 5, 7], [20], pool="mean")
    found = encoder(images())
    assert [tuple(value.shape) for value in found.values()] == [(2, 32), (2, 64), (2, 64)]
    with pytest.raises(ValueError, match="divisible"):
        encoder(torch.zeros(1, 3, 15, 15))


def test_transformers_and_text_networks_of_diffusers_take_their_null():
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    dit = diffusers.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=3, num_layers=2, sample_size=8, num_embeds_ada_norm=5
    )
    latents = torch.randn(2, 3, 8, 8)
    encoder = DiffusionFeatures(dit, VP.linear(), [2], [20], condition="null", latents=True)
    assert encoder(latents)[2, 20].shape == (2, 16, 16)
    with pytest.raises(ValueError, match="5 classes"):
        denoise(dit, latents, torch.tensor([1, 1]))
    text = diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=12,
        norm_num_groups=4,
        attention_head_dim=4,
    )
    empty = torch.zeros(1, 5, 12)
    four = torch.randn(2, 4, 8, 8)
    found = DiffusionFeatures(text, VP.scaled_linear(), [2, 5], [20], condition=empty, latents=True)(four)
    assert [tuple(value.shape) for value in found.values()] == [(2, 8, 8, 8), (2, 16, 4, 4)]
    with pytest.raises(ValueError, match="empty prompt"):
        denoise(text, four, torch.tensor([1, 1]))

"""The two groups of parameters, the optimizer, the autoencoder's loss and the GAN's two steps."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import headgate as hg
from headgate.methods.latent.latent_quantization import RECIPES, ImageEncoder, StyleDecoder
from headgate.methods.latent.latent_quantization.infowgan import QLInfoWGAN
from headgate.methods.latent.latent_quantization.qlae import reconstruction_loss

BLOCKS = {"kernel_sizes": (3, 4), "strides": (1, 2), "paddings": (1, 1), "hidden_dims": (12, 10)}


def parts(seed: int = 0) -> tuple[ImageEncoder, StyleDecoder, hg.LatentQuantizer]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoder = ImageEncoder(5, 8, 2, widths=(4, 6), **BLOCKS)
        decoder = StyleDecoder(5, 2, 4, input_channels=6, widths=(6, 4), **BLOCKS)
    return encoder, decoder, hg.LatentQuantizer(5, 4)


def images(count: int = 6, seed: int = 1) -> torch.Tensor:
    return torch.rand(count, 2, 8, 8, generator=torch.Generator().manual_seed(seed))


def test_biases_and_codebooks_do_not_decay_and_norm_gains_and_the_map_do() -> None:
    model = hg.QLAE(*parts())
    decayed, undecayed = hg.weight_decay_groups(model, 0.1)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    without = {names[id(parameter)] for parameter in undecayed["params"]}
    assert without == {name for name in names.values() if name.endswith("bias")} | {"quantizer.codebook"}
    within = {names[id(parameter)] for parameter in decayed["params"]}
    assert {"decoder.input_map", "encoder.conv.0.1.weight", "decoder.conv.weight"} <= within
    assert len(within) + len(without) == len(names)
    assert (decayed["weight_decay"], undecayed["weight_decay"]) == (0.1, 0.0)


def test_shared_parameters_count_once_frozen_ones_not_at_all_and_empty_groups_are_left_out() -> None:
    layer = nn.Linear(3, 3, bias=False)
    model = nn.ModuleList([layer, layer, hg.LatentQuantizer(3, 4, learnable=False)])
    (group,) = hg.weight_decay_groups(model, 0.5)
    assert [id(parameter) for parameter in group["params"]] == [id(layer.weight)]
    (codebooks,) = hg.weight_decay_groups(hg.LatentQuantizer(3, 4), 0.5)
    assert codebooks["weight_decay"] == 0.0
    with pytest.raises(ValueError, match="model must have a parameter"):
        hg.weight_decay_groups(layer.requires_grad_(False), 0.5)
    with pytest.raises(ValueError, match="weight_decay must not be negative, got -1"):
        hg.weight_decay_groups(model, -1)


def test_one_step_of_the_optimizer_equals_clipped_adamw_and_plain_adam() -> None:
    layer = nn.Linear(2, 2)
    before = {name: parameter.detach().clone() for name, parameter in layer.named_parameters()}
    optimizer = hg.qlae_optimizer(layer, learning_rate=0.01, weight_decay=0.5, eps=1.0)
    layer.weight.grad = torch.tensor([[30.0, -0.5], [-7.0, 0.0]])
    layer.bias.grad = torch.tensor([30.0, -0.5])
    optimizer.step()
    # The first step of Adam moves by g / (|g| + eps), as both averages are corrected to g itself.
    clipped = torch.tensor([[1.0, -0.5], [-1.0, 0.0]])
    expected = before["weight"] * (1 - 0.01 * 0.5) - 0.01 * clipped / (clipped.abs() + 1)
    torch.testing.assert_close(layer.weight.detach(), expected)
    raw = torch.tensor([30.0, -0.5])
    torch.testing.assert_close(layer.bias.detach(), before["bias"] - 0.01 * raw / (raw.abs() + 1))


def test_clipping_can_be_left_out_and_settings_out_of_range_are_refused() -> None:
    layer = nn.Linear(2, 2, bias=False)
    before = layer.weight.detach().clone()
    optimizer = hg.qlae_optimizer(layer, 0.01, 0.0, eps=1.0, clip_value=None)
    layer.weight.grad = torch.full((2, 2), 9.0)
    optimizer.step()
    torch.testing.assert_close(layer.weight.detach(), before - 0.01 * 0.9)
    with pytest.raises(ValueError, match="learning_rate must be positive"):
        hg.qlae_optimizer(layer, 0.0)
    with pytest.raises(ValueError, match="clip_value must be positive"):
        hg.qlae_optimizer(layer, 0.1, clip_value=0.0)


def test_decay_alone_shrinks_weights_by_its_rate_and_leaves_codebooks() -> None:
    model = hg.QLAE(*parts())
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = hg.qlae_optimizer(model, 0.1, 0.5)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, parameter in model.named_parameters():
        kept = 1.0 if name.endswith("bias") or name == "quantizer.codebook" else 0.95
        torch.testing.assert_close(parameter.detach(), kept * before[name])


def test_the_loss_of_the_autoencoder_equals_its_definition() -> None:
    encoder, decoder, _ = parts()
    quantizer = hg.LatentQuantizer(5, 4, commitment_weight=0.3, quantization_weight=0.7)
    model = hg.QLAE(encoder, decoder, quantizer, reconstruction_weight=2.0)
    x = images()
    z = encoder(x)
    q = quantizer.codes(quantizer(z).indices)
    p = decoder(q).sigmoid().double()
    entropy = -(x * p.log() + (1 - x) * (1 - p).log()).flatten(1).mean(dim=1)
    distance = (z - q).square().mean(dim=1)
    losses = model.training_loss(x)
    torch.testing.assert_close(losses.reconstruction.double(), entropy, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(losses.quantization, distance)
    torch.testing.assert_close(losses.loss.double(), (2 * entropy + 1.0 * distance).mean(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(model.losses(model(x), x).loss, losses.loss)


def test_images_come_back_from_their_discrete_code() -> None:
    model = hg.QLAE(*parts()).eval()
    x = images()
    output = model(x)
    torch.testing.assert_close(model.decode(output.latents.indices), output.logits.sigmoid())
    assert torch.equal(model.encode(x).indices, output.latents.indices)


def test_a_decoder_of_another_shape_and_negative_weights_are_refused() -> None:
    encoder, decoder, quantizer = parts()
    with pytest.raises(ValueError, match="logits must have axis=8"):
        reconstruction_loss(torch.zeros(2, 2, 8, 7), images(2))
    with pytest.raises(ValueError, match="reconstruction_weight must not be negative"):
        hg.QLAE(encoder, decoder, quantizer, reconstruction_weight=-1.0)
    with pytest.raises(ValueError, match="latent_weight must not be negative"):
        QLInfoWGAN(encoder, decoder, quantizer, latent_weight=-1.0)
    with pytest.raises(TypeError, match="encoder must have num_features, forward_features, head, got Linear"):
        QLInfoWGAN(nn.Linear(2, 2), decoder, quantizer)


def test_training_brings_the_reconstruction_down_and_uses_several_values() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        encoder = nn.Sequential(nn.Flatten(), nn.Linear(2, 16), nn.ReLU(), nn.Linear(16, 2))
        model = hg.QLAE(encoder, nn.Sequential(nn.Linear(2, 16), nn.ReLU(), nn.Linear(16, 2)), hg.LatentQuantizer(2, 4))
    with torch.no_grad():
        encoder[3].weight.mul_(8)
    x = (torch.cartesian_prod(torch.arange(4), torch.arange(4)).float() / 3).clamp(0.05, 0.95)
    optimizer = hg.qlae_optimizer(model, 1e-2, 1e-3)
    losses = []
    for _ in range(300):
        optimizer.zero_grad()
        loss = model.training_loss(x)
        loss.loss.backward()
        optimizer.step()
        losses.append(float(loss.reconstruction.mean().detach()))
    floor = float(-(x * x.log() + (1 - x) * (1 - x).log()).mean())
    assert losses[-1] - floor < 0.3 * (losses[0] - floor)
    assert all(len(column.unique()) >= 3 for column in model.encode(x).indices.T)


def gan(**weights: float) -> QLInfoWGAN:
    encoder, decoder, quantizer = parts()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        return QLInfoWGAN(encoder, decoder, quantizer, **weights)


def test_the_encoder_s_loss_equals_its_definition() -> None:
    model, x = gan(value_weight=2.0, gradient_weight=3.0, latent_weight=5.0), images(4)
    losses = model.encoder_losses(x, torch.Generator().manual_seed(9))
    generator = torch.Generator().manual_seed(9)
    codes = model.quantizer.sample(4, generator)
    share = torch.rand(4, 1, 1, 1, generator=generator)
    fake = model.decoder(codes).sigmoid().detach()

    def value(pictures: torch.Tensor) -> torch.Tensor:
        return model.critic(model.encoder.forward_features(pictures))[:, 0]

    torch.testing.assert_close(losses.value, value(fake) - value(x))
    for row in range(4):
        mixed = (share[row] * x[row] + (1 - share[row]) * fake[row])[None].requires_grad_()
        (slope,) = torch.autograd.grad(value(mixed).sum(), mixed)
        torch.testing.assert_close(losses.gradient[row], (slope.norm() - 1) ** 2)
    latents = model.quantizer(model.encoder(fake))
    torch.testing.assert_close(losses.latent, (latents.z_hat - codes).square().mean(dim=1))
    total = 2 * losses.value + 3 * losses.gradient + 5 * losses.latent + latents.loss_per_sample
    torch.testing.assert_close(losses.loss, total.mean())


def test_the_generator_s_loss_equals_its_definition_and_reaches_the_codebooks_through_the_drawn_codes() -> None:
    model = gan(latent_weight=5.0)
    losses = model.generator_losses(4, torch.Generator().manual_seed(9))
    codes = model.quantizer.sample(4, torch.Generator().manual_seed(9))
    output = model(model.decoder(codes).sigmoid())
    latent = (output.latents.z_hat - codes).square().mean(dim=1)
    expected = -output.value + 5 * latent + output.latents.loss_per_sample
    torch.testing.assert_close(losses.loss, expected.mean())
    model.quantizer.quantization_weight = model.quantizer.commitment_weight = 0.0
    model.generator_losses(4, torch.Generator().manual_seed(9)).loss.backward()
    assert model.quantizer.codebook.grad.abs().sum() > 0


def state(module: nn.Module) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in module.parameters()]


def same(first: list[torch.Tensor], second: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_four_of_five_steps_move_the_encoder_alone_and_the_fifth_the_generator_and_codebooks_too() -> None:
    model = gan()
    training = hg.InfoWGANTraining(model, learning_rate=1e-3, weight_decay=1e-2)
    for step in range(1, 11):
        owners = {"encoder": model.encoder, "critic": model.critic, "decoder": model.decoder, "codes": model.quantizer}
        before = {name: state(module) for name, module in owners.items()}
        encoder_losses, generator_losses = training.step(images(4, seed=step))
        moved = {name for name, module in owners.items() if not same(before[name], state(module))}
        assert moved == ({"encoder", "critic", "decoder", "codes"} if step % 5 == 0 else {"encoder", "critic"})
        assert (generator_losses is not None) == (step % 5 == 0)
        assert not encoder_losses.loss.requires_grad


def test_both_optimizers_hold_the_published_settings() -> None:
    training = hg.InfoWGANTraining(gan(), weight_decay=1e-4)
    for optimizer in (training.encoder_optimizer, training.generator_optimizer):
        decayed, undecayed = optimizer.param_groups
        assert decayed["betas"] == undecayed["betas"] == (0.0, 0.9)
        assert decayed["lr"] == undecayed["lr"] == 2e-4
        assert (decayed["weight_decay"], undecayed["weight_decay"]) == (1e-4, 0.0)
        assert (decayed["clip_value"], undecayed["clip_value"]) == (1.0, None)


def test_a_resumed_gan_goes_on_as_if_it_had_never_stopped() -> None:
    whole, first = gan(), gan()
    straight, halted = hg.InfoWGANTraining(whole, seed=3), hg.InfoWGANTraining(first, seed=3)
    for step in range(7):
        straight.step(images(4, seed=step))
    for step in range(3):
        halted.step(images(4, seed=step))
    second = gan()
    second.load_state_dict(first.state_dict())
    resumed = hg.InfoWGANTraining(second, seed=3)
    resumed.load_state_dict(halted.state_dict())
    for step in range(3, 7):
        resumed.step(images(4, seed=step))
    assert same(state(whole), state(second))
    with pytest.raises(ValueError, match="generator_period must be positive"):
        hg.InfoWGANTraining(gan(), generator_period=0)


def test_samples_are_images_and_come_back_with_their_generator() -> None:
    model = gan()
    first, second = (model.sample(3, torch.Generator().manual_seed(4)) for _ in range(2))
    assert torch.equal(first, second)
    assert first.shape == (3, 2, 8, 8)
    assert 0 < float(first.detach().min()) < float(first.detach().max()) < 1


def test_images_of_another_size_than_the_generator_s_are_refused() -> None:
    encoder, _, quantizer = parts()
    model = QLInfoWGAN(encoder, nn.Sequential(nn.Linear(5, 8), nn.Unflatten(1, (2, 2, 2))), quantizer)
    with pytest.raises(ValueError, match="x must have axis=2"):
        model.encoder_losses(images(2))


def test_recipes_are_the_published_table() -> None:
    table = {name: (recipe.num_latents, recipe.weight_decay) for name, recipe in RECIPES.items()}
    assert table == {
        "qlae_shapes3d": (12, 0.1),
        "qlae_mpi3d": (14, 0.001),
        "qlae_falcor3d": (14, 0.1),
        "qlae_isaac3d": (18, 0.1),
        "ql_infowgan_shapes3d": (12, 1e-3),
        "ql_infowgan_mpi3d": (14, 1e-3),
        "ql_infowgan_falcor3d": (14, 1e-4),
    }
    assert set(table) == set(hg.list_models("ql*"))
    for name, recipe in RECIPES.items():
        is_gan = name.startswith("ql_infowgan")
        assert (recipe.learning_rate, recipe.batch_size) == ((2e-4, 64) if is_gan else (1e-3, 128))
        assert recipe.steps == 200_000
        model = hg.create_model(name, size="small", img_size=16)
        assert model.quantizer.levels == (10,) * recipe.num_latents
    assert math.isclose(1e-3 * 0.1 * 200_000, 20)

"""The image networks: sizes, styles, initial ranges, parameters; the baselines' losses."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributions import Normal, kl_divergence

import headgate as hg
from headgate.methods.latent.latent_quantization.baselines import (
    VQVAE,
    BioAE,
    TotalCorrelationVAE,
    UniformLatents,
    VariationalAE,
    VectorCodebook,
)
from headgate.methods.latent.latent_quantization.encoder import LARGE, SMALL

BLOCKS = {"kernel_sizes": (3, 4), "strides": (1, 2), "paddings": (1, 1), "hidden_dims": (12, 10)}


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_the_encoder_equals_its_definition() -> None:
    encoder = hg.ImageEncoder(5, (8, 12), 2, widths=(4, 6), **BLOCKS)
    x = noise(3, 2, 8, 12)
    h = x
    for block, stride in zip(encoder.conv, (1, 2), strict=True):
        h = F.conv2d(h, block[0].weight, stride=stride, padding=1)
        mean, variance = h.mean(dim=(2, 3), keepdim=True), h.var(dim=(2, 3), keepdim=True, correction=0)
        h = (h - mean) / (variance + 1e-6).sqrt()
        h = h * block[1].weight[:, None, None] + block[1].bias[:, None, None]
        h = torch.where(h > 0, h, 0.2 * h)
    assert encoder.transition_shape == tuple(h.shape[1:]) == (6, 4, 6)
    for layer in (encoder.dense[0][0], encoder.dense[1][0]):
        h = (h.flatten(1) @ layer.weight.T + layer.bias).clamp(min=0)
    torch.testing.assert_close(encoder.forward_features(x), h, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(encoder(x), h @ encoder.head.weight.T + encoder.head.bias, rtol=1e-4, atol=1e-5)


def test_the_style_decoder_equals_its_definition() -> None:
    decoder = hg.StyleDecoder(5, 2, (3, 4), input_channels=7, widths=(6, 4), **BLOCKS)
    with torch.no_grad():
        decoder.input_map.add_(0.1 * noise(7, 3, 4))
    z = noise(3, 5, seed=1)
    w = z
    for layer in decoder.dense:
        w = (w @ layer[0].weight.T + layer[0].bias).clamp(min=0)
    h = decoder.input_map.expand(3, -1, -1, -1)
    for block, stride in zip(decoder.blocks, (1, 2), strict=True):
        h = F.leaky_relu(F.conv_transpose2d(h, block.conv.weight, stride=stride, padding=1), 0.2)
        h = (h - h.mean(dim=(2, 3), keepdim=True)) / (h.var(dim=(2, 3), keepdim=True, correction=0) + 1e-6).sqrt()
        style = (w @ block.style.weight.T + block.style.bias).clamp(min=0)
        channels = h.shape[1]
        h = h * style[:, :channels, None, None] + style[:, channels:, None, None]
    expected = F.conv2d(h, decoder.conv.weight, padding=1)
    torch.testing.assert_close(decoder(z), expected, rtol=1e-4, atol=1e-5)
    assert expected.shape == (3, 2, 6, 8)


def test_the_plain_decoder_equals_its_definition() -> None:
    decoder = hg.ConvDecoder(5, 2, (3, 4), input_channels=7, widths=(6, 4), **BLOCKS)
    z = noise(3, 5)
    h = z
    for layer in decoder.dense:
        h = (h @ layer[0].weight.T + layer[0].bias).clamp(min=0)
    assert h.shape == (3, 7 * 3 * 4)
    h = h.reshape(3, 7, 3, 4)
    for block, stride in zip(decoder.blocks, (1, 2), strict=True):
        h = F.conv_transpose2d(h, block[0].weight, stride=stride, padding=1)
        h = (h - h.mean(dim=(2, 3), keepdim=True)) / (h.var(dim=(2, 3), keepdim=True, correction=0) + 1e-6).sqrt()
        h = F.leaky_relu(h * block[1].weight[:, None, None] + block[1].bias[:, None, None], 0.2)
    expected = torch.einsum("oi,nihw->nohw", decoder.conv.weight[:, :, 0, 0], h)
    torch.testing.assert_close(decoder(z), expected, rtol=1e-4, atol=1e-5)


def test_weights_begin_in_the_published_ranges() -> None:
    decoder = hg.StyleDecoder(5, 3, 4, input_channels=64, widths=(16, 8), **BLOCKS)
    bound = 1 / math.sqrt(64 * 9)
    weight = decoder.blocks[0].conv.weight.detach()
    assert 0.98 * bound < float(weight.abs().max()) <= bound
    assert float(weight.std()) == pytest.approx(bound / math.sqrt(3), rel=0.05)
    assert (decoder.input_map == 0.1).all()
    encoder = hg.ImageEncoder(5, 8, 3, widths=(32, 32), **BLOCKS)
    bound = 1 / math.sqrt(3 * 9)
    assert 0.95 * bound < float(encoder.conv[0][0].weight.detach().abs().max()) <= bound


def published_parameters(num_latents: int, levels: int = 10) -> dict[str, int]:
    """Counted from the table of layers: large encoder, style decoder, codebooks."""
    widths = (3, *LARGE.widths)
    conv = sum(a * b * k * k + 2 * b for a, b, k in zip(widths, widths[1:], LARGE.kernel_sizes, strict=False))
    encoder = conv + (4096 * 256 + 256) + (256 * 256 + 256) + 256 * num_latents + num_latents
    up = (256, *LARGE.widths[::-1])
    blocks = sum(a * b * k * k + 256 * 2 * b + 2 * b for a, b, k in zip(up, up[1:], LARGE.kernel_sizes, strict=False))
    decoder = 256 * 16 + num_latents * 256 + 256 + 256 * 256 + 256 + blocks + 32 * 3 * 9
    return {"encoder": encoder, "decoder": decoder, "quantizer": num_latents * levels}


@pytest.mark.parametrize("name", hg.list_models("ql*"))
def test_presets_have_the_parameters_of_the_published_layers(name: str) -> None:
    with torch.device("meta"):
        model = hg.create_model(name)
    expected = published_parameters(model.quantizer.num_latents)
    counted = {part: sum(p.numel() for p in model.get_submodule(part).parameters()) for part in expected}
    assert counted == expected
    critic = 257 if name.startswith("ql_infowgan") else 0
    assert sum(p.numel() for p in model.parameters()) == sum(expected.values()) + critic
    assert model.encoder.transition_shape == (256, 4, 4)


def test_large_images_go_to_a_map_of_4_and_back_and_small_ones_through_four_blocks() -> None:
    with torch.device("meta"):
        for size in ("large", "small"):
            for decoder in ("style", "conv"):
                model = hg.image_qlae(12, 10, size=size, decoder=decoder)
                assert model.encoder.transition_shape == ((256, 4, 4) if size == "large" else (512, 4, 4))
                assert model(torch.empty(2, 3, 64, 64)).logits.shape == (2, 3, 64, 64)
    assert len(SMALL.widths) == 4
    assert len(hg.image_qlae(3, 4, 16, size="small").encoder.conv) == 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"size": "huge"}, "size must be one of large, small, got 'huge'"),
        ({"decoder": "mlp"}, "decoder must be one of style, conv, got 'mlp'"),
        ({"img_size": 40}, "img_size must be a multiple of 16, got 40"),
    ],
)
def test_unknown_networks_are_refused(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        hg.image_qlae(**arguments)


def test_sizes_that_do_not_go_together_are_refused() -> None:
    with pytest.raises(ValueError, match="one equal, positive length, got 2, 1, 2 and 2"):
        hg.ImageEncoder(3, 8, widths=(4, 4), **{**BLOCKS, "kernel_sizes": (3,)})
    with pytest.raises(ValueError, match="hidden_dims must hold at least one"):
        hg.StyleDecoder(3, widths=(4, 4), **{**BLOCKS, "hidden_dims": ()})
    with pytest.raises(ValueError, match="paddings not negative"):
        hg.ConvDecoder(3, widths=(4, 4), **{**BLOCKS, "paddings": (1, -1)})
    with pytest.raises(ValueError, match=r"img_size must be large enough for 12 blocks, got \(2, 2\)"):
        hg.ImageEncoder(3, 2)
    with pytest.raises(ValueError, match="x must have height=8"):
        hg.ImageEncoder(3, 8, widths=(4, 4), **BLOCKS)(torch.zeros(1, 3, 9, 8))


def flat(outputs: int, seed: int = 0) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Linear(8, outputs)


def back(inputs: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return nn.Linear(inputs, 8)


def entropy(decoder: nn.Module, z: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return F.binary_cross_entropy(decoder(z).sigmoid(), x, reduction="none").mean(dim=1)


def test_a_variational_autoencoder_s_loss_is_the_elbo_per_pixel() -> None:
    encoder, decoder, x = flat(6), back(3), torch.rand(5, 8)
    model = VariationalAE(encoder, decoder, beta=4.0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        loss = model.training_loss(x)
        torch.manual_seed(3)
        mean, raw = encoder(x).chunk(2, dim=1)
        std = F.softplus(raw)
        z = mean + std * torch.randn_like(std)
    divergence = kl_divergence(Normal(mean, std), Normal(0.0, 1.0)).sum(dim=1)
    torch.testing.assert_close(loss, (entropy(decoder, z, x) + 4.0 * divergence / 8).mean())
    assert torch.equal(model.code(x).latents, mean)


def test_total_correlation_terms_equal_their_loops_and_add_up_to_the_kl_estimate() -> None:
    z, mean, std = noise(4, 3), noise(4, 3, seed=1), noise(4, 3, seed=2).abs() + 0.5
    model = TotalCorrelationVAE(flat(6), back(3), dataset_size=50, beta=7.0)
    terms = []
    for i in range(4):
        pairs = torch.stack([Normal(mean[j], std[j]).log_prob(z[i]) for j in range(4)])
        joint = pairs.sum(dim=1).logsumexp(dim=0) - math.log(4 * 50)
        factors = (pairs.logsumexp(dim=0) - math.log(4 * 50)).sum()
        posterior = Normal(mean[i], std[i]).log_prob(z[i]).sum()
        prior = Normal(0.0, 1.0).log_prob(z[i]).sum()
        terms.append((posterior - joint) + 7.0 * (joint - factors) + (factors - prior))
    torch.testing.assert_close(model.divergence(z, mean, std), torch.stack(terms))
    model.beta = 1.0
    estimate = Normal(mean, std).log_prob(z).sum(dim=1) - Normal(0.0, 1.0).log_prob(z).sum(dim=1)
    torch.testing.assert_close(model.divergence(z, mean, std), estimate)


def test_biological_constraints_punish_activity_and_negative_latents() -> None:
    model = BioAE(flat(3), back(3), activity=0.5, nonnegative=2.0)
    z = torch.tensor([[1.0, -2.0, 0.0], [0.0, 0.0, 0.0]])
    torch.testing.assert_close(model.penalty(z), torch.tensor([0.5 * 5 / 3 + 2.0 * 2 / 3, 0.0]))


def test_vector_quantisation_finds_the_nearest_vectors_and_moves_both_sides() -> None:
    codebook = VectorCodebook(6, 4)
    model, x = VQVAE(flat(12), back(12), codebook), torch.rand(5, 8)
    z = model.encoder(x).unflatten(1, (3, 4))
    code = model.code(x)
    assert torch.equal(code.latents, torch.cdist(z, codebook.vectors.expand(5, -1, -1)).argmin(dim=2))
    quantized = codebook.vectors[code.latents].flatten(1)
    distance = (z.flatten(1) - quantized).square().mean(dim=1)
    loss = model.training_loss(x)
    torch.testing.assert_close(loss, (entropy(model.decoder, quantized, x) + 1.25 * distance).mean())
    loss.backward()
    assert codebook.vectors.grad.abs().sum() > 0
    assert model.encoder.weight.grad.abs().sum() > 0


def test_uniform_latents_pass_through_without_loss() -> None:
    latents = UniformLatents(3)
    z = noise(4, 3)
    out = latents(z)
    assert out.z_hat is z
    assert float(out.loss) == 0
    draws = latents.sample(2000, torch.Generator().manual_seed(0))
    assert draws.min() >= 0
    assert draws.max() <= 1
    assert float(draws.mean()) == pytest.approx(0.5, abs=0.02)

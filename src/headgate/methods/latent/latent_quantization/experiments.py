"""How each arm of the claim is built, trained and read."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from headgate.data import stream_generator
from headgate.evaluate import InfoMEC, infomec
from headgate.methods.latent.latent_quantization.baselines import (
    VQVAE,
    BioAE,
    Code,
    PlainAE,
    TotalCorrelationVAE,
    UniformLatents,
    VariationalAE,
    VectorCodebook,
)
from headgate.methods.latent.latent_quantization.encoder import dense_layers
from headgate.methods.latent.latent_quantization.infowgan import InfoWGANTraining, QLInfoWGAN
from headgate.methods.latent.latent_quantization.optimizer import qlae_optimizer
from headgate.methods.latent.latent_quantization.qlae import QLAE, image_networks
from headgate.methods.latent.latent_quantization.quantizer import LatentQuantizer
from headgate.methods.latent.latent_quantization.worlds import Images
from headgate.train import DivergedError, fit

__all__ = [
    "ARMS",
    "DenseEncoder",
    "Reading",
    "Sizes",
    "build",
    "dense_networks",
    "is_gan",
    "published_networks",
    "read",
    "score",
    "train",
]

ARMS = (
    "qlae",
    "ae",
    "ae_decay",
    "qlae_no_decay",
    "shared_codebook",
    "ae_binned",
    "ae_early",
    "beta_vae",
    "tc_vae",
    "bio_ae",
    "vq_vae",
    "ql_infowgan",
    "infowgan",
)

Networks = Callable[[int, int, tuple[int, int, int]], tuple[Any, nn.Module]]
"""(outputs of the encoder, inputs of the decoder, shape of the images) → encoder and decoder."""

_BATCH = 250
_PROBE = 250
_PROBE_EVERY = 10


class Sizes(NamedTuple):
    """What all arms are built with.

    Attributes:
        networks: makes encoder and decoder.
        num_latents: n_z.
        levels: n_v, values per latent; bins of the control.
        head_gain: factor of the encoder's last weights at the start.
    """

    networks: Networks
    num_latents: int
    levels: int
    head_gain: float = 1.0


class Reading(NamedTuple):
    """A representation of some images.

    Attributes:
        latents: ``(n, latent)`` numbers, or int64 indices where ``discrete``.
        discrete: whether they are codes.
        inputs: ``(n, ...)`` what the decoder reads for them.
        psnr: of the reconstruction, in dB.
    """

    latents: Tensor
    discrete: bool
    inputs: Tensor
    psnr: float


class DenseEncoder(nn.Module):
    """Linear-ReLU layers on flat images, and a linear head."""

    def __init__(self, outputs: int, pixels: int, hidden_dims: Sequence[int]) -> None:
        super().__init__()
        self.dense = dense_layers(pixels, hidden_dims)
        self.num_features = hidden_dims[-1]
        self.head = nn.Linear(self.num_features, outputs)

    def forward(self, x: Float[Tensor, "batch ..."]) -> Float[Tensor, "batch latent"]:
        """Map images to latents."""
        return self.head(self.forward_features(x))

    def forward_features(self, x: Float[Tensor, "batch ..."]) -> Float[Tensor, "batch feature"]:
        """What the head and a critic read."""
        return self.dense(x.flatten(1))


def dense_networks(*hidden_dims: int) -> Networks:
    """Networks of Linear-ReLU layers, the same in both directions."""

    def make(outputs: int, inputs: int, shape: tuple[int, int, int]) -> tuple[DenseEncoder, nn.Module]:
        pixels = math.prod(shape)
        decoder = nn.Sequential(
            dense_layers(inputs, hidden_dims[::-1]), nn.Linear(hidden_dims[0], pixels), nn.Unflatten(1, shape)
        )
        return DenseEncoder(outputs, pixels, hidden_dims), decoder

    return make


def published_networks(outputs: int, inputs: int, shape: tuple[int, int, int]) -> tuple[Any, nn.Module]:
    """The large image encoder and the style decoder."""
    return image_networks(inputs, shape[1], shape[0], encoder_outputs=outputs)


def is_gan(arm: str) -> bool:
    """Whether an arm is trained as a GAN."""
    return arm in ("ql_infowgan", "infowgan")


def build(arm: str, sizes: Sizes, images: Images) -> nn.Module:
    """The untrained model of an arm, with the published weights of its losses; draws from the global generator."""
    count = sizes.num_latents
    codebook = VectorCodebook() if arm == "vq_vae" else None
    width = 1 if codebook is None else codebook.vectors.shape[1]
    outputs = {"beta_vae": 2, "tc_vae": 2}.get(arm, width) * count
    encoder, decoder = sizes.networks(outputs, width * count, images.shape)
    with torch.no_grad():
        encoder.head.weight.mul_(sizes.head_gain)
    if codebook is not None:
        return VQVAE(encoder, decoder, codebook)
    if arm == "shared_codebook":
        return QLAE(encoder, decoder, LatentQuantizer(count, sizes.levels, shared=True, learnable=False))
    if arm in ("qlae", "qlae_no_decay"):
        return QLAE(encoder, decoder, LatentQuantizer(count, sizes.levels))
    if is_gan(arm):
        latents = LatentQuantizer(count, sizes.levels) if arm == "ql_infowgan" else UniformLatents(count)
        return QLInfoWGAN(encoder, decoder, latents)
    if arm == "beta_vae":
        return VariationalAE(encoder, decoder, beta=3.0)
    if arm == "tc_vae":
        return TotalCorrelationVAE(encoder, decoder, dataset_size=images.size, beta=3.0)
    return BioAE(encoder, decoder) if arm == "bio_ae" else PlainAE(encoder, decoder)


def train(
    model: nn.Module,
    images: Images,
    *,
    steps: int,
    batch_size: int,
    learning_rate: float,
    weight_decay: float,
    seed: int,
    stop_psnr: float | None = None,
) -> list[float]:
    """Train in place on images drawn uniformly; batches depend on seed and step alone, so all arms see the same.

    Args:
        model: what to train.
        images: where from.
        steps: updates, of the encoder for a GAN.
        batch_size: images per step.
        learning_rate: of Adam.
        weight_decay: decoupled, of weights.
        seed: of batches and noise.
        stop_psnr: stop as soon as images are reconstructed so well, in dB; for an autoencoder.

    Returns:
        The loss of every step; of a GAN that of the encoder.

    Raises:
        DivergedError: the loss became NaN or infinite.
    """

    def batch(step: int) -> Tensor:
        chosen = torch.randint(images.size, (batch_size,), generator=stream_generator(seed, "batches", step))
        return images.pixels(chosen)

    if isinstance(model, QLInfoWGAN):
        return _train_gan(model, batch, steps, learning_rate, weight_decay, seed)
    optimizer = qlae_optimizer(model, learning_rate, weight_decay, codebooks=(LatentQuantizer, VectorCodebook))
    if stop_psnr is None:
        return fit(model, batch, _loss, steps=steps, optimizer=optimizer, seed=seed).losses
    probe = torch.randint(images.size, (_PROBE,), generator=stream_generator(seed, "probe"))
    history = fit(
        model,
        batch,
        _loss,
        steps=steps,
        optimizer=optimizer,
        seed=seed,
        evaluate=lambda trained, _: {"psnr": read(trained, images, probe).psnr},
        evaluate_every=_PROBE_EVERY,
        stop=lambda metrics: metrics["psnr"] >= stop_psnr,
    )
    return history.losses


@torch.no_grad()
def read(model: nn.Module, images: Images, index: Tensor, bins: int | None = None) -> Reading:
    """The representation of images and how well they can be made from it.

    Args:
        model: a trained model, on any device.
        images: where from.
        index: which of them.
        bins: cut each continuous latent into so many equally wide bins, decoded from their middles.
    """
    model.eval()
    device = next(model.parameters()).device
    chunks = index.split(_BATCH)
    codes = [_code(model, images.pixels(chunk).to(device)) for chunk in chunks]
    latents, inputs = (torch.cat(parts).cpu() for parts in zip(*((c.latents, c.inputs) for c in codes), strict=True))
    logits = [code.logits.cpu() for code in codes]
    discrete = codes[0].discrete
    if bins is not None:
        low, high = latents.min(dim=0).values, latents.max(dim=0).values
        width = ((high - low) / bins).clamp_min(torch.finfo(latents.dtype).tiny)
        latents = ((latents - low) / width).long().clamp(0, bins - 1)
        inputs, discrete = low + (latents + 0.5) * width, True
        logits = [model.get_submodule("decoder")(part.to(device)).cpu() for part in inputs.split(_BATCH)]
    errors = [
        (part.sigmoid() - images.pixels(chunk)).square().flatten(1).mean(dim=1)
        for part, chunk in zip(logits, chunks, strict=True)
    ]
    psnr = -10 * math.log10(float(torch.cat(errors).double().mean()))
    return Reading(latents, discrete, inputs, psnr)


def score(reading: Reading, images: Images, index: Tensor) -> InfoMEC:
    """InfoMEC of a representation; latents that inform about nothing are pruned."""
    return infomec(images.factors(index), reading.latents, reading.discrete, zero="ignore")


def _loss(model: nn.Module, x: Tensor) -> Tensor:
    if isinstance(model, QLAE):
        return model.training_loss(x).loss
    assert isinstance(model, PlainAE)
    return model.training_loss(x)


def _train_gan(
    model: QLInfoWGAN, batch: Callable[[int], Tensor], steps: int, learning_rate: float, weight_decay: float, seed: int
) -> list[float]:
    device = next(model.parameters()).device
    training = InfoWGANTraining(model, learning_rate, weight_decay, seed=seed)
    losses = []
    for step in range(steps):
        losses.append(training.step(batch(step).to(device))[0].loss)
    values = torch.stack(losses).tolist()
    if not math.isfinite(values[-1]):
        raise DivergedError(f"the loss of step {len(values) - 1} is {values[-1]}; lower the learning rate")
    return values


def _code(model: nn.Module, x: Tensor) -> Code:
    if isinstance(model, PlainAE):
        return model.code(x)
    assert isinstance(model, QLAE | QLInfoWGAN)
    output = model(x)
    if isinstance(model.quantizer, UniformLatents):
        return Code(output.latents.z_hat, False, output.latents.z_hat, output.logits)
    return Code(output.latents.indices, True, output.latents.quantized, output.logits)

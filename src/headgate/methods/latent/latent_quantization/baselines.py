"""What the paper compares with: plain, biologically inspired, variational and vector-quantised autoencoders.

All share the encoder and decoder of the quantised one, and its cross-entropy (mean over pixels), to which each adds a
term of its own, per image, over latents j of n_z and pixels d of n_x:

    AE       nothing
    BioAE    λ_n · mean_j max(0, -z_j) + λ_a · mean_j z_j²                 (Whittington et al. 2023, arXiv 2210.01768)
    β-VAE    β · (n_z / n_x) · mean_j KL(N(μ_j, σ_j) ‖ N(0, 1)), σ = softplus        (Higgins et al. 2017)
    β-TCVAE  (1 / n_x) · [MI + β · TC + dimension-wise KL], minibatch-weighted       (Chen et al. 2018, arXiv 1802.04942)
    VQ-VAE   mean (sg(z) - q)² + 0.25 · mean (z - sg(q))², n_z codes of 64 numbers out of 512   (van den Oord et al. 2017)

InfoWGAN-GP itself has latents drawn uniformly from [0, 1] in place of the codebooks (:class:`UniformLatents`).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from headgate.methods.latent.latent_quantization.qlae import reconstruction_loss
from headgate.methods.latent.latent_quantization.quantizer import QuantizedLatents
from headgate.validate import check_positive

__all__ = [
    "VQVAE",
    "BioAE",
    "Code",
    "PlainAE",
    "TotalCorrelationVAE",
    "UniformLatents",
    "VariationalAE",
    "VectorCodebook",
]


class Code(NamedTuple):
    """A representation of images, ready to be scored.

    Attributes:
        latents: ``(batch, latent)`` numbers, or int64 indices where ``discrete``.
        discrete: whether they are codes.
        inputs: ``(batch, ...)`` what the decoder reads.
        logits: ``(batch, ...)`` of the reconstruction.
    """

    latents: Tensor
    discrete: bool
    inputs: Tensor
    logits: Float[Tensor, "batch ..."]


class PlainAE(nn.Module):
    """An autoencoder; the others are made from it."""

    def __init__(self, encoder: nn.Module, decoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder
        self.decoder = decoder

    def code(self, x: Float[Tensor, "batch ..."]) -> Code:
        """Latents and reconstruction of images in [0, 1]."""
        z = self.encoder(x)
        return Code(z, False, z, self.decoder(z))

    def training_loss(self, x: Float[Tensor, "batch ..."]) -> Float[Tensor, ""]:
        """The scalar loss on images in [0, 1]."""
        z = self.encoder(x)
        return (reconstruction_loss(self.decoder(z), x) + self.penalty(z)).mean()

    def penalty(self, z: Float[Tensor, "batch latent"]) -> Float[Tensor, " batch"]:
        """What the loss adds for the latents."""
        return torch.zeros_like(z[:, 0])


class BioAE(PlainAE):
    """Latents that are not negative and little active."""

    def __init__(
        self, encoder: nn.Module, decoder: nn.Module, *, activity: float = 0.01, nonnegative: float = 1.0
    ) -> None:
        super().__init__(encoder, decoder)
        self.activity = activity
        self.nonnegative = nonnegative

    def penalty(self, z: Float[Tensor, "batch latent"]) -> Float[Tensor, " batch"]:
        """Negative parts and mean squares."""
        return self.nonnegative * (-z).clamp_min(0).mean(dim=1) + self.activity * z.square().mean(dim=1)


class VariationalAE(PlainAE):
    """β-VAE; the encoder gives means and pre-softplus deviations, twice as many numbers as there are latents."""

    def __init__(self, encoder: nn.Module, decoder: nn.Module, *, beta: float = 1.0) -> None:
        super().__init__(encoder, decoder)
        self.beta = beta

    def code(self, x: Float[Tensor, "batch ..."]) -> Code:
        """Means and what the decoder makes of them."""
        mean = self.encoder(x).chunk(2, dim=1)[0]
        return Code(mean, False, mean, self.decoder(mean))

    def training_loss(self, x: Float[Tensor, "batch ..."]) -> Float[Tensor, ""]:
        """The scalar loss; noise comes from PyTorch's global generator."""
        mean, raw = self.encoder(x).chunk(2, dim=1)
        std = F.softplus(raw)
        z = mean + std * torch.randn_like(std)
        divergence = self.divergence(z, mean, std) / x[0].numel()
        return (reconstruction_loss(self.decoder(z), x) + divergence).mean()

    def divergence(
        self, z: Float[Tensor, "batch latent"], mean: Float[Tensor, "batch latent"], std: Float[Tensor, "batch latent"]
    ) -> Float[Tensor, " batch"]:
        """β times the KL divergence from the prior, in nats."""
        return self.beta * (0.5 * (mean.square() + std.square() - 1) - std.log()).sum(dim=1)


class TotalCorrelationVAE(VariationalAE):
    """β-TCVAE; ``beta`` weighs the total correlation alone.

    Args:
        encoder: as in :class:`VariationalAE`.
        decoder: codes to logits.
        dataset_size: images in the training set, for the weighting of the minibatch.
        beta: weight of the total correlation.
    """

    def __init__(self, encoder: nn.Module, decoder: nn.Module, *, dataset_size: int, beta: float = 1.0) -> None:
        super().__init__(encoder, decoder, beta=beta)
        check_positive(dataset_size=dataset_size)
        self.dataset_size = dataset_size

    def divergence(
        self, z: Float[Tensor, "batch latent"], mean: Float[Tensor, "batch latent"], std: Float[Tensor, "batch latent"]
    ) -> Float[Tensor, " batch"]:
        """Mutual information, β times total correlation, and dimension-wise KL, in nats (Chen et al., eq. 2)."""
        prior = _log_normal(z, torch.zeros_like(z), torch.ones_like(z)).sum(dim=1)
        posterior = _log_normal(z, mean, std).sum(dim=1)
        pairs = _log_normal(z[:, None], mean[None], std[None])  # log q(z_i | x_j), per latent
        share = math.log(len(z) * self.dataset_size)
        joint = pairs.sum(dim=2).logsumexp(dim=1) - share
        factors = (pairs.logsumexp(dim=1) - share).sum(dim=1)
        return (posterior - joint) + self.beta * (joint - factors) + (factors - prior)


class VectorCodebook(nn.Module):
    """``(size, dim)`` vectors, the nearest of which replaces each latent's."""

    def __init__(self, size: int = 512, dim: int = 64) -> None:
        super().__init__()
        limit = math.sqrt(3 / dim)
        self.vectors = nn.Parameter(torch.empty(size, dim).uniform_(-limit, limit))

    def forward(self, z: Float[Tensor, "batch latent dim"]) -> tuple[Tensor, Tensor]:
        """The nearest vectors ``(batch, latent, dim)`` and their indices ``(batch, latent)``."""
        squares = z.square().sum(dim=-1, keepdim=True) + self.vectors.square().sum(dim=-1)
        indices = (squares - 2 * z @ self.vectors.mT).argmin(dim=-1)
        return self.vectors[indices], indices


class VQVAE(PlainAE):
    """VQ-VAE; the encoder gives, and the decoder takes, ``num_latents * dim`` numbers."""

    def __init__(
        self, encoder: nn.Module, decoder: nn.Module, codebook: VectorCodebook, *, quantization: float = 1.0,
        commitment: float = 0.25,
    ) -> None:  # fmt: skip
        super().__init__(encoder, decoder)
        self.codebook = codebook
        self.quantization = quantization
        self.commitment = commitment

    def code(self, x: Float[Tensor, "batch ..."]) -> Code:
        """Indices and reconstruction."""
        quantized, indices = self._snap(self.encoder(x))
        return Code(indices, True, quantized, self.decoder(quantized))

    def training_loss(self, x: Float[Tensor, "batch ..."]) -> Float[Tensor, ""]:
        """The scalar loss on images in [0, 1]."""
        z = self.encoder(x)
        quantized, _ = self._snap(z)
        logits = self.decoder(z + (quantized - z).detach())
        penalty = self.quantization * (z.detach() - quantized).square().mean(dim=1)
        penalty = penalty + self.commitment * (z - quantized.detach()).square().mean(dim=1)
        return (reconstruction_loss(logits, x) + penalty).mean()

    def _snap(self, z: Tensor) -> tuple[Tensor, Tensor]:
        quantized, indices = self.codebook(z.unflatten(1, (-1, self.codebook.vectors.shape[1])))
        return quantized.flatten(1), indices


class UniformLatents(nn.Module):
    """Continuous latents, drawn uniformly from [0, 1]; in the place of a quantiser in an InfoWGAN-GP."""

    def __init__(self, num_latents: int) -> None:
        super().__init__()
        self.num_latents = num_latents

    def forward(self, z: Float[Tensor, "batch latent"]) -> QuantizedLatents:
        """The latents themselves, with all losses 0 and all indices -1."""
        none = torch.zeros_like(z[..., 0])
        return QuantizedLatents(z, z, torch.full_like(z, -1, dtype=torch.int64), none.mean(), none, none, none)

    def sample(self, n: int, generator: torch.Generator | None = None) -> Float[Tensor, "n latent"]:
        """Draw ``n`` rows from [0, 1], on the CPU."""
        return torch.rand(n, self.num_latents, generator=generator, device="cpu")


def _log_normal(z: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    return -0.5 * (((z - mean) / std).square() + math.log(2 * math.pi)) - std.log()

"""QLInfoWGAN-GP: a Wasserstein GAN whose noise is a quantised code that the critic's encoder reads back.

With G the decoder and a sigmoid, D the critic value and z_hat the snapped code of one encoder, z each coordinate drawn
uniformly from its own codebook, ``L_lat = mean_j (z_hat(G(z))_j - z_j)²`` and ``x_mix = e·x + (1-e)·G(z)``, e ~ U[0, 1]
per image (Hsu et al. 2023, arXiv 2305.18378; gradient penalty of Gulrajani et al., arXiv 1704.00028):

    encoder step     (D(G(z)) - D(x)) + 10·(|∇ D(x_mix)| - 1)² + 200·L_lat + 0.01·(L_quant + L_commit)
    generator step   -D(G(z)) + 200·L_lat + 0.01·(L_quant + L_commit)     after every fifth encoder step

with the quantisation terms on generated images. The generator's optimizer also owns the codebooks.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, Protocol

import torch
from jaxtyping import Float
from torch import Tensor, nn

from headgate.data.seeding import stream_generator
from headgate.methods.latent.latent_quantization.optimizer import qlae_optimizer
from headgate.methods.latent.latent_quantization.qlae import image_networks
from headgate.methods.latent.latent_quantization.quantizer import LatentQuantizer, QuantizedLatents
from headgate.validate import check_positive, check_shape

__all__ = [
    "EncoderLosses",
    "GeneratorLosses",
    "InfoWGANOutput",
    "InfoWGANTraining",
    "LatentPrior",
    "QLInfoWGAN",
    "image_ql_infowgan",
]


class LatentPrior(Protocol):
    """What stands between encoder and decoder: a quantiser, or another latent space that can be drawn from."""

    def __call__(self, z: Tensor) -> QuantizedLatents:
        """Give the code of the encoder's outputs."""

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """Draw ``n`` codes."""


class InfoWGANOutput(NamedTuple):
    """What :class:`QLInfoWGAN` gives.

    Attributes:
        logits: ``(batch, ...)`` of the image generated from the code of each image.
        value: ``(batch,)`` the critic's value of each image.
        latents: the code of each image.
    """

    logits: Float[Tensor, "batch ..."]
    value: Float[Tensor, " batch"]
    latents: QuantizedLatents


class EncoderLosses(NamedTuple):
    """The loss of encoder and critic: ``loss`` a scalar, the rest ``(batch,)`` without weights."""

    loss: Float[Tensor, ""]
    value: Float[Tensor, " batch"]
    gradient: Float[Tensor, " batch"]
    latent: Float[Tensor, " batch"]
    quantization: Float[Tensor, " batch"]
    commitment: Float[Tensor, " batch"]


class GeneratorLosses(NamedTuple):
    """The loss of generator and codebooks: ``loss`` a scalar, the rest ``(batch,)`` without weights."""

    loss: Float[Tensor, ""]
    value: Float[Tensor, " batch"]
    latent: Float[Tensor, " batch"]
    quantization: Float[Tensor, " batch"]
    commitment: Float[Tensor, " batch"]


class QLInfoWGAN(nn.Module):
    """Encoder with a critic's head, generator and quantiser.

    Args:
        encoder: with ``num_features``, ``forward_features(x)`` ``(batch, num_features)`` and ``head``, as
            :class:`~headgate.methods.latent.latent_quantization.encoder.ImageEncoder` has them.
        decoder: codes to logits; with a sigmoid it is the generator.
        quantizer: between them; it holds the weights of its losses.
        value_weight: of the critic's values.
        gradient_weight: of the gradient penalty.
        latent_weight: of L_lat.

    Raises:
        TypeError: an encoder without these.
        ValueError: a negative weight.
    """

    def __init__(
        self,
        encoder: nn.Module,
        decoder: nn.Module,
        quantizer: nn.Module,
        *,
        value_weight: float = 1.0,
        gradient_weight: float = 10.0,
        latent_weight: float = 200.0,
    ) -> None:
        super().__init__()
        missing = [name for name in ("num_features", "forward_features", "head") if not hasattr(encoder, name)]
        if missing:
            raise TypeError(f"encoder must have {', '.join(missing)}, got {type(encoder).__name__}")
        weights = {"value_weight": value_weight, "gradient_weight": gradient_weight, "latent_weight": latent_weight}
        for name, weight in weights.items():
            if weight < 0:
                raise ValueError(f"{name} must not be negative, got {weight}")
        network: Any = encoder
        self.encoder = network
        self.critic = nn.Linear(network.num_features, 1)
        latents: Any = quantizer
        self.quantizer = latents
        self.decoder = decoder
        self.value_weight = value_weight
        self.gradient_weight = gradient_weight
        self.latent_weight = latent_weight

    def forward(self, x: Float[Tensor, "batch ..."]) -> InfoWGANOutput:
        """Encode, judge and generate anew ``x``, images in [0, 1].

        Raises:
            TypeError: ``x`` is of another dtype.
            ValueError: ``x`` is of another shape, or holds NaN or infinity.
        """
        value, latents = self._judge(x)
        return InfoWGANOutput(self.decoder(latents.z_hat), value, latents)

    def encode(self, x: Float[Tensor, "batch ..."]) -> QuantizedLatents:
        """The code of images."""
        return self.quantizer(self.encoder.head(self.encoder.forward_features(x)))

    def generate(self, z: Float[Tensor, "batch latent"]) -> Float[Tensor, "batch ..."]:
        """Images in [0, 1] of codes."""
        return self.decoder(z).sigmoid()

    def sample(self, n: int, generator: torch.Generator | None = None) -> Float[Tensor, "n ..."]:
        """Images in [0, 1] of ``n`` random codes.

        Args:
            n: images to draw.
            generator: a CPU generator; without one, PyTorch's global generator is used.
        """
        return self.generate(self._draw(n, generator))

    def encoder_losses(self, x: Float[Tensor, "batch ..."], generator: torch.Generator | None = None) -> EncoderLosses:
        """The loss of the encoder step; it gives the generator no gradient.

        Args:
            x: ``(batch, ...)`` images in [0, 1].
            generator: a CPU generator for the codes and the mixtures.
        """
        with torch.no_grad():
            codes = self._draw(len(x), generator)
            fake = self.generate(codes)
        share = torch.rand(len(x), *[1] * (x.dim() - 1), generator=generator, device="cpu").to(x)
        check_shape("x", x, fake.shape, ", ".join(["batch"] + ["axis"] * (x.dim() - 1)))
        fake_value, latents = self._judge(fake)
        value = fake_value - self._value(x)
        gradient = (self._slope(share * x + (1 - share) * fake) - 1).square()
        latent = (latents.z_hat - codes).square().mean(dim=-1)
        loss = (
            self.value_weight * value
            + self.gradient_weight * gradient
            + self.latent_weight * latent
            + latents.loss_per_sample
        )
        return EncoderLosses(loss.mean(), value, gradient, latent, latents.quantization_loss, latents.commitment_loss)

    def generator_losses(self, n: int, generator: torch.Generator | None = None) -> GeneratorLosses:
        """The loss of the generator step, with gradients to the codebooks through the drawn codes as well.

        Args:
            n: images to generate.
            generator: a CPU generator for the codes.
        """
        codes = self._draw(n, generator)
        value, latents = self._judge(self.generate(codes))
        latent = (latents.z_hat - codes).square().mean(dim=-1)
        loss = -self.value_weight * value + self.latent_weight * latent + latents.loss_per_sample
        return GeneratorLosses(loss.mean(), value, latent, latents.quantization_loss, latents.commitment_loss)

    def _draw(self, n: int, generator: torch.Generator | None) -> Tensor:
        return self.quantizer.sample(n, generator).to(self.critic.weight)

    def _judge(self, x: Tensor) -> tuple[Tensor, QuantizedLatents]:
        features = self.encoder.forward_features(x)
        return self.critic(features).squeeze(-1), self.quantizer(self.encoder.head(features))

    def _value(self, x: Tensor) -> Tensor:
        return self.critic(self.encoder.forward_features(x)).squeeze(-1)

    def _slope(self, x: Tensor) -> Float[Tensor, " batch"]:
        """Norm of the critic's gradient at each image."""
        x = x.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(self._value(x).sum(), x, create_graph=True)
        return gradient.flatten(1).norm(dim=1)


class InfoWGANTraining:
    """Both optimizers of :class:`QLInfoWGAN`, for a loop of your own: ``training.step(images)`` for every batch.

    Args:
        model: what to train, on its device.
        learning_rate: of both optimizers.
        weight_decay: of both; 1e-3 on Shapes3D and MPI3D, 1e-4 on Falcor3D.
        betas: of both.
        clip_value: as in :func:`~headgate.methods.latent.latent_quantization.optimizer.qlae_optimizer`.
        generator_period: encoder steps per generator step.
        seed: codes and mixtures of a step depend on the seed and the step alone.

    Attributes:
        steps: encoder steps made.

    Raises:
        ValueError: a number outside its range.
    """

    def __init__(
        self,
        model: QLInfoWGAN,
        learning_rate: float = 2e-4,
        weight_decay: float = 1e-3,
        *,
        betas: tuple[float, float] = (0.0, 0.9),
        clip_value: float | None = 1.0,
        generator_period: int = 5,
        seed: int = 0,
    ) -> None:
        check_positive(generator_period=generator_period)
        self.model = model
        self.generator_period = generator_period
        self.seed = seed
        self.steps = 0
        critic, generator = nn.ModuleList([model.encoder, model.critic]), nn.ModuleList([model.decoder])
        generator.append(model.quantizer)
        self.encoder_optimizer, self.generator_optimizer = (
            qlae_optimizer(part, learning_rate, weight_decay, betas=betas, clip_value=clip_value)
            for part in (critic, generator)
        )

    def step(self, x: Float[Tensor, "batch ..."]) -> tuple[EncoderLosses, GeneratorLosses | None]:
        """Make one encoder step, and a generator step where it is time for one.

        Args:
            x: ``(batch, ...)`` images in [0, 1], on the model's device.

        Returns:
            The losses, detached; ``None`` for the generator where it made no step.
        """
        self.model.train()
        encoder = self.model.encoder_losses(x, stream_generator(self.seed, "encoder", self.steps))
        _update(self.encoder_optimizer, encoder.loss)
        self.steps += 1
        if self.steps % self.generator_period:
            return EncoderLosses(*(part.detach() for part in encoder)), None
        generator = self.model.generator_losses(len(x), stream_generator(self.seed, "generator", self.steps))
        _update(self.generator_optimizer, generator.loss)
        return (
            EncoderLosses(*(part.detach() for part in encoder)),
            GeneratorLosses(*(part.detach() for part in generator)),
        )

    def state_dict(self) -> dict[str, Any]:
        """Both optimizers' states and the step; the model's own state is the model's."""
        return {
            "encoder_optimizer": self.encoder_optimizer.state_dict(),
            "generator_optimizer": self.generator_optimizer.state_dict(),
            "steps": self.steps,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state of :meth:`state_dict`.

        Raises:
            KeyError: something is missing.
        """
        self.encoder_optimizer.load_state_dict(state["encoder_optimizer"])
        self.generator_optimizer.load_state_dict(state["generator_optimizer"])
        self.steps = int(state["steps"])


def image_ql_infowgan(
    num_latents: int = 12,
    levels: int = 10,
    img_size: int = 64,
    in_chans: int = 3,
    *,
    size: Literal["large", "small"] = "large",
    decoder: Literal["style", "conv"] = "style",
    commitment_weight: float = 0.01,
    quantization_weight: float = 0.01,
) -> QLInfoWGAN:
    """The published model of images; arguments as in :func:`~headgate.methods.latent.latent_quantization.image_qlae`.

    Raises:
        ValueError: an unknown size or decoder, or an image size that is no multiple of 16.
    """
    encoder, decoding = image_networks(num_latents, img_size, in_chans, size, decoder)
    quantizer = LatentQuantizer(
        num_latents, levels, commitment_weight=commitment_weight, quantization_weight=quantization_weight
    )
    return QLInfoWGAN(encoder, decoding, quantizer)


def _update(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    """One step of an optimizer's own parameters; those of the other one get no gradient."""
    optimizer.zero_grad()
    loss.backward(inputs=[parameter for group in optimizer.param_groups for parameter in group["params"]])
    optimizer.step()

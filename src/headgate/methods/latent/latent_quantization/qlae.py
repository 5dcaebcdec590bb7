"""QLAE, the quantised-latent autoencoder: an encoder, the quantiser, a decoder, and their loss.

    L = BCE + 0.01 · L_quant + 0.01 · L_commit

with BCE the mean over all pixels of the sigmoid cross-entropy of the logits against images in [0, 1], everything per
image and then averaged (Hsu et al. 2023, arXiv 2305.18378, section 3). Trained with
:func:`~headgate.methods.latent.latent_quantization.optimizer.qlae_optimizer`.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn

from headgate.methods.latent.latent_quantization.decoder import ConvDecoder, StyleDecoder
from headgate.methods.latent.latent_quantization.encoder import LARGE, SMALL, ImageEncoder
from headgate.methods.latent.latent_quantization.quantizer import LatentQuantizer, QuantizedLatents
from headgate.validate import check_shape

__all__ = ["QLAE", "QLAELosses", "QLAEOutput", "image_networks", "image_qlae", "reconstruction_loss"]


class QLAEOutput(NamedTuple):
    """What :class:`QLAE` gives.

    Attributes:
        logits: ``(batch, ...)`` of the reconstruction, shaped as the images; a sigmoid makes pixels of them.
        latents: the quantiser's output.
    """

    logits: Float[Tensor, "batch ..."]
    latents: QuantizedLatents


class QLAELosses(NamedTuple):
    """The loss and what it is made of.

    Attributes:
        loss: scalar to train on.
        reconstruction: ``(batch,)`` mean cross-entropy of a pixel, in nats.
        quantization: ``(batch,)`` L_quant without its weight.
        commitment: ``(batch,)`` L_commit without its weight.
    """

    loss: Float[Tensor, ""]
    reconstruction: Float[Tensor, " batch"]
    quantization: Float[Tensor, " batch"]
    commitment: Float[Tensor, " batch"]


class QLAE(nn.Module):
    """An autoencoder whose every latent is one of a few values.

    Args:
        encoder: images ``(batch, ...)`` to latents ``(batch, num_latents)``.
        decoder: latents to logits of the images' shape.
        quantizer: between them; it holds the weights of its two losses.
        reconstruction_weight: of the cross-entropy.

    Raises:
        ValueError: ``reconstruction_weight`` is negative.
    """

    def __init__(
        self,
        encoder: nn.Module,
        decoder: nn.Module,
        quantizer: LatentQuantizer,
        *,
        reconstruction_weight: float = 1.0,
    ) -> None:
        super().__init__()
        if reconstruction_weight < 0:
            raise ValueError(f"reconstruction_weight must not be negative, got {reconstruction_weight}")
        self.encoder = encoder
        self.quantizer = quantizer
        self.decoder = decoder
        self.reconstruction_weight = reconstruction_weight

    def forward(self, x: Float[Tensor, "batch ..."]) -> QLAEOutput:
        """Encode, snap and decode ``x``, images in [0, 1].

        Raises:
            TypeError: ``x`` is of another dtype.
            ValueError: ``x`` is of another shape, or holds NaN or infinity.
        """
        latents = self.encode(x)
        return QLAEOutput(self.decoder(latents.z_hat), latents)

    def encode(self, x: Float[Tensor, "batch ..."]) -> QuantizedLatents:
        """The code of images; ``encode(x).indices`` is the discrete one."""
        return self.quantizer(self.encoder(x))

    def decode(self, indices: Int64[Tensor, "batch latent"]) -> Float[Tensor, "batch ..."]:
        """Images in [0, 1] of a discrete code.

        Raises:
            TypeError: ``indices`` are no integers.
            ValueError: another number of latents, or an index outside its codebook.
        """
        return self.decoder(self.quantizer.codes(indices)).sigmoid()

    def training_loss(self, x: Float[Tensor, "batch ..."]) -> QLAELosses:
        """The loss on images in [0, 1]; train on ``.loss``."""
        return self.losses(self(x), x)

    def losses(self, output: QLAEOutput, x: Float[Tensor, "batch ..."]) -> QLAELosses:
        """The loss of an output against its images: :meth:`training_loss` for a wrapped model (DDP, FSDP).

        Raises:
            ValueError: the decoder's logits are not shaped as ``x``.
        """
        reconstruction = reconstruction_loss(output.logits, x)
        latents = output.latents
        loss = self.reconstruction_weight * reconstruction + latents.loss_per_sample
        return QLAELosses(loss.mean(), reconstruction, latents.quantization_loss, latents.commitment_loss)


def reconstruction_loss(logits: Float[Tensor, "batch ..."], x: Float[Tensor, "batch ..."]) -> Float[Tensor, " batch"]:
    """Mean sigmoid cross-entropy of each image's pixels.

    Raises:
        ValueError: ``logits`` and ``x`` have different shapes.
    """
    check_shape("logits", logits, x.shape, ", ".join(["batch"] + ["axis"] * (x.dim() - 1)))
    return F.binary_cross_entropy_with_logits(logits, x.to(logits.dtype), reduction="none").flatten(1).mean(dim=1)


def image_qlae(
    num_latents: int = 12,
    levels: int = 10,
    img_size: int = 64,
    in_chans: int = 3,
    *,
    size: Literal["large", "small"] = "large",
    decoder: Literal["style", "conv"] = "style",
    learnable: bool = True,
    commitment_weight: float = 0.01,
    quantization_weight: float = 0.01,
) -> QLAE:
    """The published model of images.

    Args:
        num_latents: n_z; the paper takes twice the number of sources.
        levels: n_v, values per latent.
        img_size: pixels to a side, a multiple of 16.
        in_chans: channels of the images.
        size: of both networks, ``"large"`` or ``"small"``.
        decoder: ``"style"`` or ``"conv"``.
        learnable: whether the codebooks are trained.
        commitment_weight: of L_commit.
        quantization_weight: of L_quant.

    Raises:
        ValueError: an unknown size or decoder, or an image size that is no multiple of 16.
    """
    encoder, decoding = image_networks(num_latents, img_size, in_chans, size, decoder)
    quantizer = LatentQuantizer(
        num_latents,
        levels,
        learnable=learnable,
        commitment_weight=commitment_weight,
        quantization_weight=quantization_weight,
    )
    return QLAE(encoder, decoding, quantizer)


def image_networks(
    num_latents: int,
    img_size: int = 64,
    in_chans: int = 3,
    size: Literal["large", "small"] = "large",
    decoder: Literal["style", "conv"] = "style",
    *,
    encoder_outputs: int | None = None,
) -> tuple[ImageEncoder, StyleDecoder | ConvDecoder]:
    """The published encoder and decoder of images.

    Args:
        num_latents: inputs of the decoder.
        img_size: pixels to a side, a multiple of 16.
        in_chans: channels of the images.
        size: ``"large"`` or ``"small"``.
        decoder: ``"style"`` or ``"conv"``.
        encoder_outputs: outputs of the encoder, if not ``num_latents``.

    Raises:
        ValueError: an unknown size or decoder, or an image size that is no multiple of 16.
    """
    known = {"large": LARGE, "small": SMALL}
    decoders = {"style": StyleDecoder, "conv": ConvDecoder}
    if size not in known:
        raise ValueError(f"size must be one of {', '.join(known)}, got {size!r}")
    if decoder not in decoders:
        raise ValueError(f"decoder must be one of {', '.join(decoders)}, got {decoder!r}")
    if img_size < 16 or img_size % 16:
        raise ValueError(f"img_size must be a multiple of 16, got {img_size}")
    sizes = known[size]
    common = {
        "kernel_sizes": sizes.kernel_sizes,
        "strides": sizes.strides,
        "paddings": sizes.paddings,
        "hidden_dims": sizes.hidden_dims,
    }
    encoder = ImageEncoder(encoder_outputs or num_latents, img_size, in_chans, widths=sizes.widths, **common)
    channels, height, width = encoder.transition_shape
    decoding = decoders[decoder](
        num_latents, in_chans, (height, width), input_channels=channels, widths=sizes.widths[::-1], **common
    )
    assert isinstance(decoding, StyleDecoder | ConvDecoder)
    return encoder, decoding

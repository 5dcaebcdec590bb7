"""What the modules of this room promise; the contract suite holds them to it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Generator

from headgate.methods.latent.latent_quantization.decoder import ConvDecoder, StyleDecoder
from headgate.methods.latent.latent_quantization.encoder import ImageEncoder
from headgate.methods.latent.latent_quantization.infowgan import QLInfoWGAN
from headgate.methods.latent.latent_quantization.qlae import QLAE
from headgate.methods.latent.latent_quantization.quantizer import LatentQuantizer
from headgate.testing import BadInput, ContractCase

__all__ = ["CASES"]

_BLOCKS: dict[str, Any] = {"kernel_sizes": (3, 4), "strides": (1, 2), "paddings": (1, 1), "hidden_dims": (24, 20)}


def _latents(generator: Generator) -> tuple[Any, ...]:
    return (torch.randn(4, 5, generator=generator),)


def _maps_of_latents(generator: Generator) -> tuple[Any, ...]:
    return (torch.randn(3, 2, 4, 5, generator=generator),)


def _images(generator: Generator) -> tuple[Any, ...]:
    return (torch.rand(3, 2, 8, 8, generator=generator),)


def _with(value: float) -> BadInput:
    def draw(generator: Generator) -> tuple[Any, ...]:
        (z,) = _latents(generator)
        z[1, 2] = value
        return (z,)

    return BadInput(f"latents with {value}", draw, ValueError, "z must be finite, got 1 values of 20")


def _encoder() -> ImageEncoder:
    return ImageEncoder(5, 8, 2, widths=(8, 12), **_BLOCKS)


def _decoder() -> StyleDecoder:
    return StyleDecoder(5, 2, 4, input_channels=12, widths=(12, 8), **_BLOCKS)


_BAD_LATENTS = (_with(torch.nan), _with(torch.inf))

CASES = {
    "LatentQuantizer": ContractCase(lambda: LatentQuantizer(5, 4), _latents, bad_inputs=_BAD_LATENTS),
    "LatentQuantizer-different levels": ContractCase(lambda: LatentQuantizer(5, [2, 3, 4, 5, 6]), _maps_of_latents),
    "LatentQuantizer-shared and frozen": ContractCase(
        lambda: LatentQuantizer(5, 4, shared=True, learnable=False), _latents, bad_inputs=_BAD_LATENTS
    ),
    "ImageEncoder": ContractCase(_encoder, _images),
    "StyleDecoder": ContractCase(_decoder, _latents),
    "ConvDecoder": ContractCase(
        lambda: ConvDecoder(5, 2, (4, 3), input_channels=12, widths=(12, 8), **_BLOCKS), _latents
    ),
    "QLAE": ContractCase(lambda: QLAE(_encoder(), _decoder(), LatentQuantizer(5, 4)), _images),
    "QLInfoWGAN": ContractCase(lambda: QLInfoWGAN(_encoder(), _decoder(), LatentQuantizer(5, 4)), _images),
}

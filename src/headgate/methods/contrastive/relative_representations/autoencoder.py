"""Convolutional autoencoders with an absolute or a relative latent space (Moschella et al. 2023, Section 5.1).

Encoder: convolutions 3×3 of stride 2 with batch normalisation and GELU, one for each of ``hidden_dims``. Decoder: their
mirror image in transposed convolutions, whose kernels restore the sizes on the way, then a convolution and a sigmoid::

    absolute   z = GELU(W flatten(conv(x)))                            x̂ = deconv(GELU(W' z))
    relative   z = LayerNorm(relative block of flatten(conv(x)))       x̂ = deconv(GELU(W' z))

In the relative encoder the last GELU is left out, and there is no W.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from headgate.methods.contrastive.relative_representations.attention import RelativeAttention, RelativeEncoding
from headgate.methods.contrastive.relative_representations.quantize import RelativeQuantizer
from headgate.train.hub import HubModel
from headgate.validate import check_floating, check_integer, check_positive, check_shape

__all__ = ["AbsoluteAutoencoder", "RelativeAutoencoder"]

_HIDDEN_DIMS = (32, 64, 128, 256)


class AbsoluteAutoencoder(nn.Module, HubModel):
    """The baseline: an autoencoder whose latent is a vector of its own coordinates.

    Args:
        image_size: (height, width) or the side of a square.
        in_channels: of the images.
        latent_dim: size of the latent.
        hidden_dims: channels of the encoder's layers.
    """

    def __init__(
        self,
        image_size: int | tuple[int, int],
        in_channels: int = 1,
        latent_dim: int = 500,
        hidden_dims: Sequence[int] = _HIDDEN_DIMS,
    ) -> None:
        super().__init__()
        sizes = _sizes(image_size, in_channels, hidden_dims)
        check_positive(latent_dim=latent_dim)
        self.image_shape = (in_channels, *sizes[0])
        self.latent_shape = (hidden_dims[-1], *sizes[-1])
        self.encoder = _encoder(in_channels, hidden_dims, last_activation=True)
        self.encoder_out = nn.Sequential(nn.Linear(_numel(self.latent_shape), latent_dim), nn.GELU())
        self.decoder_in = nn.Sequential(nn.Linear(latent_dim, _numel(self.latent_shape)), nn.GELU())
        self.decoder = _decoder(in_channels, hidden_dims, sizes)

    def forward(
        self, images: Float[Tensor, "batch channels height width"]
    ) -> Float[Tensor, "batch channels height width"]:
        """Reconstruct images in [0, 1].

        Raises:
            TypeError: another dtype than the parameters'.
            ValueError: another shape.
        """
        return self.decode(self.encode(images))

    def encode(self, images: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch latent"]:
        """The latent, ``(batch, latent_dim)``."""
        _check_images(images, self)
        latent: Tensor = self.encoder_out(self.encoder(images).flatten(1))
        return latent

    def decode(self, latent: Float[Tensor, "batch latent"]) -> Float[Tensor, "batch channels height width"]:
        """Images from a latent, which may be another model's."""
        images: Tensor = self.decoder(self.decoder_in(latent).unflatten(1, self.latent_shape))
        return images


class RelativeAutoencoder(nn.Module, HubModel):
    """An autoencoder whose decoder sees relative representations, so that decoders can be exchanged.

    Args:
        image_size: (height, width) or the side of a square.
        in_channels: of the images.
        num_anchors: K; the anchors themselves come with :meth:`fit_anchors` or a state dict.
        hidden_dims: channels of the encoder's layers.
        out_norm: normalisation of the relative representation; the paper's is ``"layernorm"``.
        **options: further options of :class:`RelativeAttention`.
    """

    anchor_images: Float[Tensor, "anchors channels height width"]
    anchor_labels: Int[Tensor, " anchors"]
    anchor_ids: Int[Tensor, " anchors"]

    def __init__(
        self,
        image_size: int | tuple[int, int],
        in_channels: int = 1,
        num_anchors: int = 500,
        hidden_dims: Sequence[int] = _HIDDEN_DIMS,
        *,
        out_norm: Any = "layernorm",
        **options: Any,
    ) -> None:
        super().__init__()
        sizes = _sizes(image_size, in_channels, hidden_dims)
        for name in ("quantizer", "absolute_quantizer"):
            if isinstance(options.get(name), Mapping):  # as the configuration of a saved model has it
                options[name] = RelativeQuantizer(**options[name])
        self.image_shape = (in_channels, *sizes[0])
        self.latent_shape = (hidden_dims[-1], *sizes[-1])
        self.encoder = _encoder(in_channels, hidden_dims, last_activation=False)
        self.relative = RelativeAttention(num_anchors, _numel(self.latent_shape), out_norm=out_norm, **options)
        self.decoder_in = nn.Sequential(nn.Linear(self.relative.out_dim, _numel(self.latent_shape)), nn.GELU())
        self.decoder = _decoder(in_channels, hidden_dims, sizes)
        self.register_buffer("anchor_images", torch.zeros(num_anchors, *self.image_shape))
        self.register_buffer("anchor_labels", torch.zeros(num_anchors, dtype=torch.int64))
        self.register_buffer("anchor_ids", torch.arange(num_anchors))
        self._has_anchors = False

    def fit_anchors(
        self,
        images: Float[Tensor, "anchors channels height width"],
        labels: Int[Tensor, " anchors"] | None = None,
        ids: Int[Tensor, " anchors"] | None = None,
    ) -> RelativeAutoencoder:
        """Keep the anchors: images of the training data, the same in the same order for all models to be stitched.

        Args:
            images: ``(num_anchors, channels, height, width)`` in [0, 1], finite.
            labels: ``(num_anchors,)`` classes, for ``aggregate`` and ``resample``; by default all 0.
            ids: ``(num_anchors,)`` integers that name them, for :func:`check_same_anchors`; by default 0 … K - 1.

        Returns:
            itself.

        Raises:
            TypeError: wrong dtype.
            ValueError: wrong shape, NaN or infinity, or labels out of range.
        """
        count = self.relative.num_anchors
        check_shape("images", images, (count, *self.image_shape), "anchors, channels, height, width")
        check_floating("images", images)
        if not images.is_meta and not bool(torch.isfinite(images).all()):
            raise ValueError("images must be finite, got NaN or infinity")
        for name, values in (("labels", labels), ("ids", ids)):
            if values is not None:
                check_shape(name, values, (count,), "anchors")
                check_integer(name, values)
        if labels is not None:
            self.relative.check_labels(labels)
        with torch.no_grad():
            self.anchor_images.copy_(images)
            if labels is not None:
                self.anchor_labels.copy_(labels)
            if ids is not None:
                self.anchor_ids.copy_(ids)
        self._has_anchors = True
        return self

    def forward(
        self, images: Float[Tensor, "batch channels height width"]
    ) -> Float[Tensor, "batch channels height width"]:
        """Reconstruct images in [0, 1].

        Raises:
            TypeError: another dtype than the parameters'.
            ValueError: another shape, or no anchors yet.
        """
        return self.decode(self.encode(images))

    def encode(self, images: Float[Tensor, "batch channels height width"]) -> RelativeEncoding:
        """The similarities to the anchors, which are encoded anew, without gradients."""
        _check_images(images, self)
        if not self._has_anchors:
            raise ValueError("anchors must be given with fit_anchors, or by a state dict, before images are encoded")
        embedded = self.embed(images)
        with torch.no_grad():
            anchors = self.embed(self.anchor_images)
        return self.relative.encode_trusted(embedded, anchors, self.anchor_labels)

    def embed(self, images: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch dim"]:
        """The absolute embedding, ``(batch, dim)``."""
        embedded: Tensor = self.encoder(images).flatten(1)
        return embedded

    def decode(self, encoding: RelativeEncoding) -> Float[Tensor, "batch channels height width"]:
        """Images from similarities, which may be another model's."""
        hidden = self.decoder_in(self.relative.decode(encoding))
        images: Tensor = self.decoder(hidden.unflatten(1, self.latent_shape))
        return images

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *rest: Any) -> None:
        self._has_anchors = self._has_anchors or f"{prefix}anchor_images" in state_dict
        super()._load_from_state_dict(state_dict, prefix, *rest)


def _sizes(image_size: int | tuple[int, int], in_channels: int, hidden_dims: Sequence[int]) -> list[tuple[int, int]]:
    """Height and width before each layer of the encoder, and behind the last."""
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    check_positive(height=height, width=width, in_channels=in_channels, hidden_dims=min(hidden_dims, default=0))
    sizes = [(height, width)]
    for _ in hidden_dims:
        height, width = (height + 1) // 2, (width + 1) // 2
        sizes.append((height, width))
    return sizes


def _numel(shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count


def _encoder(in_channels: int, hidden_dims: Sequence[int], *, last_activation: bool) -> nn.Sequential:
    layers = []
    channels = [in_channels, *hidden_dims]
    for index, (before, after) in enumerate(zip(channels, hidden_dims, strict=False)):
        is_last = index == len(hidden_dims) - 1
        layers.append(
            nn.Sequential(
                nn.Conv2d(before, after, kernel_size=3, stride=2, padding=1),
                nn.BatchNorm2d(after),
                nn.Identity() if is_last and not last_activation else nn.GELU(),
            )
        )
    return nn.Sequential(*layers)


def _decoder(in_channels: int, hidden_dims: Sequence[int], sizes: Sequence[tuple[int, int]]) -> nn.Sequential:
    layers = []
    channels = [*reversed(hidden_dims), hidden_dims[0]]
    for index in range(len(hidden_dims)):
        # (input - 1) · stride - 2 · padding + kernel = output, with stride 2 and padding 1
        kernel = [
            wanted - 2 * (given - 1) + 2 for given, wanted in zip(sizes[-1 - index], sizes[-2 - index], strict=True)
        ]
        layers.append(
            nn.Sequential(
                nn.ConvTranspose2d(
                    channels[index], channels[index + 1], cast(tuple[int, int], tuple(kernel)), stride=2, padding=1
                ),
                nn.BatchNorm2d(channels[index + 1]),
                nn.GELU(),
            )
        )
    layers.append(nn.Sequential(nn.Conv2d(hidden_dims[0], in_channels, kernel_size=3, padding=1), nn.Sigmoid()))
    return nn.Sequential(*layers)


def _check_images(images: Tensor, model: AbsoluteAutoencoder | RelativeAutoencoder) -> None:
    check_shape("images", images, (None, *model.image_shape), "batch, channels, height, width")
    check_floating("images", images, like=next(model.parameters()).dtype)

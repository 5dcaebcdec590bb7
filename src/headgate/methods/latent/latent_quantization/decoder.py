"""The style decoder, where the code sets scale and shift of every channel in every block, and the plain decoder.

Style decoder: ``w = dense(ẑ)``; from a learned map that is the same for all images, each block computes

    h = InstanceNorm(LeakyReLU(ConvTranspose(h)));  (s, b) = ReLU(Linear(w));  h ← s·h + b  per channel

The ReLU on scale and shift is part of the published model. The plain decoder puts the code into the map itself.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from headgate.methods.latent.latent_quantization.encoder import (
    LARGE,
    NORM_EPS,
    SLOPE,
    check_blocks,
    dense_layers,
)
from headgate.validate import check_floating, check_positive, check_shape

__all__ = ["ConvDecoder", "StyleDecoder"]


class StyleDecoder(nn.Module):
    """Map latents to logits of pixels through styles.

    Args:
        num_latents: size of the code.
        out_chans: channels of the images.
        map_size: side of the learned map, or (height, width): what the encoder's blocks leave of an image.
        input_channels: channels of the learned map.
        widths: channels of each block; the defaults are the published large decoder.
        kernel_sizes: of each block.
        strides: of each block.
        paddings: of each block.
        hidden_dims: widths of the dense layers, at least one.

    Raises:
        ValueError: sizes that do not go together.
    """

    def __init__(
        self,
        num_latents: int,
        out_chans: int = 3,
        map_size: int | tuple[int, int] = 4,
        *,
        input_channels: int = 256,
        widths: Sequence[int] = LARGE.widths[::-1],
        kernel_sizes: Sequence[int] = LARGE.kernel_sizes,
        strides: Sequence[int] = LARGE.strides,
        paddings: Sequence[int] = LARGE.paddings,
        hidden_dims: Sequence[int] = LARGE.hidden_dims,
    ) -> None:
        super().__init__()
        check_positive(num_latents=num_latents, out_chans=out_chans, input_channels=input_channels)
        check_blocks(widths, kernel_sizes, strides, paddings, hidden_dims)
        self.num_latents = num_latents
        size = (map_size, map_size) if isinstance(map_size, int) else tuple(map_size)
        self.input_map = nn.Parameter(torch.full((input_channels, *size), 0.1))
        self.dense = dense_layers(num_latents, hidden_dims)
        channels = (input_channels, *widths)
        self.blocks = nn.ModuleList(
            _StyleBlock(channels[index], channels[index + 1], kernel, stride, padding, hidden_dims[-1])
            for index, (kernel, stride, padding) in enumerate(zip(kernel_sizes, strides, paddings, strict=True))
        )
        self.conv = nn.Conv2d(widths[-1], out_chans, 3, padding=1, bias=False)

    def forward(self, z: Float[Tensor, "batch latent"]) -> Float[Tensor, "batch channel height width"]:
        """Map latents ``(batch, num_latents)`` to logits ``(batch, out_chans, height, width)``.

        Raises:
            TypeError: ``z`` is not of the module's floating dtype.
            ValueError: another rank or number of latents.
        """
        check_shape("z", z, (None, self.num_latents), "batch, latent")
        check_floating("z", z, like=self.input_map.dtype)
        style = self.dense(z)
        h = self.input_map.unsqueeze(0)  # one map for all images, up to the first block's style
        for block in self.blocks:
            h = block(h, style)
        return self.conv(h)


class ConvDecoder(nn.Module):
    """Map latents to logits of pixels through transposed convolutions alone.

    Dense layers give the map; blocks are ConvTranspose, instance normalisation with gains, LeakyReLU; a 1 × 1
    convolution ends it. The published alternative to :class:`StyleDecoder`.

    Args:
        num_latents: size of the code.
        out_chans: channels of the images.
        map_size: side of the first map, or (height, width).
        input_channels: channels of the first map.
        widths: channels of each block; the defaults are the published large decoder.
        kernel_sizes: of each block.
        strides: of each block.
        paddings: of each block.
        hidden_dims: widths of the dense layers before the map, at least one.

    Raises:
        ValueError: sizes that do not go together.
    """

    def __init__(
        self,
        num_latents: int,
        out_chans: int = 3,
        map_size: int | tuple[int, int] = 4,
        *,
        input_channels: int = 256,
        widths: Sequence[int] = LARGE.widths[::-1],
        kernel_sizes: Sequence[int] = LARGE.kernel_sizes,
        strides: Sequence[int] = LARGE.strides,
        paddings: Sequence[int] = LARGE.paddings,
        hidden_dims: Sequence[int] = LARGE.hidden_dims,
    ) -> None:
        super().__init__()
        check_positive(num_latents=num_latents, out_chans=out_chans, input_channels=input_channels)
        check_blocks(widths, kernel_sizes, strides, paddings, hidden_dims)
        self.num_latents = num_latents
        size = (map_size, map_size) if isinstance(map_size, int) else tuple(map_size)
        self.map_shape = (input_channels, *size)
        self.dense = dense_layers(num_latents, (*hidden_dims, math.prod(self.map_shape)))
        blocks = []
        channels = input_channels
        for width, kernel, stride, padding in zip(widths, kernel_sizes, strides, paddings, strict=True):
            blocks.append(
                nn.Sequential(
                    _conv_transpose(channels, width, kernel, stride, padding),
                    nn.GroupNorm(width, width, eps=NORM_EPS),
                    nn.LeakyReLU(SLOPE),
                )
            )
            channels = width
        self.blocks = nn.Sequential(*blocks)
        self.conv = nn.Conv2d(channels, out_chans, 1, bias=False)

    def forward(self, z: Float[Tensor, "batch latent"]) -> Float[Tensor, "batch channel height width"]:
        """Map latents ``(batch, num_latents)`` to logits ``(batch, out_chans, height, width)``.

        Raises:
            TypeError: ``z`` is not of the module's floating dtype.
            ValueError: another rank or number of latents.
        """
        check_shape("z", z, (None, self.num_latents), "batch, latent")
        check_floating("z", z, like=self.conv.weight.dtype)
        return self.conv(self.blocks(self.dense(z).unflatten(1, self.map_shape)))


class _StyleBlock(nn.Module):
    def __init__(
        self, in_channels: int, out_channels: int, kernel: int, stride: int, padding: int, style_dim: int
    ) -> None:
        super().__init__()
        self.conv = _conv_transpose(in_channels, out_channels, kernel, stride, padding)
        self.norm = nn.GroupNorm(out_channels, out_channels, eps=NORM_EPS, affine=False)
        self.style = nn.Linear(style_dim, 2 * out_channels)

    def forward(
        self, h: Float[Tensor, "maps channel height width"], style: Float[Tensor, "batch style"]
    ) -> Float[Tensor, "batch out new_height new_width"]:
        h = self.norm(F.leaky_relu(self.conv(h), SLOPE))
        scale, shift = F.relu(self.style(style))[..., None, None].chunk(2, dim=1)
        return h * scale + shift


def _conv_transpose(in_channels: int, out_channels: int, kernel: int, stride: int, padding: int) -> nn.ConvTranspose2d:
    """A transposed convolution without bias, with the published initial range (PyTorch's own goes by out_channels)."""
    layer = nn.ConvTranspose2d(in_channels, out_channels, kernel, stride, padding, bias=False)
    bound = 1 / math.sqrt(in_channels * kernel * kernel)
    nn.init.uniform_(layer.weight, -bound, bound)
    return layer

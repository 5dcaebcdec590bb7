"""The image encoder: blocks of convolution, instance normalisation and LeakyReLU, dense layers, one linear head.

The published sizes, for 64 × 64 pixels: *large* has 12 blocks (32, 64, 128 and 256 channels three times each, kernels
3, 3, 4 and strides 1, 1, 2) and dense layers 256, 256; *small* has 4 blocks of kernel 4 and stride 2 (64 to 512
channels) and one dense layer of 512.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor, nn

from headgate.validate import check_floating, check_positive, check_shape

__all__ = ["LARGE", "SMALL", "ImageEncoder", "ImageSizes", "check_blocks", "dense_layers"]

SLOPE = 0.2
NORM_EPS = 1e-6


@dataclass(frozen=True)
class ImageSizes:
    """Sizes of an encoder and of the decoder that mirrors it.

    Attributes:
        widths: channels of the encoder's blocks; the decoder has them in reverse.
        kernel_sizes: of both.
        strides: of both.
        paddings: of both.
        hidden_dims: of the dense layers.
    """

    widths: tuple[int, ...]
    kernel_sizes: tuple[int, ...]
    strides: tuple[int, ...]
    paddings: tuple[int, ...]
    hidden_dims: tuple[int, ...]


LARGE = ImageSizes((32,) * 3 + (64,) * 3 + (128,) * 3 + (256,) * 3, (3, 3, 4) * 4, (1, 1, 2) * 4, (1,) * 12, (256, 256))
SMALL = ImageSizes((64, 128, 256, 512), (4,) * 4, (2,) * 4, (1,) * 4, (512,))


class ImageEncoder(nn.Module):
    """Map images to latents.

    Args:
        num_latents: outputs of the head.
        img_size: pixels to a side, or (height, width).
        in_chans: channels of the images.
        widths: channels of each block; the defaults are the published large encoder.
        kernel_sizes: of each block.
        strides: of each block.
        paddings: of each block.
        hidden_dims: widths of the dense layers, at least one.

    Attributes:
        num_features: width of the last dense layer.
        transition_shape: ``(channels, height, width)`` behind the last block.

    Raises:
        ValueError: sizes that do not go together, or an image too small for the blocks.
    """

    def __init__(
        self,
        num_latents: int,
        img_size: int | tuple[int, int] = 64,
        in_chans: int = 3,
        *,
        widths: Sequence[int] = LARGE.widths,
        kernel_sizes: Sequence[int] = LARGE.kernel_sizes,
        strides: Sequence[int] = LARGE.strides,
        paddings: Sequence[int] = LARGE.paddings,
        hidden_dims: Sequence[int] = LARGE.hidden_dims,
    ) -> None:
        super().__init__()
        check_positive(num_latents=num_latents, in_chans=in_chans)
        check_blocks(widths, kernel_sizes, strides, paddings, hidden_dims)
        self.in_chans = in_chans
        self.img_size = (img_size, img_size) if isinstance(img_size, int) else tuple(img_size)
        height, width = self.img_size
        blocks = []
        channels = in_chans
        for out, kernel, stride, padding in zip(widths, kernel_sizes, strides, paddings, strict=True):
            blocks.append(
                nn.Sequential(
                    nn.Conv2d(channels, out, kernel, stride, padding, bias=False),
                    nn.GroupNorm(out, out, eps=NORM_EPS),
                    nn.LeakyReLU(SLOPE),
                )
            )
            height, width = ((side + 2 * padding - kernel) // stride + 1 for side in (height, width))
            if min(height, width) < 1:
                raise ValueError(f"img_size must be large enough for {len(widths)} blocks, got {self.img_size}")
            channels = out
        self.transition_shape = (channels, height, width)
        self.conv = nn.Sequential(*blocks)
        self.dense = dense_layers(channels * height * width, hidden_dims)
        self.num_features = hidden_dims[-1]
        self.head = nn.Linear(self.num_features, num_latents)

    def forward(self, x: Float[Tensor, "batch channel height width"]) -> Float[Tensor, "batch latent"]:
        """Map images ``(batch, in_chans, height, width)`` to latents ``(batch, num_latents)``.

        Raises:
            TypeError: ``x`` is not of the module's floating dtype.
            ValueError: images of another size.
        """
        return self.head(self.forward_features(x))

    def forward_features(self, x: Float[Tensor, "batch channel height width"]) -> Float[Tensor, "batch feature"]:
        """The last dense features ``(batch, num_features)``, which the head and a critic read."""
        check_shape("x", x, (None, self.in_chans, *self.img_size), "batch, channel, height, width")
        check_floating("x", x, like=self.head.weight.dtype)
        return self.dense(self.conv(x).flatten(1))


def dense_layers(in_features: int, hidden_dims: Sequence[int]) -> nn.Sequential:
    """Linear-ReLU as often as there are ``hidden_dims``."""
    layers = []
    for width in hidden_dims:
        layers.append(nn.Sequential(nn.Linear(in_features, width), nn.ReLU()))
        in_features = width
    return nn.Sequential(*layers)


def check_blocks(
    widths: Sequence[int],
    kernel_sizes: Sequence[int],
    strides: Sequence[int],
    paddings: Sequence[int],
    hidden_dims: Sequence[int],
) -> None:
    """Check that every block has all its sizes, and that there is a dense layer.

    Raises:
        ValueError: lists of different lengths, none at all, or sizes below 1 (paddings: below 0).
    """
    lengths = {len(widths), len(kernel_sizes), len(strides), len(paddings)}
    if len(lengths) != 1 or 0 in lengths:
        raise ValueError(
            "widths, kernel_sizes, strides and paddings must have one equal, positive length, got "
            f"{len(widths)}, {len(kernel_sizes)}, {len(strides)} and {len(paddings)}"
        )
    if not hidden_dims:
        raise ValueError("hidden_dims must hold at least one width, got none")
    if min(*widths, *kernel_sizes, *strides, *hidden_dims) < 1 or min(paddings) < 0:
        raise ValueError(
            f"widths, kernel_sizes, strides and hidden_dims must be positive and paddings not negative, got "
            f"{list(widths)}, {list(kernel_sizes)}, {list(strides)}, {list(hidden_dims)} and {list(paddings)}"
        )

"""From an image to a grid of vectors, and learned positions for a grid of any size."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from headgate.validate import check_floating, check_positive, check_shape

__all__ = ["ConvPatchEmbedding", "LayerNorm2d", "resize_positions"]

_PATCHES_AT_ONCE = 256
"""Beyond so many, intermediate results no longer fit into a core's cache."""


class LayerNorm2d(nn.LayerNorm):
    """Layer norm over the channels of feature maps (Ba et al., arXiv 1607.06450).

    Args:
        dim: channels.
        eps: ε under the root.
    """

    def __init__(self, dim: int, eps: float = 1e-5) -> None:
        check_positive(dim=dim)
        super().__init__(dim, eps=eps)

    def forward(self, input: Float[Tensor, "batch dim height width"]) -> Float[Tensor, "batch dim height width"]:
        """Normalise every position of ``input`` ``(batch, dim, height, width)``; the result lies in channels-last order.

        Raises:
            TypeError: wrong dtype.
            ValueError: wrong shape.
        """
        check_shape("input", input, (None, self.normalized_shape[0], None, None), "batch, channels, height, width")
        check_floating("input", input, like=self.weight.dtype)
        return super().forward(input.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class ConvPatchEmbedding(nn.Module):
    """Patches by two overlapping convolutions in place of one that cuts the image into squares.

    A convolution of stride p/2 and kernel p/2 + 1 to ``dim / 2`` channels, layer norm, activation; a 3×3 convolution of
    stride 2 to ``dim`` channels, layer norm. Both pad by one pixel. With p = 4 it is the usual stem of hierarchical
    networks (Xiao et al., arXiv 2106.14881); ViG (arXiv 2405.18425) takes p = 16.

    Args:
        dim: channels out, even.
        patch_size: p, the stride in pixels; even, at least 4.
        in_chans: channels of the image.
        activation: between the two convolutions.
    """

    def __init__(
        self, dim: int, patch_size: int = 16, in_chans: int = 3, *, activation: type[nn.Module] = nn.SiLU
    ) -> None:
        super().__init__()
        check_positive(dim=dim, in_chans=in_chans)
        if dim % 2:
            raise ValueError(f"dim must be even, got {dim}")
        if patch_size < 4 or patch_size % 2:
            raise ValueError(f"patch_size must be even and at least 4, got {patch_size}")
        self.in_chans = in_chans
        self.patch_size = patch_size
        stride = patch_size // 2
        self.conv1 = nn.Conv2d(in_chans, dim // 2, stride + 1, stride=stride, padding=1)
        self.norm1 = LayerNorm2d(dim // 2)
        self.activation = activation()
        self.conv2 = nn.Conv2d(dim // 2, dim, 3, stride=2, padding=1)
        self.norm2 = LayerNorm2d(dim)

    def forward(self, images: Float[Tensor, "batch chans height width"]) -> Float[Tensor, "batch dim rows columns"]:
        """Embed ``images`` ``(batch, in_chans, height, width)`` of at least one patch.

        Returns:
            ``(batch, dim, rows, columns)`` in channels-last order. A side of n · p pixels gives n; with p = 4 any side
            is rounded up to whole patches, with larger p a remainder may be cut off.

        Raises:
            TypeError: wrong dtype.
            ValueError: wrong shape, or an image smaller than a patch.
        """
        check_shape("images", images, (None, self.in_chans, None, None), "batch, channels, height, width")
        check_floating("images", images, like=self.conv1.weight.dtype)
        if min(images.shape[2:]) < self.patch_size:
            raise ValueError(
                f"images must be at least {self.patch_size} pixels high and wide, got {tuple(images.shape)}"
            )
        if _in_strips(self, images):
            return self._embed_in_strips(images)
        hidden = self.conv1(images.contiguous(memory_format=torch.channels_last))
        return self.norm2(self.conv2(self.activation(self.norm1(hidden))))

    def _embed_in_strips(self, images: Tensor) -> Tensor:
        """The same for some rows of patches at a time, so that no intermediate result exists for the whole image."""
        batch, _, height, width = images.shape
        stride = self.patch_size // 2
        lines, columns = (height + 1) // stride, ((width + 1) // stride + 1) // 2
        rows = (lines + 1) // 2
        step = max(1, _PATCHES_AT_ONCE // (batch * columns))
        result = images.new_empty(batch, rows, columns, self.conv2.out_channels)
        for top in range(0, rows, step):
            bottom = min(rows, top + step)
            # What the second convolution reads, and what the first one reads for that; both reach beyond the border.
            first, last = 2 * top - 1, 2 * bottom
            inner = slice(max(first, 0), min(last, lines))
            hidden = _convolve_rows(self.conv1, images, stride * inner.start - 1, stride * (inner.stop - 1) + stride)
            hidden = self.activation(self.norm1(hidden))
            strip = _convolve_rows(self.conv2, hidden, first - inner.start, last - inner.start)
            result[:, top:bottom] = self.norm2(strip).permute(0, 2, 3, 1)
        return result.permute(0, 3, 1, 2)


def _convolve_rows(conv: nn.Conv2d, x: Tensor, first: int, last: int) -> Tensor:
    """Convolve the rows [first, last) of ``x``, with zeros where there are none."""
    above, below = max(0, -first), max(0, last - x.shape[2])
    part = x[:, :, max(first, 0) : last].contiguous(memory_format=torch.channels_last)
    if above or below:
        part = F.pad(part, (0, 0, above, below))
    return F.conv2d(part, conv.weight, conv.bias, stride=conv.stride, padding=(0, 1))


def _in_strips(module: ConvPatchEmbedding, images: Tensor) -> bool:
    """Whether strips save memory: in inference on a CPU, where no hook wants to see whole results."""
    if torch.compiler.is_compiling() or torch.is_grad_enabled() or images.device.type != "cpu":
        return False
    patch = module.patch_size
    if images.shape[0] * images.shape[2] * images.shape[3] <= _PATCHES_AT_ONCE * patch**2:
        return False
    hooked = any(part._forward_hooks or part._forward_pre_hooks for part in module.modules() if part is not module)
    return not hooked and not torch.is_autocast_enabled("cpu")


def resize_positions(
    positions: Float[Tensor, "1 tokens dim"], grid: tuple[int, int], new_grid: tuple[int, int]
) -> Float[Tensor, "1 new_tokens dim"]:
    """Learned positions of one grid, bicubically resized for another one (Dosovitskiy et al., arXiv 2010.11929, 3.2).

    Args:
        positions: ``(1, rows * columns, dim)`` in raster order.
        grid: their rows and columns.
        new_grid: the wanted rows and columns.

    Returns:
        ``(1, new_rows * new_columns, dim)`` in the dtype of ``positions``; ``positions`` itself where the grids are equal.

    Raises:
        TypeError: ``positions`` is not floating.
        ValueError: its shape does not fit ``grid``, or a grid is empty.
    """
    check_shape("positions", positions, (1, grid[0] * grid[1], None), "1, rows * columns, dim")
    check_floating("positions", positions)
    check_positive(new_rows=new_grid[0], new_columns=new_grid[1])
    if tuple(grid) == tuple(new_grid):
        return positions
    picture = positions.unflatten(1, grid).permute(0, 3, 1, 2)
    wide = picture.to(torch.promote_types(picture.dtype, torch.float32))
    resized = F.interpolate(wide, size=tuple(new_grid), mode="bicubic", align_corners=False)
    return resized.permute(0, 2, 3, 1).flatten(1, 2).to(positions.dtype)

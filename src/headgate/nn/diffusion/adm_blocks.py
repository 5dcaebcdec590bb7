r"""The parts of the ADM U-Net: residual blocks that hear the time, attention over pixels, resampling.

Dhariwal and Nichol, "Diffusion Models Beat GANs on Image Synthesis" (arXiv 2105.05233), section 3. Parameters have the names
of the published code (openai/guided-diffusion).
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from headgate.validate import check_divides

__all__ = ["ADMAttention", "ADMBlock", "ADMResBlock", "WideGroupNorm", "zeroed"]


class WideGroupNorm(nn.GroupNorm):
    """Group norm computed in float32 at least, whatever the dtype of maps and weights.

    Args:
        channels: of the maps; a multiple of 32.
    """

    def __init__(self, channels: int) -> None:
        check_divides(groups=32, channels=channels)
        super().__init__(32, channels)

    def forward(self, input: Float[Tensor, "batch channels *space"]) -> Float[Tensor, "batch channels *space"]:
        """Normalise ``input`` ``(batch, channels, ...)``."""
        wide = torch.promote_types(input.dtype, torch.float32)
        weight, bias = self.weight.to(wide), self.bias.to(wide)
        return F.group_norm(input.to(wide), self.num_groups, weight, bias, self.eps).to(input.dtype)


class ADMBlock(nn.Sequential):
    """One numbered block: a convolution, or a residual block with what follows it."""

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:  # type: ignore[override]
        """Run the parts on maps ``x``; residual blocks hear ``emb`` ``(batch, emb_channels)``."""
        for layer in self:
            x = layer(x, emb) if isinstance(layer, ADMResBlock) else layer(x)
        return x


class ADMResBlock(nn.Module):
    """x + conv(SiLU(GN(conv(SiLU(GN(x)))) (1 + scale) + shift)), with scale and shift from the time; may resample.

    Args:
        channels: in.
        emb_channels: of the time's embedding.
        dropout: before the last convolution.
        out_channels: out.
        scale_shift: whether the time scales and shifts behind the second norm; without, it is added before it.
        resample: ``"up"`` or ``"down"`` by two inside the block, before its first convolution, or ``None``.
    """

    def __init__(
        self,
        channels: int,
        emb_channels: int,
        dropout: float,
        out_channels: int,
        *,
        scale_shift: bool = True,
        resample: str | None = None,
    ) -> None:
        super().__init__()
        self.scale_shift = scale_shift
        self.resample = resample
        self.in_layers = nn.Sequential(
            WideGroupNorm(channels), nn.SiLU(), nn.Conv2d(channels, out_channels, 3, padding=1)
        )
        self.emb_layers = nn.Sequential(
            nn.SiLU(), nn.Linear(emb_channels, 2 * out_channels if scale_shift else out_channels)
        )
        self.out_layers = nn.Sequential(
            WideGroupNorm(out_channels),
            nn.SiLU(),
            nn.Dropout(dropout),
            zeroed(nn.Conv2d(out_channels, out_channels, 3, padding=1)),
        )
        self.skip_connection = nn.Identity() if out_channels == channels else nn.Conv2d(channels, out_channels, 1)

    def forward(
        self, x: Float[Tensor, "batch channels height width"], emb: Float[Tensor, "batch emb"]
    ) -> Float[Tensor, "batch out new_height new_width"]:
        """Run the block on maps ``x`` at the times embedded in ``emb``."""
        h = self.in_layers[1](self.in_layers[0](x))
        if self.resample is not None:
            h, x = resample(h, self.resample), resample(x, self.resample)
        h = self.in_layers[2](h)
        told = self.emb_layers(emb).to(h.dtype)[:, :, None, None]
        norm, rest = self.out_layers[0], self.out_layers[1:]
        if self.scale_shift:
            scale, shift = told.chunk(2, dim=1)
            h = rest(norm(h) * (1 + scale) + shift)
        else:
            h = rest(norm(h + told))
        return cast(Tensor, self.skip_connection(x) + h)


class ADMAttention(nn.Module):
    """Self-attention over the pixels of a map, added to it.

    Args:
        channels: of the map.
        num_heads: heads; must divide ``channels``.
        heads_first: the published checkpoints split channels into heads, then each head into q, k and v; without, they are
            split into q, k and v first.
    """

    def __init__(self, channels: int, num_heads: int, heads_first: bool = True) -> None:
        super().__init__()
        check_divides(num_heads=num_heads, channels=channels)
        self.num_heads = num_heads
        self.heads_first = heads_first
        self.norm = WideGroupNorm(channels)
        self.qkv = nn.Conv1d(channels, 3 * channels, 1)
        self.proj_out = zeroed(nn.Conv1d(channels, channels, 1))

    def forward(self, x: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch channels height width"]:
        """Attend over the pixels of ``x``."""
        pixels = x.flatten(2)
        qkv = self.qkv(self.norm(pixels))
        if self.heads_first:
            q, k, v = qkv.unflatten(1, (self.num_heads, -1)).chunk(3, dim=2)
        else:
            q, k, v = (part.unflatten(1, (self.num_heads, -1)) for part in qkv.chunk(3, dim=1))
        h = F.scaled_dot_product_attention(q.mT, k.mT, v.mT).mT.flatten(1, 2)
        return (pixels + self.proj_out(h)).reshape(x.shape)


class Downsample(nn.Module):
    """Half the side by a convolution of stride 2, as ADM without residual resampling does."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.op = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Halve the side of ``x``."""
        return self.op(x)


class Upsample(nn.Module):
    """Twice the side by repetition and a convolution, as ADM without residual resampling does."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Double the side of ``x``."""
        return self.conv(resample(x, "up"))


def resample(x: Float[Tensor, "batch channels height width"], how: str) -> Float[Tensor, "batch channels h w"]:
    """Twice the side by repetition (``"up"``), or half of it by 2×2 means (``"down"``)."""
    return F.interpolate(x, scale_factor=2.0, mode="nearest") if how == "up" else F.avg_pool2d(x, 2)


def zeroed(layer: nn.Conv1d | nn.Conv2d) -> nn.Module:
    """The layer with weights and bias 0, so that its branch begins as nothing."""
    nn.init.zeros_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer

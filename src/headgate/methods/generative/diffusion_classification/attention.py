r"""Classifiers that attend over the cells of one map, or of several maps at several times (DifFormer).

Head D of Mukhopadhyay et al. (arXiv 2307.08702) and its successor in "Do text-free diffusion models learn discriminative
visual representations?" (arXiv 2311.17921), as in soumik-kanad/diffssl. A map is pooled to g × g cells, normalised over
channels and cells together, and mapped to d channels; behind a learned class token two pre-norm transformer blocks follow, and
the class token is classified. There are no positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from headgate.methods.generative.diffusion_classification.heads import check_maps
from headgate.nn import FeedForward, MultiHeadAttention, TransformerBlock
from headgate.validate import check_positive

__all__ = ["AttentionHead", "DifFormer"]

Norm = Literal["layer", "batch"]


class AttentionHead(nn.Module):
    """Attention over the cells of one map.

    Args:
        in_channels: C of the maps.
        num_classes: K.
        dim: d, channels of the tokens.
        depth: transformer blocks.
        num_heads: attention heads; must divide ``dim``.
        norm: ``"layer"`` normalises over (C, g, g) with a weight and a bias for each entry, ``"batch"`` is batch norm.
        grid: g, cells to a side. Larger maps are averaged down to it; smaller ones are refused.
        mlp_ratio: inner width of the token-wise networks over ``dim``.

    Raises:
        ValueError: a size that does not fit, or an unknown norm.
    """

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        dim: int = 1024,
        depth: int = 2,
        num_heads: int = 8,
        *,
        norm: Norm = "layer",
        grid: int = 16,
        mlp_ratio: float = 4.0,
    ) -> None:
        super().__init__()
        check_positive(num_classes=num_classes)
        self.num_classes = num_classes
        self.tokens = MapTokens(in_channels, dim, grid, norm)
        self.attention = ClassToken(dim, depth, num_heads, mlp_ratio)
        self.classifier = nn.Linear(dim, num_classes)

    def forward(self, features: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch classes"]:
        """Classify maps ``(batch, in_channels, height, width)`` of at least ``grid`` cells a side.

        Returns:
            Logits ``(batch, num_classes)``.

        Raises:
            TypeError: wrong dtype.
            ValueError: wrong shape, or maps of fewer cells than the grid.
        """
        return self.classifier(self.attention(self.tokens(features)))


class DifFormer(nn.Module):
    """Attention over the cells of several blocks' maps together, repeated for several times.

    Each block has its own norm and projection, which all times share; so is the attention shared. The class tokens of all
    times stand side by side before the classifier.

    Args:
        in_channels: C of each block's maps.
        num_classes: K.
        num_timesteps: how many times are read.
        dim: channels of the tokens.
        depth: transformer blocks.
        num_heads: attention heads; must divide ``dim``.
        norm: as of :class:`AttentionHead`.
        grids: cells to a side, one number for all blocks or one each.
        mlp_ratio: inner width of the token-wise networks over ``dim``.

    Raises:
        ValueError: a size that does not fit, or an unknown norm.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        num_classes: int,
        num_timesteps: int = 3,
        dim: int = 1024,
        depth: int = 2,
        num_heads: int = 8,
        *,
        norm: Norm = "layer",
        grids: int | Sequence[int] = 16,
        mlp_ratio: float = 4.0,
    ) -> None:
        super().__init__()
        check_positive(num_classes=num_classes, num_timesteps=num_timesteps, blocks=len(in_channels))
        sides = [grids] * len(in_channels) if isinstance(grids, int) else list(grids)
        if len(sides) != len(in_channels):
            raise ValueError(f"grids must hold one number per block, {len(in_channels)}, got {len(sides)}")
        self.num_classes = num_classes
        self.num_timesteps = num_timesteps
        self.tokens = nn.ModuleList(MapTokens(c, dim, g, norm) for c, g in zip(in_channels, sides, strict=True))
        self.attention = ClassToken(dim, depth, num_heads, mlp_ratio)
        self.classifier = nn.Linear(dim * num_timesteps, num_classes)

    def forward(
        self, features: Sequence[Sequence[Float[Tensor, "batch channels height width"]]]
    ) -> Float[Tensor, "batch classes"]:
        """Classify maps.

        Args:
            features: ``features[time][block]``, ``(batch, in_channels[block], height, width)``.

        Returns:
            Logits ``(batch, num_classes)``.

        Raises:
            TypeError: wrong dtype.
            ValueError: another number of times or blocks, wrong shapes, or maps of fewer cells than the grid.
        """
        if len(features) != self.num_timesteps or any(len(maps) != len(self.tokens) for maps in features):
            raise ValueError(
                f"features must hold {self.num_timesteps} times of {len(self.tokens)} blocks, "
                f"got {[len(maps) for maps in features]} blocks"
            )
        batch = features[0][0].shape[0]
        if any(maps.shape[0] != batch for time in features for maps in time):
            raise ValueError(f"features must be of one batch, got {[[m.shape[0] for m in time] for time in features]}")
        read = [
            self.attention(torch.cat([tokens(maps) for tokens, maps in zip(self.tokens, time, strict=True)], dim=1))
            for time in features
        ]
        return self.classifier(torch.cat(read, dim=1))


class MapTokens(nn.Module):
    """A map as g² tokens: adaptive average, norm, 1×1 convolution.

    Args:
        in_channels: C.
        dim: channels of the tokens.
        grid: g.
        norm: ``"layer"`` or ``"batch"``.
    """

    def __init__(self, in_channels: int, dim: int, grid: int, norm: Norm) -> None:
        super().__init__()
        check_positive(in_channels=in_channels, dim=dim, grid=grid)
        if norm not in ("layer", "batch"):
            raise ValueError(f"norm must be 'layer' or 'batch', got {norm!r}")
        self.in_channels = in_channels
        self.grid = grid
        self.norm = nn.LayerNorm([in_channels, grid, grid]) if norm == "layer" else nn.BatchNorm2d(in_channels)
        self.proj = nn.Conv2d(in_channels, dim, 1)

    def forward(self, features: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch cells dim"]:
        """Tokens in raster order."""
        check_maps(features, self.in_channels, self.proj.weight)
        if min(features.shape[2:]) < self.grid:
            raise ValueError(
                f"features must have at least grid={self.grid} cells a side, got maps of {tuple(features.shape[2:])}; "
                "build the head with a smaller grid"
            )
        pooled = F.adaptive_avg_pool2d(features, self.grid)
        return self.proj(self.norm(pooled).to(pooled.dtype)).flatten(2).transpose(1, 2)


class ClassToken(nn.Module):
    """A class token, zero at the start, that reads tokens through transformer blocks without biases on q, k and v.

    Args:
        dim: channels.
        depth: blocks.
        num_heads: attention heads.
        mlp_ratio: inner width over ``dim``.
    """

    def __init__(self, dim: int, depth: int, num_heads: int, mlp_ratio: float) -> None:
        super().__init__()
        check_positive(dim=dim, depth=depth)
        self.class_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.blocks = nn.ModuleList(
            TransformerBlock(
                dim,
                MultiHeadAttention(dim, num_heads, bias=False),
                FeedForward(dim, int(dim * mlp_ratio)),
                norm_eps=1e-5,
            )
            for _ in range(depth)
        )

    def forward(self, tokens: Float[Tensor, "batch tokens dim"]) -> Float[Tensor, "batch dim"]:
        """The class token behind the last block."""
        x = torch.cat([self.class_token.to(tokens.dtype).expand(tokens.shape[0], -1, -1), tokens], dim=1)
        for block in self.blocks:
            x = block(x)
        return x[:, 0]

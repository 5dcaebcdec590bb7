"""ViG, the plain backbone: patches of 16 pixels, learned positions, blocks of BiGLA and SwiGLU (arXiv 2405.18425).

There is no class token: the classifier reads the mean of all tokens. Any grid of patches will do, square or not: the
learned positions are resized, and nothing else knows the image's size.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from headgate.methods.vision.vig.backbone import SMALLEST_IMAGE, Backbone
from headgate.methods.vision.vig.block import ViGBlock, drop_path_rates, to_map, to_tokens
from headgate.methods.vision.vig.feed_forward import SwiGLU
from headgate.methods.vision.vig.layer import Activation, BidirectionalGLA
from headgate.methods.vision.vig.positions import RotaryMode
from headgate.nn import RMSNorm, swiglu_size
from headgate.nn.patch_embedding import ConvPatchEmbedding, resize_positions
from headgate.validate import check_floating, check_positive, check_probability, check_shape

__all__ = ["ViG", "vig_base", "vig_small", "vig_tiny"]

_MLP_MULTIPLE = 256


class ViG(Backbone):
    """Image classifier and feature extractor whose cost is linear in the number of pixels.

    Linear layers start from N(0, 0.02) with zero biases, those of the mixers Xavier-uniform with gain 2^-2.5, positions
    from a normal of deviation 0.02.

    Args:
        dim: channels.
        depth: blocks.
        num_heads: heads of every mixer.
        img_size: pixels, a number or (height, width), whose grid of patches has a learned position per patch. For
            images of other sizes they are resized.
        patch_size: side of a patch in pixels, even.
        in_chans: channels of the images.
        num_classes: classes; 0 for no classifier, so that pooled features are returned.
        expand_k: channels of queries and keys, as a multiple of ``dim``.
        conv_act: of every :class:`BidirectionalGLA`.
        out_act: of every :class:`BidirectionalGLA`.
        clamp_min: of every :class:`BidirectionalGLA`.
        direction_gates: of every :class:`BidirectionalGLA`.
        bidirectional: of every :class:`BidirectionalGLA`.
        locality: of every :class:`BidirectionalGLA`.
        rotary: of every :class:`BidirectionalGLA`.
        mlp_dim: inner size of SwiGLU; default 8/3 of ``dim``, rounded up to a multiple of 256.
        position_embedding: whether there are learned positions.
        drop_path_rate: stochastic depth rate of the last block; it rises linearly from 0 in the first.
        norm_eps: ε of all norms but those of the patch embedding.
        pad_images: whether to pad images with zeros, at the right and at the bottom, to whole patches. Without, images
            of other sizes are refused.
        features_only: leave out norm and classifier, and return a list of feature maps ``(batch, dim, rows, columns)``.
        out_indices: blocks whose outputs ``features_only`` returns: positions, or n for the last n; default the last
            blocks of the four quarters of the depth.
        official_eval_halving: of every :class:`BidirectionalGLA`; for published weights.

    Raises:
        ValueError: a size does not fit, or options that exclude each other.
    """

    def __init__(
        self,
        dim: int,
        depth: int = 12,
        num_heads: int = 3,
        *,
        img_size: int | Sequence[int] = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        num_classes: int = 1000,
        expand_k: float = 0.5,
        conv_act: Activation | None = None,
        out_act: Activation | None = None,
        clamp_min: float | None = None,
        direction_gates: bool = True,
        bidirectional: bool = True,
        locality: bool = True,
        rotary: RotaryMode | None = None,
        mlp_dim: int | None = None,
        position_embedding: bool = True,
        drop_path_rate: float = 0.0,
        norm_eps: float = 1e-6,
        pad_images: bool = False,
        features_only: bool = False,
        out_indices: int | Sequence[int] | None = None,
        official_eval_halving: bool = False,
    ) -> None:
        check_positive(dim=dim, depth=depth)
        check_probability(drop_path_rate=drop_path_rate)
        if features_only and out_indices is None:
            out_indices = sorted({max(0, depth * quarter // 4 - 1) for quarter in (1, 2, 3, 4)})
        super().__init__(dim, num_classes, depth, features_only, out_indices)
        self.patch_embedding = ConvPatchEmbedding(dim, patch_size, in_chans, activation=nn.SiLU)
        self.patch_size = patch_size
        self.pad_images = pad_images
        height, width = (img_size, img_size) if isinstance(img_size, int) else img_size
        self.grid = self._grid("img_size", height, width)
        self.position_embedding = None
        if position_embedding:
            self.position_embedding = nn.Parameter(torch.empty(1, self.grid[0] * self.grid[1], dim))
        rates = drop_path_rates(drop_path_rate, depth)
        self.blocks = nn.ModuleList(
            ViGBlock(
                BidirectionalGLA(
                    dim,
                    num_heads,
                    expand_k,
                    clamp_min=clamp_min,
                    conv_act=conv_act,
                    out_act=out_act,
                    direction_gates=direction_gates,
                    bidirectional=bidirectional,
                    locality=locality,
                    rotary=rotary,
                    norm_eps=norm_eps,
                    official_eval_halving=official_eval_halving,
                ),
                SwiGLU(dim, swiglu_size(dim, multiple=_MLP_MULTIPLE) if mlp_dim is None else mlp_dim),
                partial(RMSNorm, eps=norm_eps),
                rate,
            )
            for rate in rates[: self.out_indices[-1] + 1]
        )
        self.norm = nn.Identity() if features_only else RMSNorm(dim, eps=norm_eps)
        self.head = nn.Identity() if features_only or not num_classes else nn.Linear(dim, num_classes)
        self._init_weights()

    def forward_head(
        self, features: Float[Tensor, "batch tokens dim"], pre_logits: bool = False
    ) -> Float[Tensor, "batch classes"]:
        """Pool tokens and classify.

        Args:
            features: what ``forward_features`` returned: tokens ``(batch, rows * columns, dim)`` in raster order.
            pre_logits: return the pooled features ``(batch, dim)``.

        Returns:
            Logits ``(batch, num_classes)``.
        """
        pooled = features.mean(dim=1)
        return pooled if pre_logits else self.head(pooled)

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that are no weights of a layer, for recipes that spare them weight decay."""
        return set() if self.position_embedding is None else {"position_embedding"}

    def _embed(self, images: Tensor) -> Float[Tensor, "batch dim rows columns"]:
        check_shape(
            "images", images, (None, self.patch_embedding.in_chans, None, None), "batch, channels, height, width"
        )
        check_floating("images", images, like=self.patch_embedding.conv1.weight.dtype)
        height, width = images.shape[2:]
        grid = self._grid("images", height, width)
        below, beside = grid[0] * self.patch_size - height, grid[1] * self.patch_size - width
        if below or beside:
            images = F.pad(images, (0, beside, 0, below))
        features = self.patch_embedding(images)
        if self.position_embedding is None:
            return features
        return features + to_map(resize_positions(self.position_embedding, self.grid, grid), grid)

    def _steps(self) -> nn.ModuleList:
        return self.blocks

    def _finish(self, features: Tensor) -> Float[Tensor, "batch tokens dim"]:
        return self.norm(to_tokens(features))

    def _grid(self, name: str, height: int, width: int) -> tuple[int, int]:
        if height < SMALLEST_IMAGE or width < SMALLEST_IMAGE:
            raise ValueError(f"{name} must be at least {SMALLEST_IMAGE} pixels high and wide, got {height}×{width}")
        if not self.pad_images and (height % self.patch_size or width % self.patch_size):
            raise ValueError(
                f"{name} must be whole patches of {self.patch_size} pixels high and wide, got {height}×{width}; "
                "pad_images=True pads to whole ones"
            )
        return -(-height // self.patch_size), -(-width // self.patch_size)

    def _init_weights(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                self._init_linear(module)
        for module in self.modules():
            if isinstance(module, BidirectionalGLA):
                module.reset_parameters()
        if self.position_embedding is not None:
            nn.init.trunc_normal_(self.position_embedding, std=0.02)

    def _init_linear(self, layer: nn.Linear) -> None:
        nn.init.normal_(layer.weight, std=0.02)
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)


def vig_tiny(**options: Any) -> ViG:
    """ViG-T: 192 channels, 3 heads, 12 blocks, SiLU behind the convolutions and before the output projections.

    Args:
        **options: keywords of :class:`ViG`, in place of the preset's.
    """
    return ViG(**{"dim": 192, "num_heads": 3, "conv_act": "silu", "out_act": "silu", **options})


def vig_small(**options: Any) -> ViG:
    """ViG-S: 384 channels, 6 heads, 12 blocks, no SiLU in the mixers, drop path 0.2.

    Args:
        **options: keywords of :class:`ViG`, in place of the preset's.
    """
    return ViG(**{"dim": 384, "num_heads": 6, "drop_path_rate": 0.2, **options})


def vig_base(**options: Any) -> ViG:
    """ViG-B: 768 channels, 12 heads, 12 blocks, no SiLU in the mixers, drop path 0.5.

    Args:
        **options: keywords of :class:`ViG`, in place of the preset's.
    """
    return ViG(**{"dim": 768, "num_heads": 12, "drop_path_rate": 0.5, **options})

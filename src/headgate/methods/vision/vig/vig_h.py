"""ViG-H, the hierarchical backbone: four stages at strides 4, 8, 16 and 32 (arXiv 2405.18425).

The stem and the steps between stages are overlapping convolutions of stride 2 that round sides up, so no pixel of any
image is cut off. There are no positions: the convolutions tell where the borders are.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from headgate.methods.vision.vig.backbone import SMALLEST_IMAGE, Backbone
from headgate.methods.vision.vig.block import ViGBlock, drop_path_rates
from headgate.methods.vision.vig.feed_forward import SwiGLU
from headgate.methods.vision.vig.layer import Activation, BidirectionalGLA
from headgate.methods.vision.vig.positions import RotaryMode
from headgate.nn import swiglu_size
from headgate.nn.patch_embedding import ConvPatchEmbedding, LayerNorm2d
from headgate.validate import check_floating, check_positive, check_probability, check_shape

__all__ = ["ViGH", "vig_h_base", "vig_h_small", "vig_h_tiny"]

_MLP_MULTIPLE = 32


class ViGH(Backbone):
    """Hierarchical image classifier, and backbone for detection and segmentation.

    All linear layers start from a normal of deviation 0.02 with zero biases, depthwise convolutions Xavier-uniform with
    gain 2^-2.5.

    Args:
        dim: channels of the first stage; each further stage has twice as many.
        depths: blocks of the stages.
        num_heads: heads of the stages' mixers.
        in_chans: channels of the images.
        num_classes: classes; 0 for no classifier, so that pooled features are returned.
        expand_k: channels of queries and keys, as a multiple of a stage's channels.
        conv_act: of every :class:`BidirectionalGLA`.
        out_act: of every :class:`BidirectionalGLA`.
        clamp_min: of every :class:`BidirectionalGLA`.
        direction_gates: of every :class:`BidirectionalGLA`.
        bidirectional: of every :class:`BidirectionalGLA`.
        locality: of every :class:`BidirectionalGLA`.
        rotary: of every :class:`BidirectionalGLA`.
        drop_path_rate: stochastic depth rate of the last block; it rises linearly from 0 in the first.
        norm_eps: ε of the norms in the mixers.
        features_only: leave out norm and classifier, and return a list of maps
            ``(batch, dim · 2^s, height / 2^(s+2), width / 2^(s+2))`` of the stages s, sizes rounded up.
        out_indices: stages whose outputs ``features_only`` returns: positions, or n for the last n; default all.

    Raises:
        ValueError: a size does not fit, or options that exclude each other.
    """

    def __init__(
        self,
        dim: int = 96,
        depths: Sequence[int] = (2, 2, 5, 2),
        num_heads: Sequence[int] = (3, 6, 12, 24),
        *,
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
        drop_path_rate: float = 0.0,
        norm_eps: float = 1e-6,
        features_only: bool = False,
        out_indices: int | Sequence[int] | None = None,
    ) -> None:
        check_positive(dim=dim, **{f"depths[{stage}]": depth for stage, depth in enumerate(depths)})
        check_probability(drop_path_rate=drop_path_rate)
        if not depths or len(depths) != len(num_heads):
            raise ValueError(
                f"num_heads must hold one number per stage, got {list(num_heads)} for depths={list(depths)}"
            )
        widths = [dim * 2**stage for stage in range(len(depths))]
        super().__init__(widths[-1], num_classes, len(depths), features_only, out_indices)
        self.dims = widths[: self.out_indices[-1] + 1]
        self.patch_embedding = ConvPatchEmbedding(dim, 4, in_chans, activation=nn.GELU)
        rates = iter(drop_path_rates(drop_path_rate, sum(depths)))
        self.stages = nn.ModuleList()
        for stage, width in enumerate(self.dims):
            blocks = [
                ViGBlock(
                    BidirectionalGLA(
                        width,
                        num_heads[stage],
                        expand_k,
                        clamp_min=clamp_min,
                        conv_act=conv_act,
                        out_act=out_act,
                        direction_gates=direction_gates,
                        bidirectional=bidirectional,
                        locality=locality,
                        rotary=rotary,
                        norm_eps=norm_eps,
                    ),
                    SwiGLU(width, swiglu_size(width, multiple=_MLP_MULTIPLE)),
                    partial(nn.LayerNorm, eps=1e-5),
                    next(rates),
                )
                for _ in range(depths[stage])
            ]
            self.stages.append(_Stage(_Downsample(width // 2) if stage else nn.Identity(), blocks))
        self.norm = nn.Identity() if features_only else LayerNorm2d(self.num_features)
        self.head = nn.Identity() if features_only or not num_classes else nn.Linear(self.num_features, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                self._init_linear(module)

    def forward_head(
        self, features: Float[Tensor, "batch dim rows columns"], pre_logits: bool = False
    ) -> Float[Tensor, "batch classes"]:
        """Pool a map and classify.

        Args:
            features: what ``forward_features`` returned: the normed last map ``(batch, num_features, rows, columns)``.
            pre_logits: return the pooled features ``(batch, num_features)``.

        Returns:
            Logits ``(batch, num_classes)``.
        """
        pooled = features.mean(dim=(2, 3))
        return pooled if pre_logits else self.head(pooled)

    def _embed(self, images: Tensor) -> Float[Tensor, "batch dim rows columns"]:
        check_shape(
            "images", images, (None, self.patch_embedding.in_chans, None, None), "batch, channels, height, width"
        )
        check_floating("images", images, like=self.patch_embedding.conv1.weight.dtype)
        height, width = images.shape[2:]
        if height < SMALLEST_IMAGE or width < SMALLEST_IMAGE:
            raise ValueError(f"images must be at least {SMALLEST_IMAGE} pixels high and wide, got {height}×{width}")
        return self.patch_embedding(images)

    def _steps(self) -> nn.ModuleList:
        return self.stages

    def _finish(self, features: Tensor) -> Float[Tensor, "batch dim rows columns"]:
        return self.norm(features)

    def _init_linear(self, layer: nn.Linear) -> None:
        nn.init.trunc_normal_(layer.weight, std=0.02)
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)


class _Stage(nn.Module):
    """Half the resolution at twice the width (nothing of that in the first stage), then blocks."""

    def __init__(self, downsample: nn.Module, blocks: Sequence[ViGBlock]) -> None:
        super().__init__()
        self.downsample = downsample
        self.blocks = nn.ModuleList(blocks)

    def advance(self, features: Float[Tensor, "batch dim height width"], *, in_place: bool) -> Tensor:
        features = self.downsample(features)
        for block in self.blocks:
            features = block.advance(features, in_place=in_place)  # type: ignore[operator]
        return features

    def forward(self, features: Float[Tensor, "batch dim height width"]) -> Float[Tensor, "batch wide rows columns"]:
        return self.advance(features, in_place=False)


class _Downsample(nn.Module):
    """A 3×3 convolution of stride 2 to twice the channels, then layer norm."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(dim, 2 * dim, 3, stride=2, padding=1)
        self.norm = LayerNorm2d(2 * dim)

    def forward(self, features: Float[Tensor, "batch dim height width"]) -> Float[Tensor, "batch wide rows columns"]:
        return self.norm(self.conv(features))


def vig_h_tiny(**options: Any) -> ViGH:
    """ViG-H-T: 96 channels to 768; 2, 2, 5 and 2 blocks; drop path 0.2.

    Args:
        **options: keywords of :class:`ViGH`, in place of the preset's.
    """
    return ViGH(**{"depths": (2, 2, 5, 2), "drop_path_rate": 0.2, **options})


def vig_h_small(**options: Any) -> ViGH:
    """ViG-H-S: 96 channels to 768; 2, 2, 17 and 2 blocks; drop path 0.3.

    Args:
        **options: keywords of :class:`ViGH`, in place of the preset's.
    """
    return ViGH(**{"depths": (2, 2, 17, 2), "drop_path_rate": 0.3, **options})


def vig_h_base(**options: Any) -> ViGH:
    """ViG-H-B: 128 channels to 1024; 2, 2, 17 and 2 blocks; drop path 0.6.

    Args:
        **options: keywords of :class:`ViGH`, in place of the preset's.
    """
    wide = {"dim": 128, "depths": (2, 2, 17, 2), "num_heads": (4, 8, 16, 32), "drop_path_rate": 0.6}
    return ViGH(**{**wide, **options})

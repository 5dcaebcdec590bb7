"""The contract cases of the public modules of ``headgate.nn``: "<name>" or "<name>-<variant>" → case."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from headgate.nn import (
    ConvPatchEmbedding,
    DropPath,
    ExplicitAttention,
    FeedForward,
    GatedFeedForward,
    LayerNorm2d,
    LowRankLogGate,
    MixerLM,
    MultiHeadAttention,
    RMSNorm,
    ShortConvolution,
    SlidingWindowAttention,
    TransformerBlock,
    VisionTransformer,
)
from headgate.testing import BadInput, ContractCase

__all__ = ["CASES"]


def _hidden(generator: torch.Generator) -> tuple[Tensor]:
    return (torch.randn(4, 9, 8, generator=generator),)


def _wide_hidden(generator: torch.Generator) -> tuple[Tensor]:
    return (torch.randn(4, 9, 16, generator=generator),)


def _tokens(generator: torch.Generator) -> tuple[Tensor]:
    return (torch.randint(11, (4, 8), generator=generator),)


def _images(height: int = 8, width: int = 12) -> Callable[[torch.Generator], tuple[Tensor]]:
    return lambda generator: (torch.randn(3, 2, height, width, generator=generator),)


_HALF_PATCH = BadInput("half a patch", _images(8, 10), ValueError, "whole patches of 4 pixels.*8×10")

CASES: dict[str, ContractCase] = {
    "ConvPatchEmbedding": ContractCase(lambda: ConvPatchEmbedding(8, 4, 2), _images()),
    "DropPath": ContractCase(lambda: DropPath(0.5), _hidden),
    "ExplicitAttention": ContractCase(lambda: ExplicitAttention(8, 2, dropout=0.1), _hidden),
    "FeedForward": ContractCase(lambda: FeedForward(8), _hidden),
    "GatedFeedForward": ContractCase(lambda: GatedFeedForward(8, 12), _hidden),
    "LayerNorm2d": ContractCase(lambda: LayerNorm2d(2), _images(4, 5)),
    "LowRankLogGate": ContractCase(lambda: LowRankLogGate(8, 6, 4), _hidden),
    "LowRankLogGate-clamped": ContractCase(lambda: LowRankLogGate(8, 6, 4, normalizer=1.0, clamp_min=-0.5), _hidden),
    "MixerLM": ContractCase(
        lambda: MixerLM(
            8, 2, 11, mixer=lambda layer: MultiHeadAttention(8, 2, causal=True), dropout=0.1, drop_path=0.2
        ),
        _tokens,
    ),
    "MultiHeadAttention": ContractCase(lambda: MultiHeadAttention(8, 2, dropout=0.1), _hidden),
    "MultiHeadAttention-causal": ContractCase(lambda: MultiHeadAttention(8, causal=True, bias=False), _hidden),
    "RMSNorm": ContractCase(lambda: RMSNorm(8), _hidden),
    "RMSNorm-whole registers": ContractCase(lambda: RMSNorm(16), _wide_hidden),
    "ShortConvolution": ContractCase(lambda: ShortConvolution(8, 4), _hidden),
    "SlidingWindowAttention": ContractCase(lambda: SlidingWindowAttention(8, 2, 2), _hidden),
    "SlidingWindowAttention-causal": ContractCase(lambda: SlidingWindowAttention(8, 4, causal=True), _hidden),
    "TransformerBlock": ContractCase(
        lambda: TransformerBlock(8, MultiHeadAttention(8, 2), FeedForward(8, 12), drop_path=0.1), _hidden
    ),
    "VisionTransformer": ContractCase(
        lambda: VisionTransformer(
            12, 2, 3, img_size=8, patch_size=4, in_chans=2, num_classes=5, mlp_dim=16, drop_path_rate=0.1
        ),
        _images(),
        bad_inputs=(_HALF_PATCH,),
    ),
    "VisionTransformer-average": ContractCase(
        lambda: VisionTransformer(
            12, 1, 3, img_size=(8, 12), patch_size=4, in_chans=2, num_classes=0, class_token=False, qkv_bias=False
        ),
        _images(),
        bad_inputs=(_HALF_PATCH,),
    ),
    "VisionTransformer-explicit": ContractCase(
        lambda: VisionTransformer(
            8, 1, 2, img_size=16, patch_size=4, in_chans=2, class_position=False, explicit_attention=True
        ),
        _images(),
        bad_inputs=(_HALF_PATCH,),
    ),
}

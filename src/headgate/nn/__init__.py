"""Modules that two or more methods share."""

from __future__ import annotations

from headgate.nn.attention import MultiHeadAttention, SlidingWindowAttention
from headgate.nn.drop_path import DropPath
from headgate.nn.feed_forward import FeedForward, GatedFeedForward, swiglu_size
from headgate.nn.language_model import MixerLM, MixerLMOutput
from headgate.nn.low_rank_log_gate import LowRankLogGate
from headgate.nn.patch_embedding import ConvPatchEmbedding, LayerNorm2d, resize_positions
from headgate.nn.positions import apply_rotary
from headgate.nn.rms_norm import RMSNorm
from headgate.nn.short_convolution import ShortConvolution
from headgate.nn.vision_transformer import (
    ExplicitAttention,
    TransformerBlock,
    VisionTransformer,
    deit_base,
    deit_small,
    deit_tiny,
)
from headgate.nn.window_normalization import WindowStatistics, window_statistics

__all__ = [
    "ConvPatchEmbedding",
    "DropPath",
    "ExplicitAttention",
    "FeedForward",
    "GatedFeedForward",
    "LayerNorm2d",
    "LowRankLogGate",
    "MixerLM",
    "MixerLMOutput",
    "MultiHeadAttention",
    "RMSNorm",
    "ShortConvolution",
    "SlidingWindowAttention",
    "TransformerBlock",
    "VisionTransformer",
    "WindowStatistics",
    "apply_rotary",
    "deit_base",
    "deit_small",
    "deit_tiny",
    "resize_positions",
    "swiglu_size",
    "window_statistics",
]

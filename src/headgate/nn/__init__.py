"""Modules that two or more methods share."""

from __future__ import annotations

from headgate.nn.attention import MultiHeadAttention, SlidingWindowAttention
from headgate.nn.drop_path import DropPath
from headgate.nn.feed_forward import FeedForward, GatedFeedForward
from headgate.nn.language_model import MixerLM, MixerLMOutput
from headgate.nn.low_rank_log_gate import LowRankLogGate
from headgate.nn.positions import apply_rotary
from headgate.nn.short_convolution import ShortConvolution

__all__ = [
    "DropPath",
    "FeedForward",
    "GatedFeedForward",
    "LowRankLogGate",
    "MixerLM",
    "MixerLMOutput",
    "MultiHeadAttention",
    "ShortConvolution",
    "SlidingWindowAttention",
    "apply_rotary",
]

"""Pure tensor functions, each with its definition as a short loop (``reference.py``) and faster backends beside it."""

from __future__ import annotations

from headgate.ops.gated_linear_attention import (
    GatedLinearAttentionOutput,
    GatedLinearAttentionState,
    bidirectional_gated_linear_attention,
    gated_linear_attention,
    gated_linear_attention_backends,
)
from headgate.ops.long_convolution import long_convolution
from headgate.ops.segments import (
    segment_counts,
    segment_max,
    segment_mean,
    segment_pack,
    segment_ranks,
    segment_softmax,
    segment_sum,
    segment_top_k,
)
from headgate.ops.tokenwise import depthwise_conv3x3, log_sigmoid_gate, mix_branches, rms_norm, swiglu

__all__ = [
    "GatedLinearAttentionOutput",
    "GatedLinearAttentionState",
    "bidirectional_gated_linear_attention",
    "depthwise_conv3x3",
    "gated_linear_attention",
    "gated_linear_attention_backends",
    "log_sigmoid_gate",
    "long_convolution",
    "mix_branches",
    "rms_norm",
    "segment_counts",
    "segment_max",
    "segment_mean",
    "segment_pack",
    "segment_ranks",
    "segment_softmax",
    "segment_sum",
    "segment_top_k",
    "swiglu",
]

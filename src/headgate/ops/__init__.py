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

__all__ = [
    "GatedLinearAttentionOutput",
    "GatedLinearAttentionState",
    "bidirectional_gated_linear_attention",
    "gated_linear_attention",
    "gated_linear_attention_backends",
    "long_convolution",
]

"""The contract cases of the public modules of ``headgate.nn``: "<name>" or "<name>-<variant>" → case."""

from __future__ import annotations

import torch
from torch import Tensor

from headgate.nn import (
    DropPath,
    FeedForward,
    GatedFeedForward,
    MixerLM,
    MultiHeadAttention,
    ShortConvolution,
    SlidingWindowAttention,
)
from headgate.testing import ContractCase

__all__ = ["CASES"]


def _hidden(generator: torch.Generator) -> tuple[Tensor]:
    return (torch.randn(4, 9, 8, generator=generator),)


def _tokens(generator: torch.Generator) -> tuple[Tensor]:
    return (torch.randint(11, (4, 8), generator=generator),)


CASES: dict[str, ContractCase] = {
    "DropPath": ContractCase(lambda: DropPath(0.5), _hidden),
    "FeedForward": ContractCase(lambda: FeedForward(8), _hidden),
    "GatedFeedForward": ContractCase(lambda: GatedFeedForward(8, 12), _hidden),
    "MixerLM": ContractCase(
        lambda: MixerLM(
            8, 2, 11, mixer=lambda layer: MultiHeadAttention(8, 2, causal=True), dropout=0.1, drop_path=0.2
        ),
        _tokens,
    ),
    "MultiHeadAttention": ContractCase(lambda: MultiHeadAttention(8, 2, dropout=0.1), _hidden),
    "MultiHeadAttention-causal": ContractCase(lambda: MultiHeadAttention(8, causal=True, bias=False), _hidden),
    "ShortConvolution": ContractCase(lambda: ShortConvolution(8, 4), _hidden),
    "SlidingWindowAttention": ContractCase(lambda: SlidingWindowAttention(8, 2, 2), _hidden),
    "SlidingWindowAttention-causal": ContractCase(lambda: SlidingWindowAttention(8, 4, causal=True), _hidden),
}

"""The models of the published grids, by name: which mixer stands in which block, and with which options."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

from torch import nn

from headgate.methods.sequence.zoology.base_conv import BaseConv
from headgate.methods.sequence.zoology.based import Based
from headgate.methods.sequence.zoology.h3 import H3
from headgate.methods.sequence.zoology.hybrid import HybridMixer
from headgate.methods.sequence.zoology.hyena import Hyena
from headgate.methods.sequence.zoology.retention import Retention
from headgate.methods.sequence.zoology.rwkv import RWKVTimeMix
from headgate.methods.sequence.zoology.sparse_lookups import SparseLookups
from headgate.nn import FeedForward, MixerLM, MultiHeadAttention, SlidingWindowAttention
from headgate.validate import check_positive

__all__ = ["MIXERS", "WITH_POSITIONS", "MixerFactory", "zoology_model"]


class MixerFactory(Protocol):
    """Builds the sequence mixer of one block."""

    def __call__(self, dim: int, length: int, layer: int) -> nn.Module:
        """The mixer of block ``layer`` for sequences of up to ``length`` tokens of ``dim`` channels."""


def zoology_model(
    mixer: str,
    dim: int = 64,
    length: int = 64,
    vocab_size: int = 8192,
    depth: int = 2,
    *,
    num_heads: int = 1,
    mlp_ratio: int = 0,
) -> MixerLM:
    """Build a model of the published experiments.

    Args:
        mixer: a name of :data:`MIXERS`.
        dim: width of the residual stream.
        length: longest sequence.
        vocab_size: number of token ids.
        depth: number of blocks: 2 in the recall grids.
        num_heads: heads, where the mixer is ``"attention"``; 1 in the recall grids.
        mlp_ratio: width of the two-layer network in every block as a multiple of ``dim``; 0 for none, as in the recall
            grids, 4 in the language models.

    Returns:
        The freshly initialised model.

    Raises:
        ValueError: unknown mixer, or heads where there is no attention.
    """
    check_positive(dim=dim, length=length, depth=depth, num_heads=num_heads)
    if mixer not in MIXERS:
        raise ValueError(f"mixer must be one of {', '.join(MIXERS)}, got {mixer!r}")
    if num_heads != 1 and mixer != "attention":
        raise ValueError(f"num_heads is an option of the mixer 'attention', got num_heads={num_heads}, mixer={mixer!r}")
    if mlp_ratio < 0:
        raise ValueError(f"mlp_ratio must not be negative, got {mlp_ratio}")

    def build(layer: int) -> nn.Module:
        if mixer == "attention":
            return MultiHeadAttention(dim, num_heads, causal=True, dropout=0.1)
        return MIXERS[mixer](dim, length, layer)

    return MixerLM(
        dim,
        depth,
        vocab_size,
        mixer=build,
        state_mixer=(lambda layer: FeedForward(dim, mlp_ratio * dim)) if mlp_ratio else None,
        max_positions=length if mixer in WITH_POSITIONS else 0,
    )


def _attention(dim: int, length: int, layer: int) -> nn.Module:
    return MultiHeadAttention(dim, causal=True, dropout=0.1)


def _base_conv(dim: int, length: int, layer: int) -> nn.Module:
    return BaseConv(dim, length, kernel_size=-1 if layer % 2 else 3)


def _hyena(dim: int, length: int, layer: int) -> nn.Module:
    return Hyena(dim, length)


def _h3(dim: int, length: int, layer: int) -> nn.Module:
    return H3(dim, state_dim=length, head_dim=2, max_length=length)


def _rwkv(dim: int, length: int, layer: int) -> nn.Module:
    return RWKVTimeMix(dim, layer)


def _behind_convolution(build: Callable[[int], nn.Module]) -> MixerFactory:
    """A short gated convolution in even blocks, the mixer in odd ones."""

    def factory(dim: int, length: int, layer: int) -> nn.Module:
        return HybridMixer([lambda: BaseConv(dim, length, kernel_size=3), lambda: build(dim)], layer)

    return factory


MIXERS: Mapping[str, MixerFactory] = {
    "attention": _attention,
    "hyena": _hyena,
    "rwkv": _rwkv,
    "base_conv": _base_conv,
    "h3": _h3,
    "based": _behind_convolution(lambda dim: Based(dim, num_heads=1, feature_dim=8)),
    "conv_attention": _behind_convolution(lambda dim: MultiHeadAttention(dim, causal=True, dropout=0.1)),
    "conv_sliding_attention": _behind_convolution(lambda dim: SlidingWindowAttention(dim, window=64, causal=True)),
    "conv_lookups": _behind_convolution(lambda dim: SparseLookups(dim)),
    "conv_retention": _behind_convolution(lambda dim: Retention(dim)),
}
"""Name → factory. The first six are those of the main figure, where Based stands behind a short convolution; those named
``conv_…`` are hybrids of the same form."""

WITH_POSITIONS = ("attention",)
"""The mixers whose models have learned positions; all others know the order by themselves."""

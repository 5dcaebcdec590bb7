"""The published sizes of ConViT (arXiv 2103.10697, table 1): 48 or, in the plus models, 64 channels a head; 12 blocks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from headgate.methods.vision.convit.convit import ConViT
from headgate.methods.vision.convit.official import convert_state_dict

__all__ = ["convit_base", "convit_base_plus", "convit_small", "convit_small_plus", "convit_tiny", "convit_tiny_plus"]


def convit_tiny(pretrained_state: Mapping[str, Any] | None = None, **options: Any) -> ConViT:
    """ConViT-Ti: 192 channels, 4 heads.

    Args:
        pretrained_state: a checkpoint or state dict of the published code, of timm or of this library, to start from.
        **options: keywords of :class:`ConViT`, in place of the preset's.
    """
    return _preset(pretrained_state, options, embed_dim=192, num_heads=4)


def convit_tiny_plus(pretrained_state: Mapping[str, Any] | None = None, **options: Any) -> ConViT:
    """ConViT-Ti+: 256 channels, 4 heads; arguments as of :func:`convit_tiny`."""
    return _preset(pretrained_state, options, embed_dim=256, num_heads=4)


def convit_small(pretrained_state: Mapping[str, Any] | None = None, **options: Any) -> ConViT:
    """ConViT-S: 432 channels, 9 heads; arguments as of :func:`convit_tiny`."""
    return _preset(pretrained_state, options, embed_dim=432, num_heads=9)


def convit_small_plus(pretrained_state: Mapping[str, Any] | None = None, **options: Any) -> ConViT:
    """ConViT-S+: 576 channels, 9 heads; arguments as of :func:`convit_tiny`."""
    return _preset(pretrained_state, options, embed_dim=576, num_heads=9)


def convit_base(pretrained_state: Mapping[str, Any] | None = None, **options: Any) -> ConViT:
    """ConViT-B: 768 channels, 16 heads; arguments as of :func:`convit_tiny`."""
    return _preset(pretrained_state, options, embed_dim=768, num_heads=16)


def convit_base_plus(pretrained_state: Mapping[str, Any] | None = None, **options: Any) -> ConViT:
    """ConViT-B+: 1024 channels, 16 heads; arguments as of :func:`convit_tiny`."""
    return _preset(pretrained_state, options, embed_dim=1024, num_heads=16)


def _preset(state: Mapping[str, Any] | None, options: Mapping[str, Any], **sizes: int) -> ConViT:
    model = ConViT(**{**sizes, **options})
    if state is not None:
        model.load_state_dict(convert_state_dict(state))
    return model

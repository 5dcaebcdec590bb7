"""ConViT: vision transformers that start as convolutions and may leave locality behind."""

from __future__ import annotations

from headgate.methods.vision.convit.attention import GPSA, MHSA
from headgate.methods.vision.convit.convit import ConViT
from headgate.methods.vision.convit.locality import gpsa_from_mhsa, localise_
from headgate.methods.vision.convit.positions import relative_coordinates
from headgate.methods.vision.convit.presets import (
    convit_base,
    convit_base_plus,
    convit_small,
    convit_small_plus,
    convit_tiny,
    convit_tiny_plus,
)

__all__ = [
    "GPSA",
    "MHSA",
    "ConViT",
    "convit_base",
    "convit_base_plus",
    "convit_small",
    "convit_small_plus",
    "convit_tiny",
    "convit_tiny_plus",
    "gpsa_from_mhsa",
    "localise_",
    "relative_coordinates",
]

"""ViG: image backbones whose token mixer is gated linear attention in both directions."""

from __future__ import annotations

from headgate.methods.vision.vig.flops import count_multiply_adds
from headgate.methods.vision.vig.functional import gla_bidirectional
from headgate.methods.vision.vig.layer import BidirectionalGLA
from headgate.methods.vision.vig.recipe import RECIPES, Recipe
from headgate.methods.vision.vig.vig import ViG, vig_base, vig_small, vig_tiny
from headgate.methods.vision.vig.vig_h import ViGH, vig_h_base, vig_h_small, vig_h_tiny

__all__ = [
    "RECIPES",
    "BidirectionalGLA",
    "Recipe",
    "ViG",
    "ViGH",
    "count_multiply_adds",
    "gla_bidirectional",
    "vig_base",
    "vig_h_base",
    "vig_h_small",
    "vig_h_tiny",
    "vig_small",
    "vig_tiny",
]

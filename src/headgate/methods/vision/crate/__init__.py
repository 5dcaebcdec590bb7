"""CRATE: a white-box transformer whose layers compress tokens onto subspaces and sparsify them, and its measures."""

from __future__ import annotations

from headgate.evaluate.token_rates import (
    layerwise_report,
    projected_coding_rate,
    sparse_rate_reduction,
    subspace_coding_rate,
    zero_share,
)
from headgate.evaluate.token_rates import token_coding_rate as coding_rate
from headgate.methods.vision.crate.attention import MSSA
from headgate.methods.vision.crate.block import CRATEBlock
from headgate.methods.vision.crate.ista import ISTA, OvercompleteISTA
from headgate.methods.vision.crate.model import CRATE, crate_base, crate_large, crate_small, crate_tiny
from headgate.methods.vision.crate.operators import check_step_size, ista_objective, ista_step, mssa_step
from headgate.methods.vision.crate.recipe import RECIPES, Recipe

__all__ = [
    "CRATE",
    "ISTA",
    "MSSA",
    "RECIPES",
    "CRATEBlock",
    "OvercompleteISTA",
    "Recipe",
    "check_step_size",
    "coding_rate",
    "crate_base",
    "crate_large",
    "crate_small",
    "crate_tiny",
    "ista_objective",
    "ista_step",
    "layerwise_report",
    "mssa_step",
    "projected_coding_rate",
    "sparse_rate_reduction",
    "subspace_coding_rate",
    "zero_share",
]

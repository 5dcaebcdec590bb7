"""The published training recipes, as data.

    recipe = RECIPES["qlae_shapes3d"]
    model = headgate.create_model("qlae_shapes3d")
    optimizer = headgate.qlae_optimizer(model, recipe.learning_rate, recipe.weight_decay)
    headgate.train.fit(model, batches, lambda m, x: m.losses(m(x), x).loss, steps=recipe.steps, optimizer=optimizer)

Images have 64 × 64 pixels (Falcor3D and Isaac3D resized), there is no schedule, and gradients of the decayed parameters
are clipped to [-1, 1] value by value. The published learning rates, steps and batches are one for each kind of training.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

__all__ = ["RECIPES", "Recipe"]


@dataclass(frozen=True)
class Recipe:
    """How one published model was trained.

    Attributes:
        num_latents: n_z, twice the number of sources.
        weight_decay: decoupled, of all parameters but biases and codebooks.
        learning_rate: of Adam.
        betas: of Adam.
        batch_size: images per step.
        steps: updates; of the encoder for a GAN.
    """

    num_latents: int
    weight_decay: float
    learning_rate: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    batch_size: int = 128
    steps: int = 200_000


def _gan(num_latents: int, weight_decay: float) -> Recipe:
    return Recipe(num_latents, weight_decay, learning_rate=2e-4, betas=(0.0, 0.9), batch_size=64)


RECIPES: Mapping[str, Recipe] = MappingProxyType(
    {
        "qlae_shapes3d": Recipe(12, weight_decay=0.1),
        "qlae_mpi3d": Recipe(14, weight_decay=1e-3),
        "qlae_falcor3d": Recipe(14, weight_decay=0.1),
        "qlae_isaac3d": Recipe(18, weight_decay=0.1),
        "ql_infowgan_shapes3d": _gan(12, weight_decay=1e-3),
        "ql_infowgan_mpi3d": _gan(14, weight_decay=1e-3),
        "ql_infowgan_falcor3d": _gan(14, weight_decay=1e-4),
    }
)
"""Preset → recipe."""

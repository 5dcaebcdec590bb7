"""The published settings: weights, plausibility and temperature, and what each benchmark asks."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["RECIPES", "Recipe"]


@dataclass(frozen=True)
class Recipe:
    """How one benchmark is run.

    Attributes:
        prompt: the question, ``{question}`` where the benchmark has its own.
        max_new_tokens: of an answer; None where the benchmark does not limit it.
        examples: questions of one setting, or captions; None for all.
        alpha: weight of the transformed view.
        contrast: α⁻, of the noised view where VCD is used.
        plausibility: β.
        temperature: of sampling.
        noise_step: diffusion step of VCD's noise.
        decay: of M3ID.
    """

    prompt: str
    max_new_tokens: int | None
    examples: int | None
    alpha: float = 3.0
    contrast: float = 1.0
    plausibility: float = 0.1
    temperature: float = 1.0
    noise_step: int = 500
    decay: float = 0.02


RECIPES = {
    "pope": Recipe(prompt="{question}", max_new_tokens=None, examples=3000),
    "chair": Recipe(prompt="Please describe this image in detail.", max_new_tokens=64, examples=500),
    "mme": Recipe(prompt="{question}", max_new_tokens=None, examples=None),
}
"""Benchmark → how the paper runs it."""

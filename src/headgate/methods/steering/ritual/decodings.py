"""The ways of decoding that the experiment compares: which views are fused, with which weights, mask and temperature."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from headgate.methods.steering.ritual.fusion import Weight, fuse_logits, m3id_weight, view_weights

__all__ = ["DECODINGS", "Decoding", "decode_logits"]


@dataclass(frozen=True)
class Decoding:
    """One arm.

    Attributes:
        base: the view whose logits make the plausibility mask: ``"original"``, or ``"turned"`` for that one alone.
        views: the further views and their weights; ``"original"``, ``"turned"``, ``"turned 2"`` …, ``"noised"``,
            ``"imageless"``.
        mask: whether implausible tokens are left out (β = 0.1).
        normalize: whether the scores are divided by the sum of the weights.
        temperature: of sampling.
        greedy: take the best token in place of sampling.
    """

    base: str = "original"
    views: tuple[tuple[str, Weight], ...] = ()
    mask: bool = True
    normalize: bool = False
    temperature: float = 1.0
    greedy: bool = False

    @property
    def names(self) -> tuple[str, ...]:
        """All views that it looks at."""
        return self.base, *(name for name, _ in self.views)

    @property
    def plausibility(self) -> float | None:
        """β, or None."""
        return 0.1 if self.mask else None


DECODINGS: dict[str, Decoding] = {
    "ritual": Decoding(views=(("turned", 3.0),)),
    "base": Decoding(mask=False),
    "vcd": Decoding(views=(("noised", -1.0),)),
    "m3id": Decoding(views=(("imageless", m3id_weight()),)),
    "ritual_vcd": Decoding(views=(("turned", 3.0), ("noised", -1.0))),
    "mask_only": Decoding(),
    "transformed": Decoding(base="turned", mask=False),
    "ritual_alpha1": Decoding(views=(("turned", 1.0),)),
    "four_views": Decoding(views=(("turned", 1.0), ("turned 2", 1.0), ("turned 3", 1.0))),
    "normalised": Decoding(views=(("turned", 3.0),), normalize=True),
    "sharpened": Decoding(views=(("original", 3.0),)),
    "cold": Decoding(mask=False, temperature=0.25),
    "greedy": Decoding(mask=False, greedy=True),
}
"""Arm → how it decodes."""


def decode_logits(
    decoding: Decoding, logits: Mapping[str, Float[Tensor, "batch vocabulary"]], step: int = 0
) -> Float[Tensor, "batch vocabulary"]:
    """The probabilities of the next token under a decoding.

    Args:
        decoding: one of :data:`DECODINGS`.
        logits: of every view that it names.
        step: tokens generated so far.
    """
    weights = view_weights([weight for _, weight in decoding.views], step)
    views = [logits[name] for name, _ in decoding.views]
    scores = fuse_logits(logits[decoding.base], views, weights, decoding.plausibility, normalize=decoding.normalize)
    if decoding.greedy:
        return torch.nn.functional.one_hot(scores.argmax(dim=-1), scores.shape[-1]).to(scores.dtype)
    return (scores / decoding.temperature).softmax(dim=-1)

"""Decoding over several views of an image, as a logits processor for ``generate`` of transformers' models.

``generate`` runs the original view; the processor runs the others beside it, feeds them what was chosen, and hands the fused
scores on to the processors and warpers that follow: fuse, mask, process, warp, sample.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from headgate.methods.steering.ritual.branches import branches_of
from headgate.methods.steering.ritual.fusion import WEIGHTS, Weight, fuse_logits, view_weights

__all__ = ["View", "ViewFusionLogitsProcessor"]


@dataclass(frozen=True)
class View:
    """A further view of what the model is asked about.

    Attributes:
        inputs: what ``generate`` would get for it, as the model's processor prepares it: ``input_ids`` with the prompt of
            the original view (the image's tokens may differ in number, or be left out), ``attention_mask``, images.
        weight: of its logits. Positive ones are added (a transformed image, α = 3); negative ones contrast the original
            with this view, whose own weight grows as much (a noised image, -1). A function of the step t = 0, 1, … makes a
            schedule. ``"ritual"``, ``"vcd"`` and ``"m3id"`` stand for the published ones.

    Raises:
        TypeError: ``inputs`` is no mapping.
        ValueError: no ``input_ids``, or an unknown name or a weight that is not finite.
    """

    inputs: Mapping[str, Any]
    weight: Weight | str = "ritual"

    def __post_init__(self) -> None:
        if not isinstance(self.inputs, Mapping):
            raise TypeError(f"inputs must be a mapping of model inputs, got {type(self.inputs).__name__}")
        ids = self.inputs.get("input_ids")
        if not isinstance(ids, Tensor) or ids.dim() != 2 or not len(ids):
            raise ValueError("inputs must hold input_ids of shape (batch, length)")
        if isinstance(self.weight, str) and self.weight not in WEIGHTS:
            raise ValueError(f"weight must be a number, a function or one of {', '.join(WEIGHTS)}, got {self.weight!r}")
        if isinstance(self.weight, (int, float)) and not math.isfinite(self.weight):
            raise ValueError(f"weight must be finite, got {self.weight}")

    def resolved(self) -> Weight:
        """The weight as a number or a function of the step."""
        return WEIGHTS[self.weight] if isinstance(self.weight, str) else self.weight


class ViewFusionLogitsProcessor:
    """Fuse the model's scores with those of further views, and mask what the original finds implausible.

    Give it as the first of ``model.generate(..., logits_processor=[fusion])``. It works with greedy decoding, sampling,
    several returned sequences, batches, and beam search; with beams pass ``renormalize_logits=True``, because beams of one
    image are compared by their log-probabilities. Processors that ``generate`` makes from its own settings (repetition
    penalty, least length) come before those that are given; :func:`generate_with_views` puts this one first. Views of equal
    prompt lengths run as one batch. One object serves one prompt (any number of times), for its views belong to it.

    Args:
        model: the model that generates, from transformers.
        views: the other views, each with its weight.
        plausibility: β in (0, 1], or None for no mask.
        normalize: whether to divide by the sum of all weights. As published the scores are not divided, so that RITUAL with
            α = 3 also lowers the temperature to a quarter.

    Raises:
        TypeError: a view is no :class:`View`, or the model has no ``generate``.
        ValueError: no view, views with batches of different sizes, β outside (0, 1], or a negative weight without a mask.
    """

    supports_continuous_batching = False

    def __init__(
        self,
        model: nn.Module,
        views: Sequence[View],
        plausibility: float | None = 0.1,
        *,
        normalize: bool = False,
    ) -> None:
        if not hasattr(model, "generate"):
            raise TypeError(f"model must be one of transformers' with generate, got {type(model).__name__}")
        if not views or not all(isinstance(view, View) for view in views):
            raise TypeError(f"views must hold one View or more, got {[type(view).__name__ for view in views]}")
        batches = sorted({len(view.inputs["input_ids"]) for view in views})
        if len(batches) > 1:
            raise ValueError(f"views must have batches of one size, got {', '.join(map(str, batches))}")
        if plausibility is not None and not 0 < plausibility <= 1:
            raise ValueError(f"plausibility must lie in (0, 1], got {plausibility}")
        self.weights = [view.resolved() for view in views]
        if plausibility is None and any(not callable(weight) and weight < 0 for weight in self.weights):
            raise ValueError("plausibility must be given where a view's weight is negative")
        self.plausibility = plausibility
        self.normalize = normalize
        self._batch = batches[0]
        self._branches = branches_of(model, [view.inputs for view in views])
        self._prompt: Int64[Tensor, "batch length"] | None = None

    @torch.no_grad()
    def __call__(
        self, input_ids: Int64[Tensor, "batch length"], scores: Float[Tensor, "batch vocabulary"]
    ) -> Float[Tensor, "batch vocabulary"]:
        """Fuse and mask one step's scores.

        Args:
            input_ids: prompt and answer so far; the first call gets the prompt alone.
            scores: the original view's logits or log-probabilities.

        Raises:
            ValueError: another prompt than at the first call, or what :func:`fuse_logits` refuses.
        """
        answer = self._answer(input_ids)
        others: list[Tensor | None] = [None] * len(self.weights)
        for branch, places in self._branches:
            for place, logits in zip(places, branch.logits(answer), strict=True):
                others[place] = logits
        views = [view for view in others if view is not None]
        weights = view_weights(self.weights, answer.shape[1])
        return fuse_logits(scores, views, weights, self.plausibility, normalize=self.normalize)

    def _answer(self, input_ids: Int64[Tensor, "batch length"]) -> Int64[Tensor, "batch length"]:
        """The tokens after the prompt, which the first call tells."""
        if len(input_ids) % self._batch:
            raise ValueError(
                f"views must have a batch that divides the model's, got {self._batch} for {len(input_ids)} sequences"
            )
        expand = len(input_ids) // self._batch
        if self._prompt is None:
            self._prompt = input_ids[::expand].clone()
        length = self._prompt.shape[1]
        expected = self._prompt.repeat_interleave(expand, dim=0)
        if input_ids.shape[1] < length or not torch.equal(input_ids[:, :length], expected):
            raise ValueError(
                "input_ids must begin with the prompt of the first call, which the views belong to; "
                "make a new processor for another prompt"
            )
        return input_ids[:, length:]

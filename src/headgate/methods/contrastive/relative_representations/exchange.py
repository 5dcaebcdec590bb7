"""What the experiments of the claim share: codes of several models, heads behind them, and who can read whom.

A *code* is a module from inputs to what a head or decoder reads. Models of one seed differ in initial weights and in the
order of their batches.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Shaped
from torch import Tensor, nn

from headgate.evaluate import Procrustes, StitchingMatrix, latent_communication, stitching_matrix
from headgate.methods.contrastive.relative_representations.anchors import select_anchors
from headgate.methods.contrastive.relative_representations.projection import RelativeProjection
from headgate.train import epoch_batches, fit, make_optimizer

__all__ = ["ARMS", "anchors_of_models", "communication", "device", "exchange", "frozen_codes", "run", "train"]

ARMS = ("relative", "absolute", "procrustes", "noise_anchors", "other_anchors")


def device() -> torch.device:
    """Where models are trained."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def train(
    model: nn.Module,
    tensors: Sequence[Tensor],
    loss: Callable[[Tensor, Tensor], Tensor],
    *,
    steps: int,
    rate: float,
    batch_size: int,
    seed: int,
) -> nn.Module:
    """Adam at a constant rate on ``loss(model(inputs), targets)``; the model comes back on the CPU, in evaluation mode."""
    model.to(device())
    fit(
        model,
        epoch_batches(tensors, batch_size, seed),
        lambda wrapped, batch: loss(wrapped(batch[0]), batch[1]),
        steps=steps,
        optimizer=make_optimizer(model, "adamw", rate),
        seed=seed,
    )
    return model.cpu().eval()


@torch.no_grad()
def run(module: nn.Module, inputs: Tensor, chunk: int = 2000) -> Tensor:
    """The module's output for many inputs, in evaluation mode, without gradients."""
    module.to(device()).eval()
    parts = [module(inputs[start : start + chunk].to(device())).cpu() for start in range(0, len(inputs), chunk)]
    module.cpu()
    return torch.cat(parts)


def anchors_of_models(
    arm: str, inputs: Shaped[Tensor, "items *item"], count: int, models: int, seed: int, noise: Callable[[int], Tensor]
) -> list[Tensor]:
    """The anchors of each model as inputs: the same items for all, the same noise for all, or items of its own.

    Args:
        arm: one of :data:`ARMS`.
        inputs: ``(N, …)`` training inputs.
        count: K.
        models: how many.
        seed: of the choice.
        noise: K → noise inputs.
    """
    if arm == "noise_anchors":
        return [noise(count)] * models
    seeds = [1_000_003 * seed + (model if arm == "other_anchors" else 0) for model in range(models)]
    return [inputs[torch.from_numpy(np.asarray(select_anchors(range(len(inputs)), k=count, seed=s)))] for s in seeds]


def frozen_codes(encoders: Sequence[nn.Module], anchors: Sequence[Tensor]) -> list[nn.Module]:
    """Each encoder with a relative projection behind it, fitted on its anchors."""
    return [
        nn.Sequential(encoder, RelativeProjection(run(encoder, items), zero="ignore")).eval()
        for encoder, items in zip(encoders, anchors, strict=True)
    ]


def exchange(
    codes: Sequence[nn.Module],
    readers: Sequence[nn.Module],
    inputs: Tensor,
    targets: Tensor,
    metric: Any = "accuracy",
    rotate_on: Tensor | None = None,
) -> StitchingMatrix:
    """Score every reader (head or decoder) behind every code.

    Args:
        codes: one per model.
        readers: one per model, trained behind its code.
        inputs: ``(N, …)`` test inputs.
        targets: what readers should say.
        metric: as :func:`headgate.evaluate.stitching_matrix`.
        rotate_on: anchors, as inputs, on which one space is rotated onto the other first.
    """
    functions = [lambda items, code=code: run(code, items) for code in codes]
    translation = None if rotate_on is None else Procrustes()
    return stitching_matrix(functions, readers, inputs, targets, metric, translation, rotate_on)


def communication(codes: Sequence[nn.Module], inputs: Tensor) -> dict[str, float]:
    """:func:`headgate.evaluate.latent_communication`, averaged over all ordered pairs of models."""
    spaces = [run(code, inputs) for code in codes]
    found = [latent_communication(one, other, zero="ignore") for one, other in itertools.permutations(spaces, 2)]
    return {name: float(np.mean([values[name] for values in found])) for name in found[0]}

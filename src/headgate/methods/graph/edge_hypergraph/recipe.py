"""The published training recipes, as data.

Common to all: Adam with weight decay added to the gradient, a linear rise of the learning rate and a cosine fall to zero over the
longest run allowed. The rise takes as many epochs as the patience of early stopping, so a run that stops early is hardly out
of it.

    recipe = RECIPES["hyperdrop_proteins"]
    model = headgate.create_model("hyperdrop_proteins")
    stop = EarlyStopping(recipe.patience)
    fit(model, ..., optimizer=recipe.optimizer(model), schedule=recipe.schedule(steps_per_epoch), clip_norm=recipe.clip_norm,
        steps=recipe.epochs * steps_per_epoch, evaluate=..., evaluate_every=steps_per_epoch, stop=stop)

with ``fit`` of :mod:`headgate.train`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn import functional as F

from headgate.train import warmup_cosine
from headgate.validate import check_positive

__all__ = ["RECIPES", "EarlyStopping", "Recipe", "reconstruction_loss"]


@dataclass(frozen=True)
class Recipe:
    """How one preset was trained.

    Attributes:
        learning_rate: peak.
        weight_decay: of Adam, added to the gradient, on every parameter.
        batch_size: graphs a step.
        epochs: longest run.
        patience: epochs without a better validation; ``None``: the whole run is made, and its best epoch counts.
        warmup_epochs: of the learning rate.
        clip_norm: largest norm of the gradient; ``None``: not clipped.
    """

    learning_rate: float
    weight_decay: float
    batch_size: int = 128
    epochs: int = 500
    patience: int | None = 50
    warmup_epochs: int = 50
    clip_norm: float | None = 1.0

    def optimizer(self, model: nn.Module) -> torch.optim.Adam:
        """Adam over all parameters that are trained."""
        trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
        return torch.optim.Adam(trainable, lr=self.learning_rate, weight_decay=self.weight_decay)

    def schedule(self, steps_per_epoch: int) -> Callable[[int], float]:
        """The learning rate as a factor of its peak, by step; step 0 has 1 / (steps of the rise).

        Args:
            steps_per_epoch: batches an epoch.
        """
        check_positive(steps_per_epoch=steps_per_epoch)
        return warmup_cosine(self.epochs * steps_per_epoch, self.warmup_epochs * steps_per_epoch)


class EarlyStopping:
    """Tells when a metric has not become better for too long; give it to ``fit`` as ``stop``.

    Args:
        patience: evaluations without a better value that are borne; the next one ends the run.
        metric: name of the metric.
        larger_is_better: for an accuracy; an equal value then counts as better, as in the published trainer.

    Attributes:
        best: the best value so far, ``None`` before the first evaluation.
        best_evaluation: its number, from 0.

    Raises:
        ValueError: ``patience`` is negative.
    """

    def __init__(self, patience: int, metric: str = "loss", larger_is_better: bool = False) -> None:
        if patience < 0:
            raise ValueError(f"patience must not be negative, got {patience}")
        self.patience, self.metric, self.larger_is_better = patience, metric, larger_is_better
        self.best: float | None = None
        self.best_evaluation = -1
        self.evaluations = 0

    def __call__(self, metrics: Mapping[str, float]) -> bool:
        """Look at one evaluation.

        Returns:
            Whether to stop.

        Raises:
            KeyError: the metric is missing.
        """
        value = metrics[self.metric]
        if self.best is None or (value >= self.best if self.larger_is_better else value < self.best):
            self.best, self.best_evaluation = value, self.evaluations
        self.evaluations += 1
        return self.evaluations - 1 - self.best_evaluation > self.patience


def reconstruction_loss(
    logits: Float[Tensor, "edges classes"], target: Int64[Tensor, " edges"], *, official_quirks: bool = False
) -> Float[Tensor, ""]:
    """Cross-entropy of the classes of edges.

    Args:
        logits: (m, classes).
        target: (m,).
        official_quirks: take the logits for what they are not, probabilities being put through the softmax a second time:
            the published validation loss, which early stopping follows. Training has the plain one there, too.

    Returns:
        A scalar.
    """
    return F.cross_entropy(logits.softmax(dim=-1) if official_quirks else logits, target)


_TU = Recipe(5e-4, 1e-4)
_OGB = Recipe(1e-3, 1e-4, patience=None)
_NODES = Recipe(1e-2, 5e-4, batch_size=1, epochs=5000, patience=300, warmup_epochs=300)

RECIPES: Mapping[str, Recipe] = MappingProxyType(
    {
        "hyperdrop_dd": replace(_TU, batch_size=10),
        "hyperdrop_proteins": _TU,
        "hyperdrop_mutag": _TU,
        "hyperdrop_imdb_binary": _TU,
        "hyperdrop_imdb_multi": _TU,
        "hyperdrop_collab": _TU,
        "hyperdrop_molhiv": replace(_OGB, batch_size=512),
        "hyperdrop_moltox21": _OGB,
        "hyperdrop_moltoxcast": _OGB,
        "hyperdrop_molbbbp": _OGB,
        "hyperdrop_cora": _NODES,
        "hyperdrop_citeseer": _NODES,
        "hypercluster_zinc": Recipe(1e-3, 0.0, patience=200, warmup_epochs=200, clip_norm=None),
    }
)
"""Preset → its recipe."""

"""Training for the claim: one warm-up of the heads, from which every arm's training goes on; each is done once per seed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeAlias

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from headgate.methods.routing.jei_dnn.exit_rule import conditional_exits, exit_index
from headgate.methods.routing.jei_dnn.heads import ExitHeads, ExitOutputs
from headgate.methods.routing.jei_dnn.losses import HeadLoss, HeadWeighting
from headgate.methods.routing.jei_dnn.trainer import JEITrainer, TrainingBatches
from headgate.methods.routing.jei_dnn.uncertainty import uncertainty_features
from headgate.methods.routing.jei_dnn.worlds import ExitData, Task
from headgate.train import base_model, epoch_batches, fit, make_optimizer, seeded, warmup_cosine

__all__ = ["Answers", "Bench", "Readiness", "Scale"]

Readiness: TypeAlias = Literal["gate", "max_prob", "entropy"]

_WEIGHT_DECAY, _MOMENTUM, _LAST_RATE = 5e-4, 0.9, 2e-4


@dataclass(frozen=True)
class Scale:
    """How large an experiment is.

    Attributes:
        task: seed → data and frozen backbone.
        lams: the grid of λ, rising.
        low: those of them at the low-cost end.
        warmup_epochs: of the heads, the same for all arms.
        epochs: behind the warm-up.
        switch_every: batches after which gates and heads change over.
        learning_rates: of each training, chosen on seeds that are not reported.
        warmup_rate: learning rate of the warm-up.
        batch_size: inputs per update.
        first_seed: what seed 0 stands for, where lower seeds were seen before something was changed.
    """

    task: Callable[[int], Task]
    lams: tuple[float, ...]
    low: tuple[float, ...]
    warmup_epochs: int
    epochs: int
    switch_every: int
    learning_rates: dict[str, float]
    warmup_rate: float = 0.05
    batch_size: int = 256
    first_seed: int = 0


class Answers(NamedTuple):
    """What all exits say about some inputs.

    Attributes:
        probabilities: ``(G + 1, n, classes)``.
        readiness: ``(G + 1, n)`` how ready each exit is to let an input go; that of the last is not looked at.
        gated: ``(n,)`` where the gates let them go.
    """

    probabilities: Float[np.ndarray, "exits n classes"]
    readiness: Float[np.ndarray, "exits n"]
    gated: Int[np.ndarray, " n"]


class Bench:
    """Trains what the arms of one seed need.

    Args:
        name: of the scale, for the cache.
        settings: the scale.
        seed: of initial weights and order of batches.
    """

    def __init__(self, name: str, settings: Scale, seed: int) -> None:
        self.name, self.settings, self.seed = name, settings, seed
        with seeded(seed):
            self.task = settings.task(seed)
        self.base_seconds = self.task.base_seconds

    def heads(self) -> ExitHeads:
        """Heads on the plain mean of their losses, for as many batches as JEI-DNN sees."""
        rate = self.settings.learning_rates["heads"]
        return self._base("heads", {"rate": rate}, lambda exits: self._train_heads(exits, rate))

    def jei(self, lam: float, weighting: HeadWeighting) -> ExitHeads:
        """Heads and gates learned together."""
        rate = self.settings.learning_rates[weighting]
        return self._base(
            f"{weighting}-{lam:g}", {"rate": rate}, lambda exits: self._train_jei(exits, lam, weighting, rate)
        )

    @torch.no_grad()
    def ask(self, exits: ExitHeads, part: ExitData, readiness: Readiness) -> Answers:
        """Ask all exits about one part of the data."""
        outputs = exits(part.features, part.final_logits)
        probabilities = outputs.logits.double().softmax(dim=2)
        return Answers(
            probabilities.numpy(), _READINESS[readiness](outputs).numpy(), exit_index(outputs.exit_prob).numpy()
        )

    def _base(self, name: str, recipe: dict[str, float], train: Callable[[ExitHeads], None]) -> ExitHeads:
        settings, task = self.settings, self.task
        described = {
            **recipe,
            "seed": self.seed,
            "costs": list(task.costs),
            "sizes": [list(task.validation.features.shape), list(task.test.features.shape)],
            "warmup": [settings.warmup_rate, settings.warmup_epochs],
            "epochs": settings.epochs,
            "batches": [settings.batch_size, settings.switch_every],
            "revision": 1,
        }
        model, seconds = base_model(f"jei-dnn-{self.name}-{name}", self._build, train, described)
        self.base_seconds += seconds
        return model

    def _warm(self) -> ExitHeads:
        return self._base("warm", {}, self._train_warm)

    def _build(self) -> ExitHeads:
        features, logits, _ = self.task.validation
        with seeded(self.seed):
            return ExitHeads(features.shape[2], logits.shape[1], features.shape[1])

    def _train_warm(self, exits: ExitHeads) -> None:
        trainer = self._trainer(exits, lam=0.0, weighting="uniform", rate=self.settings.warmup_rate)
        trainer.warm_up(*self._data())
        _copy(trainer.exits, exits)

    def _train_jei(self, exits: ExitHeads, lam: float, weighting: HeadWeighting, rate: float) -> None:
        trainer = self._trainer(self._warm(), lam, weighting, rate)
        trainer.alternate(*self._data())
        _copy(trainer.exits, exits)

    def _train_heads(self, exits: ExitHeads, rate: float) -> None:
        trainer = self._trainer(self._warm(), lam=0.0, weighting="uniform", rate=rate)
        batches, _ = self._data()
        steps = self.settings.epochs * batches.steps_per_epoch
        criterion = HeadLoss("uniform")

        def loss(model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
            outputs = model(*batch[:-1])
            return criterion(outputs.logits, outputs.exit_prob, batch[-1])

        fit(
            trainer.model,
            batches,
            loss,
            steps=steps,
            optimizer=make_optimizer(
                trainer.exits.heads, "sgd", rate, _WEIGHT_DECAY, _MOMENTUM, decay_norms_and_biases=True
            ),
            schedule=warmup_cosine(steps, floor=_LAST_RATE / rate, every=batches.steps_per_epoch),
            seed=self.seed,
        )
        _copy(trainer.exits, exits)

    def _trainer(self, exits: ExitHeads, lam: float, weighting: HeadWeighting, rate: float) -> JEITrainer:
        settings, live = self.settings, self.task.live
        if live is not None:
            _copy(exits, live.model.exits)
        return JEITrainer(
            exits if live is None else live.model,
            lam,
            costs=self.task.costs,
            epochs=settings.epochs,
            warmup_epochs=settings.warmup_epochs,
            warmup_patience=settings.warmup_epochs,  # all arms get every epoch
            switch_every=settings.switch_every,
            head_weighting=weighting,
            learning_rate=rate,
            final_learning_rate=_LAST_RATE,
            momentum=_MOMENTUM,
            weight_decay=_WEIGHT_DECAY,
            selection="last",
            seed=self.seed,
        )

    def _data(self) -> tuple[TrainingBatches, tuple[Tensor, ...]]:
        """Training batches and validation tensors."""
        task = self.task
        if task.live is not None:
            return task.live.batches, task.live.validation
        assert task.train is not None
        batch_size = min(self.settings.batch_size, len(task.train.target))
        return epoch_batches(tuple(task.train), batch_size, self.seed), tuple(task.validation)


def _copy(source: nn.Module, into: nn.Module) -> None:
    into.load_state_dict(source.state_dict())


def _by_gate(outputs: ExitOutputs) -> Tensor:
    conditional = conditional_exits(outputs.exit_prob.double()).T
    return torch.cat([conditional, torch.zeros_like(conditional[:1])])


def _by_max_prob(outputs: ExitOutputs) -> Tensor:
    return torch.stack([uncertainty_features(logits)[:, 0] for logits in outputs.logits.double()])


def _by_entropy(outputs: ExitOutputs) -> Tensor:
    return torch.stack([-uncertainty_features(logits)[:, 1] for logits in outputs.logits.double()])


_READINESS: dict[Readiness, Callable[[ExitOutputs], Tensor]] = {
    "gate": _by_gate,
    "max_prob": _by_max_prob,
    "entropy": _by_entropy,
}

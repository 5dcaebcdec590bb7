"""Training on recall tasks as published: AdamW, a cosine stepped once an epoch, and an early stop on accuracy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from headgate.data.recall import IGNORED, RecallData
from headgate.data.seeding import splitmix64, stream_generator
from headgate.methods.sequence.zoology.loss import RecallLoss
from headgate.nn import MixerLM
from headgate.train import EpochBatches, epoch_batches, fit, make_optimizer, warmup_cosine

__all__ = ["RecallRun", "predict", "score", "train_recall"]

_TOKENS_AT_ONCE = 1 << 15
"""In evaluation: with 8,192 ids their logits take 1 GiB."""


@dataclass(frozen=True)
class RecallRun:
    """What became of one training run.

    Attributes:
        accuracies: validation accuracy after every epoch.
        steps: updates made.
        losses: training loss of every step.
    """

    accuracies: tuple[float, ...]
    steps: int
    losses: tuple[float, ...]


def train_recall(
    model: MixerLM,
    train: Sequence[RecallData],
    validation: Sequence[RecallData],
    *,
    epochs: int,
    batch_size: int,
    learning_rate: float,
    weight_decay: float = 0.1,
    stop_accuracy: float = 0.99,
    seed: int = 0,
) -> RecallRun:
    """Train ``model`` in place, on its own device.

    Args:
        model: the model.
        train: one or more data sets; a batch holds examples of one of them.
        validation: one or more data sets; their mean accuracy is measured after every epoch, in evaluation mode.
        epochs: passes over the training data, at most.
        batch_size: examples per step.
        learning_rate: of the first epoch; it falls along a cosine, epoch by epoch, to zero.
        weight_decay: of AdamW, on all parameters alike.
        stop_accuracy: training ends after the first epoch whose validation accuracy is above this.
        seed: of the order of the examples and of dropout.

    Returns:
        The course of the run.
    """
    batches = _Mixture(train, batch_size, seed)
    per_epoch = batches.steps_per_epoch
    loss = RecallLoss()

    def objective(net: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        tokens, labels = batch
        logits, aux_loss = net(tokens, return_aux=True)
        asked = labels != IGNORED  # most positions are not: their share of the softmax is saved
        return loss(logits[asked][None], labels[asked][None]) + aux_loss

    history = fit(
        model,
        batches,
        objective,
        steps=epochs * per_epoch,
        optimizer=make_optimizer(
            model, learning_rate=learning_rate, weight_decay=weight_decay, decay_norms_and_biases=True
        ),
        schedule=warmup_cosine(epochs * per_epoch, every=per_epoch),
        evaluate=lambda net, step: {"accuracy": sum(score(net, data) for data in validation) / len(validation)},
        evaluate_every=per_epoch,
        stop=lambda metrics: metrics["accuracy"] > stop_accuracy,
        seed=splitmix64(seed, 1),
    )
    accuracies = [metrics["accuracy"] for step, metrics in sorted(history.metrics.items()) if step]
    return RecallRun(tuple(accuracies), history.steps, tuple(history.losses))


def predict(model: nn.Module, data: RecallData) -> Tensor:
    """The most likely token at every position, int64 ``(examples, length)`` on the CPU; ``model`` keeps its mode."""
    device = next(model.parameters()).device
    rows = max(1, _TOKENS_AT_ONCE // data.inputs.shape[1])
    with torch.no_grad():
        parts = [model(tokens.to(device)).argmax(-1).cpu() for tokens in data.inputs.split(rows)]
    return torch.cat(parts)


def score(model: nn.Module, data: RecallData) -> float:
    """Share of the queries in ``data`` that ``model``, in the mode it is in, answers."""
    asked = data.labels != IGNORED
    return float((predict(model, data) == data.labels)[asked].double().mean())


class _Mixture:
    """Shuffled batches of several data sets, whose sequences may differ in length."""

    def __init__(self, parts: Sequence[RecallData], batch_size: int, seed: int) -> None:
        self.parts: list[EpochBatches] = [
            epoch_batches((part.inputs, part.labels), batch_size, splitmix64(seed, index), drop_last=False)
            for index, part in enumerate(parts)
        ]
        self.seed = seed
        self.places = [(part, place) for part in self.parts for place in range(part.steps_per_epoch)]
        self.steps_per_epoch = len(self.places)

    def __call__(self, step: int) -> tuple[Tensor, ...]:
        epoch, place = divmod(step, self.steps_per_epoch)
        if len(self.parts) > 1:
            order = torch.randperm(self.steps_per_epoch, generator=stream_generator(self.seed, "mixture", epoch))
            place = int(order[place])
        part, within = self.places[place]
        return part(epoch * part.steps_per_epoch + within)

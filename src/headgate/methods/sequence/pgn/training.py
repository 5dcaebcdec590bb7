"""The published recipe: Adam whose rate falls by a tenth after every epoch, and a stop where validation no longer improves.

The recipe serves any forecaster that is called with inputs ``(batch, input_length, channel)`` and their time marks
``(batch, input_length, mark)``, the width of the latter 0 where there are none.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from headgate.data import SeriesWindow, SeriesWindows
from headgate.evaluate import ForecastErrors, evaluate_forecaster
from headgate.train import epoch_batches, fit
from headgate.validate import check_positive

__all__ = ["ForecastHistory", "ForecastRecipe", "forecast_windows", "train_forecaster"]


@dataclass(frozen=True)
class ForecastRecipe:
    """How a forecaster is trained.

    Attributes:
        learning_rate: of the first epoch.
        decay: factor of the learning rate from epoch to epoch, in (0, 1].
        batch_size: windows per update.
        max_epochs: passes over the training windows at most.
        patience: epochs without a better validation error after which the training ends.
    """

    learning_rate: float = 1e-3
    decay: float = 0.9
    batch_size: int = 32
    max_epochs: int = 25
    patience: int = 5

    def __post_init__(self) -> None:
        check_positive(
            learning_rate=self.learning_rate,
            decay=self.decay,
            batch_size=self.batch_size,
            max_epochs=self.max_epochs,
            patience=self.patience,
        )
        if self.decay > 1:
            raise ValueError(f"decay must lie in (0, 1], got {self.decay}")


@dataclass(frozen=True)
class ForecastHistory:
    """What a training went through.

    Attributes:
        losses: mean squared error of every update's batch.
        validation: mean squared error on the validation windows after every epoch.
        best_epoch: the epoch, counted from 1, whose weights the model has now.
    """

    losses: list[float]
    validation: list[float]
    best_epoch: int


def train_forecaster(
    model: nn.Module,
    train: SeriesWindows,
    validation: SeriesWindows,
    recipe: ForecastRecipe | None = None,
    seed: int = 0,
) -> ForecastHistory:
    """Train ``model`` in place, on its own device, and leave it with the weights of its best epoch.

    Args:
        model: ``model(inputs, marks)`` gives forecasts.
        train: windows to learn from; an epoch sees each of them once, in an order of its own, less those that fill no
            batch.
        validation: windows that decide when to stop and which weights to keep.
        recipe: default: the published one.
        seed: of the order, and of dropout if there is any.

    Raises:
        DivergedError: the loss became NaN or infinite.
    """
    recipe = ForecastRecipe() if recipe is None else recipe
    batches = epoch_batches(torch.arange(len(train)), min(recipe.batch_size, len(train)), seed)
    best = _Best(model, recipe.patience)
    per_epoch = batches.steps_per_epoch

    def evaluate(module: nn.Module, step: int) -> Mapping[str, float]:
        if step == 0:
            return {}
        return {"mse": best.see(forecast_windows(module, validation).mse)}

    history = fit(
        model,
        lambda step: train.batch(batches(step)[0]),
        mean_squared_error,
        steps=per_epoch * recipe.max_epochs,
        learning_rate=recipe.learning_rate,
        schedule=lambda step: recipe.decay ** (step // per_epoch),
        evaluate=evaluate,
        evaluate_every=per_epoch,
        stop=lambda metrics: best.waited >= recipe.patience,
        seed=seed,
    )
    best.restore()
    return ForecastHistory(history.losses, best.seen, best.epoch)


def forecast_windows(model: nn.Module, windows: SeriesWindows, batch_size: int = 256) -> ForecastErrors:
    """Forecast every window of a series and compare with what came.

    Args:
        model: ``model(inputs, marks)`` gives forecasts; it is put into evaluation mode meanwhile.
        windows: what to forecast, an incomplete last batch included.
        batch_size: windows at once.
    """
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    try:
        return evaluate_forecaster(
            lambda batch: model(batch.inputs.to(device), batch.input_marks.to(device)), windows, batch_size
        )
    finally:
        model.train(was_training)


def mean_squared_error(model: nn.Module, batch: SeriesWindow) -> Tensor:
    """The loss of one batch."""
    return F.mse_loss(model(batch.inputs, batch.input_marks), batch.targets)


class _Best:
    """The validation errors so far, and a copy of the weights of the lowest one."""

    def __init__(self, model: nn.Module, patience: int) -> None:
        self.model = model
        self.patience = patience
        self.seen: list[float] = []
        self.epoch = 0
        self.state: dict[str, Tensor] = {}

    @property
    def waited(self) -> int:
        """Epochs since the best one."""
        return len(self.seen) - self.epoch

    def see(self, error: float) -> float:
        self.seen.append(error)
        if self.epoch == 0 or error < self.seen[self.epoch - 1]:
            self.epoch = len(self.seen)
            self.state = {name: tensor.detach().clone() for name, tensor in self.model.state_dict().items()}
        return error

    def restore(self) -> None:
        self.model.load_state_dict(self.state)

"""The claim: one hop back is enough, however far; a chain of steps forgets. And TPGN forecasts periodic series.

Scale ``laptop`` asks for the mechanism with lag recall. The other scales forecast: a synthetic hourly series, and with the
paper's recipe real ones. There the same fold holds other cells, so that what the cell does can be told from what the fold
does.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import UInt8
from torch import Tensor, nn

from headgate.data import (
    SeriesScaler,
    SeriesWindows,
    TimeSeries,
    chronological_splits,
    data_folder,
    hourly_series,
    read_ett,
    read_series,
    time_features,
)
from headgate.evaluate import ForecastErrors
from headgate.measurement import Curve, Measurement
from headgate.methods.sequence.pgn.contenders import Frame, build_forecaster
from headgate.methods.sequence.pgn.lag_recall import LagBatch, RecallNet, gradient_by_lag, lag_batch, response_by_lag
from headgate.methods.sequence.pgn.training import (
    ForecastRecipe,
    forecast_windows,
    mean_squared_error,
    train_forecaster,
)
from headgate.train import count_parameters, epoch_batches, fit, seeded, warmup_cosine

__all__ = ["RATES", "SCALES", "choose_rate", "measure"]

RATES = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
"""The learning rates that arms choose from; the last one was tried only where 3e-2 was the best of the others."""

_RECALL_ARMS = ("pgn", "gru", "lstm", "truncated", "no_gate")
_FORECAST_ARMS = ("tpgn", "gru", "dlinear", "fold_gru", "fold_lstm")
_BEYOND = 16
"""Lags above this one are out of reach of the truncated kernel."""


@dataclass(frozen=True)
class RecallScale:
    """Lag recall; see :mod:`.lag_recall`. Every lag is a training of its own.

    Attributes:
        rates: arm → learning rate; :func:`choose_rate` chose it.
        steps: updates, each on fresh sequences.
        num_test: sequences to be scored on.
        hidden: arm → hidden units, at which all arms are about equally large.
        length: steps of a sequence.
        lags: what is asked for.
        asked: how many of the last steps are asked.
        batch_size: sequences per update.
        num_probes: sequences on which gradients are looked at.
    """

    rates: Mapping[str, float]
    steps: int
    num_test: int
    hidden: Mapping[str, int] = field(
        default_factory=lambda: {"pgn": 32, "gru": 44, "lstm": 38, "truncated": 51, "no_gate": 49}
    )
    length: int = 128
    lags: tuple[int, ...] = (8, 32, 96)
    asked: int = 16
    batch_size: int = 32
    num_probes: int = 16


class ForecastParts(NamedTuple):
    """Windows of the three parts of a series, standardised with the training part's mean and deviation."""

    train: SeriesWindows
    validation: SeriesWindows
    test: SeriesWindows


Training = Callable[[nn.Module, ForecastParts, float, int], list[float]]
"""Model, windows, learning rate, seed → the loss of every update."""


@dataclass(frozen=True)
class ForecastScale:
    """Forecasts of one series over several horizons. Every horizon is a training of its own.

    Attributes:
        series: seed → a series of one channel, hourly.
        rates: arm → learning rate.
        widths: horizon → width of TPGN.
        training: how all arms are trained.
        frame: what all arms share.
        published: horizon → TPGN's error as published; empty where there is none.
    """

    series: Callable[[int], TimeSeries]
    rates: Mapping[str, float]
    widths: Mapping[int, int]
    training: Training
    frame: Frame = field(default_factory=Frame)
    published: Mapping[int, float] = field(default_factory=dict)


def _train_steps(model: nn.Module, parts: ForecastParts, rate: float, seed: int, *, steps: int) -> list[float]:
    """A fixed number of updates on 32 windows each, the learning rate falling along half a cosine."""
    batches = epoch_batches(torch.arange(len(parts.train)), 32, seed)
    history = fit(
        model,
        lambda step: parts.train.batch(batches(step)[0]),
        mean_squared_error,
        steps=steps,
        learning_rate=rate,
        schedule=warmup_cosine(steps),
        clip_norm=1.0,
        seed=seed,
    )
    return history.losses


def _train_recipe(model: nn.Module, parts: ForecastParts, rate: float, seed: int) -> list[float]:
    """The published recipe: at most 25 epochs, stopped on validation."""
    return train_forecaster(model, parts.train, parts.validation, ForecastRecipe(learning_rate=rate), seed).losses


def _ett(name: str) -> TimeSeries:
    """The oil temperature of a file of ETT."""
    return read_ett(data_folder("ett"), name).select("OT")


def _ecl() -> TimeSeries:
    """The load of client MT_320 in ``ECL.csv``."""
    return read_series(data_folder("ecl") / "ECL.csv", columns=["MT_320"])


_PUBLISHED_RATES = dict.fromkeys(_FORECAST_ARMS, 1e-3)

SCALES: dict[str, RecallScale | ForecastScale] = {
    "smoke": RecallScale(
        rates=dict.fromkeys(_RECALL_ARMS, 3e-3),
        steps=2,
        num_test=16,
        hidden=dict.fromkeys(_RECALL_ARMS, 4),
        batch_size=4,
        num_probes=2,
    ),
    "laptop": RecallScale(
        rates={"pgn": 1e-2, "gru": 3e-2, "lstm": 1e-2, "truncated": 3e-3, "no_gate": 3e-3}, steps=600, num_test=500
    ),
    "forecasting": ForecastScale(
        series=lambda seed: hourly_series(4000, seed),
        rates={
            "tpgn": 1e-2,
            "gru": 1e-1,
            "dlinear": 3e-2,
            "fold_gru": 1e-2,
            "fold_lstm": 1e-2,
            "fold_mlp": 1e-2,
            "long_only": 3e-3,
            "short_only": 3e-2,
        },
        widths={168: 16, 720: 16},
        training=partial(_train_steps, steps=600),
    ),
    "etth1": ForecastScale(
        series=lambda seed: _ett("ETTh1"),
        rates={"tpgn": 1e-3, "gru": 1e-3, "dlinear": 1e-3, "fold_gru": 3e-3, "fold_lstm": 1e-2},
        widths={168: 2, 336: 2, 720: 2, 1440: 8},
        training=_train_recipe,
        frame=Frame(normalize=True),
        published={168: 0.1061, 336: 0.1110, 720: 0.1346, 1440: 0.1343},
    ),
    "etth2": ForecastScale(
        series=lambda seed: _ett("ETTh2"),
        rates=_PUBLISHED_RATES,
        widths=dict.fromkeys((168, 336, 720, 1440), 8),
        training=_train_recipe,
        published={168: 0.2174, 336: 0.2237, 720: 0.2356, 1440: 0.2514},
    ),
    "paper": ForecastScale(
        series=lambda seed: _ecl(),
        rates=_PUBLISHED_RATES,
        widths=dict.fromkeys((168, 336, 720, 1440), 32),
        training=_train_recipe,
        frame=Frame(recurrent_size=64),
        published={168: 0.2107, 336: 0.2276, 720: 0.2303, 1440: 0.2484},
    ),
}


def measure(arm: str, seed: int, scale: str) -> Measurement:
    """Train and score one arm with one seed.

    Args:
        arm: one of the card's arms at that scale.
        seed: of data, initial weights and order.
        scale: a key of :data:`SCALES`.

    Raises:
        ValueError: unknown arm or scale.
        DataError: the scale's data are missing.
    """
    if scale not in SCALES:
        raise ValueError(f"scale must be one of {', '.join(SCALES)}, got {scale!r}")
    settings = SCALES[scale]
    if arm not in settings.rates:
        raise ValueError(f"arm must be one of {', '.join(settings.rates)} at scale {scale}, got {arm!r}")
    if isinstance(settings, RecallScale):
        return _measure_recall(arm, seed, settings)
    return _measure_forecasts(arm, seed, settings)


def choose_rate(arm: str, scale: str, seeds: Sequence[int] = (100,)) -> dict[float, float]:
    """Validate every learning rate of :data:`RATES`, on seeds that are not reported.

    This is how the rates in :data:`SCALES` were chosen: the one of the lowest error, which is the mean over lags on fresh
    sequences, or that of the shortest horizon on the validation part.

    Args:
        arm: an arm of the scale.
        scale: a key of :data:`SCALES`.
        seeds: to average over, none of those that :func:`measure` is called with.

    Returns:
        Learning rate → mean squared error.
    """
    settings = SCALES[scale]

    def error(rate: float, seed: int) -> float:
        if isinstance(settings, RecallScale):
            nets = {lag: _train_recall(arm, seed, settings, lag, rate)[0] for lag in settings.lags}
            return float(np.mean([_recall_error(net, seed, settings, lag, "validation") for lag, net in nets.items()]))
        horizon = min(settings.widths)
        parts = _parts(settings, seed, horizon)
        model, _ = _train_forecasts(arm, seed, settings, parts, horizon, rate)
        return forecast_windows(model, parts.validation).mse

    return {rate: float(np.mean([error(rate, seed) for seed in seeds])) for rate in RATES}


def _measure_recall(arm: str, seed: int, settings: RecallScale) -> Measurement:
    rate, far = settings.rates[arm], max(settings.lags)
    probes = lag_batch(settings.num_probes, settings.length, far, settings.asked, seed, "probes").inputs
    reach = gradient_by_lag(_recall_net(arm, seed, settings), probes)
    errors: dict[int, float] = {}
    response = torch.zeros(0)
    for lag in settings.lags:
        net, _ = _train_recall(arm, seed, settings, lag, rate)
        errors[lag] = _recall_error(net, seed, settings, lag, "test")
        if lag == far:
            response = response_by_lag(net, probes)
    metrics = {
        "mse": errors[far],
        **{f"mse_lag_{lag}": error for lag, error in errors.items()},
        "mse_worst_lag": max(errors.values()),
        "mse_beyond_16": min(error for lag, error in errors.items() if lag > _BEYOND),
    }
    if len(reach) >= far and reach[far - 1] > 0:
        metrics["gradient_decay"] = math.log10(float(reach[far - 1] / reach[min(settings.lags) - 1]))
    return Measurement(
        metrics=metrics,
        curves={
            "error by lag": Curve(settings.lags, list(errors.values()), "lag", "mean squared error", log_x=True),
            "gradient before training": _reach_curve(reach),
            f"trained for lag {far}, what an answer hears": Curve(
                range(1, len(response) + 1), response.tolist(), "lag", "|d answer / d input|"
            ),
        },
        notes={"learning rate": rate, "parameters": count_parameters(_recall_net(arm, seed, settings))},
    )


def _recall_net(arm: str, seed: int, settings: RecallScale) -> RecallNet:
    with seeded(seed):
        return RecallNet(arm, settings.hidden[arm], settings.length, settings.asked)


def _train_recall(arm: str, seed: int, settings: RecallScale, lag: int, rate: float) -> tuple[RecallNet, list[float]]:
    """The trained net and the loss of every step."""
    net = _recall_net(arm, seed, settings)

    def batch(step: int) -> LagBatch:
        return lag_batch(settings.batch_size, settings.length, lag, settings.asked, seed, "train", step)

    history = fit(net, batch, _recall_loss, steps=settings.steps, learning_rate=rate, seed=seed)
    return net.eval(), history.losses


def _recall_loss(net: nn.Module, batch: LagBatch) -> Tensor:
    return F.mse_loss(net(batch.inputs), batch.targets)


@torch.no_grad()
def _recall_error(net: RecallNet, seed: int, settings: RecallScale, lag: int, stream: str) -> float:
    batch = lag_batch(settings.num_test, settings.length, lag, settings.asked, seed, stream)
    return float(_recall_loss(net, batch))


def _reach_curve(reach: Tensor) -> Curve:
    sizes = [math.log10(size) if size > 0 else math.nan for size in reach.tolist()]
    return Curve(range(1, len(sizes) + 1), sizes, "lag", "log10 of |d output / d input|", log_x=True)


def _course(losses: Sequence[float], points: int = 20) -> Curve:
    """Mean loss over equal parts of the training."""
    parts = np.array_split(np.array(losses), min(points, len(losses)))
    ends = np.cumsum([len(part) for part in parts])
    return Curve(ends.tolist(), [float(part.mean()) for part in parts], "step", "mean squared error")


def _measure_forecasts(arm: str, seed: int, settings: ForecastScale) -> Measurement:
    errors: dict[int, ForecastErrors] = {}
    curves, pictures, parameters = {}, {}, {}
    for horizon in settings.widths:
        parts = _parts(settings, seed, horizon)
        model, losses = _train_forecasts(arm, seed, settings, parts, horizon, settings.rates[arm])
        errors[horizon] = forecast_windows(model, parts.test)
        parameters[horizon] = count_parameters(model)
        if horizon == min(settings.widths):
            curves[f"training, horizon {horizon}"] = _course(losses)
            pictures["forecast"] = _picture(model, parts.test)
    far, near = max(errors), min(errors)
    period = settings.frame.period
    days = [float(errors[far].squared[start : start + period].mean()) for start in range(0, far, period)]
    curves["error by horizon"] = Curve(
        list(errors), [found.mse for found in errors.values()], "horizon in hours", "mean squared error", log_x=True
    )
    curves[f"error by lead time, horizon {far}"] = Curve(
        range(1, len(days) + 1), days, "days ahead", "mean squared error"
    )
    metrics = {"mse": float(np.mean([found.mse for found in errors.values()]))}
    for horizon, found in errors.items():
        metrics |= {f"mse_{horizon}": found.mse, f"mae_{horizon}": found.mae, f"log_mse_{horizon}": math.log(found.mse)}
    metrics["log_mse_mean"] = float(np.mean([math.log(found.mse) for found in errors.values()]))
    metrics["growth"] = math.log(errors[far].mse / errors[near].mse)
    if arm == "tpgn" and settings.published:
        ratios = [errors[horizon].mse / value for horizon, value in settings.published.items()]
        metrics |= {"table_lowest": min(ratios), "table_highest": max(ratios)}
    return Measurement(
        metrics=metrics,
        curves=curves,
        pictures=pictures if arm == "tpgn" else {},
        notes={"learning rate": settings.rates[arm], **{f"parameters, {h}": count for h, count in parameters.items()}},
    )


def _parts(settings: ForecastScale, seed: int, horizon: int) -> ForecastParts:
    """6:2:2 in time; targets of validation and test begin right behind the cut."""
    series = settings.series(seed)
    marks = time_features(series.timestamps, "h")
    splits = chronological_splits(len(series.values), context=settings.frame.seq_len)
    values = SeriesScaler.fit(series.values[splits.train]).transform(series.values)
    return ForecastParts(
        *(SeriesWindows(values[rows], settings.frame.seq_len, horizon, marks=marks[rows]) for rows in splits)
    )


def _train_forecasts(
    arm: str, seed: int, settings: ForecastScale, parts: ForecastParts, horizon: int, rate: float
) -> tuple[nn.Module, list[float]]:
    """The trained forecaster and the loss of every update."""
    with seeded(seed):
        model = build_forecaster(arm, settings.frame, horizon, settings.widths[horizon])
    losses = settings.training(model, parts, rate, seed)
    return model.eval(), losses


@torch.no_grad()
def _picture(model: nn.Module, windows: SeriesWindows) -> UInt8[np.ndarray, "height width 3"]:
    """Three windows of the test part: what came before, what came then, and the forecast."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    batch = windows.batch([0, len(windows) // 2, len(windows) - 1])
    forecast = model(batch.inputs, batch.input_marks)
    figure = Figure(figsize=(9, 5.4), dpi=100, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    past, future = np.arange(-windows.input_length, 0), np.arange(windows.horizon)
    for row, panel in enumerate(figure.subplots(3, 1, sharex=True)):
        panel.plot(past, batch.inputs[row, :, 0], color="#888888", lw=1)
        panel.plot(future, batch.targets[row, :, 0], color="#222222", lw=1, label="what came")
        panel.plot(future, forecast[row, :, 0], color="#D55E00", lw=1.4, label="TPGN")
        panel.axvline(0, color="#bbbbbb", lw=0.8)
    panel.set_xlabel("hours from the start of the forecast")
    figure.axes[0].legend(loc="upper left", frameon=False, ncols=2)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()

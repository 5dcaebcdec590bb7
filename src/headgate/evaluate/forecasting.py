"""How far forecasts are from what came: mean squared and mean absolute error, over all windows and by lead time.

Both are means over windows, steps and channels, on the scale of the targets (by custom that of the standardised series).
Every window counts, those of an incomplete last batch included; leaving them out, as many published evaluations do,
changes the figure.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Float64
from torch import Tensor

from headgate.data.series import SeriesWindow, SeriesWindows
from headgate.evaluate.checks import Array, check_finite, to_numpy
from headgate.validate import check_positive

__all__ = ["ForecastErrors", "evaluate_forecaster", "forecast_errors"]


@dataclass(frozen=True, eq=False)
class ForecastErrors:
    """Errors of forecasts, step by step.

    Attributes:
        squared: float64 ``(horizon,)``, mean squared error of the first, second, … step ahead.
        absolute: float64 ``(horizon,)``, mean absolute error.
        windows: how many forecasts these are means of.
    """

    squared: Float64[np.ndarray, " horizon"]
    absolute: Float64[np.ndarray, " horizon"]
    windows: int

    @property
    def mse(self) -> float:
        """Mean squared error of all steps."""
        return float(self.squared.mean())

    @property
    def mae(self) -> float:
        """Mean absolute error of all steps."""
        return float(self.absolute.mean())

    @property
    def rmse(self) -> float:
        """Root of the mean squared error of all steps."""
        return math.sqrt(self.mse)


def forecast_errors(
    forecast: Float[Array, "window horizon channel"], target: Float[Array, "window horizon channel"]
) -> ForecastErrors:
    """Compare forecasts with what came.

    Args:
        forecast: ``(window, horizon, channel)``, finite.
        target: of the same shape, finite.

    Raises:
        TypeError: an argument is no array of real numbers.
        ValueError: shapes that differ or are of another rank, nothing to compare, or a value that is not finite.
    """
    ours, came = to_numpy("forecast", forecast), to_numpy("target", target)
    if ours.ndim != 3 or ours.size == 0:
        raise ValueError(f"forecast must have shape (window, horizon, channel) with entries, got {ours.shape}")
    if came.shape != ours.shape:
        raise ValueError(f"target must have the shape of forecast, {ours.shape}, got {came.shape}")
    check_finite("forecast", ours)
    check_finite("target", came)
    difference = ours.astype(np.float64) - came.astype(np.float64)
    return ForecastErrors(np.square(difference).mean(axis=(0, 2)), np.abs(difference).mean(axis=(0, 2)), len(ours))


@torch.no_grad()
def evaluate_forecaster(
    forecast: Callable[[SeriesWindow], Float[Tensor, "batch horizon channel"]],
    windows: SeriesWindows,
    batch_size: int = 256,
) -> ForecastErrors:
    """Forecast every window of a series, batch by batch, and compare; the forecasts are not kept.

    Args:
        forecast: a batch of windows → forecasts ``(batch, horizon, channel)``, on any device.
        windows: what to forecast.
        batch_size: windows at once; the result does not depend on it but for rounding.

    Raises:
        ValueError: ``batch_size`` is not positive, or forecasts of another shape than the targets.
    """
    check_positive(batch_size=batch_size)
    squared, absolute = np.zeros(windows.horizon), np.zeros(windows.horizon)
    for start in range(0, len(windows), batch_size):
        batch = windows.batch(range(start, min(start + batch_size, len(windows))))
        errors = forecast_errors(forecast(batch), batch.targets)
        squared += errors.squared * errors.windows
        absolute += errors.absolute * errors.windows
    return ForecastErrors(squared / len(windows), absolute / len(windows), len(windows))

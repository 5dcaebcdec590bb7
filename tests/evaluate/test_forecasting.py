"""Errors of forecasts by hand, and over all windows of a series."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from headgate.data import SeriesWindow, SeriesWindows
from headgate.evaluate import evaluate_forecaster, forecast_errors


def test_errors_are_means_over_windows_and_channels_step_by_step() -> None:
    target = np.zeros((2, 3, 2))
    forecast = np.array([[[1.0, 1], [2, 0], [0, 0]], [[-1, 1], [0, 0], [0, 4]]])
    found = forecast_errors(forecast, torch.from_numpy(target))
    assert found.squared.tolist() == [1, 1, 4]
    assert found.absolute.tolist() == [1, 0.5, 1]
    assert (found.mse, found.mae, found.windows) == (2.0, pytest.approx(2.5 / 3), 2)
    assert found.rmse == pytest.approx(2**0.5)


def last_value(batch: SeriesWindow) -> Tensor:
    return batch.inputs[:, -1:].expand_as(batch.targets)


@pytest.mark.parametrize("batch_size", [1, 4, 256])
def test_every_window_counts_whatever_the_batch_size(batch_size: int) -> None:
    values = torch.randn(20, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    windows = SeriesWindows(values, input_length=5, horizon=3, dtype=torch.float64)
    found = evaluate_forecaster(last_value, windows, batch_size)
    assert found.windows == len(windows) == 13
    for step in range(3):
        gaps = [values[start + 5 + step] - values[start + 4] for start in range(13)]
        assert found.squared[step] == pytest.approx(torch.stack(gaps).square().mean().item())
        assert found.absolute[step] == pytest.approx(torch.stack(gaps).abs().mean().item())


def test_bad_forecasts_are_refused_by_name() -> None:
    target = np.zeros((2, 3, 1))
    with pytest.raises(ValueError, match=r"target must have the shape of forecast, \(2, 3, 2\), got \(2, 3, 1\)"):
        forecast_errors(np.zeros((2, 3, 2)), target)
    with pytest.raises(ValueError, match=r"forecast must have shape \(window, horizon, channel\)"):
        forecast_errors(target[0], target[0])
    with pytest.raises(ValueError, match="forecast"):
        forecast_errors(np.full((2, 3, 1), np.nan), target)
    with pytest.raises(TypeError, match="target must be a NumPy array or a torch tensor"):
        forecast_errors(target, target.tolist())
    windows = SeriesWindows(np.zeros((9, 1)), 5, 3)
    with pytest.raises(ValueError, match="batch_size must be positive"):
        evaluate_forecaster(last_value, windows, 0)
    with pytest.raises(ValueError, match="target must have the shape of forecast"):
        evaluate_forecaster(lambda batch: batch.inputs, windows)

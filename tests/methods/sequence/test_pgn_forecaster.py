"""The published recipe, the pandas forecaster, and the adapter to neuralforecast."""

from __future__ import annotations

import importlib
import sys
import types
from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from torch import Tensor, nn

from headgate import TPGN, ForecastRecipe, TPGNForecaster, forecast_windows, train_forecaster
from headgate.data import SeriesWindows, hourly_series, time_features
from headgate.errors import HeadgateError
from headgate.methods.sequence import pgn
from headgate.methods.sequence.pgn import training


def periodic(rows: int) -> np.ndarray:
    """A day of 4 hours, again and again, on another level every other day."""
    hours = np.arange(rows)
    return np.array([0.0, 2.0, 1.0, -1.0])[hours % 4] + 0.5 * (hours // 4 % 2)


def small(seed: int = 0) -> TPGN:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return TPGN(16, 8, period=4, d_model=4, n_marks=0)


# The recipe.


class Fixed(nn.Module):
    """Forecasts one learned number."""

    def __init__(self, start: float) -> None:
        super().__init__()
        self.level = nn.Parameter(torch.tensor(start))

    def forward(self, x: Tensor, marks: Tensor) -> Tensor:
        return self.level.expand(len(x), 3, 1)


def test_training_lowers_the_error_and_keeps_the_best_epoch() -> None:
    windows = SeriesWindows(periodic(120)[:, None], 16, 8)
    model = small()
    before = forecast_windows(model, windows).mse
    history = train_forecaster(model, windows, windows, ForecastRecipe(learning_rate=1e-2, max_epochs=15))
    assert history.best_epoch == 1 + int(np.argmin(history.validation))
    assert forecast_windows(model, windows).mse == pytest.approx(min(history.validation))
    assert min(history.validation) < 0.1 < before
    assert model.training


def test_it_stops_after_so_many_epochs_without_improvement_and_goes_back() -> None:
    train, validation = SeriesWindows(np.ones((40, 1)), 4, 3), SeriesWindows(np.zeros((20, 1)), 4, 3)
    model = Fixed(0.0)
    recipe = ForecastRecipe(learning_rate=0.1, batch_size=8, max_epochs=20, patience=2)
    history = train_forecaster(model, train, validation, recipe)
    assert (history.best_epoch, len(history.validation)) == (1, 3)
    assert len(history.losses) == 3 * (34 // 8)
    assert model.level.item() ** 2 == pytest.approx(history.validation[0])
    assert history.validation == sorted(history.validation)


def test_the_rate_falls_by_a_tenth_after_every_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}

    def watch(model: nn.Module, batches: Any, loss: Any, **settings: Any) -> Any:
        seen.update(settings)
        return real(model, batches, loss, **settings)

    real = training.fit
    monkeypatch.setattr(training, "fit", watch)
    windows = SeriesWindows(np.ones((40, 1)), 4, 3)
    train_forecaster(Fixed(0.0), windows, windows, ForecastRecipe(batch_size=8, max_epochs=3))
    assert seen["learning_rate"] == 1e-3
    assert [seen["schedule"](step) for step in (0, 3, 4, 8)] == pytest.approx([1, 1, 0.9, 0.81])
    assert ForecastRecipe() == ForecastRecipe(1e-3, 0.9, 32, 25, 5)


def test_a_seed_gives_the_same_training_again_and_few_windows_make_one_batch() -> None:
    windows = SeriesWindows(periodic(40)[:, None], 16, 8)
    assert len(windows) < 32
    runs = []
    for seed in (3, 3, 4):
        model = small()
        runs.append(train_forecaster(model, windows, windows, ForecastRecipe(batch_size=6, max_epochs=2), seed))
    assert runs[0] == runs[1] != runs[2]
    whole = train_forecaster(small(), windows, windows, ForecastRecipe(max_epochs=2))
    assert len(whole.losses) == 2


def test_numbers_of_the_recipe_out_of_range_are_refused() -> None:
    for name in ("learning_rate", "decay", "batch_size", "max_epochs", "patience"):
        with pytest.raises(ValueError, match=f"{name} must be positive"):
            ForecastRecipe(**{name: 0})
    with pytest.raises(ValueError, match=r"decay must lie in \(0, 1\]"):
        ForecastRecipe(decay=1.1)


# The forecaster.

HOURS = pd.date_range("2024-03-01", periods=160, freq="h")


def forecaster(**arguments: Any) -> TPGNForecaster:
    defaults = {"seq_len": 16, "pred_len": 8, "period": 4, "d_model": 4, "learning_rate": 1e-2, "max_epochs": 8}
    return TPGNForecaster(**{**defaults, **arguments})


def test_it_continues_a_periodic_series_in_its_units_on_the_hours_that_follow() -> None:
    series = pd.Series(100 + 20 * periodic(160), HOURS, name="load")
    fitted = forecaster(frequency=None, max_epochs=25).fit(series)
    forecast = fitted.predict()
    assert isinstance(forecast, pd.Series)
    assert forecast.name == "load"
    assert list(forecast.index) == list(pd.date_range(HOURS[-1], periods=9, freq="h")[1:])
    expected = 100 + 20 * periodic(168)[-8:]
    assert np.abs(forecast.to_numpy() - expected).mean() < 5 < np.abs(expected - expected.mean()).mean()


def test_it_trains_on_the_first_rows_alone_and_scales_by_them() -> None:
    series = pd.Series(periodic(160), HOURS)
    shifted = series.copy()
    shifted.iloc[120:] += 10
    one, other = forecaster(max_epochs=1).fit(series), forecaster(max_epochs=1).fit(shifted)
    assert np.array_equal(one.scaler_.mean, other.scaler_.mean)
    assert one.scaler_.mean[0] == pytest.approx(series.iloc[:120].mean())
    assert one.history_.losses == other.history_.losses
    assert one.history_.validation != other.history_.validation
    assert len(one.history_.losses) == (120 - 24 + 1) // 32


def test_a_frame_is_forecast_column_by_column_with_the_marks_of_its_hours() -> None:
    frame = pd.DataFrame({"a": periodic(160), "b": -periodic(160)}, HOURS)
    fitted = forecaster(max_epochs=1).fit(frame)
    assert (fitted.model_.n_channels, fitted.model_.n_marks, fitted.n_features_in_) == (2, 4, 2)
    forecast = fitted.predict(frame.iloc[:100])
    assert isinstance(forecast, pd.DataFrame)
    assert list(forecast.columns) == ["a", "b"]
    assert forecast.index[0] == HOURS[100]
    window = torch.from_numpy(fitted.scaler_.transform(frame.iloc[84:100].to_numpy())).float()[None]
    marks = torch.from_numpy(time_features(HOURS[84:100].to_numpy(), "h")).float()[None]
    with torch.no_grad():
        expected = fitted.scaler_.inverse(fitted.model_(window, marks)[0].numpy())
    np.testing.assert_allclose(forecast.to_numpy(), expected, rtol=1e-6)
    shared = forecaster(max_epochs=1, channel_shared=True).fit(frame)
    assert shared.model_.groups == 1


def test_it_follows_scikit_learns_conventions_and_a_seed_gives_the_same_again() -> None:
    estimator = forecaster(max_epochs=1, random_state=5)
    copy = clone(estimator)
    assert copy.get_params() == estimator.get_params()
    series = pd.Series(periodic(160), HOURS)
    assert estimator.fit(series) is estimator
    pd.testing.assert_series_equal(estimator.predict(), copy.fit(series).predict())
    assert not estimator.predict().equals(forecaster(max_epochs=1, random_state=6).fit(series).predict())
    with pytest.raises(NotFittedError):
        forecaster().predict()


def test_whole_numbers_and_months_are_indices_too() -> None:
    numbers = pd.Series(periodic(160), pd.RangeIndex(10, 490, 3))
    assert list(forecaster(frequency=None, max_epochs=1).fit(numbers).predict().index[:2]) == [490, 493]
    months = pd.DatetimeIndex(np.asarray(pd.date_range("2000-01-01", periods=160, freq="MS")))
    forecast = forecaster(frequency="d", max_epochs=1).fit(pd.Series(periodic(160), months)).predict()
    assert [str(day.date()) for day in forecast.index[:2]] == ["2013-05-01", "2013-06-01"]


def test_marks_are_those_of_the_clock_on_the_wall() -> None:
    there = pd.date_range("2024-01-01", periods=160, freq="h", tz="Asia/Tokyo")
    here = there.tz_localize(None)
    forecasts = [forecaster(max_epochs=1).fit(pd.Series(periodic(160), index)).predict() for index in (there, here)]
    assert np.array_equal(forecasts[0].to_numpy(), forecasts[1].to_numpy())
    assert forecasts[0].index[0] == there[-1] + pd.Timedelta("1h")


@pytest.mark.parametrize(
    ("series", "error", "message"),
    [
        (periodic(160), TypeError, "series must be a pandas Series or DataFrame, got ndarray"),
        (pd.Series(periodic(30), HOURS[:30]), ValueError, "at least seq_len \\+ pred_len = 24 rows"),
        (pd.Series(np.where(np.arange(160) == 7, np.nan, 1.0), HOURS), ValueError, "no gaps, got nan at 2024-03-01 07"),
        (pd.Series(periodic(159), HOURS.delete(50)), ValueError, "evenly spaced index of dates"),
        (pd.Series(periodic(160), [*range(159), 200]), ValueError, "evenly spaced index"),
        (pd.Series(periodic(160), HOURS[::-1]), ValueError, "evenly spaced index of dates"),
        (pd.Series(periodic(160)), ValueError, "index of dates for frequency='h'"),
        (pd.DataFrame(index=HOURS), ValueError, "at least one column"),
    ],
)
def test_series_that_do_not_do_are_refused(series: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        forecaster().fit(series)


def test_the_past_must_be_long_enough_and_have_the_fitted_columns() -> None:
    frame = pd.DataFrame({"a": periodic(160)}, HOURS)
    fitted = forecaster(max_epochs=1).fit(frame)
    with pytest.raises(ValueError, match="at least seq_len=16 rows, got 15"):
        fitted.predict(frame.iloc[:15])
    with pytest.raises(ValueError, match=r"columns \['a'\], got \['b'\]"):
        fitted.predict(frame.rename(columns={"a": "b"}))
    with pytest.raises(ValueError, match=r"validation_fraction must lie in \(0, 1\)"):
        forecaster(validation_fraction=1.0).fit(frame)


def test_marks_help_where_the_level_depends_on_the_day_of_the_week() -> None:
    data = hourly_series(1200, 3, noise=0.05, trend=0.0, weekly=0.8)
    series = pd.Series(data.values[:, 0], pd.DatetimeIndex(data.timestamps))
    errors = {}
    for frequency in (None, "h"):
        fitted = TPGNForecaster(48, 24, 24, 8, frequency=frequency, learning_rate=3e-3, max_epochs=6).fit(series)  # type: ignore[arg-type]
        errors[frequency] = min(fitted.history_.validation)
    assert errors["h"] < 0.9 * errors[None]


# neuralforecast, of which the tests have a stand-in with the same door.


class BaseModel(nn.Module):
    """Asks for what neuralforecast's base model asks for, and keeps it."""

    def __init__(
        self, h: int, input_size: int, loss: Any, valid_loss: Any, learning_rate: float, max_steps: int,
        val_check_steps: int, batch_size: int, valid_batch_size: int | None, windows_batch_size: int,
        inference_windows_batch_size: int | None, start_padding_enabled: bool, **options: Any,
    ) -> None:  # fmt: skip
        super().__init__()
        self.h, self.input_size, self.loss, self.max_steps, self.options = h, input_size, loss, max_steps, options


class MSE:
    """A loss of one output per step."""

    outputsize_multiplier = 1


@pytest.fixture
def adapter(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    base, losses = types.ModuleType("_base_model"), types.ModuleType("pytorch")
    base.BaseModel, losses.MSE = BaseModel, MSE  # type: ignore[attr-defined]
    names = ("neuralforecast", "neuralforecast.common", "neuralforecast.losses")
    for name in names:
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, "neuralforecast.common._base_model", base)
    monkeypatch.setitem(sys.modules, "neuralforecast.losses.pytorch", losses)
    yield pgn.NeuralForecastTPGN
    sys.modules.pop("headgate.methods.sequence.pgn.neuralforecast", None)


def test_neuralforecast_gets_its_arguments_and_forecasts_of_its_shape(adapter: Any) -> None:
    model = adapter(h=8, input_size=16, period=4, d_model=4, hist_exog_list=["hour", "day"], scaler_type="standard")
    assert (model.h, model.input_size, model.max_steps) == (8, 16, 1000)
    assert model.options == {"scaler_type": "standard", "hist_exog_list": ["hour", "day"]}
    assert isinstance(model.loss, MSE)
    x, marks = torch.randn(3, 16, 1), torch.randn(3, 16, 2)
    forecast = model({"insample_y": x, "hist_exog": marks, "futr_exog": None})
    assert forecast.shape == (3, 8, 1)
    assert torch.equal(forecast, model.tpgn(x, marks))
    plain = adapter(h=8, input_size=16, period=4, max_steps=7)
    assert plain.max_steps == 7
    assert plain({"insample_y": x, "hist_exog": None}).shape == (3, 8, 1)
    with pytest.raises(ValueError, match="one output per step, got Quantiles with 5"):
        adapter(h=8, input_size=16, period=4, loss=type("Quantiles", (), {"outputsize_multiplier": 5})())


def test_without_neuralforecast_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "neuralforecast", None)
    monkeypatch.delitem(sys.modules, "headgate.methods.sequence.pgn.neuralforecast", raising=False)
    with pytest.raises(HeadgateError, match="pip install neuralforecast"):
        importlib.import_module("headgate.methods.sequence.pgn").NeuralForecastTPGN  # noqa: B018
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        pgn.Nothing  # type: ignore[attr-defined] # noqa: B018

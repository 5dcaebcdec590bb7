"""TPGN for those who have a pandas series and want its continuation: ``fit`` and ``predict``, as in scikit-learn."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any, Literal, Self

import numpy as np
import torch
from sklearn.base import BaseEstimator
from sklearn.utils.validation import check_is_fitted

from headgate.data import SeriesScaler, SeriesWindows, time_features
from headgate.errors import MissingExtraError
from headgate.methods.sequence.pgn.model import TPGN
from headgate.methods.sequence.pgn.training import ForecastRecipe, train_forecaster
from headgate.train import seeded

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["TPGNForecaster"]


class TPGNForecaster(BaseEstimator):  # type: ignore[misc]
    """Forecast a series, or a frame of series, with an evenly spaced index.

    ``fit`` standardises with the mean and deviation of the training rows, trains on the first rows, stops on the last
    ones, and keeps the best epoch's weights; ``predict`` forecasts in the original units.

    Args:
        seq_len: steps that a forecast looks back on, a multiple of ``period``.
        pred_len: steps to forecast.
        period: steps of a period: 24 for hourly series with a daily profile.
        d_model: width of the model.
        normalize: whether each window is standardised on its own as well, for series whose level moves.
        channel_shared: whether the columns of a frame share one set of weights.
        frequency: which time marks are computed from the index: ``"t"`` (minutes), ``"h"`` (hours) or ``"d"`` (days);
            ``None`` for none.
        validation_fraction: share of the rows, at the end, that decides when to stop; in (0, 1).
        learning_rate: of the first epoch.
        decay: factor of the learning rate from epoch to epoch.
        batch_size: windows per update.
        max_epochs: passes over the training windows at most.
        patience: epochs without improvement after which training ends.
        random_state: seed of the initial weights and of the order of the windows.
        device: where to train, such as ``"cuda"``.

    Attributes:
        model_: the trained :class:`TPGN`.
        scaler_: the :class:`headgate.data.SeriesScaler` of the training rows.
        history_: what the training went through.
        feature_names_in_: the names of the columns.
    """

    def __init__(
        self,
        seq_len: int = 168,
        pred_len: int = 168,
        period: int = 24,
        d_model: int = 32,
        normalize: bool = False,
        channel_shared: bool = False,
        frequency: Literal["t", "h", "d"] | None = "h",
        validation_fraction: float = 0.25,
        learning_rate: float = 1e-3,
        decay: float = 0.9,
        batch_size: int = 32,
        max_epochs: int = 25,
        patience: int = 5,
        random_state: int = 0,
        device: str = "cpu",
    ) -> None:
        self.seq_len = seq_len
        self.pred_len = pred_len
        self.period = period
        self.d_model = d_model
        self.normalize = normalize
        self.channel_shared = channel_shared
        self.frequency = frequency
        self.validation_fraction = validation_fraction
        self.learning_rate = learning_rate
        self.decay = decay
        self.batch_size = batch_size
        self.max_epochs = max_epochs
        self.patience = patience
        self.random_state = random_state
        self.device = device

    def fit(self, series: pd.Series | pd.DataFrame, y: None = None) -> Self:
        """Train on a series.

        Args:
            series: numbers without gaps, over an evenly spaced index of dates (or of whole numbers where ``frequency`` is
                ``None``).
            y: not looked at.

        Raises:
            TypeError: no pandas series or frame.
            ValueError: an argument out of range, an uneven index, a gap, or fewer than ``seq_len + pred_len`` rows on
                either side of the cut.
        """
        values = _values(series)
        if not 0 < self.validation_fraction < 1:
            raise ValueError(f"validation_fraction must lie in (0, 1), got {self.validation_fraction}")
        _continue_index(series.index, 1)
        marks = self._marks(series.index)
        cut = round(len(values) * (1 - self.validation_fraction))
        context = max(0, cut - self.seq_len)
        shortest = min(cut, len(values) - context)
        if shortest < self.seq_len + self.pred_len:
            raise ValueError(
                f"series must have at least seq_len + pred_len = {self.seq_len + self.pred_len} rows for training and "
                f"for validation, got {cut} and {len(values) - context} of {len(values)}"
            )
        self.scaler_ = SeriesScaler.fit(values[:cut])
        scaled = self.scaler_.transform(values)
        train, validation = (
            SeriesWindows(scaled[rows], self.seq_len, self.pred_len, marks=marks[rows])
            for rows in (slice(0, cut), slice(context, None))
        )
        with seeded(self.random_state):
            model = TPGN(
                self.seq_len,
                self.pred_len,
                self.period,
                self.d_model,
                n_channels=values.shape[1],
                n_marks=marks.shape[1],
                normalize=self.normalize,
                channel_shared=self.channel_shared,
            )
        recipe = ForecastRecipe(self.learning_rate, self.decay, self.batch_size, self.max_epochs, self.patience)
        self.model_ = model.to(self.device)
        self.history_ = train_forecaster(self.model_, train, validation, recipe, self.random_state)
        self.feature_names_in_ = _names(series)
        self.n_features_in_ = values.shape[1]
        self._last_rows = series.iloc[-self.seq_len :].copy()
        return self

    def predict(self, series: pd.Series | pd.DataFrame | None = None) -> pd.Series | pd.DataFrame:
        """Forecast what follows.

        Args:
            series: the past, at least ``seq_len`` rows of the fitted columns; default: the series of :meth:`fit`.

        Returns:
            ``pred_len`` rows of the same kind and names, on the index that goes on from that of ``series``.

        Raises:
            NotFittedError: called before :meth:`fit`.
            TypeError: no pandas series or frame.
            ValueError: other columns, too few rows, an uneven index, or a gap.
        """
        import pandas as pd

        check_is_fitted(self)
        series = self._last_rows if series is None else series
        values = _values(series)
        if len(values) < self.seq_len:
            raise ValueError(f"series must have at least seq_len={self.seq_len} rows, got {len(values)}")
        names = _names(series)
        if isinstance(series, pd.DataFrame) and list(names) != list(self.feature_names_in_):
            raise ValueError(f"series must have the columns {list(self.feature_names_in_)}, got {list(names)}")
        if values.shape[1] != self.n_features_in_:
            raise ValueError(f"series must have {self.n_features_in_} columns, got {values.shape[1]}")
        index = _continue_index(series.index, self.pred_len)
        window = self.scaler_.transform(values[-self.seq_len :])
        marks = self._marks(series.index[-self.seq_len :])
        inputs, input_marks = (torch.from_numpy(a).float()[None].to(self.device) for a in (window, marks))
        self.model_.eval()
        with torch.no_grad():
            forecast = self.model_(inputs, input_marks)[0].double().cpu().numpy()
        forecast = self.scaler_.inverse(forecast)
        if isinstance(series, pd.Series):
            return pd.Series(forecast[:, 0], index=index, name=series.name)
        return pd.DataFrame(forecast, index=index, columns=series.columns)

    def _marks(self, index: pd.Index) -> np.ndarray:
        """Time marks (time, mark) of an index; width 0 where none are wanted."""
        if self.frequency is None:
            return np.zeros((len(index), 0))
        import pandas as pd

        if not isinstance(index, pd.DatetimeIndex):
            raise ValueError(
                f"series must have an index of dates for frequency={self.frequency!r}, got {type(index).__name__}; "
                "frequency=None does without time marks"
            )
        # The hour of a daily profile is that of the clock on the wall.
        return time_features(index.tz_localize(None).to_numpy(), self.frequency)


def _values(series: Any) -> np.ndarray:
    """The numbers as float64 (time, channel)."""
    try:
        import pandas as pd
    except ModuleNotFoundError as error:
        raise MissingExtraError("pandas", "files", "TPGNForecaster") from error
    if not isinstance(series, pd.Series | pd.DataFrame):
        raise TypeError(f"series must be a pandas Series or DataFrame, got {type(series).__name__}")
    values: np.ndarray[Any, Any] = np.array(series, dtype=np.float64)
    values = values[:, None] if values.ndim == 1 else values
    if values.shape[1] == 0:
        raise ValueError("series must have at least one column, got none")
    gaps = np.argwhere(~np.isfinite(values))
    if len(gaps):
        row, column = gaps[0].tolist()
        raise ValueError(f"series must have no gaps, got {values[row, column]} at {series.index[row]}")
    return values


def _names(series: pd.Series | pd.DataFrame) -> np.ndarray:
    return np.asarray(series.columns if series.ndim == 2 else [series.name], dtype=object)


def _continue_index(index: pd.Index, count: int) -> pd.Index:
    """The ``count`` entries behind an evenly spaced index.

    Raises:
        ValueError: it is not evenly spaced, or holds neither dates nor whole numbers.
    """
    import pandas as pd

    if isinstance(index, pd.DatetimeIndex):
        return pd.date_range(index[-1], periods=count + 1, freq=_frequency(index), name=index.name)[1:]
    steps = np.diff(np.asarray(index)) if pd.api.types.is_integer_dtype(index.dtype) else np.zeros(0)
    if len(steps) == 0 or steps[0] <= 0 or (steps != steps[0]).any():
        raise ValueError(f"series must have an evenly spaced index of dates or whole numbers, got {index!r:.80}")
    return pd.Index(int(index[-1]) + int(steps[0]) * np.arange(1, count + 1), name=index.name)


def _frequency(index: pd.DatetimeIndex) -> Any:
    """The step between dates: its own, an equal stretch of time, or one of the calendar such as a month."""
    import pandas as pd

    if len(index) > 1 and index.is_monotonic_increasing and index.is_unique:
        if index.freq is not None:
            return index.freq
        if (np.diff(index.asi8) == index.asi8[1] - index.asi8[0]).all():
            return index[1] - index[0]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # pandas announces another return type, which date_range takes as well
            frequency = pd.infer_freq(index) if len(index) > 2 else None
        if frequency is not None:
            return frequency
    raise ValueError("series must have an evenly spaced index of dates, got one without a frequency")

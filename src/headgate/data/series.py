"""Time series for forecasting: tables with a date column, chronological splits, scaling, time marks and windows.

ETT ("Electricity Transformer Temperature"; Zhou et al., "Informer", AAAI 2021, arXiv 2012.07436) has six load columns and
the oil temperature OT, hourly (ETTh1, ETTh2) or every 15 minutes (ETTm1, ETTm2), from July 2016 to June 2018. Its
customary split takes 12, 4 and 4 months of 30 days and leaves the rest unused. The other tables of the field (ECL,
Traffic, Weather) have the same layout and are cut by shares.

A window of item ``i`` starts at row ``i · stride``::

    rows       0 1 2 3 4 5 6 7 8 9
    inputs     x x x x                (input_length 4)
    targets            y y y          (horizon 3)
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Float64, Int64, Shaped
from torch import Tensor
from torch.utils.data import Dataset

from headgate.data.text import read_rows
from headgate.errors import DataError
from headgate.validate import check_positive

__all__ = [
    "ETT_COLUMNS",
    "SeriesScaler",
    "SeriesSplits",
    "SeriesWindow",
    "SeriesWindows",
    "TimeSeries",
    "chronological_splits",
    "ett_splits",
    "read_ett",
    "read_series",
    "time_features",
]

ETT_COLUMNS = ("HUFL", "HULL", "MUFL", "MULL", "LUFL", "LULL", "OT")
_DATE = "date"
_HOUR = np.timedelta64(3600, "s")
_QUARTER = np.timedelta64(900, "s")
_ROWS_PER_HOUR = {_HOUR: 1, _QUARTER: 4}
_ETT_MONTHS = (12, 4, 4)


@dataclass(frozen=True, eq=False)
class TimeSeries:
    """A multivariate series.

    Attributes:
        timestamps: datetime64[s] of shape (time,), strictly increasing.
        columns: the names of the channels.
        values: float64 of shape (time, channel), all finite.
    """

    timestamps: Shaped[np.ndarray, " time"]
    columns: tuple[str, ...]
    values: Float64[np.ndarray, "time channel"]

    def select(self, *columns: str) -> TimeSeries:
        """Keep the named channels, in the given order.

        Raises:
            ValueError: an unknown name.
        """
        for name in columns:
            if name not in self.columns:
                raise ValueError(f"columns must be of {', '.join(self.columns)}, got {name!r}")
        return TimeSeries(self.timestamps, columns, self.values[:, [self.columns.index(name) for name in columns]])


class SeriesSplits(NamedTuple):
    """Rows for training, for choosing, and for the final figure."""

    train: slice
    validation: slice
    test: slice


class SeriesWindow(NamedTuple):
    """One window, or a batch of them with the batch axis first.

    Attributes:
        inputs: what the forecaster sees, shape (input_length, channel).
        targets: what it has to say, shape (horizon, channel).
        input_marks: time marks of the inputs, shape (input_length, mark); ``mark`` is 0 where none were given.
        target_marks: time marks of the targets, shape (horizon, mark).
    """

    inputs: Float[Tensor, "*batch input_length channel"]
    targets: Float[Tensor, "*batch horizon channel"]
    input_marks: Float[Tensor, "*batch input_length mark"]
    target_marks: Float[Tensor, "*batch horizon mark"]


def read_ett(path: str | os.PathLike[str], name: str = "ETTh1") -> TimeSeries:
    """Read a file of ETT: ``date`` and the seven channels of :data:`ETT_COLUMNS`, hourly or every 15 minutes.

    Args:
        path: the CSV file, or a folder with ``{name}.csv``.
        name: which file of a folder.

    Raises:
        DataError: as :func:`read_series`, or a step other than one hour or 15 minutes (the line is named).
    """
    path = Path(path)
    if path.is_dir():
        path = path / f"{name}.csv"
    series = read_series(path, columns=ETT_COLUMNS)
    steps = np.diff(series.timestamps)
    if len(steps) == 0 or steps[0] not in _ROWS_PER_HOUR:
        found = f"of {steps[0].astype(int)} seconds" if len(steps) else "missing (a single row)"
        raise DataError(f"{path}: the step between the first two rows is {found}; expected 3600 or 900 seconds")
    uneven = np.flatnonzero(steps != steps[0])
    if uneven.size:
        before, after = series.timestamps[uneven[0]], series.timestamps[uneven[0] + 1]
        raise DataError(f"{path}: {after} follows {before}; expected every step to be {steps[0].astype(int)} seconds")
    return series


def read_series(path: str | os.PathLike[str], columns: Sequence[str] | None = None) -> TimeSeries:
    """Read a CSV file whose header names ``date`` and the channels.

    Args:
        path: the file; dates are ISO 8601, such as ``2016-07-01 00:00:00``.
        columns: the channels to keep, in this order; all of them by default.

    Raises:
        DataError: no such file, an empty one, missing columns (named), a row with too few or too many cells, a cell that
            is no finite number or no date (line and column named), or dates that do not increase.
    """
    path = Path(path)
    rows = read_rows(path)
    _, header = next(rows)
    header = [cell.strip() for cell in header]
    wanted = tuple(columns) if columns is not None else tuple(name for name in header if name != _DATE)
    missing = [name for name in (_DATE, *wanted) if name not in header]
    if missing or not wanted:
        raise DataError(
            f"{path} lacks the columns {', '.join(missing) or 'of any channel'}; "
            f"expected {', '.join((_DATE, *wanted))}, found {', '.join(header)}"
        )
    if len(set(header)) != len(header):
        raise DataError(f"{path}: the header names a column twice; expected different names, found {', '.join(header)}")
    places = [header.index(name) for name in wanted]
    date_place = header.index(_DATE)
    dates: list[np.datetime64] = []
    values: list[list[float]] = []
    for line, row in rows:
        if len(row) != len(header):
            raise DataError(f"{path}, line {line}: expected {len(header)} cells as in the header, found {len(row)}")
        dates.append(_date(row[date_place], path, line))
        if len(dates) > 1 and dates[-1] <= dates[-2]:
            raise DataError(f"{path}, line {line}: {dates[-1]} follows {dates[-2]}; expected dates that increase")
        values.append([_finite(row[place], path, line, header[place]) for place in places])
    if not dates:
        raise DataError(f"{path} holds a header and no rows; expected at least one")
    return TimeSeries(np.array(dates, dtype="datetime64[s]"), wanted, np.array(values, dtype=np.float64))


def ett_splits(series: TimeSeries, context: int = 0) -> SeriesSplits:
    """The customary split of ETT: 12, 4 and 4 months of 30 days (8640, 2880, 2880 rows hourly; four times that for ETTm).

    Args:
        series: a series of hourly or quarter-hourly rows.
        context: rows before validation and test that their slices hold, too; with ``context=input_length`` the first
            target stands exactly at the cut and no target of one side is a target of another.

    Raises:
        ValueError: another step, too few rows, or a context that is negative or longer than the training rows.
    """
    step = series.timestamps[1] - series.timestamps[0] if len(series.timestamps) > 1 else np.timedelta64(0, "s")
    if step not in _ROWS_PER_HOUR:
        raise ValueError(f"series must have steps of 3600 or 900 seconds, got {step.astype(int)}")
    month = 30 * 24 * _ROWS_PER_HOUR[step]
    sizes = [months * month for months in _ETT_MONTHS]
    if sum(sizes) > len(series.timestamps):
        raise ValueError(f"series must have at least {sum(sizes)} rows, got {len(series.timestamps)}")
    return _splits(sizes, context)


def chronological_splits(
    length: int, fractions: tuple[float, float, float] = (0.6, 0.2, 0.2), context: int = 0
) -> SeriesSplits:
    """Cut a series by shares; training and test are rounded down, validation takes what is left.

    Args:
        length: rows in all.
        fractions: shares of training, validation and test; they add up to 1.
        context: as in :func:`ett_splits`.

    Raises:
        ValueError: fractions that are not positive or do not add up to 1, an empty side, or a wrong context.
    """
    if len(fractions) != 3 or min(fractions) <= 0 or abs(sum(fractions) - 1) > 1e-9:
        raise ValueError(f"fractions must be three positive numbers that add up to 1, got {fractions}")
    # The small number keeps products such as 0.29 · 100 = 28.999… from losing a row.
    train, test = (math.floor(share * length + 1e-6) for share in (fractions[0], fractions[2]))
    sizes = [train, length - train - test, test]
    if min(sizes) < 1:
        raise ValueError(f"every side must have a row, got {sizes} of length={length}")
    return _splits(sizes, context)


@dataclass(frozen=True, eq=False)
class SeriesScaler:
    """Standardise every channel with the mean and the (biased) standard deviation of the training rows.

    Attributes:
        mean: float64 of shape (channel,).
        std: float64 of shape (channel,), positive; 1 for a channel that is constant in training.
    """

    mean: Float64[np.ndarray, " channel"]
    std: Float64[np.ndarray, " channel"]

    @classmethod
    def fit(cls, values: Float64[np.ndarray, "time channel"]) -> SeriesScaler:
        """Take mean and standard deviation of the training rows alone: ``fit(values[splits.train])``.

        Raises:
            ValueError: a wrong rank, no rows, or a value that is not finite.
        """
        values = np.asarray(values, dtype=np.float64)
        if values.ndim != 2 or len(values) == 0 or not np.isfinite(values).all():
            raise ValueError(f"values must be finite and of shape (time, channel) with rows, got shape {values.shape}")
        std = values.std(axis=0)
        # The deviation of equal numbers is rounding noise around their mean, not exactly zero.
        return cls(values.mean(axis=0), np.where(np.ptp(values, axis=0) == 0, 1.0, std))

    def transform(self, values: Float64[np.ndarray, "... channel"]) -> Float64[np.ndarray, "... channel"]:
        """Give ``(values − mean) / std``."""
        return (self._checked(values) - self.mean) / self.std

    def inverse(self, values: Float64[np.ndarray, "... channel"]) -> Float64[np.ndarray, "... channel"]:
        """Give ``values · std + mean``, the original units."""
        return self._checked(values) * self.std + self.mean

    def _checked(self, values: np.ndarray) -> np.ndarray:
        values = np.asarray(values, dtype=np.float64)
        if values.shape[-1:] != self.mean.shape:
            raise ValueError(f"values must have {len(self.mean)} channels on the last axis, got shape {values.shape}")
        return values


def time_features(
    timestamps: Shaped[np.ndarray, " time"], frequency: Literal["t", "h", "d"] = "h"
) -> Float64[np.ndarray, "time mark"]:
    """Turn dates into marks in [-0.5, 0.5], in the order that forecasters of the Informer family expect.

    ========= ==========================================================================
    frequency marks
    ========= ==========================================================================
    ``"t"``   minute/59, hour/23, weekday/6, (day of month − 1)/30, (day of year − 1)/365
    ``"h"``   hour/23, weekday/6, (day of month − 1)/30, (day of year − 1)/365
    ``"d"``   weekday/6, (day of month − 1)/30, (day of year − 1)/365
    ========= ==========================================================================

    each minus 0.5; Monday is weekday 0.

    Args:
        timestamps: datetime64 of shape (time,).
        frequency: minutes, hours or days.

    Returns:
        float64 of shape (time, mark) with 5, 4 or 3 marks.

    Raises:
        TypeError: timestamps that are no dates.
        ValueError: an unknown frequency, or a date that is missing (NaT).
    """
    timestamps = np.asarray(timestamps)
    if timestamps.dtype.kind != "M":
        raise TypeError(f"timestamps must be datetime64, got {timestamps.dtype}")
    if frequency not in ("t", "h", "d"):
        raise ValueError(f"frequency must be 't', 'h' or 'd', got {frequency!r}")
    if np.isnat(timestamps).any():
        raise ValueError(f"timestamps must all be dates, got NaT at {int(np.flatnonzero(np.isnat(timestamps))[0])}")
    days = timestamps.astype("datetime64[D]")
    minutes_of_day = (timestamps - days).astype("timedelta64[m]").astype(np.int64)
    marks = {
        "minute": minutes_of_day % 60 / 59,
        "hour": minutes_of_day // 60 / 23,
        "weekday": (days.astype(np.int64) + 3) % 7 / 6,  # 1970-01-01 was a Thursday
        "day of month": (days - days.astype("datetime64[M]")).astype(np.int64) / 30,
        "day of year": (days - days.astype("datetime64[Y]")).astype(np.int64) / 365,
    }
    first = {"t": 0, "h": 1, "d": 2}[frequency]
    return np.stack(list(marks.values())[first:], axis=-1) - 0.5


class SeriesWindows(Dataset[SeriesWindow]):
    """All windows of a series, with random access: item ``i`` starts at row ``i · stride``.

    An item depends on its index alone, so any order or number of workers gives the same items. Keep the last, incomplete
    batch when testing (``drop_last=False``): dropping it changes the figure.

    Args:
        values: shape (time, channel); usually scaled, and one slice of a split.
        input_length: rows that the forecaster sees.
        horizon: rows to forecast.
        stride: rows between the starts of two neighbouring windows.
        marks: time marks of the same rows, shape (time, mark); see :func:`time_features`.
        dtype: the windows' dtype.

    Raises:
        ValueError: a wrong rank, a value that is not finite, lengths below 1, fewer than ``input_length + horizon`` rows,
            or marks of another length.
    """

    def __init__(
        self,
        values: Float[np.ndarray, "time channel"] | Float[Tensor, "time channel"],
        input_length: int,
        horizon: int,
        stride: int = 1,
        marks: Float[np.ndarray, "time mark"] | Float[Tensor, "time mark"] | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        check_positive(input_length=input_length, horizon=horizon, stride=stride)
        self.values = _finite_table("values", values, dtype)
        self.marks = _finite_table("marks", marks if marks is not None else np.zeros((len(self.values), 0)), dtype)
        if len(self.marks) != len(self.values):
            raise ValueError(f"marks must have the {len(self.values)} rows of values, got {len(self.marks)}")
        if len(self.values) < input_length + horizon:
            raise ValueError(
                f"values must have at least input_length + horizon = {input_length + horizon} rows, "
                f"got {len(self.values)}"
            )
        self.input_length = input_length
        self.horizon = horizon
        self.stride = stride

    def __len__(self) -> int:
        return (len(self.values) - self.input_length - self.horizon) // self.stride + 1

    def __getitem__(self, index: int) -> SeriesWindow:
        """Give one window; see :class:`SeriesWindow`."""
        return SeriesWindow(*(part[0] for part in self.batch([index])))

    def batch(self, indices: Int64[Tensor, " batch"] | Sequence[int]) -> SeriesWindow:
        """Give the windows of many indices at once, batch axis first.

        Raises:
            IndexError: an index outside [-len, len).
        """
        starts = torch.as_tensor(indices, dtype=torch.int64)
        outside = (starts < -len(self)) | (starts >= len(self))
        if outside.any():
            raise IndexError(f"indices must lie in [-{len(self)}, {len(self)}), got {int(starts[outside][0])}")
        rows = (starts % len(self) * self.stride)[:, None] + torch.arange(self.input_length + self.horizon)
        past, future = rows[:, : self.input_length], rows[:, self.input_length :]
        return SeriesWindow(self.values[past], self.values[future], self.marks[past], self.marks[future])


def _splits(sizes: Sequence[int], context: int) -> SeriesSplits:
    train, validation, test = sizes
    if not 0 <= context <= train:
        raise ValueError(f"context must lie in [0, {train}], the training rows, got {context}")
    cut, end = train + validation, train + validation + test
    return SeriesSplits(slice(0, train), slice(train - context, cut), slice(cut - context, end))


def _date(cell: str, path: Path, line: int) -> np.datetime64:
    try:
        date = np.datetime64(cell.strip(), "s")
    except ValueError as error:
        raise DataError(f"{path}, line {line}, column {_DATE!r}: {cell!r} is no date; expected ISO 8601") from error
    if np.isnat(date):
        raise DataError(f"{path}, line {line}, column {_DATE!r}: the date is missing; expected ISO 8601")
    return date


def _finite(cell: str, path: Path, line: int, column: str) -> float:
    try:
        value = float(cell)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise DataError(f"{path}, line {line}, column {column!r}: {cell!r} is no finite number")
    return value


def _finite_table(name: str, table: np.ndarray | Tensor, dtype: torch.dtype) -> Tensor:
    tensor = torch.as_tensor(table).to(dtype)
    if tensor.dim() != 2:
        raise ValueError(f"{name} must have shape (time, channel), got {tuple(tensor.shape)}")
    if not tensor.isfinite().all():
        row, channel = (~tensor.isfinite()).nonzero()[0].tolist()
        raise ValueError(f"{name} must be finite, got {tensor[row, channel].item()} at row {row}, channel {channel}")
    return tensor

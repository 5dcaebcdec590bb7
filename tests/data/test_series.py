"""Time series: reading, splits, scaling, time marks and windows."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.preprocessing import StandardScaler
from torch.utils.data import DataLoader

from headgate.data.series import (
    ETT_COLUMNS,
    SeriesScaler,
    SeriesWindows,
    TimeSeries,
    chronological_splits,
    ett_splits,
    read_ett,
    read_series,
    time_features,
)
from headgate.errors import DataError

_HEADER = "date," + ",".join(ETT_COLUMNS)


def _row(date: str, first: float = 0.0) -> str:
    return f"{date}," + ",".join(str(first + place) for place in range(7))


def _ett(folder: Path, *rows: str, header: str = _HEADER) -> Path:
    path = folder / "ETTh1.csv"
    path.write_text("\n".join([header, *rows]) + "\n")
    return path


def _hourly(rows: int, minutes: int = 60) -> TimeSeries:
    start = np.datetime64("2016-07-01T00:00:00")
    times = start + np.arange(rows) * np.timedelta64(60 * minutes, "s")
    return TimeSeries(times, ("OT",), np.arange(rows, dtype=np.float64)[:, None])


def test_read_ett_gives_dates_columns_and_exact_values(tmp_path: Path) -> None:
    path = _ett(tmp_path, _row("2016-07-01 00:00:00", 0.1), _row("2016-07-01 01:00:00", -5.827000141143799))
    series = read_ett(path)
    assert series.columns == ETT_COLUMNS
    assert series.timestamps.tolist() == [
        pd.Timestamp("2016-07-01 00:00").to_pydatetime(),
        pd.Timestamp("2016-07-01 01:00").to_pydatetime(),
    ]
    assert series.values.dtype == np.float64
    assert series.values[0].tolist() == [0.1 + place for place in range(7)]
    assert series.values[1, 0] == -5.827000141143799
    assert np.array_equal(read_ett(tmp_path).values, series.values)


def test_columns_are_found_by_name_whatever_their_order(tmp_path: Path) -> None:
    path = tmp_path / "weather.csv"
    path.write_text("b,date,a\r\n1,2020-01-01,2\r\n3,2020-01-03,4\r\n")
    series = read_series(path)
    assert series.columns == ("b", "a")
    assert series.values.tolist() == [[1, 2], [3, 4]]
    assert read_series(path, columns=["a"]).values.tolist() == [[2], [4]]
    assert series.select("a", "b").values.tolist() == [[2, 1], [4, 3]]
    with pytest.raises(ValueError, match="columns must be of b, a, got 'c'"):
        series.select("c")


@pytest.mark.parametrize(
    ("rows", "header", "match"),
    [
        (["2016-07-01,1,2"], "date,HUFL,OT", "lacks the columns HULL, MUFL, MULL, LUFL, LULL; expected date, HUFL"),
        ([_row("2016-07-01")], _HEADER.replace("date", "time"), "lacks the columns date"),
        ([_row("2016-07-01")], _HEADER + ",OT", "names a column twice"),
        ([], _HEADER, "holds a header and no rows"),
        ([_row("2016-07-01"), "2016-07-01 01:00:00,1,2,3"], _HEADER, "line 3: expected 8 cells .* found 4"),
        ([_row("2016-07-01").replace("6.0", "warm")], _HEADER, "line 2, column 'OT': 'warm' is no finite number"),
        ([_row("2016-07-01").replace("1.0", "")], _HEADER, "line 2, column 'HULL': '' is no finite number"),
        ([_row("2016-07-01").replace("2.0", "nan")], _HEADER, "line 2, column 'MUFL': 'nan' is no finite number"),
        ([_row("2016-07-01").replace("3.0", "inf")], _HEADER, "line 2, column 'MULL': 'inf' is no finite number"),
        ([_row("1 July 2016")], _HEADER, "line 2, column 'date': '1 July 2016' is no date"),
        ([_row("NaT")], _HEADER, "line 2, column 'date': the date is missing"),
        ([_row("2016-07-02"), _row("2016-07-01")], _HEADER, "line 3: 2016-07-01T00:00:00 follows 2016-07-02"),
        ([_row("2016-07-01"), _row("2016-07-01")], _HEADER, "expected dates that increase"),
        ([_row("2016-07-01")], _HEADER, "missing .a single row."),
        ([_row("2016-07-01"), _row("2016-07-02")], _HEADER, "is of 86400 seconds; expected 3600 or 900"),
        (
            [_row("2016-07-01 00:00:00"), _row("2016-07-01 01:00:00"), _row("2016-07-01 03:00:00")],
            _HEADER,
            "2016-07-01T03:00:00 follows 2016-07-01T01:00:00; expected every step to be 3600 seconds",
        ),
    ],
)
def test_a_wrong_file_is_refused_by_name_line_and_column(
    tmp_path: Path, rows: list[str], header: str, match: str
) -> None:
    with pytest.raises(DataError, match=match) as caught:
        read_ett(_ett(tmp_path, *rows, header=header))
    assert "ETTh1.csv" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_empty_and_binary_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"ETTm2\.csv does not exist"):
        read_ett(tmp_path, name="ETTm2")
    (tmp_path / "ETTh1.csv").touch()
    with pytest.raises(DataError, match=r"ETTh1\.csv is empty"):
        read_ett(tmp_path)
    (tmp_path / "ETTh1.csv").write_bytes(_HEADER.encode() + b"\n2016-07-01,\xff")
    with pytest.raises(DataError, match="byte 0xff at offset 49"):
        read_ett(tmp_path)


def test_ett_splits_are_12_4_and_4_months() -> None:
    hourly = ett_splits(_hourly(17_420))
    assert hourly == (slice(0, 8640), slice(8640, 11_520), slice(11_520, 14_400))
    quarterly = ett_splits(_hourly(69_680, minutes=15))
    assert quarterly == (slice(0, 34_560), slice(34_560, 46_080), slice(46_080, 57_600))


def test_with_a_context_the_first_target_stands_at_the_cut() -> None:
    series = _hourly(17_420)
    splits = ett_splits(series, context=168)
    validation = SeriesWindows(series.values[splits.validation], 168, 24)
    test = SeriesWindows(series.values[splits.test], 168, 24)
    assert validation[0].targets[0].item() == 8640
    assert validation[-1].targets[-1].item() == 11_519
    assert test[0].targets[0].item() == 11_520
    assert test[-1].targets[-1].item() == 14_399
    assert len(test) == 2880 - 24 + 1


def test_ett_splits_refuse_other_steps_short_series_and_wrong_contexts() -> None:
    with pytest.raises(ValueError, match="steps of 3600 or 900 seconds, got 86400"):
        ett_splits(_hourly(20_000, minutes=1440))
    with pytest.raises(ValueError, match="at least 14400 rows, got 14399"):
        ett_splits(_hourly(14_399))
    for context in (-1, 8641):
        with pytest.raises(ValueError, match=f"context must lie in .0, 8640., the training rows, got {context}"):
            ett_splits(_hourly(14_400), context=context)


def test_chronological_splits_give_the_rest_to_validation() -> None:
    assert chronological_splits(17) == (slice(0, 10), slice(10, 14), slice(14, 17))
    assert chronological_splits(100, (0.29, 0.42, 0.29)) == (slice(0, 29), slice(29, 71), slice(71, 100))
    assert chronological_splits(10, (0.6, 0.2, 0.2), context=3) == (slice(0, 6), slice(3, 8), slice(5, 10))
    for fractions in [(0.5, 0.2, 0.2), (1.2, -0.4, 0.2), (0.6, 0.4)]:
        with pytest.raises(ValueError, match="three positive numbers that add up to 1"):
            chronological_splits(100, fractions)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="every side must have a row"):
        chronological_splits(4)


def test_scaler_equals_scikit_learns_and_sees_training_rows_only() -> None:
    values = np.random.default_rng(0).normal(3, 5, (100, 4)) * [1, 10, 0.1, 1000]
    scaler = SeriesScaler.fit(values[:60])
    peer = StandardScaler().fit(values[:60])
    np.testing.assert_allclose(scaler.transform(values), peer.transform(values), rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(scaler.inverse(scaler.transform(values)), values, rtol=1e-12)
    assert abs(scaler.transform(values)[60:].mean()) > 1e-3


def test_a_channel_that_is_constant_in_training_is_only_shifted() -> None:
    values = np.array([[0.1, 1.0], [0.1, 3.0], [0.1, 5.0]])
    scaler = SeriesScaler.fit(values)
    assert scaler.std[0] == 1
    np.testing.assert_allclose(scaler.transform(values)[:, 0], 0, atol=1e-15)


def test_scaler_refuses_nan_no_rows_and_other_channels() -> None:
    with pytest.raises(ValueError, match="finite"):
        SeriesScaler.fit(np.array([[1.0], [np.nan]]))
    with pytest.raises(ValueError, match=r"shape \(0, 2\)"):
        SeriesScaler.fit(np.zeros((0, 2)))
    scaler = SeriesScaler.fit(np.eye(2))
    with pytest.raises(ValueError, match="2 channels on the last axis"):
        scaler.transform(np.zeros((4, 3)))
    with pytest.raises(ValueError, match="2 channels on the last axis"):
        scaler.inverse(np.zeros((4, 3)))


def test_time_features_equal_pandas_fields() -> None:
    dates = pd.date_range("1999-12-25 00:07", "2001-03-05", freq="97min")
    expected = np.stack(
        [
            dates.minute / 59,
            dates.hour / 23,
            dates.day_of_week / 6,
            (dates.day - 1) / 30,
            (dates.day_of_year - 1) / 365,
        ],
        axis=-1,
    )
    marks = time_features(dates.to_numpy(), "t")
    np.testing.assert_allclose(marks, expected - 0.5, atol=1e-12)
    assert np.array_equal(time_features(dates.to_numpy(), "h"), marks[:, 1:])
    assert np.array_equal(time_features(dates.to_numpy(), "d"), marks[:, 2:])


def test_time_features_before_1970_and_at_the_ends_of_their_range() -> None:
    dates = np.array(["1968-12-29T23:59", "1968-01-01T00:00", "1968-12-31T23:59"], dtype="datetime64[s]")
    # A Sunday, a Monday, and the last day of a leap year (a Tuesday).
    assert time_features(dates, "t").tolist() == [
        [0.5, 0.5, 0.5, pytest.approx(28 / 30 - 0.5), pytest.approx(363 / 365 - 0.5)],
        [-0.5, -0.5, -0.5, -0.5, -0.5],
        [0.5, 0.5, pytest.approx(1 / 6 - 0.5), 0.5, 0.5],
    ]


def test_time_features_refuse_what_is_no_date() -> None:
    with pytest.raises(TypeError, match="datetime64, got int64"):
        time_features(np.arange(3))
    with pytest.raises(ValueError, match="'t', 'h' or 'd', got 'w'"):
        time_features(np.array(["2020-01-01"], dtype="datetime64[s]"), "w")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="NaT at 1"):
        time_features(np.array(["2020-01-01", "NaT"], dtype="datetime64[s]"))


def test_windows_join_inputs_targets_and_their_marks() -> None:
    values = np.arange(20.0).reshape(10, 2)
    windows = SeriesWindows(values, input_length=3, horizon=2, stride=2, marks=-np.arange(10.0)[:, None])
    assert len(windows) == 3
    window = windows[1]
    assert window.inputs.tolist() == [[4, 5], [6, 7], [8, 9]]
    assert window.targets.tolist() == [[10, 11], [12, 13]]
    assert window.input_marks.tolist() == [[-2], [-3], [-4]]
    assert window.target_marks.tolist() == [[-5], [-6]]
    assert window.inputs.dtype == torch.float32
    assert torch.equal(windows[-1].targets, windows[2].targets)


def test_every_window_that_fits_is_there() -> None:
    for rows in range(5, 12):
        windows = SeriesWindows(torch.arange(rows)[:, None].double(), 3, 2, stride=3, dtype=torch.float64)
        starts = [start for start in range(0, rows, 3) if start + 5 <= rows]
        assert [int(window.inputs[0, 0]) for window in windows] == starts
        assert windows[0].targets.dtype == torch.float64


def test_a_batch_and_a_data_loader_hold_the_items_of_their_indices() -> None:
    windows = SeriesWindows(np.random.default_rng(1).normal(size=(40, 3)), 5, 4, marks=np.eye(40)[:, :2])
    batch = windows.batch([7, 0, -1])
    for part, items in zip(batch, zip(windows[7], windows[0], windows[31], strict=True), strict=True):
        assert torch.equal(part, torch.stack(items))
    loaded = next(iter(DataLoader(windows, batch_size=3)))
    assert torch.equal(loaded.target_marks, windows.batch([0, 1, 2]).target_marks)
    plain = SeriesWindows(np.zeros((40, 3)), 5, 4)
    assert next(iter(DataLoader(plain, batch_size=3))).input_marks.shape == (3, 5, 0)


def test_windows_refuse_gaps_short_series_and_other_marks() -> None:
    values = np.zeros((10, 2))
    with pytest.raises(ValueError, match="input_length \\+ horizon = 11 rows, got 10"):
        SeriesWindows(values, 6, 5)
    with pytest.raises(ValueError, match="horizon must be positive"):
        SeriesWindows(values, 6, 0)
    with pytest.raises(ValueError, match="stride must be positive"):
        SeriesWindows(values, 2, 2, stride=0)
    with pytest.raises(ValueError, match="marks must have the 10 rows of values, got 9"):
        SeriesWindows(values, 2, 2, marks=np.zeros((9, 1)))
    with pytest.raises(ValueError, match=r"values must have shape \(time, channel\), got \(10,\)"):
        SeriesWindows(values[:, 0], 2, 2)
    values[4, 1] = np.nan
    with pytest.raises(ValueError, match="values must be finite, got nan at row 4, channel 1"):
        SeriesWindows(values, 2, 2)
    windows = SeriesWindows(np.zeros((10, 2)), 2, 2)
    for index in (7, -8):
        with pytest.raises(IndexError, match=f"got {index}"):
            windows[index]


def test_etth1_reads_whole(shared_dir: Path) -> None:
    folder = shared_dir / "data" / "ett"
    if not folder.is_dir():
        pytest.skip(f"{folder} is missing")
    series = read_ett(folder)
    assert series.values.shape == (17_420, 7)
    assert series.values[0, 0] == 5.827000141143799
    assert series.values[-1, -1] == 9.56700038909912
    assert str(series.timestamps[-1]) == "2018-06-26T19:00:00"
    splits = ett_splits(series)
    scaled = SeriesScaler.fit(series.values[splits.train]).transform(series.values)
    # The standardised oil temperature falls well below its training mean in the second year: the known shift of ETTh1.
    assert abs(scaled[splits.train].mean()) < 1e-9
    assert scaled[splits.test, -1].mean() < -0.5

"""The claim's experiments: sizes of the arms, the data, scores by hand, and that a cell gives the same numbers again."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from headgate.catalog import read_card
from headgate.data import SeriesScaler, TimeSeries, hourly_series, time_features
from headgate.errors import DataError
from headgate.methods.sequence.pgn import PGN, TPGN, bench, claim
from headgate.methods.sequence.pgn.claim import SCALES, ForecastScale, RecallScale, choose_rate, measure
from headgate.methods.sequence.pgn.contenders import (
    DLinear,
    Frame,
    Normalized,
    RecurrentCell,
    build_forecaster,
)
from headgate.methods.sequence.pgn.lag_recall import (
    RecallNet,
    gradient_by_lag,
    lag_batch,
    response_by_lag,
)
from headgate.timing import relative_difference
from headgate.train import count_parameters

CARD = read_card(Path(claim.__file__).parent / "card.toml", claim.__package__ or "")
RECALL_METRICS = {"mse", "mse_lag_8", "mse_lag_32", "mse_lag_96", "mse_worst_lag", "mse_beyond_16"}


def forecast_metrics(arm: str, settings: ForecastScale) -> set[str]:
    metrics = {"mse", "log_mse_mean", "growth"}
    metrics |= {f"{kind}_{horizon}" for kind in ("mse", "mae", "log_mse") for horizon in settings.widths}
    return metrics | ({"table_lowest", "table_highest"} if arm == "tpgn" and settings.published else set())


def test_arms_and_scales_are_those_of_the_card() -> None:
    assert set(SCALES) == set(CARD.claim.scales)
    for scale, settings in SCALES.items():
        assert set(settings.rates) == {arm.name for arm in CARD.claim.arms_at(scale)}
    assert {scale.seeds for scale in CARD.claim.scales.values()} == {2, 3, 5}


@pytest.mark.parametrize("scale", SCALES)
def test_every_criterion_s_metrics_are_measured_at_its_scales(scale: str) -> None:
    settings = SCALES[scale]
    assert CARD.claim.criteria_at(scale)
    for criterion in CARD.claim.criteria_at(scale):
        for arm in (criterion.arm, criterion.against, *criterion.controls):
            if arm is not None:
                known = RECALL_METRICS if isinstance(settings, RecallScale) else forecast_metrics(arm, settings)
                assert arm in settings.rates
                assert criterion.metric in known


def test_thresholds_are_those_of_the_paper_s_card() -> None:
    bounds = {
        criterion.name: (criterion.relation, criterion.value, criterion.margin)
        for criterion in CARD.claim.criteria_at("laptop")
    }
    assert bounds == {
        "recalls-all": ("below", 0.05, 0),
        "gru-recalls-near": ("below", 0.1, 0),
        "lstm-recalls-near": ("below", 0.1, 0),
        "gru-forgets-far": ("above", 0.7, 0),
        "lstm-forgets-far": ("above", 0.7, 0),
        "better-than-gru": ("below", None, 0.1),
        "better-than-lstm": ("below", None, 0.1),
        "truncated-recalls-near": ("below", 0.05, 0),
        "truncated-fails-beyond": ("above", 0.7, 0),
        "path-suffices": ("below", 0.05, 0),
    }
    margins = {criterion.name: criterion.margin for criterion in CARD.claim.criteria_at("forecasting")}
    assert margins["below-gru-168"] == margins["below-gru-720"] == pytest.approx(-math.log(0.9), abs=1e-4)
    assert margins["level-with-gru-cell"] == margins["level-with-lstm-cell"] == pytest.approx(-math.log(1.05), abs=1e-4)


def test_unknown_arms_and_scales_are_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match="arm must be one of pgn, gru, lstm, truncated, no_gate at scale smoke"):
        measure("tpgn", 0, "smoke")
    with pytest.raises(ValueError, match=r"scale must be one of smoke, laptop, .*, got 'huge'"):
        measure("pgn", 0, "huge")


# Lag recall.


def test_a_target_is_the_input_so_many_steps_before_and_lags_share_their_inputs() -> None:
    batch = lag_batch(3, 20, 5, 4, seed=1, stream="train", step=2)
    for place, step in enumerate(range(16, 20)):
        assert torch.equal(batch.targets[:, place], batch.inputs[:, step - 5, 0])
    assert torch.equal(batch.inputs, lag_batch(3, 20, 9, 4, seed=1, stream="train", step=2).inputs)
    assert not torch.equal(batch.inputs, lag_batch(3, 20, 5, 4, seed=1, stream="test", step=2).inputs)


def test_arms_of_lag_recall_are_equally_large() -> None:
    settings = SCALES["laptop"]
    assert isinstance(settings, RecallScale)
    counts = {arm: count_parameters(claim._recall_net(arm, 0, settings)) for arm in settings.rates}
    assert counts["pgn"] == 6305
    for arm, count in counts.items():
        assert count == pytest.approx(6305, rel=0.02), arm


def test_who_has_the_lag_in_its_kernel_is_right() -> None:
    settings = dataclasses.replace(smoke(), length=40, asked=4, num_test=200)
    net = RecallNet("no_gate", 1, 40, 4)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.zero_()
        net.cell.history.weight[0, 0, 39 - 12] = 1  # type: ignore[union-attr, index, operator]
        net.read.weight.fill_(1)
    assert claim._recall_error(net, 3, settings, 12, "test") == pytest.approx(0, abs=1e-10)
    assert claim._recall_error(net, 3, settings, 11, "test") == pytest.approx(2, rel=0.2)
    response = response_by_lag(net, lag_batch(5, 40, 12, 4, 0, "probes").inputs)
    assert torch.equal(response, F.one_hot(torch.tensor(11), 39).float())


def test_gradients_by_lag_are_norms_of_the_jacobian() -> None:
    torch.manual_seed(0)
    net, x = RecallNet("gru", 5, 9, 2), torch.randn(3, 9, 1)
    found = gradient_by_lag(net, x)
    expected = torch.zeros(8)
    for row in x:
        jacobian = torch.autograd.functional.jacobian(lambda t: net.encode(t[None])[0, -1], row)[:, :, 0]
        expected += torch.stack([jacobian[:, 8 - lag].norm() for lag in range(1, 9)]) / 3
    torch.testing.assert_close(found, expected)


def test_before_training_gradients_fade_along_the_chain_and_not_along_the_hop() -> None:
    probes = lag_batch(4, 128, 96, 16, 0, "probes").inputs
    torch.manual_seed(0)
    decay = {}
    for arm in ("pgn", "gru", "truncated"):
        reach = gradient_by_lag(RecallNet(arm, 24, 128, 16), probes)
        decay[arm] = (reach[95] / reach[7]).item()
    assert 0.5 < decay["pgn"] < 2
    assert decay["gru"] < 1e-6
    assert decay["truncated"] == 0


def smoke() -> RecallScale:
    settings = SCALES["smoke"]
    assert isinstance(settings, RecallScale)
    return settings


def test_a_cell_of_lag_recall_is_the_same_again_and_reports_every_lag(monkeypatch: pytest.MonkeyPatch) -> None:
    first, again = measure("pgn", 0, "smoke"), measure("pgn", 0, "smoke")
    assert first == again
    assert set(first.metrics) == RECALL_METRICS | {"gradient_decay"}
    errors = [first.metrics[f"mse_lag_{lag}"] for lag in (8, 32, 96)]
    assert first.metrics["mse_worst_lag"] == max(errors)
    assert first.metrics["mse_beyond_16"] == min(errors[1:])
    assert first.metrics["mse"] == errors[2]
    assert list(first.curves["error by lag"].y) == errors
    assert measure("pgn", 1, "smoke").metrics != first.metrics
    truncated = measure("truncated", 0, "smoke")
    assert "gradient_decay" not in truncated.metrics
    assert math.isnan(truncated.curves["gradient before training"].y[16])


def test_one_hop_learns_a_lag_that_a_short_kernel_cannot(monkeypatch: pytest.MonkeyPatch) -> None:
    small = RecallScale(
        dict.fromkeys(("pgn", "truncated"), 1e-2),
        150,
        100,
        {"pgn": 16, "truncated": 16},
        length=32,
        lags=(4, 24),
        asked=8,
    )
    monkeypatch.setitem(SCALES, "laptop", small)
    assert measure("pgn", 0, "laptop").metrics["mse"] < 0.3
    truncated = measure("truncated", 0, "laptop").metrics
    assert truncated["mse"] > 0.8
    assert truncated["mse_lag_4"] < 0.3


# Forecasts.


def test_folded_cells_and_single_branches_are_about_as_large_as_tpgn() -> None:
    frame = Frame()
    for horizon in (168, 720):
        wanted = count_parameters(build_forecaster("tpgn", frame, horizon, 16))
        for arm in ("fold_gru", "fold_lstm", "fold_mlp"):
            assert count_parameters(build_forecaster(arm, frame, horizon, 16)) == pytest.approx(wanted, rel=0.04)
        for arm in ("long_only", "short_only"):
            assert count_parameters(build_forecaster(arm, frame, horizon, 16)) == pytest.approx(wanted, rel=0.04)


@pytest.mark.parametrize("scale", ["forecasting", "etth1", "etth2", "paper"])
def test_baselines_without_a_fold_are_larger_than_tpgn(scale: str) -> None:
    settings = SCALES[scale]
    assert isinstance(settings, ForecastScale)
    for horizon, width in settings.widths.items():
        counts = {
            arm: count_parameters(build_forecaster(arm, settings.frame, horizon, width))
            for arm in ("tpgn", "gru", "dlinear")
        }
        assert min(counts["gru"], counts["dlinear"]) > counts["tpgn"]


def windows_of(seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, 168, 1, generator=generator), torch.randn(2, 168, 4, generator=generator)


@pytest.mark.parametrize("arm", SCALES["forecasting"].rates)
@pytest.mark.parametrize("normalize", [False, True])
def test_every_forecaster_gives_its_horizon_and_standardised_ones_follow_the_level(arm: str, normalize: bool) -> None:
    torch.manual_seed(0)
    model = build_forecaster(arm, Frame(normalize=normalize), 30, 3)
    x, marks = windows_of()
    assert model(x, marks).shape == (2, 30, 1)
    moved = model(x + 10, marks) - model(x, marks)
    follows = torch.allclose(moved, torch.full_like(moved, 10), atol=1e-3)
    assert follows == normalize
    assert isinstance(model, TPGN | Normalized) or not normalize


def test_dlinear_is_two_linear_maps_of_trend_and_rest() -> None:
    torch.manual_seed(0)
    model = DLinear(Frame(moving_average=5), 7)
    x, marks = windows_of()
    values = x[..., 0]
    padded = torch.cat([values[:, :1].expand(2, 2), values, values[:, -1:].expand(2, 2)], dim=1)
    trend = torch.stack([padded[:, start : start + 5].mean(dim=1) for start in range(168)], dim=1)
    expected = F.linear(trend, model.trend.weight, model.trend.bias)
    expected = expected + F.linear(values - trend, model.rest.weight, model.rest.bias)
    torch.testing.assert_close(model(x, marks)[..., 0], expected)


def test_a_cell_in_pgn_s_place_sees_values_and_marks_of_every_phase() -> None:
    torch.manual_seed(0)
    model = build_forecaster("fold_gru", Frame(), 24, 5)
    assert isinstance(model, TPGN)
    cell = model.long_range.cell
    assert isinstance(cell, RecurrentCell)
    x, marks = torch.randn(4, 7, 1), torch.randn(4, 7, 4)
    torch.testing.assert_close(cell(x, marks), cell.layer(torch.cat([x, marks], dim=2))[0])
    torch.testing.assert_close(cell(torch.cat([x, marks], dim=2)), cell(x, marks))
    stepwise = build_forecaster("fold_mlp", Frame(), 24, 5)
    assert isinstance(stepwise, TPGN)
    changed = x.clone()
    changed[:, 3] += 1
    moved = stepwise.long_range.cell(x, marks) != stepwise.long_range.cell(changed, marks)
    assert moved.any(dim=2).all(dim=0).tolist() == [step == 3 for step in range(7)]


def test_parts_are_cut_in_time_and_scaled_by_the_training_rows() -> None:
    settings = SCALES["forecasting"]
    assert isinstance(settings, ForecastScale)
    parts = claim._parts(settings, 2, 168)
    series = hourly_series(4000, 2)
    scaled = SeriesScaler.fit(series.values[:2400]).transform(series.values)
    assert [len(part) for part in parts] == [2400 - 335, 800 - 167, 800 - 167]
    first = parts.test[0]
    np.testing.assert_allclose(first.inputs, scaled[3200 - 168 : 3200], atol=1e-6)
    np.testing.assert_allclose(first.targets, scaled[3200:3368], atol=1e-6)
    np.testing.assert_allclose(first.input_marks, time_features(series.timestamps)[3200 - 168 : 3200], atol=1e-6)


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> ForecastScale:
    settings = ForecastScale(
        series=lambda seed: hourly_series(400, seed, noise=0.05),
        rates={"tpgn": 1e-2, "gru": 1e-2},
        widths={4: 3, 10: 3},
        training=lambda *arguments: claim._train_steps(*arguments, steps=25),
        frame=Frame(seq_len=12, period=4, recurrent_size=4),
    )
    monkeypatch.setitem(SCALES, "forecasting", settings)
    return settings


def test_a_cell_of_forecasts_is_the_same_again_and_scored_by_hand(tiny: ForecastScale) -> None:
    first, again = measure("tpgn", 0, "forecasting"), measure("tpgn", 0, "forecasting")
    assert first.metrics == again.metrics
    assert set(first.metrics) == forecast_metrics("tpgn", tiny)
    parts = claim._parts(tiny, 0, 10)
    model, _ = claim._train_forecasts("tpgn", 0, tiny, parts, 10, 1e-2)
    batch = parts.test.batch(range(len(parts.test)))
    with torch.no_grad():
        gaps = model(batch.inputs, batch.input_marks) - batch.targets
    assert first.metrics["mse_10"] == pytest.approx(gaps.square().mean().item(), rel=1e-4)
    assert first.metrics["mae_10"] == pytest.approx(gaps.abs().mean().item(), rel=1e-4)
    assert first.metrics["growth"] == pytest.approx(math.log(first.metrics["mse_10"] / first.metrics["mse_4"]))
    assert len(first.curves["error by lead time, horizon 10"].x) == 3
    assert set(first.pictures) == {"forecast"}
    assert not measure("gru", 0, "forecasting").pictures


def test_rates_are_chosen_on_validation_and_not_on_test(tiny: ForecastScale, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claim, "RATES", (1e-5, 1e-2))
    found = choose_rate("tpgn", "forecasting", seeds=(100,))
    assert found[1e-2] < found[1e-5]
    parts = claim._parts(tiny, 100, 4)
    model, _ = claim._train_forecasts("tpgn", 100, tiny, parts, 4, 1e-2)
    assert found[1e-2] == pytest.approx(claim.forecast_windows(model, parts.validation).mse)
    short = dataclasses.replace(smoke(), num_test=8)
    monkeypatch.setitem(SCALES, "smoke", short)
    assert set(choose_rate("pgn", "smoke")) == {1e-5, 1e-2}


def write(path: Path, columns: str, rows: int, width: int) -> None:
    hours = np.datetime64("2016-07-01T00:00:00") + np.arange(rows).astype("timedelta64[h]")
    day = np.sin(np.arange(rows) * np.pi / 12)
    lines = [
        f"{str(hour).replace('T', ' ')},{','.join([f'{value:.4f}'] * width)}"
        for hour, value in zip(hours, day, strict=True)
    ]
    path.write_text("\n".join([f"date,{columns}", *lines]) + "\n")


@pytest.mark.parametrize(
    ("scale", "folder", "file", "columns"),
    [
        ("etth1", "ett", "ETTh1.csv", "HUFL,HULL,MUFL,MULL,LUFL,LULL,OT"),
        ("etth2", "ett", "ETTh2.csv", "HUFL,HULL,MUFL,MULL,LUFL,LULL,OT"),
        ("paper", "ecl", "ECL.csv", "MT_000,MT_320"),
    ],
)
def test_real_series_are_read_from_their_own_or_the_shared_folder(
    scale: str, folder: str, file: str, columns: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = SCALES[scale]
    assert isinstance(settings, ForecastScale)
    variable = f"HEADGATE_{folder.upper()}"
    monkeypatch.delenv(variable, raising=False)
    monkeypatch.delenv("HEADGATE_SHARED", raising=False)
    with pytest.raises(DataError, match=f"{folder} was not found; set {variable}"):
        measure("tpgn", 0, scale)
    (tmp_path / "data" / folder).mkdir(parents=True)
    write(tmp_path / "data" / folder / file, columns, 60, columns.count(",") + 1)
    monkeypatch.setenv("HEADGATE_SHARED", str(tmp_path))
    shared = settings.series(0)
    assert isinstance(shared, TimeSeries)
    assert shared.values.shape == (60, 1)
    assert shared.columns == ("MT_320" if scale == "paper" else "OT",)
    monkeypatch.setenv(variable, str(tmp_path / "data" / folder))
    monkeypatch.delenv("HEADGATE_SHARED")
    assert np.array_equal(settings.series(1).values, shared.values)


def test_the_recipe_of_the_paper_is_held_against_its_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "ETTh1.csv", "HUFL,HULL,MUFL,MULL,LUFL,LULL,OT", 300, 7)
    monkeypatch.setenv("HEADGATE_ETT", str(tmp_path))
    settings = SCALES["etth1"]
    assert isinstance(settings, ForecastScale)
    small = dataclasses.replace(
        settings, widths={24: 2, 30: 2}, published={24: 0.5, 30: 0.25}, frame=Frame(seq_len=48, normalize=True)
    )
    monkeypatch.setitem(SCALES, "etth1", small)
    found = measure("tpgn", 0, "etth1").metrics
    ratios = sorted([found["mse_24"] / 0.5, found["mse_30"] / 0.25])
    assert [found["table_lowest"], found["table_highest"]] == pytest.approx(ratios)
    assert set(measure("fold_lstm", 0, "etth1").metrics) == forecast_metrics("fold_lstm", small)


# The benchmark.


def test_the_benchmark_times_the_same_work_for_both_ways_through_the_history() -> None:
    results = {}
    for contender in ("history_convolution", "history_fft"):
        results[contender] = bench.build(contender, 12, batch=2).prepare()()
    assert relative_difference(results["history_convolution"], results["history_fft"]) < 1e-5
    output, *gradients = bench.build("pgn", 12, batch=2, input_size=3, hidden_size=4).prepare()()
    assert output.shape == (2, 12, 4)
    cell = PGN(3, 4, 12)
    assert [g.shape for g in gradients] == [torch.Size([2, 12, 3]), *(p.shape for p in cell.parameters())]
    recurrent = bench.build("gru", 12, batch=2).prepare()()
    assert len(recurrent) == 2 + len(list(nn.GRU(1, 32).parameters()))


def test_the_benchmark_covers_the_lengths_that_were_asked_for_and_refuses_others() -> None:
    plan = bench.plan(bench.Settings(lengths=(256, 64), batch=4))
    assert plan.tasks[0].sizes == (64, 256)
    assert {contender.name for contender in plan.tasks[0].contenders} >= {"pgn", "gru", "lstm"}
    assert plan.tasks[0].work is not None
    assert plan.tasks[0].work(64) == 256
    with pytest.raises(ValueError, match="lengths must be at least 2"):
        bench.Settings(lengths=(1,))
    with pytest.raises(ValueError, match="batch must be positive"):
        bench.Settings(batch=0)

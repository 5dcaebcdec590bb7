"""TPGN: the fold, the read-out, channels, windows that are standardised, and the published names."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from torch import Tensor

import headgate as hg
from headgate import TPGN, TPGNForTimeSeriesLibrary
from headgate.errors import DataError
from headgate.methods.sequence.pgn.official import (
    build_long_range,
    build_tpgn,
    convert_state_dict,
    rename,
)

OPTIONS = {"seq_len": 12, "pred_len": 8, "TPGN_period": 4, "enc_in": 2, "d_model": 3, "freq": "d", "norm": 1}


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def model(seed: int = 1, **sizes: object) -> TPGN:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return TPGN(**{"seq_len": 12, "pred_len": 8, "period": 4, "d_model": 3, "n_marks": 2, **sizes}).double()  # type: ignore[arg-type]


def test_a_forecast_is_read_phase_by_phase_from_both_branches_short_first() -> None:
    forecaster = model()
    x, marks = normal(2, 12, 1), normal(2, 12, 2, seed=1)
    table, table_marks = x.reshape(2, 3, 4, 1), marks.reshape(2, 3, 4, 2)
    long, short = forecaster.long_range(table, table_marks), forecaster.short_range(table, table_marks)
    weight, bias = forecaster.readout.weight[..., 0], forecaster.readout.bias
    expected = torch.zeros(2, 8, dtype=torch.float64)
    for step in range(8):
        row, phase = divmod(step, 4)
        expected[:, step] = torch.cat([short, long[..., phase]], dim=1) @ weight[row] + bias[row]
    torch.testing.assert_close(forecaster(x, marks)[..., 0], expected)


def test_a_horizon_of_no_whole_periods_is_cut_from_whole_ones() -> None:
    whole, cut = model(pred_len=12), model(pred_len=10)
    cut.load_state_dict(whole.state_dict())
    x, marks = normal(2, 12, 1), normal(2, 12, 2, seed=1)
    assert cut(x, marks).shape == (2, 10, 1)
    assert torch.equal(cut(x, marks), whole(x, marks)[:, :10])


def test_channels_have_their_own_weights_and_do_not_see_each_other() -> None:
    forecaster = model(n_channels=3)
    x, marks = normal(2, 12, 3), normal(2, 12, 2, seed=1)
    other = x.clone()
    other[..., 1] += 1
    different = (forecaster(x, marks) != forecaster(other, marks)).flatten(0, 1).any(dim=0)
    assert different.tolist() == [False, True, False]
    same = x[..., :1].expand(-1, -1, 3)
    forecasts = forecaster(same, marks)
    assert not torch.allclose(forecasts[..., 0], forecasts[..., 1])


def test_a_channel_of_many_equals_a_model_of_one_with_its_weights() -> None:
    many, one = model(n_channels=3, normalize=True), model(normalize=True)
    own = {}
    for name, tensor in many.state_dict().items():
        size = tensor.shape[0] // 3
        own[name] = tensor[size : 2 * size]
    one.load_state_dict(own)
    x, marks = normal(2, 12, 3), normal(2, 12, 2, seed=1)
    torch.testing.assert_close(many(x, marks)[..., 1:2], one(x[..., 1:2], marks))


@pytest.mark.parametrize("n_marks", [0, 2])
def test_shared_weights_treat_every_channel_as_a_series_of_its_own(n_marks: int) -> None:
    shared = model(n_channels=3, channel_shared=True, normalize=True, n_marks=n_marks)
    one = model(normalize=True, n_marks=n_marks)
    one.load_state_dict(shared.state_dict())
    x, marks = normal(2, 12, 3), normal(2, 12, n_marks, seed=1)
    forecasts = shared(x, marks)
    assert forecasts.shape == (2, 8, 3)
    for channel in range(3):
        torch.testing.assert_close(forecasts[..., channel : channel + 1], one(x[..., channel : channel + 1], marks))


def test_a_standardised_forecast_moves_and_scales_with_its_window() -> None:
    forecaster = model(normalize=True)
    x, marks = normal(2, 12, 1), normal(2, 12, 2, seed=1)
    moved = forecaster(1e3 * x + 50, marks)
    torch.testing.assert_close(moved, 1e3 * forecaster(x, marks) + 50, rtol=1e-3, atol=1e-1)
    plain = model()
    assert not torch.allclose(plain(x + 50, marks), plain(x, marks) + 50, atol=1.0)


def test_a_constant_window_is_continued_by_its_level_up_to_the_small_deviation() -> None:
    forecaster = model(normalize=True)
    flat = torch.full((1, 12, 1), 7.0, dtype=torch.float64)
    forecast = forecaster(flat, normal(1, 12, 2))
    assert (forecast - 7).abs().max() < 3 * 1e-5**0.5


def test_without_marks_none_and_width_zero_are_the_same() -> None:
    forecaster = model(n_marks=0)
    x = normal(2, 12, 1)
    assert torch.equal(forecaster(x), forecaster(x, x[..., :0]))


def test_fewer_lags_hide_the_first_periods_from_pgn() -> None:
    forecaster = model(lags=1)
    assert forecaster.long_range.cell.lags == 1
    table = normal(1, 3, 4, 1)
    encoded = forecaster.long_range.cell.extract_history(table[:, :, 0], normal(1, 3, 2))  # type: ignore[operator]
    table[:, 0] += 1
    again = forecaster.long_range.cell.extract_history(table[:, :, 0], normal(1, 3, 2))  # type: ignore[operator]
    assert (encoded != again)[0].any(dim=1).tolist() == [False, True, False]


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"seq_len": 13}, "seq_len must be a multiple of period, got seq_len=13, period=4"),
        ({"period": 0}, r"period must lie in \[1, seq_len=12\], got 0"),
        ({"period": 13}, r"period must lie in \[1, seq_len=12\], got 13"),
        ({"period": 12}, "seq_len must hold at least two periods"),
        ({"pred_len": 0}, "pred_len must be positive"),
        ({"d_model": 0}, "d_model must be positive"),
        ({"n_channels": 0}, "n_channels must be positive"),
        ({"n_marks": -1}, "n_marks must not be negative"),
        ({"lags": 3}, r"lags must lie in \[1, 2\]"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(sizes: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        model(**sizes)


def test_windows_marks_and_gaps_that_do_not_fit_are_refused() -> None:
    forecaster = model()
    x, marks = normal(2, 12, 1), normal(2, 12, 2)
    with pytest.raises(ValueError, match="x must have seq_len=12"):
        forecaster(normal(2, 16, 1), normal(2, 16, 2))
    with pytest.raises(ValueError, match="x_marks must have mark=2"):
        forecaster(x, normal(2, 12, 4))
    with pytest.raises(ValueError, match=r"x_marks must be given.*n_marks=0 makes a model without them"):
        forecaster(x)
    with pytest.raises(ValueError, match="x_marks must have mark=0"):
        model(n_marks=0)(x, marks)
    x[1, 3, 0] = torch.nan
    with pytest.raises(ValueError, match=r"x must be finite, got nan at \(1, 3, 0\); fill gaps"):
        forecaster(x, marks)
    marks[0, 2, 1] = torch.inf
    with pytest.raises(ValueError, match=r"x_marks must be finite, got inf at \(0, 2, 1\)"):
        forecaster(normal(2, 12, 1), marks)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("tpgn_ecl_168", 22_151),
        ("tpgn_ecl_1440", 25_596),
        ("tpgn_traffic_1440", 1_121_852),
        ("tpgn_etth1_168", 431),
        ("tpgn_weather_168", 983),
    ],
)
def test_presets_have_the_published_sizes(name: str, parameters: int) -> None:
    preset = hg.create_model(name)
    assert sum(parameter.numel() for parameter in preset.parameters()) == parameters
    assert (preset.seq_len, preset.period, preset.n_marks) == (168, 24, 4)
    assert preset.normalize == name.startswith(("tpgn_traffic", "tpgn_etth1"))


def test_there_is_a_preset_for_every_set_and_horizon() -> None:
    expected = {
        f"tpgn_{data}_{h}" for data in ("ecl", "traffic", "etth1", "etth2", "weather") for h in (168, 336, 720, 1440)
    }
    assert set(hg.list_models("tpgn_*")) == expected


def test_a_saved_model_comes_back_as_it_was_and_other_weights_are_refused(tmp_path: Path) -> None:
    saved = TPGN(12, 10, 4, d_model=3, n_channels=2, n_marks=2, normalize=True, lags=1).eval()
    saved.save_pretrained(tmp_path)
    back = TPGN.from_pretrained(tmp_path)
    assert not back.training
    assert (back.pred_len, back.normalize, back.long_range.cell.lags) == (10, True, 1)
    x, marks = normal(2, 12, 2).float(), normal(2, 12, 2, seed=1).float()
    assert torch.equal(back(x, marks), saved(x, marks))
    assert json.loads((tmp_path / "config.json").read_text())["d_model"] == 3
    with pytest.raises(DataError, match="does not fit TPGN"):
        TPGN.from_pretrained(tmp_path, d_model=4)


# The published code.


def test_published_options_and_names_are_ours() -> None:
    ours = build_tpgn({**OPTIONS, "c_out": 1, "dropout": 0.1})
    assert (ours.seq_len, ours.pred_len, ours.period, ours.d_model, ours.n_channels) == (12, 8, 4, 3, 2)
    assert (ours.n_marks, ours.normalize) == (3, True)
    published = {}
    modules = {
        "LNN_dim.hidden_MLP": (6, 4, 2), "LNN_dim.gate": (12, 7, 1), "LNN_dim.fc": (6, 3, 3),
        "s_t_p_e.fc_row": (6, 4, 4), "s_t_p_e.fc_col": (6, 3, 3), "fc": (4, 6, 1),
    }  # fmt: skip
    for number, (name, shape) in enumerate(modules.items()):
        published[f"module.TPGN.{name}.weight"] = normal(*shape, seed=number)
        published[f"module.TPGN.{name}.bias"] = normal(shape[0], seed=number)
    converted = convert_state_dict(published)
    ours.double().load_state_dict(converted)
    assert torch.equal(ours.long_range.cell.history.weight, published["module.TPGN.LNN_dim.hidden_MLP.weight"])  # type: ignore[arg-type]
    assert torch.equal(ours.short_range.within.bias, published["module.TPGN.s_t_p_e.fc_row.bias"])
    assert rename("hidden_MLP.weight") == "cell.history.weight"


def test_the_published_cell_takes_its_window_as_lags() -> None:
    branch = build_long_range({"seq_R": 7, "windows_size": 4, "c_in": 2, "c_out": 3, "freq": "t"})
    assert (branch.cell.window, branch.cell.lags, branch.cell.groups, branch.cell.extra_features) == (7, 4, 2, 5)
    assert branch.combine.weight.shape == (6, 3, 7)


def test_unknown_options_and_names_are_refused() -> None:
    with pytest.raises(ValueError, match="freq must be one of t, h, d, got 'm'"):
        build_tpgn({**OPTIONS, "freq": "m"})
    with pytest.raises(ValueError, match="options must hold 'seq_len', got freq"):
        build_tpgn({"freq": "h"})
    for name in ("TPGN.LNN_dim.attention.weight", "TPGN.fc.scale", "weight"):
        with pytest.raises(ValueError, match=f"'{name}' is no weight"):
            convert_state_dict({name: torch.zeros(1)})


def test_time_series_library_calls_it_with_what_it_calls_every_model() -> None:
    adapter = TPGNForTimeSeriesLibrary(Namespace(**OPTIONS, task_name="long_term_forecast", label_len=6)).double()
    x, marks = normal(2, 12, 2), normal(2, 12, 3)
    expected = adapter.model(x, marks)
    assert torch.equal(adapter(x, marks, normal(2, 14, 2), normal(2, 14, 3)), expected)
    assert torch.equal(adapter(x, marks, None, None, None), expected)
    with pytest.raises(ValueError, match="x_dec must have width=2"):
        adapter(x, marks, normal(2, 14, 3), normal(2, 14, 3))
    with pytest.raises(ValueError, match="x_enc must have seq_len=12"):
        adapter(normal(2, 10, 2), marks)

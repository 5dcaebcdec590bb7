"""PGN against its equations as a loop; its path, its groups, and the branches of TPGN."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from headgate import PGN, LongRangeBranch, ShortRangeBranch
from headgate.methods.sequence.pgn.history import (
    FFT_FROM_LAGS,
    history_by_convolution,
    history_by_fft,
    past,
)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def layer(**sizes: int) -> PGN:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return PGN(**sizes).double()


def by_equations(cell: PGN, x: Tensor, marks: Tensor | None) -> tuple[Tensor, Tensor]:
    """H and the output, window by window, group by group, step by step."""
    width, values = cell.hidden_size // cell.groups, cell.input_size // cell.groups
    history = torch.zeros(*x.shape[:2], cell.hidden_size, dtype=x.dtype)
    output = torch.zeros_like(history)
    for row in range(len(x)):
        for group in range(cell.groups):
            own = slice(group * width, (group + 1) * width)
            w_hie, b_hie = cell.history.weight[own], cell.history.bias[own]
            both = slice(2 * group * width, 2 * (group + 1) * width)
            w_gate, b_gate = cell.gate.weight[both, :, 0], cell.gate.bias[both]
            features = x[row, :, group * values : (group + 1) * values]
            if marks is not None:
                features = torch.cat([features, marks[row]], dim=1)
            for t in range(cell.window):
                h = b_hie.clone()
                for lag in range(1, min(t, cell.lags) + 1):
                    h = h + w_hie[:, :, cell.lags - lag] @ features[t - lag]
                z = w_gate @ torch.cat([features[t], h]) + b_gate
                gate, candidate = torch.sigmoid(z[:width]), torch.tanh(z[width:])
                history[row, t, own] = h
                output[row, t, own] = gate * h + (1 - gate) * candidate
    return history, output


@pytest.mark.parametrize(
    "sizes",
    [
        {"input_size": 1, "hidden_size": 3, "window": 2},
        {"input_size": 3, "hidden_size": 4, "window": 7},
        {"input_size": 2, "hidden_size": 4, "window": 6, "extra_features": 3},
        {"input_size": 4, "hidden_size": 6, "window": 5, "extra_features": 1, "groups": 2},
        {"input_size": 2, "hidden_size": 3, "window": 9, "lags": 4},
    ],
)
def test_it_computes_the_equations(sizes: dict[str, int]) -> None:
    cell = layer(**sizes)
    x = normal(2, cell.window, cell.input_size)
    marks = normal(2, cell.window, cell.extra_features, seed=1) if cell.extra_features else None
    history, output = by_equations(cell, x, marks)
    torch.testing.assert_close(cell.extract_history(x, marks), history)
    torch.testing.assert_close(cell(x, marks), output)


@pytest.mark.parametrize(("lags", "length", "groups"), [(1, 1, 1), (4, 9, 1), (8, 9, 3), (8, 5, 1), (511, 520, 1)])
def test_the_fourier_path_equals_the_convolution_with_gradients(lags: int, length: int, groups: int) -> None:
    results = []
    for path in (history_by_convolution, history_by_fft):
        x = normal(2, 3 * groups, length).requires_grad_()
        weight, bias = normal(2 * groups, 3, lags, seed=1).requires_grad_(), normal(2 * groups, seed=2).requires_grad_()
        y = path(x, weight, bias, groups)
        (y * normal(*y.shape, seed=3)).sum().backward()
        results.append((y, x.grad, weight.grad, bias.grad))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


def test_long_windows_go_through_the_fourier_transform(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib

    history = importlib.import_module("headgate.methods.sequence.pgn.history")
    taken: list[int] = []
    monkeypatch.setattr(history, "history_by_fft", lambda x, w, b, groups: taken.append(w.shape[2]))
    for lags in (FFT_FROM_LAGS - 1, FFT_FROM_LAGS):
        past(normal(1, 1, lags + 1), normal(2, 1, lags), None)
    assert taken == [FFT_FROM_LAGS]


def test_without_a_bias_there_is_none() -> None:
    x, weight = normal(1, 2, 6), normal(3, 2, 4, seed=1)
    assert (past(x, weight, None)[..., 0] == 0).all()
    torch.testing.assert_close(history_by_fft(x, weight, None), past(x, weight, None))


def test_history_leaves_the_current_step_out_and_the_output_sees_it() -> None:
    cell = layer(input_size=2, hidden_size=4, window=8)
    x = normal(1, 8, 2)
    changed = x.clone()
    changed[:, 5] += 1
    history = cell.extract_history(x) != cell.extract_history(changed)
    assert not history[:, :6].any()
    assert history[:, 6:].all()
    output = cell(x) != cell(changed)
    assert not output[:, :5].any()
    assert output[:, 5:].all()
    torch.testing.assert_close(cell.extract_history(x)[0, 0], cell.history.bias)


def test_one_hop_leads_from_the_first_step_to_the_last_and_the_kernel_is_the_same_for_all() -> None:
    cell = layer(input_size=1, hidden_size=3, window=50)
    impulse = torch.zeros(1, 50, 1, dtype=torch.float64)
    impulse[0, 4] = 1
    response = cell.extract_history(impulse)[0] - cell.history.bias
    torch.testing.assert_close(response[5:], cell.history.weight[:, 0].flip(1)[:, :45].T)
    x = normal(1, 50, 1).requires_grad_()
    cell(x)[0, -1].sum().backward()
    assert x.grad is not None
    sizes = x.grad[0, :, 0].abs()
    assert sizes[:10].mean() > 0.3 * sizes[-11:-1].mean()


def test_an_open_gate_hands_history_on_and_a_closed_one_the_candidate() -> None:
    cell = layer(input_size=1, hidden_size=2, window=6)
    x = normal(2, 6, 1)
    nn.init.zeros_(cell.gate.weight)
    with torch.no_grad():
        cell.gate.bias.copy_(torch.tensor([50.0, 50.0, 0.3, -0.3]))
    torch.testing.assert_close(cell(x), cell.extract_history(x))
    with torch.no_grad():
        cell.gate.bias[:2] = -50.0
    torch.testing.assert_close(cell(x), torch.tensor([0.3, -0.3], dtype=torch.float64).tanh().expand(2, 6, 2))


def test_groups_see_themselves_and_the_marks_alone() -> None:
    cell = layer(input_size=2, hidden_size=4, window=5, extra_features=1, groups=2)
    x, marks = normal(1, 5, 2), normal(1, 5, 1, seed=1)
    other = x.clone()
    other[..., 0] += 1
    different = cell(x, marks) != cell(other, marks)
    assert different[..., :2].any()
    assert not different[..., 2:].any()
    assert (cell(x, marks) != cell(x, marks + 1)).any(dim=1).all()


def test_it_stands_in_the_place_of_a_gru() -> None:
    x = normal(3, 12, 5, dtype=torch.float32)
    outputs, _ = nn.GRU(5, 8, batch_first=True)(x)
    assert PGN(5, 8, 12)(x).shape == outputs.shape
    assert "5, 8, window=12, lags=11" in repr(PGN(5, 8, 12))
    assert "extra_features=2, groups=5" in repr(PGN(5, 10, 12, 2, 5))


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"window": 1}, "window must be at least 2, got 1"),
        ({"input_size": 0}, "input_size must be positive"),
        ({"hidden_size": 0}, "hidden_size must be positive"),
        ({"extra_features": -1}, "extra_features must not be negative"),
        ({"groups": 0}, "groups must be positive"),
        ({"groups": 4}, "groups must divide input_size"),
        ({"groups": 3}, "groups must divide hidden_size"),
        ({"lags": 0}, r"lags must lie in \[1, 9\]"),
        ({"lags": 10}, r"lags must lie in \[1, 9\]"),
    ],
)
def test_sizes_out_of_range_are_refused(sizes: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PGN(**{"input_size": 3, "hidden_size": 4, "window": 10, **sizes})


def test_windows_of_another_length_marks_out_of_place_and_gaps_are_refused() -> None:
    cell = layer(input_size=1, hidden_size=2, window=6)
    with pytest.raises(ValueError, match="x must have window=6"):
        cell(normal(1, 7, 1))
    with pytest.raises(ValueError, match="marks must have extra_features=0"):
        cell(normal(1, 6, 1), normal(1, 6, 2))
    gap = normal(1, 6, 1)
    gap[0, 3] = torch.inf
    with pytest.raises(ValueError, match=r"x must be finite, got inf at \(0, 3, 0\)"):
        cell(gap)
    marked = layer(input_size=1, hidden_size=2, window=6, extra_features=2)
    with pytest.raises(ValueError, match="marks must be given"):
        marked(normal(1, 6, 1))
    marks = normal(1, 6, 2)
    marks[0, 0, 1] = torch.nan
    with pytest.raises(ValueError, match=r"marks must be finite, got nan at \(0, 0, 1\)"):
        marked(normal(1, 6, 1), marks)


def test_the_meta_device_has_no_values_to_look_at() -> None:
    with torch.device("meta"):
        cell = PGN(1, 2, 6)
        assert cell(torch.zeros(3, 6, 1)).shape == (3, 6, 2)


# The branches.


def test_the_long_range_branch_reads_every_phase_along_the_periods() -> None:
    torch.manual_seed(0)
    branch = LongRangeBranch(3, 4, n_channels=2, n_marks=1).double()
    table, marks = normal(2, 3, 5, 2), normal(2, 3, 5, 1, seed=1)
    found = branch(table, marks)
    assert found.shape == (2, 8, 5)
    cell = branch.cell
    for phase in range(5):
        encoded = cell(table[:, :, phase], marks[:, :, phase])
        for channel in range(2):
            own = slice(4 * channel, 4 * channel + 4)
            weight, bias = branch.combine.weight[own], branch.combine.bias[own]
            expected = torch.einsum("brd,edr->be", encoded[..., own], weight) + bias
            torch.testing.assert_close(found[:, own, phase], expected)


def test_the_short_range_branch_reads_every_period_inside() -> None:
    torch.manual_seed(0)
    branch = ShortRangeBranch(3, 5, 4, n_channels=2, n_marks=1).double()
    table, marks = normal(2, 3, 5, 2), normal(2, 3, 5, 1, seed=1)
    found = branch(table, marks)
    assert found.shape == (2, 8)
    for channel in range(2):
        own = slice(4 * channel, 4 * channel + 4)
        features = torch.cat([table[..., channel : channel + 1], marks], dim=-1)
        within = torch.einsum("brpf,efp->bre", features, branch.within.weight[own]) + branch.within.bias[own]
        expected = torch.einsum("bre,der->bd", within, branch.combine.weight[own]) + branch.combine.bias[own]
        torch.testing.assert_close(found[:, own], expected)


def test_branches_refuse_other_tables() -> None:
    long, short = LongRangeBranch(3, 4, n_marks=2), ShortRangeBranch(3, 5, 4, n_marks=2)
    table, marks = torch.zeros(1, 3, 5, 1), torch.zeros(1, 3, 5, 2)
    for branch in (long, short):
        with pytest.raises(ValueError, match="table must have period=3"):
            branch(table[:, :2], marks[:, :2])
        with pytest.raises(ValueError, match="marks must be given"):
            branch(table)
        with pytest.raises(ValueError, match="marks must have mark=2"):
            branch(table, marks[..., :1])
    with pytest.raises(ValueError, match="table must have phase=5"):
        short(torch.zeros(1, 3, 6, 1), torch.zeros(1, 3, 6, 2))

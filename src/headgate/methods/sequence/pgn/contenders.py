"""What TPGN is held against: other cells in its frame, one branch alone, and forecasters without a fold.

All are called as TPGN is, with windows and their time marks, and forecast one channel.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from headgate.methods.sequence.pgn.branches import LongRangeBranch, ShortRangeBranch
from headgate.methods.sequence.pgn.model import TPGN
from headgate.nn import window_statistics
from headgate.train import count_parameters

__all__ = [
    "DLinear",
    "Frame",
    "Normalized",
    "OneBranch",
    "RecurrentCell",
    "RecurrentForecaster",
    "StepwiseCell",
    "build_forecaster",
]


@dataclass(frozen=True)
class Frame:
    """What all forecasters of an experiment share.

    Attributes:
        seq_len: steps of a window.
        period: steps of a period.
        n_marks: time marks at each step.
        normalize: whether each window is standardised.
        recurrent_size: hidden units of the recurrent network without a fold.
        moving_average: steps that DLinear takes for the trend.
    """

    seq_len: int = 168
    period: int = 24
    n_marks: int = 4
    normalize: bool = False
    recurrent_size: int = 26
    moving_average: int = 25


class RecurrentCell(nn.Module):
    """A recurrent layer in the place of PGN.

    Args:
        layer: batch first, of values and marks.
    """

    def __init__(self, layer: nn.RNNBase) -> None:
        super().__init__()
        self.layer = layer

    def forward(
        self, x: Float[Tensor, "batch window 1"], marks: Float[Tensor, "batch window mark"] | None = None
    ) -> Float[Tensor, "batch window hidden"]:
        """The layer's outputs at every step."""
        return self.layer(_beside(x, marks))[0]


class StepwiseCell(nn.Module):
    """A small network that sees one step alone, in the place of PGN.

    Args:
        features: values and marks at each step.
        inner_size: hidden units.
        hidden_size: outputs.
    """

    def __init__(self, features: int, inner_size: int, hidden_size: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(features, inner_size), nn.Tanh(), nn.Linear(inner_size, hidden_size), nn.Tanh()
        )

    def forward(
        self, x: Float[Tensor, "batch window 1"], marks: Float[Tensor, "batch window mark"] | None = None
    ) -> Float[Tensor, "batch window hidden"]:
        """Outputs at every step."""
        return self.layers(_beside(x, marks))


class OneBranch(nn.Module):
    """TPGN with one of its branches, wider, in the place of both.

    Args:
        branch: ``"long"`` or ``"short"``.
        frame: sizes that are shared.
        pred_len: steps to forecast.
        d_model: width of the branch.
    """

    def __init__(self, branch: str, frame: Frame, pred_len: int, d_model: int) -> None:
        super().__init__()
        self.fold = (frame.seq_len // frame.period, frame.period)
        self.pred_len = pred_len
        self.branch = (
            LongRangeBranch(self.fold[0], d_model, 1, frame.n_marks)
            if branch == "long"
            else ShortRangeBranch(*self.fold, d_model, 1, frame.n_marks)
        )
        self.readout = nn.Conv1d(d_model, -(-pred_len // frame.period), 1)

    def forward(
        self, x: Float[Tensor, "batch seq_len 1"], marks: Float[Tensor, "batch seq_len mark"]
    ) -> Float[Tensor, "batch pred_len 1"]:
        """Forecasts."""
        found = self.branch(x.unflatten(1, self.fold), marks.unflatten(1, self.fold))
        by_phase = found if found.dim() == 3 else found[:, :, None].expand(-1, -1, self.fold[1])
        return self.readout(by_phase).flatten(1)[:, : self.pred_len, None]


class RecurrentForecaster(nn.Module):
    """A GRU over the whole window, and a linear layer that reads the forecast from its last state.

    Args:
        frame: sizes that are shared.
        pred_len: steps to forecast.
    """

    def __init__(self, frame: Frame, pred_len: int) -> None:
        super().__init__()
        self.layer = nn.GRU(1 + frame.n_marks, frame.recurrent_size, batch_first=True)
        self.readout = nn.Linear(frame.recurrent_size, pred_len)

    def forward(
        self, x: Float[Tensor, "batch seq_len 1"], marks: Float[Tensor, "batch seq_len mark"]
    ) -> Float[Tensor, "batch pred_len 1"]:
        """Forecasts."""
        return self.readout(self.layer(_beside(x, marks))[0][:, -1])[..., None]


class DLinear(nn.Module):
    """A linear map of the window's moving average and one of the rest (Zeng et al., AAAI 2023, arXiv 2205.13504).

    Args:
        frame: sizes that are shared.
        pred_len: steps to forecast.
    """

    def __init__(self, frame: Frame, pred_len: int) -> None:
        super().__init__()
        self.moving_average = frame.moving_average
        self.trend = nn.Linear(frame.seq_len, pred_len)
        self.rest = nn.Linear(frame.seq_len, pred_len)

    def forward(
        self, x: Float[Tensor, "batch seq_len 1"], marks: Float[Tensor, "batch seq_len mark"]
    ) -> Float[Tensor, "batch pred_len 1"]:
        """Forecasts; the marks have no effect."""
        values = x.transpose(1, 2)
        reach = self.moving_average // 2
        edges = F.pad(values, (reach, self.moving_average - 1 - reach), mode="replicate")
        trend = F.avg_pool1d(edges, self.moving_average, stride=1)
        return (self.trend(trend) + self.rest(values - trend)).transpose(1, 2)


class Normalized(nn.Module):
    """A forecaster of standardised windows, as TPGN with ``normalize=True``.

    Args:
        forecaster: sees the standardised windows.
    """

    def __init__(self, forecaster: nn.Module) -> None:
        super().__init__()
        self.forecaster = forecaster

    def forward(
        self, x: Float[Tensor, "batch seq_len 1"], marks: Float[Tensor, "batch seq_len mark"]
    ) -> Float[Tensor, "batch pred_len 1"]:
        """Forecasts on the scale of ``x``."""
        statistics = window_statistics(x)
        return statistics.restore(self.forecaster(statistics.normalize(x), marks))


def build_forecaster(arm: str, frame: Frame, pred_len: int, d_model: int) -> nn.Module:
    """The freshly initialised forecaster of an arm.

    Args:
        arm: ``tpgn``; ``fold_gru``, ``fold_lstm`` or ``fold_mlp`` (another cell in its frame); ``long_only`` or
            ``short_only``; ``gru`` or ``dlinear`` (no fold).
        frame: sizes that are shared.
        pred_len: steps to forecast.
        d_model: width of TPGN. The single branches are as much wider as makes them about as large.
    """
    if arm == "tpgn":
        return _tpgn(frame, pred_len, d_model)
    if arm.startswith("fold_"):
        model = _tpgn(frame, pred_len, d_model)
        model.long_range.cell = _cell(arm, 1 + frame.n_marks, d_model)
        return model
    if arm in ("long_only", "short_only"):
        width = _width(arm, frame, pred_len, d_model)
        forecaster: nn.Module = OneBranch(arm.removesuffix("_only"), frame, pred_len, width)
    else:
        forecaster = {"gru": RecurrentForecaster, "dlinear": DLinear}[arm](frame, pred_len)
    return Normalized(forecaster) if frame.normalize else forecaster


def _beside(x: Tensor, marks: Tensor | None) -> Tensor:
    return x if marks is None else torch.cat([x, marks], dim=-1)


def _tpgn(frame: Frame, pred_len: int, d_model: int) -> TPGN:
    return TPGN(frame.seq_len, pred_len, frame.period, d_model, 1, frame.n_marks, frame.normalize)


def _cell(arm: str, features: int, hidden_size: int) -> nn.Module:
    if arm == "fold_mlp":
        # As many parameters as PGN has over the seven periods of the experiments.
        size = 6 * features * hidden_size + 2 * hidden_size * (features + hidden_size) + 2 * hidden_size
        inner = max(1, round(size / (features + 1 + hidden_size)))
        return StepwiseCell(features, inner, hidden_size)
    layer = {"fold_gru": nn.GRU, "fold_lstm": nn.LSTM}[arm]
    return RecurrentCell(layer(features, hidden_size, batch_first=True))


def _width(arm: str, frame: Frame, pred_len: int, d_model: int) -> int:
    """The width at which a single branch comes nearest to TPGN's number of parameters."""
    with torch.device("meta"):
        wanted = count_parameters(_tpgn(frame, pred_len, d_model))
        branch = arm.removesuffix("_only")

        def gap(width: int) -> int:
            return abs(count_parameters(OneBranch(branch, frame, pred_len, width)) - wanted)

        return min(range(d_model, 4 * d_model + 1), key=gap)

r"""TPGN, the forecaster around PGN: a series folded into periods × phases and read in both directions (arXiv 2409.17703).

A window of R · P steps becomes a table of R periods and P phases. The long-range branch reads every phase along the
periods, the short-range branch every period inside; for each phase a linear layer turns both into the values of that
phase in the :math:`R_f = \lceil horizon / P \rceil` periods to come. With P near the root of the length, the longest way
through the network has O(√length) steps.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from headgate.methods.sequence.pgn.branches import LongRangeBranch, ShortRangeBranch
from headgate.methods.sequence.pgn.checks import check_finite
from headgate.nn import window_statistics
from headgate.train.hub import HubModel
from headgate.validate import check_floating, check_positive, check_shape

__all__ = ["TPGN"]


class TPGN(nn.Module, HubModel):
    """Forecast a window's continuation, channel by channel.

    ``save_pretrained`` writes it into a folder, ``from_pretrained`` reads it from there or from the Hugging Face hub.
    Weights start as PyTorch's convolutions do. The loss is the mean squared error.

    Args:
        seq_len: steps of a window, a multiple of ``period`` and at least two periods.
        pred_len: steps to forecast. Where it is no multiple of ``period``, whole periods are computed and the end is cut.
        period: steps of a period, P.
        d_model: width of both branches, per channel.
        n_channels: channels of the series. No channel sees another one.
        n_marks: time marks at each step, which every channel sees; 4 for hourly series, 0 for none
            (:func:`headgate.data.time_features`).
        normalize: whether each window and channel is standardised on the way in, and the forecast brought back.
        channel_shared: whether all channels share one set of weights; for many channels.
        lags: how many periods back PGN sees; default all.

    Raises:
        ValueError: a size out of range, or ``seq_len`` that is no multiple of ``period``.
    """

    def __init__(
        self,
        seq_len: int = 168,
        pred_len: int = 168,
        period: int = 24,
        d_model: int = 32,
        n_channels: int = 1,
        n_marks: int = 4,
        normalize: bool = False,
        *,
        channel_shared: bool = False,
        lags: int | None = None,
    ) -> None:
        super().__init__()
        check_positive(pred_len=pred_len, d_model=d_model, n_channels=n_channels)
        if n_marks < 0:
            raise ValueError(f"n_marks must not be negative, got {n_marks}")
        if not 1 <= period <= seq_len:
            raise ValueError(f"period must lie in [1, seq_len={seq_len}], got {period}")
        if seq_len % period:
            raise ValueError(f"seq_len must be a multiple of period, got seq_len={seq_len}, period={period}")
        if seq_len // period < 2:
            raise ValueError(f"seq_len must hold at least two periods, got seq_len={seq_len}, period={period}")
        self.seq_len = seq_len
        self.pred_len = pred_len
        self.period = period
        self.d_model = d_model
        self.n_channels = n_channels
        self.n_marks = n_marks
        self.normalize = normalize
        self.channel_shared = channel_shared
        self.num_periods = seq_len // period  # R
        self.num_future_periods = -(-pred_len // period)  # R_f
        groups = 1 if channel_shared else n_channels
        self.groups = groups
        self.long_range = LongRangeBranch(self.num_periods, d_model, groups, n_marks, lags=lags)
        self.short_range = ShortRangeBranch(self.num_periods, period, d_model, groups, n_marks)
        self.readout = nn.Conv1d(2 * groups * d_model, groups * self.num_future_periods, 1, groups=groups)

    def forward(
        self,
        x: Float[Tensor, "batch seq_len channel"],
        x_marks: Float[Tensor, "batch seq_len mark"] | None = None,
    ) -> Float[Tensor, "batch pred_len channel"]:
        """Forecast.

        Args:
            x: windows ``(batch, seq_len, n_channels)``, finite.
            x_marks: time marks of their steps ``(batch, seq_len, n_marks)``, finite. A model without marks takes ``None``
                or a tensor of width 0.

        Returns:
            ``(batch, pred_len, n_channels)``.

        Raises:
            TypeError: an argument is not of the module's floating dtype.
            ValueError: a wrong shape, marks that are missing or not expected, or a value that is not finite (looked at
                outside ``torch.compile`` and ``torch.export``).
        """
        x_marks = self._check(x, x_marks)
        statistics = window_statistics(x) if self.normalize else None
        scaled = x if statistics is None else statistics.normalize(x)
        if self.channel_shared:
            y = self._forecast_shared(scaled, x_marks)
        else:
            y = self._forecast(scaled, x_marks)
        return y if statistics is None else statistics.restore(y.to(x.dtype))

    def _forecast(self, x: Tensor, marks: Tensor | None) -> Float[Tensor, "batch pred_len groups"]:
        fold = (self.num_periods, self.period)
        table = x.unflatten(1, fold)
        table_marks = None if marks is None else marks.unflatten(1, fold)
        split = (self.groups, self.d_model)
        long = self.long_range(table, table_marks).unflatten(1, split)
        short = self.short_range(table, table_marks).unflatten(1, split)
        both = torch.cat([short.unsqueeze(-1).expand_as(long).to(long.dtype), long], dim=2).flatten(1, 2)
        periods = self.readout(both).unflatten(1, (self.groups, self.num_future_periods))
        return periods.flatten(2)[..., : self.pred_len].transpose(1, 2)

    def _forecast_shared(self, x: Tensor, marks: Tensor | None) -> Float[Tensor, "batch pred_len channel"]:
        """Take the channels for further windows."""
        batch, channels = x.shape[0], self.n_channels
        alone = x.transpose(1, 2).reshape(batch * channels, self.seq_len, 1)
        if marks is not None:
            marks = marks[:, None].expand(-1, channels, -1, -1).flatten(0, 1)
        return self._forecast(alone, marks).reshape(batch, channels, self.pred_len).transpose(1, 2)

    def _check(self, x: Tensor, marks: Tensor | None) -> Tensor | None:
        """Check the input; the marks, ``None`` where the model has none."""
        dtype = self.readout.weight.dtype
        check_shape("x", x, (None, self.seq_len, self.n_channels), "batch, seq_len, channel")
        check_floating("x", x, like=dtype)
        check_finite("x", x)
        if marks is None:
            if self.n_marks:
                raise ValueError(
                    f"x_marks must be given, of shape (batch, seq_len, mark={self.n_marks}), got None; "
                    "n_marks=0 makes a model without them"
                )
            return None
        check_shape("x_marks", marks, (x.shape[0], self.seq_len, self.n_marks), "batch, seq_len, mark")
        check_floating("x_marks", marks, like=dtype)
        check_finite("x_marks", marks)
        return marks if self.n_marks else None

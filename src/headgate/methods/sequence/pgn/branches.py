"""The two branches of TPGN over a table of R periods × P phases (arXiv 2409.17703, section on TPGN).

The long-range branch reads, phase by phase, along the periods: PGN, then a linear layer over the R periods. The short-range
branch reads inside each period: a linear layer over its P phases, then one over the R periods. Both take the table's
values and time marks, and both keep ``groups`` channels apart.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from headgate.methods.sequence.pgn.cell import PGN
from headgate.validate import check_floating, check_positive, check_shape

__all__ = ["LongRangeBranch", "ShortRangeBranch"]

_AXES = "batch, period, phase, channel"


class LongRangeBranch(nn.Module):
    """PGN along the periods of every phase, then a linear layer over the periods.

    Args:
        num_periods: rows of the table, R ≥ 2.
        d_model: outputs per channel and phase.
        n_channels: channels, each with its own weights.
        n_marks: time marks at each step.
        lags: of :class:`PGN`: how many periods back it sees.

    Attributes:
        cell: the layer along the periods, ``(rows (N, R, n_channels), marks (N, R, n_marks) or None)`` → ``(N, R,
            n_channels · d_model)``; another one of this form may stand in its place.
        combine: the linear layer over the periods.
    """

    cell: nn.Module

    def __init__(
        self, num_periods: int, d_model: int, n_channels: int = 1, n_marks: int = 0, *, lags: int | None = None
    ) -> None:
        super().__init__()
        check_positive(d_model=d_model, n_channels=n_channels)
        self.num_periods = num_periods
        self.n_channels = n_channels
        self.n_marks = n_marks
        width = n_channels * d_model
        self.cell = PGN(n_channels, width, num_periods, extra_features=n_marks, groups=n_channels, lags=lags)
        self.combine = nn.Conv1d(width, width, num_periods, groups=n_channels)

    def forward(
        self,
        table: Float[Tensor, "batch period phase channel"],
        marks: Float[Tensor, "batch period phase mark"] | None = None,
    ) -> Float[Tensor, "batch width phase"]:
        """Read the table.

        Args:
            table: values ``(batch, num_periods, phase, n_channels)``.
            marks: time marks ``(batch, num_periods, phase, n_marks)``.

        Returns:
            ``(batch, n_channels · d_model, phase)``, channel by channel.

        Raises:
            TypeError: an argument is not of the module's floating dtype.
            ValueError: a wrong shape, or marks that are missing or not expected.
        """
        _check_table(table, marks, self.num_periods, None, self.n_channels, self.n_marks, self.combine.weight.dtype)
        encoded = self.cell(_columns(table), None if marks is None else _columns(marks))
        combined = self.combine(encoded.transpose(1, 2))[..., 0]
        return combined.unflatten(0, (table.shape[0], -1)).transpose(1, 2)


class ShortRangeBranch(nn.Module):
    """A linear layer over the phases of every period, then one over the periods.

    Args:
        num_periods: rows of the table, R.
        period: phases of a period, P.
        d_model: outputs per channel.
        n_channels: channels, each with its own weights.
        n_marks: time marks at each step.
    """

    def __init__(self, num_periods: int, period: int, d_model: int, n_channels: int = 1, n_marks: int = 0) -> None:
        super().__init__()
        check_positive(num_periods=num_periods, period=period, d_model=d_model, n_channels=n_channels)
        self.num_periods = num_periods
        self.period = period
        self.n_channels = n_channels
        self.n_marks = n_marks
        width = n_channels * d_model
        self.within = nn.Conv1d(n_channels * (1 + n_marks), width, period, groups=n_channels)
        self.combine = nn.Conv1d(width, width, num_periods, groups=n_channels)

    def forward(
        self,
        table: Float[Tensor, "batch period phase channel"],
        marks: Float[Tensor, "batch period phase mark"] | None = None,
    ) -> Float[Tensor, "batch width"]:
        """Read the table; arguments and errors as for :class:`LongRangeBranch`.

        Returns:
            ``(batch, n_channels · d_model)``, channel by channel.
        """
        _check_table(
            table, marks, self.num_periods, self.period, self.n_channels, self.n_marks, self.within.weight.dtype
        )
        features = table.unsqueeze(-1)
        if marks is not None:
            shared = marks.unsqueeze(3).expand(-1, -1, -1, self.n_channels, -1)
            features = torch.cat([features, shared], dim=-1)
        rows = features.flatten(3).flatten(0, 1).transpose(1, 2)
        within = self.within(rows)[..., 0].unflatten(0, (table.shape[0], -1))
        return self.combine(within.transpose(1, 2))[..., 0]


def _columns(table: Float[Tensor, "batch period phase channel"]) -> Float[Tensor, "columns period channel"]:
    """The sequence of periods of every phase, phases of one window side by side."""
    return table.transpose(1, 2).flatten(0, 1)


def _check_table(
    table: Tensor,
    marks: Tensor | None,
    num_periods: int,
    period: int | None,
    n_channels: int,
    n_marks: int,
    dtype: torch.dtype,
) -> None:
    check_shape("table", table, (None, num_periods, period, n_channels), _AXES)
    check_floating("table", table, like=dtype)
    if marks is None:
        if n_marks:
            raise ValueError(f"marks must be given, of shape (batch, period, phase, mark={n_marks}), got None")
        return
    check_shape("marks", marks, (*table.shape[:3], n_marks), "batch, period, phase, mark")
    check_floating("marks", marks, like=dtype)

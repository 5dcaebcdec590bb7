"""What the modules of this room promise; the contract suite holds them to it."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from typing import Any

import torch
from torch import Generator, Tensor

from headgate.methods.sequence.pgn.branches import LongRangeBranch, ShortRangeBranch
from headgate.methods.sequence.pgn.cell import PGN
from headgate.methods.sequence.pgn.library import TPGNForTimeSeriesLibrary
from headgate.methods.sequence.pgn.model import TPGN
from headgate.testing import BadInput, ContractCase

__all__ = ["CASES"]


def _normal(*shapes: tuple[int, ...]) -> Callable[[Generator], tuple[Tensor, ...]]:
    return lambda generator: tuple(torch.randn(shape, generator=generator) for shape in shapes)


def _with_gap(*shapes: tuple[int, ...]) -> Callable[[Generator], tuple[Tensor, ...]]:
    def draw(generator: Generator) -> tuple[Tensor, ...]:
        tensors = _normal(*shapes)(generator)
        tensors[0][1, 2, 0] = torch.nan
        return tensors

    return draw


def _without_marks(shape: tuple[int, ...]) -> Callable[[Generator], tuple[Any, ...]]:
    return lambda generator: (torch.randn(shape, generator=generator), None)


_LIBRARY = Namespace(seq_len=12, pred_len=8, enc_in=2, d_model=3, freq="h", norm=1, TPGN_period=4)

CASES = {
    "PGN": ContractCase(
        lambda: PGN(3, 8, 7, extra_features=2),
        _normal((4, 7, 3), (4, 7, 2)),
        bad_inputs=(
            BadInput("a gap", _with_gap((4, 7, 3), (4, 7, 2)), ValueError, r"x must be finite, got nan at \(1, 2, 0\)"),
            BadInput("no marks", _without_marks((4, 7, 3)), ValueError, "marks must be given.*extra_features=2"),
        ),
    ),
    "PGN-grouped": ContractCase(lambda: PGN(4, 6, 5, extra_features=3, groups=2), _normal((3, 5, 4), (3, 5, 3))),
    "PGN-few lags": ContractCase(lambda: PGN(2, 4, 9, lags=3), _normal((3, 9, 2))),
    "PGN-long": ContractCase(lambda: PGN(2, 4, 600, groups=2), _normal((3, 600, 2))),
    "LongRangeBranch": ContractCase(
        lambda: LongRangeBranch(3, 5, n_channels=2, n_marks=2), _normal((3, 3, 4, 2), (3, 3, 4, 2))
    ),
    "ShortRangeBranch": ContractCase(
        lambda: ShortRangeBranch(3, 4, 5, n_channels=2, n_marks=3), _normal((3, 3, 4, 2), (3, 3, 4, 3))
    ),
    "TPGN": ContractCase(
        lambda: TPGN(12, 8, period=4, d_model=6),
        _normal((3, 12, 1), (3, 12, 4)),
        bad_inputs=(
            BadInput("a gap", _with_gap((3, 12, 1), (3, 12, 4)), ValueError, "x must be finite"),
            BadInput("no marks", _without_marks((3, 12, 1)), ValueError, "x_marks must be given.*mark=4"),
        ),
    ),
    "TPGN-channels": ContractCase(
        lambda: TPGN(12, 10, period=4, d_model=3, n_channels=2, n_marks=3, normalize=True),
        _normal((3, 12, 2), (3, 12, 3)),
    ),
    "TPGN-shared": ContractCase(
        lambda: TPGN(12, 10, period=4, d_model=3, n_channels=3, n_marks=0, normalize=True, channel_shared=True),
        _normal((4, 12, 3)),
    ),
    "TPGNForTimeSeriesLibrary": ContractCase(
        lambda: TPGNForTimeSeriesLibrary(_LIBRARY),
        _normal((3, 12, 2), (3, 12, 4), (3, 13, 2), (3, 13, 4)),
        unused_parameters=("inputs.x_dec", "inputs.x_mark_dec"),
    ),
}

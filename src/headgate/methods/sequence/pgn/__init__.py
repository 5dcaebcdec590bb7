"""PGN: a gated layer that sees all earlier steps at once, and TPGN, the forecaster of periodic series around it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from headgate.methods.sequence.pgn.branches import LongRangeBranch, ShortRangeBranch
from headgate.methods.sequence.pgn.cell import PGN
from headgate.methods.sequence.pgn.library import TPGNForTimeSeriesLibrary
from headgate.methods.sequence.pgn.model import TPGN
from headgate.methods.sequence.pgn.training import ForecastHistory, ForecastRecipe, forecast_windows, train_forecaster

if TYPE_CHECKING:
    from headgate.methods.sequence.pgn.forecaster import TPGNForecaster
    from headgate.methods.sequence.pgn.neuralforecast import NeuralForecastTPGN

__all__ = [
    "PGN",
    "TPGN",
    "ForecastHistory",
    "ForecastRecipe",
    "LongRangeBranch",
    "NeuralForecastTPGN",
    "ShortRangeBranch",
    "TPGNForTimeSeriesLibrary",
    "TPGNForecaster",
    "forecast_windows",
    "train_forecaster",
]

_ON_DEMAND = {"TPGNForecaster": "forecaster", "NeuralForecastTPGN": "neuralforecast"}
"""Names whose modules import scikit-learn or neuralforecast."""


def __getattr__(name: str) -> Any:
    if name not in _ON_DEMAND:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f"{__name__}.{_ON_DEMAND[name]}"), name)

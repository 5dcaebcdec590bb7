"""TPGN as a model of the package neuralforecast, whose trainer, scalers and cross-validation then serve it."""

from __future__ import annotations

from typing import Any

from jaxtyping import Float
from torch import Tensor

from headgate.errors import HeadgateError
from headgate.methods.sequence.pgn.model import TPGN

try:
    from neuralforecast.common._base_model import BaseModel  # type: ignore[import-not-found]
    from neuralforecast.losses.pytorch import MSE  # type: ignore[import-not-found]
except ModuleNotFoundError as error:
    raise HeadgateError(
        f"NeuralForecastTPGN needs the package neuralforecast ({error}): pip install neuralforecast"
    ) from error

__all__ = ["NeuralForecastTPGN"]

_DEFAULTS = {
    "valid_loss": None,
    "learning_rate": 1e-3,
    "max_steps": 1000,
    "val_check_steps": 100,
    "batch_size": 32,
    "valid_batch_size": None,
    "windows_batch_size": 1024,
    "inference_windows_batch_size": 1024,
    "start_padding_enabled": False,
}
"""What neuralforecast's base model has no defaults for."""


class NeuralForecastTPGN(BaseModel):  # type: ignore[misc]
    """``NeuralForecast(models=[NeuralForecastTPGN(h=168, input_size=168)], freq="h")``.

    Args:
        h: steps to forecast.
        input_size: steps of a window, a multiple of ``period``.
        period: steps of a period.
        d_model: width of both branches.
        normalize: as in :class:`TPGN`. The base class has scalers of its own (``scaler_type``); use one of the two.
        hist_exog_list: columns that stand beside the series at each step of the window, such as time marks.
        loss: one of neuralforecast's losses with one output per step; default MSE.
        **options: further keywords of neuralforecast's base model (``max_steps``, ``scaler_type``, ``alias`` …) in place
            of its own defaults and of these: 1,000 updates at a learning rate of 1e-3.

    Raises:
        ValueError: a loss with several outputs per step, or a size out of range.
    """

    EXOGENOUS_FUTR = False
    EXOGENOUS_HIST = True
    EXOGENOUS_STAT = False
    MULTIVARIATE = False
    RECURRENT = False

    def __init__(
        self,
        h: int,
        input_size: int,
        period: int = 24,
        d_model: int = 32,
        normalize: bool = False,
        hist_exog_list: list[str] | None = None,
        loss: Any = None,
        **options: Any,
    ) -> None:
        loss = MSE() if loss is None else loss
        if loss.outputsize_multiplier != 1:
            raise ValueError(
                f"loss must have one output per step, got {type(loss).__name__} with {loss.outputsize_multiplier}"
            )
        super().__init__(
            h=h, input_size=input_size, hist_exog_list=hist_exog_list, loss=loss, **{**_DEFAULTS, **options}
        )
        marks = len(hist_exog_list or ())
        self.tpgn = TPGN(input_size, h, period, d_model, n_marks=marks, normalize=normalize)

    def forward(self, windows_batch: dict[str, Any]) -> Float[Tensor, "batch h 1"]:
        """Forecast ``windows_batch["insample_y"]`` ``(batch, input_size, 1)`` with its historical columns, if any."""
        marks = windows_batch["hist_exog"] if self.tpgn.n_marks else None
        return self.tpgn(windows_batch["insample_y"], marks)

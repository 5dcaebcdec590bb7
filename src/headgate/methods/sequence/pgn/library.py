"""TPGN in the form that Time-Series-Library and its descendants call their models."""

from __future__ import annotations

from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from headgate.methods.sequence.pgn.model import TPGN
from headgate.methods.sequence.pgn.official import build_tpgn
from headgate.validate import check_floating, check_shape

__all__ = ["TPGNForTimeSeriesLibrary"]


class TPGNForTimeSeriesLibrary(nn.Module):
    """``Model(configs)`` for the task of long-term forecasting.

    Args:
        configs: a namespace with ``seq_len``, ``pred_len``, ``enc_in``, ``d_model``, ``freq`` (h, t or d), ``norm`` and
            ``TPGN_period``, as parsed from the library's command line; others are not looked at.

    Attributes:
        model: the :class:`TPGN` that does the work.

    Raises:
        ValueError: an option is missing or out of range.
    """

    def __init__(self, configs: Any) -> None:
        super().__init__()
        self.model: TPGN = build_tpgn(vars(configs))

    def forward(
        self,
        x_enc: Float[Tensor, "batch seq_len channel"],
        x_mark_enc: Float[Tensor, "batch seq_len mark"],
        x_dec: Float[Tensor, "batch label_and_pred_len channel"] | None = None,
        x_mark_dec: Float[Tensor, "batch label_and_pred_len mark"] | None = None,
        mask: Tensor | None = None,
    ) -> Float[Tensor, "batch pred_len channel"]:
        """Forecast from ``x_enc`` and its marks; what is handed to a decoder or masks a window has no effect.

        Returns:
            ``(batch, pred_len, enc_in)``.

        Raises:
            TypeError: an argument is of a wrong dtype.
            ValueError: a wrong shape, or a value that is not finite.
        """
        seen = self.model
        check_shape("x_enc", x_enc, (None, seen.seq_len, seen.n_channels), "batch, seq_len, channel")
        check_floating("x_enc", x_enc, like=seen.readout.weight.dtype)
        check_shape("x_mark_enc", x_mark_enc, (*x_enc.shape[:2], seen.n_marks), "batch, seq_len, mark")
        check_floating("x_mark_enc", x_mark_enc, like=seen.readout.weight.dtype)
        for name, tensor, width in (("x_dec", x_dec, seen.n_channels), ("x_mark_dec", x_mark_dec, seen.n_marks)):
            if tensor is not None:
                check_shape(name, tensor, (x_enc.shape[0], None, width), "batch, label_and_pred_len, width")
                check_floating(name, tensor)
        return seen(x_enc, x_mark_enc)

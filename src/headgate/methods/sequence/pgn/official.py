"""Models and weights of the published code (Water2sea/TPGN) in this library's modules.

``build_tpgn`` takes the options of the published ``Model``, ``build_long_range`` those of its ``PGN_2d``;
``convert_state_dict`` takes the weights of either:

    model = build_tpgn(options)
    model.load_state_dict(convert_state_dict(torch.load("checkpoint.pth", weights_only=True)))

The published model rounds the horizon up to whole periods and fails where that matters and ``norm`` is set; here the end is
cut. It takes no notice of ``c_out`` of the model, of the decoder's input, or of the time marks to come.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from headgate.methods.sequence.pgn.branches import LongRangeBranch
from headgate.methods.sequence.pgn.model import TPGN

__all__ = ["MARKS", "build_long_range", "build_tpgn", "convert_state_dict", "rename"]

MARKS = {"t": 5, "h": 4, "d": 3}
"""Published frequency → number of time marks."""

_LONG = {"hidden_MLP": "cell.history", "gate": "cell.gate", "fc": "combine"}
_MODULES = {
    **{f"TPGN.LNN_dim.{theirs}": f"long_range.{ours}" for theirs, ours in _LONG.items()},
    "TPGN.s_t_p_e.fc_row": "short_range.within",
    "TPGN.s_t_p_e.fc_col": "short_range.combine",
    "TPGN.fc": "readout",
    **_LONG,
}


def build_tpgn(options: Mapping[str, Any]) -> TPGN:
    """Build the published ``Model``.

    Args:
        options: ``seq_len``, ``pred_len``, ``TPGN_period``, ``enc_in``, ``d_model``, ``freq`` and ``norm``, as a mapping
            (``vars(args)`` of the published script); others are not looked at.

    Returns:
        Our model, freshly initialised.

    Raises:
        ValueError: an option is missing, or ``freq`` is not one of t, h and d.
    """
    return TPGN(
        seq_len=_option(options, "seq_len"),
        pred_len=_option(options, "pred_len"),
        period=_option(options, "TPGN_period"),
        d_model=_option(options, "d_model"),
        n_channels=_option(options, "enc_in"),
        n_marks=_marks(options),
        normalize=bool(_option(options, "norm")),
    )


def build_long_range(options: Mapping[str, Any]) -> LongRangeBranch:
    """Build the published ``PGN_2d``: PGN and the linear layer behind it.

    Args:
        options: ``seq_R`` (periods), ``windows_size`` (lags), ``c_in`` (channels), ``c_out`` (width per channel) and
            ``freq``.

    Returns:
        Our branch, freshly initialised.

    Raises:
        ValueError: an option is missing, or ``freq`` is not one of t, h and d.
    """
    return LongRangeBranch(
        num_periods=_option(options, "seq_R"),
        d_model=_option(options, "c_out"),
        n_channels=_option(options, "c_in"),
        n_marks=_marks(options),
        lags=_option(options, "windows_size"),
    )


def convert_state_dict(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the weights of a published ``Model`` or ``PGN_2d`` to ours.

    Args:
        state: its ``state_dict()``, with or without the prefix ``module.`` of DataParallel.

    Returns:
        A state dict for what :func:`build_tpgn` or :func:`build_long_range` builds.

    Raises:
        ValueError: a name that the published code does not have.
    """
    return {rename(name): tensor for name, tensor in state.items()}


def rename(name: str) -> str:
    """Our name of a published weight.

    Raises:
        ValueError: the published code has none of this name.
    """
    module, _, kind = name.removeprefix("module.").rpartition(".")
    if module not in _MODULES or kind not in ("weight", "bias"):
        raise ValueError(f"{name!r} is no weight of a published Model or PGN_2d")
    return f"{_MODULES[module]}.{kind}"


def _option(options: Mapping[str, Any], name: str) -> Any:
    if name not in options:
        raise ValueError(f"options must hold {name!r}, got {', '.join(sorted(options)) or 'none'}")
    return options[name]


def _marks(options: Mapping[str, Any]) -> int:
    frequency = _option(options, "freq")
    if frequency not in MARKS:
        raise ValueError(f"freq must be one of {', '.join(MARKS)}, got {frequency!r}")
    return MARKS[frequency]

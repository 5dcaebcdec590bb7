"""What a window must be: finite."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["check_finite"]


def check_finite(name: str, x: Tensor) -> None:
    """Check that every value of ``x`` is finite.

    Compiled and exported code cannot look at values, so there, as on the meta device, nothing is checked.

    Raises:
        ValueError: a NaN or an infinity; the message says where.
    """
    if torch.compiler.is_compiling() or x.is_meta:
        return
    finite = x.isfinite()
    if not finite.all():
        place = tuple((~finite).nonzero()[0].tolist())
        raise ValueError(f"{name} must be finite, got {x[place].item()} at {place}; fill gaps before forecasting")

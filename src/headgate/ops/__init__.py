"""Pure tensor functions, each with its definition as a short loop (``reference.py``) and faster backends beside it."""

from __future__ import annotations

from headgate.ops.long_convolution import long_convolution

__all__ = ["long_convolution"]

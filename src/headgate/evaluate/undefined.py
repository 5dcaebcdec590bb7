"""What a measure answers when its formula has no value: nan, and the reason as a warning."""

from __future__ import annotations

import warnings

__all__ = ["undefined"]


def undefined(measure: str, reason: str) -> float:
    """Warn that ``measure`` has no value and why, and return nan.

    Args:
        measure: the public function's name.
        reason: what makes the formula meaningless, e.g. ``"X is constant"``.
    """
    warnings.warn(f"{measure} is undefined (nan): {reason}", RuntimeWarning, stacklevel=3)
    return float("nan")

"""The published code's settings (sangminwoo/RITUAL) as ours.

There are no weights to convert. Its loop decodes by ``if use_ritual / elif use_vcd / elif use_m3id``, one of them alone, and
has names of its own for what the views are weighted with.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from headgate.methods.steering.ritual.fusion import Weight, m3id_weight

__all__ = ["MODES", "official_plausibility", "official_weight"]

MODES = ("ritual", "vcd", "m3id")


def official_weight(mode: str, config: Mapping[str, Any]) -> Weight:
    """The weight of the second view under one of the published modes.

    Args:
        mode: one of :data:`MODES`.
        config: ``alpha_pos``, ``alpha_neg`` and ``m3id_lambda``, with the published defaults where one is missing; a
            leading ``ritual_`` as on the published command line is fine.

    Raises:
        ValueError: unknown mode.
    """
    known = _plain(config)
    if mode == "ritual":
        return float(known.get("alpha_pos", 3.0))
    if mode == "vcd":
        return -float(known.get("alpha_neg", 1.0))
    if mode == "m3id":
        return m3id_weight(float(known.get("m3id_lambda", 0.02)))
    raise ValueError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")


def official_plausibility(config: Mapping[str, Any]) -> float:
    """β of the plausibility mask: ``plausibility_beta``, or ``ritual_beta`` as on the published command line."""
    known = _plain(config)
    return float(known.get("plausibility_beta", known.get("beta", 0.1)))


def _plain(config: Mapping[str, Any]) -> dict[str, Any]:
    return {name.removeprefix("ritual_"): value for name, value in config.items()}

"""Models by preset name, as timm users expect: ``create_model("…")`` and ``list_models("…*")``."""

from __future__ import annotations

import fnmatch
import importlib
from typing import Any

from headgate.catalog import Method, Preset, load_methods
from headgate.errors import HeadgateError

__all__ = ["create_model", "list_models"]


def _presets() -> dict[str, tuple[Method, Preset]]:
    return {name: (method, preset) for method in load_methods().values() for name, preset in method.presets.items()}


def list_models(pattern: str = "*") -> list[str]:
    """Names of all presets that match ``pattern`` (shell wildcards), in alphabetical order."""
    return sorted(fnmatch.filter(_presets(), pattern))


def create_model(name: str, **overrides: Any) -> Any:
    """Build the preset ``name``.

    Args:
        name: one of :func:`list_models`.
        **overrides: keywords of its constructor, in place of the preset's.

    Returns:
        The freshly initialised module.

    Raises:
        HeadgateError: unknown name.
    """
    presets = _presets()
    if name not in presets:
        raise HeadgateError(f"unknown preset {name!r}; headgate.list_models() shows them all")
    method, preset = presets[name]
    build = getattr(importlib.import_module(method.package), preset.export)
    return build(**{**preset.arguments, **overrides})

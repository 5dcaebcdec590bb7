"""Headgate: gated and learned representations for PyTorch.

Names are loaded when they are first used (SPEC 1), so ``import headgate`` is cheap: the floors as submodules
(``headgate.nn``, ``headgate.ops`` …) and every export of every method's card at the top (``headgate.MatryoshkaLoss``).
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

import lazy_loader

__version__ = "0.1.0"

_attached, _submodule_names, _floor_names = lazy_loader.attach(
    __name__,
    submodules=[
        "catalog",
        "claims",
        "data",
        "evaluate",
        "methods",
        "nn",
        "ops",
        "report",
        "testing",
        "timing",
        "train",
    ],
    submod_attrs={"presets": ["create_model", "list_models"], "measurement": ["Curve", "Measurement"]},
)


def _exports() -> Mapping[str, str]:
    """Top-level name → package of the room that offers it."""
    from headgate.catalog import load_methods

    return {name: method.package for method in load_methods().values() for name in method.exports}


def __getattr__(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(f"module 'headgate' has no attribute {name!r}")
    if name in _floor_names:
        return _attached(name)
    package = _exports().get(name)
    if package is None:
        raise AttributeError(f"module 'headgate' has no attribute {name!r}")
    value = getattr(importlib.import_module(package), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_floor_names, *_exports()})

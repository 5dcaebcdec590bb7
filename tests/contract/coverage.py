"""Which public modules a set of contract cases covers."""

from __future__ import annotations

from collections.abc import Iterable
from types import ModuleType

from torch import nn

__all__ = ["covered_name", "module_names", "problems"]


def module_names(package: ModuleType, names: Iterable[str]) -> list[str]:
    """Those of ``names`` that are classes derived from ``nn.Module``."""
    values = {name: getattr(package, name) for name in names}
    return [name for name, value in values.items() if isinstance(value, type) and issubclass(value, nn.Module)]


def covered_name(key: str) -> str:
    """The public name that a case stands for: ``"Head-shared"`` is a case of ``Head``."""
    return key.partition("-")[0]


def problems(where: str, names: Iterable[str], package: ModuleType, keys: Iterable[str]) -> list[str]:
    """What is missing or misnamed: public modules without a case, cases of nothing public."""
    names, keys = list(names), list(keys)
    covered = {covered_name(key) for key in keys}
    missing = [
        f"{name} is public but has no contract case: add one to CASES in {where} under {name!r}"
        for name in module_names(package, names)
        if name not in covered
    ]
    stray = [
        f"the case {key!r} in {where} stands for {covered_name(key)!r}, which is not public"
        for key in keys
        if covered_name(key) not in names
    ]
    return missing + stray

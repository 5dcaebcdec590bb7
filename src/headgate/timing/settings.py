"""A benchmark's settings, changed by ``name=value`` texts from the command line."""

from __future__ import annotations

import dataclasses
import re
import typing
from collections.abc import Sequence
from typing import Any, TypeVar

from headgate.errors import HeadgateError

__all__ = ["change_settings"]

S = TypeVar("S")


def change_settings(settings: S, changes: Sequence[tuple[str, str]]) -> S:
    """A copy of ``settings`` with some of its fields replaced.

    Args:
        settings: a frozen dataclass whose fields are int, float, str, or tuples of int or of str.
        changes: (field, text) pairs. Lists are separated by commas; ``4k`` is 4096.

    Returns:
        The copy; its own checks have run.

    Raises:
        HeadgateError: an unknown field, a text that is no value of its type, or a value that the settings refuse.
    """
    kinds = typing.get_type_hints(type(settings))
    names = [field.name for field in dataclasses.fields(settings)]  # type: ignore[arg-type]
    values: dict[str, Any] = {}
    for name, text in changes:
        if name not in names:
            raise HeadgateError(f"this benchmark has no setting {name!r}; it has {', '.join(names)}")
        try:
            values[name] = _value(text, kinds[name])
        except ValueError:
            raise HeadgateError(f"the setting {name!r} must be {_words(kinds[name])}, got {text!r}") from None
    try:
        return dataclasses.replace(settings, **values)  # type: ignore[type-var]
    except ValueError as error:
        raise HeadgateError(str(error)) from error


def _value(text: str, kind: Any) -> Any:
    if typing.get_origin(kind) is tuple:
        parts = [part.strip() for part in text.split(",") if part.strip()]
        if not parts:
            raise ValueError("an empty list")
        return tuple(_value(part, typing.get_args(kind)[0]) for part in parts)
    if kind is int:
        thousands = re.fullmatch(r"(\d+)[kK]", text.strip())
        return 1024 * int(thousands[1]) if thousands else int(text)
    return kind(text)


def _words(kind: Any) -> str:
    if typing.get_origin(kind) is tuple:
        return f"a list of {'whole numbers' if typing.get_args(kind)[0] is int else 'words'}, with commas between them"
    return {int: "a whole number", float: "a number"}.get(kind, "a word")

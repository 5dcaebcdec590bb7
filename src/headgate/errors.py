"""Errors that a user can mend: one clear line each, shown by the command line without a traceback."""

from __future__ import annotations

__all__ = ["CardError", "ClaimError", "DataError", "HeadgateError", "MissingExtraError"]


class HeadgateError(Exception):
    """Base of every error that names what is wrong and what to do about it."""


class CardError(HeadgateError, ValueError):
    """A method's ``card.toml`` is missing a field or holds a wrong one."""


class DataError(HeadgateError, ValueError):
    """A data file is missing, truncated, of another format, or lacks a column."""


class ClaimError(HeadgateError, ValueError):
    """A claim was asked for an unknown method, arm or scale, or its files cannot be read or written."""


class MissingExtraError(HeadgateError, ImportError):
    """An optional package is needed; the message holds the command that installs it."""

    def __init__(self, package: str, extra: str, purpose: str) -> None:
        super().__init__(f"{purpose} needs the package {package!r}: pip install 'headgate[{extra}]'")
        self.package = package
        self.extra = extra
        self.purpose = purpose

    def __reduce__(self) -> tuple[type[MissingExtraError], tuple[str, str, str]]:
        return type(self), (self.package, self.extra, self.purpose)

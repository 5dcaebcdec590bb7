"""The contract cases of the public modules of ``headgate.nn``: "<name>" or "<name>-<variant>" → case."""

from __future__ import annotations

from headgate.testing import ContractCase

__all__ = ["CASES"]

CASES: dict[str, ContractCase] = {}

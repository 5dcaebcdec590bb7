"""What the contract suite puts this room through: no module of its own, since it changes how finished models decode."""

from __future__ import annotations

from headgate.testing import ContractCase

__all__ = ["CASES"]

CASES: dict[str, ContractCase] = {}

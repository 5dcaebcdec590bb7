"""The mechanism that finds public modules without a contract case."""

from __future__ import annotations

from types import ModuleType

from torch import nn

from tests.contract.coverage import problems

PACKAGE = ModuleType("package")
PACKAGE.Head = type("Head", (nn.Module,), {})  # type: ignore[attr-defined]
PACKAGE.plain = len  # type: ignore[attr-defined]
NAMES = ("Head", "plain")


def test_a_module_without_a_case_is_named() -> None:
    (problem,) = problems("room.contract", NAMES, PACKAGE, [])
    assert problem == "Head is public but has no contract case: add one to CASES in room.contract under 'Head'"


def test_a_variant_is_a_case_of_its_module() -> None:
    assert problems("room.contract", NAMES, PACKAGE, ["Head-shared"]) == []


def test_a_case_of_nothing_public_is_named() -> None:
    (problem,) = problems("room.contract", NAMES, PACKAGE, ["Head", "Haed"])
    assert "'Haed'" in problem
    assert "not public" in problem

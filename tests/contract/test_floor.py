"""Every public module of ``headgate.nn`` keeps the promises of its contract cases."""

from __future__ import annotations

import pytest

import headgate.nn
from headgate.testing import check_case
from tests.contract.coverage import problems
from tests.contract.floor_cases import CASES


@pytest.mark.parametrize("key", CASES)
def test_a_public_module_keeps_its_promises(key: str) -> None:
    report = check_case(CASES[key])
    assert report.count > 0


def test_every_public_module_of_the_floor_has_a_case() -> None:
    found = problems("tests/contract/floor_cases.py", headgate.nn.__all__, headgate.nn, CASES)
    assert not found, "\n".join(found)

"""Every public module of every method keeps the promises of its contract cases."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Mapping

import pytest

from headgate.catalog import Method, load_methods
from headgate.testing import ContractCase, check_case
from tests.contract.coverage import problems

METHODS = list(load_methods().values())


def room_cases(method: Method) -> Mapping[str, ContractCase]:
    """The room's cases; none where it has no ``contract.py``."""
    if importlib.util.find_spec(f"{method.package}.contract") is None:
        return {}
    cases: Mapping[str, ContractCase] = importlib.import_module(f"{method.package}.contract").CASES
    return cases


def case_keys(method: Method) -> list[str]:
    """The names of the room's cases; a room that cannot be imported fails in its own test, not here."""
    try:
        return list(room_cases(method))
    except Exception:
        return []


KEYS = [(method, key) for method in METHODS for key in case_keys(method)]


@pytest.mark.parametrize(("method", "key"), KEYS, ids=[f"{method.slug}:{key}" for method, key in KEYS])
def test_a_public_module_keeps_its_promises(method: Method, key: str) -> None:
    report = check_case(room_cases(method)[key])
    assert report.count > 0


@pytest.mark.parametrize("method", METHODS, ids=[method.slug for method in METHODS])
def test_every_public_module_of_a_room_has_a_case(method: Method) -> None:
    package = importlib.import_module(method.package)
    missing = [name for name in method.exports if not hasattr(package, name)]
    assert not missing, f"{method.package} does not offer what its card exports: {', '.join(missing)}"
    found = problems(f"{method.package}.contract", method.exports, package, room_cases(method))
    assert not found, "\n".join(found)

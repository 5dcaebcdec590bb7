from __future__ import annotations

import pytest

from headgate.timing import Contender, Floor
from tests.timing import toys


@pytest.mark.parametrize(
    ("relation", "value", "met"),
    [
        ("at least", 2.0, True),
        ("at least", 1.99, False),
        ("at most", 2.0, True),
        ("at most", 2.01, False),
        ("equals", 2.04, True),
        ("equals", 1.96, True),
        ("equals", 2.06, False),
        ("at least", None, None),
        ("at most", None, None),
        ("equals", None, None),
    ],
)
def test_a_floor_is_met_by_its_relation(relation, value, met):
    assert Floor("name", "statement", value, 2.0, relation, tolerance=0.05).met is met


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sizes": (2, 1)}, "sizes must be positive and rise"),
        ({"sizes": (1, 1)}, "sizes must be positive and rise"),
        ({"sizes": ()}, "sizes must be positive and rise"),
        ({"sizes": (0, 1)}, "sizes must be positive and rise"),
        ({"contenders": (Contender("a", "A"), Contender("a", "B"))}, "contenders must be named, each once"),
        ({"contenders": ()}, "contenders must be named"),
        ({"memory_sizes": (1, 3)}, r"memory_sizes must be among .* got \[3\]"),
    ],
)
def test_a_task_that_makes_no_sense_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        toys.plan(**changes)

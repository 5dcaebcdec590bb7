from __future__ import annotations

from dataclasses import dataclass

import pytest

from headgate.errors import HeadgateError
from headgate.timing.settings import change_settings


@dataclass(frozen=True)
class Settings:
    lengths: tuple[int, ...] = (1, 2)
    backends: tuple[str, ...] = ("native",)
    heads: int = 4
    rate: float = 0.5
    device: str = "cpu"

    def __post_init__(self) -> None:
        if self.heads < 1:
            raise ValueError(f"heads must be positive, got heads={self.heads}")


def test_texts_become_values_of_the_fields_types():
    changed = change_settings(
        Settings(),
        [
            ("lengths", "512, 4k,16K"),
            ("backends", "native,chunk"),
            ("heads", "8"),
            ("rate", "1e-2"),
            ("device", "cuda"),
        ],
    )
    assert changed == Settings((512, 4096, 16384), ("native", "chunk"), 8, 0.01, "cuda")


def test_what_is_not_changed_stays():
    assert change_settings(Settings(heads=3), [("rate", "2")]) == Settings(heads=3, rate=2.0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("width", "3"), "no setting 'width'; it has lengths, backends, heads, rate, device"),
        (("heads", "many"), "'heads' must be a whole number, got 'many'"),
        (("heads", "2.5"), "'heads' must be a whole number"),
        (("rate", "fast"), "'rate' must be a number, got 'fast'"),
        (("lengths", "1k,long"), "'lengths' must be a list of whole numbers"),
        (("lengths", " , "), "'lengths' must be a list of whole numbers"),
        (("heads", "0"), "heads must be positive, got heads=0"),
    ],
)
def test_a_change_that_makes_no_sense_is_refused(change, message):
    with pytest.raises(HeadgateError, match=message):
        change_settings(Settings(), [change])

"""Choices in text: few, by number, the same on every machine."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

from headgate.data.seeding import splitmix64

__all__ = ["Choices"]

T = TypeVar("T")


class Choices:
    """A stream of choices named by integers; the n-th is a hash of these and n.

    Args:
        names: e.g. a seed and the number of a picture.
    """

    def __init__(self, *names: int) -> None:
        self._key = splitmix64(*names)
        self._drawn = 0

    def uniform(self) -> float:
        """Draw from [0, 1)."""
        self._drawn += 1
        return (splitmix64(self._key, self._drawn) >> 11) / 2.0**53

    def chance(self, probability: float) -> bool:
        """Say yes with a probability."""
        return self.uniform() < probability

    def pick(self, items: Sequence[T]) -> T:
        """Take one of several, each as likely."""
        return items[int(self.uniform() * len(items))]

    def one_by_one(self, items: Sequence[T]) -> Iterator[T]:
        """Give all in random order, drawn only as far as they are asked for."""
        rest = list(items)
        while rest:
            yield rest.pop(int(self.uniform() * len(rest)))

    def shuffled(self, items: Iterable[T]) -> list[T]:
        """Give all in random order."""
        return list(self.one_by_one(list(items)))

    def ranked(self, items: Iterable[T], score: Callable[[T], float]) -> list[T]:
        """Give all by falling score, equals in random order."""
        return sorted(self.shuffled(items), key=lambda item: -score(item))

"""Contenders timed side by side, in rounds.

Every round calls every contender, in an order that turns round each time, so that a machine that gets slower or faster
meanwhile (heat, neighbours, clock rates) does so for all of them. A sample is one call, or as many calls as a shortest
time holds, whatever the length of one.
"""

from __future__ import annotations

import gc
import time
import traceback
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

__all__ = ["Effort", "Outcome", "compare", "too_slow"]


@dataclass(frozen=True)
class Effort:
    """How long to measure.

    Attributes:
        rounds: samples of a contender.
        fewest_rounds: samples of a contender that is slow.
        sample_seconds: a sample lasts at least this long: short calls are repeated.
        enough_seconds: a contender that was measured for so long rests after ``fewest_rounds`` of them.
        budget_seconds: a contender whose warm-up and ``fewest_rounds`` would last longer is left out.
    """

    rounds: int = 9
    fewest_rounds: int = 3
    sample_seconds: float = 0.05
    enough_seconds: float = 10.0
    budget_seconds: float = 120.0

    def __post_init__(self) -> None:
        if not 1 <= self.fewest_rounds <= self.rounds:
            raise ValueError(
                f"fewest_rounds must lie between 1 and rounds={self.rounds}, got fewest_rounds={self.fewest_rounds}"
            )
        for name in ("sample_seconds", "enough_seconds", "budget_seconds"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")

    def longest_call(self) -> float:
        """Seconds of the longest call that the budget holds a warm-up and the fewest rounds of."""
        return self.budget_seconds / (1 + self.fewest_rounds)


@dataclass(frozen=True)
class Outcome:
    """What became of one contender.

    Attributes:
        samples: seconds a call, one entry per round; ``None`` where the contender rested. Empty if there is a ``reason``.
        calls: calls in all samples together.
        reason: why it was not measured: it raised, or it is too slow for the budget.
        trace: the traceback, if it raised.
    """

    samples: tuple[float | None, ...]
    calls: int = 0
    reason: str = ""
    trace: str = ""


def compare(
    contenders: Mapping[Hashable, Callable[[], object]],
    effort: Effort,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[Hashable, Outcome]:
    """Time ``contenders`` side by side.

    Args:
        contenders: name → a function that does the work once.
        effort: how long to measure.
        clock: the time in seconds.

    Returns:
        Name → outcome, in the order of ``contenders``. One that raises is out, and the others go on.
    """
    samples: dict[Hashable, list[float | None]] = {name: [] for name in contenders}
    calls = dict.fromkeys(contenders, 0)
    spent = dict.fromkeys(contenders, 0.0)
    out: dict[Hashable, Outcome] = {}
    racing: list[Hashable] = []
    with _no_collection():
        for name, run in contenders.items():
            began = clock()
            try:
                run()
                first = clock() - began
                if first > effort.longest_call():
                    out[name] = Outcome((), reason=too_slow(first, effort))
                    continue
                if first < effort.sample_seconds:
                    _sample(run, effort.sample_seconds - first, clock)
            except Exception as error:
                out[name] = _raised(error)
                continue
            racing.append(name)
        for number in range(effort.rounds):
            gc.collect(0)  # what the last round left in reference cycles; older objects have nothing to do with it
            for name in racing[::-1] if number % 2 else list(racing):
                resting = number >= effort.fewest_rounds and spent[name] >= effort.enough_seconds
                if resting:
                    samples[name].append(None)
                    continue
                try:
                    seconds, count = _sample(contenders[name], effort.sample_seconds, clock)
                except Exception as error:
                    out[name] = _raised(error)
                    racing.remove(name)
                    continue
                samples[name].append(seconds / count)
                calls[name] += count
                spent[name] += seconds
    return {name: out.get(name) or Outcome(tuple(samples[name]), calls[name]) for name in contenders}


def too_slow(seconds: float, effort: Effort, expected: bool = False) -> str:
    """Why a contender whose calls last ``seconds`` is left out."""
    duration = f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.2g} s"
    one_call = f"a call would last about {duration}" if expected else f"a call lasted {duration}"
    return (
        f"{one_call}; a warm-up and {effort.fewest_rounds} rounds are beyond the budget of {effort.budget_seconds:g} s"
    )


def _sample(run: Callable[[], object], least: float, clock: Callable[[], float]) -> tuple[float, int]:
    """Call ``run`` until ``least`` seconds are over; returns the seconds and the number of calls, at least one."""
    count, seconds = 0, 0.0
    began = clock()
    while count == 0 or seconds < least:
        run()
        count += 1
        seconds = clock() - began
    return seconds, count


def _raised(error: Exception) -> Outcome:
    line = f"{type(error).__name__}: {error}".splitlines()[0]
    return Outcome((), reason=line, trace=traceback.format_exc())


@contextmanager
def _no_collection() -> Iterator[None]:
    """Keep the garbage collector from running within a sample."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()

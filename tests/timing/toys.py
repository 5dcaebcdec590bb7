"""Contenders whose time is told by a clock of their own."""

from __future__ import annotations

import torch

from headgate.timing import Contender, Effort, Plan, Task, Workload
from tests.timing.hogs import MIB, fill

QUICK = Effort(rounds=5, fewest_rounds=3, sample_seconds=0.01, enough_seconds=1.0, budget_seconds=8.0)


class Clock:
    """Time passes only where a contender says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


CLOCK = Clock()
CALLS: list[tuple[str, int]] = []


def work(seconds):
    """A contender that takes ``seconds``."""

    def run():
        CLOCK.now += seconds

    return run


def build(contender: str, size: int, *, fail: str = "", fail_from: int = 1, wrong: str = "") -> Workload:
    """``fast`` takes size ms, ``slow`` size² ms, ``heavy`` is ``fast`` with work space of a MiB for each unit of size."""

    def run(x):
        CALLS.append((contender, size))
        if contender == fail and size >= fail_from:
            raise RuntimeError("the toy broke")
        CLOCK.now += {"slow": size**2, "fast": size, "heavy": size}[contender] / 1000
        if contender == "heavy":
            fill(bytearray(size * MIB))
        return x + (1 if contender == wrong else 0)

    return Workload(lambda: (torch.ones(256, 1024),), run)


def plan(**changes) -> Plan:
    """Both toys at sizes 1, 2, 4 and 8."""
    options = {
        "name": "toy",
        "label": "playing",
        "size_label": "size",
        "sizes": (1, 2, 4, 8),
        "contenders": (Contender("fast", "Fast toy", agrees="toys"), Contender("slow", "Slow toy", agrees="toys")),
        "ours": "fast",
        "build": f"{__name__}:build",
        "arguments": {},
        "warm_up_size": 1,
        **changes,
    }
    return Plan("Toys", (Task(**options),), floors=lambda results: [])

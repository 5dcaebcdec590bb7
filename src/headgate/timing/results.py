"""What a benchmark has measured. JSON-ready: plain numbers, texts, lists and mappings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from headgate.timing.memory import PeakMemory
from headgate.timing.samples import Summary, growth_exponent, paired_ratios, summarize

__all__ = ["Missing", "Results", "TaskResults", "Times"]


@dataclass(frozen=True)
class Times:
    """Samples of one contender at one size: seconds a call, one entry per round (``None``: it rested)."""

    contender: str
    size: int
    samples: tuple[float | None, ...]
    calls: int

    @property
    def summary(self) -> Summary:
        """Median and quartiles, in seconds."""
        return summarize(self.samples)


@dataclass(frozen=True)
class Missing:
    """Something that was not measured, and why.

    Attributes:
        contender: who.
        size: at which size; ``None``: at none.
        what: ``"left out"`` (beyond a budget, or it cannot run here) or ``"failed"`` (it raised, or gave wrong results).
        measure: ``"time"`` or ``"memory"``.
        reason: one sentence.
        trace: the traceback, where there is one.
    """

    contender: str
    size: int | None
    what: str
    measure: str
    reason: str
    trace: str = ""


@dataclass
class TaskResults:
    """What one task has measured.

    Attributes:
        name, label, size_label, sizes, ours, work_unit, drawn: as in :class:`~headgate.timing.Task`.
        contenders: name → label, in order.
        times: the timings.
        peaks: (contender, size, peak) of the memory measurements.
        missing: what was not measured.
        work: size → units of work in a call.
        arithmetic: size → FLOP of the work.
        columns: heading → contender → size → text.
    """

    name: str
    label: str
    size_label: str
    sizes: tuple[int, ...]
    contenders: dict[str, str]
    ours: str
    work_unit: str = ""
    drawn: bool = True
    times: list[Times] = field(default_factory=list)
    peaks: list[tuple[str, int, PeakMemory]] = field(default_factory=list)
    missing: list[Missing] = field(default_factory=list)
    work: dict[int, float] = field(default_factory=dict)
    arithmetic: dict[int, float] = field(default_factory=dict)
    columns: dict[str, dict[str, dict[int, str]]] = field(default_factory=dict)

    def timing(self, contender: str, size: int) -> Times | None:
        """The times of ``contender`` at ``size``, if it was measured there."""
        return next((t for t in self.times if (t.contender, t.size) == (contender, size)), None)

    def seconds(self, contender: str, size: int) -> float | None:
        """Median seconds a call."""
        times = self.timing(contender, size)
        return None if times is None else times.summary.median

    def peak(self, contender: str, size: int) -> PeakMemory | None:
        """The peak memory of ``contender`` at ``size``, if it was measured there."""
        return next((peak for name, at, peak in self.peaks if (name, at) == (contender, size)), None)

    def ratio(self, numerator: tuple[str, int], denominator: tuple[str, int]) -> Summary | None:
        """Time of one (contender, size) over that of another one: median and quartiles of the rounds' ratios."""
        above, below = self.timing(*numerator), self.timing(*denominator)
        if above is None or below is None:
            return None
        return summarize(paired_ratios(above.samples, below.samples))

    def exponent(self, contender: str, sizes: Sequence[int]) -> float | None:
        """The p of time ∝ size^p over ``sizes``; ``None`` where one of them was not measured."""
        values = [self.seconds(contender, size) for size in sizes]
        known = [value for value in values if value is not None]
        return growth_exponent(sizes, known) if len(known) == len(sizes) > 1 else None

    def why_missing(self, contender: str, size: int, measure: str = "time") -> str:
        """Why ``contender`` was not measured at ``size``; empty where nothing is known."""
        for missing in self.missing:
            if missing.contender == contender and missing.size in (None, size) and missing.measure in ("time", measure):
                return f"{missing.what}: {missing.reason}"
        if contender not in self.contenders:
            return "not in this run"
        return "" if size in self.sizes else f"{self.size_label} {size} is not in this run"

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> TaskResults:
        """The inverse of ``dataclasses.asdict``, after a way through JSON."""
        values = dict(content)
        values["sizes"] = tuple(values["sizes"])
        values["times"] = [Times(**{**entry, "samples": tuple(entry["samples"])}) for entry in values["times"]]
        values["peaks"] = [(name, size, PeakMemory(**peak)) for name, size, peak in values["peaks"]]
        values["missing"] = [Missing(**entry) for entry in values["missing"]]
        for key in ("work", "arithmetic"):
            values[key] = _by_size(values[key])
        values["columns"] = {
            heading: {name: _by_size(cells) for name, cells in column.items()}
            for heading, column in values["columns"].items()
        }
        return cls(**values)


@dataclass
class Results:
    """What a whole benchmark has measured.

    Attributes:
        tasks: name → results, in the order in which they ran.
        sgemm: FLOP/s of a float32 matrix product in this run: the best of what was measured before, between and after
            the tasks.
        threads: threads that everything ran with.
        interrupted: whether it was broken off; what had not been measured by then is named as missing.
    """

    tasks: dict[str, TaskResults] = field(default_factory=dict)
    sgemm: float = 0.0
    threads: int = 1
    interrupted: bool = False

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dictionary."""
        return asdict(self)

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Results:
        """The results in ``content``, as :meth:`to_dict` made it, possibly after a way through JSON."""
        tasks = {name: TaskResults.from_dict(task) for name, task in content["tasks"].items()}
        return cls(tasks, content["sgemm"], content["threads"], content.get("interrupted", False))


def _by_size(values: Mapping[Any, Any]) -> dict[int, Any]:
    """JSON has text keys only."""
    return {int(size): value for size, value in values.items()}

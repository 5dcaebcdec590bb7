"""What a benchmark measures: tasks, each with contenders and sizes; and the floors that it must reach.

A room's ``bench.py`` says it: ``Settings``, a frozen dataclass of what a user may change; ``QUICK``, the settings of a
short run; and ``plan(settings) -> Plan``. How things are measured is not its business.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from headgate.timing.results import Results

__all__ = ["Contender", "Floor", "Plan", "Task"]


@dataclass(frozen=True)
class Contender:
    """One of those that do the same work.

    Attributes:
        name: passed to the task's builder as ``contender``.
        label: how it is called in tables and figures.
        unavailable: why it cannot run here; empty if it can.
        needs: size → bytes that a call takes, where this is far more than its inputs, so that a size for which the
            memory does not suffice is left out.
        agrees: contenders of one non-empty word must give the same results; one that does not is no contender.
    """

    name: str
    label: str
    unavailable: str = ""
    needs: Callable[[int], float] | None = None
    agrees: str = ""


@dataclass(frozen=True)
class Task:
    """One kind of work, done by several contenders at several sizes.

    Attributes:
        name: its key.
        label: its title.
        size_label: what a size is, e.g. ``"length"``.
        sizes: the sizes, rising.
        contenders: who does it.
        ours: the contender that the others are held against.
        build: ``"package.module:function"``; called with ``contender``, ``size`` and ``arguments``, it makes the
            :class:`~headgate.timing.Workload`.
        arguments: further keywords of the builder; JSON values.
        warm_up_size: a small size, at which the processes that measure memory warm up.
        memory_sizes: the sizes at which peak memory is measured.
        rounds_over: what stands side by side in one round: the contenders at one size, or all of them at all sizes,
            so that times of different sizes can be compared as pairs.
        work: size → units of work in one call, for the throughput.
        work_unit: e.g. ``"tokens"``.
        arithmetic: size → FLOP of the work, for the line of the machine's own limit.
        columns: heading → (contender, size) → text: what is known without measuring, e.g. counted FLOPs.
        tolerance: largest relative RMS difference between contenders that must agree.
        drawn: whether the figure shows it.
    """

    name: str
    label: str
    size_label: str
    sizes: tuple[int, ...]
    contenders: tuple[Contender, ...]
    ours: str
    build: str
    arguments: Mapping[str, float | int | str | bool]
    warm_up_size: int
    memory_sizes: tuple[int, ...] = ()
    rounds_over: Literal["contenders", "everything"] = "contenders"
    work: Callable[[int], float] | None = None
    work_unit: str = ""
    arithmetic: Callable[[int], float] | None = None
    columns: Mapping[str, Callable[[str, int], str]] = field(default_factory=dict)
    tolerance: float = 5e-3
    drawn: bool = True

    def __post_init__(self) -> None:
        names = [contender.name for contender in self.contenders]
        if len(set(names)) != len(names) or not names:
            raise ValueError(f"contenders must be named, each once, got {names}")
        if not self.sizes or list(self.sizes) != sorted(set(self.sizes)) or self.sizes[0] < 1:
            raise ValueError(f"sizes must be positive and rise, got {self.sizes}")
        strangers = sorted(set(self.memory_sizes) - set(self.sizes))
        if strangers:
            raise ValueError(f"memory_sizes must be among the sizes {self.sizes}, got {strangers}")


@dataclass(frozen=True)
class Floor:
    """One thing that a benchmark must show.

    Attributes:
        name: its key.
        statement: one sentence.
        value: what was measured; ``None`` if it was not.
        limit: what is asked for.
        relation: how ``value`` must stand to ``limit``; ``"equals"``: within ``tolerance``.
        unit: of both.
        reason: why it was not measured, or a remark.
        tolerance: for ``"equals"``.
    """

    name: str
    statement: str
    value: float | None
    limit: float
    relation: Literal["at least", "at most", "equals"]
    unit: str = "×"
    reason: str = ""
    tolerance: float = 0.0

    @property
    def met(self) -> bool | None:
        """Whether the floor is reached; ``None`` where it was not measured."""
        if self.value is None:
            return None
        if self.relation == "at least":
            return self.value >= self.limit
        if self.relation == "at most":
            return self.value <= self.limit
        return abs(self.value - self.limit) <= self.tolerance


@dataclass(frozen=True)
class Plan:
    """A whole benchmark.

    Attributes:
        title: what is compared.
        tasks: in the order in which they run.
        floors: results → the table of floors.
        notes: facts that a reader needs.
        device: where everything runs.
    """

    title: str
    tasks: tuple[Task, ...]
    floors: Callable[[Results], list[Floor]]
    notes: tuple[str, ...] = ()
    device: str = "cpu"

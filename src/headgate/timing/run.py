"""Runs a benchmark's plan: times in rounds, peaks in fresh processes, and a word on all that could not be measured."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Hashable
from typing import Any, Protocol

from headgate.timing.machine import available_memory, sgemm_rate
from headgate.timing.memory import MemoryFailure, measure_peak
from headgate.timing.plan import Contender, Plan, Task
from headgate.timing.results import Missing, Results, TaskResults, Times
from headgate.timing.rounds import Effort, compare, too_slow
from headgate.timing.samples import growth_exponent
from headgate.timing.workload import load_builder, relative_difference

__all__ = ["Progress", "run_plan"]

_MEMORY_SHARE = 0.7
"""Of the free memory: what a contender may be expected to need at most."""


class Progress(Protocol):
    """What a run tells while it works."""

    def begin(self, steps: int) -> None:
        """There are so many steps."""

    def working(self, text: str) -> None:
        """What is being measured now."""

    def done(self, text: str) -> None:
        """A step is done, with this result."""


class _Silent:
    def begin(self, steps: int) -> None:
        pass

    def working(self, text: str) -> None:
        pass

    def done(self, text: str) -> None:
        pass


def run_plan(
    plan: Plan,
    effort: Effort,
    *,
    threads: int = 1,
    progress: Progress | None = None,
    clock: Callable[[], float] = time.perf_counter,
    sgemm_size: int = 2048,
) -> Results:
    """Measure everything in ``plan``.

    Args:
        plan: what to measure.
        effort: how long.
        threads: threads of the processes that measure memory; this process must be held to as many already.
        progress: is told what happens; default: nothing is shown.
        clock: the time in seconds, for the rounds.
        sgemm_size: side of the matrices whose product gives the machine's own rate.

    Returns:
        The results. A contender that raises, gives wrong results or is beyond a budget is named there with the reason,
        and the others go on. After Ctrl-C they are what had been measured by then.

    Raises:
        KeyboardInterrupt: Ctrl-C came before anything was measured.
    """
    progress = progress or _Silent()
    results = Results(threads=threads)
    groups = {task.name: _groups(task) for task in plan.tasks}
    progress.begin(sum(len(groups[task.name]) + len(task.memory_sizes) * len(task.contenders) for task in plan.tasks))

    def measure_machine() -> None:
        results.sgemm = max(results.sgemm, sgemm_rate(sgemm_size, device=plan.device))

    try:
        measure_machine()
        for task in plan.tasks:
            found = _empty(task)
            results.tasks[task.name] = found
            for sizes in groups[task.name]:
                place = f"{task.label}, {task.size_label} {', '.join(map(str, sizes))}"
                progress.working(place)
                _time(task, sizes, found, effort, clock)
                progress.done(f"{place}: {_best(found, sizes)}")
            for size in task.memory_sizes:
                for contender in task.contenders:
                    place = f"peak memory, {task.label}, {task.size_label} {size}: {contender.label}"
                    progress.working(place)
                    progress.done(f"{place}: {_peak(task, contender, size, found, effort, threads, plan.device)}")
            measure_machine()
    except KeyboardInterrupt:
        if not any(found.times for found in results.tasks.values()):
            raise
        _name_what_is_missing(plan, results)
    return results


def _name_what_is_missing(plan: Plan, results: Results) -> None:
    results.interrupted = True
    for task in plan.tasks:
        found = results.tasks.setdefault(task.name, _empty(task))
        for size in task.sizes:
            for contender in task.contenders:
                if found.timing(contender.name, size) is None and not found.why_missing(contender.name, size):
                    found.missing.append(Missing(contender.name, size, "left out", "time", "the run was interrupted"))


def _groups(task: Task) -> list[tuple[int, ...]]:
    """The sizes that stand side by side in one round."""
    return [task.sizes] if task.rounds_over == "everything" else [(size,) for size in task.sizes]


def _empty(task: Task) -> TaskResults:
    found = TaskResults(
        name=task.name,
        label=task.label,
        size_label=task.size_label,
        sizes=task.sizes,
        contenders={contender.name: contender.label for contender in task.contenders},
        ours=task.ours,
        work_unit=task.work_unit,
        drawn=task.drawn,
        work={} if task.work is None else {size: task.work(size) for size in task.sizes},
        arithmetic={} if task.arithmetic is None else {size: task.arithmetic(size) for size in task.sizes},
        columns={
            heading: {
                contender.name: {size: cell(contender.name, size) for size in task.sizes}
                for contender in task.contenders
            }
            for heading, cell in task.columns.items()
        },
    )
    for contender in task.contenders:
        if contender.unavailable:
            found.missing.append(Missing(contender.name, None, "left out", "time", contender.unavailable))
    return found


def _time(task: Task, sizes: tuple[int, ...], found: TaskResults, effort: Effort, clock: Callable[[], float]) -> None:
    """Time the contenders at ``sizes`` side by side and add what came of it to ``found``."""
    calls: dict[Hashable, Callable[[], Any]] = {}
    for size in sizes:
        for contender in task.contenders:
            if found.why_missing(contender.name, size):
                continue
            reason = _beyond_budget(contender, size, found, effort)
            if reason:
                found.missing.append(Missing(contender.name, size, "left out", "time", reason))
                continue
            try:
                build = load_builder(task.build)
                calls[contender.name, size] = build(contender=contender.name, size=size, **task.arguments).prepare()
            except Exception as error:
                found.missing.append(_failed(contender.name, size, error))
    if task.sizes[0] in sizes:
        for name in _disagreeing(task, calls, found):
            calls = {key: call for key, call in calls.items() if key[0] != name}  # type: ignore[index]
    for key, outcome in compare(calls, effort, clock).items():
        name, size = key  # type: ignore[misc]
        if outcome.reason:
            what = "failed" if outcome.trace else "left out"
            found.missing.append(Missing(name, size, what, "time", outcome.reason, outcome.trace))
        else:
            found.times.append(Times(name, size, outcome.samples, outcome.calls))


def _beyond_budget(contender: Contender, size: int, found: TaskResults, effort: Effort) -> str:
    """Why ``contender`` is left out at ``size``, judged from its smaller sizes and from the memory that is free."""
    if contender.needs is not None:
        need, free = contender.needs(size), available_memory()
        if free is not None and need > _MEMORY_SHARE * free:
            return f"a call needs about {need / 2**30:.1f} GiB, and {free / 2**30:.1f} GiB of memory are free"
    for gap in found.missing:
        if gap.contender == contender.name and gap.measure == "time" and gap.size is not None and gap.size < size:
            return f"it failed at {found.size_label} {gap.size}" if gap.what == "failed" else gap.reason
    known = [(times.size, times.summary.median) for times in found.times if times.contender == contender.name][-2:]
    if not known:
        return ""
    at, seconds = known[-1]
    power = max(0.0, growth_exponent(*zip(*known, strict=True))) if len(known) > 1 else 1.0
    expected = seconds * (size / at) ** power
    return too_slow(expected, effort, expected=True) if expected > effort.longest_call() else ""


def _disagreeing(task: Task, calls: dict[Hashable, Callable[[], Any]], found: TaskResults) -> list[str]:
    """Contenders whose results at the smallest size are not those of the first one that must agree with them."""
    first: dict[str, tuple[str, Any]] = {}
    wrong = []
    for contender in task.contenders:
        call = calls.get((contender.name, task.sizes[0]))
        if call is None or not contender.agrees:
            continue
        try:
            results = call()
        except Exception as error:
            found.missing.append(_failed(contender.name, None, error))
            wrong.append(contender.name)
            continue
        if contender.agrees not in first:
            first[contender.agrees] = contender.label, results
            continue
        label, expected = first[contender.agrees]
        difference = relative_difference(results, expected)
        if not difference <= task.tolerance:
            reason = f"its results differ from those of {label} by {difference:.1e} (relative RMS)"
            found.missing.append(Missing(contender.name, None, "failed", "time", reason))
            wrong.append(contender.name)
    return wrong


def _peak(
    task: Task, contender: Contender, size: int, found: TaskResults, effort: Effort, threads: int, device: str
) -> str:
    """Measure one peak, add it to ``found``, and put it into words."""
    if found.timing(contender.name, size) is None:
        return "left out, as its time was"
    arguments = {"contender": contender.name, **task.arguments}
    try:
        peak = measure_peak(
            task.build,
            {**arguments, "size": size},
            {**arguments, "size": task.warm_up_size},
            device=device,
            threads=threads,
            time_limit=120 + 2 * effort.budget_seconds,
        )
    except MemoryFailure as failure:
        found.missing.append(Missing(contender.name, size, "failed", "memory", str(failure), failure.trace))
        return f"failed: {failure}"
    found.peaks.append((contender.name, size, peak))
    return f"{peak.peak_bytes / 2**20:.1f} MiB, {peak.ratio:.2f} × inputs and results"


def _failed(name: str, size: int | None, error: Exception) -> Missing:
    line = f"{type(error).__name__}: {error}".splitlines()[0]
    return Missing(name, size, "failed", "time", line, traceback.format_exc())


def _best(found: TaskResults, sizes: tuple[int, ...]) -> str:
    """One line: the medians at ``sizes``."""
    times = [times for times in found.times if times.size in sizes]
    words = [
        f"{found.contenders[t.contender]}{f' {t.size}' if len(sizes) > 1 else ''} {1000 * t.summary.median:.3g} ms"
        for t in times
    ]
    return " · ".join(words) or "nothing could be measured"

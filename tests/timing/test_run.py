from __future__ import annotations

import dataclasses
import json
import sys

import pytest

from headgate.timing import Contender, Plan, Results, run_plan
from headgate.timing import run as run_module
from tests.timing import toys
from tests.timing.hogs import MIB

BOTH = (Contender("fast", "Fast toy", agrees="toys"), Contender("slow", "Slow toy", agrees="toys"))


def measured(plan=None, effort=toys.QUICK, **options):
    results = run_plan(plan or toys.plan(), effort, clock=toys.CLOCK, sgemm_size=8, **options)
    return next(iter(results.tasks.values()))


@pytest.fixture(autouse=True)
def _no_machine(monkeypatch):
    """The toys' clock stands still while matrices are multiplied."""
    rates = iter([10.0, 30.0, 20.0, 25.0])
    monkeypatch.setattr(run_module, "sgemm_rate", lambda *args, **options: next(rates))


def test_every_contender_is_timed_at_every_size():
    task = measured()
    assert {(t.contender, t.size): pytest.approx(t.summary.median) for t in task.times} == {
        (name, size): cost for size in (1, 2, 4, 8) for name, cost in (("fast", size / 1e3), ("slow", size**2 / 1e3))
    }
    assert task.missing == []
    assert task.ratio(("slow", 8), ("fast", 8)).median == pytest.approx(8)
    assert task.exponent("fast", task.sizes) == pytest.approx(1)
    assert task.exponent("slow", task.sizes) == pytest.approx(2)


def test_the_machines_rate_is_the_best_of_the_run():
    assert run_plan(toys.plan(), toys.QUICK, clock=toys.CLOCK).sgemm == 30.0


def test_contenders_of_one_size_stand_side_by_side():
    toys.CALLS.clear()
    measured(effort=dataclasses.replace(toys.QUICK, sample_seconds=1e-9))
    fourth = [name for name, size in toys.CALLS if size == 8]
    # One warm-up each, then rounds in turning order.
    assert fourth == ["fast", "slow"] + ["fast", "slow", "slow", "fast"] * 2 + ["fast", "slow"]
    assert [size for _, size in toys.CALLS] == sorted(size for _, size in toys.CALLS)


def test_all_sizes_may_stand_side_by_side():
    toys.CALLS.clear()
    one = (Contender("fast", "Fast toy"),)
    task = measured(
        toys.plan(contenders=one, rounds_over="everything"), dataclasses.replace(toys.QUICK, sample_seconds=1e-9)
    )
    assert [size for _, size in toys.CALLS] == [1, 2, 4, 8] + [1, 2, 4, 8, 8, 4, 2, 1] * 2 + [1, 2, 4, 8]
    assert task.ratio(("fast", 8), ("fast", 4)).median == pytest.approx(2)


def test_a_size_beyond_the_budget_is_foreseen_and_said_and_so_are_all_larger_ones():
    toys.CALLS.clear()
    effort = dataclasses.replace(toys.QUICK, budget_seconds=0.1)  # a call may last 25 ms
    task = measured(toys.plan(sizes=(1, 2, 4, 8, 16)), effort)
    assert task.seconds("slow", 4) == pytest.approx(0.016)
    assert [(gap.contender, gap.size, gap.what) for gap in task.missing] == [
        ("slow", 8, "left out"),
        ("slow", 16, "left out"),
    ]
    assert "beyond the budget of 0.1 s" in task.why_missing("slow", 8)
    assert ("slow", 8) not in toys.CALLS
    assert task.seconds("fast", 16) == pytest.approx(0.016)


def test_a_contender_that_needs_more_memory_than_is_free_is_left_out(monkeypatch):
    monkeypatch.setattr(run_module, "available_memory", lambda: 10 * 2**30)
    greedy = Contender("slow", "Slow toy", needs=lambda size: size * 2**30)
    task = measured(toys.plan(contenders=(BOTH[0], greedy)))
    assert task.seconds("slow", 4) is not None
    assert task.why_missing("slow", 8) == "left out: a call needs about 8.0 GiB, and 10.0 GiB of memory are free"


def test_a_contender_that_cannot_run_here_is_named_with_the_reason():
    away = Contender("slow", "Slow toy", unavailable="it is at home")
    task = measured(toys.plan(contenders=(BOTH[0], away)))
    assert {t.contender for t in task.times} == {"fast"}
    assert task.why_missing("slow", 2) == "left out: it is at home"


def test_a_contender_that_fails_is_named_and_the_others_go_on():
    task = measured(toys.plan(arguments={"fail": "slow"}))
    assert [t.size for t in task.times if t.contender == "fast"] == [1, 2, 4, 8]
    assert task.timing("slow", 1) is None
    assert task.why_missing("slow", 4) == "failed: RuntimeError: the toy broke"
    assert "in run" in next(gap.trace for gap in task.missing if gap.trace)


def test_a_contender_that_fails_at_one_size_is_not_tried_at_larger_ones():
    toys.CALLS.clear()
    task = measured(toys.plan(arguments={"fail": "slow", "fail_from": 4}))
    assert [t.size for t in task.times if t.contender == "slow"] == [1, 2]
    assert task.why_missing("slow", 4) == "failed: RuntimeError: the toy broke"
    assert task.why_missing("slow", 8) == "left out: it failed at size 4"
    assert ("slow", 8) not in toys.CALLS


def test_a_contender_that_cannot_be_built_is_named_and_the_others_go_on():
    task = measured(toys.plan(contenders=(*BOTH, Contender("unheard", "Unheard-of toy")), arguments={"wrong": "slow"}))
    assert {t.contender for t in task.times} == {"fast"}
    assert "KeyError: 'unheard'" in task.why_missing("unheard", 1)


def test_a_contender_with_wrong_results_is_no_contender():
    task = measured(toys.plan(arguments={"wrong": "slow"}))
    assert {t.contender for t in task.times} == {"fast"}
    assert "its results differ from those of Fast toy by 1.0e+00" in task.why_missing("slow", 8)


def test_contenders_that_need_not_agree_may_differ():
    free = (BOTH[0], Contender("slow", "Slow toy"))
    assert {t.contender for t in measured(toys.plan(contenders=free, arguments={"wrong": "slow"})).times} == {
        "fast",
        "slow",
    }


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux lets a process set its high-water mark back")
def test_peak_memory_is_measured_at_the_chosen_sizes():
    heavy = (Contender("fast", "Fast toy"), Contender("heavy", "Heavy toy"))
    task = measured(toys.plan(contenders=heavy, sizes=(1, 24), memory_sizes=(24,)))
    assert task.peak("heavy", 1) is None
    assert task.peak("heavy", 24).peak_bytes == pytest.approx(25 * MIB, rel=0.05)
    assert task.peak("fast", 24).array_bytes == 2 * MIB


def test_peak_memory_that_cannot_be_measured_is_said():
    def broken(*args, **options):
        raise run_module.MemoryFailure("its process was killed", "trace")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_module, "measure_peak", broken)
        task = measured(toys.plan(memory_sizes=(2,)))
    assert task.peaks == []
    assert task.why_missing("fast", 2) == ""
    assert task.why_missing("fast", 2, "memory") == "failed: its process was killed"


def test_progress_is_told_of_every_step():
    class Told:
        def __init__(self):
            self.steps, self.lines = 0, []

        def begin(self, steps):
            self.steps = steps

        def working(self, text):
            pass

        def done(self, text):
            self.lines.append(text)

    told = Told()
    measured(toys.plan(arguments={"fail": "slow"}), progress=told)
    assert told.steps == len(told.lines) == 4
    assert told.lines[2] == "playing, size 4: Fast toy 4 ms"


def test_results_survive_the_way_through_json():
    plan = toys.plan(
        work=lambda size: 2.0 * size,
        work_unit="toys",
        arithmetic=lambda size: 10.0 * size,
        columns={"legs": lambda name, size: f"{name} {size}"},
        arguments={"fail": "slow"},
    )
    results = run_plan(plan, toys.QUICK, clock=toys.CLOCK, threads=2)
    again = Results.from_dict(json.loads(json.dumps(results.to_dict())))
    assert again == results
    assert again.tasks["toy"].columns["legs"]["fast"][4] == "fast 4"
    assert (again.tasks["toy"].work[8], again.tasks["toy"].arithmetic[8]) == (16.0, 80.0)


def test_what_was_measured_before_an_interruption_is_kept_and_the_rest_is_named(monkeypatch):
    def interrupt() -> None:
        raise KeyboardInterrupt

    steps = iter(range(100))
    monkeypatch.setattr(run_module, "_best", lambda *args: interrupt() if next(steps) == 2 else "")
    results = run_plan(toys.plan(), toys.QUICK, clock=toys.CLOCK)
    task = results.tasks["toy"]
    assert results.interrupted
    assert {(t.contender, t.size) for t in task.times} == {
        (name, size) for name in ("fast", "slow") for size in (1, 2, 4)
    }
    assert {(gap.contender, gap.size, gap.reason) for gap in task.missing} == {
        (name, 8, "the run was interrupted") for name in ("fast", "slow")
    }
    assert Results.from_dict(json.loads(json.dumps(results.to_dict()))) == results


def test_an_interruption_before_anything_was_measured_goes_through(monkeypatch):
    def interrupt(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(run_module, "compare", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run_plan(toys.plan(), toys.QUICK, clock=toys.CLOCK)


def test_what_was_not_in_the_run_is_said():
    task = measured()
    assert task.why_missing("fast", 3) == "size 3 is not in this run"
    assert task.why_missing("other", 2) == "not in this run"
    assert task.ratio(("fast", 3), ("fast", 1)) is None
    assert task.exponent("fast", (1, 3)) is None


def test_a_plan_holds_its_tasks_in_order():
    first, second = toys.plan(name="first").tasks[0], toys.plan(name="second").tasks[0]
    results = run_plan(Plan("Two", (first, second), floors=lambda found: []), toys.QUICK, clock=toys.CLOCK)
    assert list(results.tasks) == ["first", "second"]

from __future__ import annotations

import pytest

from headgate.timing import Effort, compare
from tests.timing.toys import CLOCK, work

EFFORT = Effort(rounds=4, fewest_rounds=3, sample_seconds=0.25, enough_seconds=10.0, budget_seconds=100.0)


def recorded(name, seconds, log):
    run = work(seconds)

    def call():
        log.append(name)
        run()

    return call


def test_every_round_calls_every_contender_and_the_order_turns_round():
    log: list[str] = []
    compare({name: recorded(name, 1.0, log) for name in "abc"}, EFFORT, CLOCK)
    assert "".join(log) == "abc" + "abc" + "cba" + "abc" + "cba"


def test_samples_are_seconds_of_one_call():
    outcome = compare({"a": work(0.5), "b": work(2.0)}, EFFORT, CLOCK)
    assert outcome["a"].samples == (0.5,) * 4
    assert outcome["b"].samples == (2.0,) * 4
    assert outcome["b"].calls == 4


def test_short_calls_are_repeated_until_a_sample_lasts_long_enough():
    log: list[str] = []
    outcome = compare({"a": recorded("a", 1 / 64, log)}, EFFORT, CLOCK)
    assert outcome["a"].calls == 4 * 16
    assert outcome["a"].samples == (1 / 64,) * 4
    assert len(log) == 4 * 16 + 16  # the warm-up is as long as a sample


def test_the_warm_up_is_in_no_sample():
    durations = iter([5.0, 1.0, 1.0, 1.0, 1.0])

    def run():
        CLOCK.now += next(durations)

    assert compare({"a": run}, EFFORT, CLOCK)["a"].samples == (1.0,) * 4


def test_a_slow_contender_rests_after_the_fewest_rounds_and_the_others_go_on():
    outcome = compare({"slow": work(4.0), "fast": work(1.0)}, EFFORT, CLOCK)
    assert outcome["slow"].samples == (4.0, 4.0, 4.0, None)
    assert outcome["fast"].samples == (1.0,) * 4


def test_a_contender_beyond_the_budget_is_left_out_after_one_call_and_the_reason_says_so():
    log: list[str] = []
    outcome = compare({"late": recorded("late", 30.0, log), "fast": recorded("fast", 1.0, log)}, EFFORT, CLOCK)
    assert outcome["late"].samples == ()
    assert "a call lasted 30 s" in outcome["late"].reason
    assert "3 rounds are beyond the budget of 100 s" in outcome["late"].reason
    assert log.count("late") == 1
    assert outcome["fast"].samples == (1.0,) * 4


@pytest.mark.parametrize("good_calls", [0, 3])
def test_a_contender_that_fails_is_named_with_its_traceback_and_the_others_go_on(good_calls):
    left = [good_calls]

    def breaks():
        CLOCK.now += 1.0
        left[0] -= 1
        if left[0] < 0:
            raise RuntimeError("the toy broke\nin two lines")

    outcome = compare({"bad": breaks, "good": work(1.0)}, EFFORT, CLOCK)
    assert outcome["bad"].samples == ()
    assert outcome["bad"].reason == "RuntimeError: the toy broke"
    assert "in breaks" in outcome["bad"].trace
    assert outcome["good"].samples == (1.0,) * 4


def test_an_interrupt_is_no_failure_of_a_contender():
    def stop():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compare({"a": stop}, EFFORT, CLOCK)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rounds": 2, "fewest_rounds": 3}, "fewest_rounds must lie between 1 and rounds=2"),
        ({"fewest_rounds": 0}, "fewest_rounds"),
        ({"sample_seconds": 0.0}, "sample_seconds must be positive"),
        ({"budget_seconds": -1.0}, "budget_seconds must be positive"),
    ],
)
def test_an_effort_that_makes_no_sense_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        Effort(**fields)

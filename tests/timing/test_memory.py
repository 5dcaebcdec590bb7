from __future__ import annotations

import sys

import pytest

from headgate.timing import MemoryFailure, measure_peak
from headgate.timing.memory_child import observe
from headgate.timing.meters import HighWaterMeter
from tests.timing import hogs
from tests.timing.hogs import MIB

BUILD = f"{hogs.__name__}:allocate"
linux = pytest.mark.skipif(sys.platform != "linux", reason="only Linux lets a process set its high-water mark back")


def peak(kind, mebibytes=48, weights=0, **options):
    warm_up = {"kind": "tensor" if kind == "tensor" else "nothing", "mebibytes": 1}
    return measure_peak(BUILD, {"kind": kind, "mebibytes": mebibytes, "weights": weights}, warm_up, **options)


@linux
@pytest.mark.parametrize("kind", ["malloc", "mmap", "tensor"])
def test_work_space_of_every_allocator_is_seen(kind):
    found = peak(kind)
    # The inputs exist while the work space does; the result comes after.
    assert found.peak_bytes == pytest.approx(49 * MIB, rel=0.03)
    assert found.array_bytes == 2 * MIB
    assert found.ratio == pytest.approx(24.5, rel=0.03)
    assert found.note == ""


@linux
def test_work_space_that_is_kept_between_calls_counts():
    assert peak("kept").peak_bytes == pytest.approx(50 * MIB, rel=0.03)


@linux
def test_what_was_there_before_the_inputs_does_not_count():
    assert peak("mmap", weights=64).peak_bytes == pytest.approx(49 * MIB, rel=0.03)


def test_a_contender_that_raises_is_a_failure_with_its_own_words():
    with pytest.raises(MemoryFailure, match="RuntimeError: the toy broke") as caught:
        peak("raise", 1)
    assert "in run" in caught.value.trace


def test_a_contender_that_is_killed_is_a_failure():
    with pytest.raises(MemoryFailure, match="killed by signal 9"):
        peak("die", 1)


def test_a_contender_that_takes_too_long_is_ended():
    with pytest.raises(MemoryFailure, match="took longer than 1 s"):
        peak("sleep", 1, time_limit=1)


def test_what_a_contender_prints_does_not_mix_with_the_answer():
    assert peak("print", 1).array_bytes == 2 * MIB


def test_the_process_is_held_to_the_threads():
    with pytest.raises(MemoryFailure, match="held to 3 threads"):
        peak("threads", 1, threads=3)


def test_an_unknown_builder_is_a_failure():
    with pytest.raises(MemoryFailure, match="has no function 'nothing'"):
        measure_peak(f"{hogs.__name__}:nothing", {}, {})


def test_a_mark_that_cannot_be_set_back_gives_a_lower_bound_and_says_so():
    marks = iter([100, 130])
    meter = HighWaterMeter(lambda: next(marks), "a lower bound")
    small = {"kind": "nothing", "mebibytes": 0}
    assert observe(hogs.allocate, small, small, meter) == {
        "peak_bytes": 30,
        "array_bytes": 2 * MIB,
        "note": "a lower bound",
    }

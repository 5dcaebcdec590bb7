from __future__ import annotations

import itertools

import pytest

from headgate.timing import available_memory, sgemm_rate
from headgate.timing.machine import thread_variables


def test_the_rate_is_that_of_the_best_product_after_the_warm_up():
    # (start, end) of the warm-up, which is the shortest here, and of three products.
    ticks = iter([0.0, 0.001, 1.0, 1.5, 2.0, 2.25, 3.0, 4.0])
    assert sgemm_rate(16, repeats=3, clock=lambda: next(ticks)) == 2 * 16**3 / 0.25


def test_a_product_of_matrices_is_measured():
    clock = itertools.count()
    assert sgemm_rate(8, repeats=2, clock=lambda: float(next(clock))) == 2 * 8**3


def test_fresh_processes_are_held_to_the_threads():
    variables = thread_variables(3)
    assert variables["OMP_NUM_THREADS"] == variables["NUMBA_NUM_THREADS"] == "3"


@pytest.fixture
def system(tmp_path):
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text("MemTotal:  9000 kB\nMemFree:  100 kB\nMemAvailable:  4000 kB\n")
    (tmp_path / "sys/fs/cgroup").mkdir(parents=True)
    return tmp_path


def limit(system, most, used):
    (system / "sys/fs/cgroup/memory.max").write_text(f"{most}\n")
    (system / "sys/fs/cgroup/memory.current").write_text(f"{used}\n")


def test_free_memory_is_what_the_kernel_calls_available(system):
    assert available_memory(system) == 4000 * 1024
    limit(system, "max", 5)
    assert available_memory(system) == 4000 * 1024


def test_a_container_may_have_less(system):
    limit(system, 3_000_000, 1_000_000)
    assert available_memory(system) == 2_000_000
    limit(system, 1_000_000, 3_000_000)
    assert available_memory(system) == 0


def test_a_system_that_does_not_tell_gives_none(tmp_path):
    assert available_memory(tmp_path) is None

from __future__ import annotations

from types import SimpleNamespace

import pytest

from headgate.timing.meters import AllocatorMeter, ResidentMeter

STATUS = """Name:\tpython
VmPeak:\t  900 kB
VmHWM:\t  700 kB
VmRSS:\t  600 kB
RssAnon:\t  400 kB
RssFile:\t  150 kB
RssShmem:\t   50 kB
"""


def test_the_linux_meter_reads_the_kernels_account(tmp_path):
    (tmp_path / "status").write_text(STATUS)
    meter = ResidentMeter(tmp_path)
    assert (meter.current(), meter.private(), meter.peak()) == (600 * 1024, 450 * 1024, 700 * 1024)
    meter.reset()
    assert (tmp_path / "clear_refs").read_text() == "5"


def test_a_kernel_without_the_account_is_noticed(tmp_path):
    (tmp_path / "status").write_text("Name:\tpython\n")
    with pytest.raises(OSError, match="has no field VmHWM"):
        ResidentMeter(tmp_path).peak()


def test_the_gpu_meter_asks_the_allocator_of_its_device():
    asked = []

    def answer(name, value):
        return lambda device: asked.append((name, device)) or value

    allocator = SimpleNamespace(
        memory_allocated=answer("now", 5),
        max_memory_allocated=answer("peak", 9),
        reset_peak_memory_stats=answer("reset", None),
        synchronize=answer("wait", None),
    )
    meter = AllocatorMeter(allocator, "cuda:1")
    meter.settle()
    meter.reset()
    assert (meter.current(), meter.peak()) == (5, 9)
    assert asked == [("wait", "cuda:1"), ("reset", "cuda:1"), ("now", "cuda:1"), ("peak", "cuda:1")]

"""Peak memory of one contender, measured in a fresh process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from headgate.timing.machine import thread_variables

__all__ = ["MemoryFailure", "PeakMemory", "measure_peak"]

# With glibc, every larger block is a mapping of its own, which goes back to the system the moment it is freed, and all
# threads share one heap: what the process holds is then what is in use.
_HONEST_MALLOC = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_TRIM_THRESHOLD_": "65536",
    "MALLOC_TOP_PAD_": "0",
}


class MemoryFailure(Exception):
    """The contender could not be measured: it raised, was killed, or took too long. ``trace`` holds what it said."""

    def __init__(self, reason: str, trace: str = "") -> None:
        super().__init__(reason)
        self.trace = trace


@dataclass(frozen=True)
class PeakMemory:
    """The peak of one call.

    Attributes:
        peak_bytes: above what was there before the inputs were made, so inputs and results are in it.
        array_bytes: inputs and results (with gradients, where they belong to the work): what the caller asked for.
        note: what a reader should know about the way of measuring.
    """

    peak_bytes: int
    array_bytes: int
    note: str = ""

    @property
    def ratio(self) -> float:
        """Peak over what the caller asked for; 1 would be no extra memory at all."""
        return self.peak_bytes / self.array_bytes


def measure_peak(
    build: str,
    arguments: Mapping[str, Any],
    warm_up: Mapping[str, Any],
    *,
    device: str = "cpu",
    threads: int = 1,
    time_limit: float | None = None,
) -> PeakMemory:
    """Measure the peak memory of a workload.

    Args:
        build: ``"package.module:function"``, which makes the :class:`~headgate.timing.Workload`.
        arguments: keywords of the function; JSON values.
        warm_up: keywords that make a small workload of the same kind, to load and compile what it needs.
        device: where the workload runs.
        threads: threads of the process.
        time_limit: seconds after which the process is ended.

    Returns:
        Its peak. The resolution is some 0.1 MiB a core, so use sizes of tens of MiB.

    Raises:
        MemoryFailure: the workload raised, was killed (out of memory), or took longer than ``time_limit``.
    """
    request = {"build": build, "arguments": dict(arguments), "warm_up": dict(warm_up), "device": device}
    environment = {
        **os.environ,
        **_HONEST_MALLOC,
        **thread_variables(threads),
        "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path),
    }
    try:
        done = subprocess.run(
            [sys.executable, "-m", "headgate.timing.memory_child"],
            input=json.dumps(request),
            capture_output=True,
            text=True,
            env=environment,
            timeout=time_limit,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise MemoryFailure(f"its process took longer than {time_limit:.0f} s") from None
    if done.returncode < 0:
        raise MemoryFailure(f"its process was killed by signal {-done.returncode} (out of memory?)", done.stderr)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        raise MemoryFailure(lines[-1] if lines else f"its process ended with status {done.returncode}", done.stderr)
    return PeakMemory(**json.loads(done.stdout))

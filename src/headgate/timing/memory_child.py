"""The fresh process in which :func:`headgate.timing.measure_peak` lets one contender run.

It reads a request (JSON) from standard input and writes the answer (JSON) to standard output.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
from collections.abc import Mapping
from typing import Any

from headgate.timing.meters import Meter, choose_meter
from headgate.timing.workload import Builder, array_bytes, load_builder

__all__ = ["main", "observe"]

_PR_SET_PDEATHSIG, _PR_SET_THP_DISABLE = 1, 41


def main() -> None:
    """Answer one request."""
    request = json.load(sys.stdin)
    # What the contender prints goes to standard error, so that it cannot mix with the answer.
    answers = os.dup(1)
    os.dup2(2, 1)
    _prepare_process()
    build = load_builder(request["build"])
    meter = choose_meter(request["device"])
    answer = observe(build, request["arguments"], request["warm_up"], meter)
    with os.fdopen(answers, "w") as stream:
        json.dump(answer, stream)


def observe(build: Builder, arguments: Mapping[str, Any], warm_up: Mapping[str, Any], meter: Meter) -> dict[str, Any]:
    """Measure the peak of one call above what was there before its inputs were made.

    A small call first loads and compiles what the contender needs. Then a call of full size, unmeasured, reads the rest
    of the code from disk; what it leaves behind (work space that is kept for the next call) counts as the contender's.

    Returns:
        ``peak_bytes``; ``array_bytes`` of inputs and results; ``note``.
    """
    small = build(**warm_up)
    small.prepare()()
    del small
    workload = build(**arguments)
    meter.settle()
    kept = 0
    if meter.resettable:
        kept = -meter.private()
        workload.prepare()()
        meter.settle()
        kept = max(0, kept + meter.private())
    before = meter.current()
    inputs = workload.inputs()
    meter.reset()
    results = workload.run(*inputs)
    meter_peak = meter.peak()
    return {
        "peak_bytes": meter_peak - before + kept,
        "array_bytes": array_bytes(inputs, results),
        "note": meter.note,
    }


def _prepare_process() -> None:
    """On Linux: end with the parent, and count the pages that are touched (a huge page would count whole)."""
    if sys.platform != "linux":
        return
    prctl = getattr(ctypes.CDLL(None), "prctl", None)
    if prctl is not None:
        prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        prctl(_PR_SET_THP_DISABLE, 1, 0, 0, 0)


if __name__ == "__main__":
    main()

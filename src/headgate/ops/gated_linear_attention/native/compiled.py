"""The worker of this op, compiled once per machine and dtype."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

from numba import cfunc, float32, float64, types

from headgate.ops.gated_linear_attention.native.work import work
from headgate.ops.native.threads import Worker, sources_digest

__all__ = ["worker"]


@cache
def worker(double: bool) -> Worker:
    """The worker for float64, or for float32. The first call on a machine compiles it, which takes some ten seconds."""
    return Worker((_compile_double if double else _compile_single)(sources_digest(Path(__file__).parent)))


def _compile_single(sources: str) -> Any:
    @cfunc(types.void(types.int64), cache=True)
    def work_single(job: int) -> None:
        if len(sources):  # in use here, it becomes part of the cache's key
            work(job, float32(0))

    return work_single


def _compile_double(sources: str) -> Any:
    @cfunc(types.void(types.int64), cache=True)
    def work_double(job: int) -> None:
        if len(sources):
            work(job, float64(0))

    return work_double

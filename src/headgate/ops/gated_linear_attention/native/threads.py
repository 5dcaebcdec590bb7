"""Compile the worker once per machine, and run it on all threads.

The threads are those that PyTorch itself uses (its OpenMP pool), so that two pools never compete for the cores. Where
PyTorch has no such pool they are Python's; compiled code runs without Python's lock.
"""

from __future__ import annotations

import ctypes
import hashlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numba import cfunc, float32, float64, types

from headgate.ops.gated_linear_attention.native.work import work

__all__ = ["run_workers"]


@cache
def _sources() -> str:
    """A digest of this folder's code: numba's cache looks at the file of the outermost function alone."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _compile_single(sources: str) -> Any:
    @cfunc(types.void(types.int64), cache=True, nopython=True)
    def work_single(job: int) -> None:
        if len(sources):
            work(job, float32(0))

    return work_single


def _compile_double(sources: str) -> Any:
    @cfunc(types.void(types.int64), cache=True, nopython=True)
    def work_double(job: int) -> None:
        if len(sources):
            work(job, float64(0))

    return work_double


@cache
def _worker(double: bool) -> tuple[int, Callable[[int], None], Any]:
    """Address, and the same as something to call; the third one keeps the code alive."""
    function = (_compile_double if double else _compile_single)(_sources())
    return function.address, ctypes.CFUNCTYPE(None, ctypes.c_int64)(function.address), function


@cache
def _openmp() -> Callable[[int, int, int, int], None] | None:
    """Start of a parallel region in the OpenMP library that PyTorch has loaded, if it is GNU's."""
    try:
        start = ctypes.CDLL(None).GOMP_parallel
    except (AttributeError, OSError, TypeError):
        return None
    start.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
    start.restype = None
    return start


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads - 1, thread_name_prefix="headgate")


def run_workers(job: np.ndarray, threads: int, double: bool) -> None:
    """Run the worker on ``threads`` threads and wait for all of them."""
    address, call, _ = _worker(double)
    where = job.ctypes.data
    if threads == 1:
        call(where)
        return
    openmp = _openmp()
    if openmp is not None:
        openmp(address, where, threads, 0)
        return
    others = [_pool(threads).submit(call, where) for _ in range(threads - 1)]
    call(where)
    for other in others:
        other.result()

"""Compiled workers, and the threads that run them.

A worker is a numba function of one argument, the address of a table of 64-bit integers, the job. The threads are those
that PyTorch itself uses (its OpenMP pool), so that two pools never compete for the cores. Where PyTorch has no such pool
they are Python's; compiled code runs without Python's lock.
"""

from __future__ import annotations

import ctypes
import hashlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

__all__ = ["Worker", "sources_digest"]

_SHARED = Path(__file__).parent


@cache
def sources_digest(folder: Path) -> str:
    """A digest of the code in ``folder`` and in this one, as a key of numba's cache.

    That cache by itself looks at the file of the outermost function alone, and would take code compiled from other
    files for fresh after they have changed.
    """
    digest = hashlib.sha256()
    for path in sorted([*folder.glob("*.py"), *_SHARED.glob("*.py")]):
        digest.update(path.read_bytes())
    return digest.hexdigest()


class Worker:
    """A compiled worker that runs jobs.

    Args:
        function: what ``numba.cfunc`` returned for ``void(int64)``.
    """

    def __init__(self, function: Any) -> None:
        self._function = function  # keeps the code alive
        self._address = function.address
        self._call = ctypes.CFUNCTYPE(None, ctypes.c_int64)(function.address)

    def run(self, job: Sequence[int], threads: int) -> None:
        """Let ``threads`` threads work on the table ``job``, and wait for all of them."""
        table = (ctypes.c_int64 * len(job))(*job)
        where = ctypes.addressof(table)
        if threads == 1:
            self._call(where)
            return
        openmp = _openmp()
        if openmp is not None:
            openmp(self._address, where, threads, 0)
            return
        others = [_pool(threads).submit(self._call, where) for _ in range(threads - 1)]
        self._call(where)
        for other in others:
            other.result()


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

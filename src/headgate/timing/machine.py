"""What the machine itself can do: its rate of float32 matrix products, its threads, the memory that is free."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable
from pathlib import Path

__all__ = ["available_memory", "sgemm_rate", "thread_variables", "use_threads"]


def sgemm_rate(
    size: int = 2048, repeats: int = 5, device: str = "cpu", clock: Callable[[], float] = time.perf_counter
) -> float:
    """FLOP/s of the product of two float32 matrices of ``size`` × ``size``; the best of ``repeats`` after a warm-up.

    It is the most arithmetic that the machine's own library gets out of the cores: a limit to hold times against.
    """
    import torch

    generator = torch.Generator(device).manual_seed(0)
    a, b = (torch.randn(size, size, generator=generator, device=device) for _ in range(2))
    product = torch.empty_like(a)
    times = []
    for _ in range(repeats + 1):
        began = clock()
        torch.matmul(a, b, out=product)
        if device != "cpu":
            torch.cuda.synchronize(device)
        times.append(clock() - began)
    return 2 * size**3 / min(times[1:])


def thread_variables(threads: int) -> dict[str, str]:
    """Environment variables that hold a fresh process to ``threads`` threads."""
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS")
    return dict.fromkeys(names, str(threads))


def use_threads(threads: int) -> None:
    """Hold this process to ``threads`` threads; call it before what it concerns is imported."""
    os.environ.update(thread_variables(threads))
    import torch

    torch.set_num_threads(threads)


def available_memory(folder: Path = Path("/")) -> int | None:
    """Bytes that this process may still take without swapping, or ``None`` where the system does not tell.

    Args:
        folder: where the system's ``proc`` and ``sys`` stand.
    """
    try:
        found = re.search(r"^MemAvailable:\s+(\d+) kB$", (folder / "proc/meminfo").read_text(), flags=re.MULTILINE)
    except OSError:
        found = None
    if found is None:
        return None
    free = 1024 * int(found[1])
    group = folder / "sys/fs/cgroup"
    try:
        limit, used = ((group / name).read_text().strip() for name in ("memory.max", "memory.current"))
    except OSError:
        return free
    return min(free, max(0, int(limit) - int(used))) if limit.isdigit() else free

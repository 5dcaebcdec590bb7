"""Instruments that read how much memory this process holds, and how much it held at most.

The Linux meter reads the kernel's own account of the pages that are present, so it sees every allocator alike: malloc,
mmap, and compiled code that brings its own.
"""

from __future__ import annotations

import ctypes
import gc
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

__all__ = ["AllocatorMeter", "HighWaterMeter", "Meter", "ResidentMeter", "choose_meter"]


class Meter(Protocol):
    """Reads memory in bytes.

    Attributes:
        note: what a reader of the figures should know about this way of measuring.
        resettable: whether the high-water mark can be set back, so that a warm-up does not hide what follows it.
    """

    note: str
    resettable: bool

    def settle(self) -> None:
        """Give back to the system what is free."""

    def current(self) -> int:
        """Bytes held now."""

    def private(self) -> int:
        """Bytes held now, program code that was read from files left out."""

    def reset(self) -> None:
        """Set the high-water mark back to what is held now."""

    def peak(self) -> int:
        """The most that was held since :meth:`reset`."""


class ResidentMeter:
    """Linux: the pages of this process that are present (``/proc/self/status``)."""

    note = ""
    resettable = True

    def __init__(self, folder: Path = Path("/proc/self")) -> None:
        self.folder = folder

    def settle(self) -> None:
        """Collect garbage and trim the heap."""
        gc.collect()
        _trim()

    def current(self) -> int:
        """``VmRSS``."""
        return self._read("VmRSS")

    def private(self) -> int:
        """``RssAnon`` and ``RssShmem``."""
        return self._read("RssAnon") + self._read("RssShmem")

    def reset(self) -> None:
        """Set ``VmHWM`` back to ``VmRSS``."""
        (self.folder / "clear_refs").write_text("5")

    def peak(self) -> int:
        """``VmHWM``."""
        return self._read("VmHWM")

    def _read(self, field: str) -> int:
        status = (self.folder / "status").read_text()
        found = re.search(rf"^{field}:\s+(\d+) kB$", status, flags=re.MULTILINE)
        if found is None:
            raise OSError(f"{self.folder / 'status'} has no field {field}")
        return 1024 * int(found[1])


class HighWaterMeter:
    """A mark that only rises: the largest size of the process so far.

    Args:
        read: the mark in bytes.
        note: what kind of mark it is.
    """

    resettable = False

    def __init__(self, read: Callable[[], int], note: str) -> None:
        self.read = read
        self.note = note

    def settle(self) -> None:
        """Collect garbage."""
        gc.collect()

    def current(self) -> int:
        """The mark."""
        return self.read()

    def private(self) -> int:
        """The mark."""
        return self.read()

    def reset(self) -> None:
        """Nothing: the mark cannot be set back."""

    def peak(self) -> int:
        """The mark."""
        return self.read()


class AllocatorMeter:
    """A GPU: what PyTorch's allocator has handed out.

    Args:
        allocator: the module ``torch.cuda``.
        device: the GPU.
    """

    note = "as PyTorch's GPU allocator counts"
    resettable = True

    def __init__(self, allocator: Any, device: str) -> None:
        self.allocator = allocator
        self.device = device

    def settle(self) -> None:
        """Collect garbage and wait for the device."""
        gc.collect()
        self.allocator.synchronize(self.device)

    def current(self) -> int:
        """Bytes handed out now."""
        return int(self.allocator.memory_allocated(self.device))

    def private(self) -> int:
        """The same."""
        return self.current()

    def reset(self) -> None:
        """Set the allocator's peak back."""
        self.allocator.reset_peak_memory_stats(self.device)

    def peak(self) -> int:
        """The allocator's peak."""
        return int(self.allocator.max_memory_allocated(self.device))


def choose_meter(device: str) -> Meter:
    """The best meter for ``device`` on this system.

    Raises:
        OSError: this system offers none.
    """
    if device != "cpu":
        import torch

        return AllocatorMeter(torch.cuda, device)
    resident = ResidentMeter()
    try:
        resident.current(), resident.private(), resident.peak()
    except OSError:
        return HighWaterMeter(
            _largest_size(), "a lower bound: this system tells only the process's largest size so far"
        )
    try:
        resident.reset()
    except OSError:
        return HighWaterMeter(resident.peak, "a lower bound: this system does not let the high-water mark be set back")
    return resident


def _largest_size() -> Callable[[], int]:
    if sys.platform == "win32":
        raise OSError("this system offers no way to read the process's largest size")
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return lambda: unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _trim() -> None:
    """Give free heap memory back to the system, where the C library can."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)

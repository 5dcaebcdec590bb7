"""Memory for large results: mapped in large pages where the system grants them, and used again where it is free.

The C library keeps freed memory for the next tensor, but returns blocks of more than 32 MiB to the system. Such a tensor
is mapped anew every time, page by page at first touch, and the system clears every page before the arithmetic fills it.
Two things are done about it. Pages of 2 MiB instead of 4 KiB make the faults five hundred times fewer. And the block of a
result that nobody holds any more is kept for the next one of the same size, at most ``HEADGATE_KEEP_MIB`` MiB in all
(default 256; 0 keeps nothing); :func:`release` returns what is kept to the system.
"""

from __future__ import annotations

import ctypes
import math
import mmap
import os
import weakref
from collections.abc import Callable, Sequence
from functools import cache
from threading import RLock

import torch
from torch import Tensor

__all__ = ["ask_for_huge_pages", "kept_bytes", "new_result", "release"]

_HUGE_PAGE = 2 << 20
_ASKED = 4 << 20
# The C library keeps what is smaller by itself.
_ALWAYS_FRESH = 32 << 20


@cache
def _advise() -> Callable[[int, int, int], int] | None:
    """The C library's ``madvise``, where huge pages can be asked for."""
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return None
    try:
        function = ctypes.CDLL(None).madvise
    except (AttributeError, OSError, TypeError):
        return None
    function.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return function


def ask_for_huge_pages(tensor: Tensor) -> None:
    """Ask for huge pages for the whole ones inside a new contiguous tensor; a wish, without effect on its contents."""
    size = tensor.numel() * tensor.element_size()
    if size < _ASKED:
        return
    advise = _advise()
    if advise is not None:
        start = -(-tensor.data_ptr() // _HUGE_PAGE) * _HUGE_PAGE
        end = (tensor.data_ptr() + size) // _HUGE_PAGE * _HUGE_PAGE
        advise(start, end - start, mmap.MADV_HUGEPAGE)


def new_result(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """An uninitialised contiguous tensor of this shape on the CPU, in a block that is kept for the next when it is freed."""
    size = math.prod(shape) * dtype.itemsize
    if size < _ALWAYS_FRESH or size > _limit():
        result = torch.empty(*shape, dtype=dtype)
        ask_for_huge_pages(result)
        return result
    block = _kept.take(size)
    if block is None:
        block = torch.empty(size, dtype=torch.uint8)
        ask_for_huge_pages(block)
    # PyTorch holds this array, and nothing else does, until the last tensor on the block is gone.
    array = block.numpy()
    weakref.finalize(array, _kept.put, block).atexit = False
    return torch.from_numpy(array).view(dtype).view(*shape)


def kept_bytes() -> int:
    """Bytes of the free blocks that are kept."""
    return _kept.size


def release() -> None:
    """Return the free blocks to the system."""
    _kept.clear()


def _limit() -> int:
    value = os.environ.get("HEADGATE_KEEP_MIB", "256")
    if not value.isdecimal():
        raise ValueError(f"HEADGATE_KEEP_MIB must be a whole number of MiB, at least 0, got {value!r}")
    return int(value) << 20


class _Kept:
    """Free blocks by address, the one freed last at the end.

    A finalizer may run within any line of this class, in the same thread: the lock can be taken twice, and nothing that
    was looked up is taken for granted.
    """

    def __init__(self) -> None:
        self.size = 0
        self._blocks: dict[int, Tensor] = {}
        self._lock = RLock()

    def take(self, size: int) -> Tensor | None:
        """A free block of exactly this size, which is ours no longer."""
        with self._lock:
            for address, block in reversed(tuple(self._blocks.items())):
                if block.numel() == size and self._drop(address):
                    return block
        return None

    def put(self, block: Tensor) -> None:
        """Keep a block, in place of those freed longest ago where all would be too much."""
        with self._lock:
            self._blocks[block.data_ptr()] = block
            self.size += block.numel()
            for address in tuple(self._blocks):
                if self.size <= _limit():
                    break
                self._drop(address)

    def clear(self) -> None:
        """Drop all."""
        with self._lock:
            for address in tuple(self._blocks):
                self._drop(address)

    def _drop(self, address: int) -> bool:
        block = self._blocks.pop(address, None)
        if block is None:
            return False
        self.size -= block.numel()
        return True


_kept = _Kept()

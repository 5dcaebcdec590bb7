"""Fresh memory for large results, mapped in large pages where the system grants them.

The C library keeps freed memory for the next tensor, but returns blocks of more than 32 MiB to the system. Such a tensor
is mapped anew every time, page by page at first touch, which takes longer than the arithmetic that fills it. Pages of
2 MiB instead of 4 KiB make it five hundred times fewer.
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Callable
from functools import cache

from torch import Tensor

__all__ = ["ask_for_huge_pages"]

_HUGE_PAGE = 2 << 20
_ALWAYS_FRESH = 4 << 20


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
    if size < _ALWAYS_FRESH:
        return
    advise = _advise()
    if advise is not None:
        start = -(-tensor.data_ptr() // _HUGE_PAGE) * _HUGE_PAGE
        end = (tensor.data_ptr() + size) // _HUGE_PAGE * _HUGE_PAGE
        advise(start, end - start, mmap.MADV_HUGEPAGE)

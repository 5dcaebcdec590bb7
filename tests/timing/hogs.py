"""Contenders whose memory is known to the byte. They load no torch unless they are asked for tensors."""

from __future__ import annotations

import ctypes
import mmap
import os
import time

from headgate.timing import Workload

MIB = 2**20
KEPT: list[object] = []


def fill(memory) -> None:
    """Touch every page."""
    view = memoryview(memory).cast("B")
    for start in range(0, len(view), 4096):
        view[start] = 1


def malloc(size: int):
    """Memory of the C library's heap, freed by hand: many blocks, small and large."""
    libc = ctypes.CDLL(None)
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    libc.free.argtypes = [ctypes.c_void_p]
    block = 32 * 1024
    blocks = [libc.malloc(block) for _ in range(size // block)]
    for place in blocks:
        ctypes.memset(place, 1, block)
    return blocks, libc.free


def allocate(kind: str, mebibytes: int, weights: int = 0) -> Workload:
    """Inputs of one MiB, results of one MiB, and between them ``mebibytes`` of work space of the given kind."""
    weight = bytearray(weights * MIB)
    fill(weight)

    def inputs():
        array = bytearray(MIB)
        fill(array)
        return (array,)

    def run(array):
        size = mebibytes * MIB
        if kind == "malloc":
            blocks, free = malloc(size)
            for place in blocks:
                free(place)
        elif kind == "mmap":
            with mmap.mmap(-1, size) as area:
                view = memoryview(area)
                fill(view)
                view.release()
        elif kind == "tensor":
            import torch

            torch.ones(size // 4).sum()
        elif kind == "kept" and not KEPT:
            KEPT.append(bytearray(size))
            fill(KEPT[0])
        elif kind == "raise":
            raise RuntimeError("the toy broke")
        elif kind == "threads":
            raise RuntimeError(f"held to {os.environ['OMP_NUM_THREADS']} threads")
        elif kind == "die":
            os.kill(os.getpid(), 9)
        elif kind == "sleep":
            time.sleep(600)
        elif kind == "print":
            print("a toy that talks")
            os.system("echo and its child, too")
        result = bytearray(MIB)
        fill(result)
        return result

    return Workload(inputs, run)

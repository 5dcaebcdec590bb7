"""Gated linear attention compiled for this CPU: forwards, backwards, and in both directions.

``tiles`` holds what one core does with its registers, ``buffers`` its scratch memory with the state, ``scan`` the
algorithm, ``chunk`` and ``gate_gradient`` its steps beside the products, ``work`` what one thread does with one head,
``compiled`` the machine code. This module gives them the tensors.
"""

from __future__ import annotations

import math
import struct
from functools import lru_cache
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from headgate.ops.gated_linear_attention.native.buffers import padded_height, padded_width
from headgate.ops.gated_linear_attention.native.compiled import worker
from headgate.ops.gated_linear_attention.native.work import ENTRIES, TENSORS
from headgate.ops.gated_linear_attention.registration import state_dtype
from headgate.ops.native.memory import new_result
from headgate.ops.native.tiles import CHUNK
from headgate.ops.native.vectors import TILE_VECTORS, VECTOR_BYTES

__all__ = ["backward", "bidirectional", "bidirectional_backward", "forward"]

_BLOCK_OVERHEAD = 0.12
"""Gates and scores, which every block of columns computes anew, over the work of a whole head."""


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_gate: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    reverse: bool,
) -> tuple[Tensor, Tensor]:
    """Outputs and final state; see :class:`~headgate.ops.gated_linear_attention.registration.Backend`."""
    job = _Job(q, v, cu_seqlens, scale, reverse=reverse)
    output = job.new(v)
    state = job.new_state()
    job.run(
        is_backward=False,
        q=q, k=k, v=v, log_gate=log_gate, o=output, initial_state=initial_state, final_state=state,
    )  # fmt: skip
    return output.to(v.dtype), state


def backward(
    do: Tensor,
    dstate: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_gate: Tensor,
    initial_state: Tensor | None,
    final_state: Tensor,
    cu_seqlens: Tensor | None,
    scale: float,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients; see :class:`~headgate.ops.gated_linear_attention.registration.Backend`."""
    job = _Job(q, v, cu_seqlens, scale, reverse=reverse)
    dq, dk, dv, dgate = (job.new(x) for x in (q, k, v, log_gate))
    dinitial = None if initial_state is None else job.new_state()
    job.run(
        is_backward=True,
        q=q, k=k, v=v, log_gate=log_gate, do=do, dq=dq, dk=dk, dv=dv, dlog_gate=dgate,
        initial_state=initial_state, dstate=dstate, dinitial_state=dinitial,
    )  # fmt: skip
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), dgate.to(log_gate.dtype), dinitial


def bidirectional(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_gate_forward: Tensor,
    log_gate_backward: Tensor,
    cu_seqlens: Tensor | None,
    scale: float,
) -> Tensor:
    """The mean of both scans; see :class:`~headgate.ops.gated_linear_attention.registration.Backend`."""
    job = _Job(q, v, cu_seqlens, scale / 2, directions=2)
    output = job.new(v)
    job.run(
        is_backward=False, q=q, k=k, v=v, log_gate=log_gate_forward, log_gate_backward=log_gate_backward, o=output
    )  # fmt: skip
    return output.to(v.dtype)


def bidirectional_backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_gate_forward: Tensor,
    log_gate_backward: Tensor,
    cu_seqlens: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of the mean; see :class:`~headgate.ops.gated_linear_attention.registration.Backend`."""
    job = _Job(q, v, cu_seqlens, scale / 2, directions=2)
    inputs = (q, k, v, log_gate_forward, log_gate_backward)
    dq, dk, dv, dforward, dbackward = results = tuple(job.new(x) for x in inputs)
    job.run(
        is_backward=True,
        q=q, k=k, v=v, log_gate=log_gate_forward, log_gate_backward=log_gate_backward, do=do,
        dq=dq, dk=dk, dv=dv, dlog_gate=dforward, dlog_gate_backward=dbackward,
    )  # fmt: skip
    return tuple(result.to(x.dtype) for result, x in zip(results, inputs, strict=True))  # type: ignore[return-value]


class _Job:
    """Sizes and sequences of one call, and the table that the workers read."""

    def __init__(
        self,
        q: Tensor,
        v: Tensor,
        cu_seqlens: Tensor | None,
        scale: float,
        *,
        reverse: bool = False,
        directions: int = 1,
    ) -> None:
        self.batch, self.length, self.heads, self.key_dim = q.shape
        self.value_dim = v.shape[-1]
        self.dtype = state_dtype(v.dtype)
        self.scale, self.reverse, self.directions = scale, reverse, directions
        # between two stored states as many tokens as make them small beside the tokens' own rows
        smaller = self.key_dim * self.value_dim / (self.key_dim + self.value_dim)
        self.time_block = max(256, CHUNK * math.ceil(8 * smaller / CHUNK))
        if cu_seqlens is None:
            self.sequences, self.time_blocks = _even_sequences(self.batch, self.length, self.time_block)
        else:
            self.sequences, self.time_blocks = _packed_sequences(cu_seqlens, self.length, self.time_block)

    def new(self, like: Tensor) -> Tensor:
        """An uninitialised tensor for a result."""
        return new_result(like.shape, self.dtype)

    def new_state(self) -> Tensor:
        """An uninitialised state."""
        return torch.empty(len(self.sequences), self.heads, self.key_dim, self.value_dim, dtype=self.dtype)

    def run(self, *, is_backward: bool, **tensors: Tensor | None) -> None:
        """Compute the results that are among ``tensors`` from the others."""
        count = len(self.sequences) * self.heads
        if count == 0:
            return
        size = self.dtype.itemsize
        lane_count = VECTOR_BYTES // size
        threads = torch.get_num_threads()
        value_blocks, value_block = _blocks(count, self.value_dim, threads, lane_count)
        scratch_bytes = _scratch_bytes(self.key_dim, value_block, lane_count, size)
        key_blocks, key_block, stored = 0, 0, None
        if is_backward:
            key_blocks, key_block = _blocks(count, self.key_dim, threads, lane_count)
            scratch_bytes = max(scratch_bytes, _scratch_bytes(self.value_dim, key_block, lane_count, size))
            if self.time_blocks:
                stored = torch.empty(self.time_blocks, self.heads, self.value_dim, self.key_dim, dtype=self.dtype)
        items = count * (value_blocks + key_blocks)
        threads = min(threads, items)
        scratch = torch.empty(threads * scratch_bytes + VECTOR_BYTES, dtype=torch.uint8)
        entries = {
            "workers": 0,
            "next_item": 0,
            "items": items,
            "scratch": -(-scratch.data_ptr() // VECTOR_BYTES) * VECTOR_BYTES,
            "scratch_bytes": scratch_bytes,
            "is_backward": is_backward,
            "sequences": self.sequences.ctypes.data,
            "heads": self.heads,
            "key_dim": self.key_dim,
            "value_dim": self.value_dim,
            "key_blocks": key_blocks,
            "key_block": key_block,
            "value_blocks": value_blocks,
            "value_block": value_block,
            "directions": self.directions,
            "reverse": self.reverse,
            "scale": _bits(self.scale),
            "time_block": self.time_block,
            "key_items": count * key_blocks,
            "states": 0 if stored is None else stored.data_ptr(),
        }
        kept = {}  # alive until the workers are done
        table = [entries[name] for name in ENTRIES]
        for name in TENSORS:
            tensor = tensors.get(name)
            if tensor is None:
                table += (0, 0, 0, 0)
                continue
            if tensor.dtype != self.dtype:
                tensor = tensor.to(self.dtype)
            if name.endswith("state"):
                tensor = tensor.contiguous()
                sequence, head, _, _ = tensor.stride()
                token = 0
            else:
                if tensor.stride(3) != 1 and tensor.shape[3] > 1:
                    tensor = tensor.contiguous()
                sequence, token, head, _ = tensor.stride()
            kept[name] = tensor
            table += (tensor.data_ptr(), sequence * size, token * size, head * size)
        worker(self.dtype == torch.float64).run(table, threads)


@lru_cache(maxsize=64)
def _even_sequences(batch: int, length: int, time_block: int) -> tuple[np.ndarray, int]:
    """The table of as many sequences as batch rows, and the blocks of time in all of them."""
    blocks = _stored_states(length, time_block)
    rows = [(row, 0, length, row * blocks) for row in range(batch)]
    return np.array(rows, dtype=np.int64).reshape(batch, 4), batch * blocks


def _stored_states(length: int, time_block: int) -> int:
    """How many blocks of time there are before the last chunk."""
    return -(-(max(length - 1, 0) // CHUNK * CHUNK) // time_block)


def _packed_sequences(cu_seqlens: Tensor, length: int, time_block: int) -> tuple[np.ndarray, int]:
    """The same for the sequences that are packed in one batch row."""
    bounds = cu_seqlens.tolist()
    if bounds[0] != 0 or bounds[-1] != length or any(a > b for a, b in pairwise(bounds)):
        raise ValueError(f"cu_seqlens must rise from 0 to the length {length}, got {bounds}")
    rows, blocks = [], 0
    for start, end in pairwise(bounds):
        rows.append((0, start, end - start, blocks))
        blocks += _stored_states(end - start, time_block)
    return np.array(rows, dtype=np.int64), blocks


def _bits(number: float) -> int:
    """The bits of a float64, as an integer."""
    return struct.unpack("q", struct.pack("d", number))[0]


@lru_cache(maxsize=256)
def _blocks(items: int, width: int, threads: int, lane_count: int) -> tuple[int, int]:
    """How many blocks of columns keep all threads busy with the least work done twice, and the columns of one."""
    step = TILE_VECTORS * lane_count
    tiles = -(-width // step)
    choices = {-(-tiles // per_block) for per_block in range(1, tiles + 1)}
    count = min(sorted(choices), key=lambda n: math.ceil(items * n / threads) * (1 / n + _BLOCK_OVERHEAD))
    return count, -(-tiles // count) * step


def _scratch_bytes(height: int, width: int, lane_count: int, size: int) -> int:
    """What the buffers of one worker take, in whole registers."""
    tall, wide = padded_height(height, lane_count), padded_width(width, lane_count)
    longest = max(tall, wide)
    numbers = 2 * tall * wide + CHUNK * (3 * tall + 3 * wide + 2 * longest + CHUNK + 1) + longest
    return -(-numbers * size // VECTOR_BYTES) * VECTOR_BYTES

"""Gated linear attention on a GPU: which Triton kernels run, on what, in which order.

The schedule is the materialised one (Yang et al., arXiv 2312.06635, section 4.2): one kernel walks over the chunks of each
sequence and writes the state before every chunk; after that all chunks are independent. The backward pass computes the
states anew, so that between the two passes nothing but the inputs and the final state is kept. Its memory grows with
``length * (key + value)`` and ``length / chunk * key * value``.

The two directions of the bidirectional op share every launch.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from headgate.ops.gated_linear_attention.triton_gradient_kernels import (
    inner_gradients_kernel,
    key_query_gradients_kernel,
    score_gradients_kernel,
    state_gradients_kernel,
    value_gradients_kernel,
)
from headgate.ops.gated_linear_attention.triton_kernels import outputs_kernel, scores_kernel, states_kernel

__all__ = ["backward", "bidirectional", "bidirectional_backward", "forward"]

_CHUNK = 64
_SUBCHUNK = 16
_ENOUGH_PROGRAMS = 128
"""To keep the multiprocessors of a large GPU busy; with fewer, the states are cut into smaller blocks."""
_INTERPRETED = not isinstance(states_kernel, triton.JITFunction)
"""Triton decides at the first import whether kernels are compiled, or run by its interpreter."""


def forward(
    q: Float[Tensor, "batch length heads key"],
    k: Float[Tensor, "batch length heads key"],
    v: Float[Tensor, "batch length heads value"],
    log_gate: Float[Tensor, "batch length heads key"],
    initial_state: Float[Tensor, "sequences heads key value"] | None,
    cu_seqlens: Int[Tensor, " sequences_plus_one"] | None,
    scale: float,
    reverse: bool,
) -> tuple[Float[Tensor, "batch length heads value"], Float[Tensor, "sequences heads key value"]]:
    """Outputs and final state; the arguments are those of ``registration.Backend``.

    Raises:
        TypeError: float64 inputs on a GPU.
        RuntimeError: the tensors are on a CPU, and Triton was imported without ``TRITON_INTERPRET=1``.
    """
    scan = _Scan(q, k, v, (log_gate,), cu_seqlens, scale, reverse)
    final = scan.new(scan.sequences, *scan.state_shape, dtype=scan.wide)
    states = scan.states(initial_state, final)
    return scan.outputs(scan.scores(), states), final


def backward(
    do: Float[Tensor, "batch length heads value"],
    dstate: Float[Tensor, "sequences heads key value"] | None,
    q: Float[Tensor, "batch length heads key"],
    k: Float[Tensor, "batch length heads key"],
    v: Float[Tensor, "batch length heads value"],
    log_gate: Float[Tensor, "batch length heads key"],
    initial_state: Float[Tensor, "sequences heads key value"] | None,
    final_state: Float[Tensor, "sequences heads key value"],
    cu_seqlens: Int[Tensor, " sequences_plus_one"] | None,
    scale: float,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of q, k, v, the gates and the initial state (``None`` where there is none).

    The final state is not read: the gates' gradients are closed chunk by chunk.

    Raises:
        TypeError, RuntimeError: as for :func:`forward`.
    """
    scan = _Scan(q, k, v, (log_gate,), cu_seqlens, scale, reverse)
    dinitial = None if initial_state is None else scan.new(*initial_state.shape, dtype=scan.wide)
    dq, dk, dv, (dlog_gate,) = scan.gradients(do, initial_state, dstate, dinitial)
    return dq, dk, dv, dlog_gate, dinitial


def bidirectional(
    q: Float[Tensor, "batch length heads key"],
    k: Float[Tensor, "batch length heads key"],
    v: Float[Tensor, "batch length heads value"],
    log_gate_forward: Float[Tensor, "batch length heads key"],
    log_gate_backward: Float[Tensor, "batch length heads key"],
    cu_seqlens: Int[Tensor, " sequences_plus_one"] | None,
    scale: float,
) -> Float[Tensor, "batch length heads value"]:
    """The mean of the scans in both directions.

    Raises:
        TypeError, RuntimeError: as for :func:`forward`.
    """
    scan = _Scan(q, k, v, (log_gate_forward, log_gate_backward), cu_seqlens, scale / 2, False)
    return scan.outputs(scan.scores(), scan.states())


def bidirectional_backward(
    do: Float[Tensor, "batch length heads value"],
    q: Float[Tensor, "batch length heads key"],
    k: Float[Tensor, "batch length heads key"],
    v: Float[Tensor, "batch length heads value"],
    log_gate_forward: Float[Tensor, "batch length heads key"],
    log_gate_backward: Float[Tensor, "batch length heads key"],
    cu_seqlens: Int[Tensor, " sequences_plus_one"] | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and the gates of both directions.

    Raises:
        TypeError, RuntimeError: as for :func:`forward`.
    """
    scan = _Scan(q, k, v, (log_gate_forward, log_gate_backward), cu_seqlens, scale / 2, False)
    dq, dk, dv, dgates = scan.gradients(do)
    return dq, dk, dv, dgates[0].to(log_gate_forward.dtype), dgates[1].to(log_gate_backward.dtype)


class _Scan:
    """One call: its inputs as the kernels want them, its sizes, its arithmetic, and the launches that it is made of."""

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        gates: tuple[Tensor, ...],
        cu_seqlens: Tensor | None,
        scale: float,
        reverse: bool,
    ) -> None:
        _check_device(q)
        q, k, v = (_unit_stride(x) for x in (q, k, v))
        gates = _alike(gates)
        batch, length, heads, key_dim = q.shape
        value_dim = v.shape[3]
        chunk = min(_CHUNK, max(_SUBCHUNK, triton.next_power_of_2(length)))
        chunks = triton.cdiv(length, chunk)
        sequences, all_chunks, sequence_table, chunk_table = batch, batch * chunks, None, None
        if cu_seqlens is not None:
            sequence_table, chunk_table = _tables(cu_seqlens.to(q.device), length, chunk)
            sequences, all_chunks = sequence_table.shape[0], chunk_table.shape[0]
        self.device = q.device
        self.gates = gates
        self.sequences = sequences
        self.state_shape = (heads, key_dim, value_dim)
        self.token_shape = (batch, length, heads)
        self.states_shape = (len(gates), all_chunks, heads, key_dim, value_dim)
        self.scores_shape = (all_chunks, heads, chunk, chunk)
        self.dtype = v.dtype
        self.wide = torch.float64 if v.dtype == torch.float64 else torch.float32
        self.subchunks = chunk // _SUBCHUNK
        self.arguments: dict[str, Any] = {
            "q": q,
            "k": k,
            "v": v,
            "gates": gates[0],
            "gates_back": gates[-1],
            "sequence_table": sequence_table,
            "chunk_table": chunk_table,
            "scale": scale,
            "length": length,
            "chunks": chunks,
            "all_chunks": all_chunks,
            "sequences": sequences,
            "tokens": batch * length,
            "heads": heads,
            "key_dim": key_dim,
            "value_dim": value_dim,
            **_strides("q", q),
            **_strides("k", k),
            **_strides("v", v),
            **_strides("g", gates[0]),
            "DIRECTIONS": len(gates),
            "REVERSE": reverse,
            "CHUNK": chunk,
            "SUBCHUNK": _SUBCHUNK,
            **_arithmetic(v.dtype),
        }

    def states(self, initial: Tensor | None = None, final: Tensor | None = None) -> Tensor:
        """``(directions, all chunks, heads, key, value)``: the state before each chunk."""
        states = self.new(*self.states_shape, dtype=_stored(self.dtype))
        initial = None if initial is None else initial.contiguous()
        self._walk(states_kernel, initial=initial, states=states, final=final)
        return states

    def scores(self) -> Tensor:
        """``(all chunks, heads, chunk, chunk)``: P, of both directions together."""
        scores = self.new(*self.scores_shape, dtype=_stored(self.dtype))
        self._launch(scores_kernel, self.subchunks, 2, scores=scores, BLOCK_K=self._block("key_dim", 32))
        return scores

    def outputs(self, scores: Tensor, states: Tensor) -> Tensor:
        """``(batch, length, heads, value)``."""
        output = self.new(*self.token_shape, self.state_shape[2], dtype=self.dtype)
        self._over_values(outputs_kernel, scores=scores, states=states, output=output)
        return output

    def gradients(
        self,
        do: Tensor,
        initial: Tensor | None = None,
        dfinal: Tensor | None = None,
        dinitial: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, ...]]:
        """Of q, k, v and the gates of each direction; ``dinitial``, where given, is written."""
        do = _unit_stride(do)
        _, key_dim, value_dim = self.state_shape
        states = self.states(initial)
        dstates = torch.empty_like(states)
        dfinal = None if dfinal is None else dfinal.contiguous()
        strides = _strides("o", do)
        self._walk(state_gradients_kernel, do=do, dfinal=dfinal, dstates=dstates, dinitial=dinitial, **strides)

        scores = self.scores()
        dv = self.new(*self.token_shape, value_dim, dtype=self.dtype)
        self._over_values(value_gradients_kernel, do=do, scores=scores, dstates=dstates, dv=dv, **strides)
        del scores

        dscores = self.new(*self.scores_shape, dtype=self.wide)
        value_block = self._block("value_dim", 64)
        self._launch(score_gradients_kernel, 1, 4, do=do, dscores=dscores, BLOCK_V=value_block, **strides)

        key_block = self._block("key_dim", 32)
        key_blocks = triton.cdiv(key_dim, key_block)
        inner_dq, inner_dk = (self.new(len(self.gates), *self.token_shape, key_dim, dtype=self.wide) for _ in range(2))
        inner = {"dscores": dscores, "inner_dq": inner_dq, "inner_dk": inner_dk, "BLOCK_K": key_block}
        self._launch(inner_gradients_kernel, self.subchunks * key_blocks, 2, **inner)

        dq, dk = (self.new(*self.token_shape, key_dim, dtype=self.dtype) for _ in range(2))
        dgates = tuple(self.new(*gate.shape, dtype=gate.dtype) for gate in self.gates)
        self._launch(
            key_query_gradients_kernel,
            key_blocks,
            8,
            do=do,
            states=states,
            dstates=dstates,
            dq=dq,
            dk=dk,
            dgates=dgates[0],
            dgates_back=dgates[-1],
            BLOCK_V=self._block("value_dim", 32),
            **inner,
            **strides,
        )
        return dq, dk, dv, dgates

    def new(self, *shape: int, dtype: torch.dtype) -> Tensor:
        """Fresh memory on the device of the inputs."""
        return torch.empty(shape, dtype=dtype, device=self.device)

    def _walk(self, kernel: Any, **arguments: Any) -> None:
        """Launch a kernel over directions, sequences, heads and blocks of the state, which walks over the chunks."""
        directions, _, heads, key_dim, value_dim = self.states_shape
        # A block of 64 x 64 is too much for the registers without tensor cores.
        for largest in (64, 32) if self.dtype.itemsize == 2 else (32,):
            key_block, value_block = self._block("key_dim", largest), self._block("value_dim", largest)
            blocks = triton.cdiv(key_dim, key_block) * triton.cdiv(value_dim, value_block)
            programs = directions * self.sequences * heads * blocks
            if programs >= _ENOUGH_PROGRAMS:
                break
        self._start(kernel, programs, 4, BLOCK_K=key_block, BLOCK_V=value_block, **arguments)

    def _over_values(self, kernel: Any, **arguments: Any) -> None:
        """Launch a kernel over chunks, heads and blocks of value channels."""
        value_block = self._block("value_dim", 64)
        blocks = triton.cdiv(self.state_shape[2], value_block)
        # The operands of float16 inputs are 32 bits wide, and the matrix cores want them in shared memory.
        key_block = self._block("key_dim", 32 if self.dtype == torch.float16 else 64)
        self._launch(kernel, blocks, 4, BLOCK_K=key_block, BLOCK_V=value_block, **arguments)

    def _launch(self, kernel: Any, blocks: int, num_warps: int, **arguments: Any) -> None:
        """Launch a kernel over chunks, heads and so many blocks."""
        all_chunks, heads, _, _ = self.scores_shape
        self._start(kernel, all_chunks * heads * blocks, num_warps, **arguments)

    def _start(self, kernel: Any, programs: int, num_warps: int, **arguments: Any) -> None:
        if programs == 0:
            return
        known = self.arguments | arguments
        wanted = {name: known[name] for name in kernel.arg_names}
        with _on(self.device):
            kernel[(programs,)](**wanted, num_warps=num_warps, num_stages=2)

    def _block(self, dim: str, largest: int) -> int:
        """A power of two between 16, the least that a matrix product takes, and ``largest``."""
        return min(largest, max(16, triton.next_power_of_2(self.arguments[dim])))


def _check_device(q: Tensor) -> None:
    if _INTERPRETED:
        return
    if q.dtype == torch.float64:
        raise TypeError(
            "the Triton backend computes in float32 on a GPU: pass float32 tensors, or take backend='chunk'"
        )
    if q.device.type == "cpu":
        raise RuntimeError(
            "the Triton backend needs a GPU; on a CPU its kernels run in Triton's interpreter alone, which needs "
            "TRITON_INTERPRET=1 in the environment before triton is first imported"
        )


def _unit_stride(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _alike(gates: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Gates of one dtype and the same strides, so that a kernel can choose between them while it runs."""
    gates = tuple(_unit_stride(gate) for gate in gates)
    if all(gate.dtype == gates[0].dtype and gate.stride() == gates[0].stride() for gate in gates):
        return gates
    dtype = torch.promote_types(gates[0].dtype, gates[-1].dtype)
    return tuple(gate.to(dtype).contiguous() for gate in gates)


def _strides(name: str, x: Tensor) -> dict[str, int]:
    return {f"{name}_row": x.stride(0), f"{name}_token": x.stride(1), f"{name}_head": x.stride(2)}


def _tables(cu_seqlens: Tensor, length: int, chunk: int) -> tuple[Tensor, Tensor]:
    """Where the chunks of packed sequences lie.

    ``(sequences, 3)``: first token, number of tokens, first chunk; and ``(chunks, 2)``: first token, number of tokens.
    How many chunks there are is known on the device alone; the table has room for as many as there can be, and the rows
    left over have no tokens. So the host need not wait for the device.
    """
    bounds = cu_seqlens.to(torch.int64).clamp(0, length)
    first, count = bounds[:-1], bounds.diff().clamp_min(0)
    ends = ((count + chunk - 1) // chunk).cumsum(0)
    first_chunk = torch.cat([torch.zeros_like(ends[:1]), ends[:-1]])
    index = torch.arange(length // chunk + count.shape[0], device=bounds.device)
    sequence = torch.searchsorted(ends, index, right=True).clamp_max(count.shape[0] - 1)
    offset = (index - first_chunk[sequence]) * chunk
    size = (count[sequence] - offset).clamp(0, chunk)
    return torch.stack([first, count, first_chunk], dim=1), torch.stack([first[sequence] + offset, size], dim=1)


def _stored(dtype: torch.dtype) -> torch.dtype:
    """Of what one kernel writes for the matrix products of another: states and scores."""
    return dtype if dtype in (torch.bfloat16, torch.float64) else torch.float32


def _arithmetic(dtype: torch.dtype) -> dict[str, Any]:
    """How the kernels compute.

    float32 inputs: all products in full float32. bfloat16 inputs: products of bfloat16 operands with float32 sums, except
    that states are built from float32 operands, on tensor cores with 10 bits of mantissa. float16 inputs: all
    products in the latter way, because states and gradients can leave the range of float16.
    """
    wide = tl.float64 if dtype == torch.float64 else tl.float32
    narrow = tl.bfloat16 if dtype == torch.bfloat16 else wide
    half = dtype in (torch.bfloat16, torch.float16)
    tensor_cores = half and torch.version.hip is None
    return {
        "ROUND": narrow,
        "DOT": wide if _INTERPRETED else narrow,  # the interpreter cannot multiply bfloat16 matrices
        "PRECISION": "tf32" if tensor_cores else "ieee",
        "WIDE": wide,
    }


def _on(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Make ``device`` the current one: kernels are launched there."""
    if device.type in ("cpu", "meta"):
        return contextlib.nullcontext()
    return torch.get_device_module(device).device(device)

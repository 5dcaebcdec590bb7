r"""Matrix products and recurrences on one tile: as much of a result as the registers hold.

A tile has ``TILE_ROWS`` rows of ``TILE_VECTORS`` registers. Its loop over the depth touches memory only for the
factors, so the arithmetic runs at the speed of the multiply-add units. Addresses and strides are in bytes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from headgate.ops.native.vectors import (
    TILE_ROWS,
    TILE_VECTORS,
    VECTOR_BYTES,
    emit_load,
    emit_multiply_add,
    emit_splat,
    emit_store,
    int64,
    scalar_type,
    size_of,
    vector_type,
)

__all__ = [
    "CHUNK",
    "add_tile",
    "multiply_lane",
    "multiply_scores",
    "multiply_tile",
    "recur_lanes",
    "recur_lanes_after",
    "recur_rows",
    "recur_rows_after",
    "transpose_square",
    "update_lanes",
    "update_rows",
]

CHUNK = 16
"""Tokens that are handled together."""


class _Tile:
    """``rows`` × ``vectors`` registers that start at zero or from memory, and are changed by emitted code."""

    def __init__(
        self, builder: ir.IRBuilder, dtype: types.Float, rows: int, vectors: int, address: ir.Value, pitch: ir.Value
    ) -> None:
        self.builder = builder
        self.kind = vector_type(dtype)
        self.scalar = scalar_type(dtype)
        self.size = size_of(dtype)
        self.rows = rows
        self.vectors = vectors
        self.row_addresses = [address]
        for _ in range(1, rows):
            self.row_addresses.append(builder.add(self.row_addresses[-1], pitch))
        self.registers = [[cgutils.alloca_once(builder, self.kind) for _ in range(vectors)] for _ in range(rows)]

    def _each(self) -> list[tuple[int, int, ir.Value]]:
        return [
            (row, vector, self.builder.add(self.row_addresses[row], int64(vector * VECTOR_BYTES)))
            for row in range(self.rows)
            for vector in range(self.vectors)
        ]

    def clear(self) -> None:
        for row, vector, _ in self._each():
            self.builder.store(ir.Constant(self.kind, None), self.registers[row][vector])

    def read(self) -> None:
        for row, vector, address in self._each():
            self.builder.store(emit_load(self.builder, address, self.kind, self.size), self.registers[row][vector])

    def write(self, change: Callable[[int, int, ir.Value], ir.Value] = lambda row, vector, value: value) -> None:
        for row, vector, address in self._each():
            value = change(row, vector, self.builder.load(self.registers[row][vector]))
            emit_store(self.builder, value, address, self.size)

    def vectors_at(self, address: ir.Value) -> list[ir.Value]:
        return [
            emit_load(self.builder, self.builder.add(address, int64(vector * VECTOR_BYTES)), self.kind, self.size)
            for vector in range(self.vectors)
        ]

    def splat_at(self, address: ir.Value) -> ir.Value:
        return emit_splat(self.builder, emit_load(self.builder, address, self.scalar, self.size), self.kind)

    def add_product(
        self, a: ir.Value, a_row: ir.Value, a_step: ir.Value, b: ir.Value, b_step: ir.Value, depth: ir.Value
    ) -> None:
        """Add Σ_d A[row, d]·B[d, :]; A is read number by number, B register by register."""
        builder = self.builder
        a_now, b_now = cgutils.alloca_once_value(builder, a), cgutils.alloca_once_value(builder, b)
        with cgutils.for_range(builder, depth):
            address, b_address = builder.load(a_now), builder.load(b_now)
            right = self.vectors_at(b_address)
            builder.store(builder.add(address, a_step), a_now)
            builder.store(builder.add(b_address, b_step), b_now)
            for row in range(self.rows):
                left = self.splat_at(address)
                for vector, register in enumerate(self.registers[row]):
                    builder.store(emit_multiply_add(builder, left, right[vector], builder.load(register)), register)
                address = builder.add(address, a_row)


def _product(columns: Callable[[types.Float], int], adds: bool, doc: str) -> Any:
    def multiply(
        typingctx: Any, c: Any, c_row: Any,
        a: Any, a_row: Any, a_step: Any, b: Any, b_step: Any, depth: Any,
        a2: Any, a2_row: Any, a2_step: Any, b2: Any, b2_step: Any, depth2: Any, zero: Any,
    ) -> Any:  # fmt: skip
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            tile = _Tile(builder, zero, TILE_ROWS, columns(zero), args[0], args[1])
            if adds:
                tile.read()
            else:
                tile.clear()
            tile.add_product(*args[2:8])
            tile.add_product(*args[8:14])
            tile.write()
            return context.get_dummy_value()

        return types.void(*[types.int64] * 14, zero), codegen

    multiply.__doc__ = doc
    return intrinsic(multiply)


multiply_tile = _product(lambda dtype: TILE_VECTORS, False, "C = A·B + A2·B2 on one tile.")
add_tile = _product(lambda dtype: TILE_VECTORS, True, "C += A·B + A2·B2 on one tile.")
multiply_lane = _product(lambda dtype: 1, False, "C = A·B + A2·B2 on ``TILE_ROWS`` rows of one register.")


@intrinsic
def multiply_scores(
    typingctx: Any, c: Any, c_row: Any,
    a: Any, a_row: Any, a_step: Any, b: Any, b_step: Any, depth: Any, first: Any, zero: Any,
) -> Any:  # fmt: skip
    """C = A·B on ``TILE_ROWS`` rows of ``CHUNK`` columns, the first one being row ``first``; zero above the diagonal."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        width = vector_type(zero).count
        index = ir.IntType(32)
        numbers = ir.VectorType(index, width)
        tile = _Tile(builder, zero, TILE_ROWS, CHUNK // width, args[0], args[1])
        tile.clear()
        tile.add_product(*args[2:8])

        def below(row: int, vector: int, value: ir.Value) -> ir.Value:
            columns = ir.Constant(numbers, [ir.Constant(index, vector * width + lane) for lane in range(width)])
            last = emit_splat(builder, builder.trunc(builder.add(args[8], int64(row)), index), numbers)
            return builder.select(builder.icmp_signed("<=", columns, last), value, ir.Constant(tile.kind, None))

        tile.write(below)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 9, zero), codegen


def _update(gate: str, doc: str) -> Any:
    def update(
        typingctx: Any,
        c: Any,
        c_row: Any,
        a: Any,
        a_row: Any,
        a_step: Any,
        b: Any,
        b_step: Any,
        depth: Any,
        decay: Any,
        zero: Any,
    ) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            tile = _Tile(builder, zero, TILE_ROWS, TILE_VECTORS, args[0], args[1])
            tile.read()
            tile.add_product(*args[2:8])
            if gate == "lanes":
                factors = tile.vectors_at(args[8])
                tile.write(lambda row, vector, value: builder.fmul(value, factors[vector]))
            else:
                splats = [tile.splat_at(builder.add(args[8], int64(row * tile.size))) for row in range(TILE_ROWS)]
                tile.write(lambda row, vector, value: builder.fmul(value, splats[row]))
            return context.get_dummy_value()

        return types.void(*[types.int64] * 9, zero), codegen

    update.__doc__ = doc
    return intrinsic(update)


update_rows = _update("rows", "C = diag(decay)·(C + A·B) on one tile.")
update_lanes = _update("lanes", "C = (C + A·B)·diag(decay) on one tile.")


def _recurrence(gate: str, after: bool, doc: str) -> Any:
    def recur(
        typingctx: Any, state: Any, state_row: Any, x: Any, x_step: Any, w: Any, w_step: Any, y: Any, y_step: Any,
        decay: Any, decay_step: Any, out: Any, out_step: Any, tokens: Any, zero: Any,
    ) -> Any:  # fmt: skip
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            tile = _Tile(builder, zero, TILE_ROWS, TILE_VECTORS, args[0], args[1])
            tile.read()
            starts, steps = args[2:12:2], args[3:12:2]
            now = [cgutils.alloca_once_value(builder, start) for start in starts]
            with cgutils.for_range(builder, args[12]):
                x_at, w_at, y_at, decay_at, out_at = (builder.load(address) for address in now)
                for address, step in zip(now, steps, strict=True):
                    builder.store(builder.add(builder.load(address), step), address)
                written, read = tile.vectors_at(y_at), tile.vectors_at(out_at)
                fade_lanes = tile.vectors_at(decay_at) if gate == "lanes" else None
                for row in range(TILE_ROWS):
                    offset = int64(row * tile.size)
                    fade = fade_lanes or [tile.splat_at(builder.add(decay_at, offset))] * TILE_VECTORS
                    write, look = tile.splat_at(builder.add(w_at, offset)), tile.splat_at(builder.add(x_at, offset))
                    for vector, register in enumerate(tile.registers[row]):
                        value = builder.load(register)
                        value = value if after else builder.fmul(value, fade[vector])
                        unwritten = value
                        value = emit_multiply_add(builder, write, written[vector], value)
                        seen = unwritten if gate == "lanes" else value
                        read[vector] = emit_multiply_add(builder, look, seen, read[vector])
                        builder.store(builder.fmul(value, fade[vector]) if after else value, register)
                for vector in range(TILE_VECTORS):
                    emit_store(builder, read[vector], builder.add(out_at, int64(vector * VECTOR_BYTES)), tile.size)
            tile.write()
            return context.get_dummy_value()

        return types.void(*[types.int64] * 13, zero), codegen

    recur.__doc__ = doc
    return intrinsic(recur)


recur_rows = _recurrence("rows", False, "Token by token: S = diag(decay)·S + w⊗y, out += x·S.")
recur_rows_after = _recurrence("rows", True, "Token by token: S += w⊗y, out += x·S, S = diag(decay)·S.")
recur_lanes = _recurrence("lanes", False, "Token by token: S = S·diag(decay), out += x·S, S += w⊗y.")
recur_lanes_after = _recurrence("lanes", True, "Token by token: out += x·S, S = (S + w⊗y)·diag(decay).")


@intrinsic
def transpose_square(typingctx: Any, source: Any, source_row: Any, target: Any, target_row: Any, zero: Any) -> Any:
    """Transpose a square of as many rows as a register has lanes: each stage swaps halves of ever larger blocks."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        kind, size = vector_type(zero), size_of(zero)
        count = kind.count
        rows, address = [], args[0]
        for _ in range(count):
            rows.append(emit_load(builder, address, kind, size))
            address = builder.add(address, args[1])
        half = 1
        while half < count:
            low = [lane if not lane & half else lane - half + count for lane in range(count)]
            high = [lane + half if not lane & half else lane + count for lane in range(count)]
            swapped = list(rows)
            for row in range(count):
                if not row & half:
                    pair = rows[row], rows[row + half]
                    swapped[row], swapped[row + half] = (
                        builder.shuffle_vector(*pair, _mask(lanes)) for lanes in (low, high)
                    )
            rows = swapped
            half *= 2
        address = args[2]
        for row in rows:
            emit_store(builder, row, address, size)
            address = builder.add(address, args[3])
        return context.get_dummy_value()

    return types.void(*[types.int64] * 4, zero), codegen


def _mask(lanes: list[int]) -> ir.Constant:
    index = ir.IntType(32)
    return ir.Constant(ir.VectorType(index, len(lanes)), [ir.Constant(index, lane) for lane in lanes])

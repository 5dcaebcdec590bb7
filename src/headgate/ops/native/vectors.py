"""Vectors as wide as this CPU's registers, for use inside numba functions.

numba has no vector type and vectorises loops at its own discretion. The functions here put LLVM's vector instructions
into numba code by hand: a :class:`Vector` is one register of float32 or float64, addresses are plain 64-bit integers in
bytes, and every function that has no floating argument takes ``zero``, a scalar whose type is the type to work in.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import llvmlite.binding as llvm
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, models, register_model

__all__ = [
    "TILE_ROWS",
    "TILE_VECTORS",
    "VECTOR_BYTES",
    "add",
    "cast",
    "divide",
    "exponential",
    "fetch_add",
    "inverse_exponential",
    "item_size",
    "lanes",
    "load",
    "load_int",
    "load_scalar",
    "minimum",
    "multiply",
    "multiply_add",
    "prefetch",
    "smallest",
    "splat",
    "square_root",
    "store",
    "store_scalar",
    "subtract",
    "total",
]

_FEATURES = llvm.get_host_cpu_features()

VECTOR_BYTES = 64 if _FEATURES.get("avx512f") else 32 if _FEATURES.get("avx2") else 16
"""Bytes in one register: AVX-512, AVX2, or SSE and NEON."""

TILE_ROWS, TILE_VECTORS = (8, 2) if VECTOR_BYTES == 64 or "neon" in _FEATURES else (4, 2)
"""The block of a result that is kept in registers: 16 of 32 registers, or 8 of 16."""


class Vector(types.Type):  # type: ignore[misc]
    """numba's type of one register of ``dtype``."""

    def __init__(self, dtype: types.Float) -> None:
        self.dtype = dtype
        super().__init__(name=f"Vector({dtype})")


@register_model(Vector)
class _VectorModel(models.PrimitiveModel):  # type: ignore[misc]
    def __init__(self, dmm: Any, fe_type: Vector) -> None:
        super().__init__(dmm, fe_type, vector_type(fe_type.dtype))


# --- what intrinsics are built from ----------------------------------------------------------------------------------


def scalar_type(dtype: types.Float) -> ir.Type:
    """LLVM's type of one number."""
    return ir.FloatType() if dtype == types.float32 else ir.DoubleType()


def vector_type(dtype: types.Float) -> ir.VectorType:
    """LLVM's type of one register."""
    return ir.VectorType(scalar_type(dtype), VECTOR_BYTES // size_of(dtype))


def size_of(dtype: types.Float) -> int:
    """Bytes of one number."""
    return dtype.bitwidth // 8


def int64(value: int) -> ir.Constant:
    """A constant of 64 bits."""
    return ir.Constant(ir.IntType(64), value)


def emit_load(builder: ir.IRBuilder, address: ir.Value, kind: ir.Type, align: int) -> ir.Value:
    """Load a number or a register from an address."""
    return builder.load(builder.inttoptr(address, ir.PointerType()), align=align, typ=kind)


def emit_store(builder: ir.IRBuilder, value: ir.Value, address: ir.Value, align: int) -> None:
    """Store a number or a register at an address."""
    builder.store(value, builder.inttoptr(address, ir.PointerType()), align=align)


def emit_splat(builder: ir.IRBuilder, scalar: ir.Value, kind: ir.VectorType) -> ir.Value:
    """A register with one number in all lanes."""
    undefined = ir.Constant(kind, ir.Undefined)
    first = builder.insert_element(undefined, scalar, ir.Constant(ir.IntType(32), 0))
    return builder.shuffle_vector(first, undefined, ir.Constant(ir.VectorType(ir.IntType(32), kind.count), None))


def emit_call(builder: ir.IRBuilder, name: str, *arguments: ir.Value) -> ir.Value:
    """Call LLVM's own function ``name`` for registers of the arguments' type."""
    kind = arguments[0].type
    bits = 32 if isinstance(kind.element, ir.FloatType) else 64
    function_type = ir.FunctionType(kind, [kind] * len(arguments))
    function = cgutils.get_or_insert_function(builder.module, function_type, f"llvm.{name}.v{kind.count}f{bits}")
    return builder.call(function, arguments)


def emit_multiply_add(builder: ir.IRBuilder, a: ir.Value, b: ir.Value, c: ir.Value) -> ir.Value:
    """a·b + c with one rounding."""
    return emit_call(builder, "fma", a, b, c)


def _constant(kind: ir.VectorType, value: float) -> ir.Constant:
    return ir.Constant(kind, [ir.Constant(kind.element, value)] * kind.count)


# --- memory ----------------------------------------------------------------------------------------------------------


@intrinsic
def load(typingctx: Any, address: Any, zero: Any) -> Any:
    """The register at ``address``."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return emit_load(builder, args[0], vector_type(zero), size_of(zero))

    return Vector(zero)(types.int64, zero), codegen


@intrinsic
def store(typingctx: Any, address: Any, vector: Any) -> Any:
    """Put a register at ``address``."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        emit_store(builder, args[1], args[0], size_of(vector.dtype))
        return context.get_dummy_value()

    return types.void(types.int64, vector), codegen


@intrinsic
def load_scalar(typingctx: Any, address: Any, zero: Any) -> Any:
    """The number at ``address``."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return emit_load(builder, args[0], scalar_type(zero), size_of(zero))

    return zero(types.int64, zero), codegen


@intrinsic
def store_scalar(typingctx: Any, address: Any, value: Any) -> Any:
    """Put a number at ``address``."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        emit_store(builder, args[1], args[0], size_of(value))
        return context.get_dummy_value()

    return types.void(types.int64, value), codegen


@intrinsic
def load_int(typingctx: Any, address: Any) -> Any:
    """The 64-bit integer at ``address``."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return emit_load(builder, args[0], ir.IntType(64), 8)

    return types.int64(types.int64), codegen


@intrinsic
def fetch_add(typingctx: Any, address: Any, value: Any) -> Any:
    """Add to the 64-bit integer at ``address`` in one step that no other thread can come between; its old value."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointer = builder.inttoptr(args[0], ir.PointerType())
        return builder.atomic_rmw("add", pointer, args[1], "monotonic")

    return types.int64(types.int64, types.int64), codegen


@intrinsic
def prefetch(typingctx: Any, address: Any) -> Any:
    """Ask for the cache line at ``address``, which may be any address at all."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        index = ir.IntType(32)
        function_type = ir.FunctionType(ir.VoidType(), [ir.PointerType(), index, index, index])
        function = cgutils.get_or_insert_function(builder.module, function_type, "llvm.prefetch.p0")
        read, keep, data = (ir.Constant(index, value) for value in (0, 2, 1))
        builder.call(function, [builder.inttoptr(args[0], ir.PointerType()), read, keep, data])
        return context.get_dummy_value()

    return types.void(types.int64), codegen


@intrinsic
def cast(typingctx: Any, value: Any, zero: Any) -> Any:
    """A float64 ``value`` in the type of ``zero``."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return args[0] if zero == types.float64 else builder.fptrunc(args[0], scalar_type(zero))

    return zero(types.float64, zero), codegen


@intrinsic
def item_size(typingctx: Any, zero: Any) -> Any:
    """Bytes of one number."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return int64(size_of(zero))

    return types.int64(zero), codegen


@intrinsic
def lanes(typingctx: Any, zero: Any) -> Any:
    """Numbers in one register."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return int64(vector_type(zero).count)

    return types.int64(zero), codegen


# --- arithmetic ------------------------------------------------------------------------------------------------------


@intrinsic
def splat(typingctx: Any, scalar: Any) -> Any:
    """A register with ``scalar`` in every lane."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return emit_splat(builder, args[0], vector_type(scalar))

    return Vector(scalar)(scalar), codegen


def _binary(emit: Callable[[ir.IRBuilder, ir.Value, ir.Value], ir.Value], doc: str) -> Any:
    def operation(typingctx: Any, a: Any, b: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            return emit(builder, *args)

        return a(a, b), codegen

    operation.__doc__ = doc
    return intrinsic(operation)


add = _binary(lambda builder, a, b: builder.fadd(a, b), "a + b")
subtract = _binary(lambda builder, a, b: builder.fsub(a, b), "a - b")
multiply = _binary(lambda builder, a, b: builder.fmul(a, b), "a · b")
divide = _binary(lambda builder, a, b: builder.fdiv(a, b), "a / b")
minimum = _binary(
    lambda builder, a, b: builder.select(builder.fcmp_ordered("<", a, b), a, b), "The smaller one, lane by lane."
)


@intrinsic
def multiply_add(typingctx: Any, a: Any, b: Any, c: Any) -> Any:
    """a·b + c with one rounding."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return emit_multiply_add(builder, *args)

    return a(a, b, c), codegen


@intrinsic
def square_root(typingctx: Any, vector: Any) -> Any:
    """The square root of every lane."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return emit_call(builder, "sqrt", args[0])

    return vector(vector), codegen


@intrinsic
def smallest(typingctx: Any, vector: Any) -> Any:
    """The smallest of the register's numbers."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        kind = vector_type(vector.dtype)
        values = [builder.extract_element(args[0], ir.Constant(ir.IntType(32), lane)) for lane in range(kind.count)]
        while len(values) > 1:
            pairs = zip(values[::2], values[1::2], strict=True)
            values = [builder.select(builder.fcmp_ordered("<", a, b), a, b) for a, b in pairs]
        return values[0]

    return vector.dtype(vector), codegen


@intrinsic
def total(typingctx: Any, vector: Any) -> Any:
    """The sum of the register's numbers, added up in pairs."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        kind = vector_type(vector.dtype)
        values = [builder.extract_element(args[0], ir.Constant(ir.IntType(32), lane)) for lane in range(kind.count)]
        while len(values) > 1:
            values = [builder.fadd(a, b) for a, b in zip(values[::2], values[1::2], strict=True)]
        return values[0]

    return vector.dtype(vector), codegen


def _exponential(inverse: bool, doc: str) -> Any:
    def operation(typingctx: Any, vector: Any) -> Any:
        single = vector.dtype == types.float32
        degree, mantissa, bias = (7, 23, 127) if single else (13, 52, 1023)
        lowest = -87.0 if single else -708.0
        # added to a number, it leaves the nearest whole number and the exponent's bias in the lowest bits
        shift = 1.5 * 2**mantissa + bias
        # ln 2 = high + low: n times the first one is exact
        high, low = (
            (355 / 512, math.log(2) - 355 / 512)
            if single
            else (float.fromhex("0x1.62e42feep-1"), float.fromhex("0x1.a39ef35793c76p-33"))
        )

        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            kind = vector_type(vector.dtype)
            bits = ir.VectorType(ir.IntType(mantissa + (9 if single else 12)), kind.count)
            x, least, most = args[0], _constant(kind, lowest), _constant(kind, -lowest)
            bounded = builder.select(builder.fcmp_ordered("<", x, least), least, x)
            bounded = builder.select(builder.fcmp_ordered(">", bounded, most), most, bounded)
            shifted = emit_multiply_add(builder, bounded, _constant(kind, 1 / math.log(2)), _constant(kind, shift))
            n = builder.fsub(shifted, _constant(kind, shift))
            r = emit_multiply_add(builder, n, _constant(kind, -high), bounded)
            r = emit_multiply_add(builder, n, _constant(kind, -low), r)
            square = builder.fmul(r, r)
            even, odd = (_constant(kind, 1 / math.factorial(term)) for term in (degree - 1, degree))
            for term in range(degree - 3, -1, -2):
                even = emit_multiply_add(builder, even, square, _constant(kind, 1 / math.factorial(term)))
                odd = emit_multiply_add(builder, odd, square, _constant(kind, 1 / math.factorial(term + 1)))
            power = emit_multiply_add(builder, odd, builder.fneg(r) if inverse else r, even)
            scale = builder.shl(builder.bitcast(shifted, bits), _constant(bits, mantissa))
            if inverse:
                return builder.fmul(
                    power, builder.bitcast(builder.sub(_constant(bits, 2 * bias << mantissa), scale), kind)
                )
            result = builder.fmul(power, builder.bitcast(scale, kind))
            return builder.select(builder.fcmp_ordered("<", x, least), _constant(kind, 0.0), result)

        return vector(vector), codegen

    operation.__doc__ = doc
    return intrinsic(operation)


exponential = _exponential(
    False,
    r"""e to the power of every lane, within two units in the last place; 0 where it is no normal number any more.

    x = n·ln 2 + r with \|r\| ≤ ln 2 / 2, so eˣ = 2ⁿ·eʳ: n goes to the exponent's bits, and eʳ = p(r²) + r·q(r²) is its
    Taylor series up to the term below rounding.
    """,
)
inverse_exponential = _exponential(
    True,
    """1 / eˣ, within two units in the last place, as long as eˣ and it are normal numbers.

    2⁻ⁿ·(p(r²) - r·q(r²)): next to :func:`exponential` of the same x it costs a third of it.
    """,
)

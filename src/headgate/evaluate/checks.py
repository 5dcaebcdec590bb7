"""Checks and conversions of arrays at the door of the evaluation toolkit.

Every function of :mod:`headgate.evaluate` takes NumPy arrays or torch tensors and refuses bad values here, at once,
with one error that names the argument and, for values, the row.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, TypeAlias

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

__all__ = [
    "Array",
    "ZeroPolicy",
    "as_features",
    "as_groups",
    "as_labels",
    "as_probabilities",
    "as_scores",
    "as_seed",
    "as_tensor",
    "check_choice",
    "check_count",
    "check_finite",
    "check_matrix",
    "check_same_length",
    "check_same_width",
    "normalize_rows",
    "to_numpy",
]

Array: TypeAlias = np.ndarray | Tensor
ZeroPolicy: TypeAlias = Literal["error", "ignore"]

_BLOCK_BYTES = 1 << 26


def to_numpy(name: str, values: Array) -> np.ndarray:
    """Hand ``values`` on as a NumPy array, without a copy where that is possible.

    Args:
        name: the argument's name in the message.
        values: a NumPy array, or a tensor on any device (it is detached; bfloat16 becomes float32).

    Raises:
        TypeError: ``values`` is neither, or holds objects, text or complex numbers.
    """
    if isinstance(values, Tensor):
        values = values.detach()
        if values.dtype == torch.bfloat16:
            values = values.float()
        values = values.cpu().numpy()
    if not isinstance(values, np.ndarray):
        raise TypeError(f"{name} must be a NumPy array or a torch tensor, got {type(values).__name__}")
    if values.dtype.kind not in "biuf":
        raise TypeError(f"{name} must hold real numbers, got dtype {values.dtype}")
    return values


def as_features(
    name: str, values: Array, *, dtype: type[np.floating] | None = None, min_rows: int = 1
) -> Float[np.ndarray, "n dim"]:
    """Check a feature matrix and hand it on as floating-point NumPy.

    Args:
        name: the argument's name in the message.
        values: ``(N, d)``, N and d positive, every value finite. Half precision and integers become float32.
        dtype: the dtype of the result; ``None`` keeps float32 and float64 as they are.
        min_rows: least number of rows that the caller's formula needs.

    Returns:
        ``(N, d)``, of ``dtype``; may share memory with ``values``, so do not write to it.

    Raises:
        TypeError: not an array of real numbers.
        ValueError: another rank, N or d is 0, fewer than ``min_rows`` rows, or a NaN or infinity (its row is named).
    """
    check_matrix(name, values)
    array = to_numpy(name, values)
    if array.shape[0] < min_rows:
        raise ValueError(f"{name} must have at least {min_rows} rows, got shape {array.shape}")
    if dtype is None:
        dtype = array.dtype.type if array.dtype in (np.float32, np.float64) else np.float32
    # Finiteness is looked at before the conversion, which would turn a large float64 into an infinity of its own.
    check_finite(name, array)
    with np.errstate(over="ignore"):
        converted = array.astype(dtype, copy=False)
    if converted.dtype.itemsize < array.dtype.itemsize:
        check_finite(name, converted)
    return converted


def as_tensor(name: str, values: Array, *, dtype: torch.dtype | None = None) -> Float[Tensor, "n dim"]:
    """Like :func:`as_features`, but hand the matrix on as a tensor on the device where it lies.

    Args:
        name: the argument's name in the message.
        values: ``(N, d)``, N and d positive, every value finite.
        dtype: the dtype of the result; ``None`` keeps float32 and float64, and makes float32 of everything else.

    Raises:
        TypeError: not an array of real numbers.
        ValueError: another rank, N or d is 0, or a NaN or infinity (its row is named).
    """
    check_matrix(name, values)
    if not isinstance(values, Tensor):
        array = as_features(name, values)
        if not array.flags.writeable:
            array = array.copy()
        return torch.as_tensor(array, dtype=dtype)
    if values.is_complex():
        raise TypeError(f"{name} must hold real numbers, got dtype {values.dtype}")
    check_finite(name, values)
    if dtype is None:
        dtype = values.dtype if values.dtype in (torch.float32, torch.float64) else torch.float32
    return values.detach().to(dtype)


def as_labels(name: str, values: Array, *, length: int | None = None) -> Int[np.ndarray, " n"]:
    """Check a vector of class labels or ids and hand it on as int64 NumPy.

    Args:
        name: the argument's name in the message.
        values: ``(N,)`` of any integer dtype.
        length: the expected N.

    Raises:
        TypeError: not an array of integers (booleans and floats are refused: say which class is which).
        ValueError: another rank, no entry, or another length.
    """
    array = to_numpy(name, values)
    if array.dtype.kind not in "iu":
        raise TypeError(f"{name} must hold integers, got dtype {array.dtype}")
    if array.ndim != 1 or array.shape[0] == 0:
        raise ValueError(f"{name} must have shape (n,) with n > 0, got {array.shape}")
    if length is not None and array.shape[0] != length:
        raise ValueError(f"{name} must have one entry per row: expected {length}, got {array.shape[0]}")
    return array.astype(np.int64, copy=False)


def as_groups(name: str, values: Array, *, length: int | None = None) -> Int[np.ndarray, " n"]:
    """Like :func:`as_labels`, but booleans are welcome: membership of a group is a yes or a no."""
    array = to_numpy(name, values)
    return as_labels(name, array.astype(np.int64) if array.dtype.kind == "b" else array, length=length)


def as_scores(name: str, values: Array, *, shape: Sequence[int | None], axes: str) -> Float[np.ndarray, "*shape"]:
    """Check an array of finite numbers of a given shape and hand it on as float64 NumPy.

    Args:
        name: the argument's name in the message.
        values: any real dtype.
        shape: expected sizes; ``None`` stands for any positive size.
        axes: the names of the axes, e.g. ``"stage, item"``.

    Raises:
        TypeError: not an array of real numbers.
        ValueError: another shape, an empty axis, or a NaN or infinity (its row is named).
    """
    array = to_numpy(name, values)
    fits = array.ndim == len(shape) and all(
        (size > 0 if expected is None else size == expected) for size, expected in zip(array.shape, shape, strict=True)
    )
    if not fits:
        wanted = ", ".join("any" if size is None else str(size) for size in shape)
        raise ValueError(f"{name} must have shape ({axes}) of sizes ({wanted}), none of them 0, got {array.shape}")
    check_finite(name, array)
    return array.astype(np.float64, copy=False)


def as_probabilities(
    name: str, values: Array, *, shape: Sequence[int | None], axes: str
) -> Float[np.ndarray, "*shape"]:
    """Like :func:`as_scores`, and every value lies in [0, 1].

    Raises:
        ValueError: as there, or a value outside [0, 1].
    """
    array = as_scores(name, values, shape=shape, axes=axes)
    if array.min() < 0 or array.max() > 1:
        raise ValueError(f"{name} must lie in [0, 1], got values from {array.min():g} to {array.max():g}")
    return array


def as_seed(name: str, seed: int) -> int:
    """Check that ``seed`` is an integer of at least 0.

    Raises:
        TypeError: no integer.
        ValueError: negative.
    """
    if isinstance(seed, bool) or not isinstance(seed, int | np.integer):
        raise TypeError(f"{name} must be an integer, got {type(seed).__name__}")
    if seed < 0:
        raise ValueError(f"{name} must be at least 0, got {seed}")
    return int(seed)


def check_matrix(name: str, values: Array) -> tuple[int, int]:
    """Check that ``values`` is a matrix with at least one row and one column, and return its shape.

    Raises:
        TypeError: neither a NumPy array nor a tensor.
        ValueError: another rank, or N or d is 0.
    """
    if not isinstance(values, np.ndarray | Tensor):
        raise TypeError(f"{name} must be a NumPy array or a torch tensor, got {type(values).__name__}")
    if values.ndim != 2 or values.shape[0] == 0 or values.shape[1] == 0:
        raise ValueError(f"{name} must have shape (n, dim) with n > 0 and dim > 0, got {tuple(values.shape)}")
    return int(values.shape[0]), int(values.shape[1])


def check_finite(name: str, values: Array, *, first_row: int = 0) -> None:
    """Check block by block that no value is NaN or infinite, so that a memory-mapped array is never read whole.

    Args:
        name: the argument's name in the message.
        values: any shape.
        first_row: number of the first row in the message, for callers that work in blocks.

    Raises:
        ValueError: a value is; its row (index on the first axis) and the number of such rows in its block are named.
    """
    if values.ndim == 0 or values.shape[0] == 0:
        return
    row_bytes = max(1, values[0].nbytes if isinstance(values, np.ndarray) else values[0].numel() * 4)
    step = max(1, _BLOCK_BYTES // row_bytes)
    for start in range(0, values.shape[0], step):
        block = values[start : start + step]
        if isinstance(block, Tensor):
            bad = ~torch.isfinite(block.detach()).reshape(block.shape[0], -1).all(dim=1).cpu().numpy()
        elif block.dtype.kind != "f":
            return
        else:
            bad = np.asarray(~np.isfinite(block).reshape(block.shape[0], -1).all(axis=1))
        if bad.any():
            first = int(bad.argmax())
            row = block[first].reshape(-1)
            is_nan = bool(torch.isnan(row).any()) if isinstance(row, Tensor) else bool(np.isnan(row).any())
            kind = "NaN" if is_nan else "infinite value"
            raise ValueError(
                f"{name} must be finite, got {kind} in row {first_row + start + first} ({int(bad.sum())} such rows)"
            )


def check_same_length(**arrays: Array | Sequence) -> int:
    """Check that all named arrays have one entry per item, and return the number of items.

    Raises:
        ValueError: the lengths differ.
    """
    lengths = {name: len(array) for name, array in arrays.items()}
    if len(set(lengths.values())) > 1:
        listed = ", ".join(f"{name}={length}" for name, length in lengths.items())
        raise ValueError(f"{' and '.join(lengths)} must have the same length, got {listed}")
    return next(iter(lengths.values()))


def check_same_width(**arrays: Array) -> int:
    """Check that all named matrices have one number of columns, and return it.

    Raises:
        ValueError: the widths differ.
    """
    widths = {name: int(array.shape[1]) for name, array in arrays.items()}
    if len(set(widths.values())) > 1:
        listed = ", ".join(f"{name}={width}" for name, width in widths.items())
        raise ValueError(f"{' and '.join(widths)} must have the same dim, got {listed}")
    return next(iter(widths.values()))


def check_count(name: str, value: int, *, low: int = 1, high: int | None = None) -> int:
    """Check that ``value`` is an integer in [low, high], and return it as an ``int``.

    Raises:
        TypeError: no integer.
        ValueError: outside the range.
    """
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise TypeError(f"{name} must be an integer, got {type(value).__name__}")
    if value < low or (high is not None and value > high):
        wanted = f"at least {low}" if high is None else f"in [{low}, {high}]"
        raise ValueError(f"{name} must be {wanted}, got {value}")
    return int(value)


def check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    """Check that ``value`` is one of ``choices``.

    Raises:
        ValueError: it is not; the message lists them.
    """
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def normalize_rows(
    name: str, values: Float[Tensor, "n dim"], *, zero: ZeroPolicy = "error", first_row: int = 0
) -> Float[Tensor, "n dim"]:
    """Divide every row by its L2 norm.

    Args:
        name: the argument's name in the message.
        values: ``(N, d)``, finite.
        zero: what a row of zeros, whose cosine is undefined, leads to: ``"error"``, or ``"ignore"``, which leaves it
            zero, so that its cosine with everything is 0.
        first_row: number of the first row in the message, for callers that work in blocks.

    Raises:
        ValueError: a row is zero and ``zero="error"``.
    """
    check_choice("zero", zero, ("error", "ignore"))
    # Scaling by the largest entry first keeps the squares of very small and very large rows within range.
    largest = values.abs().amax(dim=1, keepdim=True)
    is_zero = largest == 0
    if zero == "error" and bool(is_zero.any()):
        row = first_row + int(is_zero.squeeze(1).int().argmax())
        raise ValueError(
            f"{name} must hold no zero vector for the cosine, got one in row {row} (or pass zero='ignore')"
        )
    scaled = values / largest.masked_fill(is_zero, 1)
    return scaled / torch.linalg.vector_norm(scaled, dim=1, keepdim=True).masked_fill(is_zero, 1)

"""Checks of tensors at the door of a layer: each raises one clear error that names the argument.

They look at shapes and dtypes only, so they cost nothing under ``torch.compile`` and ``torch.export``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["check_divides", "check_floating", "check_integer", "check_positive", "check_probability", "check_shape"]


def check_shape(name: str, tensor: Tensor, shape: Sequence[int | None], axes: str) -> None:
    """Check that ``tensor`` has the rank and the sizes of ``shape``; ``None`` stands for any size.

    Args:
        name: the argument's name in the message.
        tensor: the tensor to look at.
        shape: expected sizes, e.g. ``(None, None, 64)``.
        axes: the names of the axes, e.g. ``"batch, length, dim"``.

    Raises:
        TypeError: ``tensor`` is no tensor.
        ValueError: wrong rank or size.
    """
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor of shape ({axes}), got {type(tensor).__name__}")
    if tensor.dim() != len(shape):
        raise ValueError(f"{name} must have shape ({axes}), got {tuple(tensor.shape)}")
    for axis, (size, expected) in enumerate(zip(tensor.shape, shape, strict=True)):
        if expected is not None and size != expected:
            label = axes.split(",")[axis].strip()
            raise ValueError(f"{name} must have {label}={expected}, got {tuple(tensor.shape)} for ({axes})")


def check_floating(name: str, tensor: Tensor, like: torch.dtype | None = None) -> None:
    """Check that ``tensor`` is of a floating dtype, and of dtype ``like`` where that is given.

    Under autocast the dtype may differ from the weights', so ``like`` is looked at only outside it.

    Raises:
        TypeError: another dtype.
    """
    if not tensor.is_floating_point():
        raise TypeError(f"{name} must be floating point, got {tensor.dtype}")
    if like is not None and tensor.dtype != like and not torch.is_autocast_enabled(tensor.device.type):
        raise TypeError(f"{name} must have the module's dtype {like}, got {tensor.dtype}")


def check_integer(name: str, tensor: Tensor) -> None:
    """Check that ``tensor`` holds token ids, labels or indices: int64 or int32.

    Raises:
        TypeError: another dtype.
    """
    if tensor.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"{name} must be int64 or int32, got {tensor.dtype}")


def check_positive(**values: float) -> None:
    """Check that every named value is above zero.

    Raises:
        ValueError: a value is not.
    """
    for name, value in values.items():
        if not value > 0:
            raise ValueError(f"{name} must be positive, got {name}={value}")


def check_divides(**values: int) -> None:
    """Check that the first named value divides the second: ``check_divides(num_heads=3, dim=12)``.

    Raises:
        ValueError: it does not.
    """
    (divisor_name, divisor), (name, value) = values.items()
    if divisor < 1 or value % divisor:
        raise ValueError(f"{divisor_name} must divide {name}, got {name}={value}, {divisor_name}={divisor}")


def check_probability(**values: float) -> None:
    """Check that every named value lies in [0, 1], e.g. a dropout rate.

    Raises:
        ValueError: a value does not.
    """
    for name, value in values.items():
        if not 0 <= value <= 1:
            raise ValueError(f"{name} must lie in [0, 1], got {name}={value}")

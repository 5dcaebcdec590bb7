"""Arithmetic that autocast must leave alone."""

from __future__ import annotations

import contextlib

import torch

__all__ = ["without_autocast"]


def without_autocast(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """A context in which operations on ``device`` keep their dtypes, also where the device knows no autocast."""
    if torch.amp.is_autocast_available(device.type):
        return torch.autocast(device.type, enabled=False)
    return contextlib.nullcontext()

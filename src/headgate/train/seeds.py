"""Seeds of the global random generators, and their state as something that can be put back or written to a file.

The library itself draws from explicit generators. Dropout and weight initialisation draw from PyTorch's global ones, so a
training run has to seed them, bring them to the same point when it is resumed, and leave them as they were.
"""

from __future__ import annotations

import base64
import contextlib
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["RandomState", "random_state", "seeded", "set_random_state", "set_seed"]

RandomState = dict[str, Any]
"""State of the global generators: strings, numbers and lists alone, so that it can be written as JSON."""


def set_seed(seed: int) -> None:
    """Seed the global generators of Python, NumPy and PyTorch (every device).

    Args:
        seed: any integer; NumPy keeps its low 32 bits.

    Raises:
        TypeError: ``seed`` is no integer.
    """
    if not isinstance(seed, int) or isinstance(seed, bool):
        raise TypeError(f"seed must be an integer, got {type(seed).__name__}: {seed!r}")
    random.seed(seed)
    np.random.seed(seed % (1 << 32))  # noqa: NPY002
    torch.manual_seed(seed % (1 << 64))


@contextlib.contextmanager
def seeded(seed: int | None = None) -> Iterator[None]:
    """Seed the global generators inside the block, and put them back as they were behind it.

    Args:
        seed: as for :func:`set_seed`; ``None`` goes on from the present state and only puts it back at the end.
    """
    python, numpy, devices = random.getstate(), np.random.get_state(), _device_states()  # noqa: NPY002
    try:
        if seed is not None:
            set_seed(seed)
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002
        _set_device_states(devices)


def random_state() -> RandomState:
    """Read the state of every global generator.

    Returns:
        What :func:`set_random_state` takes; it survives a round trip through JSON.
    """
    version, numbers, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = np.random.get_state()  # noqa: NPY002
    return {
        "python": [version, list(numbers), gauss],
        "numpy": [kind, np.asarray(keys).tolist(), int(position), int(has_gauss), float(cached)],
        "torch": {name: encode_bytes(state) for name, state in _device_states().items()},
    }


def set_random_state(state: RandomState) -> None:
    """Bring every global generator to a state read by :func:`random_state`."""
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    kind, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), position, has_gauss, cached))  # noqa: NPY002
    _set_device_states({name: decode_bytes(text) for name, text in state["torch"].items()})


def encode_bytes(state: Tensor) -> str:
    """Write a generator's state, a uint8 tensor, as text."""
    return base64.b64encode(state.cpu().numpy().tobytes()).decode()


def decode_bytes(text: str) -> Tensor:
    """Read back what :func:`encode_bytes` wrote."""
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)


def _device_states() -> dict[str, Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        states |= {f"cuda:{index}": state for index, state in enumerate(torch.cuda.get_rng_state_all())}
    if torch.backends.mps.is_available():
        states["mps"] = torch.mps.get_rng_state()
    return states


def _set_device_states(states: dict[str, Tensor]) -> None:
    for name, state in states.items():
        if name == "cpu":
            torch.set_rng_state(state)
        elif name == "mps" and torch.backends.mps.is_available():
            torch.mps.set_rng_state(state)
        elif name.startswith("cuda") and int(name[5:]) < torch.cuda.device_count():
            torch.cuda.set_rng_state(state, name)

"""Seeds, streams and batches by number: every draw of the data code comes from here, so one seed gives the same bytes everywhere.

A batch is named by three numbers, (seed, stream, step), never by what was drawn before it. Its generator is seeded with
their SplitMix64 hash (Steele, Lea and Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014), so any
worker, machine or resumed run can make batch 1,000 without making the 999 before it.

PyTorch's CPU generator draws integers and uniform numbers that are the same on every machine; its normal numbers are not
(the vectorised logarithm and cosine differ in the last bit), hence :func:`portable_normal`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from statistics import NormalDist
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt64
from torch import Tensor

__all__ = [
    "BatchLoader",
    "hashed_normal",
    "portable_normal",
    "splitmix64",
    "splitmix64_array",
    "splitmix64_fold",
    "stream_generator",
]

_MASK = 0xFFFFFFFFFFFFFFFF
_GOLDEN = 0x9E3779B97F4A7C15
_MIX_1 = 0xBF58476D1CE4E5B9
_MIX_2 = 0x94D049BB133111EB
_QUANTILES = 1 << 16


def splitmix64(*values: int) -> int:
    """Hash integers, in order, into one of 64 bits.

    ``splitmix64(x)`` is the first output of the published generator with state ``x``; each further value is folded into
    the state by exclusive or: ``h = mix((h ^ value) + golden)``.

    Args:
        values: one or more integers; negative ones count modulo 2^64.

    Returns:
        An integer in [0, 2^64).

    Raises:
        ValueError: no value came.
    """
    if not values:
        raise ValueError("splitmix64 needs at least one integer, got none")
    state = 0
    for value in values:
        state = ((state ^ (int(value) & _MASK)) + _GOLDEN) & _MASK
        state = ((state ^ (state >> 30)) * _MIX_1) & _MASK
        state = ((state ^ (state >> 27)) * _MIX_2) & _MASK
        state ^= state >> 31
    return state


def splitmix64_array(values: Tensor | np.ndarray, *prefix: int) -> UInt64[np.ndarray, ...]:
    """Hash every entry: element ``i`` is ``splitmix64(*prefix, values[i])``.

    Args:
        values: integers of any shape.
        prefix: integers hashed before the entry, e.g. a seed.

    Returns:
        uint64 array of the shape of ``values``.
    """
    return splitmix64_fold(np.array(splitmix64(*prefix) if prefix else 0, dtype=np.uint64), values)


def splitmix64_fold(state: UInt64[np.ndarray, ...], values: Tensor | np.ndarray) -> UInt64[np.ndarray, ...]:
    """Fold one more integer into every hash: ``splitmix64(*before, value)`` from ``state = splitmix64(*before)``.

    Args:
        state: uint64 hashes; 0 where nothing has been folded in yet.
        values: integers of a shape that broadcasts with ``state``.

    Returns:
        uint64 array of the broadcast shape.
    """
    array = values.detach().cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)
    bits = array if array.dtype == np.uint64 else array.astype(np.int64).view(np.uint64)
    mixed = np.atleast_1d(state ^ bits) + np.array(_GOLDEN, dtype=np.uint64)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.array(_MIX_1, dtype=np.uint64)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.array(_MIX_2, dtype=np.uint64)
    return (mixed ^ (mixed >> np.uint64(31))).reshape(np.broadcast_shapes(np.shape(state), bits.shape))


def stream_generator(seed: int, stream: int | str = 0, step: int = 0) -> torch.Generator:
    """Give the CPU generator of one step of one stream.

    Args:
        seed: the run's seed.
        stream: which of the run's streams, e.g. 0 for training, 1 for testing, or a name such as ``"test"``.
        step: the step within the stream.

    Returns:
        A new generator seeded with ``splitmix64(seed, stream, step)``. PyTorch's CPU generator keeps the low 32 bits.
    """
    number = stream if isinstance(stream, int) else splitmix64(len(stream), *stream.encode())
    return torch.Generator().manual_seed(splitmix64(seed, number, step))


def portable_normal(shape: Sequence[int], generator: torch.Generator | None = None) -> Float[Tensor, ...]:
    """Draw standard normal numbers that are the same bits on every machine.

    A uniform integer of 16 bits looks up the middle of its quantile, so the numbers take 65,536 values in ±4.33 with
    variance 1 within 10⁻⁴.

    Args:
        shape: the shape to draw.
        generator: a CPU generator; without one, PyTorch's global generator is used.

    Returns:
        float32 tensor of ``shape`` on the CPU.
    """
    return _normal_quantiles()[torch.randint(_QUANTILES, tuple(shape), generator=generator)]


def hashed_normal(keys: Tensor | np.ndarray, count: int) -> Float[Tensor, "rows count"]:
    """Give every key its own standard normal numbers, whatever keys stand beside it.

    Args:
        keys: integers (rows,).
        count: how many numbers each key gets.

    Returns:
        float32 tensor (rows, count) on the CPU; entry (i, j) depends on ``keys[i]`` and ``j`` alone.
    """
    bits = splitmix64_fold(splitmix64_array(keys)[:, None], np.arange(count))
    return _normal_quantiles()[torch.from_numpy((bits >> np.uint64(48)).astype(np.int64))]


class BatchLoader:
    """An iterable of batches that any step can be asked of.

    Args:
        draw: gives a batch of ``batch_size`` from a generator.
        batch_size: examples per batch.
        steps: batches per pass.
        seed: of the run.
        stream: which of the run's streams; data-parallel workers take different ones.
        start: the first step, to resume a run.

    Raises:
        ValueError: ``batch_size`` or ``steps`` below 1, ``start`` negative.
    """

    def __init__(
        self,
        draw: Callable[[int, torch.Generator], dict[str, Any]],
        batch_size: int,
        steps: int,
        seed: int = 0,
        stream: int | str = 0,
        start: int = 0,
    ) -> None:
        if batch_size < 1 or steps < 1 or start < 0:
            raise ValueError(
                f"batch_size and steps must be at least 1, start at least 0, got {batch_size}, {steps}, {start}"
            )
        self.draw = draw
        self.batch_size = batch_size
        self.steps = steps
        self.seed = seed
        self.stream = stream
        self.start = start

    def __len__(self) -> int:
        return self.steps - self.start

    def __getitem__(self, step: int) -> dict[str, Any]:
        """Give the batch of one step, counted from the beginning of the stream.

        Raises:
            IndexError: the step lies outside the pass.
        """
        if not 0 <= step < self.steps:
            raise IndexError(f"step must lie in [0, {self.steps}), got {step}")
        return self.draw(self.batch_size, stream_generator(self.seed, self.stream, step))

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for step in range(self.start, self.steps):
            yield self[step]


@lru_cache(maxsize=1)
def _normal_quantiles() -> Float[Tensor, " quantiles"]:
    quantile = NormalDist().inv_cdf
    return torch.tensor([quantile((index + 0.5) / _QUANTILES) for index in range(_QUANTILES)], dtype=torch.float32)

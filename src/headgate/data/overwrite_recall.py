r"""Overwrite-recall: keys get values again and again, and a query asks for the last one.

To answer, a memory must let go of what stood under the same key before, and of nothing else (the task behind the gate
ablation of gated linear attention, Yang et al., arXiv 2312.06635; one-time pairs, as in :mod:`headgate.data.recall`, ask
for no forgetting at all). :func:`overwrite_recall` draws one.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Int64
from torch import Tensor

from headgate.data.recall import IGNORED
from headgate.data.seeding import stream_generator
from headgate.validate import check_integer, check_positive, check_probability, check_shape

__all__ = ["OverwriteRecallData", "label_overwrites", "overwrite_recall"]


class OverwriteRecallData(NamedTuple):
    """Steps of writes and queries, and what each query asks for.

    Attributes:
        keys: int64 ``(examples, length)`` in [0, num_keys).
        values: int64 of the same shape: the value that is written, in [0, num_values), or ``num_values`` at a query.
        targets: int64 of the same shape: at a query the value last written to its key; ``-100`` at writes, and at
            queries for keys without one.
        ages: int64 of the same shape: how many steps ago that write was; 0 where there is no target.
        writes: int64 of the same shape: how many values have been written to that key so far, the last one included; 0
            where there is no target.
    """

    keys: Int64[Tensor, "examples length"]
    values: Int64[Tensor, "examples length"]
    targets: Int64[Tensor, "examples length"]
    ages: Int64[Tensor, "examples length"]
    writes: Int64[Tensor, "examples length"]


def overwrite_recall(
    num_examples: int,
    length: int = 48,
    num_keys: int = 8,
    num_values: int = 16,
    query_share: float = 0.3,
    *,
    seed: int = 0,
    generator: torch.Generator | None = None,
) -> OverwriteRecallData:
    """Draw overwrite-recall examples.

    Every step has a key; with probability ``query_share`` it asks for that key's value, otherwise it writes one. With
    ``num_keys=3, num_values=9``, for example (``?`` stands for the value 9)::

        keys      2     1     2     1     2     0     2     2     1
        values    7     4     ?     4     5     ?     3     ?     ?
        targets   -100  -100  7     -100  -100  -100  -100  3     4
        ages      0     0     2     0     0     0     0     1     5
        writes    0     0     1     0     0     0     0     3     2

    Keys and values are uniform and independent, so a written value may equal the one that it replaces. The same
    arguments give the same bytes on every machine; global random state is neither read nor changed.

    Args:
        num_examples: number of sequences.
        length: T, steps per sequence.
        num_keys: number of keys.
        num_values: number of values.
        query_share: probability that a step is a query, in [0, 1].
        seed: seed of the draw.
        generator: CPU generator to draw from in place of ``seed``.

    Returns:
        The examples as :class:`OverwriteRecallData`.

    Raises:
        ValueError: a size is not positive, or ``query_share`` is no probability.
    """
    check_positive(num_examples=num_examples, length=length, num_keys=num_keys, num_values=num_values)
    check_probability(query_share=query_share)
    generator = stream_generator(seed, "overwrite-recall") if generator is None else generator
    shape = (num_examples, length)
    keys = torch.randint(num_keys, shape, generator=generator)
    asked = torch.rand(shape, generator=generator, dtype=torch.float64) < query_share
    values = torch.randint(num_values, shape, generator=generator).masked_fill_(asked, num_values)
    return label_overwrites(keys, values, num_values)


def label_overwrites(
    keys: Int64[Tensor, "examples length"], values: Int64[Tensor, "examples length"], num_values: int
) -> OverwriteRecallData:
    """Find what every query asks for, e.g. of sequences made by hand.

    Args:
        keys: ``(examples, length)``, at least 0.
        values: the value that is written, in [0, num_values), or ``num_values`` at a query; shaped like ``keys``.
        num_values: number of values.

    Returns:
        The examples with their targets.

    Raises:
        TypeError: no integers.
        ValueError: the shapes differ, ``num_values`` is not positive, or an entry is out of range.
    """
    check_shape("keys", keys, (None, None), "examples, length")
    check_shape("values", values, tuple(keys.shape), "examples, length")
    check_integer("keys", keys)
    check_integer("values", values)
    check_positive(num_values=num_values)
    if keys.numel() == 0:
        raise ValueError(f"keys must hold at least one step, got {tuple(keys.shape)} for (examples, length)")
    if int(keys.min()) < 0:
        raise ValueError(f"keys must be at least 0, got {int(keys.min())}")
    if int(values.min()) < 0 or int(values.max()) > num_values:
        raise ValueError(
            f"values must lie in [0, num_values], got {int(values.min())} to {int(values.max())}, num_values={num_values}"
        )
    keys, values = keys.long(), values.long()
    step = torch.arange(keys.shape[1])[:, None]
    is_write = values != num_values
    # (examples, length, keys): the steps that write to each key, and with them the last one so far and their number.
    written = (keys[..., None] == torch.arange(int(keys.max()) + 1)) & is_write[..., None]
    last = torch.where(written, step, -1).cummax(dim=1).values.gather(2, keys[..., None])[..., 0]
    count = written.long().cumsum(dim=1).gather(2, keys[..., None])[..., 0]
    answered = ~is_write & (last >= 0)
    return OverwriteRecallData(
        keys,
        values,
        torch.where(answered, values.gather(1, last.clamp_min(0)), IGNORED),
        torch.where(answered, step[:, 0] - last, 0),
        torch.where(answered, count, 0),
    )

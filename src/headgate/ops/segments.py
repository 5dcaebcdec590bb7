"""Reductions over segments: rows that belong together by a segment number each, in any order (nodes of a graph in a batch).

With the number of segments given, all shapes but those of :func:`segment_top_k` follow from the shapes of the inputs, so the
functions go through ``torch.compile`` and ``torch.export``. Half precision is summed in float32. A segment without rows
gets zeros.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

__all__ = [
    "segment_counts",
    "segment_max",
    "segment_mean",
    "segment_pack",
    "segment_ranks",
    "segment_softmax",
    "segment_sum",
    "segment_top_k",
]


def segment_sum(
    values: Float[Tensor, "rows *channels"], segments: Int64[Tensor, " rows"], num_segments: int
) -> Float[Tensor, "segments *channels"]:
    """Sum the rows of every segment.

    Args:
        values: (rows, ...), floating.
        segments: (rows,), each in [0, num_segments).
        num_segments: how many there are.

    Returns:
        (num_segments, ...), of the dtype of ``values``.
    """
    wide = _wide(values)
    return wide.new_zeros((num_segments, *values.shape[1:])).index_add(0, segments, wide).to(values.dtype)


def segment_counts(segments: Int64[Tensor, " rows"], num_segments: int) -> Int64[Tensor, " segments"]:
    """Count the rows of every segment.

    Args:
        segments: (rows,), each in [0, num_segments).
        num_segments: how many there are.
    """
    return segments.new_zeros(num_segments).index_add(0, segments, torch.ones_like(segments))


def segment_mean(
    values: Float[Tensor, "rows *channels"], segments: Int64[Tensor, " rows"], num_segments: int
) -> Float[Tensor, "segments *channels"]:
    """Average the rows of every segment; arguments and result as of :func:`segment_sum`."""
    counts = segment_counts(segments, num_segments).clamp_min(1)
    total = segment_sum(_wide(values), segments, num_segments)
    return (total / counts.view(-1, *[1] * (values.dim() - 1))).to(values.dtype)


def segment_max(
    values: Float[Tensor, "rows *channels"], segments: Int64[Tensor, " rows"], num_segments: int
) -> Float[Tensor, "segments *channels"]:
    """Take the largest value of every segment, channel by channel; arguments and result as of :func:`segment_sum`."""
    index = segments.view(-1, *[1] * (values.dim() - 1)).expand_as(values)
    zeros = values.new_zeros((num_segments, *values.shape[1:]))
    return zeros.scatter_reduce(0, index, values, "amax", include_self=False)


def segment_softmax(
    logits: Float[Tensor, "rows *channels"], segments: Int64[Tensor, " rows"], num_segments: int
) -> Float[Tensor, "rows *channels"]:
    """Normalise over the rows of each segment, channel by channel: ``exp(z_i) / Σ_{j in the segment of i} exp(z_j)``.

    Args:
        logits: (rows, ...).
        segments: (rows,), each in [0, num_segments).
        num_segments: how many there are.

    Returns:
        Weights of the shape and dtype of ``logits``, which add up to 1 over every segment that has rows.
    """
    wide = _wide(logits)
    largest = segment_max(wide.detach(), segments, num_segments)
    powers = (wide - largest[segments]).exp()
    return (powers / segment_sum(powers, segments, num_segments)[segments]).to(logits.dtype)


def segment_ranks(segments: Int64[Tensor, " rows"], num_segments: int) -> Int64[Tensor, " rows"]:
    """Number the rows of every segment from 0, in the order in which they stand.

    Args:
        segments: (rows,), each in [0, num_segments).
        num_segments: how many there are.
    """
    order = segments.argsort(stable=True)
    counts = segment_counts(segments, num_segments)
    starts = counts.cumsum(0) - counts
    places = torch.arange(len(segments), device=segments.device) - starts[segments[order]]
    return torch.empty_like(segments).scatter(0, order, places)


def segment_top_k(
    scores: Float[Tensor, " rows"], segments: Int64[Tensor, " rows"] | None, ratio: float
) -> Int64[Tensor, " kept"]:
    """Find the ``ceil(ratio · rows)`` largest scores of every segment.

    The product is rounded to float32 before it is rounded up, as in PyTorch Geometric, so that 0.55 · 20 is 11.

    Args:
        scores: (rows,).
        segments: (rows,), not negative; ``None`` for a single segment, whose number of kept rows then follows from the
            shape alone.
        ratio: share that is kept, in (0, 1].

    Returns:
        Row numbers, segment by segment, in each the largest score first; equal scores in the order in which they stand.
    """
    order = scores.argsort(descending=True, stable=True)
    if segments is None:
        return order[: _share(ratio, len(scores))]
    if len(scores) == 0:
        return order
    order = order[segments[order].argsort(stable=True)]
    counts = segments.bincount()
    kept = (torch.tensor(ratio, dtype=torch.float32, device=scores.device) * counts).ceil().long()
    places = torch.arange(len(scores), device=scores.device) - (counts.cumsum(0) - counts)[segments[order]]
    return order[places < kept[segments[order]]]


def segment_pack(
    values: Float[Tensor, "rows channels"], segments: Int64[Tensor, " rows"], num_segments: int, size: int
) -> tuple[Float[Tensor, "segments size channels"], Bool[Tensor, "segments size"]]:
    """Put the rows of each segment into a row of a padded tensor, in the order in which they stand.

    Args:
        values: (rows, channels).
        segments: (rows,), each in [0, num_segments).
        num_segments: how many there are.
        size: places a segment, at least as many as the longest one has rows.

    Returns:
        (num_segments, size, channels) with zeros where there is no row, and (num_segments, size), true where there is one.
    """
    places = segments * size + segment_ranks(segments, num_segments)
    mask = torch.zeros(num_segments * size, dtype=torch.bool, device=segments.device)
    mask = mask.scatter(0, places, torch.ones_like(places, dtype=torch.bool))
    packed = values.new_zeros((num_segments * size, values.shape[1])).index_add(0, places, values)
    return packed.view(num_segments, size, values.shape[1]), mask.view(num_segments, size)


def _wide(values: Tensor) -> Tensor:
    return values.float() if values.dtype in (torch.float16, torch.bfloat16) else values


def _share(ratio: float, count: int) -> int:
    """``ceil(ratio · count)`` in the arithmetic of :func:`segment_top_k`, for a count that is known from a shape."""
    return math.ceil(_single(_single(ratio) * count))


def _single(value: float) -> float:
    """Round to float32, in arithmetic that ``torch.compile`` folds."""
    mantissa, exponent = math.frexp(value)
    return math.ldexp(round(mantissa * 2**24), exponent - 24)

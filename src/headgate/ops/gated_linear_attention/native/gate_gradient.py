"""The gradient of the gates: sums of terms over the tokens that a gate acts on."""

from __future__ import annotations

from typing import Any

from headgate.ops.gated_linear_attention.native.buffers import Buffers, Rows, compiled, compiled_width
from headgate.ops.native.vectors import VECTOR_BYTES, add, item_size, lanes, load, load_scalar, store, store_scalar

__all__ = ["accumulate_gate", "accumulate_gate_from_start", "terms_rows"]


@compiled
def accumulate_gate(buffers: Buffers, width: int, tokens: int, terms: Rows, zero: Any) -> None:
    """Turn the terms of the gate's gradient into sums from each token to the last one, plus ``buffers.total``."""
    size = item_size(zero)
    whole = width // lanes(zero) * VECTOR_BYTES
    for offset in range(0, whole, VECTOR_BYTES):
        running = load(buffers.total + offset, zero)
        for token in range(tokens - 1, -1, -1):
            address = terms.address + token * terms.stride + offset
            running = add(running, load(address, zero))
            store(address, running)
    for offset in range(whole, width * size, size):
        last = load_scalar(buffers.total + offset, zero)
        for token in range(tokens - 1, -1, -1):
            address = terms.address + token * terms.stride + offset
            last += load_scalar(address, zero)
            store_scalar(address, last)


@compiled
def terms_rows(buffers: Buffers, width: int, zero: Any) -> Rows:
    """The rows of ``buffers.terms``."""
    return Rows(buffers.terms, compiled_width(width, lanes(zero)) * item_size(zero))


@compiled
def accumulate_gate_from_start(
    buffers: Buffers, width: int, tokens: int, terms: Rows, gradient: Rows, zero: Any
) -> None:
    """Add to each token's gradient the first row of ``buffers.spare`` and the terms of all tokens before it."""
    size = item_size(zero)
    whole = width // lanes(zero) * VECTOR_BYTES
    for offset in range(0, whole, VECTOR_BYTES):
        running = load(buffers.spare + offset, zero)
        for token in range(tokens):
            address = gradient.address + token * gradient.stride + offset
            store(address, add(running, load(address, zero)))
            running = add(running, load(terms.address + token * terms.stride + offset, zero))
    for offset in range(whole, width * size, size):
        so_far = load_scalar(buffers.spare + offset, zero)
        for token in range(tokens):
            address = gradient.address + token * gradient.stride + offset
            store_scalar(address, so_far + load_scalar(address, zero))
            so_far += load_scalar(terms.address + token * terms.stride + offset, zero)

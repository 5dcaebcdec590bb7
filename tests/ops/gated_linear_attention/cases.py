"""What the tests of gated linear attention share: gates of every kind, cases, and the comparison with the reference."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from headgate.ops import gated_linear_attention

__all__ = [
    "BACKENDS",
    "FORWARD_TOLERANCE",
    "GATES",
    "GRADIENT_TOLERANCE",
    "LENGTHS",
    "Case",
    "assert_close",
    "assert_same",
    "expected",
    "log_gates",
    "make_case",
    "relative_error",
    "results",
]

BACKENDS = ["parallel", "chunk", "native"]
"""Each of them is tested against ``"reference"``."""

LENGTHS = [1, 2, 15, 16, 17, 31, 33, 63, 64, 65]

FORWARD_TOLERANCE = 2e-5
GRADIENT_TOLERANCE = 1e-4


def _mild(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    return torch.nn.functional.logsigmoid(torch.randn(shape, generator=generator)) / 16


def _strong(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    return -20 * torch.rand(shape, generator=generator)


def _closed(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    return torch.full(shape, -20.0)


def _open(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    return torch.zeros(shape)


def _mixed_channels(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """Every second channel forgets at once, the others hardly at all."""
    gates = 0.01 * _strong(shape, generator)
    gates[..., ::2] = -20 + gates[..., ::2]
    return gates


def _bursts(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """Long stretches of closed gates, then of nearly open ones: differences of their sums would have no digits left."""
    gates = 1e-3 * _strong(shape, generator)
    gates[:, (torch.arange(shape[1]) // 5) % 2 == 0] -= 20
    return gates


def _some(value: float) -> Callable[[Sequence[int], torch.Generator], Tensor]:
    def gates(shape: Sequence[int], generator: torch.Generator) -> Tensor:
        rare = torch.rand(shape, generator=generator) < 0.1
        return torch.where(rare, value, _mild(shape, generator))

    return gates


GATES: dict[str, Callable[[Sequence[int], torch.Generator], Tensor]] = {
    "mild": _mild,
    "strong": _strong,
    "closed": _closed,
    "open": _open,
    "mixed_channels": _mixed_channels,
    "bursts": _bursts,
    "some_-1e4": _some(-1e4),
    "some_-inf": _some(-torch.inf),
}
"""Logarithms of gates, by name."""


def log_gates(name: str, shape: Sequence[int], seed: int = 0) -> Tensor:
    """Gates of one kind, always the same ones."""
    return GATES[name](tuple(shape), torch.Generator().manual_seed(seed))


@dataclass(frozen=True)
class Case:
    """The arguments of one call, and what its loss multiplies the results by."""

    q: Tensor
    k: Tensor
    v: Tensor
    log_gate: Tensor
    initial_state: Tensor | None
    cu_seqlens: Tensor | None
    reverse: bool
    scale: float | None
    output_weight: Tensor
    state_weight: Tensor | None

    def to(self, dtype: torch.dtype) -> Case:
        """The same values in another dtype; states are in float32 or float64."""
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        tokens = {name: getattr(self, name).to(dtype) for name in ("q", "k", "v", "log_gate", "output_weight")}
        states = {
            name: None if (state := getattr(self, name)) is None else state.to(wide)
            for name in ("initial_state", "state_weight")
        }
        return replace(self, **tokens, **states)


def make_case(
    length: int,
    key: int = 5,
    value: int = 7,
    *,
    batch: int = 2,
    heads: int = 2,
    gates: str = "mild",
    bounds: Sequence[int] | None = None,
    reverse: bool = False,
    scale: float | None = None,
    initial_state: bool = True,
    state_weight: bool = True,
    seed: int = 0,
) -> Case:
    """A case with normal entries; ``bounds`` packs its single row, e.g. ``(0, 3, 3, 10)``."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    sequences = batch if bounds is None else len(bounds) - 1
    return Case(
        q=normal(batch, length, heads, key),
        k=normal(batch, length, heads, key),
        v=normal(batch, length, heads, value),
        log_gate=log_gates(gates, (batch, length, heads, key), seed),
        initial_state=normal(sequences, heads, key, value) if initial_state else None,
        cu_seqlens=None if bounds is None else torch.tensor(bounds),
        reverse=reverse,
        scale=scale,
        output_weight=normal(batch, length, heads, value),
        state_weight=normal(sequences, heads, key, value) if state_weight else None,
    )


def results(case: Case, backend: str, **options: Any) -> dict[str, Tensor]:
    """Output, final state, and the gradients of all inputs, by name."""
    names = ["q", "k", "v", "log_gate"] + ([] if case.initial_state is None else ["initial_state"])
    # detach() keeps the strides of the case's tensors
    inputs = {name: getattr(case, name).detach().requires_grad_() for name in names}
    output, state = gated_linear_attention(
        **inputs,
        scale=case.scale,
        cu_seqlens=case.cu_seqlens,
        reverse=case.reverse,
        return_state=True,
        backend=backend,
        **options,
    )
    assert state is not None
    loss = (output * case.output_weight).sum()
    if case.state_weight is not None:
        loss = loss + (state * case.state_weight).sum()
    gradients = torch.autograd.grad(loss, list(inputs.values()))
    named = {f"gradient of {name}": gradient for name, gradient in zip(names, gradients, strict=True)}
    return {"output": output.detach(), "state": state.detach(), **named}


@functools.cache
def _expected(arguments: tuple[tuple[str, Any], ...]) -> dict[str, Tensor]:
    return results(make_case(**dict(arguments)).to(torch.float64), "reference")


def expected(**arguments: Any) -> dict[str, Tensor]:
    """What the reference gives in float64 for ``make_case(**arguments)``; computed once for all backends."""
    return _expected(tuple(sorted(arguments.items())))


def relative_error(actual: Tensor, reference: Tensor) -> float:
    """The largest deviation over the largest reference value; infinite where one of them is not finite."""
    assert actual.shape == reference.shape
    if reference.numel() == 0:
        return 0.0
    deviation = (actual.double() - reference.double()).abs().max().item()
    largest = reference.double().abs().max().item()
    if deviation != deviation or largest == float("inf"):
        return float("inf")
    return deviation / largest if largest else (0.0 if deviation == 0 else float("inf"))


def assert_close(name: str, actual: Tensor, reference: Tensor, tolerance: float) -> None:
    error = relative_error(actual, reference)
    assert error <= tolerance, f"{name} is off by {error:.2e} of its largest value, allowed are {tolerance:.0e}"


def assert_same(
    actual: dict[str, Tensor],
    reference: dict[str, Tensor],
    forward: float = FORWARD_TOLERANCE,
    gradient: float = GRADIENT_TOLERANCE,
) -> None:
    """Compare two answers of :func:`results`, name by name."""
    assert actual.keys() == reference.keys()
    for name in actual:
        assert_close(name, actual[name], reference[name], gradient if name.startswith("gradient") else forward)

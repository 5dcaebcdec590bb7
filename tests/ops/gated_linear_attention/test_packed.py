"""Packed sequences: each is scanned as if it were alone."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from headgate.ops import gated_linear_attention
from tests.ops.gated_linear_attention.cases import BACKENDS, assert_same, expected, make_case, results

each_backend = pytest.mark.parametrize("backend", BACKENDS)

BOUNDS: dict[str, tuple[int, ...]] = {
    "one": (0, 33),
    "two": (0, 16, 33),
    "ragged": (0, 1, 18, 82, 84, 100),
    "empty_ones": (0, 0, 5, 5, 5, 38, 38),
    "all_single": tuple(range(20)),
    "one_long": (0, 2, 3, 150, 151),
}


def check_backend(backend: str, **arguments: Any) -> None:
    assert_same(results(make_case(**arguments), backend), expected(**arguments))


@each_backend
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("initial_state", [False, True])
@pytest.mark.parametrize("name", BOUNDS)
def test_a_backend_equals_the_reference_on_packed_sequences(
    backend: str, name: str, initial_state: bool, reverse: bool
) -> None:
    bounds = BOUNDS[name]
    check_backend(backend, length=bounds[-1], batch=1, bounds=bounds, initial_state=initial_state, reverse=reverse)


@each_backend
@pytest.mark.parametrize("gates", ["open", "strong", "bursts", "some_-1e4", "some_-inf"])
@pytest.mark.parametrize("reverse", [False, True])
def test_a_backend_equals_the_reference_on_packed_sequences_with_every_kind_of_gate(
    backend: str, gates: str, reverse: bool
) -> None:
    bounds = BOUNDS["empty_ones"]
    check_backend(backend, length=bounds[-1], batch=1, bounds=bounds, gates=gates, reverse=reverse)


@pytest.mark.parametrize("backend", ["chunk", "native"])
@pytest.mark.parametrize("reverse", [False, True])
def test_a_backend_equals_the_reference_on_long_packed_sequences(backend: str, reverse: bool) -> None:
    check_backend(backend, length=900, batch=1, heads=1, bounds=(0, 300, 301, 301, 900), reverse=reverse)


@each_backend
@pytest.mark.parametrize("reverse", [False, True])
def test_packed_sequences_are_separate_calls(backend: str, reverse: bool) -> None:
    bounds = BOUNDS["ragged"]
    case = make_case(bounds[-1], batch=1, bounds=bounds, reverse=reverse)
    assert case.initial_state is not None
    inputs = (case.q, case.k, case.v, case.log_gate)
    packed = gated_linear_attention(
        *inputs,
        initial_state=case.initial_state,
        cu_seqlens=case.cu_seqlens,
        return_state=True,
        reverse=reverse,
        backend=backend,
    )
    assert packed.state is not None
    for n, (start, end) in enumerate(itertools.pairwise(bounds)):
        alone = gated_linear_attention(
            *(x[:, start:end] for x in inputs),
            initial_state=case.initial_state[n : n + 1],
            return_state=True,
            reverse=reverse,
            backend=backend,
        )
        assert alone.state is not None
        torch.testing.assert_close(packed.output[:, start:end], alone.output, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(packed.state[n : n + 1], alone.state, rtol=1e-5, atol=1e-5)


@each_backend
def test_an_empty_sequence_hands_its_state_and_its_gradient_through(backend: str) -> None:
    case = make_case(6, batch=1, bounds=(0, 0, 6, 6))
    found = results(case, backend)
    assert case.initial_state is not None
    assert case.state_weight is not None
    for n in (0, 2):
        assert torch.equal(found["state"][n], case.initial_state[n])
        assert torch.equal(found["gradient of initial_state"][n], case.state_weight[n])


@pytest.mark.parametrize("backend", ["reference", "chunk", "native"])
@pytest.mark.parametrize("reverse", [False, True])
def test_a_sequence_of_nan_spoils_no_other_one(backend: str, reverse: bool) -> None:
    case = make_case(60, batch=1, bounds=(0, 20, 41, 60), reverse=reverse)
    case.v[:, 20:41] = torch.nan
    found = results(case, backend)
    assert found["output"][:, 20:41].isnan().any()
    for name, value in found.items():
        others = value[::2] if "state" in name else torch.cat([value[:, :20], value[:, 41:]], dim=1)
        assert others.isfinite().all(), name


@each_backend
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_boundaries_are_of_either_integer_type(backend: str, dtype: torch.dtype) -> None:
    case = make_case(9, batch=1)
    inputs = (case.q, case.k, case.v, case.log_gate)
    bounds = torch.tensor([0, 4, 9])
    assert torch.equal(
        gated_linear_attention(*inputs, cu_seqlens=bounds.to(dtype), backend=backend).output,
        gated_linear_attention(*inputs, cu_seqlens=bounds, backend=backend).output,
    )

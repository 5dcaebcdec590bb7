"""The two-way op is the mean of the two scans of the reference."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from headgate.ops import bidirectional_gated_linear_attention, gated_linear_attention
from tests.ops.gated_linear_attention.cases import (
    BACKENDS,
    GATES,
    assert_close,
    assert_same,
    log_gates,
    make_case,
)

each_backend = pytest.mark.parametrize("backend", BACKENDS)
NAMES = ("q", "k", "v", "log_gate_forward", "log_gate_backward")


def make_inputs(length: int, gates: str = "mild", *, key: int = 5, value: int = 7, batch: int = 2) -> list[Tensor]:
    case = make_case(length, key, value, batch=batch, gates=gates)
    return [case.q, case.k, case.v, case.log_gate, log_gates(gates, case.q.shape, seed=1)]


def two_scans(q: Tensor, k: Tensor, v: Tensor, forward: Tensor, backward: Tensor, **options: Any) -> Tensor:
    options["backend"] = "reference"
    there = gated_linear_attention(q, k, v, forward, **options).output
    back = gated_linear_attention(q, k, v, backward, reverse=True, **options).output
    return (there + back) / 2


def both_ways(inputs: Sequence[Tensor], backend: str, **options: Any) -> dict[str, Tensor]:
    """Output and all gradients of a loss with fixed weights."""
    inputs = [x.detach().requires_grad_() for x in inputs]
    op = two_scans if backend == "two scans" else bidirectional_gated_linear_attention
    output = op(*inputs, backend=backend, **options)
    weight = torch.linspace(-1, 1, output.numel()).view_as(output).to(output.dtype)
    gradients = torch.autograd.grad((output * weight).sum(), inputs)
    return {"output": output.detach()} | {f"gradient of {n}": g for n, g in zip(NAMES, gradients, strict=True)}


def check_backend(backend: str, inputs: Sequence[Tensor], **options: Any) -> None:
    exact = both_ways([x.double() for x in inputs], "two scans", **options)
    assert_same(both_ways(inputs, backend, **options), exact)


@each_backend
@pytest.mark.parametrize("gates", GATES)
@pytest.mark.parametrize("length", [1, 2, 16, 17, 33, 65])
def test_a_backend_equals_the_mean_of_both_scans(backend: str, length: int, gates: str) -> None:
    check_backend(backend, make_inputs(length, gates))


@each_backend
@pytest.mark.parametrize(("key", "value", "length"), [(20, 33, 49), (64, 64, 20), (1, 3, 70)])
def test_a_backend_equals_the_mean_of_both_scans_for_every_size(
    backend: str, key: int, value: int, length: int
) -> None:
    check_backend(backend, make_inputs(length, "strong", key=key, value=value))


@pytest.mark.parametrize("backend", ["chunk", "native"])
def test_a_backend_equals_the_mean_of_both_scans_over_a_thousand_tokens(backend: str) -> None:
    check_backend(backend, make_inputs(1000, "some_-1e4", batch=1))


@each_backend
@pytest.mark.parametrize("batch", [0, 1])
def test_the_batch_may_be_one_or_empty(backend: str, batch: int) -> None:
    check_backend(backend, make_inputs(18, batch=batch))


@each_backend
@pytest.mark.parametrize("bounds", [(0, 0, 5, 38), (0, 17, 17, 38, 38), (0, 38)])
def test_packed_sequences_do_not_see_each_other(backend: str, bounds: tuple[int, ...]) -> None:
    check_backend(backend, make_inputs(38, "strong", batch=1), cu_seqlens=torch.tensor(bounds))


@each_backend
def test_the_scale_is_one_over_the_root_of_the_key_dim_or_as_given(backend: str) -> None:
    inputs = make_inputs(12, key=9)
    output = bidirectional_gated_linear_attention(*inputs, backend=backend)
    given = bidirectional_gated_linear_attention(*inputs, scale=-2.0, backend=backend)
    assert_close("scaled", given, -6 * output, 1e-6)
    check_backend(backend, inputs, scale=-2.0)


@each_backend
def test_reversing_the_sequence_and_swapping_the_gates_reverses_the_output(backend: str) -> None:
    q, k, v, forward, backward = make_inputs(45, "strong")
    output = bidirectional_gated_linear_attention(q, k, v, forward, backward, backend=backend)
    flipped = (x.flip(1) for x in (q, k, v, backward, forward))
    assert_close("output", bidirectional_gated_linear_attention(*flipped, backend=backend).flip(1), output, 1e-6)


@each_backend
def test_closed_gates_leave_each_token_its_own_write(backend: str) -> None:
    q, k, v, *_ = make_inputs(20)
    closed = torch.full_like(q, -torch.inf)
    output = bidirectional_gated_linear_attention(q, k, v, closed, closed, scale=1.0, backend=backend)
    assert_close("output", output, (q * k).sum(-1, keepdim=True) * v, 1e-6)


@each_backend
def test_open_gates_show_each_token_all_writes_and_its_own_twice(backend: str) -> None:
    q, k, v, *_ = (x.double() for x in make_inputs(20))
    output = bidirectional_gated_linear_attention(
        q, k, v, torch.zeros_like(q), torch.zeros_like(q), scale=1.0, backend=backend
    )
    memory = torch.einsum("bthk,bthv->bhkv", k, v)
    expected = torch.einsum("bthk,bhkv->bthv", q, memory) + (q * k).sum(-1, keepdim=True) * v
    torch.testing.assert_close(output, expected / 2)


@each_backend
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_inputs_are_computed_in_float32(backend: str, dtype: torch.dtype) -> None:
    inputs = [x.to(dtype) for x in make_inputs(40)]
    exact = both_ways([x.double() for x in inputs], "two scans")
    found = both_ways(inputs, backend)
    assert all(x.dtype == dtype for x in found.values())
    # one rounding, and one more where the mean of two rounded scans is taken; the weights of the loss are rounded, too
    assert_close("output", found["output"], exact["output"], 2 * torch.finfo(dtype).eps)
    for name in found:
        assert_close(name, found[name], exact[name], 4 * torch.finfo(dtype).eps)


@each_backend
def test_inputs_may_be_strided_in_any_way(backend: str) -> None:
    q, k, v, forward, backward = make_inputs(30)
    joined = torch.cat([forward, q, k, v, backward], dim=-1)
    views = joined.split([5, 5, 5, 7, 5], dim=-1)
    check_backend(backend, [views[1], views[2], views[3], views[0], views[4]])
    check_backend(backend, [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v, forward, backward)])
    check_backend(backend, [q, q, v, forward, forward])

"""What the chunkwise form alone promises: any schedule gives the same, in double precision to ten digits, in bounded memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from headgate.ops.gated_linear_attention.chunkwise import (
    _backward,
    _forward,
    _sizes,
    recurrence_chunkwise,
    recurrence_chunkwise_autograd,
)
from headgate.ops.gated_linear_attention.parallel import recurrence_parallel
from headgate.ops.gated_linear_attention.reference import recurrence_reference
from tests.ops.gated_linear_attention.cases import GATES, Case, assert_close, assert_same, expected, make_case, results

Recurrence = Callable[..., tuple[Tensor, Tensor]]
both_forms = pytest.mark.parametrize("recurrence", [recurrence_chunkwise, recurrence_chunkwise_autograd])


def answers(recurrence: Recurrence, case: Case, **options: Any) -> dict[str, Tensor]:
    """Output, state and gradients, by name."""
    assert case.initial_state is not None
    assert case.state_weight is not None
    inputs = [
        x.detach().requires_grad_() for x in (case.q, case.k, case.v, case.log_gate.clamp_min(-1e4), case.initial_state)
    ]
    q, k, v, log_gate, start = inputs
    output, state = recurrence(q, k, v, log_gate, 0.3, start, case.cu_seqlens, case.reverse, **options)
    gradients = torch.autograd.grad((output * case.output_weight).sum() + (state * case.state_weight).sum(), inputs)
    names = ("q", "k", "v", "log_gate", "initial_state")
    return {"output": output.detach(), "state": state.detach()} | {
        f"gradient of {name}": gradient for name, gradient in zip(names, gradients, strict=True)
    }


@pytest.mark.parametrize("gate", [-0.001, -0.1, -1.0, -20.0])
@pytest.mark.parametrize("length", [1, 17, 64, 200])
def test_chunkwise_recurrent_and_parallel_form_agree_to_ten_digits(length: int, gate: float) -> None:
    case = make_case(length, 8, 8, batch=1, gates="open").to(torch.float64)
    case.log_gate.fill_(gate)
    reference = answers(recurrence_reference, case)
    for chunk_size in (1, 16, 64):
        assert_same(answers(recurrence_chunkwise, case, chunk_size=chunk_size), reference, 1e-10, 1e-10)
    assert_same(answers(recurrence_parallel, case), reference, 1e-10, 1e-10)


@both_forms
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(
    ("chunk_size", "subchunk_size"),
    [(1, 1), (1, 16), (2, 1), (3, 2), (16, 16), (16, 64), (24, 16), (64, 1), (64, 8), (64, 64), (128, 32), (1000, 16)],
)
def test_every_schedule_gives_the_same(
    recurrence: Recurrence, chunk_size: int, subchunk_size: int, packed: bool, reverse: bool
) -> None:
    bounds = (0, 0, 30, 31, 70, 70) if packed else None
    case = make_case(70, gates="strong", batch=1, bounds=bounds, reverse=reverse).to(torch.float64)
    found = answers(recurrence, case, chunk_size=chunk_size, subchunk_size=subchunk_size)
    assert_same(found, answers(recurrence_reference, case), 1e-12, 1e-12)


@both_forms
@pytest.mark.parametrize("gates", GATES)
@pytest.mark.parametrize("bounds", [None, (0, 1, 40, 40, 75)])
def test_float32_keeps_six_digits_whatever_the_gates(
    recurrence: Recurrence, gates: str, bounds: tuple[int, ...] | None
) -> None:
    case = make_case(75, gates=gates, batch=1, bounds=bounds)
    assert_same(answers(recurrence, case), answers(recurrence_reference, case.to(torch.float64)), 1e-6, 3e-6)


def test_the_gate_gradient_does_not_cancel_over_a_long_sequence() -> None:
    arguments = {"length": 4000, "key": 2, "value": 2, "batch": 1, "heads": 1, "gates": "mixed_channels"}
    found, exact = results(make_case(**arguments), "chunk"), expected(**arguments)
    for part in (slice(0, 100), slice(-100, None)):
        name = "gradient of log_gate"
        assert_close(name, found[name][:, part], exact[name][:, part], 3e-6)


def saved_elements(recurrence: Recurrence, case: Case) -> int:
    """Elements that the graph keeps for the backward pass, each storage once."""
    storages: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes() // x.element_size()
        return x

    inputs = [x.requires_grad_() for x in (case.q, case.k, case.v, case.log_gate, case.initial_state) if x is not None]
    q, k, v, log_gate, start = inputs
    with saved_tensors_hooks(pack, lambda x: x):
        output, state = recurrence(q, k, v, log_gate, 0.5, start)
    assert output.grad_fn is not None
    assert state.grad_fn is not None
    return sum(storages.values())


def test_the_backward_pass_keeps_the_inputs_and_nothing_else() -> None:
    case = make_case(300, 8, 8)
    inputs = sum(x.numel() for x in (case.q, case.k, case.v, case.log_gate, case.initial_state) if x is not None)
    assert saved_elements(recurrence_chunkwise, case) == inputs
    assert saved_elements(recurrence_chunkwise_autograd, make_case(300, 8, 8)) > 5 * inputs


class Largest(TorchDispatchMode):
    """The largest tensor that any operation makes, in elements."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, Tensor):
                self.elements = max(self.elements, x.untyped_storage().nbytes() // x.element_size())
        return result


def test_no_step_makes_a_tensor_larger_than_the_padded_inputs_or_the_states() -> None:
    length, key, value = 512, 16, 24
    case = make_case(length, key, value, batch=1, heads=1)
    inputs = (case.q, case.k, case.v, case.log_gate, case.initial_state, None)
    sizes = _sizes(case.q, None, 64, 16)
    with Largest() as largest:
        _forward(*inputs, 0.25, False, sizes)
        _backward(case.output_weight, case.state_weight, *inputs, 0.25, False, sizes)
    scores_and_a_column, states = length * (16 + 1), length // 64 * key * value
    assert largest.elements <= max(length * max(key, value), scores_and_a_column, states)


@both_forms
@pytest.mark.parametrize("bounds", [None, (0, 3, 9)])
def test_an_initial_state_of_zeros_is_that_of_none(recurrence: Recurrence, bounds: tuple[int, ...] | None) -> None:
    case = make_case(9, batch=1, bounds=bounds)
    assert case.initial_state is not None
    inputs = (case.q, case.k, case.v, case.log_gate, 0.5)
    without = recurrence(*inputs, None, case.cu_seqlens)
    zeros = recurrence(*inputs, torch.zeros_like(case.initial_state), case.cu_seqlens)
    assert all(torch.equal(a, b) for a, b in zip(without, zeros, strict=True))


def test_a_backward_pass_inside_autocast_stays_in_float32() -> None:
    case = make_case(40, 16, 16)
    inputs = [x.requires_grad_() for x in (case.q, case.k, case.v, case.log_gate)]
    loss = recurrence_chunkwise(*inputs, 0.25)[0].square().sum()
    outside = torch.autograd.grad(loss, inputs, retain_graph=True)
    with torch.autocast("cpu", torch.bfloat16):
        inside = torch.autograd.grad(loss, inputs)
    assert all(torch.equal(a, b) for a, b in zip(inside, outside, strict=True))


def test_the_autograd_form_has_second_derivatives() -> None:
    case = make_case(7, 2, 2, batch=1, heads=1).to(torch.float64)
    assert case.initial_state is not None
    inputs = [x.requires_grad_() for x in (case.q, case.k, case.v, case.log_gate, case.initial_state)]

    def run(q: Tensor, k: Tensor, v: Tensor, log_gate: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        return recurrence_chunkwise_autograd(q, k, v, log_gate, 0.5, state, chunk_size=4, subchunk_size=2)

    assert torch.autograd.gradgradcheck(run, inputs)

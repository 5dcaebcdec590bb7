"""Every backend gives what the loop over time gives: values, final state and all five gradients."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from headgate.ops import gated_linear_attention
from tests.ops.gated_linear_attention.cases import (
    BACKENDS,
    GATES,
    LENGTHS,
    Case,
    assert_close,
    assert_same,
    expected,
    make_case,
    results,
)

each_backend = pytest.mark.parametrize("backend", BACKENDS)


def check_backend(backend: str, **arguments: Any) -> None:
    assert_same(results(make_case(**arguments), backend), expected(**arguments))


def test_fresh_memory_is_poisoned_in_these_tests() -> None:
    assert torch.empty(3).isnan().all()
    assert torch.ones(2, dtype=torch.float64).new_empty(3).isnan().all()
    assert torch.empty(4, dtype=torch.uint8).eq(255).all()


def test_the_reference_is_the_recurrence_worked_out_by_hand() -> None:
    # one channel: S_1 = ½·4 + 2·3 = 8, o_1 = ½·1·8 = 4; S_2 = ¼·8 + 1·5 = 7, o_2 = ½·(-2)·7 = -7
    q, k, v, gate = (torch.tensor(x).view(1, 2, 1, 1) for x in ([1.0, -2.0], [2.0, 1.0], [3.0, 5.0], [0.5, 0.25]))
    start = torch.tensor(4.0).view(1, 1, 1, 1)
    output, state = gated_linear_attention(
        q, k, v, gate.log(), scale=0.5, initial_state=start, return_state=True, backend="reference"
    )
    torch.testing.assert_close(output.flatten(), torch.tensor([4.0, -7.0]))
    assert state is not None
    assert state.item() == pytest.approx(7.0)
    # from the last token to the first: S_2 = ¼·4 + 1·5 = 6, S_1 = ½·6 + 2·3 = 9
    output, state = gated_linear_attention(
        q, k, v, gate.log(), scale=0.5, initial_state=start, return_state=True, reverse=True, backend="reference"
    )
    torch.testing.assert_close(output.flatten(), torch.tensor([4.5, -6.0]))
    assert state is not None
    assert state.item() == pytest.approx(9.0)


@each_backend
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("gates", GATES)
@pytest.mark.parametrize("length", LENGTHS)
def test_a_backend_equals_the_reference(backend: str, length: int, gates: str, reverse: bool) -> None:
    check_backend(backend, length=length, gates=gates, reverse=reverse)


@each_backend
@pytest.mark.parametrize("gates", ["mild", "strong", "some_-1e4"])
@pytest.mark.parametrize("reverse", [False, True])
def test_a_backend_equals_the_reference_over_a_thousand_tokens(backend: str, gates: str, reverse: bool) -> None:
    check_backend(backend, length=1000, batch=1, heads=1, gates=gates, reverse=reverse)


@each_backend
@pytest.mark.parametrize("gates", ["mild", "strong", "some_-inf"])
@pytest.mark.parametrize(
    ("key", "value", "length"), [(1, 1, 33), (7, 1, 17), (1, 9, 17), (20, 33, 65), (64, 128, 17), (130, 65, 18)]
)
def test_a_backend_equals_the_reference_for_every_size_of_key_and_value(
    backend: str, key: int, value: int, length: int, gates: str
) -> None:
    check_backend(backend, length=length, key=key, value=value, gates=gates)


@each_backend
@pytest.mark.parametrize("batch", [0, 1, 3])
@pytest.mark.parametrize("heads", [1, 5])
def test_a_backend_equals_the_reference_for_every_batch_the_empty_one_included(
    backend: str, batch: int, heads: int
) -> None:
    check_backend(backend, length=19, batch=batch, heads=heads)


@each_backend
@pytest.mark.parametrize("reverse", [False, True])
def test_a_backend_starts_from_zeros_without_an_initial_state(backend: str, reverse: bool) -> None:
    check_backend(backend, length=37, initial_state=False, reverse=reverse)


@each_backend
@pytest.mark.parametrize("scale", [1.0, -0.3, 0.0])
def test_a_backend_takes_a_scale(backend: str, scale: float) -> None:
    check_backend(backend, length=21, scale=scale)


@each_backend
def test_the_default_scale_is_one_over_the_root_of_the_key_dim(backend: str) -> None:
    assert_same(results(make_case(20, key=9), backend), expected(length=20, key=9, scale=1 / 3))


@each_backend
@pytest.mark.parametrize("initial_state", [False, True])
def test_a_backend_differentiates_a_loss_of_the_output_alone(backend: str, initial_state: bool) -> None:
    check_backend(backend, length=35, state_weight=False, initial_state=initial_state)


@each_backend
@pytest.mark.parametrize("reverse", [False, True])
def test_a_backend_differentiates_a_loss_of_the_state_alone(backend: str, reverse: bool) -> None:
    case = make_case(35, reverse=reverse)
    wide = case.to(torch.float64)

    def gradients(case: Case, name: str) -> dict[str, Tensor]:
        inputs = [x.requires_grad_() for x in (case.k, case.v, case.log_gate, case.initial_state) if x is not None]
        k, v, log_gate, start = inputs
        _, state = gated_linear_attention(
            case.q, k, v, log_gate, initial_state=start, return_state=True, reverse=reverse, backend=name
        )
        assert state is not None
        assert case.state_weight is not None
        found = torch.autograd.grad((state * case.state_weight).sum(), inputs)
        return dict(
            zip(("gradient of k", "gradient of v", "gradient of log_gate", "gradient of state"), found, strict=True)
        )

    assert_same(gradients(case, backend), gradients(wide, "reference"))


@each_backend
def test_the_state_is_returned_only_where_it_is_asked_for(backend: str) -> None:
    case = make_case(9)
    inputs = (case.q, case.k, case.v, case.log_gate)
    assert gated_linear_attention(*inputs, backend=backend).state is None
    full = gated_linear_attention(*inputs, backend=backend, return_state=True)
    assert full.state is not None
    assert full.state.shape == (2, 2, 5, 7)
    assert torch.equal(full.output, gated_linear_attention(*inputs, backend=backend).output)


@each_backend
@pytest.mark.parametrize("reverse", [False, True])
def test_a_sequence_in_two_parts_with_the_state_handed_on_is_the_whole_sequence(backend: str, reverse: bool) -> None:
    case = make_case(70, gates="strong")
    inputs = (case.q, case.k, case.v, case.log_gate)
    whole = gated_linear_attention(*inputs, return_state=True, reverse=reverse, backend=backend)
    parts = [tuple(x[:, :23] for x in inputs), tuple(x[:, 23:] for x in inputs)]
    outputs, state = [], None
    for part in reversed(parts) if reverse else parts:
        output, state = gated_linear_attention(
            *part, initial_state=state, return_state=True, reverse=reverse, backend=backend
        )
        outputs.append(output)
    assert_close("output", torch.cat(outputs[::-1] if reverse else outputs, dim=1), whole.output, 1e-5)
    assert whole.state is not None
    assert state is not None
    assert_close("state", state, whole.state, 1e-5)


@each_backend
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("gates", ["mild", "strong", "some_-inf"])
@pytest.mark.parametrize("wide_gates", [False, True])
def test_half_inputs_are_computed_in_float32_and_rounded_once(
    backend: str, dtype: torch.dtype, gates: str, wide_gates: bool
) -> None:
    case = make_case(50, gates=gates).to(dtype)
    if wide_gates:
        case = replace(case, log_gate=make_case(50, gates=gates).log_gate)
    actual, exact = results(case, backend), results(case.to(torch.float64), "reference")
    rounding = torch.finfo(dtype).eps / 2
    for name, value in actual.items():
        reference = exact[name]
        is_wide = name in ("state", "gradient of initial_state") or (name == "gradient of log_gate" and wide_gates)
        assert value.dtype == (torch.float32 if is_wide else dtype), name
        allowed = 1e-4 * reference.abs().max() + (0 if is_wide else rounding) * reference.abs()
        if dtype == torch.float16 and not is_wide:
            allowed = allowed + torch.finfo(dtype).smallest_normal * rounding
        assert ((value.double() - reference).abs() <= allowed).all(), name


def _sliced(case: Case) -> Case:
    """q, k and v as views of one tensor that starts at an odd place."""
    joined = torch.cat([torch.zeros_like(case.q[..., :1]), case.q, case.k, case.v], dim=-1)
    _, q, k, v = joined.split([1, case.q.shape[-1], case.k.shape[-1], case.v.shape[-1]], dim=-1)
    return replace(case, q=q, k=k, v=v)


def _head_first(case: Case) -> Case:
    return _each(case, lambda x: x.transpose(1, 2).contiguous().transpose(1, 2))


def _length_last(case: Case) -> Case:
    return _each(case, lambda x: x.movedim(1, -1).contiguous().movedim(-1, 1))


def _every_second(case: Case) -> Case:
    return _each(case, lambda x: x.repeat_interleave(2, dim=-1)[..., ::2])


def _shared_by_heads(case: Case) -> Case:
    return _each(case, lambda x: x[:, :, :1].expand_as(x))


def _shared_by_the_batch(case: Case) -> Case:
    return _each(case, lambda x: x[:1].expand_as(x))


def _each(case: Case, change: Callable[[Tensor], Tensor]) -> Case:
    names = ("q", "k", "v", "log_gate", "output_weight")
    return replace(case, **{name: change(getattr(case, name)) for name in names})


def _transposed_states(case: Case) -> Case:
    assert case.initial_state is not None
    assert case.state_weight is not None
    return replace(
        case,
        initial_state=case.initial_state.transpose(-1, -2).contiguous().transpose(-1, -2),
        state_weight=case.state_weight.transpose(0, 1).contiguous().transpose(0, 1),
    )


@each_backend
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(
    "layout",
    [_sliced, _head_first, _length_last, _every_second, _shared_by_heads, _shared_by_the_batch, _transposed_states],
)
def test_inputs_may_be_strided_in_any_way(backend: str, layout: Callable[[Case], Case], reverse: bool) -> None:
    case = layout(make_case(40, reverse=reverse))
    assert_same(results(case, backend), results(case.to(torch.float64), "reference"))


@each_backend
def test_the_gradient_of_a_sum_arrives_as_one_number_without_strides(backend: str) -> None:
    case = make_case(20, initial_state=False)
    inputs = [x.requires_grad_() for x in (case.q, case.k, case.v, case.log_gate)]
    actual = torch.autograd.grad(gated_linear_attention(*inputs, backend=backend).output.sum(), inputs)
    wide = [x.detach().double().requires_grad_() for x in inputs]
    exact = torch.autograd.grad(gated_linear_attention(*wide, backend="reference").output.sum(), wide)
    for name, a, b in zip(("q", "k", "v", "log_gate"), actual, exact, strict=True):
        assert_close(name, a, b, 1e-4)


@each_backend
def test_inputs_and_the_initial_state_are_left_as_they_were(backend: str) -> None:
    case = make_case(33)
    before = [x.clone() for x in (case.q, case.k, case.v, case.log_gate, case.initial_state) if x is not None]
    results(case, backend)
    after = [x for x in (case.q, case.k, case.v, case.log_gate, case.initial_state) if x is not None]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@each_backend
def test_gates_of_minus_infinity_forget_all_and_get_no_gradient(backend: str) -> None:
    case = make_case(40, gates="open")
    case.log_gate[:, 20] = -torch.inf
    found = results(case, backend)
    later = gated_linear_attention(
        *(x[:, 20:] for x in (case.q, case.k, case.v, case.log_gate.clamp_min(-100))),
        return_state=True,
        backend="reference",
    )
    assert_close("output", found["output"][:, 20:], later.output, 2e-5)
    assert later.state is not None
    assert_close("state", found["state"], later.state, 2e-5)
    assert (found["gradient of log_gate"][:, 20].abs() <= 1e-4).all()
    assert (found["gradient of initial_state"] != 0).any()


@pytest.mark.parametrize("backend", ["chunk", "native"])
@pytest.mark.parametrize("threads", [2, 3])
def test_the_number_of_threads_changes_no_result(backend: str, threads: int) -> None:
    arguments: dict[str, Any] = {"length": 70, "key": 20, "value": 33, "batch": 1, "heads": 1}
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = results(make_case(**arguments), backend)
    finally:
        torch.set_num_threads(before)
    assert_same(found, expected(**arguments))

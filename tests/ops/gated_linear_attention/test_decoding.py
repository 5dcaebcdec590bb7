"""Decoding one token at a time."""

from __future__ import annotations

import pytest
import torch

from headgate.ops import GatedLinearAttentionState, gated_linear_attention
from tests.ops.gated_linear_attention.cases import assert_close, make_case


def test_ten_thousand_steps_equal_the_scan_in_constant_memory() -> None:
    case = make_case(10_000, 4, 6, batch=1)
    case.log_gate[..., 0] *= 2e-3  # remembers for some ten thousand steps
    case.log_gate[..., 1] *= 100
    inputs = (case.q, case.k, case.v, case.log_gate)
    state = GatedLinearAttentionState.empty(1, 2, 4, 6)
    place = state.value.data_ptr()
    steps = torch.stack([state.step(*(x[:, t] for x in inputs)) for t in range(10_000)], dim=1)
    exact = gated_linear_attention(*(x.double() for x in inputs), return_state=True, backend="chunk")
    assert exact.state is not None
    assert_close("output", steps, exact.output, 2e-5)
    assert_close("last thousand", steps[:, -1000:], exact.output[:, -1000:], 2e-5)
    assert_close("state", state.value, exact.state, 2e-5)
    assert state.value.shape == (1, 2, 4, 6)
    assert state.value.data_ptr() == place


@pytest.mark.parametrize("gates", ["strong", "open", "some_-inf"])
def test_decoding_goes_on_where_the_scan_of_a_prompt_stopped(gates: str) -> None:
    case = make_case(40, gates=gates)
    inputs = (case.q, case.k, case.v, case.log_gate)
    whole = gated_linear_attention(*inputs, scale=0.3, return_state=True, backend="reference")
    _, prompt = gated_linear_attention(*(x[:, :25] for x in inputs), scale=0.3, return_state=True)
    assert prompt is not None
    before = prompt.clone()
    state = GatedLinearAttentionState(prompt)
    steps = [state.step(*(x[:, t] for x in inputs), scale=0.3) for t in range(25, 40)]
    assert_close("output", torch.stack(steps, dim=1), whole.output[:, 25:], 1e-5)
    assert whole.state is not None
    assert_close("state", state.value, whole.state, 1e-5)
    assert torch.equal(prompt, before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_step_computes_in_the_dtype_of_the_state_and_answers_in_that_of_the_values(dtype: torch.dtype) -> None:
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    case = make_case(30).to(dtype)
    inputs = (case.q, case.k, case.v, case.log_gate)
    state = GatedLinearAttentionState.empty(2, 2, 5, 7, dtype=wide)
    steps = torch.stack([state.step(*(x[:, t] for x in inputs)) for t in range(30)], dim=1)
    exact = gated_linear_attention(*(x.double() for x in inputs), return_state=True, backend="reference")
    assert steps.dtype == dtype
    assert state.value.dtype == wide
    assert exact.state is not None
    assert_close("state", state.value, exact.state, 1e-12 if wide == torch.float64 else 2e-6)
    assert_close("output", steps, exact.output, torch.finfo(dtype).eps)


def test_a_step_keeps_no_graph() -> None:
    case = make_case(1)
    state = GatedLinearAttentionState.empty(2, 2, 5, 7)
    inputs = [x[:, 0].requires_grad_() for x in (case.q, case.k, case.v, case.log_gate)]
    assert not state.step(*inputs).requires_grad
    assert not state.value.requires_grad


def test_select_orders_repeats_and_drops_sequences_and_copies_them() -> None:
    case = make_case(8, batch=3)
    assert case.initial_state is not None
    state = GatedLinearAttentionState(case.initial_state)
    chosen = state.select(torch.tensor([2, 0, 0, 1]))
    assert torch.equal(chosen.value, case.initial_state[[2, 0, 0, 1]])
    chosen.step(*(torch.ones(4, 2, size) for size in (5, 5, 7)), torch.zeros(4, 2, 5))
    assert torch.equal(state.value, case.initial_state)
    assert not torch.equal(chosen.value[1], state.value[0])
    assert torch.equal(state.select(torch.tensor([True, False, True])).value, case.initial_state[[0, 2]])


def test_a_state_refuses_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match=r"value must have shape \(batch, heads, key, value\), got \(2, 3, 4\)"):
        GatedLinearAttentionState(torch.zeros(2, 3, 4))
    with pytest.raises(TypeError, match=r"value must be float32 or float64, got torch.bfloat16"):
        GatedLinearAttentionState(torch.zeros(1, 1, 1, 1, dtype=torch.bfloat16))
    with pytest.raises(TypeError, match="float16"):
        GatedLinearAttentionState.empty(1, 1, 1, 1, dtype=torch.float16)
    with pytest.raises(ValueError, match="num_heads must be positive, got num_heads=0"):
        GatedLinearAttentionState.empty(1, 0, 1, 1)


def test_a_step_refuses_what_does_not_fit_and_leaves_the_state_as_it_was() -> None:
    case = make_case(1)
    q, k, v, gate = (x[:, 0] for x in (case.q, case.k, case.v, case.log_gate))
    assert case.initial_state is not None
    state = GatedLinearAttentionState(case.initial_state)
    with pytest.raises(ValueError, match=r"q must have shape \(batch, heads, channels\), got \(2, 1, 2, 5\)"):
        state.step(case.q, k, v, gate)
    with pytest.raises(ValueError, match="k must have channels=5"):
        state.step(q, k[..., :4], v, gate)
    with pytest.raises(ValueError, match="v must have channels=7"):
        state.step(q, k, q, gate)
    with pytest.raises(ValueError, match="v must have batch=2"):
        state.step(q, k, v[:1], gate)
    with pytest.raises(ValueError, match="log_gate must hold logarithms"):
        state.step(q, k, v, gate.exp())
    with pytest.raises(TypeError, match=r"v must be floating point, got torch.int64"):
        state.step(q, k, v.long(), gate)
    with pytest.raises(TypeError, match=r"k is torch.float64, but the state is torch.float32"):
        state.step(q, k.double(), v, gate)
    assert torch.equal(state.value, case.initial_state)

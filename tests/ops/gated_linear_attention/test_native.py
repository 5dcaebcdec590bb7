"""What the compiled backend promises beyond equality with the reference."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from headgate.ops import GatedLinearAttentionState, gated_linear_attention
from headgate.ops.gated_linear_attention import native
from tests.ops.gated_linear_attention.cases import relative_error


def _inputs(length: int, key: int, value: int, gate: float, heads: int = 1) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, length, heads, key, generator=generator) for _ in range(2))
    v = torch.randn(1, length, heads, value, generator=generator)
    return q, k, v, torch.full((1, length, heads, key), gate)


@pytest.mark.parametrize("gate", [0.0, -1e-4, -1e-3])
def test_equal_gates_just_below_one_do_not_drift_over_10000_tokens(gate: float) -> None:
    q, k, v, log_gate = _inputs(10_000, 4, 4, gate)
    exact = gated_linear_attention(*(x.double() for x in (q, k, v)), log_gate.double(), return_state=True)
    output, state = gated_linear_attention(q, k, v, log_gate, return_state=True, backend="native")
    assert relative_error(output.double(), exact.output) < 2e-5
    assert relative_error(state.double(), exact.state) < 2e-5
    memory = GatedLinearAttentionState.empty(1, 1, 4, 4)
    for t in range(10_000):
        last = memory.step(q[:, t], k[:, t], v[:, t], log_gate[:, t])
    assert relative_error(last.double(), exact.output[:, -1]) < 2e-5


@pytest.mark.parametrize("threads", [1, 2, 3, 8])
@pytest.mark.parametrize("width", [16, 32, 48, 128, 200])
@pytest.mark.parametrize("items", [1, 3, 4])
def test_blocks_of_columns_cover_the_width_in_whole_tiles(items: int, width: int, threads: int) -> None:
    count, columns = native._blocks(items, width, threads, 16)
    assert columns % 32 == 0
    assert (count - 1) * columns < width <= count * columns


def test_more_threads_than_heads_change_nothing_but_the_cut() -> None:
    inputs = _inputs(70, 64, 128, -0.05)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            leaves = [x.clone().requires_grad_() for x in inputs]
            output, state = gated_linear_attention(*leaves, return_state=True, backend="native")
            (output.sum() + state.square().sum()).backward()
            results.append([output, state, *(leaf.grad for leaf in leaves)])
    finally:
        torch.set_num_threads(before)
    assert native._blocks(1, 128, 1, 16)[0] == 1
    assert native._blocks(1, 128, 2, 16)[0] == 2
    for alone, together in zip(*results, strict=True):
        assert relative_error(together, alone) < 1e-6


@pytest.mark.parametrize("length", [272, 273, 512, 529])
def test_gradients_across_stored_states_equal_those_of_the_reference(length: int) -> None:
    """Blocks of time are 256 tokens here; the last chunk is one of its own."""
    results = []
    for backend in ("reference", "native"):
        leaves = [x.clone().requires_grad_() for x in _inputs(length, 8, 8, -0.01)]
        output, state = gated_linear_attention(*leaves, return_state=True, backend=backend)
        (output.square().sum() + 10 * state.sum()).backward()
        results.append([leaf.grad for leaf in leaves])
    for exact, gradient in zip(*results, strict=True):
        assert relative_error(gradient, exact) < 1e-5


def test_without_use_of_the_final_state_no_state_is_kept_per_token() -> None:
    """What the backward pass allocates for states is one per block of time, not one per token or chunk."""
    assert native._stored_states(length=16, time_block=256) == 0
    assert native._stored_states(length=4096, time_block=256) == 16
    key, value = 64, 128
    job = native._Job(torch.empty(1, 4096, 1, key), torch.empty(1, 4096, 1, value), None, 1.0)
    assert job.time_blocks * key * value <= 4096 * (key + value) / 4


def test_under_autocast_wide_inputs_stay_wide() -> None:
    q, k, v, log_gate = _inputs(40, 16, 16, -0.1)
    narrow = v.bfloat16()
    exact = gated_linear_attention(q, k, narrow.float(), log_gate, return_state=True)
    with torch.autocast("cpu", torch.bfloat16):
        output, state = gated_linear_attention(q, k, narrow, log_gate, return_state=True, backend="native")
    assert output.dtype == torch.bfloat16
    assert relative_error(state, exact.state) < 1e-6

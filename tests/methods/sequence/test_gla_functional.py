"""The recurrence as one function: all modes compute the same, and bad input is refused."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor

from headgate import gla


def inputs(length: int, decay: float = 1.0, *, seed: int = 0, batch: int = 1, heads: int = 2) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)

    def normal(size: int) -> Tensor:
        return torch.randn(batch, length, heads, size, generator=generator, dtype=torch.float64)

    return normal(3), normal(3), normal(5), -decay * normal(3).abs()


def test_three_tokens_by_hand():
    ones = torch.ones(1, 3, 1, 1)
    v = torch.tensor([1.0, 10.0, 100.0]).view(1, 3, 1, 1)
    half = torch.full((1, 3, 1, 1), 0.5).log()
    o, state = gla(2 * ones, ones, v, half, scale=0.5, initial_state=8 * torch.ones(1, 1, 1, 1), return_state=True)
    # S: 8/2 + 1 = 5, 5/2 + 10 = 12.5, 12.5/2 + 100 = 106.25; the factors 2 and 0.5 on the queries cancel.
    torch.testing.assert_close(o.flatten(), torch.tensor([5.0, 12.5, 106.25]))
    assert state is not None
    assert state.item() == pytest.approx(106.25)


@pytest.mark.parametrize("decay", [0.001, 1.0, 20.0])
@pytest.mark.parametrize("length", [1, 17, 64])
def test_every_mode_and_chunk_size_gives_the_recurrence(length: int, decay: float):
    q, k, v, gk = inputs(length, decay)
    initial = torch.randn(1, 2, 3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    expected = gla(q, k, v, gk, initial_state=initial, return_state=True, mode="recurrent")
    options: list[dict[str, Any]] = [{"mode": "auto"}, {"mode": "parallel"}]
    options += [{"mode": "chunk", "chunk_size": size, "subchunk_size": min(16, size)} for size in (1, 16, 64)]
    for option in options:
        actual = gla(q, k, v, gk, initial_state=initial, return_state=True, **option)
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-10)


def test_reverse_reads_the_sequence_from_its_end():
    q, k, v, gk = inputs(9)
    forward = gla(*(x.flip(1) for x in (q, k, v, gk)), return_state=True)
    backward = gla(q, k, v, gk, reverse=True, return_state=True)
    torch.testing.assert_close(backward.output.flip(1), forward.output)
    torch.testing.assert_close(backward.state, forward.state)


def test_packed_sequences_do_not_see_each_other():
    q, k, v, gk = inputs(9)
    packed = gla(q, k, v, gk, cu_seqlens=torch.tensor([0, 4, 9]), return_state=True)
    first, second = (
        gla(*(x[:, part] for x in (q, k, v, gk)), return_state=True) for part in (slice(0, 4), slice(4, 9))
    )
    torch.testing.assert_close(packed.output, torch.cat([first.output, second.output], dim=1))
    assert packed.state is not None
    assert first.state is not None
    assert second.state is not None
    torch.testing.assert_close(packed.state, torch.cat([first.state, second.state]))


def test_no_state_comes_back_unless_it_is_asked_for():
    assert gla(*inputs(3)).state is None


def bad(**changed: Any) -> dict[str, Any]:
    q, k, v, gk = (x.float() for x in inputs(6))
    return {"q": q, "k": k, "v": v, "gk": gk, **changed}


BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "gates in place of their logarithms": (bad(gk=bad()["gk"].exp()), ValueError, "logarithms of gates"),
    "keys of another size": (bad(k=torch.zeros(1, 6, 2, 4)), ValueError, "k must have channels=3"),
    "gates of another length": (bad(gk=torch.zeros(1, 5, 2, 3)), ValueError, "log_gate must have length=6"),
    "no tokens": ({name: x[:, :0] for name, x in bad().items()}, ValueError, "at least one entry along length"),
    "a state in bfloat16": (
        bad(initial_state=torch.zeros(1, 2, 3, 5, dtype=torch.bfloat16)), TypeError, "initial_state must be torch.float32"
    ),
    "one state for two sequences": (
        bad(initial_state=torch.zeros(1, 2, 3, 5), cu_seqlens=torch.tensor([0, 2, 6])),
        ValueError,
        "one state per sequence (2), got 1",
    ),
    "boundaries in a batch of two": (
        {**{name: torch.cat([x, x]) for name, x in bad().items()}, "cu_seqlens": torch.tensor([0, 6])},
        ValueError,
        "batch must be 1, got batch=2",
    ),
    "boundaries that end too early": (bad(cu_seqlens=torch.tensor([0, 5])), ValueError, "rise from 0 to the length 6"),
    "an unknown mode": (bad(mode="fused_chunk"), ValueError, "mode must be one of auto, chunk, recurrent, parallel"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused_by_name(name: str):
    arguments, error, message = BAD[name]
    with pytest.raises(error, match=re.escape(message)):
        gla(**arguments)


def test_gates_of_minus_infinity_forget_everything():
    q, k, v, gk = (x.float() for x in inputs(5))
    o, _ = gla(q, k, v, torch.full_like(gk, -torch.inf))
    own = torch.einsum("bthk,bthk->bth", q, k)[..., None] * v * 3**-0.5
    torch.testing.assert_close(o, own)

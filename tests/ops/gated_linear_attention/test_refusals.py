"""What does not fit is refused at once, by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from headgate.ops import (
    bidirectional_gated_linear_attention,
    gated_linear_attention,
    gated_linear_attention_backends,
)
from tests.ops.gated_linear_attention.cases import BACKENDS

each_backend = pytest.mark.parametrize("backend", ["auto", "reference", *BACKENDS])


def arguments(batch: int = 2, length: int = 6, **changes: Any) -> dict[str, Any]:
    token = torch.ones(batch, length, 2, 3)
    return {"q": token, "k": token, "v": torch.ones(batch, length, 2, 4), "log_gate": -token, **changes}


def ones(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.ones(shape, dtype=dtype)


REFUSALS: dict[str, tuple[Callable[[], dict[str, Any]], type[Exception], str]] = {
    "gate above one": (
        lambda: arguments(log_gate=0.9 * ones(2, 6, 2, 3)),
        ValueError,
        r"log_gate must hold logarithms of gates in \(0, 1\], so be at most 0; got 0.9 \(pass log\(gate\)",
    ),
    "q without heads": (
        lambda: arguments(q=ones(2, 6, 6)),
        ValueError,
        r"q must have shape \(batch, length, heads, channels\)",
    ),
    "k of other length": (lambda: arguments(k=ones(2, 5, 2, 3)), ValueError, "k must have length=6"),
    "k of other key size": (lambda: arguments(k=ones(2, 6, 2, 4)), ValueError, "k must have channels=3"),
    "v of other batch": (lambda: arguments(v=ones(1, 6, 2, 4)), ValueError, "v must have batch=2"),
    "v of other heads": (lambda: arguments(v=ones(2, 6, 1, 4)), ValueError, "v must have heads=2"),
    "gate per value": (lambda: arguments(log_gate=-ones(2, 6, 2, 4)), ValueError, "log_gate must have channels=3"),
    "gate per head": (lambda: arguments(log_gate=-ones(2, 6, 2)), ValueError, "log_gate must have shape"),
    "no tokens": (lambda: arguments(length=0), ValueError, "at least one entry along length"),
    "no value channels": (lambda: arguments(v=ones(2, 6, 2, 0)), ValueError, "at least one entry along value channels"),
    "integers": (
        lambda: arguments(q=ones(2, 6, 2, 3, dtype=torch.int64)),
        TypeError,
        "q must be floating point, got torch.int64",
    ),
    "no tensor": (lambda: arguments(v=[1.0]), TypeError, "v must be a tensor"),
    "integer gates": (
        lambda: arguments(log_gate=-ones(2, 6, 2, 3, dtype=torch.int32)),
        TypeError,
        "log_gate must be floating point, got torch.int32",
    ),
    "mixed dtypes": (
        lambda: arguments(v=ones(2, 6, 2, 4, dtype=torch.bfloat16)),
        TypeError,
        "q, k and v must share one dtype, got torch.float32, torch.float32 and torch.bfloat16",
    ),
}

STATE_REFUSALS: dict[str, tuple[Callable[[], dict[str, Any]], type[Exception], str]] = {
    "state in bfloat16": (
        lambda: arguments(initial_state=ones(2, 2, 3, 4, dtype=torch.bfloat16)),
        TypeError,
        "initial_state must be torch.float32, got torch.bfloat16",
    ),
    "state in float64": (
        lambda: arguments(initial_state=ones(2, 2, 3, 4, dtype=torch.float64)),
        TypeError,
        "initial_state must be torch.float32, got torch.float64",
    ),
    "state transposed": (
        lambda: arguments(initial_state=ones(2, 2, 4, 3)),
        ValueError,
        "initial_state must have key=3",
    ),
    "states too few": (
        lambda: arguments(initial_state=ones(1, 2, 3, 4)),
        ValueError,
        r"initial_state must hold one state per sequence \(2\), got 1",
    ),
    "states as many as rows, not sequences": (
        lambda: arguments(1, initial_state=ones(1, 2, 3, 4), cu_seqlens=torch.tensor([0, 2, 6])),
        ValueError,
        r"one state per sequence \(2\), got 1",
    ),
}

BOUND_REFUSALS: dict[str, tuple[Callable[[], dict[str, Any]], type[Exception], str]] = {
    "packed in two rows": (
        lambda: arguments(cu_seqlens=torch.tensor([0, 6])),
        ValueError,
        "batch must be 1, got batch=2",
    ),
    "end short of the length": (
        lambda: arguments(1, cu_seqlens=torch.tensor([0, 2, 5])),
        ValueError,
        r"cu_seqlens must rise from 0 to the length 6, got \[0, 2, 5\]",
    ),
    "start after zero": (lambda: arguments(1, cu_seqlens=torch.tensor([1, 6])), ValueError, "rise from 0"),
    "falling": (lambda: arguments(1, cu_seqlens=torch.tensor([0, 4, 2, 6])), ValueError, "rise from 0"),
    "one boundary": (lambda: arguments(1, cu_seqlens=torch.tensor([0])), ValueError, "at least two boundaries"),
    "floating boundaries": (
        lambda: arguments(1, cu_seqlens=torch.tensor([0.0, 6.0])),
        TypeError,
        "cu_seqlens must be int64 or int32",
    ),
    "boundaries as a matrix": (
        lambda: arguments(1, cu_seqlens=torch.tensor([[0, 6]])),
        ValueError,
        "cu_seqlens must have shape",
    ),
}


@each_backend
@pytest.mark.parametrize("name", [*REFUSALS, *STATE_REFUSALS, *BOUND_REFUSALS])
def test_the_scan_refuses(name: str, backend: str) -> None:
    make, error, message = (REFUSALS | STATE_REFUSALS | BOUND_REFUSALS)[name]
    with pytest.raises(error, match=message):
        gated_linear_attention(**make(), backend=backend)


@pytest.mark.parametrize("side", ["forward", "backward"])
@pytest.mark.parametrize("name", [*REFUSALS, *BOUND_REFUSALS])
def test_the_two_way_op_refuses_the_same_for_either_gate(name: str, side: str) -> None:
    make, error, message = (REFUSALS | BOUND_REFUSALS)[name]
    given = make()
    gates = {"log_gate_forward": torch.zeros(given["k"].shape), "log_gate_backward": torch.zeros(given["k"].shape)}
    if not name.startswith("k of"):
        gates[f"log_gate_{side}"] = given["log_gate"]
    del given["log_gate"]
    with pytest.raises(error, match=message.replace("log_gate", f"log_gate_{side}")):
        bidirectional_gated_linear_attention(**given, **gates)


@pytest.mark.parametrize("name", ["chunk_size", "subchunk_size"])
@pytest.mark.parametrize("size", [0, -4])
def test_chunks_without_tokens_are_refused(name: str, size: int) -> None:
    with pytest.raises(ValueError, match=f"{name} must be positive, got {name}={size}"):
        gated_linear_attention(**arguments(), backend="chunk", **{name: size})


def test_an_unknown_backend_is_refused_with_the_known_ones() -> None:
    message = "backend must be 'auto' or one of 'reference', 'parallel', 'chunk', 'native', 'triton', got 'cuda'"
    with pytest.raises(ValueError, match=message):
        gated_linear_attention(**arguments(), backend="cuda")


def test_a_backend_that_cannot_run_here_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    reasons = gated_linear_attention_backends("cpu")
    assert reasons["triton"]
    assert [name for name, reason in reasons.items() if not reason] == ["reference", "parallel", "chunk", "native"]
    with pytest.raises(ValueError, match="backend 'triton' cannot run here: "):
        gated_linear_attention(**arguments(), backend="triton")
    assert gated_linear_attention_backends("cuda")["native"] == "runs on the CPU only, not on cuda"


def test_gates_of_zero_and_minus_infinity_are_let_through() -> None:
    gate = torch.zeros(1, 2, 1, 1)
    gate[:, 1] = -torch.inf
    output = gated_linear_attention(*(torch.ones(1, 2, 1, 1) for _ in range(3)), gate).output
    assert output.flatten().tolist() == [1.0, 1.0]

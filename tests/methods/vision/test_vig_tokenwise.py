"""Functions of single tokens in blocks: when they are cut, and that nobody can tell from the result."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from headgate.methods.vision.vig import BidirectionalGLA
from headgate.methods.vision.vig.feed_forward import SwiGLU
from headgate.methods.vision.vig.tokenwise import map_tokens


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("headgate.methods.vision.vig.tokenwise._TOKENS_AT_ONCE", 7)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)


def lengths_seen(x: Tensor, layer: nn.Module | None = None) -> list[int]:
    """How many tokens each call of the function got."""
    layer = nn.Linear(4, 4, dtype=x.dtype) if layer is None else layer
    seen = []

    def function(part: Tensor) -> Tensor:
        seen.append(part.shape[0] * part.shape[1])
        return part

    torch.testing.assert_close(map_tokens(layer, function, 4, x), x)
    return seen


def test_inference_cuts_all_tokens_of_a_batch_into_blocks() -> None:
    with torch.no_grad():
        assert lengths_seen(torch.randn(2, 9, 4)) == [7, 7, 4]
        assert lengths_seen(torch.randn(1, 4, 9).mT) == [7, 2]
        assert lengths_seen(torch.randn(1, 7, 4)) == [7]


def test_where_gradients_are_recorded_there_is_one_call() -> None:
    assert lengths_seen(torch.randn(2, 9, 4)) == [18]


def test_narrow_dtypes_and_autocast_take_one_call() -> None:
    with torch.no_grad():
        assert lengths_seen(torch.randn(2, 9, 4).bfloat16()) == [18]
        with torch.autocast("cpu", torch.bfloat16):
            assert lengths_seen(torch.randn(2, 9, 4)) == [18]


def build(kind: str) -> tuple[nn.Module, tuple[Any, ...]]:
    x = torch.randn(2, 12, 12, dtype=torch.float64)
    if kind == "mixer":
        return BidirectionalGLA(12, conv_act="silu", out_act="silu").double(), (x, (3, 4))
    if kind == "mixer without locality":
        return BidirectionalGLA(12, locality=False, expand_v=0.5).double(), (x, (3, 4))
    return SwiGLU(12, 5).double(), (x,)


@pytest.mark.parametrize("kind", ["mixer", "mixer without locality", "mlp"])
def test_blocks_give_what_one_call_gives(kind: str) -> None:
    module, inputs = build(kind)
    with torch.no_grad():
        blocks = module(*inputs)
    torch.testing.assert_close(blocks, module(*inputs))


@pytest.mark.parametrize("part", ["mix", "log_gate", "conv", "output"])
def test_a_hook_sees_all_tokens(part: str) -> None:
    layer, inputs = build("mixer")
    seen = []
    handle = layer.get_submodule(part).register_forward_hook(
        lambda module, args, output: seen.append(output.shape[0] * output.shape[1:-1].numel())
    )
    with torch.no_grad():
        hooked = layer(*inputs)
        assert seen == [24]
        handle.remove()
        torch.testing.assert_close(layer(*inputs), hooked)

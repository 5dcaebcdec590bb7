"""Attention against its formula written out with loops."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from headgate.nn import MultiHeadAttention, SlidingWindowAttention

DIM = 12


def by_hand(layer: nn.Module, x: Tensor, heads: int, sees: Tensor) -> Tensor:
    """Softmax attention, query by query; ``sees[i, j]``: whether token i may look at token j."""
    q, k, v = layer.qkv(x).chunk(3, dim=-1)
    size = DIM // heads
    y = torch.zeros_like(x)
    for entry in range(x.shape[0]):
        for head in range(heads):
            part = slice(head * size, (head + 1) * size)
            for i in range(x.shape[1]):
                keys = sees[i].nonzero().flatten()
                weights = torch.softmax(k[entry, keys, part] @ q[entry, i, part] / size**0.5, dim=0)
                y[entry, i, part] = weights @ v[entry, keys, part]
    return layer.out_proj(y)


def steps(length: int) -> Tensor:
    """``steps[i, j]``: how far j lies behind i."""
    return torch.arange(length)[:, None] - torch.arange(length)


@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("causal", [False, True])
def test_attention_is_its_formula(heads: int, causal: bool) -> None:
    torch.manual_seed(0)
    layer = MultiHeadAttention(DIM, heads, causal=causal).double()
    x = torch.randn(2, 7, DIM, dtype=torch.float64)
    sees = steps(7) >= 0 if causal else torch.ones(7, 7, dtype=torch.bool)
    torch.testing.assert_close(layer(x), by_hand(layer, x, heads, sees))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("length", "window"), [(1, 1), (7, 1), (7, 3), (8, 4), (9, 4), (9, 8), (9, 9), (5, 40)])
def test_a_window_sees_the_own_token_and_so_many_to_a_side(length: int, window: int, causal: bool) -> None:
    torch.manual_seed(0)
    layer = SlidingWindowAttention(DIM, window, 2, causal=causal).double()
    x = torch.randn(2, length, DIM, dtype=torch.float64)
    distance = steps(length)
    sees = (distance >= 0) & (distance <= window) if causal else distance.abs() <= window
    torch.testing.assert_close(layer(x), by_hand(layer, x, 2, sees))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_chosen_queries_give_the_rows_of_full_attention(causal: bool, bias: bool) -> None:
    torch.manual_seed(0)
    layer = MultiHeadAttention(DIM, 2, causal=causal, bias=bias).double()
    x = torch.randn(3, 9, DIM, dtype=torch.float64)
    chosen = torch.tensor([[0, 8], [5, 5], [7, 2]])
    expected = layer(x).gather(1, chosen[..., None].expand(-1, -1, DIM))
    torch.testing.assert_close(layer(x, chosen), expected)
    assert layer(x, chosen[:, :0]).shape == (3, 0, DIM)


def test_dropout_acts_on_the_weights_in_training_alone() -> None:
    torch.manual_seed(0)
    layer = MultiHeadAttention(DIM, causal=True, dropout=0.5)
    x = torch.randn(2, 9, DIM)
    assert not torch.allclose(layer(x), layer(x))
    assert torch.equal(layer.eval()(x), layer(x))
    # With a value that is the same everywhere, dropped weights show as multiples of 1/(1 - rate) of single weights.
    nn.init.zeros_(layer.qkv.weight)
    nn.init.ones_(layer.qkv.bias)
    nn.init.eye_(layer.out_proj.weight)
    nn.init.zeros_(layer.out_proj.bias)
    first = layer.train()(torch.randn(200, 1, DIM))[:, 0, 0]
    assert set(first.tolist()) == {0.0, 2.0}


def test_state_sizes_are_those_of_the_published_table() -> None:
    assert MultiHeadAttention(DIM, 3).state_size(50) == 2 * 50 * DIM
    assert SlidingWindowAttention(DIM, 7).state_size(50) == 2 * 7 * DIM


@pytest.mark.parametrize("layer", [MultiHeadAttention(DIM), SlidingWindowAttention(DIM, 3)])
def test_a_wrong_shape_or_dtype_is_refused(layer: nn.Module) -> None:
    with pytest.raises(ValueError, match="dim=12"):
        layer(torch.zeros(2, 5, DIM + 1))
    with pytest.raises(ValueError, match="x must have shape"):
        layer(torch.zeros(5, DIM))
    with pytest.raises(TypeError, match="floating"):
        layer(torch.zeros(2, 5, DIM, dtype=torch.int64))


def test_wrong_options_are_refused() -> None:
    with pytest.raises(ValueError, match="num_heads must divide dim, got dim=12, num_heads=5"):
        MultiHeadAttention(DIM, 5)
    with pytest.raises(ValueError, match="window must be positive"):
        SlidingWindowAttention(DIM, 0)
    with pytest.raises(ValueError, match="dropout"):
        MultiHeadAttention(DIM, dropout=1.5)
    with pytest.raises(ValueError, match="query_positions must have batch=2"):
        MultiHeadAttention(DIM)(torch.zeros(2, 5, DIM), torch.zeros(3, 1, dtype=torch.int64))

"""The low-rank gate is its formula, term by term."""

from __future__ import annotations

import math

import pytest
import torch

from headgate.nn import LowRankLogGate


def make_gate(**options: float) -> LowRankLogGate:
    torch.manual_seed(0)
    return LowRankLogGate(6, 8, 3, **options).double()


def test_it_is_the_log_of_the_sigmoid_to_the_power_of_one_over_the_normalizer() -> None:
    layer = make_gate(normalizer=4.0)
    x = torch.randn(2, 5, 6, dtype=torch.float64)
    logits = x @ layer.down.weight.T @ layer.up.weight.T + layer.up.bias
    torch.testing.assert_close(layer(x).exp(), torch.sigmoid(logits) ** 0.25)
    assert layer.down.bias is None


def test_a_layer_of_zeros_gives_the_root_of_one_half() -> None:
    layer = LowRankLogGate(6, 8)
    for parameter in layer.parameters():
        torch.nn.init.zeros_(parameter)
    expected = torch.full((1, 2, 8), -math.log(2) / 16)
    torch.testing.assert_close(layer(torch.randn(1, 2, 6)), expected)


def test_it_has_the_parameters_of_two_narrow_matrices_and_a_bias() -> None:
    layer = LowRankLogGate(1024, 512)
    assert {name: tuple(p.shape) for name, p in layer.named_parameters()} == {
        "down.weight": (16, 1024),
        "up.weight": (512, 16),
        "up.bias": (512,),
    }


@pytest.mark.parametrize("normalizer", [0.5, 1.0, 16.0])
def test_the_normalizer_divides_the_logarithm(normalizer: float) -> None:
    x = torch.randn(1, 7, 6, dtype=torch.float64)
    torch.testing.assert_close(make_gate(normalizer=normalizer)(x) * normalizer, make_gate(normalizer=1.0)(x))


def test_clamp_min_lets_nothing_smaller_through_and_leaves_the_rest() -> None:
    x = 20 * torch.randn(3, 9, 6, dtype=torch.float64)
    free, clamped = make_gate(normalizer=1.0)(x), make_gate(normalizer=1.0, clamp_min=-0.7)(x)
    assert (free < -0.7).any()
    assert (free > -0.7).any()
    assert torch.equal(clamped, free.clamp_min(-0.7))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_logarithm_is_taken_in_float32_where_the_weights_are_narrower(dtype: torch.dtype) -> None:
    layer = make_gate(normalizer=16.0).to(dtype)
    with torch.no_grad():
        layer.up.bias.fill_(9.0)  # a gate so near one that it would round to it: logsigmoid(9) is -1.2e-4
        layer.up.weight.zero_()
    log_gate = layer(torch.randn(1, 2, 6, dtype=dtype))
    assert log_gate.dtype == torch.float32
    expected = torch.full((1, 2, 8), -math.log1p(math.exp(-9)) / 16)
    torch.testing.assert_close(log_gate, expected, rtol=1e-5, atol=0)


def test_under_autocast_the_result_is_float32() -> None:
    layer = make_gate().float()
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(torch.randn(1, 2, 6)).dtype == torch.float32


@pytest.mark.parametrize("logit", [-1e4, 1e4])
def test_extreme_logits_give_finite_gates_at_most_zero(logit: float) -> None:
    layer = make_gate(normalizer=1.0).float()
    with torch.no_grad():
        layer.up.weight.zero_()
        layer.up.bias.fill_(logit)
    x = torch.randn(1, 2, 6, requires_grad=True)
    log_gate = layer(x)
    assert log_gate.isfinite().all()
    torch.testing.assert_close(log_gate, torch.full_like(log_gate, min(logit, 0.0)))
    log_gate.sum().backward()
    assert layer.up.bias.grad is not None
    torch.testing.assert_close(layer.up.bias.grad, torch.full((8,), 2.0 if logit < 0 else 0.0))


def test_what_does_not_fit_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="normalizer must be positive, got normalizer=0"):
        LowRankLogGate(6, 8, normalizer=0)
    with pytest.raises(ValueError, match="rank must be positive, got rank=0"):
        LowRankLogGate(6, 8, 0)
    with pytest.raises(ValueError, match="gate_dim must be positive"):
        LowRankLogGate(6, -1)
    for limit in (0.0, 0.1):
        with pytest.raises(
            ValueError, match=f"clamp_min must be below zero, the logarithm of an open gate, got {limit}"
        ):
            LowRankLogGate(6, 8, clamp_min=limit)
    layer = LowRankLogGate(6, 8)
    with pytest.raises(ValueError, match="x must have dim=6"):
        layer(torch.zeros(1, 2, 5))
    with pytest.raises(ValueError, match=r"x must have shape \(batch, length, dim\)"):
        layer(torch.zeros(2, 6))
    with pytest.raises(TypeError, match=r"x must have the module's dtype torch.float32, got torch.float64"):
        layer(torch.zeros(1, 2, 6, dtype=torch.float64))
    with pytest.raises(TypeError, match=r"x must be floating point, got torch.int64"):
        layer(torch.zeros(1, 2, 6, dtype=torch.int64))

"""BiGLA: every equation against a slow reference, its symmetries, its options, bad input."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from headgate.methods.vision.vig import BidirectionalGLA, gla_bidirectional
from headgate.methods.vision.vig.positions import rotate


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def make(seed: int = 0, **options: Any) -> BidirectionalGLA:
    """A layer of 12 channels and 3 heads in float64 with weights of order one, so that no part hides in ε."""
    layer = BidirectionalGLA(12, 3, **options).double()
    with torch.no_grad():
        for index, parameter in enumerate(layer.parameters()):
            parameter.copy_(normal(*parameter.shape, seed=seed + index) / math.sqrt(parameter[0].numel()))
            if parameter.dim() == 1:
                parameter.add_(1)
    return layer


def convolve(x: Tensor, weight: Tensor) -> Tensor:
    """Depthwise 3×3 over ``x`` (rows, columns, channels), zeros around it."""
    rows, columns, _ = x.shape
    y = torch.zeros_like(x)
    for i in range(rows):
        for j in range(columns):
            for di in (-1, 0, 1):
                for dj in (-1, 0, 1):
                    if 0 <= i + di < rows and 0 <= j + dj < columns:
                        y[i, j] += weight[:, 0, di + 1, dj + 1] * x[i + di, j + dj]
    return y


def scan(q: Tensor, k: Tensor, v: Tensor, log_gate: Tensor, backwards: bool) -> Tensor:
    """The recurrence of one head over (tokens, channels)."""
    state = torch.zeros(k.shape[1], v.shape[1], dtype=q.dtype)
    o = torch.zeros_like(v)
    for t in reversed(range(len(q))) if backwards else range(len(q)):
        state = log_gate[t].exp()[:, None] * state + torch.outer(k[t], v[t])
        o[t] = q[t] @ state / math.sqrt(q.shape[1])
    return o


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def silu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(x)


def reference(layer: BidirectionalGLA, x: Tensor, grid: tuple[int, int], clamp: float | None = None) -> Tensor:
    """One image ``(tokens, 12)``, equation by equation."""
    local = convolve(x.view(*grid, -1), layer.conv.weight).flatten(0, 1)
    local = silu(local) if layer.conv_act else local
    q, k, v = (local @ layer.qkv.weight.T).split((6, 6, 12), dim=1)
    logits = local @ layer.log_gate.down.weight.T @ layer.log_gate.up.weight.T + layer.log_gate.up.bias
    gates = torch.log(torch.sigmoid(logits)) / 16
    gates = gates if clamp is None else gates.clamp(min=clamp)
    mix = torch.sigmoid(local @ layer.mix.weight.T + layer.mix.bias)
    heads = []
    for head in range(3):
        key, value = slice(2 * head, 2 * head + 2), slice(4 * head, 4 * head + 4)
        forward, backward = gates[:, :6][:, key], gates[:, 6:][:, key]
        o = scan(q[:, key], k[:, key], v[:, value], forward, backwards=False)
        o = (o + scan(q[:, key], k[:, key], v[:, value], backward, backwards=True)) / 2
        o = rms_norm(o, layer.global_norm_weight, 1e-6)
        near = rms_norm(local[:, value], layer.local_norm_weight, 1e-6)
        heads.append(mix[:, value] * o + (1 - mix[:, value]) * near)
    y = torch.cat(heads, dim=1)
    return (silu(y) if layer.out_act else y) @ layer.output.weight.T


@pytest.mark.parametrize(
    "options", [{}, {"conv_act": "silu", "out_act": "silu"}, {"clamp_min": -0.04}], ids=["plain", "tiny", "clamp"]
)
@pytest.mark.parametrize("grid", [(3, 5), (1, 7), (6, 1)], ids=str)
def test_layer_computes_the_equations_on_any_grid(options: dict[str, Any], grid: tuple[int, int]) -> None:
    layer = make(**options)
    x = normal(2, grid[0] * grid[1], 12)
    y = layer(x, grid)
    for image in range(2):
        expected = reference(layer, x[image], grid, options.get("clamp_min"))
        torch.testing.assert_close(y[image], expected, rtol=1e-8, atol=1e-8)


def test_clamp_lets_no_gate_below_it_through() -> None:
    gates = make(clamp_min=-0.04).log_gate(normal(1, 50, 12))
    assert float(gates.detach().min()) == -0.04
    assert float(make().log_gate(normal(1, 50, 12)).detach().min()) < -0.05


def swap_gate_halves(layer: BidirectionalGLA) -> BidirectionalGLA:
    """The same weights with the two directions' gates exchanged."""
    swapped = make(locality=False)
    swapped.load_state_dict(layer.state_dict())
    with torch.no_grad():
        for parameter in (swapped.log_gate.up.weight, swapped.log_gate.up.bias):
            parameter.copy_(parameter.roll(len(parameter) // 2, dims=0))
    return swapped


def test_flipping_the_tokens_and_swapping_the_gates_flips_the_output() -> None:
    layer, x = make(locality=False), normal(2, 12, 12)
    y = layer(x, (3, 4))
    torch.testing.assert_close(swap_gate_halves(layer)(x.flip(1), (3, 4)), y.flip(1))
    assert not torch.allclose(layer(x.flip(1), (3, 4)), y.flip(1), atol=1e-3)


def test_with_a_shared_gate_flipping_the_tokens_flips_the_output() -> None:
    layer, x = make(locality=False, direction_gates=False), normal(2, 12, 12)
    torch.testing.assert_close(layer(x.flip(1), (3, 4)), layer(x, (3, 4)).flip(1))


def test_a_shared_gate_is_one_gate_in_both_directions() -> None:
    shared, separate = make(direction_gates=False), make()
    state = shared.state_dict()
    for name in ("log_gate.up.weight", "log_gate.up.bias"):
        state[name] = torch.cat([state[name], state[name]])
    separate.load_state_dict(state)
    x = normal(2, 12, 12)
    torch.testing.assert_close(shared(x, (3, 4)), separate(x, (3, 4)))


def test_forward_only_sees_no_later_token() -> None:
    layer = make(locality=False, bidirectional=False)
    x = normal(1, 12, 12)
    changed = x.clone()
    changed[:, 7:] += 1
    difference = (layer(changed, (3, 4)) - layer(x, (3, 4))).abs().amax(dim=(0, 2))
    assert float(difference[:7].detach().max()) == 0
    assert float(difference[7:].detach().min()) > 1e-4


def test_two_directions_see_every_token() -> None:
    x = normal(1, 12, 12).requires_grad_()
    for token in (0, 11):
        (grad,) = torch.autograd.grad(make(locality=False)(x, (3, 4))[0, token].sum(), x)
        assert (grad.abs().amax(2) > 1e-8).all()


def test_forward_only_is_the_forward_scan_alone() -> None:
    forward, both = make(bidirectional=False), make()
    state = both.state_dict()
    for name in ("log_gate.up.weight", "log_gate.up.bias"):
        state[name] = state[name][:6]
    forward.load_state_dict(state)
    with torch.no_grad():
        both.log_gate.up.bias[6:] = -1e5  # a backward gate that forgets everything at once
    # Then the backward scan is a token's own write alone, (q·k) v, and o = (forward + own) / 2.
    x = normal(1, 12, 12)
    local = both.conv(x.unflatten(1, (3, 4))).flatten(1, 2)
    q, k, v = (both._heads(part) for part in both.qkv(local).split((6, 6, 12), dim=-1))
    own = ((q * k).sum(-1, keepdim=True) * v / math.sqrt(2)).flatten(2)
    torch.testing.assert_close(2 * both._scan(local, (3, 4)) - own, forward._scan(local, (3, 4)))


def test_without_locality_the_grid_does_not_matter_and_the_global_branch_is_alone() -> None:
    layer, x = make(locality=False), normal(2, 12, 12)
    y = layer(x, (3, 4))
    torch.testing.assert_close(layer(x, (2, 6)), y)
    o = rms_norm(layer._scan(x, (3, 4)).unflatten(-1, (3, 4)), layer.global_norm_weight, 1e-6).flatten(2)
    torch.testing.assert_close(y, layer.output(torch.sigmoid(layer.mix(x)) * o))
    assert not torch.allclose(make()(x, (3, 4)), make()(x, (2, 6)), atol=1e-3)


@pytest.mark.parametrize(
    ("options", "gates"), [({}, 2), ({"direction_gates": False}, 1), ({"bidirectional": False}, 1)], ids=str
)
def test_parameters_are_counted_by_the_formula(options: dict[str, bool], gates: int) -> None:
    dim = 24
    count = sum(parameter.numel() for parameter in BidirectionalGLA(dim, 3, **options).parameters())
    gate = 16 * dim + gates * (16 * dim // 2 + dim // 2)
    assert count == 9 * dim + 2 * dim**2 + gate + (dim**2 + dim) + dim**2 + 2 * dim // 3


def test_values_may_be_wider_without_locality() -> None:
    assert make(locality=False, expand_v=2.0, expand_k=1.0)(normal(1, 6, 12), (2, 3)).shape == (1, 6, 12)


def test_official_halving_acts_in_evaluation_alone_and_is_a_fourfold_epsilon() -> None:
    layer, halving, x = make(), make(official_eval_halving=True), normal(2, 12, 12) * 0.03
    torch.testing.assert_close(halving.train()(x, (3, 4)), layer(x, (3, 4)), rtol=0, atol=0)
    assert not torch.allclose(halving.eval()(x, (3, 4)), layer.eval()(x, (3, 4)), rtol=1e-3)
    global_only = make(locality=False, official_eval_halving=True).eval()
    torch.testing.assert_close(global_only(x, (3, 4)), make(locality=False, norm_eps=4e-6)(x, (3, 4)))


@pytest.mark.parametrize("out_act", [None, "silu"])
def test_inference_gives_what_training_gives_at_every_width(out_act: Any) -> None:
    for dim, heads in ((12, 3), (96, 3)):
        layer = BidirectionalGLA(dim, heads, conv_act="silu", out_act=out_act).double()
        x = normal(2, 35, dim)
        with torch.no_grad():
            inference = layer(x, (5, 7))
        torch.testing.assert_close(inference, layer(x, (5, 7)))


def test_gradients_are_those_of_finite_differences() -> None:
    layer = make(conv_act="silu", out_act="silu")
    x = normal(1, 6, 12).requires_grad_()
    assert torch.autograd.gradcheck(lambda tokens: layer(tokens, (2, 3)), (x,), atol=1e-5)


def test_a_fresh_layer_starts_xavier_uniform_with_a_small_gain() -> None:
    layer = BidirectionalGLA(192)
    fans = {
        "conv.weight": 9 + 9 * 192,
        "qkv.weight": 192 + 384,
        "log_gate.down.weight": 192 + 16,
        "log_gate.up.weight": 16 + 192,
        "mix.weight": 192 + 192,
        "output.weight": 192 + 192,
    }
    for name, fan in fans.items():
        weight, bound = layer.get_parameter(name).detach(), 2**-2.5 * math.sqrt(6 / fan)
        assert float(weight.abs().max()) <= bound
        assert float(weight.std()) == pytest.approx(bound / math.sqrt(3), rel=0.05)
    for bias in (layer.log_gate.up.bias, layer.mix.bias):
        assert not bias.any()


def test_functional_form_is_the_mean_of_two_scans() -> None:
    q, k, v = normal(1, 7, 2, 3), normal(1, 7, 2, 3, seed=1), normal(1, 7, 2, 4, seed=2)
    forward, backward = (-normal(1, 7, 2, 3, seed=seed).abs() for seed in (3, 4))
    o = gla_bidirectional(q, k, v, forward, backward)
    for head in range(2):
        heads = [x[0, :, head] for x in (q, k, v)]
        expected = scan(*heads, forward[0, :, head], backwards=False) + scan(
            *heads, backward[0, :, head], backwards=True
        )
        torch.testing.assert_close(o[0, :, head], expected / 2)


def test_axial_rotation_turns_pairs_by_column_and_row() -> None:
    rows, columns, key = 3, 5, 8
    x = normal(2, rows * columns, 2, key)
    y = torch.view_as_complex(rotate(x, (rows, columns), "2d").unflatten(-1, (key // 2, 2)).contiguous())
    pairs = torch.view_as_complex(x.unflatten(-1, (key // 2, 2)).contiguous())
    for token in range(rows * columns):
        row, column = token // columns * 14 / rows, token % columns * 14 / columns
        for pair in range(key // 2):
            place = row if pair % 2 else column
            turn = place * 10000 ** (-(pair // 2) * 4 / key)
            expected = pairs[:, token, :, pair] * complex(math.cos(turn), math.sin(turn))
            torch.testing.assert_close(y[:, token, :, pair], expected)


def test_rotation_along_the_sequence_leaves_products_to_depend_on_distance() -> None:
    q, k = normal(8), normal(8, seed=1)
    turned = [rotate(x.expand(1, 9, 1, 8), (3, 3), "1d")[0, :, 0] for x in (q, k)]
    products = turned[0] @ turned[1].T
    torch.testing.assert_close(products[2, 0], products[8, 6])
    assert abs(float(products[2, 0] - products[0, 0])) > 1e-3


@pytest.mark.parametrize("mode", ["1d", "2d"])
def test_rotary_positions_reach_the_scan(mode: Any) -> None:
    turned, plain = make(rotary=mode, expand_k=1.0), make(expand_k=1.0)
    x = normal(1, 12, 12)
    assert not torch.allclose(turned(x, (3, 4)), plain(x, (3, 4)), atol=1e-4)
    torch.testing.assert_close(turned(x[:, :1], (1, 1)), plain(x[:, :1], (1, 1)))


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        ((3, 5), "grid must hold the 12 tokens of x"),
        ((0, 4), "0 rows of 4"),
        ((-3, -4), "-3 rows of -4"),
        ((12,), "one pair"),
        (12, "one pair"),
        ([(3, 4), (4, 3)], "one pair"),
        ((3.0, 4.0), "whole numbers"),
    ],
)
def test_a_grid_that_does_not_hold_the_tokens_is_refused(grid: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()(normal(1, 12, 12), grid)


def test_a_class_token_is_refused() -> None:
    with pytest.raises(ValueError, match="class token"):
        make()(normal(1, 13, 12), (3, 4))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dim": 16, "num_heads": 3}, "num_heads must divide key_dim, got key_dim=8"),
        ({"dim": 12, "gate_low_rank_dim": 0}, "gate_low_rank_dim must be positive"),
        (
            {"dim": 12, "num_heads": 4, "expand_k": 1.0, "expand_v": 0.5, "locality": False},
            "num_heads must divide value_dim",
        ),
        ({"dim": 12, "expand_v": 2.0}, "expand_v must be 1 with locality"),
        ({"dim": 12, "conv_act": "gelu"}, "conv_act must be 'silu' or None"),
        ({"dim": 12, "out_act": "relu"}, "out_act must be 'silu' or None"),
        ({"dim": 12, "conv_act": "silu", "locality": False}, "conv_act needs the convolution"),
        ({"dim": 12, "clamp_min": 0.5}, "clamp_min must be below zero"),
        ({"dim": 12, "rotary": "3d"}, "rotary must be"),
        ({"dim": 12, "rotary": "2d"}, "multiple of 4 channels, got 2"),
        ({"dim": 0}, "dim must be positive"),
        ({"dim": 12, "norm_eps": 0.0}, "norm_eps must be positive"),
    ],
)
def test_options_that_do_not_fit_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BidirectionalGLA(**options)

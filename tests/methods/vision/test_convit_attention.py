"""Gated positional self-attention: the definition once more, the local start, grids, gates, dropout, conversion."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from headgate.methods.vision.convit import GPSA, MHSA, gpsa_from_mhsa, localise_, relative_coordinates
from headgate.methods.vision.convit.positions import (
    average_by_position,
    axis_attention,
    grid_attention,
    offsets_of_heads,
)
from headgate.nn import MultiHeadAttention


def tokens(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def layer(dim: int = 12, num_heads: int = 4, **options: Any) -> GPSA:
    """A layer in float64 whose parameters are all far from their start."""
    torch.manual_seed(0)
    gpsa = GPSA(dim, num_heads, **options).double()
    with torch.no_grad():
        for parameter in gpsa.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return gpsa


def by_definition(gpsa: GPSA, x: Tensor, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Attention and output of equation 7, head by head and query by query."""
    size = gpsa.dim // gpsa.num_heads
    content, values = gpsa.qk(x), gpsa.v(x)
    places = [(row, column) for row in range(grid[0]) for column in range(grid[1])]
    weights, heads = [], []
    for h in range(gpsa.num_heads):
        q = content[..., h * size : (h + 1) * size]
        k = content[..., gpsa.dim + h * size : gpsa.dim + (h + 1) * size]
        gate = 1 / (1 + torch.exp(-gpsa.gating_param[h]))
        rows = []
        for i, (row, column) in enumerate(places):
            relative = torch.tensor([(c - column, r - row, (c - column) ** 2 + (r - row) ** 2) for r, c in places])
            by_position = (relative.to(x) @ gpsa.pos_proj.weight[h] + gpsa.pos_proj.bias[h]).softmax(0)
            by_content = ((k @ q[:, i, :, None]).squeeze(-1) / math.sqrt(size)).softmax(-1)
            rows.append((1 - gate) * by_content + gate * by_position)
        weights.append(torch.stack(rows, dim=1))
        heads.append(weights[-1] @ values[..., h * size : (h + 1) * size])
    return torch.stack(weights, dim=1), gpsa.proj(torch.cat(heads, dim=-1))


GRIDS = [(3, 3), (2, 5), (5, 2), (1, 4), (1, 1)]


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("num_heads", [4, 3])
def test_output_and_attention_are_equation_7(grid: tuple[int, int], num_heads: int) -> None:
    gpsa = layer(num_heads=num_heads, qkv_bias=True)
    x = tokens(2, grid[0] * grid[1], 12)
    weights, y = by_definition(gpsa, x, grid)
    torch.testing.assert_close(gpsa.attention(x, grid), weights)
    torch.testing.assert_close(gpsa(x, grid), y)
    torch.testing.assert_close(gpsa.eval()(x, grid), y)


def test_gradients_are_those_of_the_definition() -> None:
    gpsa, x, w = layer(), tokens(2, 6, 12).requires_grad_(), tokens(2, 6, 12, seed=1)
    wanted = [x, *(parameter for name, parameter in gpsa.named_parameters() if name != "pos_proj.bias")]
    expected = torch.autograd.grad((by_definition(gpsa, x, (2, 3))[1] * w).sum(), wanted)
    actual = torch.autograd.grad((gpsa(x, (2, 3)) * w).sum(), wanted)
    for ours, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_the_bias_of_positions_cancels() -> None:
    gpsa, x = layer(), tokens(2, 9, 12)
    y = gpsa(x)
    (gradient,) = torch.autograd.grad(y.square().sum(), gpsa.pos_proj.bias)
    assert float(gradient.abs().max()) < 1e-10
    with torch.no_grad():
        gpsa.pos_proj.bias.add_(5.0)
    torch.testing.assert_close(gpsa(x), y)


def test_rows_of_attention_sum_to_one_and_none_is_negative() -> None:
    weights = layer().attention(tokens(2, 9, 12)).detach()
    torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]))
    assert float(weights.min()) >= 0


class Shapes(TorchDispatchMode):
    """Notes the shape of everything that is computed."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, tuple | list) else (result,):
            if isinstance(value, Tensor):
                self.seen.add(tuple(value.shape))
        return result


@pytest.mark.parametrize("training", [False, True])
def test_weights_of_all_pairs_are_never_written(training: bool) -> None:
    gpsa, x = GPSA(12, 4).train(training), torch.randn(2, 49, 12, requires_grad=True)
    with Shapes() as shapes:
        gpsa(x).sum().backward()
    assert (2, 4, 49, 3) in shapes.seen
    assert not [shape for shape in shapes.seen if shape.count(49) > 1]
    with Shapes() as shapes:
        gpsa.attention(x)
    assert (2, 4, 49, 49) in shapes.seen


# --- positions -------------------------------------------------------------------------------------------------------


def test_relative_coordinates_are_key_minus_query_columns_first() -> None:
    relative = relative_coordinates((2, 3))
    assert relative.shape == (6, 6, 3)
    # From the patch in row 0, column 2 to the one in row 1, column 0.
    assert relative[2, 3].tolist() == [-2, 1, 5]
    torch.testing.assert_close(relative[..., :2], -relative.transpose(0, 1)[..., :2])
    assert relative_coordinates((1, 2), dtype=torch.float16).dtype == torch.float16
    with pytest.raises(ValueError, match="columns must be positive"):
        relative_coordinates((2, 0))


@pytest.mark.parametrize("grid", GRIDS)
def test_the_softmax_over_a_grid_is_the_product_of_those_over_rows_and_columns(grid: tuple[int, int]) -> None:
    weight, bias = tokens(3, 3), tokens(3)
    scores = relative_coordinates(grid, dtype=torch.float64) @ weight.T + bias
    whole = scores.permute(2, 0, 1).softmax(-1)
    by_row, by_column = axis_attention(weight, bias, grid)
    torch.testing.assert_close(grid_attention(by_row, by_column), whole)
    v = tokens(2, 3, grid[0] * grid[1], 4, seed=2)
    torch.testing.assert_close(average_by_position(by_row, by_column, v), whole @ v)


def test_positions_are_scored_in_float32_however_narrow_the_weights() -> None:
    half = GPSA(8, 4, locality_strength=300.0).half()
    by_row, by_column = axis_attention(half.pos_proj.weight, half.pos_proj.bias, (14, 14))
    assert by_row.dtype == by_column.dtype == torch.float32
    assert bool(by_row.isfinite().all())
    assert bool(half.positional_attention((14, 14)).isfinite().all())
    assert bool(half(torch.randn(1, 196, 8).half()).isfinite().all())


# --- the local start -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("num_heads", "expected"),
    [
        (1, [(0, 0)]),
        (4, [(-0.5, -0.5), (-0.5, 0.5), (0.5, -0.5), (0.5, 0.5)]),
        (9, [(x, y) for x in (-1, 0, 1) for y in (-1, 0, 1)]),
        (11, [(x, y) for x in (-1, 0, 1) for y in (-1, 0, 1)]),
    ],
)
def test_heads_look_at_the_taps_of_a_filter(num_heads: int, expected: list[tuple[float, float]]) -> None:
    assert offsets_of_heads(num_heads).tolist() == [list(pair) for pair in expected]


@pytest.mark.parametrize("strength", [0.5, 1.0, 3.0])
def test_a_local_layer_has_the_positional_weights_of_its_offsets(strength: float) -> None:
    gpsa = GPSA(18, 9, qkv_bias=True, locality_strength=strength)
    for h1 in range(3):
        for h2 in range(3):
            row = gpsa.pos_proj.weight[h1 + 3 * h2]
            torch.testing.assert_close(row, strength * torch.tensor([2.0 * (h2 - 1), 2.0 * (h1 - 1), -1.0]))
    assert torch.equal(gpsa.v.weight, torch.eye(18))
    assert torch.equal(gpsa.gating_param, torch.ones(9))
    torch.testing.assert_close(gpsa.gate, torch.full((9,), 0.7310586))
    for bias in (gpsa.v.bias, gpsa.qk.bias, gpsa.proj.bias, gpsa.pos_proj.bias):
        assert not bias.any()
    assert float(gpsa.qk.weight.detach().std()) == pytest.approx(0.02, rel=0.1)


def test_a_local_head_takes_its_weights_from_a_gaussian_around_its_offset() -> None:
    gpsa = GPSA(18, 9, locality_strength=0.7)
    weights = gpsa.positional_attention((7, 7)).detach()
    x, y, _ = relative_coordinates((7, 7)).unbind(-1)
    for head, (column, row) in enumerate(offsets_of_heads(9).tolist()):
        expected = (-0.7 * ((x - column) ** 2 + (y - row) ** 2)).softmax(-1)
        torch.testing.assert_close(weights[head], expected)


def test_a_strong_local_layer_is_a_convolution() -> None:
    torch.manual_seed(0)
    gpsa = GPSA(9, 9, locality_strength=40.0).double()
    with torch.no_grad():
        gpsa.gating_param.fill_(torch.inf)
    picture = tokens(2, 9, 6, 5)
    # Head h has one channel, and looks at one tap: a depthwise step, then the output projection.
    kernel = torch.zeros(9, 9, 3, 3, dtype=torch.float64)
    for head, (column, row) in enumerate(offsets_of_heads(9).long().tolist()):
        kernel[:, head, row + 1, column + 1] = gpsa.proj.weight[:, head].detach()
    expected = nn.functional.conv2d(picture, kernel, gpsa.proj.bias)
    y = gpsa(picture.flatten(2).mT, (6, 5)).mT.unflatten(2, (6, 5))
    torch.testing.assert_close(y[:, :, 1:-1, 1:-1], expected)


def test_heads_beyond_the_filter_keep_their_draw_times_the_strength() -> None:
    torch.manual_seed(3)
    random = GPSA(12, 6, local_init=False).pos_proj.weight.detach().clone()
    torch.manual_seed(3)
    local = GPSA(12, 6, locality_strength=2.0).pos_proj.weight
    torch.testing.assert_close(local[4:], 2 * random[4:])
    torch.testing.assert_close(local[0], torch.tensor([-2.0, -2.0, -2.0]))


def test_without_a_local_start_positions_and_values_are_drawn() -> None:
    gpsa = GPSA(64, 16, local_init=False)
    for part in (gpsa.pos_proj, gpsa.v):
        assert float(part.weight.detach().std()) == pytest.approx(0.02, rel=0.3)
        assert float(part.weight.detach().abs().max()) < 0.1
    assert torch.equal(gpsa.gating_param, torch.ones(16))


@pytest.mark.parametrize("strength", [0.0, -1.0])
def test_a_strength_that_makes_nothing_local_is_warned_of(strength: float) -> None:
    with pytest.warns(UserWarning, match="makes no head local"):
        gpsa = GPSA(8, 4, locality_strength=strength)
    torch.testing.assert_close(gpsa.pos_proj.weight[0], strength * torch.tensor([-1.0, -1.0, -1.0]))


def test_localise_brings_every_layer_of_a_model_to_the_local_start() -> None:
    model = nn.Sequential(nn.Linear(8, 8), layer(8, 4, locality_strength=2.0).float(), layer(8, 4).float())
    before = model[0].weight.clone(), model[1].qk.weight.clone()
    assert localise_(model) is model
    fresh = GPSA(8, 4, locality_strength=2.0)
    for name in ("pos_proj.weight", "v.weight", "gating_param"):
        assert torch.equal(model[1].state_dict()[name], fresh.state_dict()[name])
    assert torch.equal(model[0].weight, before[0])
    assert torch.equal(model[1].qk.weight, before[1])
    localise_(model[2], 0.5)
    assert model[2].pos_proj.weight[0].tolist() == [-0.5, -0.5, -0.5]
    with pytest.raises(ValueError, match="must be or hold a GPSA layer, got Linear"):
        localise_(nn.Linear(2, 2))


# --- gates, distance, grids ------------------------------------------------------------------------------------------


def test_a_closed_gate_leaves_content_and_an_open_one_position() -> None:
    gpsa, x = layer(), tokens(2, 9, 12)
    with torch.no_grad():
        gpsa.gating_param.fill_(-torch.inf)
        content = gpsa.attention(x)
        gpsa.gating_param.fill_(torch.inf)
        position = gpsa.attention(x)
    torch.testing.assert_close(position[0], gpsa.positional_attention((3, 3)).detach())
    torch.testing.assert_close(position[0], position[1])
    with torch.no_grad():
        gpsa.pos_proj.weight.mul_(-3.0)
        gpsa.gating_param.fill_(-torch.inf)
        torch.testing.assert_close(gpsa.attention(x), content)


def test_positional_attention_does_not_see_the_input() -> None:
    gpsa, x = layer(), tokens(1, 9, 12)
    with torch.no_grad():
        gpsa.gating_param.fill_(torch.inf)
        twice = gpsa(torch.cat([x, 2 * x]))
        value = gpsa.v(x)
    torch.testing.assert_close(twice[1] - gpsa.proj.bias, 2 * (twice[0] - gpsa.proj.bias))
    assert value.shape == x.shape


def test_distance_is_the_mean_way_to_what_is_attended() -> None:
    gpsa, x = layer(), tokens(3, 6, 12)
    weights = gpsa.attention(x, (2, 3)).mean(0)
    expected = torch.zeros(4, dtype=torch.float64)
    for i in range(6):
        for j in range(6):
            expected += weights[:, i, j] * math.hypot(i // 3 - j // 3, i % 3 - j % 3) / 6
    torch.testing.assert_close(gpsa.attention_distance(x, (2, 3)), expected.detach())


def test_a_local_layer_looks_as_far_as_its_offsets() -> None:
    gpsa = GPSA(9, 9, locality_strength=50.0, grid_size=(40, 40))
    with torch.no_grad():
        gpsa.gating_param.fill_(torch.inf)
    distance = gpsa.attention_distance(torch.zeros(1, 1600, 9))
    np.testing.assert_allclose(distance, offsets_of_heads(9).norm(dim=1), atol=0.05)


def test_distances_of_plain_attention_leave_the_class_token_out() -> None:
    mhsa = MHSA(12, 3).double()
    with torch.no_grad():
        mhsa.qkv.weight.zero_()
    uniform = relative_coordinates((3, 3), dtype=torch.float64)[..., 2].sqrt().mean()
    torch.testing.assert_close(mhsa.attention_distance(tokens(2, 9, 12)), uniform.expand(3))
    torch.testing.assert_close(mhsa.attention_distance(tokens(2, 10, 12), (3, 3)), uniform.expand(3))
    with pytest.raises(ValueError, match="at most the 9 tokens of x, got 2 × 5"):
        mhsa.attention_distance(tokens(2, 9, 12), (2, 5))


def test_the_grid_of_a_call_goes_before_the_layer_s_and_both_before_the_square() -> None:
    gpsa, x = layer(grid_size=(2, 8)), tokens(1, 16, 12)
    torch.testing.assert_close(gpsa(x), by_definition(gpsa, x, (2, 8))[1])
    torch.testing.assert_close(gpsa(x, (8, 2)), by_definition(gpsa, x, (8, 2))[1])
    gpsa.grid_size = None
    torch.testing.assert_close(gpsa(x), by_definition(gpsa, x, (4, 4))[1])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dim": 10, "num_heads": 4}, "num_heads must divide dim, got dim=10, num_heads=4"),
        ({"dim": 0}, "dim must be positive"),
        ({"dim": 8, "num_heads": 2, "attn_drop": 1.5}, r"attn_drop must lie in \[0, 1\]"),
        ({"dim": 8, "num_heads": 2, "proj_drop": -0.1}, r"proj_drop must lie in \[0, 1\]"),
        ({"dim": 8, "num_heads": 2, "grid_size": (0, 4)}, "rows must be positive"),
    ],
)
def test_options_that_do_not_fit_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GPSA(**options)


def test_integers_are_refused() -> None:
    with pytest.raises(TypeError, match=r"x must be floating point, got torch\.int64"):
        GPSA(8, 4)(torch.zeros(1, 4, 8, dtype=torch.int64))


# --- dropout ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("branch_dropout", [False, True])
def test_dropout_of_attention_keeps_the_mean_and_rests_in_evaluation(branch_dropout: bool) -> None:
    gpsa, x = layer(attn_drop=0.3, branch_dropout=branch_dropout), tokens(1, 4, 12)
    expected = by_definition(gpsa, x, (2, 2))[1]
    torch.testing.assert_close(gpsa.eval()(x), expected)
    gpsa.train()
    torch.manual_seed(0)
    with torch.no_grad():
        draws = torch.stack([gpsa(x) for _ in range(3000)])
    assert float(draws.std(0).min()) > 1e-3
    error = (draws.mean(0) - expected).abs() / (draws.std(0) / math.sqrt(len(draws)))
    assert float(error.detach().max()) < 5


def test_dropout_acts_on_the_mixed_weights_unless_branches_are_asked_for() -> None:
    x = torch.eye(4, dtype=torch.float64).repeat(1, 1, 3)
    gpsa = layer(num_heads=1, attn_drop=0.5)
    with torch.no_grad():
        gpsa.v.weight.copy_(torch.eye(12))
        gpsa.proj.weight.copy_(torch.eye(12))
        gpsa.proj.bias.zero_()
    torch.manual_seed(1)
    # The values are the rows of an identity, so the output is the weights themselves.
    dropped = gpsa(x)[0, :, :4].detach()
    kept = gpsa.attention(x)[0, 0].detach() / 0.5
    zero = dropped == 0
    torch.testing.assert_close(dropped[~zero], kept[~zero])
    assert 0 < int(zero.sum()) < 16
    gpsa.branch_dropout = True
    mixed = gpsa(x)[0, :, :4].detach()
    apart = ~((mixed == 0) | torch.isclose(mixed, kept))
    assert bool(apart.any())


# --- conversion ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", [MHSA, MultiHeadAttention])
def test_a_closed_gate_computes_what_the_attention_did(kind: Any, bias: bool) -> None:
    torch.manual_seed(0)
    attention = (kind(12, 4, bias) if kind is MHSA else kind(12, 4, bias=bias)).double()
    x = tokens(2, 9, 12)
    gpsa = gpsa_from_mhsa(attention, gate=0.0)
    torch.testing.assert_close(gpsa(x), attention(x))
    assert gpsa.gate.tolist() == [0.0] * 4
    assert gpsa.proj.weight.data_ptr() != next(iter(attention.parameters())).data_ptr()


def test_a_converted_layer_has_local_positions_and_the_wanted_gate() -> None:
    attention = MHSA(12, 4).eval()
    gpsa = gpsa_from_mhsa(attention, gate=0.25, locality_strength=2.0, grid_size=(3, 4))
    torch.testing.assert_close(gpsa.gate, torch.full((4,), 0.25))
    torch.testing.assert_close(gpsa.pos_proj.weight, GPSA(12, 4, locality_strength=2.0).pos_proj.weight)
    torch.testing.assert_close(gpsa.v.weight, attention.qkv.weight[24:])
    assert gpsa.grid_size == (3, 4)
    assert not gpsa.training
    assert all(parameter.requires_grad for parameter in gpsa.parameters())
    assert gpsa_from_mhsa(attention, gate=1.0).gate.tolist() == [1.0] * 4


class Foreign(nn.Module):
    """Attention of another library: timm's names."""

    def __init__(self, q_norm: nn.Module, out: int = 8) -> None:
        super().__init__()
        self.num_heads = 2
        self.qkv, self.proj, self.q_norm = nn.Linear(8, 24), nn.Linear(8, out), q_norm


def test_attention_that_is_not_plain_is_refused() -> None:
    assert gpsa_from_mhsa(Foreign(nn.Identity())).num_heads == 2
    with pytest.raises(ValueError, match="neither causal nor normalised, got q_norm"):
        gpsa_from_mhsa(Foreign(nn.LayerNorm(4)))
    with pytest.raises(ValueError, match="got causal=True"):
        gpsa_from_mhsa(MultiHeadAttention(8, 2, causal=True))
    with pytest.raises(ValueError, match="got 24, and 8 to 4"):
        gpsa_from_mhsa(Foreign(nn.Identity(), out=4))
    with pytest.raises(TypeError, match=r"qkv and proj.*got Linear"):
        gpsa_from_mhsa(nn.Linear(8, 8))
    with pytest.raises(ValueError, match=r"gate must lie in \[0, 1\]"):
        gpsa_from_mhsa(MHSA(8, 2), gate=1.1)

"""The small shared parts: short convolution, rotary positions, stochastic depth, feed-forward networks."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from headgate.nn import DropPath, FeedForward, GatedFeedForward, ShortConvolution, apply_rotary


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("length", "size"), [(1, 1), (1, 4), (6, 3), (9, 1), (3, 8)])
def test_a_short_convolution_is_torchs_with_padding_on_the_left(length: int, size: int, bias: bool) -> None:
    torch.manual_seed(0)
    layer = ShortConvolution(5, size, bias).double()
    x = torch.randn(2, length, 5, dtype=torch.float64)
    padded = F.pad(x.transpose(1, 2), (size - 1, 0))
    expected = F.conv1d(padded, layer.weight[:, None], layer.bias, groups=5).transpose(1, 2)
    torch.testing.assert_close(layer(x), expected)
    assert layer.state_size(length) == 5 * size


def test_a_short_convolution_starts_as_torchs() -> None:
    torch.manual_seed(0)
    ours, theirs = ShortConvolution(4096, 4), torch.nn.Conv1d(4096, 4096, 4, groups=4096)
    for a, b in ((ours.weight, theirs.weight), (ours.bias, theirs.bias)):
        assert a.abs().max() <= 0.5
        assert a.std().item() == pytest.approx(b.std().item(), rel=0.03)


def test_rotary_positions_turn_pairs_by_position_times_frequency() -> None:
    x = torch.tensor([[1.0, 0.0, 0.0, 0.0], [1.0, 2.0, 0.0, 0.0], [0.0, 0.0, 1.0, 3.0]], dtype=torch.float64)
    y = apply_rotary(x, base=100.0)
    one, two = torch.tensor([1.0, 0.1], dtype=torch.float64), torch.tensor([2.0, 0.2], dtype=torch.float64)
    expected = torch.stack(
        (
            x[0],
            torch.stack((one[0].cos(), 2 * one[1].cos(), one[0].sin(), 2 * one[1].sin())),
            torch.stack((-two[0].sin(), -3 * two[1].sin(), two[0].cos(), 3 * two[1].cos())),
        )
    )
    torch.testing.assert_close(y, expected)


def test_rotary_products_depend_on_the_distance_alone() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, 1, 8, generator=generator, dtype=torch.float64).expand(1, 20, 8) for _ in range(2))
    products = apply_rotary(q) @ apply_rotary(k).transpose(1, 2)
    for distance in (-7, 0, 3):
        diagonal = products[0].diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal))
    torch.testing.assert_close(apply_rotary(q).norm(dim=-1), q.norm(dim=-1))
    torch.testing.assert_close(apply_rotary(q)[:, 5:], apply_rotary(q[:, 5:], offset=5))


def test_rotary_refuses_odd_sizes_and_integers() -> None:
    with pytest.raises(ValueError, match="even last size"):
        apply_rotary(torch.zeros(2, 3))
    with pytest.raises(TypeError, match="floating"):
        apply_rotary(torch.zeros(2, 4, dtype=torch.int64))


def test_drop_path_drops_whole_examples_and_keeps_the_mean() -> None:
    torch.manual_seed(0)
    x = torch.ones(20_000, 3, 2)
    y = DropPath(0.25)(x)
    assert (y.flatten(1).std(dim=1) == 0).all()
    assert set(y[:, 0, 0].tolist()) == {0.0, torch.tensor(1 / 0.75).item()}
    assert y.mean().item() == pytest.approx(1, abs=0.02)
    assert DropPath(0.25).eval()(x) is x
    assert (DropPath(1.0)(x) == 0).all()
    with pytest.raises(ValueError, match="rate"):
        DropPath(-0.1)
    with pytest.raises(TypeError, match="floating"):
        DropPath(0.5)(torch.ones(2, 3, dtype=torch.int64))


def test_feed_forward_networks_are_their_formulas() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 4)
    plain, gated = FeedForward(4, 6), GatedFeedForward(4, 6, activation=torch.relu)
    torch.testing.assert_close(plain(x), plain.fc2(F.gelu(plain.fc1(x))))
    torch.testing.assert_close(gated(x), gated.output(gated.value(x) * gated.gate(x).relu()))
    assert FeedForward(4).fc1.out_features == 16
    with pytest.raises(ValueError, match="dim=4"):
        plain(torch.zeros(2, 5))
    with pytest.raises(TypeError, match="float64"):
        gated(x.double())

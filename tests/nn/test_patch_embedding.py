"""Patch embeddings: what they compute, which sizes come out, and positions for other grids."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from headgate.nn.patch_embedding import ConvPatchEmbedding, LayerNorm2d, resize_positions


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def test_layer_norm_2d_normalises_the_channels_of_every_position() -> None:
    norm = LayerNorm2d(5, eps=1e-3).double()
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    x = normal(2, 5, 3, 4)
    y = norm(x)
    for b, i, j in ((0, 0, 0), (1, 2, 3)):
        channels = x[b, :, i, j]
        scale = ((channels - channels.mean()).square().mean() + 1e-3).sqrt()
        expected = (channels - channels.mean()) / scale * norm.weight + norm.bias
        torch.testing.assert_close(y[b, :, i, j], expected)


def test_layer_norm_2d_refuses_channels_that_lie_elsewhere() -> None:
    with pytest.raises(ValueError, match="channels=5"):
        LayerNorm2d(5)(torch.zeros(2, 3, 4, 5))


def test_patch_embedding_is_two_convolutions_with_norms_and_an_activation_between() -> None:
    layer = ConvPatchEmbedding(8, 16, 2, activation=nn.SiLU).double()
    x = normal(2, 2, 32, 48)

    def norm(hidden: torch.Tensor) -> torch.Tensor:
        centred = hidden - hidden.mean(1, keepdim=True)
        return centred / (centred.square().mean(1, keepdim=True) + 1e-5).sqrt()

    hidden = norm(F.conv2d(x, layer.conv1.weight, layer.conv1.bias, stride=8, padding=1))
    hidden = hidden * torch.sigmoid(hidden)
    expected = norm(F.conv2d(hidden, layer.conv2.weight, layer.conv2.bias, stride=2, padding=1))
    assert layer.conv1.kernel_size == (9, 9)
    torch.testing.assert_close(layer(x), expected)


@pytest.mark.parametrize(
    ("patch", "size", "grid"),
    [
        (16, (224, 224), (14, 14)),
        (16, (48, 32), (3, 2)),
        (4, (16, 20), (4, 5)),
        (4, (17, 30), (5, 8)),
        (8, (24, 8), (3, 1)),
    ],
)
def test_patch_embedding_gives_one_vector_per_patch(patch: int, size: tuple[int, int], grid: tuple[int, int]) -> None:
    with torch.device("meta"):
        y = ConvPatchEmbedding(6, patch)(torch.empty(1, 3, *size))
    assert y.shape == (1, 6, *grid)


def test_stem_of_patch_four_sees_every_pixel_of_any_size() -> None:
    layer = ConvPatchEmbedding(8, 4, 1, activation=nn.GELU).double()
    images = normal(1, 1, 17, 6).requires_grad_()
    (layer(images) * normal(1, 8, 5, 2, seed=1)).sum().backward()
    assert (images.grad != 0).all()


@pytest.mark.parametrize(
    ("patch", "size"), [(16, (64, 80)), (16, (100, 37)), (8, (33, 50)), (4, (17, 16)), (4, (40, 33))]
)
def test_inference_in_strips_gives_what_training_gives(
    patch: int, size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("headgate.nn.patch_embedding._PATCHES_AT_ONCE", 5)
    layer, images = ConvPatchEmbedding(8, patch, 2).double(), normal(2, 2, *size)
    seen: list[torch.Size] = []
    with torch.no_grad():
        strips = layer(images)
        assert strips.is_contiguous(memory_format=torch.channels_last)
        layer.conv1.register_forward_hook(lambda module, args, output: seen.append(output.shape))
        torch.testing.assert_close(layer(images), strips)
    assert seen == [F.conv2d(images, layer.conv1.weight, stride=patch // 2, padding=1).shape]  # hooks see it whole
    torch.testing.assert_close(layer(images), strips)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"dim": 7}, "dim must be even"), ({"dim": 8, "patch_size": 7}, "patch_size must be even"), ({"dim": 0}, "dim")],
)
def test_patch_embedding_refuses_sizes_that_do_not_halve(arguments: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ConvPatchEmbedding(**arguments)


@pytest.mark.parametrize("shape", [(1, 3, 15, 16), (1, 4, 16, 16), (3, 16, 16)])
def test_patch_embedding_refuses_other_images(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="images must"):
        ConvPatchEmbedding(8)(torch.zeros(shape))


def test_positions_of_the_same_grid_are_left_alone() -> None:
    positions = normal(1, 6, 4)
    assert resize_positions(positions, (2, 3), (2, 3)) is positions


def cubic(line: list[float], place: float) -> float:
    """Cubic convolution with a = -0.75 (Keys 1981), borders repeated."""
    total = 0.0
    for index in range(math.floor(place) - 1, math.floor(place) + 3):
        t = abs(place - index)
        weight = 1.25 * t**3 - 2.25 * t**2 + 1 if t <= 1 else -0.75 * (t**3 - 5 * t**2 + 8 * t - 4)
        total += weight * line[min(max(index, 0), len(line) - 1)]
    return total


def test_positions_are_resized_by_cubic_convolution_along_rows_and_columns() -> None:
    positions = normal(1, 12, 2)
    table = positions.view(3, 4, 2)
    resized = resize_positions(positions, (3, 4), (5, 6)).view(5, 6, 2)
    for row, column, channel in ((0, 0, 0), (2, 3, 1), (4, 5, 0)):
        y, x = (row + 0.5) * 3 / 5 - 0.5, (column + 0.5) * 4 / 6 - 0.5
        lines = [cubic(table[i, :, channel].tolist(), x) for i in range(3)]
        assert float(resized[row, column, channel]) == pytest.approx(cubic(lines, y), abs=1e-6)


def test_positions_that_depend_on_the_row_alone_still_do() -> None:
    rows = normal(1, 3, 1, 4)
    resized = resize_positions(rows.expand(1, 3, 5, 4).flatten(1, 2), (3, 5), (7, 2)).unflatten(1, (7, 2))
    torch.testing.assert_close(resized[:, :, 0], resized[:, :, 1])
    assert not torch.allclose(resized[:, 0], resized[:, 1])


def test_positions_in_bfloat16_are_resized_in_float32() -> None:
    positions = normal(1, 4, 8, dtype=torch.float32).bfloat16()
    resized = resize_positions(positions, (2, 2), (3, 4))
    assert torch.equal(resized, resize_positions(positions.float(), (2, 2), (3, 4)).bfloat16())


@pytest.mark.parametrize(
    ("shape", "grid", "new_grid", "message"),
    [
        ((1, 5, 4), (2, 3), (4, 4), "columns=6"),
        ((2, 6, 4), (2, 3), (4, 4), "=1"),
        ((1, 6, 4), (2, 3), (0, 4), "new_rows"),
    ],
)
def test_positions_refuse_a_grid_that_does_not_fit(
    shape: tuple[int, ...], grid: tuple[int, int], new_grid: tuple[int, int], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        resize_positions(torch.zeros(shape), grid, new_grid)

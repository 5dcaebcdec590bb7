"""Signed distances, textures and rotation symmetries."""

from __future__ import annotations

import math

import pytest
import torch

from headgate.data.scenes.palette import HUES, floor_rgb, ground_rgb, hsv_to_rgb, object_rgb
from headgate.data.scenes.shapes import REACH, SHAPES, TEXTURES, rotation_period, signed_distance, texture_distance


def plane(side: int = 121, reach: float = 1.5) -> tuple[torch.Tensor, torch.Tensor]:
    steps = torch.linspace(-reach, reach, side, dtype=torch.float64) + 1e-4
    y, x = torch.meshgrid(steps, steps, indexing="ij")
    return x, y


@pytest.mark.parametrize("shape", SHAPES)
def test_distance_changes_by_at_most_the_way_walked(shape: str) -> None:
    x, y = plane()
    distance = signed_distance(shape, x, y)
    step = float(x[0, 1] - x[0, 0])
    assert float((distance[:, 1:] - distance[:, :-1]).abs().max()) <= step + 1e-9
    assert float((distance[1:] - distance[:-1]).abs().max()) <= step + 1e-9


@pytest.mark.parametrize("shape", SHAPES)
def test_distance_has_a_gradient_of_length_one_almost_everywhere(shape: str) -> None:
    x, y = plane()
    x.requires_grad_(), y.requires_grad_()
    gradients = torch.autograd.grad(signed_distance(shape, x, y).sum(), (x, y))
    length = torch.stack(gradients).norm(dim=0)
    assert float((length - 1).abs().median()) < 1e-6
    assert float(((length - 1).abs() < 1e-6).double().mean()) > 0.98


@pytest.mark.parametrize("shape", SHAPES)
def test_no_shape_reaches_beyond_its_patch(shape: str) -> None:
    x, y = plane(301, 2.0)
    inside = signed_distance(shape, x, y) <= 0
    assert inside.any()
    assert float((x**2 + y**2).sqrt()[inside].max()) <= REACH


@pytest.mark.parametrize(
    ("shape", "point", "expected"),
    [
        ("circle", (2.0, 0.0), 1.0),
        ("circle", (0.0, 0.0), -1.0),
        ("square", (0.0, 0.0), -0.9),
        ("square", (1.9, 1.9), math.sqrt(2.0)),
        ("square", (1.4, 0.3), 0.5),
        ("triangle", (0.0, -2.25), 1.0),
        ("triangle", (0.0, 0.0), -0.625),
        ("cross", (0.0, 0.0), -0.4 * math.sqrt(2.0)),
        ("cross", (2.15, 0.0), 1.0),
        ("ring", (0.0, 0.0), 0.55),
        ("ring", (0.8, 0.0), -0.25),
        ("bar", (0.0, 0.92), 0.5),
        ("diamond", (0.0, 2.28), 1.0),
        ("star", (0.0, -2.28), 1.0),
    ],
)
def test_distances_by_hand(shape: str, point: tuple[float, float], expected: float) -> None:
    x, y = (torch.tensor([value], dtype=torch.float64) for value in point)
    assert float(signed_distance(shape, x, y)) == pytest.approx(expected, abs=2e-6)


@pytest.mark.parametrize("texture", ["stripes", "dots"])
def test_textures_darken_a_third_or_so_and_are_symmetric_about_the_middle(texture: str) -> None:
    x, y = plane(401, 0.9)
    dark = texture_distance(texture, x, y) < 0
    assert 0.2 < float(dark.double().mean()) < 0.6
    assert torch.equal(dark, texture_distance(texture, -x, -y) < 0)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("texture", TEXTURES)
def test_rotation_period_is_the_least_turn_that_changes_nothing(shape: str, texture: str) -> None:
    x, y = plane(81, 1.4)

    def drawn(turn: int) -> torch.Tensor:
        cosine, sine = math.cos(2 * math.pi * turn / 12), math.sin(2 * math.pi * turn / 12)
        u, v = cosine * x + sine * y, cosine * y - sine * x
        solid = signed_distance(shape, u, v) < 0
        return solid.long() if texture == "solid" else solid * (1 + (texture_distance(texture, u, v) < 0).long())

    first = drawn(0)
    same = [turn for turn in range(1, 13) if float((drawn(turn) != first).double().mean()) < 1e-3]
    assert same[0] == rotation_period(shape, texture, 12)


def test_unknown_shapes_and_textures_are_refused() -> None:
    x, y = plane(3)
    with pytest.raises(ValueError, match="shape must be one of circle"):
        signed_distance("heart", x, y)
    with pytest.raises(ValueError, match="texture must be stripes or dots"):
        texture_distance("solid", x, y)


@pytest.mark.parametrize(
    ("hsv", "rgb"),
    [
        ((0.0, 1.0, 1.0), (255, 0, 0)),
        ((1 / 6, 1.0, 1.0), (255, 255, 0)),
        ((1 / 3, 1.0, 1.0), (0, 255, 0)),
        ((2 / 3, 1.0, 0.5), (0, 0, 128)),
        ((0.3, 0.0, 1.0), (255, 255, 255)),
        ((0.5, 0.5, 1.0), (128, 255, 255)),
    ],
)
def test_hsv_to_rgb_by_hand(hsv: tuple[float, float, float], rgb: tuple[int, int, int]) -> None:
    assert hsv_to_rgb(*hsv) == rgb


def test_objects_show_on_a_ground_of_their_own_hue() -> None:
    for name in HUES:
        for ground in (ground_rgb(name), floor_rgb(name)):
            assert max(abs(a - b) for a, b in zip(object_rgb(name), ground, strict=True)) > 100
        assert max(abs(a - b) for a, b in zip(ground_rgb(name), floor_rgb(name), strict=True)) > 30

"""The six transformations against hand-made pictures, PIL's own operations and their ranges."""

from __future__ import annotations

import colorsys
import math
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance

from headgate.methods.steering.ritual import (
    TRANSFORMS,
    color_jitter,
    draw_transform,
    gaussian_blur,
    horizontal_flip,
    random_resized_crop,
    rotation,
    vertical_flip,
)


def stream(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def picture(height: int = 20, width: int = 30) -> torch.Tensor:
    return torch.rand(3, height, width, generator=stream(7))


def to_pil(image: torch.Tensor) -> Image.Image:
    return Image.fromarray((image * 255).round().to(torch.uint8).permute(1, 2, 0).numpy())


def to_tensor(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)


def test_flips_mirror_pixels() -> None:
    image = torch.arange(6.0).view(1, 2, 3) / 6
    assert horizontal_flip(image, stream())[0].mul(6).round().tolist() == [[2, 1, 0], [5, 4, 3]]
    assert vertical_flip(image, stream())[0].mul(6).round().tolist() == [[3, 4, 5], [0, 1, 2]]
    pil = to_pil(picture())
    assert horizontal_flip(pil, stream()).tobytes() == pil.transpose(Image.Transpose.FLIP_LEFT_RIGHT).tobytes()
    assert vertical_flip(pil, stream()).tobytes() == pil.transpose(Image.Transpose.FLIP_TOP_BOTTOM).tobytes()


@pytest.mark.parametrize("name", sorted(TRANSFORMS))
def test_kind_and_batch_of_an_image_stay_and_one_seed_gives_one_image(name: str) -> None:
    transform, image = TRANSFORMS[name], picture()
    whole = (image * 255).round().to(torch.uint8)
    size = (336, 336) if name == "crop" else (20, 30)
    real = transform(whole.float() / 255, stream(3))
    assert real.shape == (3, *size)
    assert 0 <= float(real.min()) <= float(real.max()) <= 1
    assert torch.equal(real, transform(whole.float() / 255, stream(3)))
    bytes_ = transform(whole, stream(3))
    assert bytes_.dtype == torch.uint8
    torch.testing.assert_close(bytes_.float() / 255, real, rtol=0, atol=0.5001 / 255)
    pil = transform(to_pil(image), stream(3))
    assert torch.equal(to_tensor(pil), bytes_)
    batch = transform(torch.stack([image, image.flip(0)]), stream(3))
    torch.testing.assert_close(batch[0], transform(image, stream(3)))
    torch.testing.assert_close(batch[1], transform(image.flip(0), stream(3)))


def test_rotation_by_quarter_turns_moves_every_pixel_and_blackens_what_comes_from_outside(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    module = "headgate.methods.steering.ritual.transforms._uniform"
    square = picture(9, 9)
    for angle, turns in ((90, 1), (180, 2), (-90, -1)):
        monkeypatch.setattr(module, lambda generator, low, high, angle=angle: float(angle))
        turned = rotation(square, stream())
        assert torch.equal(turned, square.rot90(turns, (-2, -1)))
    monkeypatch.setattr(module, lambda generator, low, high: 45.0)
    turned = rotation(torch.ones(1, 21, 21), stream())
    assert turned[0, 0, 0] == 0
    assert turned[0, 10, 10] == 1
    assert float(turned.mean()) == pytest.approx(2 * (math.sqrt(2) - 1), abs=0.03)  # the octagon that two squares share
    pil = Image.new("RGB", (21, 21), (255, 255, 255)).rotate(45, Image.Resampling.NEAREST)
    ours = rotation(Image.new("RGB", (21, 21), (255, 255, 255)), stream())
    assert float((to_tensor(ours) != to_tensor(pil)).float().mean()) < 0.08


def test_rotations_cover_the_whole_circle() -> None:
    image = torch.zeros(1, 41, 41)
    image[0, 20, 36] = 1.0
    image[0, 19:22, 35:38] = 1.0
    places = []
    for seed in range(60):
        y, x = (rotation(image, stream(seed))[0] > 0).nonzero().float().mean(dim=0).tolist()
        places.append(math.atan2(20 - y, x - 20))
    assert min(places) < -2.6
    assert max(places) > 2.6
    assert sum(abs(place) < math.pi / 2 for place in places) == pytest.approx(30, abs=13)


def test_blur_is_the_normalised_gaussian_of_13_pixels_and_leaves_flat_pictures_alone() -> None:
    dot = torch.zeros(1, 27, 27)
    dot[0, 13, 13] = 1.0
    widths = []
    for seed in range(20):
        blurred = gaussian_blur(dot, stream(seed))[0]
        assert float(blurred.sum()) == pytest.approx(1, abs=1e-5)
        assert int((blurred > 0).sum()) == 13 * 13
        widths.append(math.sqrt(-0.5 / math.log(float(blurred[13, 14] / blurred[13, 13]))))
        ratio = float(blurred[13, 16] / blurred[13, 13])
        assert ratio == pytest.approx(math.exp(-9 / (2 * widths[-1] ** 2)), rel=1e-3)
    assert 1.5 <= min(widths) < 1.65
    assert 1.85 < max(widths) <= 2.0
    torch.testing.assert_close(gaussian_blur(torch.full((3, 13, 40), 0.3), stream()), torch.full((3, 13, 40), 0.3))


def test_crops_are_of_the_stated_areas_and_shapes_and_keep_colours() -> None:
    y, x = torch.meshgrid(torch.linspace(0, 1, 200), torch.linspace(0, 1, 300), indexing="ij")
    image = torch.stack([y, x, torch.full_like(x, 0.25)])
    areas, shapes = [], []
    for seed in range(80):
        crop = random_resized_crop(image, stream(seed), size=64)
        assert crop.shape == (3, 64, 64)
        tall, wide = (float(crop[channel].max() - crop[channel].min()) for channel in (0, 1))
        areas.append(tall * wide)
        shapes.append(wide * 300 / (tall * 200))
        torch.testing.assert_close(crop[2], torch.full((64, 64), 0.25))
    assert 0.06 < min(areas) < 0.2
    assert 0.7 < max(areas) <= 1.0
    assert 0.7 < min(shapes) < 0.85
    assert 1.2 < max(shapes) < 1.4
    line = random_resized_crop(torch.rand(3, 4, 400, generator=stream()), stream(), size=8, scale=(1.0, 1.0))
    assert line.shape == (3, 8, 8)  # no rectangle fits: the middle


@pytest.mark.parametrize("share", [0.0, 0.4, 1.0, 1.7])
def test_brightness_contrast_and_saturation_are_those_of_pil(share: float, monkeypatch: pytest.MonkeyPatch) -> None:
    module = "headgate.methods.steering.ritual.transforms._uniform"
    pil = to_pil(picture())
    kinds = {"brightness": ImageEnhance.Brightness, "contrast": ImageEnhance.Contrast, "saturation": ImageEnhance.Color}
    for name, kind in kinds.items():
        off = {**dict.fromkeys(kinds, 0.0), "hue": 0.0}
        monkeypatch.setattr(module, lambda g, low, high: share if high > 1 else (low + high) / 2)
        ours = color_jitter(pil, stream(), **{**off, name: 1.0})
        theirs = kind(pil).enhance(share)
        assert int((to_tensor(ours).int() - to_tensor(theirs).int()).abs().max()) <= 2


@pytest.mark.parametrize("turn", [-0.5, -0.2, 0.1, 0.37])
def test_the_hue_is_turned_at_the_same_saturation_and_value(turn: float, monkeypatch: pytest.MonkeyPatch) -> None:
    module = "headgate.methods.steering.ritual.transforms._uniform"
    monkeypatch.setattr(module, lambda g, low, high: turn if low == -0.5 else 1.0)
    image = torch.cat(
        [picture(4, 4), torch.rand(1, 4, 4, generator=stream(2)).expand(3, 4, 4)], dim=2
    )  # colours, greys
    ours = color_jitter(image, stream(), brightness=0, contrast=0, saturation=0, hue=0.5)
    for y in range(4):
        for x in range(8):
            h, s, v = colorsys.rgb_to_hsv(*image[:, y, x].tolist())
            expected = colorsys.hsv_to_rgb((h + turn) % 1, s, v)
            assert ours[:, y, x].tolist() == pytest.approx(expected, abs=1e-5)


def test_jitter_draws_all_four_in_their_ranges_and_in_every_order() -> None:
    flat = torch.full((3, 5, 5), 0.4)
    levels = [float(color_jitter(flat, stream(seed))[0, 0, 0]) for seed in range(60)]
    assert min(levels) < 0.1
    assert max(levels) > 0.7
    coloured = torch.tensor([0.8, 0.2, 0.2])[:, None, None].expand(3, 5, 5)
    strongest = Counter(int(color_jitter(coloured, stream(seed))[:, 0, 0].argmax()) for seed in range(80))
    assert set(strongest) == {0, 1, 2}
    one = torch.full((1, 5, 5), 0.4)
    assert color_jitter(one, stream()).shape == (1, 5, 5)


def test_all_names_are_drawn_alike() -> None:
    generator = stream()
    drawn = Counter(draw_transform(generator) for _ in range(600))
    assert set(drawn) == set(TRANSFORMS)
    assert all(70 < count < 130 for count in drawn.values())
    assert draw_transform(generator, ["crop"]) == "crop"
    with pytest.raises(ValueError, match="names must be out of horizontal_flip"):
        draw_transform(generator, ["mirror"])
    with pytest.raises(ValueError, match="names must be out of"):
        draw_transform(generator, [])


def test_bad_images_are_refused() -> None:
    with pytest.raises(ValueError, match="sides of at least kernel_size=13"):
        gaussian_blur(torch.rand(3, 12, 40), stream())
    with pytest.raises(ValueError, match="kernel_size must be odd"):
        gaussian_blur(torch.rand(3, 40, 40), stream(), kernel_size=4)
    with pytest.raises(ValueError, match="1 or 3, height, width"):
        rotation(torch.rand(12, 40), stream())
    with pytest.raises(TypeError, match="uint8 or floating point"):
        rotation(torch.zeros(3, 4, 4, dtype=torch.int64), stream())
    with pytest.raises(TypeError, match="tensor or a PIL image, got ndarray"):
        rotation(np.zeros((3, 4, 4)), stream())

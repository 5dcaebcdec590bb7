"""Augmentation of photographs: what every operation does, and what is mixed with what."""

from __future__ import annotations

import builtins
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from headgate.data import augment
from headgate.data.augment import OPERATIONS, mix_images, rand_augment, random_erasing
from headgate.errors import MissingExtraError

HALF = 0.5


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def photograph(size: tuple[int, int] = (20, 12), seed: int = 0) -> Image.Image:
    """Noise, ``size`` pixels wide and high."""
    pixels = np.random.default_rng(seed).integers(256, size=(size[1], size[0], 3)).astype(np.uint8)
    return Image.fromarray(pixels)


def array(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(int)


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("strength", [0.0, HALF, 1.0])
def test_an_operation_keeps_size_and_mode(name: str, strength: float) -> None:
    image = photograph()
    before = array(image)
    for sign in (-1.0, 1.0):
        changed = OPERATIONS[name](image, strength, sign)
        assert (changed.size, changed.mode) == ((20, 12), "RGB")
    np.testing.assert_array_equal(array(image), before)


@pytest.mark.parametrize("name", ["rotate", "shear_x", "shear_y", "translate_x", "translate_y", "solarize_add"])
def test_an_operation_of_no_strength_changes_nothing(name: str) -> None:
    image = photograph()
    np.testing.assert_array_equal(array(OPERATIONS[name](image, 0.0, 1.0)), array(image))


def test_invert_and_solarize_count_from_the_other_end() -> None:
    image = photograph()
    before = array(image)
    np.testing.assert_array_equal(array(OPERATIONS["invert"](image, HALF, 1.0)), 255 - before)
    solarized = array(OPERATIONS["solarize"](image, HALF, 1.0))
    np.testing.assert_array_equal(solarized, np.where(before < 128, before, 255 - before))
    np.testing.assert_array_equal(array(OPERATIONS["solarize"](image, 1.0, 1.0)), before)


def test_solarize_add_lightens_dark_pixels() -> None:
    before = array(photograph())
    expected = np.where(before < 128, np.minimum(before + 55, 255), before)
    np.testing.assert_array_equal(array(OPERATIONS["solarize_add"](photograph(), HALF, 1.0)), expected)


@pytest.mark.parametrize(("strength", "bits"), [(0.0, 0), (0.25, 1), (0.9, 3), (1.0, 4)])
def test_posterize_keeps_the_highest_bits(strength: float, bits: int) -> None:
    before = array(photograph())
    kept = (before >> (8 - bits)) << (8 - bits)
    np.testing.assert_array_equal(array(OPERATIONS["posterize"](photograph(), strength, 1.0)), kept)


def test_brightness_and_colour_are_scaled_between_a_tenth_and_nearly_two() -> None:
    before = array(photograph())
    for strength in (0.0, 0.25, 1.0):
        factor = 0.1 + 1.8 * strength
        bright = array(OPERATIONS["brightness"](photograph(), strength, 1.0))
        np.testing.assert_allclose(bright, np.clip(factor * before, 0, 255), atol=1)
        grey = array(photograph().convert("L").convert("RGB"))
        colour = array(OPERATIONS["color"](photograph(), strength, 1.0))
        np.testing.assert_allclose(colour, np.clip(grey + factor * (before - grey), 0, 255), atol=1)


def test_translations_move_by_up_to_45_percent_and_the_mean_pixel_moves_in() -> None:
    before = array(photograph())
    left = array(OPERATIONS["translate_x"](photograph(), 1.0, 1.0))  # 0.45 · 20 = 9 pixels
    np.testing.assert_array_equal(left[:, :11], before[:, 9:])
    assert (left[:, 11:] == (124, 116, 104)).all()
    right = array(OPERATIONS["translate_x"](photograph(), 1.0, -1.0))
    np.testing.assert_array_equal(right[:, 9:], before[:, :11])
    tall = photograph((12, 20))
    up = array(OPERATIONS["translate_y"](tall, 1.0, 1.0))
    np.testing.assert_array_equal(up[:11], array(tall)[9:])


def test_shears_shift_a_row_or_column_by_its_place() -> None:
    image = Image.new("RGB", (41, 41), "black")
    image.paste("white", (20, 0, 21, 41))
    sheared = array(OPERATIONS["shear_x"](image, 1.0, 1.0))[:, :, 0].astype(float)
    sheared[:, 26:] = 0  # what moved in
    columns = (sheared * np.arange(41)).sum(1) / sheared.sum(1)
    np.testing.assert_allclose(columns, 20.5 - 0.3 * (np.arange(41) + 0.5) - 0.5, atol=0.6)
    np.testing.assert_array_equal(
        array(OPERATIONS["shear_y"](image.transpose(Image.Transpose.TRANSPOSE), 1.0, 1.0)),
        array(OPERATIONS["shear_x"](image, 1.0, 1.0)).transpose(1, 0, 2),
    )


def test_rotation_is_by_up_to_30_degrees_in_both_directions() -> None:
    image = Image.new("RGB", (101, 101), "black")
    image.paste("white", (80, 49, 85, 52))
    for sign in (1.0, -1.0):
        turned = array(OPERATIONS["rotate"](image, 1.0, sign))[:, :, 0]
        rows, columns = np.nonzero(turned > 200)
        angle = np.degrees(np.arctan2(50 - rows.mean(), columns.mean() - 50))
        assert angle == pytest.approx(30 * sign, abs=2)


def test_two_operations_are_drawn_each_carried_out_half_of_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[str, float, float]] = []

    def spy(name: str) -> Any:
        def operate(image: Image.Image, strength: float, sign: float) -> Image.Image:
            seen.append((name, strength, sign))
            return image

        return operate

    monkeypatch.setattr(augment, "OPERATIONS", {name: spy(name) for name in OPERATIONS})
    draws, image = generator(), photograph()
    for _ in range(1000):
        rand_augment(image, draws)
    assert len(seen) == pytest.approx(1000, abs=110)  # five deviations of 2000 coins
    counts = [sum(name == entry[0] for entry in seen) for name in OPERATIONS]
    assert len(counts) == 15
    assert min(counts) > 30
    strengths = torch.tensor([entry[1] for entry in seen])
    assert float(strengths.max()) <= 1
    assert float(strengths.median()) == pytest.approx(0.9, abs=0.01)
    assert float((strengths.double() - 0.9)[strengths < 0.9].abs().median()) == pytest.approx(0.05 * 0.674, rel=0.2)
    assert sum(entry[2] for entry in seen) == pytest.approx(0, abs=160)


def test_augmentation_depends_on_the_generator_alone() -> None:
    image = photograph()
    before = torch.get_rng_state()
    first, again = (array(rand_augment(image, generator(3), probability=1.0)) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), before)
    np.testing.assert_array_equal(first, again)
    others = [array(rand_augment(image, generator(seed), probability=1.0)) for seed in range(4, 9)]
    assert any((first != other).any() for other in others)
    np.testing.assert_array_equal(array(rand_augment(image, generator(), operations=0)), array(image))


def test_rand_augment_refuses_numbers_out_of_range() -> None:
    for options in ({"magnitude": 11}, {"deviation": -1}, {"operations": -1}):
        with pytest.raises(ValueError, match="magnitude must lie in"):
            rand_augment(photograph(), generator(), **options)
    with pytest.raises(ValueError, match=r"probability must lie in \[0, 1\]"):
        rand_augment(photograph(), generator(), probability=2.0)


def test_a_missing_pillow_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    image, original = photograph(), builtins.__import__

    def refuse(name: str, *arguments: Any) -> Any:
        if name.startswith("PIL"):
            raise ImportError(name)
        return original(name, *arguments)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(MissingExtraError, match="pillow"):
        OPERATIONS["invert"](image, 1.0, 1.0)


def test_one_rectangle_of_noise_is_erased() -> None:
    images = torch.full((200, 2, 30, 40), 7.0)
    erased = random_erasing(images, generator())
    assert (images == 7).all()
    changed = (erased != 7).any(1)
    touched = changed.flatten(1).any(1)
    assert int(touched.sum()) == pytest.approx(50, abs=31)
    for image in erased[touched]:
        rows, columns = (image[0] != 7).nonzero(as_tuple=True)
        height, width = int(rows.max() - rows.min()) + 1, int(columns.max() - columns.min()) + 1
        assert len(rows) == height * width  # a whole rectangle, other pixels untouched
        assert 0.015 <= height * width / 1200 <= 0.36
        assert 0.25 <= height / width <= 3.9
    noise = erased[changed[:, None].expand_as(erased)]
    assert float(noise.mean()) == pytest.approx(0, abs=0.05)
    assert float(noise.std()) == pytest.approx(1, abs=0.05)
    assert torch.equal(random_erasing(images, generator()), erased)


def test_nothing_is_erased_where_no_rectangle_fits_or_none_is_wanted() -> None:
    images = torch.ones(8, 1, 1, 1)
    assert torch.equal(random_erasing(images, generator(), probability=1.0), images)
    images = torch.ones(8, 1, 9, 9)
    assert torch.equal(random_erasing(images, generator(), probability=0.0), images)
    with pytest.raises(ValueError, match="images must have shape"):
        random_erasing(images[0], generator())


def mixed(seed: int, **options: Any) -> tuple[Tensor, Tensor]:
    """Image i is i everywhere and of class i."""
    images = torch.arange(4.0).view(4, 1, 1, 1).expand(4, 2, 8, 10)
    return mix_images(images, torch.arange(4), 5, generator(seed), **options)


def test_images_are_mixed_with_those_from_the_other_end_and_targets_by_the_same_share() -> None:
    kinds = {"mixup": 0, "cutmix": 0}
    for seed in range(60):
        images, targets = mixed(seed, label_smoothing=0.0)
        values = images[0].unique()
        is_cut = set(values.tolist()) <= {0.0, 3.0}
        kinds["cutmix" if is_cut else "mixup"] += 1
        share = 1 - float(images[0].mean()) / 3  # of image 0, in image 0 mixed with image 3
        expected = torch.zeros(5)
        expected[0], expected[3] = share, 1 - share
        torch.testing.assert_close(targets[0], expected, atol=1e-6, rtol=0)
        if is_cut and len(values) == 2:
            rows, columns = (images[0, 0] == 3).nonzero(as_tuple=True)
            assert len(rows) == (rows.max() - rows.min() + 1) * (columns.max() - columns.min() + 1)
            assert torch.equal(images[0, 0], images[0, 1])
            assert torch.equal(images[3] == 0, images[0] == 3)
    assert min(kinds.values()) > 12


def test_targets_are_smoothed_distributions() -> None:
    for seed in range(10):
        _, targets = mixed(seed, label_smoothing=0.1)
        torch.testing.assert_close(targets.sum(1), torch.ones(4))
        assert float(targets.min()) == pytest.approx(0.02)


def test_mixing_depends_on_the_generator_alone() -> None:
    numpy_before = np.random.get_state()[1].tobytes()  # noqa: NPY002
    before = torch.get_rng_state()
    for ours, theirs in zip(mixed(5), mixed(5), strict=True):
        assert torch.equal(ours, theirs)
    assert torch.equal(torch.get_rng_state(), before)
    assert np.random.get_state()[1].tobytes() == numpy_before  # noqa: NPY002


def test_mixing_refuses_what_does_not_fit() -> None:
    images = torch.zeros(3, 1, 4, 4)
    with pytest.raises(ValueError, match="batch=3"):
        mix_images(images, torch.zeros(2, dtype=torch.int64), 5, generator())
    with pytest.raises(TypeError, match="labels must be int64"):
        mix_images(images, torch.zeros(3), 5, generator())
    with pytest.raises(ValueError, match="mixup and cutmix must be positive"):
        mix_images(images, torch.zeros(3, dtype=torch.int64), 5, generator(), mixup=0.0)

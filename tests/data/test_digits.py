"""scikit-learn's digits in a stratified split."""

from __future__ import annotations

import hashlib
from typing import Any

import pytest
import torch
from sklearn.datasets import load_digits

from headgate.data.digits import load_digits_images
from headgate.data.seeding import splitmix64


def test_the_two_sides_hold_every_image_once() -> None:
    train, test = load_digits_images("train"), load_digits_images("test")
    assert train.images.shape == (1200, 1, 8, 8)
    assert test.images.shape == (597, 1, 8, 8)
    pixels, labels = load_digits(return_X_y=True)
    ours = sorted(
        (image.flatten().mul(16).int().tolist(), label)
        for side in (train, test)
        for image, label in zip(side.images, side.labels.tolist(), strict=True)
    )
    assert ours == sorted(zip(pixels.astype(int).tolist(), labels.tolist(), strict=True))


def test_images_are_float32_in_zero_to_one_and_labels_int64() -> None:
    images, labels = load_digits_images("test")
    assert images.dtype == torch.float32
    assert labels.dtype == torch.int64
    assert (images.min(), images.max()) == (0, 1)
    assert torch.equal((images * 16).round() / 16, images)


def test_the_test_side_of_a_class_is_its_smallest_hashes() -> None:
    pixels, labels = load_digits(return_X_y=True)
    threes = [index for index in range(len(labels)) if labels[index] == 3]
    chosen = sorted(threes, key=lambda index: splitmix64(7, index))
    images, test_labels = load_digits_images("test", seed=7)
    found = images[test_labels == 3]
    expected = torch.tensor(pixels[sorted(chosen[: len(found)])] / 16, dtype=torch.float32)
    assert torch.equal(found.reshape(-1, 64), expected)


@pytest.mark.parametrize("test_size", [10, 497, 597, 600, 0.25, 0.5, 1700])
def test_every_class_gives_its_share_and_the_sum_is_exact(test_size: int | float) -> None:
    labels = load_digits_images("test", test_size=test_size).labels
    count = test_size if isinstance(test_size, int) else round(test_size * 1797)
    assert len(labels) == count
    sizes = torch.bincount(torch.tensor(load_digits().target))
    shares = sizes * count / 1797
    assert (labels.bincount() - shares).abs().max() < 1


def test_the_split_is_the_same_bytes_on_every_machine() -> None:
    images, labels = load_digits_images("test", seed=3)
    digest = hashlib.sha256(images.numpy().tobytes() + labels.numpy().tobytes()).hexdigest()
    assert digest == "185752c02eb1005912bd1de679cb15801a839ab58b403124ade0c130ee4e6e69"


def test_another_seed_gives_another_split_of_the_same_sizes() -> None:
    first, second = load_digits_images("test", seed=0), load_digits_images("test", seed=1)
    assert not torch.equal(first.images, second.images)
    assert torch.equal(first.labels.bincount(), second.labels.bincount())


def test_value_range_maps_no_ink_and_full_ink() -> None:
    plain = load_digits_images("test").images
    scaled = load_digits_images("test", value_range=(-1.0, 1.0)).images
    assert torch.equal(scaled, plain * 2 - 1)
    assert scaled.dtype == torch.float32


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"split": "validation"}, "split must be 'train' or 'test', got 'validation'"),
        ({"test_size": 0}, "test_size=0"),
        ({"test_size": 5}, "test_size=5"),
        ({"test_size": 1797}, "test_size=1797"),
        ({"test_size": -3}, "test_size=-3"),
        ({"test_size": 1.5}, "test_size=1.5"),
        ({"value_range": (1.0, 0.0)}, "value_range must be"),
    ],
)
def test_bad_arguments_are_named(arguments: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        load_digits_images(**arguments)

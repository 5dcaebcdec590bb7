"""Class folders of photographs: what is found, which part of an image is seen, and what is wrong with a folder."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from headgate.data import stream_generator
from headgate.data.imagenet import IMAGENET_MEAN, IMAGENET_STD, ImageFolders, imagenet_folder
from headgate.errors import DataError


def ramp(width: int, height: int) -> Image.Image:
    """Red grows with the column, green with the row, blue is constant."""
    columns, rows = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return Image.fromarray(np.stack([columns, rows, np.full_like(rows, 100)], axis=2).round().astype(np.uint8))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, count in (("b", 2), ("a", 3)):
        (tmp_path / name).mkdir()
        for index in range(count):
            ramp(60 + 20 * index, 40).save(tmp_path / name / f"{index}.{'png' if index else 'jpg'}", quality=100)
    return tmp_path


def pixels(images: Tensor) -> Tensor:
    """Standardised images as they were, 0 … 255."""
    std, mean = (torch.tensor(values)[:, None, None] for values in (IMAGENET_STD, IMAGENET_MEAN))
    return 255 * (images * std + mean)


def test_classes_and_images_are_in_the_order_of_their_names(folder: Path) -> None:
    images = ImageFolders(folder)
    assert images.class_names == ("a", "b")
    assert [str(file.relative_to(folder)) for file in images.files] == [
        "a/0.jpg",
        "a/1.png",
        "a/2.png",
        "b/0.jpg",
        "b/1.png",
    ]
    assert images.labels.tolist() == [0, 0, 0, 1, 1]
    assert len(images) == 5


def test_central_crops_are_the_middle_of_the_shorter_side(folder: Path) -> None:
    crops = pixels(ImageFolders(folder).central_crops([1, 2], 35))
    assert crops.shape == (2, 3, 35, 35)
    for crop, width in zip(crops, (80, 100), strict=True):
        first = (width - 35) // 2
        original = torch.from_numpy(np.asarray(ramp(width, 40)).copy()).permute(2, 0, 1).float()
        torch.testing.assert_close(crop, original[:, 2:37, first : first + 35], atol=1e-3, rtol=0)
    whole = pixels(ImageFolders(folder).central_crops([1], 40, share=1.0))[0]
    assert float(whole[1, 0, 0]) == pytest.approx(0, abs=1e-3)
    assert float(whole[1, -1, 0]) == pytest.approx(255, abs=1e-3)


def test_random_crops_see_8_to_100_percent_in_sides_of_3_to_4(folder: Path) -> None:
    images = ImageFolders(folder)
    generators = [stream_generator(0, "crop", step) for step in range(400)]
    crops = pixels(images.random_crops([1] * 400, 16, generators))
    columns = crops[:, 0, 8, -1] - crops[:, 0, 8, 0]
    mirrored = columns < 0
    assert 150 <= int(mirrored.sum()) <= 250
    # Of the ramp's 255 steps a crop shows (its width / 80) · 15/16, but for the rounding of small crops.
    width = columns.abs() / 255 * 16 / 15 * 80
    height = (crops[:, 1, -1, 8] - crops[:, 1, 0, 8]).abs() / 255 * 16 / 15 * 40
    area = width * height / 3200
    assert 0.06 <= float(area.min()) <= 0.12
    assert 0.4 <= float(area.max()) <= 1.03
    ratio = width / height
    assert 0.7 <= float(ratio.min()) <= 0.8
    assert 1.25 <= float(ratio.max()) <= 1.45


def test_a_crop_depends_on_its_own_generator_alone(folder: Path) -> None:
    images = ImageFolders(folder)

    def crops(indices: list[int]) -> Tensor:
        return images.random_crops(indices, 8, [stream_generator(1, "crop", index) for index in indices])

    assert torch.equal(crops([4, 0, 2])[2], crops([2])[0])
    assert not torch.equal(crops([2])[0], images.random_crops([2], 8, [stream_generator(2, "crop", 2)])[0])


def test_crops_can_be_changed_before_they_are_standardised(folder: Path) -> None:
    images = ImageFolders(folder)
    seen: list[tuple[int, int]] = []

    def black(image: Image.Image, generator: torch.Generator) -> Image.Image:
        seen.append(image.size)
        return Image.new("RGB", image.size)

    crops = pixels(images.random_crops([0, 1], 8, [stream_generator(0, "crop", step) for step in range(2)], black))
    assert seen == [(8, 8), (8, 8)]
    torch.testing.assert_close(crops, torch.zeros(2, 3, 8, 8), atol=1e-3, rtol=0)


def test_a_long_image_gives_its_central_square_where_no_crop_fits(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    ramp(1000, 10).save(tmp_path / "a" / "0.png")
    crop = pixels(ImageFolders(tmp_path).random_crops([0], 10, [stream_generator(0, "crop")]))[0]
    reds = crop[0, 5].sort().values
    assert float(reds[0]) == pytest.approx(255 * 495 / 999, abs=0.6)
    assert float(reds[-1]) == pytest.approx(255 * 504 / 999, abs=0.6)


def test_broken_folders_and_images_are_named(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="missing is no folder"):
        ImageFolders(tmp_path / "missing")
    (tmp_path / "empty" / "a").mkdir(parents=True)
    with pytest.raises(DataError, match="empty holds no images"):
        ImageFolders(tmp_path / "empty")
    (folder / "a" / "1.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"1\.png cannot be decoded"):
        ImageFolders(folder).central_crops([1], 8)


def test_numbers_out_of_range_are_refused(folder: Path) -> None:
    images = ImageFolders(folder)
    with pytest.raises(ValueError, match="size must be positive"):
        images.central_crops([0], 0)
    with pytest.raises(ValueError, match=r"share must lie in \(0, 1\], got 1.5"):
        images.central_crops([0], 8, share=1.5)


def test_the_place_of_imagenet_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HEADGATE_IMAGENET", str(tmp_path))
    assert imagenet_folder() == tmp_path
    monkeypatch.delenv("HEADGATE_IMAGENET")
    with pytest.raises(DataError, match="set HEADGATE_IMAGENET"):
        imagenet_folder()

"""ImageNet, or any other set of photographs in class folders, decoded as they are needed.

A split is a folder with one folder per class, named for it, and the images of the class in that. Classes are numbered in
the order of their names, as the published splits of ImageNet-1k (Russakovsky et al., arXiv 1409.0575) are.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from headgate.errors import DataError, MissingExtraError
from headgate.validate import check_positive

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["IMAGENET_MEAN", "IMAGENET_STD", "ImageFolders", "imagenet_folder"]

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def imagenet_folder() -> Path:
    """The folder with ``train/`` and ``val/`` that ``$HEADGATE_IMAGENET`` names.

    Raises:
        DataError: the variable is not set.
    """
    folder = os.environ.get("HEADGATE_IMAGENET")
    if folder is None:
        raise DataError("ImageNet was not found; set HEADGATE_IMAGENET to the folder with train/ and val/ in it")
    return Path(folder)


class ImageFolders:
    """One split.

    Args:
        path: holds ``<class>/<image>``; images are JPEG or PNG.

    Attributes:
        files: the images, class by class, in the order of their names.
        labels: int64 of shape (count,).
        class_names: names of the classes, in order.

    Raises:
        DataError: no folder, or no images in it.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        path = Path(path)
        if not path.is_dir():
            raise DataError(f"{path} is no folder; expected one folder of images per class in it")
        classes = sorted(entry for entry in path.iterdir() if entry.is_dir())
        found = [(file, label) for label, folder in enumerate(classes) for file in sorted(folder.iterdir())]
        if not found:
            raise DataError(f"{path} holds no images; expected one folder of images per class in it")
        self.files = [file for file, _ in found]
        self.labels = torch.tensor([label for _, label in found])
        self.class_names = tuple(folder.name for folder in classes)

    def __len__(self) -> int:
        return len(self.files)

    def random_crops(
        self,
        indices: Sequence[int],
        size: int,
        generators: Sequence[torch.Generator],
        change: Callable[[Image, torch.Generator], Image] | None = None,
    ) -> Float[Tensor, "batch 3 size size"]:
        """Standardised random crops for training, mirrored half of the time.

        A crop has 8 to 100 % of the area and sides of 3:4 to 4:3; after ten that do not fit it is the central square.

        Args:
            indices: which images.
            size: pixels to a side.
            generators: one per image, so that a crop does not depend on its neighbours.
            change: what else is done to the crop, such as :func:`~headgate.data.augment.rand_augment`.

        Raises:
            DataError: an image cannot be decoded.
            MissingExtraError: pillow is not installed.
        """
        check_positive(size=size)

        def load(item: tuple[int, torch.Generator]) -> UInt8[np.ndarray, "size size 3"]:
            index, generator = item
            crop = _random_crop(_open(self.files[index]), size, generator)
            return np.asarray(crop if change is None else change(crop, generator))

        return _stack(load, list(zip(indices, generators, strict=True)))

    def central_crops(
        self, indices: Sequence[int], size: int, share: float = 0.875
    ) -> Float[Tensor, "batch 3 size size"]:
        """Standardised central squares, of ``share`` of the shorter side.

        Args:
            indices: which images.
            size: pixels to a side.
            share: in (0, 1]; 0.875 is a crop of 224 out of 256 pixels.

        Raises:
            DataError: an image cannot be decoded.
            MissingExtraError: pillow is not installed.
        """
        check_positive(size=size)
        if not 0 < share <= 1:
            raise ValueError(f"share must lie in (0, 1], got {share}")

        def load(index: int) -> UInt8[np.ndarray, "size size 3"]:
            image = _open(self.files[index])
            return np.asarray(_resized(image, _central_square(image, share), size))

        return _stack(load, list(indices))


def _open(path: Path) -> Image:
    try:
        from PIL import Image
    except ImportError as error:
        raise MissingExtraError("pillow", "files", "reading photographs") from error
    try:
        return Image.open(path, formats=("JPEG", "PNG")).convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"{path} cannot be decoded; expected a whole JPEG or PNG image") from error


def _random_crop(image: Image, size: int, generator: torch.Generator, attempts: int = 10) -> Image:
    draws = torch.rand(attempts, 4, generator=generator).tolist()
    mirror = bool(torch.rand((), generator=generator) < 0.5)
    box = _central_square(image, 1.0)
    for area_draw, ratio_draw, x_draw, y_draw in draws:
        area = image.width * image.height * (0.08 + 0.92 * area_draw)
        ratio = math.exp((2 * ratio_draw - 1) * math.log(4 / 3))
        width, height = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < width <= image.width and 0 < height <= image.height:
            left, top = int(x_draw * (image.width - width + 1)), int(y_draw * (image.height - height + 1))
            box = (left, top, left + width, top + height)
            break
    crop = _resized(image, box, size)
    if not mirror:
        return crop
    from PIL.Image import Transpose

    return crop.transpose(Transpose.FLIP_LEFT_RIGHT)


def _central_square(image: Image, share: float) -> tuple[int, int, int, int]:
    side = max(1, int(share * min(image.width, image.height)))
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return left, top, left + side, top + side


def _resized(image: Image, box: tuple[int, int, int, int], size: int) -> Image:
    from PIL.Image import Resampling

    return image.resize((size, size), Resampling.BICUBIC, box=box)


def _stack(load: Callable[..., UInt8[np.ndarray, "size size 3"]], items: Sequence[object]) -> Tensor:
    """Standardised images; decoding lets go of the interpreter's lock, so threads help."""
    with ThreadPoolExecutor(max_workers=max(1, os.cpu_count() or 1)) as pool:
        pixels = np.stack(list(pool.map(load, items)))
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
    mean, std = (torch.tensor(values)[:, None, None] for values in (IMAGENET_MEAN, IMAGENET_STD))
    return (images - mean) / std

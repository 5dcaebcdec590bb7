"""The paper's own experiment: ResNet-50 on ImageNet-1K with the recipe of the official code.

40 epochs of batches of 512; SGD with momentum 0.9 and weight decay 1e-4, none on normalisation layers; label smoothing
0.1; learning rate from 1e-4 of its peak to the peak (0.425) at epoch 2 and linearly to 0 at epoch 40; random resized
crops of 160 pixels, growing to 192 between epochs 29 and 34, and flips; evaluation on central crops of 256 pixels. Of the
50,000 validation images 10,000 calibrate and 40,000 test.
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
from torch import Tensor, nn

from headgate.data import stream_generator
from headgate.errors import DataError, MissingExtraError
from headgate.methods.contrastive.matryoshka.resnet import MatryoshkaResNet
from headgate.methods.contrastive.matryoshka.worlds import Items, Part

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["ImageNetWorld", "imagenet_schedule", "imagenet_world"]

_MEAN = (0.485, 0.456, 0.406)
_STD = (0.229, 0.224, 0.225)
_EPOCHS = 40
_PEAK_EPOCH = 2


def imagenet_world(seed: int) -> ImageNetWorld:
    """ImageNet-1K in ``$HEADGATE_IMAGENET``.

    Args:
        seed: decides which validation images calibrate, and the augmentation.

    Raises:
        DataError: the variable is not set, or the folder lacks ``train/`` or ``val/``.
    """
    folder = os.environ.get("HEADGATE_IMAGENET")
    if folder is None:
        raise DataError("ImageNet was not found; set HEADGATE_IMAGENET to the folder with train/ and val/ in it")
    return ImageNetWorld(Path(folder), seed)


def imagenet_schedule(steps: int) -> Callable[[int], float]:
    """The learning rate as a factor of its peak: 1e-4 to 1 over the first two of 40 epochs, then linearly to 0.

    Args:
        steps: of the whole run.
    """

    def factor(step: int) -> float:
        epoch = _EPOCHS * step / steps
        if epoch < _PEAK_EPOCH:
            return 1e-4 + (1 - 1e-4) * epoch / _PEAK_EPOCH
        return max(0.0, (_EPOCHS - epoch) / (_EPOCHS - _PEAK_EPOCH))

    return factor


def train_resolution(epoch: int) -> int:
    """Side of the training crops in an epoch: 160 up to epoch 29, 192 from 34 on, the nearer multiple of 32 between."""
    between = float(np.interp(epoch, [29, 34], [160, 192]))
    return round(between / 32) * 32


class ImageNetWorld:
    """Class folders of images, decoded as they are needed.

    Args:
        folder: holds ``train/<class>/<image>`` and ``val/<class>/<image>``.
        seed: decides the calibration images and the augmentation.
        calibration: number of validation images that calibrate.
        layers: of the ResNet.
        width: of the ResNet.
        evaluation_size: side of the evaluation crops in pixels.

    Raises:
        DataError: a folder is missing or holds no images, or the two hold different classes.
    """

    base_seconds = 0.0

    def __init__(
        self,
        folder: Path,
        seed: int,
        *,
        calibration: int = 10_000,
        layers: Sequence[int] = (3, 4, 6, 3),
        width: int = 64,
        evaluation_size: int = 256,
    ) -> None:
        self.seed, self.layers, self.width, self.evaluation_size = seed, layers, width, evaluation_size
        train, names = _class_folders(folder / "train")
        held, held_names = _class_folders(folder / "val")
        if names != held_names:
            raise DataError(
                f"{folder}: train/ and val/ must hold the same classes, got {len(names)}, {len(held_names)}"
            )
        if not 0 < calibration < len(held):
            raise DataError(f"{folder}/val must hold more than {calibration} images, got {len(held)}")
        self.num_classes = len(names)
        order = torch.randperm(len(held), generator=stream_generator(seed, "validation")).tolist()
        self.files: dict[Part, list[tuple[Path, int]]] = {
            "train": train,
            "validation": [held[index] for index in sorted(order[:calibration])],
            "test": [held[index] for index in sorted(order[calibration:])],
        }

    def encoder(self) -> nn.Module:
        """The ResNet without its head."""
        return _Trunk(self.num_classes, layers=self.layers, width=self.width)

    def batches(self, batch_size: int, seed: int) -> Callable[[int], tuple[Tensor, Tensor]]:
        """Augmented training batches; batch s depends on the seed and s alone."""
        files = self.files["train"]
        steps_per_epoch = len(files) // batch_size

        def batch(step: int) -> tuple[Tensor, Tensor]:
            epoch, place = divmod(step, steps_per_epoch)
            order = torch.randperm(len(files), generator=stream_generator(seed, "epoch", epoch))
            chosen = order[place * batch_size : (place + 1) * batch_size].tolist()
            size = train_resolution(epoch)

            def load(index: int) -> UInt8[np.ndarray, "size size 3"]:
                generator = stream_generator(seed, "augmentation", epoch * len(files) + index)
                return _random_crop(_open(files[index][0]), size, generator)

            return _decode(load, chosen), torch.tensor([files[index][1] for index in chosen])

        return batch

    @torch.no_grad()
    def embed(self, encoder: nn.Module, part: Part) -> Items:
        """Embeddings of central crops."""
        files = self.files[part]
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        encoder = encoder.to(device)
        blocks = []
        for start in range(0, len(files), 256):
            paths = [path for path, _ in files[start : start + 256]]
            images = _decode(lambda path: _central_crop(_open(path), self.evaluation_size), paths)
            blocks.append(encoder(images.to(device)).cpu())
        encoder.cpu()
        return Items(torch.cat(blocks), torch.tensor([label for _, label in files]))

    def images(self, part: Part) -> None:
        """No pictures are drawn at this scale."""
        return


class _Trunk(MatryoshkaResNet):
    """The ResNet up to its pooled features."""

    def __init__(self, num_classes: int, *, layers: Sequence[int], width: int) -> None:
        super().__init__(num_classes, layers=layers, width=width)
        del self.fc

    def forward(self, images: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch dim"]:  # type: ignore[override]
        return self.forward_features(images)


def _class_folders(folder: Path) -> tuple[list[tuple[Path, int]], list[str]]:
    """(image, class) of every image, and the names of the classes."""
    if not folder.is_dir():
        raise DataError(f"{folder} is no folder; expected one folder of images per class in it")
    classes = sorted(path for path in folder.iterdir() if path.is_dir())
    files = [
        (path, label) for label, name in enumerate(classes) for path in sorted(name.iterdir()) if not name.is_symlink()
    ]
    if not files:
        raise DataError(f"{folder} holds no images; expected one folder of images per class in it")
    return files, [path.name for path in classes]


def _open(path: Path) -> Image.Image:
    try:
        from PIL import Image
    except ImportError as error:
        raise MissingExtraError("pillow", "files", "reading ImageNet") from error
    try:
        return Image.open(path, formats=("JPEG", "PNG")).convert("RGB")
    except (OSError, SyntaxError, ValueError) as error:
        raise DataError(f"{path} cannot be decoded; expected a whole JPEG or PNG image") from error


def _random_crop(
    image: Image.Image, size: int, generator: torch.Generator, attempts: int = 10
) -> UInt8[np.ndarray, "size size 3"]:
    """A crop of 8 to 100 % of the area and sides of 3:4 to 4:3, or else the central square; mirrored half the time."""
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
    pixels = _resized(image, box, size)
    return pixels[:, ::-1] if mirror else pixels


def _central_crop(image: Image.Image, size: int) -> UInt8[np.ndarray, "size size 3"]:
    return _resized(image, _central_square(image, 224 / 256), size)


def _central_square(image: Image.Image, share: float) -> tuple[int, int, int, int]:
    side = max(1, int(share * min(image.width, image.height)))
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return left, top, left + side, top + side


def _resized(image: Image.Image, box: tuple[int, int, int, int], size: int) -> UInt8[np.ndarray, "size size 3"]:
    from PIL.Image import Resampling

    return np.asarray(image.resize((size, size), Resampling.BILINEAR, box=box))


def _decode(load: Callable[..., np.ndarray], sources: Sequence[object]) -> Float[Tensor, "batch 3 size size"]:
    """Standardised images; decoding lets go of the interpreter's lock, so threads help."""
    with ThreadPoolExecutor(max_workers=max(1, os.cpu_count() or 1)) as pool:
        pixels = np.stack(list(pool.map(load, sources)))
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
    return (images - torch.tensor(_MEAN)[:, None, None]) / torch.tensor(_STD)[:, None, None]

r"""Augmentation of photographs, as vision transformers are trained with on ImageNet.

RandAugment (Cubuk et al., arXiv 1909.13719), random erasing (Zhong et al., arXiv 1708.04896), mixup (Zhang et al., arXiv
1710.09412) and CutMix (Yun et al., arXiv 1905.04899), with the operations and strengths of DeiT's recipe (Touvron et al.,
arXiv 2012.12877). Every draw comes from a generator that the caller gives.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from headgate.errors import MissingExtraError
from headgate.validate import check_integer, check_probability, check_shape

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["OPERATIONS", "mix_images", "rand_augment", "random_erasing"]

_OUTSIDE = (124, 116, 104)
"""The pixel that moves in from outside: ImageNet's mean."""


def rand_augment(
    image: Image,
    generator: torch.Generator,
    *,
    magnitude: float = 9.0,
    deviation: float = 0.5,
    operations: int = 2,
    probability: float = 0.5,
) -> Image:
    """Change colours and geometry by operations drawn from :data:`OPERATIONS`, with replacement.

    Args:
        image: RGB.
        generator: CPU generator.
        magnitude: mean strength, in [0, 10].
        deviation: of the strength, which is normal and cut to [0, 10].
        operations: how many are drawn.
        probability: of a drawn operation to be carried out.

    Returns:
        An RGB image of the same size.

    Raises:
        MissingExtraError: pillow is not installed.
        ValueError: a number lies outside its range.
    """
    check_probability(probability=probability)
    if not 0 <= magnitude <= 10 or deviation < 0 or operations < 0:
        raise ValueError(
            "magnitude must lie in [0, 10], deviation and operations must not be negative, "
            f"got magnitude={magnitude}, deviation={deviation}, operations={operations}"
        )
    names = tuple(OPERATIONS)
    for _ in range(operations):
        name = names[int(torch.randint(len(names), (), generator=generator))]
        chance, turn = torch.rand(2, generator=generator).tolist()
        strength = magnitude + deviation * float(torch.randn((), generator=generator))
        if chance < probability:
            image = OPERATIONS[name](image, min(10.0, max(0.0, strength)) / 10, 1.0 if turn < 0.5 else -1.0)
    return image


def random_erasing(
    images: Float[Tensor, "batch chans height width"],
    generator: torch.Generator,
    *,
    probability: float = 0.25,
    area: tuple[float, float] = (0.02, 1 / 3),
    ratio: tuple[float, float] = (0.3, 1 / 0.3),
    attempts: int = 10,
) -> Float[Tensor, "batch chans height width"]:
    """Fill one rectangle of an image with normal noise.

    Args:
        images: standardised.
        generator: CPU generator.
        probability: of an image to get a rectangle.
        area: smallest and largest share of the image.
        ratio: smallest and largest height over width, drawn evenly on a logarithmic scale.
        attempts: rectangles drawn until one fits; if none does, the image stays as it is.

    Returns:
        New images.

    Raises:
        ValueError: wrong rank, or a probability outside [0, 1].
    """
    check_shape("images", images, (None, None, None, None), "batch, channels, height, width")
    check_probability(probability=probability)
    count, channels, height, width = images.shape
    images = images.clone()
    chosen = torch.rand(count, generator=generator) < probability
    for index in chosen.nonzero().flatten().tolist():
        for share_draw, ratio_draw, y_draw, x_draw in torch.rand(attempts, 4, generator=generator).tolist():
            pixels = height * width * (area[0] + (area[1] - area[0]) * share_draw)
            shape = math.exp(math.log(ratio[0]) + ratio_draw * math.log(ratio[1] / ratio[0]))
            h, w = round(math.sqrt(pixels * shape)), round(math.sqrt(pixels / shape))
            if 0 < h < height and 0 < w < width:
                top, left = int(y_draw * (height - h + 1)), int(x_draw * (width - w + 1))
                noise = torch.randn(channels, h, w, generator=generator).to(images)
                images[index, :, top : top + h, left : left + w] = noise
                break
    return images


def mix_images(
    images: Float[Tensor, "batch chans height width"],
    labels: Int64[Tensor, " batch"],
    num_classes: int,
    generator: torch.Generator,
    *,
    mixup: float = 0.8,
    cutmix: float = 1.0,
    label_smoothing: float = 0.1,
) -> tuple[Float[Tensor, "batch chans height width"], Float[Tensor, "batch classes"]]:
    """Mix every image with the one that stands in its place when the batch is read backwards.

    Half of the batches, on average, are averaged pixel by pixel (mixup) with weight λ ~ Beta(mixup, mixup); in the
    others a rectangle of area 1 - λ, λ ~ Beta(cutmix, cutmix), comes from the other image (CutMix). Targets are mixed by
    the shares of pixels.

    Args:
        images: a batch.
        labels: classes in [0, num_classes).
        num_classes: C.
        generator: CPU generator.
        mixup: α of mixup, positive.
        cutmix: α of CutMix, positive.
        label_smoothing: ε; a target is ε/C everywhere and 1 - ε more at the class.

    Returns:
        New images, and target distributions ``(batch, num_classes)`` for a cross-entropy.

    Raises:
        TypeError: labels are no integers.
        ValueError: wrong shapes, or a number outside its range.
    """
    check_shape("images", images, (None, None, None, None), "batch, channels, height, width")
    check_shape("labels", labels, (images.shape[0],), "batch")
    check_integer("labels", labels)
    check_probability(label_smoothing=label_smoothing)
    if not mixup > 0 or not cutmix > 0:
        raise ValueError(f"mixup and cutmix must be positive, got mixup={mixup}, cutmix={cutmix}")
    hard = torch.nn.functional.one_hot(labels.long(), num_classes).to(images.dtype)
    targets = label_smoothing / num_classes + (1 - label_smoothing) * hard
    # PyTorch's own Beta distribution draws from the global generator.
    draws = np.random.default_rng(int(torch.randint(1 << 62, (), generator=generator)))
    if draws.random() < 0.5:
        share = float(draws.beta(mixup, mixup))
        mixed = share * images + (1 - share) * images.flip(0)
    else:
        height, width = images.shape[2:]
        side = math.sqrt(1 - float(draws.beta(cutmix, cutmix)))
        h, w = int(height * side), int(width * side)
        y, x = int(draws.integers(height)), int(draws.integers(width))
        top, bottom = max(0, y - h // 2), min(height, y + h // 2)
        left, right = max(0, x - w // 2), min(width, x + w // 2)
        mixed = images.clone()
        mixed[:, :, top:bottom, left:right] = images.flip(0)[:, :, top:bottom, left:right]
        share = 1 - (bottom - top) * (right - left) / (height * width)
    return mixed, share * targets + (1 - share) * targets.flip(0)


def _pillow() -> Any:
    try:
        import PIL
        import PIL.Image
        import PIL.ImageEnhance
        import PIL.ImageOps
    except ImportError as error:
        raise MissingExtraError("pillow", "files", "augmenting photographs") from error
    return PIL


def _enhance(kind: str) -> Callable[[Image, float, float], Image]:
    """0.1 to 1.9 of the original colour, contrast, brightness or sharpness."""

    def change(image: Image, strength: float, sign: float) -> Image:
        return getattr(_pillow().ImageEnhance, kind)(image).enhance(0.1 + 1.8 * strength)

    return change


def _affine(matrix: Callable[[Image, float], tuple[float, ...]]) -> Callable[[Image, float, float], Image]:
    """A linear map of coordinates, from the new image to the old one."""

    def change(image: Image, strength: float, sign: float) -> Image:
        kinds = _pillow().Image
        return image.transform(
            image.size,
            kinds.Transform.AFFINE,
            matrix(image, sign * strength),
            kinds.Resampling.BICUBIC,
            fillcolor=_OUTSIDE,
        )

    return change


def _rotate(image: Image, strength: float, sign: float) -> Image:
    return image.rotate(30 * sign * strength, _pillow().Image.Resampling.BICUBIC, fillcolor=_OUTSIDE)


def _solarize_add(image: Image, strength: float, sign: float) -> Image:
    """Make dark pixels lighter."""
    more = min(128, int(110 * strength))
    table = [min(255, value + more) if value < 128 else value for value in range(256)]
    return image.point(table * 3)


OPERATIONS: Mapping[str, Callable[[Image, float, float], Image]] = {
    "auto_contrast": lambda image, strength, sign: _pillow().ImageOps.autocontrast(image),
    "equalize": lambda image, strength, sign: _pillow().ImageOps.equalize(image),
    "invert": lambda image, strength, sign: _pillow().ImageOps.invert(image),
    "rotate": _rotate,
    # The next two grow weaker with the strength, as in the published recipe.
    "posterize": lambda image, strength, sign: _posterize(image, int(4 * strength)),
    "solarize": lambda image, strength, sign: _pillow().ImageOps.solarize(image, min(256, int(256 * strength))),
    "solarize_add": _solarize_add,
    "color": _enhance("Color"),
    "contrast": _enhance("Contrast"),
    "brightness": _enhance("Brightness"),
    "sharpness": _enhance("Sharpness"),
    "shear_x": _affine(lambda image, amount: (1, 0.3 * amount, 0, 0, 1, 0)),
    "shear_y": _affine(lambda image, amount: (1, 0, 0, 0.3 * amount, 1, 0)),
    "translate_x": _affine(lambda image, amount: (1, 0, 0.45 * amount * image.width, 0, 1, 0)),
    "translate_y": _affine(lambda image, amount: (1, 0, 0, 0, 1, 0.45 * amount * image.height)),
}
"""Name → (image, strength in [0, 1], sign) → image. Strength 1 is magnitude 10."""


def _posterize(image: Image, bits: int) -> Image:
    """Keep the highest ``bits`` bits of every channel; pillow knows 1 to 8, and none is black."""
    return image.point([0] * 768) if bits == 0 else _pillow().ImageOps.posterize(image, bits)

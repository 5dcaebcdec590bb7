"""The six random image transformations, for PIL images and tensors, every draw from a generator that the caller gives.

====================  ================================================================================
horizontal_flip       always
vertical_flip         always
rotation              by up to 180 degrees either way, nearest pixel, same size, black corners
color_jitter          brightness, contrast and saturation times a factor in [0, 2], hue turned by up to half a circle
gaussian_blur         13 x 13, sigma in [1.5, 2]
crop                  a share in [0.08, 1] of the area, sides 3:4 to 4:3, resized to 336 x 336
====================  ================================================================================

Names, ranges and interpolation are those of torchvision's transforms, which the published code calls.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from headgate.errors import MissingExtraError

__all__ = [
    "TRANSFORMS",
    "color_jitter",
    "draw_transform",
    "gaussian_blur",
    "horizontal_flip",
    "random_resized_crop",
    "rotation",
    "vertical_flip",
]

Pixels = Float[Tensor, "*batch channels height width"]
Transform = Callable[..., Tensor]


def draw_transform(generator: torch.Generator, names: Sequence[str] | None = None) -> str:
    """Draw the name of a transformation, all equally likely.

    Args:
        generator: a CPU generator.
        names: to draw from; default: all of :data:`TRANSFORMS`.

    Raises:
        ValueError: a name is unknown, or there is none.
    """
    chosen = tuple(TRANSFORMS if names is None else names)
    unknown = [name for name in chosen if name not in TRANSFORMS]
    if unknown or not chosen:
        raise ValueError(f"names must be out of {', '.join(TRANSFORMS)}, got {chosen}")
    return chosen[int(torch.randint(len(chosen), (), generator=generator))]


def _on_pixels(transform: Transform) -> Callable[..., Any]:
    """Let a function of float images in [0, 1] take uint8 tensors and PIL images, too, and hand back what came."""

    @functools.wraps(transform)
    def apply(image: Any, generator: torch.Generator, **settings: float | tuple[float, float]) -> Any:
        if isinstance(image, Tensor):
            if image.dim() < 3 or image.shape[-3] not in (1, 3):
                raise ValueError(f"image must be (..., 1 or 3, height, width), got {tuple(image.shape)}")
            if image.dtype == torch.uint8:
                return _to_uint8(transform(image.float() / 255, generator, **settings))
            if not image.is_floating_point():
                raise TypeError(f"image must be uint8 or floating point in [0, 1], got {image.dtype}")
            return transform(image, generator, **settings)
        kinds = _pillow()
        if not isinstance(image, kinds.Image):
            raise TypeError(f"image must be a tensor or a PIL image, got {type(image).__name__}")
        pixels = torch.from_numpy(np.asarray(image.convert("RGB")).copy()).permute(2, 0, 1)
        changed = _to_uint8(transform(pixels.float() / 255, generator, **settings))
        return kinds.fromarray(changed.permute(1, 2, 0).numpy())

    return apply


@_on_pixels
def horizontal_flip(image: Pixels, generator: torch.Generator) -> Pixels:
    """Swap left and right.

    Args:
        image: a PIL image (converted to RGB), or a tensor: uint8, or floating point in [0, 1]; leading axes are a batch
            that is transformed alike.
        generator: a CPU generator; not drawn from here.
    """
    return image.flip(-1)


@_on_pixels
def vertical_flip(image: Pixels, generator: torch.Generator) -> Pixels:
    """Swap top and bottom; arguments as of :func:`horizontal_flip`."""
    return image.flip(-2)


@_on_pixels
def rotation(image: Pixels, generator: torch.Generator, *, degrees: float = 180.0) -> Pixels:
    """Turn about the centre by an angle drawn evenly within ``degrees`` either way; black moves in at the corners.

    Args:
        image: as of :func:`horizontal_flip`.
        generator: a CPU generator.
        degrees: the largest angle.
    """
    angle = math.radians(_uniform(generator, -degrees, degrees))
    height, width = image.shape[-2:]
    # Pixel centres, the middle of the image at the origin; each looks up where it came from.
    y = torch.arange(height, device=image.device) - (height - 1) / 2
    x = torch.arange(width, device=image.device) - (width - 1) / 2
    source_x = math.cos(angle) * x[None] - math.sin(angle) * y[:, None] + (width - 1) / 2
    source_y = math.sin(angle) * x[None] + math.cos(angle) * y[:, None] + (height - 1) / 2
    column, row = source_x.round().long(), source_y.round().long()
    inside = (column >= 0) & (column < width) & (row >= 0) & (row < height)
    return image[..., row.clamp(0, height - 1), column.clamp(0, width - 1)] * inside


@_on_pixels
def color_jitter(
    image: Pixels,
    generator: torch.Generator,
    *,
    brightness: float = 1.0,
    contrast: float = 1.0,
    saturation: float = 1.0,
    hue: float = 0.5,
) -> Pixels:
    """Change brightness, contrast, saturation and hue, in an order that is drawn, too.

    Args:
        image: as of :func:`horizontal_flip`; of one channel only brightness and contrast change.
        generator: a CPU generator.
        brightness: the factor is drawn from [max(0, 1 - brightness), 1 + brightness].
        contrast: likewise, about the mean grey level.
        saturation: likewise, about each pixel's grey level.
        hue: the largest turn, as a share of the circle, at most 0.5.
    """
    order = torch.randperm(4, generator=generator).tolist()
    factors = [_uniform(generator, max(0.0, 1 - width), 1 + width) for width in (brightness, contrast, saturation)]
    turn = _uniform(generator, -hue, hue)
    for step in order:
        if step == 0:
            image = (factors[0] * image).clamp(0, 1)
        elif step == 1:
            image = _blend(image, _grey(image).mean(dim=(-2, -1), keepdim=True), factors[1])
        elif image.shape[-3] == 3:
            image = _blend(image, _grey(image), factors[2]) if step == 2 else _turn_hue(image, turn)
    return image


@_on_pixels
def gaussian_blur(
    image: Pixels, generator: torch.Generator, *, kernel_size: int = 13, sigma: tuple[float, float] = (1.5, 2.0)
) -> Pixels:
    """Blur with a Gaussian whose width is drawn evenly from ``sigma``; the image is mirrored at its borders.

    Args:
        image: as of :func:`horizontal_flip`, each side at least ``kernel_size``.
        generator: a CPU generator.
        kernel_size: of the kernel, in pixels, odd.
        sigma: the narrowest and widest standard deviation, in pixels.

    Raises:
        ValueError: an image smaller than the kernel, or an even kernel.
    """
    if kernel_size < 1 or kernel_size % 2 == 0:
        raise ValueError(f"kernel_size must be odd and positive, got {kernel_size}")
    if min(image.shape[-2:]) < kernel_size:
        raise ValueError(f"image must have sides of at least kernel_size={kernel_size}, got {tuple(image.shape)}")
    width = _uniform(generator, *sigma)
    half = kernel_size // 2
    distance = torch.arange(-half, half + 1, dtype=image.dtype, device=image.device)
    kernel = torch.softmax(-0.5 * (distance / width) ** 2, dim=0)
    flat = image.reshape(-1, 1, *image.shape[-2:])
    padded = F.pad(flat, (half, half, half, half), mode="reflect")
    blurred = F.conv2d(F.conv2d(padded, kernel.view(1, 1, -1, 1)), kernel.view(1, 1, 1, -1))
    return blurred.view(image.shape)


@_on_pixels
def random_resized_crop(
    image: Pixels,
    generator: torch.Generator,
    *,
    size: int = 336,
    scale: tuple[float, float] = (0.08, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> Pixels:
    """Cut a random rectangle out and resize it to a square, bilinearly and without aliasing.

    Args:
        image: as of :func:`horizontal_flip`.
        generator: a CPU generator.
        size: side of the result in pixels.
        scale: smallest and largest share of the area.
        ratio: smallest and largest width over height, drawn evenly on a logarithmic scale. Where ten draws do not fit,
            the largest rectangle of an allowed ratio in the middle is taken.
    """
    whole_height, whole_width = image.shape[-2:]
    top, left, height, width = _rectangle(whole_height, whole_width, generator, scale, ratio)
    cut = image[..., top : top + height, left : left + width]
    flat = cut.reshape(-1, 1, height, width)
    resized = F.interpolate(flat, size=(size, size), mode="bilinear", align_corners=False, antialias=True)
    return resized.view(*cut.shape[:-2], size, size)


TRANSFORMS: dict[str, Callable[..., Any]] = {
    "horizontal_flip": horizontal_flip,
    "vertical_flip": vertical_flip,
    "rotation": rotation,
    "color_jitter": color_jitter,
    "gaussian_blur": gaussian_blur,
    "crop": random_resized_crop,
}
"""Name → ``transform(image, generator)``: a PIL image or tensor in, one of the same kind out."""


def _uniform(generator: torch.Generator, low: float, high: float) -> float:
    return low + (high - low) * float(torch.rand((), generator=generator, dtype=torch.float64))


def _rectangle(
    height: int, width: int, generator: torch.Generator, scale: tuple[float, float], ratio: tuple[float, float]
) -> tuple[int, int, int, int]:
    for _ in range(10):
        area = height * width * _uniform(generator, *scale)
        sides = math.exp(_uniform(generator, math.log(ratio[0]), math.log(ratio[1])))
        wide, tall = round(math.sqrt(area * sides)), round(math.sqrt(area / sides))
        if 0 < wide <= width and 0 < tall <= height:
            top = int(torch.randint(height - tall + 1, (), generator=generator))
            left = int(torch.randint(width - wide + 1, (), generator=generator))
            return top, left, tall, wide
    wide = min(width, max(1, round(height * ratio[1])))
    tall = min(height, max(1, round(width / ratio[0])))
    return (height - tall) // 2, (width - wide) // 2, tall, wide


def _blend(image: Tensor, other: Tensor, share: float) -> Tensor:
    return (share * image + (1 - share) * other).clamp(0, 1)


def _grey(image: Tensor) -> Tensor:
    """Luma of ITU-R 601."""
    if image.shape[-3] == 1:
        return image
    weights = torch.tensor([0.2989, 0.587, 0.114], dtype=image.dtype, device=image.device)
    return (image * weights[:, None, None]).sum(dim=-3, keepdim=True)


def _turn_hue(image: Tensor, turn: float) -> Tensor:
    """Turn the hue by a share of the circle, at the same saturation and value."""
    high, low = image.amax(dim=-3), image.amin(dim=-3)
    span = high - low
    red, green, blue = image.unbind(dim=-3)
    safe = torch.where(span > 0, span, 1)
    sixth = torch.where(
        high == red,
        (green - blue) / safe,
        torch.where(high == green, 2 + (blue - red) / safe, 4 + (red - green) / safe),
    )
    hue = (sixth / 6 + turn) % 1.0
    # Each channel is high minus what the distance of the hue from its own leaves of the span.
    channels = [high - span * _fall(hue * 6 + offset) for offset in (5.0, 3.0, 1.0)]
    return torch.stack(channels, dim=-3)


def _fall(place: Tensor) -> Tensor:
    around = place % 6.0
    return torch.minimum(around, 4 - around).clamp(0, 1)


def _to_uint8(image: Tensor) -> Tensor:
    return (image * 255).round().clamp(0, 255).to(torch.uint8)


def _pillow() -> Any:
    try:
        import PIL.Image
    except ImportError as error:
        raise MissingExtraError("pillow", "files", "transforming PIL images") from error
    return PIL.Image

"""Painter's order: the last object lies in front.

With coverages c_k, seen from the front: vis = 1; for k = K-1 … 0: mask_k = c_k vis; vis ← vis - mask_k. The image is
the sum of mask_k rgb_k plus vis times the ground. Coverages are sixteenths and colours whole numbers, so up to four
overlapping objects the arithmetic is exact in float32, in whatever order a device adds.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

__all__ = ["Rendering", "boxes_of", "composite", "finish_image", "labels_of"]


class Rendering(NamedTuple):
    """A batch of pictures with what each pixel shows.

    Attributes:
        image: (batch, channels, height, width), float32 or uint8.
        masks: (batch, objects + 1, height, width), the visible share of ground (0) and objects (1 …); sums to 1.
        labels: (batch, height, width), the channel of ``masks`` that is largest; 0 is the ground.
        amodal: (batch, objects, height, width), what each object would cover if nothing lay before it.
    """

    image: Tensor
    masks: Tensor
    labels: Tensor
    amodal: Tensor


def composite(
    cover: Float[Tensor, "batch objects height width"],
    paint: Float[Tensor, "batch objects height width"],
    colours: Float[Tensor, "batch objects channels"],
    ground: Float[Tensor, "batch channels height width"],
) -> tuple[Float[Tensor, "batch channels height width"], Float[Tensor, "batch objects+1 height width"]]:
    """Lay objects over a ground.

    Args:
        cover: coverage in [0, 1].
        paint: coverage less what the texture darkens; ``cover`` itself for solid objects.
        colours: of the objects, on any scale.
        ground: on the same scale.

    Returns:
        The image on that scale, and the visible masks with the ground first.
    """
    visible = torch.ones_like(ground[:, 0])
    masks = []
    image = torch.zeros_like(ground)
    for index in reversed(range(cover.shape[1])):
        image = torch.addcmul(image, (paint[:, index] * visible)[:, None], colours[:, index, :, None, None])
        masks.append(cover[:, index] * visible)
        visible = visible - masks[-1]
    image = torch.addcmul(image, visible[:, None], ground)
    return image, torch.stack([visible, *reversed(masks)], dim=1)


def finish_image(
    image: Float[Tensor, "batch channels height width"], out: Literal["float32", "uint8"], range: Literal["01", "-11"]
) -> Tensor:
    """Bring an image on the scale 0 to 255 to the dtype and range that were asked for.

    Raises:
        ValueError: an unknown dtype or range, or uint8 with the range -1 to 1.
    """
    if range not in ("01", "-11"):
        raise ValueError(f"range must be '01' or '-11', got {range!r}")
    if out == "uint8" and range == "01":
        # The small extra keeps exact halves, which rounding noise could move down, on the upper side.
        return (image + (0.5 + 2.0**-10)).clamp(0, 255).to(torch.uint8)
    if out == "float32":
        return image / 255.0 if range == "01" else image / 127.5 - 1.0
    raise ValueError(f"out must be 'float32', or 'uint8' with range '01', got out={out!r}, range={range!r}")


def labels_of(masks: Float[Tensor, "batch channels height width"]) -> Int[Tensor, "batch height width"]:
    """Give the channel with the largest share of each pixel, the first of equals.

    A running comparison: ``argmax`` over a strided axis takes most of the time of a whole batch.
    """
    best = masks[:, 0]
    labels = torch.zeros_like(best, dtype=torch.uint8)
    for channel in range(1, masks.shape[1]):
        labels = labels.masked_fill(masks[:, channel] > best, channel)
        best = torch.maximum(best, masks[:, channel])
    return labels.long()


def boxes_of(amodal: Float[Tensor, "batch objects height width"]) -> Float[Tensor, "batch objects 4"]:
    """Frame what each object covers inside the image: left, top, right, bottom in [0, 1]; zeros where there is nothing."""
    covered = amodal > 0
    left, right = _extent(covered.any(dim=-2))
    top, bottom = _extent(covered.any(dim=-1))
    height, width = amodal.shape[-2:]
    boxes = torch.stack([left / width, top / height, right / width, bottom / height], dim=-1)
    return boxes * covered.flatten(2).any(dim=-1, keepdim=True)


def _extent(occupied: Tensor) -> tuple[Int[Tensor, ...], Int[Tensor, ...]]:
    length = occupied.shape[-1]
    first = occupied.int().argmax(dim=-1)
    end = length - occupied.flip(-1).int().argmax(dim=-1)
    return first, end

"""A small world in which objects keep company, so that a model learns to expect what is not there.

Pictures of 24 x 24 noisy pixels hold one to three of 18 objects (six shapes in three colours), each in a cell of a 3 x 3 grid
and turned by quarters, so that a turned or mirrored picture is one that could have been drawn.
In training an object is followed by its *partner*, seven places on in the list of objects, with probability 0.8. Test pictures
have no such habit. A question is an object: is it there? Half of the answers are yes; for the others the object is

    random        any that is not there
    adversarial   a partner of one that is there, and not there itself
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from headgate.data.scenes import World
from headgate.data.seeding import portable_normal, stream_generator
from headgate.methods.steering.ritual.noise import noise_image

__all__ = [
    "KINDS",
    "OBJECTS",
    "TURNS",
    "Questions",
    "Scenes",
    "ask",
    "draw_scenes",
    "noised",
    "picture_world",
    "turned",
]

SHAPES = ("circle", "square", "triangle", "cross", "star", "ring")
HUES = ("red", "green", "blue")
OBJECTS = len(SHAPES) * len(HUES)
KINDS = ("random", "adversarial")
TURNS = ("horizontal flip", "vertical flip", "quarter turn", "half turn", "three quarters", "contrast", "blur")
"""The transformations of this world: rotations are whole quarters, the blur is 3 x 3, and colours stay what they are."""

_CELLS = 9
_MOST = 3
_STEP = 7
_MEAN, _SPREAD = 0.4, 0.25  # about those of the pixels


@dataclass(frozen=True)
class Scenes:
    """Pictures and what is in them.

    Attributes:
        images: as the model gets them, roughly standardised.
        there: whether each object is in the picture.
    """

    images: Float[Tensor, "count 3 24 24"]
    there: Bool[Tensor, "count objects"]


@dataclass(frozen=True)
class Questions:
    """One yes/no question per entry.

    Attributes:
        scene: the picture's place.
        thing: the object asked about.
        answer: whether it is there.
    """

    scene: Int64[Tensor, " count"]
    thing: Int64[Tensor, " count"]
    answer: Bool[Tensor, " count"]


@lru_cache(maxsize=4)
def picture_world(noise: float) -> World:
    """The renderer."""
    return World(
        size=24, shapes=SHAPES, sizes=(0.14,), rotations=4, positions=3, hues=HUES, backgrounds=("grey",), noise=noise
    )


def draw_scenes(count: int, company: float, noise: float, generator: torch.Generator) -> Scenes:
    """Draw pictures of one to three objects.

    Args:
        count: how many.
        company: probability that an object's partner follows it; otherwise any other object.
        noise: standard deviation of the pixel noise, on the scale 0 to 1.
        generator: a CPU generator.
    """
    number = torch.randint(1, _MOST + 1, (count,), generator=generator)
    things = torch.empty(count, _MOST, dtype=torch.int64)
    there = torch.zeros(count, OBJECTS, dtype=torch.bool)
    for place in range(_MOST):
        other = torch.rand(count, OBJECTS, generator=generator).masked_fill(there, -1).argmax(dim=1)
        if place:
            partner = _partner(things[:, place - 1])
            follows = torch.rand(count, generator=generator) < company
            seen = there.gather(1, partner[:, None])[:, 0]
            other = torch.where(follows & ~seen, partner, other)
        things[:, place] = other
        there |= F.one_hot(other, OBJECTS).bool() & (place < number)[:, None]
    cells = torch.rand(count, _CELLS, generator=generator).argsort(dim=1)[:, :_MOST]
    images = picture_world(noise).render(
        {
            "shape": things // len(HUES),
            "hue": things % len(HUES),
            "rotation": torch.randint(4, things.shape, generator=generator),
            "x": cells % 3,
            "y": cells // 3,
            "present": torch.arange(_MOST) < number[:, None],
        },
        noise_keys=torch.randint(2**62, (count,), generator=generator),
    )
    return Scenes((images - _MEAN) / _SPREAD, there)


def ask(scenes: Scenes, count: int, kind: str, generator: torch.Generator) -> Questions:
    """Ask about pictures drawn at random; half of the questions have the answer yes.

    Raises:
        ValueError: unknown kind.
    """
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
    wrong = ~scenes.there
    if kind == "adversarial":
        wrong = wrong & scenes.there.roll(_STEP, dims=1)
    able = wrong.any(dim=1).nonzero()[:, 0]
    scene = able[torch.randint(len(able), (count,), generator=generator)]
    answer = torch.arange(count) % 2 == 0
    allowed = torch.where(answer[:, None], scenes.there[scene], wrong[scene])
    thing = torch.rand(count, OBJECTS, generator=generator).masked_fill(~allowed, -1).argmax(dim=1)
    return Questions(scene, thing, answer)


def turned(
    images: Float[Tensor, "count 3 height width"], seed: int, number: int
) -> Float[Tensor, "count 3 height width"]:
    """Change every picture by one of :data:`TURNS`.

    Args:
        images: as the model gets them.
        seed: of the experiment.
        number: which of a picture's changes, all different: each takes the next in an order of its own.
    """
    generator = stream_generator(seed, "turns")
    order = torch.rand(len(images), len(TURNS), generator=generator).argsort(dim=1)
    strength = 2 * torch.rand(len(images), generator=generator)
    kind = order[:, number]
    result = images.clone()
    for index, name in enumerate(TURNS):
        rows = (kind == index).nonzero()[:, 0]
        result[rows] = _change(images[rows], name, strength[rows])
    return result


def noised(images: Float[Tensor, "count 3 height width"], seed: int) -> Float[Tensor, "count 3 height width"]:
    """The pictures as visual contrastive decoding distorts them, at step 500."""
    noise = portable_normal(images.shape, stream_generator(seed, "noised"))
    return noise_image(images, 500, noise=noise)


def _partner(thing: Int64[Tensor, " count"]) -> Int64[Tensor, " count"]:
    return (thing + _STEP) % OBJECTS


def _change(images: Tensor, name: str, strength: Float[Tensor, " count"]) -> Tensor:
    if name == "horizontal flip":
        return images.flip(-1)
    if name == "vertical flip":
        return images.flip(-2)
    if name == "contrast":
        mean = images.mean(dim=(1, 2, 3), keepdim=True)
        return mean + strength[:, None, None, None] * (images - mean)
    if name == "blur":
        return F.avg_pool2d(F.pad(images, (1, 1, 1, 1), mode="reflect"), 3, stride=1)
    return images.rot90(1 + TURNS[2:5].index(name), dims=(-2, -1))

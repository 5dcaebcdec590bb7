"""A second reader of captions and questions that shares no code with the library: words in, truth out."""

from __future__ import annotations

import re
from typing import Any

from headgate.data.scenes import World

_COUNTS = {"two": 2, "three": 3, "four": 4, "five": 5, "six": 6}
_TEXTURES = {"solid": "solid", "striped": "stripes", "dotted": "dots"}
_RELATION = re.compile(r" (left of|right of|above|below|larger than|smaller than|same colour as|same shape as|and) ")


def things(world: World, batch: dict[str, Any], row: int) -> list[dict[str, Any]]:
    """The present objects of one picture by name, with centres and radii as fractions of the side."""
    found = []
    for slot, present in enumerate(batch["present"][row].tolist()):
        if present:
            value = dict(zip(world.object_factors, batch["factors"][row, slot].tolist(), strict=True))
            thing: dict[str, Any] = {
                name: world.names(name)[value[name]] for name in ("shape", "hue", "size", "texture")
            }
            thing["x"], thing["y"] = float(world.values("x")[value["x"]]), float(world.values("y")[value["y"]])
            thing["radius"] = float(world.values("size")[value["size"]])
            found.append(thing)
    return found


def fits(world: World, thing: dict[str, Any], phrase: str) -> bool:
    """Whether every word of a phrase is true of a thing; unknown words are an error."""
    for word in phrase.split():
        if word in ("a", "an", "nice", "shape", "shapes"):
            continue
        if word in world.names("hue"):
            good = thing["hue"] == word
        elif word in world.names("size"):
            good = thing["size"] == word
        elif word in _TEXTURES:
            good = thing["texture"] == _TEXTURES[word]
        else:
            single = {**{name + "s": name for name in world.names("shape")}, "crosses": "cross"}.get(word, word)
            assert single in world.names("shape"), f"{word!r} is no word of this world"
            good = thing["shape"] == single
        if not good:
            return False
    return True


def related(first: dict[str, Any], words: str, second: dict[str, Any]) -> bool:
    right, down = second["x"] - first["x"], second["y"] - first["y"]
    along = {"left of": right, "right of": -right, "above": down, "below": -down}
    if words in along:
        across = abs(down) if words in ("left of", "right of") else abs(right)
        return along[words] > 1 / 6 + 1e-6 and along[words] > across + 1e-6
    return {
        "larger than": first["radius"] > second["radius"],
        "smaller than": first["radius"] < second["radius"],
        "same colour as": first["hue"] == second["hue"],
        "same shape as": first["shape"] == second["shape"],
        "and": True,
    }[words]


def is_true(world: World, caption: str, scene: list[dict[str, Any]]) -> bool:
    parts = _RELATION.split(caption)
    if len(parts) == 3:
        return any(
            first is not second
            and fits(world, first, parts[0])
            and fits(world, second, parts[2])
            and related(first, parts[1], second)
            for first in scene
            for second in scene
        )
    assert len(parts) == 1, caption
    number, *rest = caption.split()
    if number in _COUNTS:
        return sum(fits(world, thing, " ".join(rest)) for thing in scene) == _COUNTS[number]
    return any(fits(world, thing, caption) for thing in scene)


def answer(world: World, question: str, scene: list[dict[str, Any]]) -> bool:
    if more := re.fullmatch(r"are there more (.+) than (.+)", question):
        first, second = (sum(fits(world, thing, phrase) for thing in scene) for phrase in more.groups())
        return first > second
    asked = re.fullmatch(r"is there (.+)", question)
    assert asked, question
    return is_true(world, asked[1], scene)

"""CLEVR and CLEVRTex: pictures of several objects with a table of what they are.

Batches have the names that :class:`headgate.data.scenes.MultiObject` gives, so code for the one runs on the other.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from headgate.data.factors.pictures import read_labels, read_picture
from headgate.data.factors.protocol import Indices
from headgate.errors import DataError

__all__ = ["ClevrFolder"]

_ATTRIBUTES = ("shape", "color", "material", "size")
_IMAGE_ENDINGS = (".png", ".jpg", ".jpeg")


class ClevrFolder:
    """An image folder with CLEVR scenes.

    Args:
        images: the folder of images.
        scenes: CLEVR's JSON file with a list ``scenes``, or a folder with one JSON per image, as CLEVRTex has it.
        masks: a folder of mask images named like the images, or with ``_flat`` or ``_mask`` before the ending; pixel
            values (or colours, black first) number the objects, 0 is the ground.
        slots: objects of every picture, present or not; default the most in any scene.

    Attributes:
        object_factors: shape, color, material, size.
        vocabulary: factor → the words found, sorted; an index in ``factors`` stands for one, -1 for a missing one.

    Raises:
        DataError: files that are missing or of another format.
        ValueError: fewer slots than objects.
    """

    def __init__(
        self,
        images: str | os.PathLike[str],
        scenes: str | os.PathLike[str],
        masks: str | os.PathLike[str] | None = None,
        slots: int | None = None,
    ) -> None:
        self.images = Path(images)
        self.masks = None if masks is None else Path(masks)
        self.scenes = _read_scenes(Path(scenes))
        self.object_factors = _ATTRIBUTES
        most = max(len(scene["objects"]) for scene in self.scenes)
        self.slots = most if slots is None else slots
        if self.slots < most:
            raise ValueError(f"slots must be at least the {most} objects of the fullest scene, got {slots}")
        words: dict[str, set[str]] = {name: set() for name in _ATTRIBUTES}
        for scene in self.scenes:
            for thing in scene["objects"]:
                for name in _ATTRIBUTES:
                    if name in thing:
                        words[name].add(str(thing[name]))
        self.vocabulary = {name: tuple(sorted(found)) for name, found in words.items()}

    def __len__(self) -> int:
        return len(self.scenes)

    def __getitem__(self, item: int) -> dict[str, Any]:
        """Give one picture: image (channels, height, width) in [0, 1] and what :meth:`batch` gives, without the batch axis."""
        if not -len(self) <= item < len(self):
            raise IndexError(f"item must lie in [0, {len(self)}), got {item}")
        return {name: value[0] for name, value in self.batch([item % len(self)]).items()}

    def batch(self, index: Indices) -> dict[str, Tensor]:
        """Read pictures.

        Args:
            index: which ones; their images must have one size.

        Returns:
            image: (count, 3, height, width) float32 in [0, 1].
            factors: (count, slots, 4) int64 in the order of ``object_factors``; -1 for absent objects.
            present: (count, slots) bool.
            coords: (count, slots, 3) float32, the 3-D centres.
            labels: (count, height, width) int64, where there are masks.

        Raises:
            DataError: an image is missing, unreadable or of another size than the first.
        """
        rows = [self.scenes[number] for number in torch.as_tensor(index).reshape(-1).tolist()]
        pictures = [read_picture(self.images / scene["image_filename"]) for scene in rows]
        if any(picture.shape != pictures[0].shape for picture in pictures):
            raise DataError(f"images of a batch must have one size, got {sorted({tuple(p.shape) for p in pictures})}")
        batch = {
            "image": torch.stack(pictures).permute(0, 3, 1, 2) / 255.0,
            "factors": torch.stack([self._factors(scene["objects"]) for scene in rows]),
            "present": torch.stack([torch.arange(self.slots) < len(scene["objects"]) for scene in rows]),
            "coords": torch.stack([self._coords(scene["objects"]) for scene in rows]),
        }
        if self.masks is not None:
            batch["labels"] = torch.stack(
                [read_labels(_mask_of(self.masks, scene["image_filename"])) for scene in rows]
            )
        return batch

    def _factors(self, objects: Sequence[dict[str, Any]]) -> Int[Tensor, "slots factors"]:
        table = torch.full((self.slots, len(_ATTRIBUTES)), -1, dtype=torch.int64)
        for slot, thing in enumerate(objects):
            for column, name in enumerate(_ATTRIBUTES):
                if name in thing:
                    table[slot, column] = self.vocabulary[name].index(str(thing[name]))
        return table

    def _coords(self, objects: Sequence[dict[str, Any]]) -> Tensor:
        coords = torch.zeros(self.slots, 3)
        for slot, thing in enumerate(objects):
            coords[slot] = torch.tensor(np.asarray(thing["3d_coords"], dtype=np.float32))
        return coords


def _read_scenes(path: Path) -> list[dict[str, Any]]:
    if path.is_dir():
        files = sorted(path.rglob("*.json"))
        scenes = [_load(file) for file in files]
        for file, scene in zip(files, scenes, strict=True):
            if isinstance(scene, dict):
                scene.setdefault("image_filename", str(file.relative_to(path).with_suffix(".png")))
    else:
        whole = _load(path)
        if not isinstance(whole, dict) or not isinstance(whole.get("scenes"), list):
            raise DataError(f"{path}: must hold a list 'scenes'")
        scenes = whole["scenes"]
    if not scenes:
        raise DataError(f"{path}: holds no scenes")
    for number, scene in enumerate(scenes):
        if not isinstance(scene, dict) or not {"image_filename", "objects"} <= scene.keys():
            raise DataError(f"{path}: scene {number} must have 'image_filename' and 'objects'")
        for thing in scene["objects"]:
            if len(thing.get("3d_coords", ())) != 3:
                raise DataError(f"{path}: scene {number} has an object without the three numbers '3d_coords'")
    return scenes


def _load(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read as JSON: {error}") from error


def _mask_of(folder: Path, image: str) -> Path:
    place = folder / image
    for ending in ("", "_flat", "_mask"):
        for suffix in _IMAGE_ENDINGS:
            candidate = place.with_name(place.stem + ending + suffix)
            if candidate.is_file():
                return candidate
    raise DataError(
        f"{folder}: holds no mask for {image}; looked for {place.stem}, {place.stem}_flat and {place.stem}_mask"
    )

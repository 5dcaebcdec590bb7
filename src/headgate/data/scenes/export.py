"""Writing drawn pictures in the forms that public data sets have."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8
from torch import Tensor

from headgate.data.scenes.world import World
from headgate.errors import DataError, MissingExtraError
from headgate.files import atomic_path

__all__ = ["write_dsprites", "write_image_folder"]


def write_dsprites(path: str | os.PathLike[str], world: World, images: UInt8[Tensor, "count height width"]) -> None:
    """Write an npz with the keys of dSprites: imgs, latents_classes, latents_values and metadata.

    As in the original file ``metadata`` is a pickled dictionary; the other arrays are plain and load without unpickling.

    Args:
        path: the file to write.
        world: whose shape, size, rotation, x and y the images enumerate in row-major order.
        images: 0 or 1.
    """
    names = ("shape", "size", "rotation", "x", "y")
    sizes = [1, *(world.cards[name] for name in names)]
    values = [np.ones(1)] + [world.values(name).double().numpy() for name in names]
    values[1] = values[1] + 1.0  # dSprites counts shapes from 1
    classes = np.stack(np.unravel_index(np.arange(len(images)), sizes), axis=1).astype(np.int64)
    columns = [value[column] for value, column in zip(values, classes.T, strict=True)]
    latents = ("color", "shape", "scale", "orientation", "posX", "posY")
    metadata = {
        "title": "Sprites drawn by headgate in the layout of dSprites",
        "latents_names": latents,
        "latents_sizes": np.array(sizes),
        "latents_possible_values": dict(zip(latents, values, strict=True)),
    }
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        np.savez_compressed(
            file,
            imgs=images.numpy(),
            latents_classes=classes,
            latents_values=np.stack(columns, axis=1),
            metadata=np.array(metadata, dtype=object),
        )


def write_image_folder(
    folder: str | os.PathLike[str], examples: Iterable[tuple[UInt8[Tensor, "channels height width"], dict[str, Any]]]
) -> None:
    """Write PNG files and a Hugging Face ``metadata.jsonl``, the whole folder or nothing.

    Args:
        folder: must not exist yet, or be empty.
        examples: images with what their line of the metadata holds besides ``file_name``.

    Raises:
        DataError: the folder holds something.
        MissingExtraError: Pillow is not installed.
    """
    try:
        from PIL import Image
    except ImportError as error:
        raise MissingExtraError("pillow", "files", "writing an image folder") from error
    folder = Path(folder)
    if folder.exists() and any(folder.iterdir()):
        raise DataError(f"{folder} already holds files; choose an empty folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    building = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    try:
        (building / "images").mkdir()
        lines = []
        for number, (image, facts) in enumerate(examples):
            name = f"images/{number:06d}.png"
            pixels = image.permute(1, 2, 0).contiguous().numpy()
            Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels).save(building / name)
            lines.append(json.dumps({"file_name": name} | facts, ensure_ascii=False))
        (building / "metadata.jsonl").write_text("".join(line + "\n" for line in lines), encoding="utf-8")
        building.chmod(0o755)
        if folder.exists():
            folder.rmdir()
        building.rename(folder)
    finally:
        shutil.rmtree(building, ignore_errors=True)

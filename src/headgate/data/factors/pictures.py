"""Reading image files with Pillow."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int, UInt8
from torch import Tensor

from headgate.errors import DataError, MissingExtraError

__all__ = ["read_labels", "read_picture"]


def read_picture(path: Path) -> UInt8[Tensor, "height width 3"]:
    """Read an image as red, green and blue.

    Raises:
        DataError: missing or no image.
        MissingExtraError: Pillow is not installed.
    """
    return torch.from_numpy(np.array(_open(path).convert("RGB")))


def read_labels(path: Path) -> Int[Tensor, "height width"]:
    """Read a mask image: whole numbers as they are, colours numbered from black on in ascending order.

    Raises:
        DataError: missing or no image.
        MissingExtraError: Pillow is not installed.
    """
    picture = _open(path)
    if picture.mode in ("L", "P", "I", "I;16", "1"):
        return torch.from_numpy(np.array(picture).astype(np.int64))
    rgb = np.array(picture.convert("RGB")).astype(np.int64)
    code = (rgb[..., 0] << 16) | (rgb[..., 1] << 8) | rgb[..., 2]
    colours = np.unique(np.append(code.ravel(), 0))
    return torch.from_numpy(np.searchsorted(colours, code))


def _open(path: Path) -> Any:
    try:
        from PIL import Image, UnidentifiedImageError
    except ImportError as error:
        raise MissingExtraError("pillow", "files", "reading images") from error
    try:
        picture = Image.open(path)
        picture.load()
    except (OSError, UnidentifiedImageError) as error:
        raise DataError(f"{path}: cannot be read as an image: {error}") from error
    return picture

"""COCO captions and POPE questions: pictures with text, read from a folder and a JSON file."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from headgate.data.factors.pictures import read_picture
from headgate.errors import DataError

__all__ = ["CocoCaptions", "PopeQuestions"]


class CocoCaptions:
    """COCO captions (Chen et al., 2015).

    Args:
        images: the folder of images, e.g. ``val2017``.
        annotations: e.g. ``captions_val2017.json``, with the lists ``images`` and ``annotations``.

    Raises:
        DataError: the file is missing or of another format, or no image has a caption.
    """

    def __init__(self, images: str | os.PathLike[str], annotations: str | os.PathLike[str]) -> None:
        self.images = Path(images)
        try:
            whole = json.loads(Path(annotations).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise DataError(f"{annotations}: cannot be read as JSON: {error}") from error
        captions: dict[int, list[str]] = {}
        try:
            for line in whole["annotations"]:
                captions.setdefault(line["image_id"], []).append(line["caption"].strip())
            self.items = [
                (picture["file_name"], captions[picture["id"]])
                for picture in whole["images"]
                if picture["id"] in captions
            ]
        except (KeyError, TypeError, AttributeError) as error:
            raise DataError(
                f"{annotations}: must hold 'images' with 'id' and 'file_name', and 'annotations' with 'image_id' and "
                f"'caption'; failed at {error}"
            ) from error
        if not self.items:
            raise DataError(f"{annotations}: holds no image with a caption")

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, item: int) -> dict[str, Any]:
        """Give ``image`` (3, height, width) float32 in [0, 1] and ``caption``, a list of texts."""
        name, captions = self.items[item]
        return {"image": read_picture(self.images / name).permute(2, 0, 1) / 255.0, "caption": list(captions)}


class PopeQuestions:
    """POPE (Li et al., "Evaluating object hallucination in large vision-language models", EMNLP 2023).

    Args:
        images: the folder of images.
        questions: e.g. ``coco_pope_random.json``: a JSON object per line with ``image``, ``text`` and ``label``.

    Raises:
        DataError: the file is missing or of another format.
    """

    def __init__(self, images: str | os.PathLike[str], questions: str | os.PathLike[str]) -> None:
        self.images = Path(images)
        try:
            lines = Path(questions).read_text(encoding="utf-8").splitlines()
        except (OSError, ValueError) as error:
            raise DataError(f"{questions}: cannot be read: {error}") from error
        self.items: list[tuple[str, str, bool]] = []
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                entry = json.loads(line)
                label = {"yes": True, "no": False}[entry["label"].strip().lower()]
                self.items.append((entry["image"], entry["text"], label))
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise DataError(
                    f"{questions}: line {number} must be a JSON object with 'image', 'text' and 'label' yes or no"
                ) from error
        if not self.items:
            raise DataError(f"{questions}: holds no questions")

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, item: int) -> dict[str, Any]:
        """Give ``image`` (3, height, width) float32 in [0, 1], ``text`` and ``answer``, true for yes."""
        name, text, answer = self.items[item]
        return {"image": read_picture(self.images / name).permute(2, 0, 1) / 255.0, "text": text, "answer": answer}

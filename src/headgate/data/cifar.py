"""CIFAR-10 and CIFAR-100: 32×32 colour images, 50,000 for training and 10,000 for testing.

Source: A. Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009. The reader takes the Parquet layout
of the Hugging Face hub (``uoft-cs/cifar10``, ``uoft-cs/cifar100``): a column ``img`` or ``image`` with the encoded
image, and ``label``, or ``fine_label`` and ``coarse_label``.

The originals are stored without loss, as PNG. Copies with JPEG images exist: their pixels differ from the published ones,
and two JPEG libraries need not decode them to the same bytes; :attr:`Cifar.image_format` says which it is, and a warning
is given.

Decoding 50,000 images takes seconds on one core. Threads make it slower (most of an image's time is spent holding the
interpreter's lock), so there are none; ``cache=`` keeps the decoded images instead.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Float32, Int64, Shaped, UInt8
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset

from headgate.errors import DataError, MissingExtraError
from headgate.files import write_bytes
from headgate.validate import check_shape

__all__ = [
    "CIFAR10_CLASSES",
    "CIFAR10_MEAN",
    "CIFAR10_STD",
    "CIFAR100_CLASSES",
    "CIFAR100_COARSE_CLASSES",
    "CIFAR100_MEAN",
    "CIFAR100_STD",
    "Cifar",
    "random_crop_flip",
]

# Per channel, over the 50,000 training images in [0, 1]; the values that most published recipes use.
CIFAR10_MEAN = (0.4914, 0.4822, 0.4465)
CIFAR10_STD = (0.2470, 0.2435, 0.2616)
CIFAR100_MEAN = (0.5071, 0.4865, 0.4409)
CIFAR100_STD = (0.2673, 0.2564, 0.2762)

CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
# fmt: off
CIFAR100_CLASSES = (
    "apple", "aquarium_fish", "baby", "bear", "beaver", "bed", "bee", "beetle", "bicycle", "bottle", "bowl", "boy",
    "bridge", "bus", "butterfly", "camel", "can", "castle", "caterpillar", "cattle", "chair", "chimpanzee", "clock",
    "cloud", "cockroach", "couch", "crab", "crocodile", "cup", "dinosaur", "dolphin", "elephant", "flatfish",
    "forest", "fox", "girl", "hamster", "house", "kangaroo", "keyboard", "lamp", "lawn_mower", "leopard", "lion",
    "lizard", "lobster", "man", "maple_tree", "motorcycle", "mountain", "mouse", "mushroom", "oak_tree", "orange",
    "orchid", "otter", "palm_tree", "pear", "pickup_truck", "pine_tree", "plain", "plate", "poppy", "porcupine",
    "possum", "rabbit", "raccoon", "ray", "road", "rocket", "rose", "sea", "seal", "shark", "shrew", "skunk",
    "skyscraper", "snail", "snake", "spider", "squirrel", "streetcar", "sunflower", "sweet_pepper", "table", "tank",
    "telephone", "television", "tiger", "tractor", "train", "trout", "tulip", "turtle", "wardrobe", "whale",
    "willow_tree", "wolf", "woman", "worm",
)
CIFAR100_COARSE_CLASSES = (
    "aquatic_mammals", "fish", "flowers", "food_containers", "fruit_and_vegetables", "household_electrical_devices",
    "household_furniture", "insects", "large_carnivores", "large_man-made_outdoor_things",
    "large_natural_outdoor_scenes", "large_omnivores_and_herbivores", "medium_mammals", "non-insect_invertebrates",
    "people", "reptiles", "small_mammals", "trees", "vehicles_1", "vehicles_2",
)
# fmt: on

_SIZE = 32
_FORMATS = ("PNG", "JPEG")
_CLASSES = {
    "label": CIFAR10_CLASSES,
    "fine_label": CIFAR100_CLASSES,
    "coarse_label": CIFAR100_COARSE_CLASSES,
}


class Cifar(Dataset[tuple[Tensor, int]]):
    """One split of CIFAR-10 or CIFAR-100, decoded into memory.

    ``dataset[i]`` gives a standardised image and its label; :meth:`batch` gives many at once, augmented if wanted.

    Args:
        path: a Parquet file, or a folder in which ``{split}.parquet`` or ``{split}-*.parquet`` stand (at any depth).
        split: ``"train"`` or ``"test"``.
        labels: ``"fine"`` (``label`` or ``fine_label``) or ``"coarse"`` (CIFAR-100's 20 superclasses).
        cache: a folder for decoded images; the file in it is named for the content of the source and the label kind, so
            another source never meets it.
        mean: what is subtracted per channel from images in [0, 1]; the data set's own mean by default.
        std: what they are divided by then.

    Attributes:
        images: uint8 of shape (count, 3, 32, 32).
        labels: int64 of shape (count,).
        class_names: the name of each label.
        image_format: how the source stores images: ``"PNG"`` (the published pixels) or, where any image is so, ``"JPEG"``.

    Raises:
        DataError: no such file, no Parquet file or a truncated one, missing columns, an image that cannot be decoded or
            is not 32×32 RGB, labels out of range, or a damaged cache.
        MissingExtraError: pyarrow or pillow is not installed.
        ValueError: an unknown split or label kind.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        split: Literal["train", "test"] = "train",
        labels: Literal["fine", "coarse"] = "fine",
        cache: str | os.PathLike[str] | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> None:
        if split not in ("train", "test"):
            raise ValueError(f"split must be 'train' or 'test', got {split!r}")
        if labels not in ("fine", "coarse"):
            raise ValueError(f"labels must be 'fine' or 'coarse', got {labels!r}")
        files = _split_files(Path(path), split)
        sources = [(file, _read_bytes(file)) for file in files]
        content = _read_sources(sources, labels) if cache is None else _cached(sources, labels, Path(cache))
        if content.image_format != "PNG":
            warnings.warn(
                f"{files[0]} holds {content.image_format} images: their pixels differ from the published CIFAR's PNG, "
                "so figures are not comparable to published ones",
                stacklevel=2,
            )
        self.images: UInt8[Tensor, "count 3 32 32"] = content.images
        self.labels: Int64[Tensor, " count"] = content.labels
        self.class_names = content.class_names
        self.image_format = content.image_format
        ten = len(self.class_names) == len(CIFAR10_CLASSES)
        self.mean = tuple(mean) if mean is not None else (CIFAR10_MEAN if ten else CIFAR100_MEAN)
        self.std = tuple(std) if std is not None else (CIFAR10_STD if ten else CIFAR100_STD)
        if len(self.mean) != 3 or len(self.std) != 3 or min(self.std) <= 0:
            raise ValueError(f"mean and std must be three numbers each, std positive, got {self.mean} and {self.std}")

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Float32[Tensor, "3 32 32"], int]:
        """Give one standardised image and its label."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"index must lie in [-{len(self)}, {len(self)}), got {index}")
        return self._standardize(self.images[index]), int(self.labels[index])

    def batch(
        self, indices: Int64[Tensor, " batch"] | Sequence[int], augment: torch.Generator | None = None
    ) -> tuple[Float32[Tensor, "batch 3 32 32"], Int64[Tensor, " batch"]]:
        """Give many standardised images and their labels.

        Args:
            indices: which images.
            augment: the generator of random crops and flips (:func:`random_crop_flip`); None for the plain images. With
                ``stream_generator(seed, "augment", step)`` a step's batch is the same on any worker and after a restart.

        Returns:
            Images of shape (batch, 3, 32, 32) and labels of shape (batch,).
        """
        places = torch.as_tensor(indices, dtype=torch.int64)
        images = self.images[places]
        if augment is not None:
            images = random_crop_flip(images, augment)
        return self._standardize(images), self.labels[places]

    def _standardize(self, images: UInt8[Tensor, "*batch 3 32 32"]) -> Float32[Tensor, "*batch 3 32 32"]:
        mean, std = (torch.tensor(values)[:, None, None] for values in (self.mean, self.std))
        return (images.float() / 255 - mean) / std


def random_crop_flip(
    images: Shaped[Tensor, "batch channels height width"], generator: torch.Generator, padding: int = 4
) -> Shaped[Tensor, "batch channels height width"]:
    """Shift every image by up to ``padding`` pixels each way (zeros move in) and mirror every second one, on average.

    This is the usual augmentation of CIFAR: pad by 4, crop a random 32×32, flip left to right with probability ½.

    Args:
        images: uint8 pixels, or floats before standardisation (so that zero is black).
        generator: a CPU generator; three draws per image are taken from it.
        padding: the largest shift in pixels.

    Returns:
        New images of the same shape and dtype.

    Raises:
        ValueError: a wrong rank or a negative padding.
    """
    check_shape("images", images, (None, None, None, None), "batch, channels, height, width")
    if padding < 0:
        raise ValueError(f"padding must not be negative, got {padding}")
    count, _, height, width = images.shape
    shifts = torch.randint(2 * padding + 1, (2, count, 1), generator=generator)
    flips = torch.randint(2, (count, 1), generator=generator).bool()
    columns = torch.arange(width)
    rows = (shifts[0] + torch.arange(height)).to(images.device)
    columns = (shifts[1] + torch.where(flips, width - 1 - columns, columns)).to(images.device)
    padded = F.pad(images, (padding, padding, padding, padding))
    batch = torch.arange(count, device=images.device)[:, None, None]
    return padded[batch, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2).contiguous()


class _Content(NamedTuple):
    images: UInt8[Tensor, "count 3 32 32"]
    labels: Int64[Tensor, " count"]
    class_names: tuple[str, ...]
    image_format: str


def _split_files(path: Path, split: str) -> list[Path]:
    """The Parquet files of one split, shards in order."""
    other = {"train": "test", "test": "train"}[split]
    if path.is_file():
        if re.match(rf"{other}\b", path.name):
            raise DataError(f"{path} is named for the {other} split; expected a file of the {split} split")
        return [path]
    if not path.is_dir():
        raise DataError(f"{path} does not exist; expected a Parquet file or a folder with {split}.parquet")
    files = sorted({*path.rglob(f"{split}.parquet"), *path.rglob(f"{split}-*.parquet")})
    if not files:
        raise DataError(f"{path} holds no {split}.parquet or {split}-*.parquet; expected one of them")
    shards = [re.fullmatch(rf"{split}-\d+-of-(\d+)\.parquet", file.name) for file in files]
    whole = len(files) == 1 and shards[0] is None
    complete = len({file.parent for file in files}) == 1 and all(
        shard is not None and int(shard[1]) == len(files) for shard in shards
    )
    if not whole and not complete:
        found = ", ".join(str(file.relative_to(path)) for file in files)
        raise DataError(f"{path}: expected one {split}.parquet or all its shards {split}-*-of-*.parquet, found {found}")
    return files


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}; expected a Parquet file") from error


def _cached(sources: Sequence[tuple[Path, bytes]], labels: str, folder: Path) -> _Content:
    digest = hashlib.sha256(labels.encode())
    for _, data in sources:
        digest.update(data)
    path = folder / f"cifar-{digest.hexdigest()[:32]}.safetensors"
    if not path.exists():
        content = _read_sources(sources, labels)
        metadata = {"class_names": json.dumps(content.class_names), "image_format": content.image_format}
        write_bytes(path, save({"images": content.images, "labels": content.labels}, metadata))
        return content
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
            images, labels_ = file.get_tensor("images"), file.get_tensor("labels")
        return _Content(images, labels_, tuple(json.loads(metadata["class_names"])), metadata["image_format"])
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise DataError(f"{path} is no whole cache of decoded images ({error}); delete it to decode again") from error


def _read_sources(sources: Sequence[tuple[Path, bytes]], labels: str) -> _Content:
    parts = [_read_parquet(path, data, labels) for path, data in sources]
    names = parts[0].class_names
    for (path, _), part in zip(sources, parts, strict=True):
        if part.class_names != names:
            raise DataError(f"{path} names other classes than {sources[0][0]}; expected shards of one data set")
    formats = {part.image_format for part in parts}
    return _Content(
        torch.cat([part.images for part in parts]),
        torch.cat([part.labels for part in parts]),
        names,
        "JPEG" if "JPEG" in formats else "PNG",
    )


def _read_parquet(path: Path, data: bytes, labels: str) -> _Content:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise MissingExtraError("pyarrow", "files", "reading CIFAR from Parquet") from error
    try:
        file = pq.ParquetFile(pa.BufferReader(data), page_checksum_verification=True)
        schema = file.schema_arrow
        image_column = _one_of(path, schema.names, ("img", "image"))
        label_column = _one_of(path, schema.names, ("coarse_label",) if labels == "coarse" else ("label", "fine_label"))
        table = file.read(columns=[image_column, label_column])
    except DataError:
        raise
    except (pa.ArrowException, OSError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(f"{path} is no whole Parquet file ({reason}); expected CIFAR in Parquet") from error
    if table.num_rows == 0:
        raise DataError(f"{path} holds no rows; expected images")
    class_names = _class_names(schema.metadata, label_column)
    images, image_format = _decode_images(path, _encoded_images(path, table[image_column], image_column))
    return _Content(
        images, _checked_labels(path, table[label_column], label_column, class_names), class_names, image_format
    )


def _one_of(path: Path, columns: Sequence[str], names: Sequence[str]) -> str:
    for name in names:
        if name in columns:
            return name
    raise DataError(f"{path} lacks the column {' or '.join(names)}; found {', '.join(columns)}")


def _class_names(metadata: dict[bytes, bytes] | None, column: str) -> tuple[str, ...]:
    """The names that the hub's metadata gives the column, else the published ones."""
    try:
        features = json.loads((metadata or {})[b"huggingface"])["info"]["features"]
        return tuple(str(name) for name in features[column]["names"])
    except (KeyError, TypeError, ValueError):
        return _CLASSES[column]


def _encoded_images(path: Path, column: Any, name: str) -> list[bytes]:
    import pyarrow as pa
    import pyarrow.compute as pc

    if pa.types.is_struct(column.type) and column.type.get_field_index("bytes") >= 0:
        column = pc.struct_field(column, "bytes")
    if not (pa.types.is_binary(column.type) or pa.types.is_large_binary(column.type)):
        raise DataError(
            f"{path}, column {name!r}: expected encoded images (bytes, or a struct with bytes), got {column.type}"
        )
    if column.null_count:
        row = pc.index(column.is_null(), True).as_py()
        raise DataError(f"{path}, row {row}: the image is missing; expected an encoded image")
    return column.to_pylist()


def _checked_labels(path: Path, column: Any, name: str, class_names: Sequence[str]) -> Int64[Tensor, " count"]:
    import pyarrow as pa

    if not pa.types.is_integer(column.type) or column.null_count:
        found = f"{column.type} with {column.null_count} rows missing"
        raise DataError(f"{path}, column {name!r}: expected an integer in every row, got {found}")
    values = column.to_numpy().astype(np.int64)
    outside = np.flatnonzero((values < 0) | (values >= len(class_names)))
    if outside.size:
        row = int(outside[0])
        raise DataError(f"{path}, row {row}: expected {name} in [0, {len(class_names)}), got {values[row]}")
    return torch.from_numpy(values)


def _decode_images(path: Path, encoded: Sequence[bytes]) -> tuple[UInt8[Tensor, "count 3 32 32"], str]:
    try:
        from PIL import Image
    except ImportError as error:
        raise MissingExtraError("pillow", "files", "decoding CIFAR's images") from error
    pixels = np.empty((len(encoded), _SIZE, _SIZE, 3), dtype=np.uint8)
    formats = set()
    for row, data in enumerate(encoded):
        try:
            # Only the two formats: pillow knows others that are slow or start other programs.
            image = Image.open(io.BytesIO(data), formats=_FORMATS)
            if image.mode != "RGB" or image.size != (_SIZE, _SIZE):
                width, height = image.size
                raise DataError(
                    f"{path}, row {row}: expected an RGB image of 32×32, got {image.mode} of {width}×{height}"
                )
            pixels[row] = np.frombuffer(image.tobytes(), dtype=np.uint8).reshape(_SIZE, _SIZE, 3)
        except DataError:
            raise
        except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
            raise DataError(f"{path}, row {row}: the image cannot be decoded; expected a whole PNG or JPEG") from error
        formats.add(image.format)
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()
    return images, "JPEG" if "JPEG" in formats else "PNG"
